"""The roofline as one SVG that loads nothing: FLOP per byte against FLOP/s, a panel a layer, a mark for each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..explaining.drawing import text
from .ceilings import Ceilings

# layout in user units; one is a CSS pixel where there is room
_PANEL = (480, 340)
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 40, 48
_HEADER, _LEGEND = 58, 22
_RADIUS = 4.5
_TOGETHER = 14  # marks nearer than this, across, have no room for a label each
_NARROWEST = 640  # that the title fits into
# a shape for each colour, seen through: marks are told apart in print, and where they stand on one another
_GLYPHS = (
    "M{x} {y}m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",
    "M{x} {y}m-{r} -{r}h{d}v{d}h-{d}z",
    "M{x} {y}m0 -{r}l{r} {d}h-{d}z",
    "M{x} {y}m0 -{d}l{r} {d}l-{r} {d}l-{r} -{d}z",
)
_LIGHT = ("#0969da", "#bc4c00", "#1a7f37", "#8250df")
_DARK = ("#4493f8", "#f0883e", "#3fb950", "#ab7df8")
_STYLE = (
    ".roofline{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;"
    + "".join(f"--p{number}:{colour};" for number, colour in enumerate(_LIGHT))
    + "}@media(prefers-color-scheme:dark){.roofline{--page:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;"
    + "".join(f"--p{number}:{colour};" for number, colour in enumerate(_DARK))
    + "}}.roofline{background:var(--page)}.roofline .page{fill:var(--page)}"
    + '.roofline text{fill:var(--ink);font:12px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}'
    + ".roofline .title{font-weight:600;font-size:14px}.roofline .soft{fill:var(--soft);font-size:11px}"
    + ".roofline .grid{fill:none;stroke:var(--line);stroke-width:1}"
    + ".roofline .ceiling{fill:none;stroke:var(--ink);stroke-width:1.5}"
    + ".roofline g path{fill-opacity:.3;stroke-width:1.5}"
    + "".join(f".roofline .p{n} path{{fill:var(--p{n});stroke:var(--p{n})}}" for n in range(len(_LIGHT)))
)


@dataclasses.dataclass(frozen=True)
class Mark:
    """One time of one peer: which panel, FLOP per byte, FLOP/s, and words that a pointer over it shows."""

    panel: str
    peer: str
    tokens: int
    intensity: float
    rate: float
    words: str


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Decades of both axes, and the upper left corner of a panel."""

    x: tuple[int, int]
    y: tuple[int, int]
    left: float = 0
    top: float = 0

    def across(self, intensity: float) -> float:
        return self.left + _LEFT + _share(intensity, self.x) * (_PANEL[0] - _LEFT - _RIGHT)

    def up(self, rate: float) -> float:
        return self.top + _PANEL[1] - _BOTTOM - _share(rate, self.y) * (_PANEL[1] - _TOP - _BOTTOM)


def _share(value: float, decades: tuple[int, int]) -> float:
    return (math.log10(value) - decades[0]) / (decades[1] - decades[0])


