"""Samples images from trained networks: checks options, runs the sampler, and writes files."""

import copy
import inspect
import itertools
import math
import os
from pathlib import Path

import click

from dnnlib import console
from dnnlib.cli import (
    BAD_USAGE,
    CONTEXT,
    IntList,
    UserError,
    Window,
    cache_dir_option,
    describe,
    run,
    shown_name,
    user_errors,
    verbosity_options,
)
from dnnlib.plugins import plugin_option
from sampling.folders import FolderName, gen_seed_of, is_zip
from sampling.sampling_options import check_given, sampling_options
from sampling.sweeps import sweep_points

_MAX_SHOWN = 64  # images in a grid
_MAX_SEARCHED = 512  # seeds among which equally many images of each class are looked for
_MAX_NAMED = 6  # seeds or states named in a message
_DEFAULT_SEEDS = 64  # --seeds=0-63


def _refuse(ctx, param, value: bool | None) -> None:
    if value:
        raise UserError(f"{param.opts[0]}: not supported; PFGM is --pfgmpp=1 --aug_dim=1", BAD_USAGE)


def _parse_ends(ctx, param, value: str | None) -> tuple[str, ...] | None:
    ends = None if value is None else tuple(value.split(","))
    if ends is not None and (len(ends) < 2 or "" in ends):
        raise click.BadParameter(f"{value!r}: must be at least two seeds, such as 0,7")
    return ends


