"""Plots of a report as SVG text for a page; matplotlib is imported when one is drawn.

Colours are variables of the page's style sheet and nothing from outside is referred to, so that a
plot reads in light and dark mode and offline. Legends are the page's: no text of a run's files
reaches matplotlib.
"""

import contextlib
import dataclasses
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from reports.report_style import GRID, INK, SERIES, Look, css_colours, look

_SIZE = 4.6, 2.7  # inches
_MAX_MARKED = 40  # points; more are a line alone
_LOG_RATIO = 8  # of the largest to the smallest value: from here on the axis is logarithmic
_MAX_NAMED_TICKS = 9
_MAX_TICKS = 6
_SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 9,
    "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.formatter.useoffset": False, "lines.linewidth": 1.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot; `low` and `high` are ends of error bars.

    `series` chooses its look; None is a thin line without marks.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    series: int | None = 0


@dataclasses.dataclass(frozen=True)
class Level:
    """A value that holds along the whole axis, dashed, with a band from `low` to `high`."""

    y: float
    low: float
    high: float
    series: int = 0


@dataclasses.dataclass(frozen=True)
class Axis:
    """The horizontal axis: its label, what its ticks are where not by themselves, its scale."""

    label: str
    ticks: dict[float, str] = dataclasses.field(default_factory=dict)
    is_log: bool = False


def check_available(what: str = "the plots of a report") -> None:
    """Raises ValueError where matplotlib is not installed, which `what` need."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{what} need matplotlib, which is not installed: pip install matplotlib")


def plot(lines: Sequence[Line], axis: Axis, y_label: str, levels: Sequence[Level] = (),
         *, from_zero: bool = False) -> str:
    """Returns a plot as an <svg> element.

    Args:
        lines: what to draw.
        axis: the horizontal axis.
        y_label: text of the vertical one, which is logarithmic where values differ much.
        levels: values along the whole axis.
        from_zero: begin the vertical axis at zero.
    """
    with _figure() as figure:
        axes = figure.add_subplot()
        for level in levels:
            colour = SERIES[look(level.series).colour]
            axes.axhspan(level.low, level.high, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(level.y, color=colour, linestyle="--")
        for line in lines:
            _draw(axes, line)
        values = [y for line in lines for y in (*line.y, *line.low)] + [e.low for e in levels]
        axes.set_xlabel(axis.label)
        axes.set_ylabel(y_label)
        _scale_y(axes, values, from_zero)
        _scale_x(axes, axis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(buffer.getvalue())


def line_style(style: Look) -> dict[str, Any]:
    """Returns what matplotlib's plot() is told of a look but its colour."""
    return {"linewidth": style.width, "linestyle": (0, style.dashes) if style.dashes else "-",
            "marker": style.mark, "markersize": style.size, "markerfacecolor": "none"}


@contextlib.contextmanager
def _figure() -> Iterator:
    """Yields a figure within this module's settings; those of the user are left out."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield Figure(figsize=_SIZE, layout="constrained")


def _draw(axes, line: Line) -> None:
    if line.series is None:
        axes.plot(line.x, line.y, color=INK, linewidth=0.6)
        return
    style = look(line.series)
    colour = SERIES[style.colour]
    marks = {} if len(line.x) <= _MAX_MARKED else {"marker": None}
    axes.plot(line.x, line.y, color=colour, clip_on=False, **line_style(style) | marks)
    bars = [(x, y, low, high) for x, y, low, high
            in zip(line.x, line.y, line.low, line.high, strict=False) if high > low]
    if bars:
        x, y, low, high = zip(*bars, strict=True)
        below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
        axes.errorbar(x, y, yerr=(below, above), fmt="none", color=colour, capsize=3)


def _scale_y(axes, values: Sequence[float], from_zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if from_zero:
        axes.set_ylim(0, max(values, default=0) * 1.05 or 1)
        if all(value == int(value) for value in values):
            axes.yaxis.set_major_locator(MaxNLocator(_MAX_TICKS, integer=True))
    elif values and min(values) > 0 and max(values) > _LOG_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _scale_x(axes, axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if not axis.is_log:
        axes.xaxis.set_major_locator(MaxNLocator(_MAX_TICKS))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if 0 < len(axis.ticks) <= _MAX_NAMED_TICKS:
        axes.set_xticks(list(axis.ticks), list(axis.ticks.values()))


def _inline(svg: str) -> str:
    """Returns an SVG file as an element of a page: no prologue, size or names of its own."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'font(?:-size|-family)?: [^;"]*;? ?', "", svg)  # the style sheet has one for all
    head, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)[0]
    return css_colours(f'<svg {view_box} aria-hidden="true">{rest}')
