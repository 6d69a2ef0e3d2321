"""Measures the likelihood of images under a trained network, in bits per dimension."""

import csv
import io
import json
import math
import time
from pathlib import Path

import click

from dnnlib import console
from dnnlib.cli import (
    BAD_USAGE,
    CONTEXT,
    UserError,
    cache_dir_option,
    describe,
    run,
    user_errors,
    verbosity_options,
)
from dnnlib.plugins import plugin_option
from metrics.score_names import SCORES_FILE

_MAX_NAME_BYTES = 80  # of the network's and the data set's name within the name of a table
_ALIKE = 0.01  # levels whose widths differ by less than this share are comparable


def _refuse_guidance(ctx, param, value) -> None:
    if value is not None:
        raise UserError(f"{param.opts[0]}: the density of guided sampling is unknown; "
                        f"leave {param.opts[0]} out", BAD_USAGE)


@click.command(context_settings=CONTEXT)
@click.option("--network", metavar="PT|URL|DIR", required=True, help="Network snapshot, training state, or run directory for its newest network.")
@click.option("--data", metavar="DIR|ZIP", required=True, help="Images to measure, with labels or condition images if the network takes them.")
@click.option("--val-data", metavar="DIR|ZIP", help="Held-out images to measure as well.")
@click.option("--count", metavar="INT", type=click.IntRange(min=1), default=64, help="Maximum number of images to measure in each data set.")
@click.option("--steps", metavar="INT", type=int, default=32, help="Number of solver steps, which must be even. Each takes four network evaluations. A second solution with half as many steps estimates the error.")
@click.option("--probes", metavar="INT", type=click.IntRange(min=1), default=1, help="Number of random vectors for estimating a trace of the network's Jacobian.")
@click.option("--exact", is_flag=True, help="Compute the traces exactly. Only feasible for small images.")
@click.option("--dequantize", type=click.Choice(["uniform", "none"]), help="Noise of one level to add to data stored as whole numbers.  [default: uniform for such data]")
@click.option("--cond", metavar="BOOL", type=click.BOOL, default=True, help="Give the labels of the data to the network.")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed for the choice of images, the noise and the random vectors.")
@click.option("--batch", metavar="INT", type=click.IntRange(min=1), default=16, help="Batch size per device.")
@click.option("--out", metavar="JSONL", help="File to which one line per data set is appended.  [default: metrics.jsonl beside the network]")
@click.option("--pfgmpp", metavar="BOOL", type=click.BOOL, help="Whether the network is PFGM++. Only for files that do not record D; otherwise checked against the file.")
@click.option("--aug_dim", metavar="D", type=float, help="Augmented dimensions. Only for files that do not record D; otherwise checked against the file.")
@click.option("--key", metavar="NAME", help="Which network of an IDMD file to use: ema_0_9900, ema_0_9950, ema_0_9990, ema_0_9999, generator or student.  [default: ema_0_9990]")
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), default="fp32", help="Precision of the network's arithmetic.")
@click.option("--guidance", callback=_refuse_guidance, expose_value=False, hidden=True)
@click.option("--gnet", callback=_refuse_guidance, expose_value=False, hidden=True)
@click.option("--guidance-interval", callback=_refuse_guidance, expose_value=False, hidden=True)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to compute.")
@plugin_option()
@cache_dir_option
@verbosity_options
def main(network: str, data: str, val_data: str | None, count: int, steps: int, probes: int,
         exact: bool, batch: int, out: str | None, device: str, **options) -> None:
    """Measures how likely images are under a network, in bits per dimension.

    The probability-flow ODE is solved from each image to the highest noise level, where the density
    is known. Fewer bits mean more likely images. Data stored as whole numbers of 8 or 16 bits are
    dequantised, so the result is an upper bound for an ideal code. For floating-point data, the
    result is in nats per dimension, per unit of the data.

    The last line for each data set is 'bits/dim: MEAN +- STANDARD ERROR (N images)'. The mean is
    appended to --out. The values of the images are written to likelihood-NETWORK-DATA-KEY.csv
    beside it, where KEY depends on the settings and the data.

    \b
    # 64 training images and 64 images that were not trained on
    python likelihood.py --network=runs/00000 --data=datasets/train.zip --val-data=datasets/val.zip

    \b
    # on 8 GPUs
    torchrun --standalone --nproc_per_node=8 likelihood.py --count=10000 \\
        --network=runs/00000/network-snapshot-000200.pt --data=datasets/val.zip
    """  # noqa: D301 - \b is click's mark for lines to leave alone
    for flag, value, wanted in (("--network", network, "a network, a file or run directory"),
                                ("--data", data, "a data set, a folder or ZIP"),
                                ("--val-data", val_data, "a data set, a folder or ZIP"),
                                ("--out", out, "a file to append to")):
        if value == "":
            raise UserError(f"{flag}=: must be {wanted}", BAD_USAGE)
    source = click.get_current_context().get_parameter_source("probes")
    if exact and source is click.core.ParameterSource.COMMANDLINE:
        raise UserError(f"--exact with --probes={probes}: exact traces need no random vectors; "
                        "leave one of them out", BAD_USAGE)
    with user_errors():
        from checkpoints.names import find_network, found_note
        from dnnlib.util import is_url
        from sampling.network_likelihood import LikelihoodData, NetworkLikelihood, UsageError
        from torch_utils import distributed as dist

        with dist.process_group(device) as chosen_device:
            given, network = network, dist.run_on_rank0(find_network, network)
            if network != given:
                dist.print0(f"Network    {found_note(given, network)}")
            default = None if is_url(network) else Path(network).parent / SCORES_FILE
            path = Path(out) if out else default
            dist.run_on_rank0(_check_place, path, bool(out))
            try:
                measure = NetworkLikelihood.open(network, chosen_device, steps=steps, probes=probes,
                                                 exact=exact, **options)
                flags = {"--data": data} | ({} if val_data is None else {"--val-data": val_data})
                with dist.rank0_first():
                    sets = {flag: LikelihoodData(source, measure, count, measure.seed, flag)
                            for flag, source in flags.items()}
                    widths = [measure.width_of(images) for images in sets.values()]
            except UsageError as error:
                raise UserError(str(error), BAD_USAGE) from error
            _warn_of_units([measure.unit_of(images) for images in sets.values()], widths,
                           sets["--data"].num_levels)
            for flag, images in sets.items():
                _report(measure, images, network, path, batch, is_held_out=flag == "--val-data")


