"""Line charts as inline SVG, coloured by the style sheet of the page that they are put into (classes s0 to s7)."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float | None]
"""(x, y); y is None where nothing was measured, which breaks the line."""

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 24
LEAST_SPREAD = 1e-3
"""Of an axis, relative to its values: a ratio that leaves 1 by rounding is drawn as the flat line that it is."""
LONGEST_LABEL = 7
"""Characters that fit beside the axis."""
MAX_POINTS = 300
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    band: Sequence[float | None] = ()
    """Half-width of the shaded band at each point."""
    markers: bool = False


@dataclass(frozen=True, slots=True)
class _Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], *, x_label: str = "step") -> str:
    """An SVG element with the lines, their bands, a grid and tick labels. Long lines are averaged in buckets.

    Raises:
        ValueError: if no series has a value.
    """
    thinned = [_thin(one) for one in series]
    axes = _axes(thinned)
    body = [*_grid(axes, x_label)]
    for index, one in enumerate(thinned):
        body += [_band(one, axes, index), *_line(one, axes, index)]
    name = html.escape(", ".join(one.label for one in series))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(body)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(marks: Sequence[float]) -> tuple[list[str], str]:
    """Short labels that differ, and the power of ten that they count in ("": ones)."""
    labels = _distinct(marks)
    largest = max((abs(value) for value in marks), default=0.0)
    if max(map(len, labels), default=0) <= LONGEST_LABEL or largest == 0.0:
        return labels, ""
    exponent = math.floor(math.log10(largest))
    return _distinct([value / 10.0**exponent for value in marks]), f"\u00d7 1e{exponent}" if exponent else ""


def _distinct(marks: Sequence[float]) -> list[str]:
    digits = 4
    while digits < 12 and len({f"{value:.{digits}g}" for value in marks}) < len(marks):
        digits += 1
    return [f"{value:.{digits}g}" for value in marks]


def _thin(one: Series) -> Series:
    if len(one.points) <= MAX_POINTS:
        return one
    size = math.ceil(len(one.points) / MAX_POINTS)
    starts = range(0, len(one.points), size)
    points = [_mean_point(one.points[start : start + size]) for start in starts]
    band = [_mean(one.band[start : start + size]) for start in starts] if one.band else ()
    return Series(label=one.label, points=points, band=band, markers=one.markers)


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), _mean([y for _, y in points])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _band_points(one: Series) -> list[tuple[float, float, float]]:
    """(x, lower, upper) where both the line and its band are known."""
    pairs = zip(one.points, one.band, strict=True) if one.band else ()
    return [(x, y - half, y + half) for (x, y), half in pairs if y is not None and half is not None]


def _axes(series: Sequence[Series]) -> _Axes:
    xs = [x for one in series for x, y in one.points if y is not None]
    ys = [y for one in series for _, y in one.points if y is not None]
    if not ys:
        raise ValueError("nothing to draw")
    ys += [edge for one in series for _, *edges in _band_points(one) for edge in edges]
    low, high = min(ys), max(ys)
    missing = LEAST_SPREAD * max(abs(low), abs(high)) - (high - low)
    if missing > 0 and high > low:
        low, high = low - missing / 2, high + missing / 2
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    x_low, x_high = min(xs), max(xs)
    # values that cannot be negative should not get an axis that is
    y_low = 0.0 if 0 <= low < room * 2 else low - room
    return _Axes(x_low, x_high if x_high > x_low else x_low + 1, y_low, high + room)


def _grid(axes: _Axes, x_label: str) -> list[str]:
    lines = []
    marks = ticks(axes.y_low, axes.y_high)
    labels, unit = tick_labels(marks)
    for value, label in zip(marks, labels, strict=True):
        y = axes.y(value)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    if unit:
        lines.append(f'<text class="tick" x="{LEFT}" y="{TOP - 1}">{unit}</text>')
    for value in ticks(axes.x_low, axes.x_high, 5):
        if value == int(value):
            y = HEIGHT - BOTTOM + 15
            lines.append(f'<text class="tick" x="{axes.x(value):.1f}" y="{y}" text-anchor="middle">{value:.0f}</text>')
    lines.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    lines.append(f'<text class="tick" x="0" y="{HEIGHT - BOTTOM + 15}">{x_label}</text>')
    return lines


def _band(one: Series, axes: _Axes, index: int) -> str:
    points = _band_points(one)
    if len(points) < 2:
        return ""
    around = [(x, upper) for x, _, upper in points] + [(x, lower) for x, lower, _ in reversed(points)]
    outline = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in around)
    return f'<polygon class="band s{index % NUM_COLOURS}" points="{outline}"/>'


def _line(one: Series, axes: _Axes, index: int) -> list[str]:
    colour = f"s{index % NUM_COLOURS}"
    parts: list[str] = []
    path = ""
    pen_down = False
    for x, y in one.points:
        if y is not None:
            path += f"{'L' if pen_down else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}"
        pen_down = y is not None
    parts.append(f'<path class="line {colour}" d="{path}"/>')
    known = [(x, y) for x, y in one.points if y is not None]
    # a line through one point is invisible, and a reader may ask for the value of a marked one
    for x, y in known if one.markers or len(known) == 1 else ():
        tip = html.escape(f"{one.label} at {x:.0f}: {y:.4g}")
        place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
        parts.append(f'<circle class="dot {colour}" {place} r="3.5"><title>{tip}</title></circle>')
    return parts