def _parse_quantiles(ctx, param, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        quantiles = tuple(map(float, value.split(",")))
    except ValueError:
        quantiles = ()
    if not quantiles or not all(0 < q < 1 for q in quantiles):
        raise click.BadParameter(f"{value!r}: must be numbers between 0 and 1, such as "
                                 "0.05,0.5,0.95")
    return quantiles


@click.command(context_settings=CONTEXT)
@click.option("--network", metavar="PT|URL|DIR", help="Network snapshot, training state, or run directory for its newest network. Without this flag, every training state in OUTDIR is sampled.")
@click.option("--outdir", metavar="DIR|ZIP", required=True, help="Folder or NAME.zip for the images; without --network, the run directory.")
@click.option("--ckpt", metavar="KIMG", type=int, default=0, help="First training state to sample, in thousands of images.")
@click.option("--end_ckpt", metavar="KIMG", type=int, default=100_000_000, help="Last training state to sample, in thousands of images.")
@click.option("--seeds", metavar="LIST", type=IntList(), help="Random seeds, e.g. 1,2,5-10; one image per seed.  [default: 0-63; with --init-image or --cond-image, one image per input, under its name]")
@click.option("--subdirs", is_flag=True, help="Create one subfolder per thousand seeds.")
@click.option("--batch", "batch", metavar="INT", type=click.IntRange(min=1), default=64, help="Maximum batch size per process.")
@click.option("--save_images", metavar="[BOOL]", type=click.BOOL, is_flag=False, flag_value=True, default=False, help="Also write vis/grid.png and vis/movie.gif of some images.")
@click.option("--window", metavar="C,W", type=Window(), help="Center and width of the values shown from black to white in the pictures of --save_images, in the data's units.  [default: what networks see as -1 to 1]")
@click.option("--encode", metavar="DIR|ZIP", help="Write the latents of these images to latents.npz instead of sampling images.")
@click.option("--latents", metavar="FILE", help="Latents to start from, as written by --encode; seed k uses latent k mod n of n.")
@click.option("--interpolate", metavar="LIST", callback=_parse_ends, help="Sample images along the way between these seeds, or between latents of --latents given by name or number: A,B or more.")
@click.option("--frames", metavar="INT", type=click.IntRange(min=2), default=16, help="With --interpolate, number of images from each seed or latent to the next.")
@click.option("--radii", metavar="LIST", callback=_parse_quantiles, help="Sample every seed at these quantiles of the radius sqrt(D/c), e.g. 0.05,0.5,0.95. Only for finite D.")
@sampling_options
@click.option("--name-steps", is_flag=True, hidden=True)
@click.option("--use_pickle", type=click.BOOL, is_flag=False, flag_value=True, hidden=True)
@click.option("--edm", type=click.BOOL, is_flag=False, flag_value=True, hidden=True)
@click.option("--pfgm", type=click.BOOL, callback=_refuse, expose_value=False, hidden=True)
@click.option("--align", type=click.BOOL, callback=_refuse, expose_value=False, hidden=True)
@click.option("--align_precond", type=click.BOOL, callback=_refuse, expose_value=False, hidden=True)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to sample.")
@plugin_option()
@cache_dir_option
@verbosity_options
def main(network, outdir, ckpt, end_ckpt, seeds, subdirs, batch, name_steps, use_pickle, edm,
         save_images, window, device, steps, alpha, bits, interpolate, frames, radii, **sampling):
    """Samples images from trained networks, by default with Heun's method on EDM's grid.

    Other solvers need fewer evaluations: --solver=ipndm --steps=7 is nearly as good as the default,
    whose 18 steps evaluate the network 35 times. --disc, --schedule and --scaling are those of the
    EDM paper's ablation study.

    Image k depends only on the network, seed k and the sampler's settings. Existing images are
    kept, so a command that was killed continues when it is repeated. Input images are assigned to
    the seeds in turn: with n of them, --seeds=0-(3n-1) makes three images from each. Without
    --seeds, each input makes one image of its size and name.

    8-bit images of 1 or 3 channels become PNGs. All others become arrays, NAME.npy of [C, H, W], in
    the units of the data that the network was trained on.

    Lists of --steps, --alpha and --bits sample every combination, each into a folder named after
    it, such as ckpt_000200_alpha_0.1_steps_12. With --network, these folders are in OUTDIR and
    their names begin with ckpt_000000. To score them, give 'fid.py calc' a flag for each list:
    --alpha, --steps, --quant.

    --encode runs the sampler backwards, from images to their latents. --latents, --interpolate and
    --radii start from other latents than those that the seeds draw.

    --init-image restores noisy images, with --init-noise=0 if they are noisy enough to start from
    as they are. docs/restoration.md compares the methods.

    \b
    # 64 images of a snapshot
    python generate.py --network=runs/00000/network-snapshot-000200.pt --outdir=out

    \b
    # 50,000 images of every training state of a run, for FID
    torchrun --standalone --nproc_per_node=8 generate.py --outdir=runs/00000 --seeds=0-49999
    """  # noqa: D301 - \b is click's mark for lines to leave alone
    check_given(click.get_current_context().params, _NAMES)
    with user_errors():
        points = sweep_points(steps, alpha, bits, is_steps_sweep=name_steps)
        seeds = _seeds_of_latents(click.get_current_context(), points, seeds, interpolate)
        _check_zip(click.get_current_context(), points)
        subdirs = subdirs or network is None

        from sampling.network_sampler import NetworkFile, NetworkSampler, UsageError
        from torch_utils import distributed
        with distributed.process_group(device) as torch_device:
            sources = distributed.run_on_rank0(lambda: _find_networks(
                network, Path(outdir), ckpt, end_ckpt, seeds or (0,), is_sweep=bool(points[0].suffix),
                is_pickle=bool(use_pickle), is_edm=bool(edm)))
            bad, file = 0, None
            for (source, folder), point in itertools.product(sources, points):
                folder = Path(f"{folder}{point.suffix}")
                try:
                    with console.timed("network"):
                        if file is None or file.source != source:
                            file = NetworkFile.read(source, sampling["key"])
                        sampler = NetworkSampler.open(file, torch_device, **point.settings, **sampling)
                    sampler, rows = _with_latents(sampler, seeds, interpolate, frames, radii)
                except UsageError as error:
                    raise UserError(str(error), BAD_USAGE) from error
                if sampler.encoded is not None:
                    _encode(sampler, folder, seeds, batch)
                    continue
                made = seeds
                if rows or (seeds is None and sampler.latents is not None):
                    made = range(len(sampler.latents))
                elif seeds is None:
                    made = range(len(sampler.inputs))
                failed = _generate(sampler, folder, made, batch, subdirs, is_named=seeds is None)
                bad += failed
                if rows and not failed and distributed.get_rank() == 0:
                    _save_rows(sampler, folder, rows, is_movie=interpolate is not None)
                if save_images and distributed.get_rank() == 0:
                    _save_pictures(sampler, folder, made, min(batch, _MAX_SHOWN), window,
                                   is_sorted=not rows)
                distributed.barrier()
            if bad:
                raise ValueError("some images could not be made, see the warnings above")


_NAMES = {"network": "--network", "outdir": "--outdir", "encode": "--encode",
          "latents": "--latents"}
_OF_LATENTS = {"encode": "--encode", "latents": "--latents", "interpolate": "--interpolate",
               "radii": "--radii"}


def _seeds_of_latents(context: click.Context, points, seeds, interpolate):
    """Returns the seeds to sample, or None for one image per given image or latent.

    Raises:
        UserError: flags about latents contradict each other.
    """
    given = [flag for name, flag in _OF_LATENTS.items() if context.params[name] is not None]
    is_frames_typed = context.get_parameter_source("frames") is click.core.ParameterSource.COMMANDLINE
    if is_frames_typed and interpolate is None:
        raise UserError("--frames: needs --interpolate", BAD_USAGE)
    if context.params["window"] is not None and not context.params["save_images"]:
        raise UserError("--window: only applies to pictures of --save_images; give both", BAD_USAGE)
    default = seeds or tuple(range(_DEFAULT_SEEDS))
    if not given:
        has_inputs = any(context.params[name] for name in ("init_image", "cond_image"))
        if has_inputs and seeds is None and context.params["network"] and context.params["subdirs"]:
            raise UserError("--subdirs: images keep the names and folders of their inputs; leave "
                            "--subdirs out, or number the images with --seeds", BAD_USAGE)
        return seeds if has_inputs else default
    if context.params["average"] is not None:
        raise UserError(f"--average with {given[0]}: each latent makes one image; leave --average "
                        "out", BAD_USAGE)
    typed = context.get_parameter_source("seeds") is click.core.ParameterSource.COMMANDLINE
    if context.params["network"] is None or len(points) > 1:
        raise UserError(f"{given[0]}: works with one network and one setting; name the network "
                        "with --network and give no lists", BAD_USAGE)
    if len(given) > 1 and not (given[0] == "--latents" and len(given) == 2):
        raise UserError(f"{' and '.join(given)}: choose one", BAD_USAGE)
    own_noise = {"--interpolate", "--radii"} & set(given)
    if own_noise and context.params["init_image"] is not None:
        raise UserError(f"{own_noise.pop()} with --init-image: the first starts from its own "
                        "noise, not from images; leave --init-image out", BAD_USAGE)
    for name, flag in (("save_images", "--save_images"), ("subdirs", "--subdirs")):
        if "--encode" in given and context.params[name]:
            raise UserError(f"--encode with {flag}: writes latents, not images; leave {flag} out",
                            BAD_USAGE)
    if interpolate is not None:
        if typed:
            raise UserError("--seeds with --interpolate: the latter names the seeds; leave --seeds "
                            "out", BAD_USAGE)
        return default
    is_one_each = {"--encode", "--latents"} & set(given)
    return None if is_one_each and not typed else default


def _check_zip(context: click.Context, points) -> None:
    """Raises UserError for output that one ZIP of images can't hold."""
    given = context.params
    if not is_zip(given["outdir"]):
        return
    problems = {
        "without --network": given["network"] is None and "makes images of each training state",
        "with lists of --steps, --alpha or --bits": points[0].suffix and "makes each combination",
        "with --encode": given["encode"] and "writes latents.npz",
        "with --save_images": given["save_images"] and "writes pictures to vis/",
        "with --interpolate": given["interpolate"] and "writes pictures to vis/",
        "with --radii": given["radii"] and "writes a picture to vis/",
    }
    for flags, what in problems.items():
        if what:
            raise UserError(f"--outdir={given['outdir']} {flags}: {what}, which one ZIP "
                            "can't hold; name a folder", BAD_USAGE)


def _with_latents(sampler, seeds, interpolate, frames, radii):
    """Returns the sampler with the requested latents, and the number of images per row.

    The number is 0 if no picture with rows is made.
    """
    from images.image_files import error_prefix
    from sampling.latents import at_radii, between
    from sampling.seed_images import UsageError

    if sampler.encoded is not None and seeds is not None and max(seeds) >= len(sampler.encoded):
        raise UsageError(f"--seeds: names image {max(seeds)}, but --encode has "
                         f"{len(sampler.encoded)} images, numbered from 0")
    if interpolate is not None:
        ends = _ends(sampler, interpolate)
        with error_prefix("--interpolate: "):
            latents, columns = between(sampler.draw(ends), frames), frames
        owners = ends[:1]
    elif radii is not None:
        if math.isinf(sampler.net.D):
            raise UsageError("--radii: the network has D = inf, where every latent has the same "
                             "radius; give a network with finite D")
        owners = range(len(sampler.latents)) if seeds is None else seeds
        with error_prefix("--radii: "):
            latents, columns = at_radii(sampler.draw(owners), sampler.net.D, radii), len(radii)
        owners = [seed for seed in owners for _ in radii]
    else:
        return sampler, 0
    return sampler.starting_from(latents, owners), columns


def _ends(sampler, interpolate) -> list[int]:
    """Returns the seeds of --interpolate, given as numbers or as names of latents."""
    from sampling.seed_images import UsageError

    latents, where = sampler.latents, f"--interpolate={shown_name(','.join(interpolate))}"
    found = []
    for end in interpolate:
        is_seed = latents is None and end.isascii() and end.isdecimal()
        try:
            number = (int(end) if is_seed else None) if latents is None else latents.find(end)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        if number is None:
            allowed = "a seed" if latents is None else \
                f"a number from 0 to {len(latents) - 1} or a name, such as " \
                f"{shown_name(latents.names[0])}"
            raise UsageError(f"{where}: {end!r} must be {allowed}")
        found.append(number)
    return found


def preset(help: str, **defaults) -> click.Command:
    """Returns the command with other defaults for its options, by their names in Python.

    `help` is the start of its help text, followed by that of generate.py.
    """
    command = copy.copy(main)
    command.context_settings = {**main.context_settings, "default_map": defaults}
    command.help = f"{help}\n\nThe rest is as in generate.py:\n\n{inspect.cleandoc(main.help)}"
    return command


def _find_networks(network, outdir: Path, ckpt: int, end_ckpt: int, seeds, *, is_sweep: bool,
                   is_pickle: bool, is_edm: bool):
    """Returns a list of (file or URL, folder for its images).

    Raises:
        ValueError: OUTDIR has no training state in the range, or not exactly one pickle of EDM if
            one is asked for.
    """
    from checkpoints.checkpoint import state_tag, training_states
    from checkpoints.names import find_network, found_note
    gen_seed = gen_seed_of(seeds)
    if network is not None:
        found = find_network(network)
        if found != network:
            console.say(f"Network    {found_note(network, found)}")
        return [(found, outdir / str(FolderName("000000", gen_seed)) if is_sweep else outdir)]
    if not outdir.is_dir():
        raise ValueError(f"--outdir={outdir}: no such run directory; without --network, generate.py "
                         "samples the training states of a run; name one, or a --network")
    if is_edm:
        states = [(path, "000000") for path in sorted(outdir.glob("network-snapshot-*.pkl"))]
        if len(states) != 1:
            raise ValueError(f"--outdir={outdir}: holds {len(states)} network-snapshot-*.pkl, but "
                             "--edm needs exactly one for ckpt 000000; name it with --network")
    else:
        states = [(path, state_tag(path))
                  for path in training_states(outdir, "pkl" if is_pickle else "pt")]
    chosen = [(path, tag) for path, tag in states if ckpt <= int(tag.split(".")[0]) <= end_ckpt]
    if not chosen:
        raise ValueError(
            f"--outdir={outdir}: holds {len(states)} training states, none with {ckpt} <= kimg <= "
            f"{end_ckpt}; name a run directory, or a file with --network")
    tags = [tag for _, tag in chosen]
    shown = ", ".join(tags if len(tags) <= _MAX_NAMED else [*tags[:2], "...", tags[-1]])
    console.say(f"Sampling {len(chosen)} of {len(states)} training states, kimg {shown}; "
                "limit the range with --end_ckpt=KIMG")
    return [(path, outdir / str(FolderName(tag, gen_seed))) for path, tag in chosen]


def _generate(sampler, folder, seeds, batch, subdirs, is_named: bool) -> int:
    """Makes this rank's share of the missing images in `folder`.

    With `is_named`, images are named after their inputs, if there are any.

    Returns the number of images that had values that are not finite and were not written.
    """
    from dnnlib.util import counted, format_ranges
    from sampling.image_writer import ImageFolder
    from sampling.image_zip import ImageZip
    from torch_utils import distributed
    stems = sampler.inputs.stems() if is_named and sampler.inputs is not None else None
    _check_place_of_images(sampler, folder)
    subdirs = subdirs and stems is None
    kind = ImageZip if is_zip(folder) else ImageFolder
    images = kind(folder, sampler.shape_of, subdirs, sampler.scaling.is_8bit, stems)
    names = {} if stems is None else {"names": "inputs"}
    labels, bad = {}, []
    with images.being_filled({**sampler.settings, "subdirs": subdirs, **names}):
        missing = images.missing(seeds, deviations=sampler.average > 1)
        if len(missing) < len(seeds):
            distributed.print0(f"{folder}: {len(seeds) - len(missing)} of {len(seeds)} images are "
                               "there")
        samples = sampler.images(sampler.batches(missing, batch), most=batch)
        _make(sampler, samples, images, len(missing), labels, bad)
        bad = sorted(seed for part in distributed.gather_objects(bad) for seed in part)
        parts = distributed.gather_objects(labels)
        if distributed.get_rank() == 0 and sampler.label_kind is not None:
            images.record_labels({seed: label for part in parts for seed, label in part.items()},
                                 lambda seeds: sampler.recorded_labels(sampler.labels_of(seeds)),
                                 sampler.class_names)
        if bad:
            distributed.run_on_rank0(images.record_not_finite, bad)
        distributed.run_on_rank0(images.finish, sorted({*missing} - {*bad}))
    if distributed.get_rank() == 0:
        arrays = "" if sampler.scaling.is_8bit else ", as .npy arrays in the units of the data"
        made = counted(len(missing) - len(bad), "image")
        console.result(f"{folder}: {made} made{arrays}")
    if bad:
        of_latents = "" if sampler.latents is None else ", or these latents may be too large"
        distributed.warn0(
            f"{folder}: {len(bad)} of {len(missing)} images have values that are not finite and "
            f"were not written: seeds {format_ranges(bad[:_MAX_NAMED])}"
            f"{', ...' if len(bad) > _MAX_NAMED else ''}; the network may have diverged, or "
            f"--precision may be too low for it{of_latents}")
    return len(bad)


def _make(sampler, samples, images, count: int, labels: dict, bad: list) -> None:
    """Writes samples as they are made. Collects labels by seed, and the seeds that failed.

    `count` is the number of images on all ranks.
    """
    import torch

    from dnnlib.progress import Progress
    from sampling.image_writer import ImageWriter
    from torch_utils import distributed
    name = images.path.name
    with console.timed(f"{name}, files included"), ImageWriter(images) as writer, \
            Progress(count, name) as progress:
        for done in samples:
            finite = done.images.isfinite().flatten(1).all(dim=1).tolist()
            good = [i for i, is_good in enumerate(finite) if is_good]
            bad += [seed for seed, is_good in zip(done.seeds, finite, strict=True) if not is_good]
            if good:
                kept = torch.tensor(good, device=done.images.device)
                deviations = None if done.deviations is None else sampler.scaling.size_in_data(
                    done.deviations[kept]).cpu().numpy()
                writer.write([done.seeds[i] for i in good],
                             sampler.scaling.to_data(done.images[kept]).cpu().numpy(), deviations)
            if done.class_labels is not None:
                labels |= zip(done.seeds, sampler.recorded_labels(done.class_labels), strict=True)
            progress.update(len(done.seeds) * distributed.get_world_size())


def _check_place_of_images(sampler, folder: Path) -> None:
    """Raises ValueError if the folder is inside the inputs, so that images would become inputs."""
    for images in filter(None, (sampler.inits, sampler.inputs)):
        if os.path.isdir(images.path) and folder.resolve().is_relative_to(
                Path(images.path).resolve()):
            raise ValueError(f"--outdir={folder}: lies inside {images.path}, so its images would "
                             "become inputs; name a folder outside of it")


def _encode(sampler, folder: Path, seeds, batch: int) -> None:
    """Writes the latents of the images to encode, and prints the error of the round trip."""
    from dnnlib.progress import Progress
    from sampling.latents import LATENTS_NAME, joined
    from torch_utils import distributed

    path = folder / LATENTS_NAME
    distributed.run_on_rank0(_check_place_of_latents, path)
    seeds = range(len(sampler.encoded)) if seeds is None else seeds
    distributed.run_on_rank0(lambda: folder.mkdir(parents=True, exist_ok=True))
    parts, errors = [], []
    with console.timed("latents"), Progress(len(seeds), folder.name) as progress:
        for own in filter(None, distributed.split_for_rank(seeds, batch)):
            parts.append((own, sampler.encode(own)))
            difference = sampler.decode(parts[-1][1], own).cpu() - sampler.encoded(own)
            errors += difference.square().flatten(1).mean(dim=1).sqrt().tolist()
            progress.update(len(own) * distributed.get_world_size())
    found = [part for rank in distributed.gather_objects(parts) for part in rank]
    errors = [error for rank in distributed.gather_objects(errors) for error in rank]
    if distributed.get_rank() == 0:
        try:
            joined(found, seeds).save(path)
        except OSError as error:
            raise OSError(f"{path}: can't be written ({error.strerror or error})") from error
        unit = "of 255 levels" if sampler.scaling.is_8bit else "of the networks' scale"
        size = 127.5 if sampler.scaling.is_8bit else 1.0
        mean = size * sum(errors) / len(errors)
        console.say(f"Round trip {mean:.3g} {unit} (RMS; worst image {size * max(errors):.3g}); more "
                    "--steps reduce the error")
        console.result(f"{path}: {len(errors)} latents")


def _check_place_of_latents(path: Path) -> None:
    """Raises ValueError or OSError if latents can't be written to a new file."""
    from dnnlib.atomic import check_writable

    if path.exists():
        raise ValueError(f"{path}: exists; remove it or name another --outdir")
    try:
        check_writable(path)
    except OSError as error:
        raise OSError(f"--outdir={path.parent}: {describe(error)}; name another folder") from error


def _save_rows(sampler, folder: Path, columns: int, *, is_movie: bool) -> None:
    """Writes the images of `folder` as a picture with `columns` per row, and optionally a movie."""
    from images.dataset import ImageFolderDataset
    from images.grid import image_grid, save_gif, save_png
    from images.image_files import PICTURES

    made = ImageFolderDataset(folder)
    count = len(sampler.latents)
    stored, *_ = made.get_batch(range(count))
    pictures = list(sampler.scaling.to_picture(stored))
    (folder / PICTURES).mkdir(exist_ok=True)
    if not is_movie:
        save_png(folder / PICTURES / "radii.png", image_grid(
            [pictures[i:i + columns] for i in range(0, count, columns)]))
        return
    starts = range(0, count - 1, columns - 1)  # the last image of a row begins the next
    save_png(folder / PICTURES / "interpolation.png", image_grid(
        [pictures[i:i + columns] for i in starts]))
    save_gif(folder / PICTURES / "interpolation.gif", [image_grid([[p]]) for p in pictures])


def _save_pictures(sampler, folder, seeds, most: int, window: tuple[float, float] | None, *,
                   is_sorted: bool) -> None:
    """Writes a grid of the images of up to `most` seeds, and a movie of how they form.

    If `is_sorted`, it is sorted by class and shows equally many images of each if it can. If sizes
    differ, only images with the size of the first are shown.
    """
    from dnnlib.progress import stage
    from images.grid import even_classes, save_gif, save_png, square_grid
    from images.image_files import PICTURES
    from images.scaling import display_window
    (folder / PICTURES).mkdir(exist_ok=True)
    count = len(seeds)
    seeds = [seed for seed in itertools.islice(seeds, _MAX_SEARCHED)
             if sampler.shape_of(seed) == sampler.shape_of(seeds[0])]
    classes = None
    if is_sorted and sampler.label_kind == "classes":  # `most` at a time: each draws its latent too
        classes = [k for i in range(0, len(seeds), most) for k in sampler.classes(seeds[i:i + most])]
    chosen = classes and even_classes(classes, most)
    if chosen is None:
        chosen = range(min(len(seeds), most))
    classes = classes and [classes[i] for i in chosen]
    shown = window and display_window(*window)
    with stage("Drawing pictures"):
        frames = [square_grid(images.numpy(), classes, sampler.class_names)
                  for images in sampler.trajectory([seeds[i] for i in chosen], shown)]
        save_png(folder / PICTURES / "grid.png", frames[-1])
        save_gif(folder / PICTURES / "movie.gif", frames)
    of_all = f" of {count}" if len(chosen) < count else ""
    by_class = " by class" if classes else ""
    console.say(f"{folder / PICTURES}: {len(chosen)}{of_all} images{by_class} in grid.png, and how "
                "they are sampled in movie.gif")


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
