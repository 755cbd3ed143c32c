"""One layer as SVG: the stock operations of each stage on the left, the kernels that do them on the right."""

from __future__ import annotations

import dataclasses
import html
import re
import textwrap
from collections.abc import Sequence

from lowering.report import microseconds

# layout in user units; one is a CSS pixel where the page is wide enough
WIDTH = 1000
_LEFT, _RIGHT = (20, 300), (400, 580)  # x and width of the columns
_LINE, _PADDING, _GAP, _TOP = 18, 10, 14, 36
_BAR = 8
_CHARACTERS = {_LEFT: 35, _RIGHT: 72}  # that fit into a line of a column, in the font of the page


@dataclasses.dataclass(frozen=True)
class Bar:
    """Microseconds drawn to scale: `whole`, of which `part` is the floor."""

    whole: float
    part: float


@dataclasses.dataclass(frozen=True)
class Box:
    """A box: its title, lines below it that may be of any length, and a bar or none."""

    title: str
    lines: tuple[str, ...] = ()
    bar: Bar | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage: a colour's name, what stood there, what stands there now."""

    kind: str
    before: Box
    after: tuple[Box, ...]


def text(raw: str) -> str:
    """Any string as the text of an element or attribute: names of modules and messages may hold anything."""
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", raw)
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def draw(rows: Sequence[Row], *, label: str) -> str:
    """An `<svg>` element with a row for each stage, from top to bottom, arrows from what was to what is."""
    longest = max((box.bar.whole for row in rows for box in row.after if box.bar is not None), default=0.0)
    parts = [_heading(_LEFT, "before: stock operations"), _heading(_RIGHT, "after: what runs")]
    y = _TOP
    for number, row in enumerate(rows):
        drawn, height = _row(row, y, longest)
        if number:
            parts += [_down(_LEFT, y - _GAP), _down(_RIGHT, y - _GAP)]
        parts += drawn
        y += height + _GAP
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'
    )


def _heading(column: tuple[int, int], words: str) -> str:
    return f'<text class="heading" x="{column[0]}" y="20">{text(words)}</text>'


def _row(row: Row, y: int, longest: float) -> tuple[list[str], int]:
    """The elements of a row that begins at y, and its height."""
    height_left = _height(row.before, _LEFT)
    heights = [_height(box, _RIGHT) for box in row.after]
    height = max(height_left, sum(heights) + _GAP * (len(heights) - 1))
    parts = [_box(row.before, _LEFT, y=y, height=height, kind="stock", longest=longest)]
    parts.append(_across(y + height / 2))
    for number, (box, own) in enumerate(zip(row.after, heights, strict=True)):
        last = number == len(heights) - 1
        shown = height - sum(heights[:-1]) - _GAP * number if last else own
        parts.append(_box(box, _RIGHT, y=y, height=shown, kind=row.kind, longest=longest))
        y += own + _GAP
    return parts, height


def _wrapped(box: Box, column: tuple[int, int]) -> list[str]:
    return [part for line in box.lines for part in textwrap.wrap(line, _CHARACTERS[column])]


def _height(box: Box, column: tuple[int, int]) -> int:
    bar = _BAR + _PADDING if box.bar is not None else 0
    return 2 * _PADDING + _LINE * (1 + len(_wrapped(box, column))) + bar


def _box(box: Box, column: tuple[int, int], *, y: float, height: float, kind: str, longest: float) -> str:
    x, width = column
    parts = [
        f'<rect class="box" x="{x}" y="{y:g}" width="{width}" height="{height:g}" rx="6"/>',
        f'<rect class="{kind}" x="{x}" y="{y:g}" width="6" height="{height:g}" rx="3"/>',
    ]
    left, base = x + 16, y + _PADDING + 13
    parts.append(f'<text class="title" x="{left}" y="{base:g}">{text(box.title)}</text>')
    for line in _wrapped(box, column):
        base += _LINE
        parts.append(f'<text class="line" x="{left}" y="{base:g}">{text(line)}</text>')
    if box.bar is not None:
        parts.append(_bar(box.bar, (left, base + _PADDING), room=width - 32, longest=longest))
    return "".join(parts)


def _bar(bar: Bar, at: tuple[float, float], *, room: float, longest: float) -> str:
    scale = room / longest if longest > 0 else 0.0
    place = f'x="{at[0]:g}" y="{at[1]:g}" height="{_BAR}" rx="2"'
    return (
        f"<g><title>{text(f'{microseconds(bar.whole)}, of which the floor is {microseconds(bar.part)}')}</title>"
        f'<rect class="whole" {place} width="{bar.whole * scale:.1f}"/>'
        f'<rect class="floor" {place} width="{min(bar.part, bar.whole) * scale:.1f}"/></g>'
    )


def _across(y: float) -> str:
    start, end = _LEFT[0] + _LEFT[1] + 10, _RIGHT[0] - 10
    return f'<path class="arrow" d="M{start} {y:g}H{end}m-7 -5l7 5l-7 5"/>'


def _down(column: tuple[int, int], y: float) -> str:
    return f'<path class="arrow" d="M{column[0] + 40} {y + 1:g}v{_GAP - 2}m-4 -5l4 5l4 -5"/>'
