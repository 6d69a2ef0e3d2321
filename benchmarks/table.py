"""Rows of measurements: their content, and how they are timed, printed and written."""

import dataclasses
import datetime
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib.ordered_pool import num_cores


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmarks; each benchmark uses those that apply to it.

    Attributes:
        device: where to run benchmarks that can use a GPU.
        threads: number of PyTorch threads.
        repeats: timed runs of each side.
        batch: images in a training step or network evaluation.
        precisions: precisions of our side; the others are compared with fp32.
        compiled: whether to measure compiled networks too.
        networks: architectures and image sides to measure, such as ("adm", 64); empty for the
            device's own list.
        reference: a checkout of EDM or of one of its forks.
        commit: a folder with an older commit of ours, and its name.
    """

    device: torch.device
    threads: int
    repeats: int
    batch: int
    precisions: Sequence[str]
    compiled: bool = False
    networks: Sequence[tuple[str, int]] = ()
    reference: Path | None = None
    commit: tuple[str, Path] | None = None


@dataclasses.dataclass
class Row:
    """A measurement of one side; `ratio` is the baseline's median time over that of this row."""

    what: str
    side: str
    seconds: list[float]
    images: int = 0  # per run
    flops: float = 0.0  # per run
    arithmetic: str = "fp32"  # name of the peak with which flops are compared
    memory_mb: float | None = None
    error: float | None = None  # relative, against float32 or against the baseline
    ratio: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The median time of a run in seconds."""
        return statistics.median(self.seconds)

    def to_dict(self, peaks: Mapping[str, float]) -> dict[str, Any]:
        """Returns the row as plain data; `peaks` are TFLOP/s by arithmetic."""
        rate, tflops = self.images / self.median, self.flops / self.median / 1e12
        peak = peaks.get(self.arithmetic)
        return {**dataclasses.asdict(self), "median_seconds": self.median,
                "images_per_second": rate or None, "tflops": tflops or None,
                "percent_of_peak": 100 * tflops / peak if tflops and peak else None}


def in_turn(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of `repeats` runs of each way; every round runs all of them once."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def with_ratios(rows: Iterable[Row], baseline: str) -> list[Row]:
    """Returns the rows with their ratios to the side called `baseline`."""
    rows = list(rows)
    base = {row.what: row.median for row in rows if row.side == baseline}
    for row in rows:
        if row.what in base and row.side != baseline:
            row.ratio = base[row.what] / row.median
    return rows


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns |found - expected| / |expected| in the 2-norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def peak_mb(run: Callable[[], Any]) -> float:
    """Returns the increase of the resident memory while `run` runs, sampled every millisecond."""
    process, seen, running = psutil.Process(), [], True

    def look():
        while running:
            seen.append(process.memory_info().rss)
            time.sleep(1e-3)

    before = process.memory_info().rss
    thread = threading.Thread(target=look)
    thread.start()
    run()
    running = False
    thread.join()
    return (max(seen) - before) / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """Returns a description of the machine and the software."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file
                         if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "date": datetime.date.today().isoformat(), "cpu": name, "cores": num_cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version()}


_HEADS = ("", "time", "images/s", "TFLOP/s", "of peak", "memory MB", "error", "ratio")


def format_table(rows: Iterable[Row], peaks: Mapping[str, float]) -> str:
    """Returns the rows as a Markdown table that is aligned to be readable as plain text."""
    lines = []
    last = None
    for row in rows:
        if row.what != last:
            lines.append([f"**{row.what}**"] + [""] * (len(_HEADS) - 1))
            last = row.what
        data = row.to_dict(peaks)
        lines.append([
            row.side + (f" ({row.note})" if row.note else ""), _seconds(row.median),
            _number(data["images_per_second"]), _number(data["tflops"]),
            "" if data["percent_of_peak"] is None else f"{data['percent_of_peak']:.0f}%",
            _number(row.memory_mb), "" if row.error is None else f"{row.error:.1e}",
            "" if row.ratio is None else f"{row.ratio:.2f}x"])
    table = [list(_HEADS), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(_HEADS))]
    texts = ["| " + " | ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))) + " |"
        for line in table]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-")
                          for i, width in enumerate(widths)) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
