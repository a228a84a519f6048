"""Drawings as inline SVG: from numbers to strings, nothing else.

Across is measured in percent and down in pixels, so that a drawing fills any width and its text never shrinks. Labels
stand outside the drawing's box, in its margins. Colours are the classes of `STYLE`, which the page defines per theme.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "triangle": "M0-5.5L5.5 4.5H-5.5z",
    "square": "M-4-4H4V4H-4z",
    "diamond": "M0-6L6 0L0 6L-6 0z",
    "nabla": "M0 5.5L5.5-4.5H-5.5z",
    "cross": "M-4-4L4 4M4-4L-4 4",
}
STOCK_SHAPES = ("circle", "triangle", "square", "nabla")

STYLE = """
.plot{display:block;overflow:visible;width:calc(100% - 56px);margin:26px 14px 40px 42px}
.plot text,.plot svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
.at{overflow:visible}
.step{stroke:var(--line)}.axis{stroke:var(--muted)}
.rule{stroke:currentColor;stroke-width:2}.thin{stroke:currentColor;stroke-width:1}
.dash{stroke:currentColor;stroke-width:1.5;stroke-dasharray:7 4}
.dots{stroke:currentColor;stroke-width:1.5;stroke-dasharray:2 3}
.mark{fill:currentColor;stroke:var(--panel);stroke-width:1}
.hollow{fill:var(--panel);stroke:currentColor;stroke-width:1.7}
.mark.cross{fill:none;stroke:currentColor;stroke-width:2}
.plot text.value{fill:currentColor;font-weight:600;paint-order:stroke;stroke:var(--panel);stroke-width:3px}
.bars{fill:currentColor;shape-rendering:crispEdges}.bars g:hover{opacity:.7}
.cells path{stroke:currentColor;fill:none}.cells rect{fill:none;pointer-events:all}
.cells{shape-rendering:crispEdges}
.key{flex:none;overflow:visible;vertical-align:-1px}
.ours{color:var(--ours)}.stall{color:var(--stall)}.stock{color:var(--stock)}.resident{color:var(--resident)}
.limit{color:var(--ours)}.pinned{color:var(--ink)}.held{color:var(--h4)}.faint{color:var(--muted)}
""" + "".join(f".h{i}{{color:var(--h{i})}}" for i in range(1, 9))


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` laid onto positions from `begin` to `end`; what lies outside stays at the edge."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.begin + min(1.0, max(0.0, share)) * (self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value, its range where there is one, and the words shown when the mouse rests on it."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None
    value: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together: a colour, a marker ("" for none), and whether a line joins them."""

    name: str
    css: str
    shape: str
    points: Sequence[Point]
    line: str = ""
    is_hollow: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    css: str
    line: str
    y: float


def escape(text: object) -> str:
    """Return text that is safe as content and in attributes, of HTML and of XML."""
    return html.escape(_NOT_XML.sub("\ufffd", str(text)))


