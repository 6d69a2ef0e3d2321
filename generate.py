"""Samples images from trained networks: checks the options, calls the sampler, writes PNGs."""

import dataclasses
import math
from pathlib import Path

import click

from dnnlib.cli import BAD_USAGE, IntList, UserError, user_errors

_MAX_SHOWN = 64  # images in a grid
_LAST_SEEDS = ((49_999, "ckpt_"), (99_999, "ckpt_2_"), (math.inf, "ckpt_3_"))


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.option("--network", metavar="PT|URL", help="Network snapshot or training state; without it, every training state of OUTDIR.")
@click.option("--outdir", metavar="DIR", required=True, help="Where the images go; without --network, the run directory.")
@click.option("--ckpt", metavar="KIMG", type=int, default=0, help="First training state, in thousands of images.")
@click.option("--end_ckpt", metavar="KIMG", type=int, default=100_000_000, help="Last training state, in thousands of images.")
@click.option("--seeds", metavar="LIST", type=IntList(), default="0-63", help="Random seeds, e.g. 1,2,5-10; one image each.")
@click.option("--subdirs", is_flag=True, help="One subfolder per thousand seeds.")
@click.option("--class", "class_idx", metavar="INT", type=int, help="Class label.  [default: random]")
@click.option("--batch", "batch", metavar="INT", type=click.IntRange(min=1), default=64, help="Largest batch per process.")
@click.option("--steps", "num_steps", metavar="INT", type=click.IntRange(min=1), default=18, help="Number of noise levels.")
@click.option("--sigma_min", metavar="FLOAT", type=click.FloatRange(min=0, min_open=True), help="Lowest noise level.  [default: 0.002, or the discretisation's]")
@click.option("--sigma_max", metavar="FLOAT", type=click.FloatRange(min=0, min_open=True), help="Highest noise level.  [default: 80, 380 for --lsun networks, or the discretisation's]")
@click.option("--rho", metavar="FLOAT", type=click.FloatRange(min=0, min_open=True), default=7, help="Exponent of the grid of noise levels.")
@click.option("--S_churn", "S_churn", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Strength of the stochastic sampler; for D = inf only.")
@click.option("--S_min", "S_min", metavar="FLOAT", type=click.FloatRange(min=0), default=0, help="Lowest noise level that is churned.")
@click.option("--S_max", "S_max", metavar="FLOAT", type=click.FloatRange(min=0), default=math.inf, help="Highest noise level that is churned.")
@click.option("--S_noise", "S_noise", metavar="FLOAT", type=click.FloatRange(min=0), default=1, help="Factor on the noise of churn.")
@click.option("--solver", type=click.Choice(["euler", "heun"]), help="Ablation sampler: solver.  [default: heun]")
@click.option("--disc", "discretization", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Ablation sampler: grid of noise levels.  [default: edm]")
@click.option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Ablation sampler: noise level over time.  [default: linear]")
@click.option("--scaling", type=click.Choice(["vp", "none"]), help="Ablation sampler: scale of the state.  [default: none]")
@click.option("--save_images", type=click.BOOL, is_flag=False, flag_value=True, default=False, help="Also write vis/grid.png and vis/movie.gif of the first images.")
@click.option("--pfgmpp", type=click.BOOL, help="For files that do not record D; else checked against the file.")
@click.option("--aug_dim", metavar="D", type=float, help="For files that do not record D; else checked against the file.")
@click.option("--use_pickle", type=click.BOOL, is_flag=False, flag_value=True, hidden=True)
@click.option("--edm", type=click.BOOL, is_flag=False, flag_value=True, hidden=True)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", help="Arithmetic inside the network.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to sample.")
def main(network, outdir, ckpt, end_ckpt, seeds, subdirs, class_idx, batch, pfgmpp, aug_dim,
         use_pickle, edm, save_images, precision, device, **sampler_options):
    """Samples images from trained networks, by Heun's method on the grid of EDM.

    Any of --solver, --disc, --schedule, --scaling selects the ablation sampler of the EDM paper.

    Image k is a function of the network, seed k and the sampler's settings alone. Images that are
    there already are kept, so a run that was killed is continued by running it again.

    \b
    # 64 images of a snapshot
    python generate.py --network=runs/00000/network-snapshot-000200.pt --outdir=out

    \b
    # 50,000 images of every training state of a run, for FID
    torchrun --standalone --nproc_per_node=8 generate.py --outdir=runs/00000 --seeds=0-49999
    """  # noqa: D301 - \b is click's mark for lines to leave alone
    with user_errors():
        sources = _find_networks(network, Path(outdir), ckpt, end_ckpt, seeds)

        from torch_utils import distributed, misc
        from training import checkpoint
        from training.sampling import SamplerConfig
        sampler = SamplerConfig(**sampler_options)
        misc.configure_backends(precision)
        with distributed.process_group(device) as torch_device:
            if precision == "fp16" and torch_device.type != "cuda":
                distributed.print0("Note: fp16 is for GPUs; on the CPU the network runs in fp32")
            for source, folder in sources:
                content = checkpoint.settle_D(checkpoint.load(source), source, pfgmpp, aug_dim)
                net, digest, net_sampler = _build_network(content, torch_device, precision, sampler)
                _check_class(source, net, class_idx)
                net_sampler.check(net)
                settings = {
                    "weights": digest, "class": class_idx, "precision": precision,
                    "device": torch_device.type, "D": _json_number(net.D),
                    "subdirs": subdirs or network is None,
                    **{k: _json_number(v) for k, v in dataclasses.asdict(net_sampler).items()},
                }
                sampling = {"sampler": net_sampler, "device": torch_device, "class_idx": class_idx}
                _generate(net, folder, settings, seeds, batch, sampling, subdirs or network is None)
                if save_images and distributed.get_rank() == 0:
                    _save_pictures(net, folder, seeds[:min(batch, _MAX_SHOWN)], sampling)
                distributed.barrier()


def _find_networks(network, outdir: Path, ckpt: int, end_ckpt: int, seeds):
    """Returns [(file or URL, folder for its images)].

    Raises:
        ValueError: no training state in OUTDIR between the two.
    """
    from training.checkpoint import state_tag, training_states
    if network is not None:
        return [(network, outdir)]
    states = [(path, state_tag(path)) for path in training_states(outdir)]
    chosen = [(path, tag) for path, tag in states if ckpt <= int(tag.split(".")[0]) <= end_ckpt]
    if not chosen:
        raise ValueError(
            f"--outdir={outdir}: {len(states)} training states, none with {ckpt} <= kimg <= "
            f"{end_ckpt}; name a run directory, or a file with --network")
    prefix = next(prefix for last, prefix in _LAST_SEEDS if max(seeds) <= last)
    return [(path, outdir / f"{prefix}{tag}") for path, tag in chosen]


def _build_network(content, device, precision, sampler):
    """Returns the EMA network on the device, the digest of its weights, and the sampler for it."""
    from torch_utils.misc import compute_dtype
    from training import checkpoint
    from training.loss import LSUN_SIGMA_MAX
    net = checkpoint.build_ema(content).to(device)
    net.compute_dtype = compute_dtype(precision)
    is_edm_grid = sampler.discretization in (None, "edm")
    if content["options"].get("lsun") and is_edm_grid and sampler.sigma_max is None:
        sampler = dataclasses.replace(sampler, sigma_max=LSUN_SIGMA_MAX)
    return net, checkpoint.digest(checkpoint.sampling_weights(content)), sampler


def _check_class(source, net, class_idx) -> None:
    """Raises UserError where the network does not have the class."""
    if class_idx is None:
        return
    if not net.label_dim:
        raise UserError(f"--class={class_idx}: {source} is unconditional; leave --class out",
                        BAD_USAGE)
    if not 0 <= class_idx < net.label_dim:
        raise UserError(f"--class={class_idx}: must be between 0 and {net.label_dim - 1}",
                        BAD_USAGE)


def _generate(net, folder, settings, seeds, batch, sampling, subdirs) -> None:
    """Makes the images of `folder` that are missing, this rank's share of them."""
    from tqdm import tqdm

    from torch_utils import distributed
    from training.image_writer import ImageFolder, ImageWriter
    from training.sampling import generate_images, to_uint8
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    images = ImageFolder(folder, shape, subdirs)
    distributed.run_on_rank0(images.open, settings)
    missing = distributed.run_on_rank0(images.missing, seeds)
    if len(missing) < len(seeds):
        distributed.print0(f"{folder}: {len(seeds) - len(missing)} of {len(seeds)} images are there")
    batches = distributed.split_for_rank(missing, batch)
    quiet = None if distributed.get_rank() == 0 else True
    with ImageWriter(images) as writer, tqdm(total=sum(map(len, batches)), unit="img", desc=folder.name, disable=quiet) as bar:
        for done in generate_images(net, batches, **sampling):
            writer.write(done.seeds, to_uint8(done.images).cpu().numpy())
            bar.update(len(done.seeds))
    distributed.barrier()
    distributed.print0(f"{folder}: {len(missing)} images made")


def _save_pictures(net, folder, seeds, sampling) -> None:
    """Writes a grid of the images of `seeds` and a movie of how they came about."""
    from training.grid import save_gif, save_png, square_grid
    from training.image_files import PICTURES
    from training.sampling import trajectory
    (folder / PICTURES).mkdir(exist_ok=True)
    frames = [square_grid(images.numpy()) for images in trajectory(net, seeds, **sampling)]
    save_png(folder / PICTURES / "grid.png", frames[-1])
    save_gif(folder / PICTURES / "movie.gif", frames)


def _json_number(value):
    return "inf" if isinstance(value, float) and math.isinf(value) else value


if __name__ == "__main__":
    main()
