"""Pictures as SVG, by hand: points and lines on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 610, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 16, 46
_FLOOR, _CEILING = 1e-17, 1e2  # nothing is more accurate, and worse is as bad

_COLOURS = {
    "torchlinop": "#1d4ed8",
    "scipy": "#d97706",
    "torch": "#7c3aed",
    "hessian-eigenthings": "#059669",
    "pyhessian": "#0891b2",
    "curvlinops": "#65a30d",
    "primme": "#be185d",
    "slepc": "#a21caf",
    "pylops": "#92400e",
    "cupyx": "#4d7c0f",
    "dense": "#6b7280",
}
_OTHER = "#111827"
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_MARKS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Style:
    """How a solver looks in every picture: its number, colour, dashes and mark."""

    number: int
    colour: str
    dash: str
    mark: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour for every library, the first word of a name; dashes and marks within."""
    seen: dict[str, int] = {}
    found = {}
    for number, name in enumerate(names, 1):
        family = name.split()[0]
        i = seen[family] = seen.get(family, -1) + 1
        colour = _COLOURS.get(family, _OTHER)
        found[name] = Style(number, colour, _DASHES[i % 4], _MARKS[i % 4])
    return found


@dataclass(frozen=True)
class Series:
    """Points of one solver, joined if there are several."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    hollow: bool = False  # what it claims is not so


class _Axis:
    """Logarithmic, from a little below the least value to a little above the largest."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        logs = [math.log10(v) for v in values] or [0.0]
        low, high = min(logs), max(logs)
        margin = max(0.04 * (high - low), 0.08)
        self.low, self.high = low - margin, high + margin
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Powers of ten, thinned; with halves and fifths between where there are few."""
        first, last = math.ceil(self.low), math.floor(self.high)
        step = max(1, math.ceil((last - first + 1) / 8))
        found = [10.0**p for p in range(first, last + 1, step)]
        if last - first >= 2:
            return found
        finer = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [t for t in finer if self.low <= math.log10(t) <= self.high]


def chart(
    series: Sequence[Series],
    looks: dict[str, Style],
    *,
    across: str,
    up: str,
    target: float = math.nan,
) -> str:
    """One picture. Lines end, and points come, with the number of their solver."""
    shown = [s for s in map(_drawable, series) if s.x]
    if not shown:
        return f'<p class="empty">No points of {escape(up)} to draw.</p>'
    levels = [target] if target > 0 else []
    x = _Axis([v for s in shown for v in s.x], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([*(v for s in shown for v in s.y), *levels], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(up)} against {escape(across)}">',
        *_grid(x, y, across, up),
    ]
    parts += [_level(y.at(level), f"asked: {level:g}") for level in levels]
    free = _Labels([(x.at(s.x[-1]), y.at(s.y[-1])) for s in shown])
    for s in shown:
        parts += _drawn(s, looks[s.name], x, y, free)
    return "\n".join([*parts, "</svg>"])


def swatch(look: Style) -> str:
    """The line and mark of a solver, for a legend."""
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    line = f'<line x1="1" y1="7" x2="33" y2="7" stroke="{look.colour}" stroke-width="2"{dash}/>'
    return f'<svg class="swatch" viewBox="0 0 34 14">{line}{_mark(look, 17, 7, False)}</svg>'


def _drawable(series: Series) -> Series:
    pairs = [
        (a, min(max(b, _FLOOR), _CEILING))
        for a, b in zip(series.x, series.y, strict=True)
        if math.isfinite(a) and math.isfinite(b) and a > 0
    ]
    return Series(series.name, [a for a, _ in pairs], [b for _, b in pairs], series.hollow)


def _grid(x: _Axis, y: _Axis, across: str, up: str) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in x.ticks():
        a = x.at(tick)
        yield f'<line class="grid" x1="{a:.1f}" y1="{_TOP}" x2="{a:.1f}" y2="{bottom}"/>'
        yield f'<text x="{a:.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(tick)}</text>'
    for tick in y.ticks():
        b = y.at(tick)
        yield f'<line class="grid" x1="{_LEFT}" y1="{b:.1f}" x2="{right}" y2="{b:.1f}"/>'
        yield f'<text x="{_LEFT - 7}" y="{b + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
    yield (
        f'<text class="name" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" '
        f'text-anchor="middle">{escape(across)}</text>'
    )
    yield (
        f'<text class="name" x="14" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(_TOP + bottom) / 2})">{escape(up)}</text>'
    )


def _level(b: float, text: str) -> str:
    right = _WIDTH - _RIGHT
    return (
        f'<line class="level" x1="{_LEFT}" y1="{b:.1f}" x2="{right}" y2="{b:.1f}"/>'
        f'<text class="level" x="{_LEFT + 5}" y="{b - 4:.1f}">{escape(text)}</text>'
    )


def _drawn(s: Series, look: Style, x: _Axis, y: _Axis, free: _Labels) -> Iterator[str]:
    points = [(x.at(a), y.at(b)) for a, b in zip(s.x, s.y, strict=True)]
    yield f'<g class="series" data-solver="{look.number}">'
    if len(points) > 1:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        yield f'<path d="{path}" fill="none" stroke="{look.colour}" stroke-width="1.8"{dash}/>'
    for (a, b), cost, value in zip(points, s.x, s.y, strict=True):
        told = escape(f"{s.name}: {value:.1e} for {cost:.4g}")
        yield f"<g><title>{told}</title>{_mark(look, a, b, s.hollow)}</g>"
    a, b = free.place(*points[-1])
    yield f'<text class="number" x="{a:.1f}" y="{b:.1f}" fill="{look.colour}">{look.number}</text>'
    yield "</g>"


class _Labels:
    """Places for numbers beside points, so that none lies on another, or on a mark."""

    def __init__(self, marks: Sequence[tuple[float, float]]) -> None:
        self._marks = marks
        self._taken: list[tuple[float, float]] = []

    def place(self, a: float, b: float) -> tuple[float, float]:
        for across, down in ((7, 4), (7, -8), (7, 16), (-16, 4), (-16, -8), (-16, 16), (22, 4)):
            spot = (a + across, b + down)
            numbers = any(abs(spot[0] - p) <= 18 and abs(spot[1] - q) <= 10 for p, q in self._taken)
            marks = any(-5 < p - spot[0] < 16 and abs(q - spot[1] + 4) < 8 for p, q in self._marks)
            if not numbers and not marks:
                break
        self._taken.append(spot)
        return spot


def _mark(look: Style, a: float, b: float, hollow: bool) -> str:
    fill = "#ffffff" if hollow else look.colour
    ends = f'fill="{fill}" stroke="{"#dc2626" if hollow else look.colour}" stroke-width="1.6"'
    if look.mark == "circle":
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.6" {ends}/>'
    corners = {
        "square": ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)),
        "triangle": ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
        "diamond": ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)),
    }[look.mark]
    points = " ".join(f"{a + p:.1f},{b + q:.1f}" for p, q in corners)
    return f'<polygon points="{points}" {ends}/>'


def _tick(value: float) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    power = round(math.log10(value))
    if abs(value / 10.0**power - 1) > 1e-9:
        return f"{value:.0e}"
    return f'10<tspan dy="-5" font-size="9">{power}</tspan>'