def ticks(low: float, high: float, n_steps: int = 5) -> list[float]:
    """Return round numbers at even distances, the first at most `low`, the last at least `high`."""
    wanted = (high - low) / n_steps if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= wanted * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Return even numbers with as many decimals as tell them apart."""
    step = values[1] - values[0]
    decimals = next(d for d in range(12) if d == 11 or abs(round(step, d) - step) < step * 1e-6)
    return [f"{value:,.{decimals}f}" for value in values]


def place(number: float) -> str:
    """Return a coordinate in few characters."""
    return f"{round(number, 2) + 0.0:g}"


def text(x: str, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    """Return a piece of text; `x` in percent or pixels."""
    style = f' class="{css}"' if css else ""
    return f'<text x="{x}" y="{place(y)}" text-anchor="{anchor}"{style}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """Return a straight line; x in percent, y in pixels."""
    return f'<line class="{css}" x1="{place(x1)}%" y1="{place(y1)}" x2="{place(x2)}%" y2="{place(y2)}"/>'


def at(x: float, y: float, content: str) -> str:
    """Return something drawn in pixels around a place."""
    return f'<svg class="at" x="{place(x)}%" y="{place(y)}">{content}</svg>'


def titled(tip: str, content: str, css: str = "") -> str:
    """Return something with words that show when the mouse rests on it."""
    style = f' class="{css}"' if css else ""
    return f"<g{style}><title>{escape(tip)}</title>{content}</g>"


def mark(shape: str, is_hollow: bool = False) -> str:
    """Return a marker around the origin."""
    return f'<path class="{"hollow" if is_hollow else "mark"} {shape}" d="{_SHAPES[shape]}"/>'


def frame(body: str, *, height: float, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]],
          x_title: str, y_title: str, label: str) -> str:
    """Return a drawing with its axes; positions of the ticks across in percent, down in pixels."""
    parts = [line(0, y, 100, y, "step") + text("-8", y + 4, name, "end") for y, name in y_ticks]
    parts += [at(x, height, '<line class="axis" y2="4"/>') + text(f"{place(x)}%", height + 17, name, "middle")
              for x, name in x_ticks]
    parts += [body, line(0, height, 100, height, "axis"), text("-38", -13, y_title),
              text("100%", height + 34, x_title, "end")]
    return f'<svg class="plot" height="{place(height)}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@dataclass(slots=True)
class _Room:
    """Keeps labels off what is drawn and off each other, at the width that a drawing usually has."""

    taken: list[tuple[float, float]] = field(default_factory=list)
    WIDTH = 420.0

    def block(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Take the line between two places, x in percent."""
        n = 1 + int(max(abs(x2 - x1) * self.WIDTH / 100, abs(y2 - y1)) / 5)
        self.taken += [((x1 + (x2 - x1) * i / n) * self.WIDTH / 100, y1 + (y2 - y1) * i / n) for i in range(n + 1)]

    def put(self, x: float, y: float, content: str, ways: Sequence[tuple[float, float, str]], css: str) -> str:
        """Return the text at the first of the ways (pixels right, pixels down, anchor) that is free, or nothing."""
        wide = 6.2 * len(content)
        for right, down, anchor in ways:
            left = x * self.WIDTH / 100 + right - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            top = y + down - 10
            if left < 0 or left + wide > self.WIDTH + 8:
                continue
            if not any(left - 3 < a < left + wide + 3 and top - 2 < b < top + 13 for a, b in self.taken):
                for height in (top + 2, top + 9):
                    self.block(100 * left / self.WIDTH, height, 100 * (left + wide) / self.WIDTH, height)
                return at(x, y, text(place(right), down, content, anchor, css))
        return ""


def chart(series: Sequence[Series], levels: Sequence[Level], *, x_title: str, y_title: str, label: str,
          height: float = 270) -> str:
    """Return values against something else measured, ranges as whiskers, the first series on top; one has points."""
    across = [point.x for one in series for point in one.points]
    margin = 0.04 * (max(across) - min(across) or max(across) or 1.0)
    start = 0.0 if min(across) < 0.6 * max(across) or len(set(across)) == 1 else min(across) - margin
    x_steps = ticks(start, max(across) + margin)
    highest = max([level.y for level in levels] + [point.high or point.y for one in series for point in one.points])
    y_steps = ticks(0, highest * 1.02 or 1.0)
    x, y = Scale(x_steps[0], x_steps[-1], 0, 100), Scale(0, y_steps[-1], height, 0)
    room = _Room()
    for one in series:
        for point in one.points:
            room.block(x(point.x) - 1, y(point.y), x(point.x) + 1, y(point.y))
            room.block(x(point.x), y(point.low or point.y), x(point.x), y(point.high or point.y))
        for a, b in pairwise(one.points) if one.line else ():
            room.block(x(a.x), y(a.y), x(b.x), y(b.y))
    for level in levels:
        room.block(0, y(level.y), 100, y(level.y))
    parts = [_level(level, y(level.y), room, is_top=level.y >= highest) for level in levels]
    parts += [_series(one, x, y) for one in reversed(series)]
    parts += [f'<g class="{one.css}">{_value(point, x, y, room)}</g>' for one in series for point in one.points
              if point.value]
    return frame("".join(parts), height=height, x_title=x_title, y_title=y_title, label=label,
                 x_ticks=[(x(v), name) for v, name in zip(x_steps, tick_texts(x_steps), strict=True)],
                 y_ticks=[(y(v), name) for v, name in zip(y_steps, tick_texts(y_steps), strict=True)])