def roofline(marks: Sequence[Mark], ceilings: Ceilings, *, title: str) -> str:
    """An SVG document with a panel for each layer of the marks, in the order in which they come."""
    panels, peers = list(dict.fromkeys(m.panel for m in marks)), list(dict.fromkeys(m.peer for m in marks))
    ridge = ceilings.matrix_rate / ceilings.read_rate
    x = _decades([ridge / 4, ridge * 4, *(mark.intensity for mark in marks)])
    y = _decades([ceilings.matrix_rate, *(mark.rate for mark in marks)])
    columns = min(2, max(1, len(panels)))
    width, height = max(columns * _PANEL[0], _NARROWEST), _HEADER + _LEGEND + -(-len(panels) // columns) * _PANEL[1]
    parts = [f'<text class="title" x="{_LEFT}" y="24">{text(title)}</text>']
    parts.append(f'<text class="soft" x="{_LEFT}" y="44">{text(f"ceilings, measured: {ceilings}")}</text>')
    parts += _legend(peers)
    for number, panel in enumerate(panels):
        corner = (number % columns * _PANEL[0], _HEADER + _LEGEND + number // columns * _PANEL[1])
        axes = _Axes(x, y, *corner)
        parts += [*_frame(axes, panel), _ceiling(axes, ceilings)]
        parts += _labels(axes, [mark for mark in marks if mark.panel == panel])
        parts += [_mark(axes, mark, peers.index(mark.peer)) for mark in marks if mark.panel == panel]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="roofline" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{text(title)}"><style>{_STYLE}</style>'
        f'<rect class="page" width="{width}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.02))
    return low, max(high, low + 1)


def _glyph(number: int, x: float, y: float) -> str:
    path = _GLYPHS[number % len(_GLYPHS)].format(x=f"{x:.1f}", y=f"{y:.1f}", r=_RADIUS, d=2 * _RADIUS)
    return f'<path d="{path}"/>'


def _legend(peers: Sequence[str]) -> list[str]:
    parts, x, y = [], float(_LEFT), _HEADER + 8
    for number, peer in enumerate(peers):
        parts.append(f'<g class="p{number % len(_LIGHT)}">{_glyph(number, x + _RADIUS, y)}</g>')
        parts.append(f'<text x="{x + 16:g}" y="{y + 4}">{text(peer)}</text>')
        x += 34 + 7.3 * len(peer)
    return parts


def _frame(axes: _Axes, panel: str) -> list[str]:
    """A panel's name, the lines of its decades with their values, and what its axes are."""
    left, right = axes.across(10.0 ** axes.x[0]), axes.across(10.0 ** axes.x[1])
    low, high = axes.up(10.0 ** axes.y[0]), axes.up(10.0 ** axes.y[1])
    parts = [f'<text class="title" x="{left:g}" y="{high - 10:g}">{text(panel)}</text>']
    for decade in range(axes.x[0], axes.x[1] + 1):
        x = axes.across(10.0**decade)
        parts.append(f'<path class="grid" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{low + 16:.1f}" text-anchor="middle">{10.0**decade:g}</text>')
    for decade in range(axes.y[0], axes.y[1] + 1):
        y = axes.up(10.0**decade)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="soft" x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_power(decade)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text class="soft" x="{middle:.1f}" y="{low + 34:.1f}" text-anchor="middle">FLOP per byte</text>')
    parts.append(
        f'<text class="soft" x="{right:.1f}" y="{high - 10:.1f}" text-anchor="end">FLOP/s; numbers: tokens</text>'
    )
    return parts


def _power(decade: int) -> str:
    """`10 G` of 10, `1 T` of 12."""
    units = {0: "", 3: " k", 6: " M", 9: " G", 12: " T", 15: " P"}
    base = min(max(3 * (decade // 3), 0), 15)
    return f"{10.0 ** (decade - base):g}{units[base]}"


def _ceiling(axes: _Axes, ceilings: Ceilings) -> str:
    """The bandwidth's slope up to the ridge, then the arithmetic's level; the slope begins inside the panel."""
    start = max(10.0 ** axes.x[0], 10.0 ** axes.y[0] / ceilings.read_rate)
    ridge = ceilings.matrix_rate / ceilings.read_rate
    first = f"{axes.across(start):.1f} {axes.up(start * ceilings.read_rate):.1f}"
    corner = f"{axes.across(ridge):.1f} {axes.up(ceilings.matrix_rate):.1f}"
    return f'<path class="ceiling" d="M{first}L{corner}H{axes.across(10.0 ** axes.x[1]):.1f}"/>'


def _labels(axes: _Axes, marks: Sequence[Mark]) -> list[str]:
    """The token counts of cells, below the lowest of their marks; cells that stand together share a label."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda one: one.intensity):
        near = groups and axes.across(mark.intensity) - axes.across(groups[-1][0].intensity) < _TOGETHER
        if near:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    parts = []
    for group in groups:
        x = (axes.across(group[0].intensity) + axes.across(group[-1].intensity)) / 2
        y = max(axes.up(mark.rate) for mark in group) + 18
        words = ", ".join(str(tokens) for tokens in sorted({mark.tokens for mark in group}))
        parts.append(f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>')
    return parts


def _mark(axes: _Axes, mark: Mark, number: int) -> str:
    words = f"{mark.panel}, {mark.tokens} tokens, {mark.peer}: {mark.words}"
    glyph = _glyph(number, axes.across(mark.intensity), axes.up(mark.rate))
    return f'<g class="mark p{number % len(_LIGHT)}"><title>{text(words)}</title>{glyph}</g>'
