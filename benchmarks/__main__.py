"""All benchmarks in one command, `python -m benchmarks`, which prints a table and writes JSON."""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

from benchmarks import (
    checkpoints,
    conversion,
    frechet,
    inception,
    networks,
    reading,
    scaling,
    startup,
    stf,
)
from benchmarks.sides import SideError, older_commit
from benchmarks.table import Options, Row, format_table, in_turn, machine
from dnnlib.atomic import write_json
from dnnlib.cli import run, user_errors
from dnnlib.ordered_pool import num_cores
from torch_utils.misc import compute_dtype, configure_backends

BENCHMARKS: dict[str, Callable[[Options], Iterable[Row]]] = {
    "training": networks.training_rows,
    "sampling": networks.sampling_rows,
    "scaling": scaling.rows,
    "inception": inception.rows,
    "frechet": frechet.rows,
    "stf": stf.rows,
    "reading": reading.rows,
    "conversion": conversion.rows,
    "startup": startup.rows,
    "checkpoints": checkpoints.rows,
}
_REFERENCE_FILES = ("training/networks.py", "training/augment.py", "dataset_tool.py")


def measure_peaks(device: torch.device, precisions: tuple[str, ...]) -> dict[str, float]:
    """Returns the highest measured TFLOP/s of a large matrix product and a 3x3 convolution."""
    size, batch = (8192, 256) if device.type == "cuda" else (1024, 2)
    peaks = {}
    for precision in precisions:
        configure_backends(precision)
        dtype = compute_dtype(precision)
        a = torch.randn([size, size], device=device).to(dtype)
        x = torch.randn([batch, 256, 32, 32], device=device).to(
            dtype, memory_format=torch.channels_last)
        w = torch.randn([256, 256, 3, 3], device=device).to(
            dtype, memory_format=torch.channels_last)
        ways = {2 * size**3: lambda a=a: a @ a,
                2 * batch * 32**2 * 9 * 256**2:
                    lambda x=x, w=w: torch.nn.functional.conv2d(x, w, padding=1)}

        def waiting(way):
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
        ways = {flops: (lambda way=way: waiting(way)) for flops, way in ways.items()}
        first = max(min(seconds) for seconds in in_turn(ways, 1).values())
        peaks[precision] = max(  # only one more run if bfloat16 is emulated, which takes seconds
            flops / min(seconds) / 1e12
            for flops, seconds in in_turn(ways, 1 if first > 0.5 else 6).items())
    return peaks


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="Where to compute.")
@click.option("--threads", metavar="INT", type=click.IntRange(min=1), help="Threads of PyTorch's.  [default: all cores]")
@click.option("--repeats", metavar="INT", type=click.IntRange(min=1), default=3, help="Timed runs of each side.")
@click.option("--batch", metavar="INT", type=click.IntRange(min=1), help="Images in a training step and a network evaluation.  [default: 8, 256 on a GPU]")
@click.option("--precision", "precisions", metavar="LIST", default="fp32,bf16", help="Of ours: fp32, tf32, bf16, fp16.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Measure compiled networks too.  [default: on a GPU]")
@click.option("--networks", "chosen_networks", metavar="LIST", default="", help="Networks to train and to evaluate, such as ncsnpp-32,adm-64.  [default: ncsnpp-32,ddpmpp-32; on a GPU also ddpmpp-64,adm-64]")
@click.option("--against", metavar="DIR", type=click.Path(path_type=Path), help="A checkout of github.com/NVlabs/edm, to run beside ours.")
@click.option("--against-commit", "revision", metavar="REV", help="An older commit of this repository, to run beside it.")
@click.option("--out", metavar="JSON", type=click.Path(dir_okay=False, path_type=Path), default="benchmarks.json", help="Where to write the figures.")
def main(names, device, threads, repeats, batch, precisions, compiled, chosen_networks, against,
         revision, out):
    """Measures NAMES, by default all, and prints medians over alternating runs.

    The ratio is the time of the last side of a group over that of the line, so a line with a ratio
    above 1 is faster. If the command is stopped, it shows what it has measured. Nothing else should
    run on the machine.
    """
    with user_errors(), contextlib.ExitStack() as stack:
        chosen = _device(device)
        precisions = tuple(precisions.split(","))
        _check(precisions, against)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            commit = revision and (revision, stack.enter_context(
                older_commit(revision, folder / "commit")))
        except SideError as error:
            raise ValueError(str(error)) from error
        torch.set_num_threads(threads or num_cores())
        is_gpu = chosen.type == "cuda"
        options = Options(
            chosen, torch.get_num_threads(), repeats, batch or (256 if is_gpu else 8), precisions,
            is_gpu if compiled is None else compiled, _networks(chosen_networks),
            against and against.resolve(), commit)
        peaks = measure_peaks(chosen, precisions)
        where = machine(chosen)
        rows: list[Row] = []
        start = time.perf_counter()
        try:
            for name in dict.fromkeys(names or BENCHMARKS):
                click.echo(f"{name} ...", err=True)
                try:
                    for row in BENCHMARKS[name](options):
                        rows.append(row)
                        write_json(out, {"machine": where, "peak_tflops": peaks,
                                         "repeats": repeats,
                                         "seconds": time.perf_counter() - start,
                                         "rows": [row.to_dict(peaks) for row in rows]})
                except SideError as error:
                    raise ValueError(f"{name}: {error}") from error
        finally:  # results are shown even if the rest fails or is stopped
            print(" | ".join(f"{key} {value}" for key, value in where.items()))
            print("peak " + ", ".join(f"{key} {value:.3g} TFLOP/s"
                                      for key, value in peaks.items()))
            print(f"\n{format_table(rows, peaks)}\n")
        print(f"{out}: {len(rows)} rows, {time.perf_counter() - start:.0f} s")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: no CUDA device here; use --device=cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def _networks(text: str) -> list[tuple[str, int]]:
    """Returns the networks of a list, such as ("adm", 64) for "adm-64"."""
    found = [re.fullmatch("(ncsnpp|ddpmpp|adm)-(16|32|64|128|256)", item)
             for item in text.split(",") if text]
    if None in found:
        raise ValueError(f"--networks={text}: must be a list of ncsnpp-N, ddpmpp-N and adm-N, "
                         "where N is 16, 32, 64, 128 or 256")
    return [(match[1], int(match[2])) for match in found]


def _check(precisions: tuple[str, ...], against: Path | None) -> None:
    """Raises ValueError if the requested measurements are not possible."""
    wrong = sorted(set(precisions) - {"fp32", "tf32", "bf16", "fp16"})
    if wrong or "fp32" not in precisions:
        raise ValueError(f"--precision={','.join(precisions)}: must be a list of fp32, tf32, bf16, "
                         "fp16 with fp32, the baseline of the others")
    missing = against and next((f for f in _REFERENCE_FILES if not (against / f).is_file()), None)
    if missing:
        raise ValueError(f"--against={against}: not a checkout of EDM, {missing} is missing")


if __name__ == "__main__":
    run(main)