def _level(level: Level, y: float, room: _Room, *, is_top: bool) -> str:
    ways = ((0, -5, "start"), (0, 14, "start"))
    others = ((0, -5, "end"), (0, 14, "end"))
    name = (room.put(1.5, y, level.name, ways, "value") or room.put(99, y, level.name, others, "value")
            or at(1.5, y, text("0", -5 if is_top else 14, level.name, css="value")))
    return titled(level.name, line(0, y, 100, y, level.line) + name, level.css)


def _value(point: Point, x: Scale, y: Scale, room: _Room) -> str:
    ways = ((9, 15, "start"), (-8, -8, "end"), (9, -8, "start"), (-8, 15, "end"), (11, 4, "start"), (-11, 4, "end"))
    return room.put(x(point.x), y(point.y), point.value, ways, "value")


def _series(one: Series, x: Scale, y: Scale) -> str:
    parts = [line(x(a.x), y(a.y), x(b.x), y(b.y), one.line) for a, b in pairwise(one.points)] if one.line else []
    for point in one.points if one.shape else ():
        body = ""
        if point.low is not None and point.high is not None:
            body = line(x(point.x), y(point.low), x(point.x), y(point.high), "thin") + "".join(
                at(x(point.x), y(end), '<line class="thin" x1="-4" x2="4"/>') for end in (point.low, point.high))
        parts.append(titled(point.tip, body + at(x(point.x), y(point.y), mark(one.shape, one.is_hollow))))
    return f'<g class="{one.css}">{"".join(parts)}</g>'


def stack(bars: Sequence[tuple[Sequence[float], str]], css: Sequence[str], *, top: float, last: float, height: float,
          level: Level | None, x_title: str, y_title: str, label: str) -> str:
    """Return upright bars of stacked parts, each with its tip, up to `top`; an arrow stands on those that go on."""
    y_steps, x_steps = ticks(0, top, 4), [v for v in ticks(0, last, 6) if v <= last]
    y = Scale(0, top, height, 0)
    pitch = 100 / len(bars)
    width = pitch * (1.1 if len(bars) > 72 else 0.84)  # many bars overlap a little: no hairlines between them
    parts = []
    for i, (values, tip) in enumerate(bars):
        body, base = "", 0.0
        for value, color in zip(values, css, strict=True):
            tall = y(base) - y(base + value)
            body += (f'<rect class="{color}" x="{place(i * pitch)}%" y="{place(y(base + value))}" '
                     f'width="{place(width)}%" height="{place(tall)}" fill="currentColor"/>')
            base += value
        if base > top:
            body += at(i * pitch + width / 2, 0, '<path class="pinned" d="M0-8L3-2H-3z"/>')
        parts.append(titled(tip, body))
    body = f'<g class="bars">{"".join(parts)}</g>'
    if level is not None and level.y <= top:
        body += f'<g class="{level.css}">{line(0, y(level.y), 100, y(level.y), level.line)}</g>'
    return frame(body, height=height, x_title=x_title, y_title=y_title, label=label,
                 x_ticks=[(100 * v / last, name) for v, name in zip(x_steps, tick_texts(x_steps), strict=True)],
                 y_ticks=[(y(v), name) for v, name in zip(y_steps, tick_texts(y_steps), strict=True) if v <= top])


