"""How a report looks: colours of light and dark mode by name, shared by page and plots.

Plots are drawn in stand-in colours, which `css_colours` replaces by variables of the style sheet.
"""

import dataclasses

# Of Okabe and Ito (2008), darker in light mode and lighter in dark mode: told apart by readers who
# do not see all colours, and by their marks.
_LIGHT = ("#0068a8", "#c04a00", "#00805c", "#a8417e", "#8a6a00", "#3c8dbc", "#444444", "#7a4fc4")
_DARK = ("#5ab4f0", "#ff9448", "#3fd0a4", "#ef8fc6", "#e8c63c", "#9cd3f5", "#d0d0d0", "#b9a0f2")
NUM_COLOURS = len(_LIGHT)
INK, GRID = "#010203", "#010204"
SERIES = tuple(f"#01030{i}" for i in range(NUM_COLOURS))


@dataclasses.dataclass(frozen=True)
class Look:
    """How a series is drawn: colour, mark (of plots, of legends), dashes, width, size of marks.

    Where curves coincide all are seen: later ones are thinner, have gaps and smaller marks.
    """

    colour: int
    mark: str
    glyph: str
    dashes: tuple[float, ...]
    width: float
    size: float


_MARKS = (("o", "○"), ("s", "□"), ("^", "△"), ("D", "◇"), ("v", "▽"), ("x", "✕"), ("+", "+"),
          (".", "•"))
_DASHES = ((), (4, 2), (1, 2), (5, 1.5, 1, 1.5), (8, 2), (2, 1), (1, 3), (5, 1, 1, 1, 1, 1))
LOOKS = tuple(Look(i, *marks, dashes, width=1 + 1.5 * 0.6**i, size=8 - 0.45 * i)
              for i, (marks, dashes) in enumerate(zip(_MARKS, _DASHES, strict=True)))


def look(series: int) -> Look:
    """Returns how a series is drawn, the same in every plot and legend."""
    return LOOKS[series % len(LOOKS)]


def css_colours(svg: str) -> str:
    """Returns a plot whose stand-in colours are variables of the style sheet."""
    for colour, name in ((INK, "ink"), (GRID, "grid"),
                         *((colour, f"c{i}") for i, colour in enumerate(SERIES))):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


CSS = f"""
:root {{
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2126; --soft: #5a646e; --grid: #dde1e6;
  --link: #0060b0; --note: #fff4d6; {_variables(_LIGHT)}
}}
@media (prefers-color-scheme: dark) {{ :root {{
  --page: #14171a; --card: #1d2125; --ink: #e6e9ec; --soft: #9aa5b0; --grid: #363c43;
  --link: #6cb8ff; --note: #3b3213; {_variables(_DARK)}
}} }}
""" + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 4rem; max-width: 1500px;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 80ch; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); }
nav { margin: .5rem 0 1rem; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
nav a { overflow-wrap: anywhere; }
.notes { background: var(--note); border-radius: 6px; padding: .5rem .75rem .5rem 2rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  padding: .75rem 1rem; margin: 0; min-width: 0; }
.cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr)); }
.pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 170px), 1fr)); }
.pictures .card { padding: .5rem; }
.pictures img { display: block; width: 100%; height: auto; border-radius: 4px; }
.card svg { display: block; width: 100%; height: auto; }
.card svg text { font-size: 9px; }
.card h4 { margin: 0 0 .25rem; font-size: .95rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; padding: 0;
  font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--grid);
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td.text { text-align: left; }
td.text { overflow-wrap: break-word; max-width: 40ch; white-space: normal; }
td .soft { display: block; font-size: .9em; white-space: normal; }
.card table { font-size: .8rem; } .card th, .card td { padding: .2rem .3rem; }
.card p { font-size: .85rem; margin: .25rem 0 0; }
.card .pairs th, .card .pairs td { padding: 2px; border: 0; text-align: center;
  vertical-align: middle; }
.card .pairs th:first-child { position: sticky; left: 0; background: var(--card);
  padding-right: .75rem; text-align: left; white-space: nowrap; z-index: 1; }
.pairs img { display: block; width: 72px; height: auto; image-rendering: pixelated; }
.settings { display: grid; gap: .1rem 1.5rem; font-size: .85rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.settings div { display: flex; gap: .75rem; justify-content: space-between;
  border-bottom: 1px solid var(--grid); min-width: 0; }
.settings dt { color: var(--soft); flex: none; }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 600px) {
  th, td { padding: .2rem .25rem; } table { font-size: .8rem; }
  td.text { overflow-wrap: anywhere; min-width: 5em; }
  .card { padding: .6rem; }
}
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
"""
