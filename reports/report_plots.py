"""Plots of a report as SVG text, and the look of their series.

Colours are variables of report.css and there are no external references, so a plot works in light
and dark mode and offline. Legends are part of the page. Of the texts in a run's files, only the
names of metrics and detectors reach matplotlib, which escapes them. Matplotlib is imported when a
plot is drawn.
"""

import dataclasses
import importlib.util
import io
import re
from collections.abc import Sequence
from typing import Any

_MAX_MARKED = 40  # with more points, a line has no marks
_LOG_RATIO = 8  # if largest over smallest value is at least this, the axis is logarithmic
_MAX_NAMED_TICKS = 9
_MAX_TICKS = 6


@dataclasses.dataclass(frozen=True)
class Look:
    """How a series is drawn: colour, mark (in plots, in legends), dashes, width, size of marks.

    The colour is a variable of report.css. Later curves are thinner, with gaps and smaller marks,
    so that all remain visible where they coincide.
    """

    colour: str
    mark: str
    glyph: str
    dashes: tuple[float, ...]
    width: float
    size: float

    @property
    def line(self) -> dict[str, Any]:
        """The arguments of matplotlib's plot() for this look, except the colour."""
        return {"linewidth": self.width, "linestyle": (0, self.dashes) if self.dashes else "-",
                "marker": self.mark, "markersize": self.size, "markerfacecolor": "none"}


_MARKS = (("o", "○"), ("s", "□"), ("^", "△"), ("D", "◇"), ("v", "▽"), ("x", "✕"), ("+", "+"),
          (".", "•"))
_DASHES = ((), (4, 2), (1, 2), (5, 1.5, 1, 1.5), (8, 2), (2, 1), (1, 3), (5, 1, 1, 1, 1, 1))
LOOKS = [Look(f"c{i}", *marks, dashes, width=1 + 1.5 * 0.6**i, size=8 - 0.45 * i)
         for i, (marks, dashes) in enumerate(zip(_MARKS, _DASHES, strict=True))]


def look(series: int) -> Look:
    """Returns how a series is drawn, the same in every plot and legend."""
    return LOOKS[series % len(LOOKS)]


# Matplotlib does not know the variables of the style sheet, so it draws with placeholder colours.
_COLOURS = {name: f"#0102{i:02}" for i, name in
            enumerate(["ink", "grid", *(each.colour for each in LOOKS)])}
_INK, _GRID = _COLOURS["ink"], _COLOURS["grid"]
_STYLE = {
    "figure.figsize": (4.6, 2.7), "figure.constrained_layout.use": True, "savefig.format": "svg",
    "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "report",
    "text.parse_math": False, "font.size": 9, "font.family": "DejaVu Sans", "text.color": _INK,
    "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID,
    "grid.linewidth": 0.6, "axes.formatter.useoffset": False, "lines.linewidth": 1.5,
    "errorbar.capsize": 3, "xtick.major.size": 0, "ytick.major.size": 0,
}


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
    """A dashed horizontal line along the whole axis, with a band from `low` to `high`."""

    y: float
    low: float
    high: float
    series: int = 0


@dataclasses.dataclass(frozen=True)
class Axis:
    """The horizontal axis: its label, its ticks if they are not automatic, and its scale."""

    label: str
    ticks: dict[float, str] = dataclasses.field(default_factory=dict)
    is_log: bool = False


def check_available(needing: str = "the plots of a report need",
                    package: str = "matplotlib") -> None:
    """Raises ValueError if a package is not installed; `needing` begins the message."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{needing} {package}, which is not installed: pip install {package}")


def plot(lines: Sequence[Line], axis: Axis, y_label: str, levels: Sequence[Level] = (),
         *, from_zero: bool = False) -> str:
    """Returns a plot as an <svg> element.

    Args:
        lines: the lines to draw.
        axis: the horizontal axis.
        y_label: label of the vertical axis, which is logarithmic if values differ greatly.
        levels: horizontal lines along the whole axis.
        from_zero: whether the vertical axis begins at zero.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE, after_reset=True):  # independent of the user's style
        axes = Figure().add_subplot(xlabel=axis.label, ylabel=y_label)
        for level in levels:
            colour = _COLOURS[look(level.series).colour]
            axes.axhspan(level.low, level.high, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(level.y, color=colour, linestyle="--")
        for line in lines:
            _draw(axes, line)
        values = [y for line in lines for y in (*line.y, *line.low)] + [e.low for e in levels]
        _scale(axes, axis, values, from_zero)
        buffer = io.StringIO()
        axes.figure.savefig(buffer)
    return _inline(buffer.getvalue())


def _draw(axes, line: Line) -> None:
    if line.series is None:
        axes.plot(line.x, line.y, color=_INK, linewidth=0.6)
        return
    style = look(line.series)
    colour = _COLOURS[style.colour]
    marks = {} if len(line.x) <= _MAX_MARKED else {"marker": None}
    axes.plot(line.x, line.y, color=colour, clip_on=False, **style.line | marks)
    bars = [(x, y, abs(y - low), abs(high - y)) for x, y, low, high
            in zip(line.x, line.y, line.low, line.high, strict=False) if high > low]
    if bars:
        x, y, *lengths = zip(*bars, strict=True)
        axes.errorbar(x, y, yerr=lengths, fmt="none", color=colour)


def _scale(axes, axis: Axis, values: Sequence[float], from_zero: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if axis.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(_MAX_TICKS))
    if 0 < len(axis.ticks) <= _MAX_NAMED_TICKS:
        axes.set_xticks(list(axis.ticks), list(axis.ticks.values()))
    if from_zero:
        axes.set_ylim(0, max(values, default=0) * 1.05 or 1)
        if all(value == int(value) for value in values):
            axes.yaxis.set_major_locator(MaxNLocator(_MAX_TICKS, integer=True))
    elif values and min(values) > 0 and max(values) > _LOG_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _inline(svg: str) -> str:
    """Returns an SVG file as an element of a page, without its prologue, size and ids."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'font(?:-size|-family)?: [^;"]*;? ?', "", svg)  # the style sheet sets the font
    head, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)[0]
    for name, colour in _COLOURS.items():
        rest = rest.replace(colour, f"var(--{name})")
    return f'<svg {view_box} aria-hidden="true">{rest}'