def _warn_of_units(units: list[str], widths: list[float], num_levels: int) -> None:
    """Warns if the values of --data and --val-data can't be compared."""
    from torch_utils import distributed as dist

    if len(set(units)) > 1:
        dist.warn0(f"--data is measured in {units[0]} and --val-data in {units[1]}, because only "
                   "one of them holds whole numbers; they can't be compared")
    elif max(widths) > (1 + _ALIKE) * min(widths):
        dist.warn0(f"the levels are {widths[0]:.4g} of {num_levels} apart in --data, but "
                   f"{widths[1]:.4g} in --val-data; bits for different levels can't be compared")


def _check_place(path: Path | None, is_given: bool) -> None:
    """Raises OSError if results can't be written."""
    from dnnlib.atomic import check_writable

    if path is None:
        return
    try:
        check_writable(path)
    except OSError as error:
        name, remedy = (f"--out={path}", "name another file") if is_given else (
            path, "name a file for the results with --out")
        raise OSError(f"{name}: {describe(error)}; {remedy}") from error


def _report(measure, data, network: str, path: Path | None, batch: int, is_held_out: bool) -> None:
    """Measures one data set on all ranks together, and prints and records the results.

    Raises:
        OSError: the results were printed, but can't be recorded.
        ValueError: they are not finite.
    """
    from dnnlib.progress import Progress
    from torch_utils import distributed as dist

    width, unit = measure.width_of(data), measure.unit_of(data)
    name = f"{data.path}, held out" if is_held_out else data.path
    dist.print0(f"Data       {name}: {len(data)} of {data.available} images")
    if width != 1:
        dist.print0(f"Levels     {width:.4g} of {data.num_levels} apart: bits are of these levels")
    total = len(data) * measure.nfe
    with console.timed("likelihood"), Progress(total, Path(data.path).name, unit="eval",
                                               is_scaled=True) as progress:
        values = measure.measure(data, batch,
                                 watch=lambda n: progress.update(n * dist.get_world_size()))
    fingerprint = data.fingerprint

    def finish() -> None:
        problem = None
        try:
            if path is not None:
                _record(measure, data, network, path, values, width, is_held_out, fingerprint)
        except OSError as error:  # the results, which took long, are printed first
            problem = error
        console.say(f"Steps      half as many change the mean by {values.steps_error:.2g} "
                    f"{unit}")
        error = "" if math.isnan(values.stderr) else f" +- {values.stderr:.3f}"
        count = len(values.values)
        images = "image" if count == 1 else "images"
        console.result(f"{unit}: {values.mean:.3f}{error} ({count} {images})")
        if problem is not None:
            raise OSError(f"{path}: the results above could not be recorded "
                          f"({problem.strerror or problem})") from problem

    dist.run_on_rank0(finish)


def _record(measure, data, network: str, path: Path, values, width: float,
            is_held_out: bool, fingerprint: str) -> None:
    """Writes the values of the images, and appends a line with their mean to `path`: both or none.

    The name of the table depends on settings and data, so no other measurement replaces it.
    """
    from checkpoints.checkpoint import digest
    from dnnlib.atomic import append_line, atomic_write
    from dnnlib.util import json_value

    settings = measure.settings_of(data)
    key = digest({"settings": settings, "data": fingerprint, "numbers": data.numbers,
                  "width": width, "held_out": is_held_out})[:12]
    stem = f"likelihood-{_short(Path(network).stem)}-{_short(data.stem)}{'-val' * is_held_out}"
    table = path.with_name(f"{stem}-{key}.csv")
    new = [file for file in (table, path) if not file.exists()]
    column = f"{measure.unit_of(data).split('/')[0]}_per_dim"
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", column, f"{column}_half_the_steps"])
    writer.writerows(zip(data.names, values.values, values.halved, strict=True))
    line = {"metric": column, "value": values.mean, "stderr": values.stderr if len(values.values) > 1 else None,
            "num": len(values.values), "nfe": measure.nfe, "steps_error": values.steps_error,
            "network": network, "reference": data.path, "reference_sha256": fingerprint,
            "held_out": is_held_out, "bin_width": width, "table": table.name,
            "sampler": settings, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(table) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
    try:
        append_line(path, json.dumps(json_value(line)))
    except OSError:
        for file in new:
            if file == table or (file.exists() and not file.stat().st_size):
                file.unlink(missing_ok=True)
        raise


def _short(name: str) -> str:
    """Returns a name, shortened so that two of them fit in the name of a file."""
    return name.encode(errors="replace")[:_MAX_NAME_BYTES].decode(errors="ignore")


def cli() -> None:
    """Runs the command, also as the console script that pip installs."""
    run(main)


if __name__ == "__main__":
    cli()