def _runs(row: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (level, first, how many) of equal neighbours."""
    begin = 0
    for level, equal in groupby(row):
        n = len(list(equal))
        yield level, begin, n
        begin += n


def cells(rows: Sequence[Sequence[int]], css: Sequence[str]) -> str:
    """Return a path per level for a grid of unit cells; level 0 is not drawn. `css[i]` is the colour of level i + 1."""
    paths: list[list[str]] = [[] for _ in css]
    for i, row in enumerate(rows):
        ends: dict[int, int] = {}
        for level, begin, n in _runs(row):
            if level:
                # A stroke one row high; what follows in the same row needs only its distance.
                move = f"m{begin - ends[level]} 0" if level in ends else f"M{begin} {i}.5"
                paths[level - 1].append(f"{move}h{n}")
                ends[level] = begin + n
    return "".join(f'<path class="{color}" d="{"".join(path)}"/>' for color, path in zip(css, paths, strict=True)
                   if path)


def heat(rows: Sequence[Sequence[int]], css: Sequence[str], *, names: Sequence[str], tips: Sequence[str],
         x_title: str, y_title: str, label: str) -> str:
    """Return a grid with a row per name, coloured by levels from 0; each row has a tip."""
    n_rows, n_columns = len(rows), max([1, *(len(row) for row in rows)])
    height = min(400.0, max(60.0, 6.0 * n_rows))
    tipped = "".join(f'<rect y="{i}" width="{n_columns}" height="1"><title>{escape(tip)}</title></rect>'
                     for i, tip in enumerate(tips))
    body = (f'<rect class="ground" width="100%" height="100%"/><svg class="cells" width="100%" height="100%" '
            f'viewBox="0 0 {n_columns} {n_rows}" preserveAspectRatio="none">{cells(rows, css)}{tipped}</svg>')
    return frame(body, height=height, x_title=x_title, y_title=y_title, label=label,
                 x_ticks=[(100 * (i + 0.5) / n_columns, str(i)) for i in _even(n_columns)],
                 y_ticks=[(height * (i + 0.5) / n_rows, names[i]) for i in _even(n_rows)])


def _even(n: int) -> range:
    """Return every 2^k-th of n, four to eight of them: experts come in powers of two."""
    return range(0, n, 1 << max(0, (n - 1).bit_length() - 2))


def bar(value: float, top: float, css: str, bounds: tuple[float, float] | None, label: str) -> str:
    """Return a flat bar up to `top`, with a whisker for its bounds."""
    x = Scale(0, top or 1.0, 0, 100)
    body = f'<rect width="{place(x(value))}%" height="9" fill="currentColor"/>'
    if bounds:
        ends = "".join(at(x(end), 4.5, '<line class="thin" y1="-4.5" y2="4.5"/>') for end in bounds)
        body += f'<g class="pinned">{line(x(bounds[0]), 4.5, x(bounds[1]), 4.5, "thin")}{ends}</g>'
    return (f'<svg class="flat {css}" width="100%" height="9" role="img" aria-label="{escape(label)}">'
            f"{titled(label, body)}</svg>")


def key(content: str, css: str, width: int = 24) -> str:
    """Return the small sign before the words of a legend."""
    return f'<svg class="key {css}" width="{width}" height="11" aria-hidden="true">{content}</svg>'


def series_key(one: Series | Level) -> str:
    """Return the sign of a series or a level: its line, its marker."""
    body = f'<line class="{one.line}" x1="0" y1="5.5" x2="24" y2="5.5"/>' if one.line else ""
    if isinstance(one, Series) and one.shape:
        body += f'<svg class="at" x="12" y="5.5">{mark(one.shape, one.is_hollow)}</svg>'
    return key(body, one.css)


def box_key(css: Sequence[str], width: int = 12) -> str:
    """Return boxes of these colours in a row."""
    return key("".join(f'<rect class="{color}" x="{i * width}" width="{width}" height="11" fill="currentColor"/>'
                       for i, color in enumerate(css)), "", width * len(css))
