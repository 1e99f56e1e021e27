"""Curves as inline SVG: mIoU over the steps of a protocol, a line a method.

Colours are the page's (classes s0 … s7 of the style sheet, for light and dark); markers and dashes tell
the lines apart without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean, stdev

import pandas as pd

from bench.report.collect import Chain, Section
from bench.report.tables import number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 470, 42, 160, 14, 52
LABEL_GAP = 15
"""Least distance of two labels, in the units of the picture."""
LABEL_LETTERS = 18
COLOURS = 8
MARKERS = ("circle", "square", "up", "diamond", "down", "cross", "pentagon")
"""As many as have no common divisor with COLOURS, so that pairs repeat late."""
DASHES = ("", "6 3", "2 3")
BANDS = 8
"""With more lines than this, bands would hide them."""
TICKS = 12
"""At most as many ticks on the axis of steps."""


@dataclass(frozen=True)
class Line:
    """One method's curve.

    Attributes:
        title: of the method, with what is missing.
        style: position among the lines; decides colour, marker and dash.
        steps: x of each point.
        values: mIoU of each seed at each point, in percent.
        keys: jobs of each point.
        bound: learned all classes at once: one point, at the last step.
    """

    title: str
    style: int
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    keys: tuple[tuple[str, ...], ...]
    bound: bool = False

    @property
    def means(self) -> list[float]:
        return [mean(values) for values in self.values]

    @property
    def colour(self) -> str:
        """Name of its style in the page."""
        return "bound" if self.bound else f"s{self.style % COLOURS}"


def lines(section: Section, measured: pd.DataFrame, how: str) -> list[Line]:
    """The curves of a section: of the seeds that finished every step, or, where none did, that came farthest.

    Args:
        section: which one.
        measured: its numbers, as `numbers` gives them.
        how: name of the convention.
    """
    means = measured[(measured["convention"] == how) & (measured["quantity"] == "all")]
    found = []
    for style, chain in enumerate(sorted(section.chains, key=lambda c: c.at_once)):
        seeds = _farthest(chain)
        mine = means[(means["method"] == chain.label) & means["seed"].isin(seeds)]
        points = [(int(str(step)), group) for step, group in mine.groupby("step") if len(group) == len(seeds)]
        if not points:
            continue
        done = len(chain.by_seed[seeds[0]])
        title = chain.title if done == chain.steps else f"{chain.title} ({done} of {chain.steps} steps)"
        steps = [len(section.groups) - 1 if chain.at_once else step for step, _ in points]
        values, keys = ([tuple(group[name]) for _, group in points] for name in ("value", "key"))
        found.append(Line(title, style, tuple(steps), tuple(values), tuple(keys), chain.at_once))
    return found


def _farthest(chain: Chain) -> list[int]:
    """Seeds with the most steps."""
    most = max((len(results) for results in chain.by_seed.values()), default=0)
    return [seed for seed, results in chain.by_seed.items() if len(results) == most]


@dataclass(frozen=True)
class Frame:
    """Where a step and a percentage lie in the picture.

    Attributes:
        n: steps of the protocol.
        low, high: ends of the axis of mIoU, in percent.
        height: of the picture.
    """

    n: int
    low: int
    high: int
    height: int

    right = WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, step: float) -> float:
        return LEFT + step * (self.right - LEFT) / (self.n - 1)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (self.bottom - TOP)


def curve(section: Section, drawn: Sequence[Line]) -> str:
    """An SVG element with some curves; "" for a protocol of one step, or if there is nothing to draw."""
    n = len(section.groups)
    if n < 2 or not drawn:
        return ""
    every = [value for line in drawn for values in line.values for value in values]
    low, high = min(90, max(0, 10 * int(min(every) // 10))), min(100, 10 * (int(max(every) // 10) + 1))
    frame = Frame(n, low, high, max(320, TOP + BOTTOM + LABEL_GAP * len(drawn)))
    parts = [
        _axes(section, frame),
        *(_line(line, frame, len(drawn) <= BANDS) for line in drawn),
        _labels(drawn, frame),
    ]
    name = escape(f"mIoU over all classes seen so far, after each step of {section.name}")
    return f'<svg viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _axes(section: Section, frame: Frame) -> str:
    right, bottom = frame.right, frame.bottom
    stride = 20 if frame.high - frame.low > 60 else 10
    parts = []
    for value in range(-(-frame.low // stride) * stride, frame.high + 1, stride):
        height = f"{frame.y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height}" y2="{height}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{height}" dy="4" text-anchor="end">{value}</text>'
        )
    every = -(-frame.n // TICKS)
    seen = 1
    for step, group in enumerate(section.groups):
        seen += len(group)
        if step % every == 0:
            for kind, below, text in (("tick", 18, step), ("tick faint", 34, seen)):
                where = f'x="{frame.x(step):.1f}" y="{bottom + below}" text-anchor="middle"'
                parts.append(f'<text class="{kind}" {where}>{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{right + 14}" y="{bottom + 18}">step</text>')
    parts.append(f'<text class="tick faint" x="{right + 14}" y="{bottom + 34}">classes so far</text>')
    middle = (TOP + bottom) / 2
    where = f'transform="rotate(-90 11 {middle:.1f})" x="11" y="{middle:.1f}" text-anchor="middle"'
    parts.append(f'<text class="tick" {where}>mIoU all, %</text>')
    return "".join(parts)


def _line(line: Line, frame: Frame, band: bool) -> str:
    """A band of one standard deviation (if wanted), the means, and at each step a marker with its numbers."""
    points = [(frame.x(step), frame.y(m)) for step, m in zip(line.steps, line.means, strict=True)]
    parts = []
    if band and len(line.values[0]) > 1:
        spreads = [(m, stdev(values)) for m, values in zip(line.means, line.values, strict=True)]
        upper, lower = (
            [(px, frame.y(m + sign * spread)) for (px, _), (m, spread) in zip(points, spreads, strict=True)]
            for sign in (1, -1)
        )
        if len(points) > 1:
            parts.append(f'<polygon class="band" points="{_points([*upper, *reversed(lower)])}"/>')
        else:
            parts.append(f'<polyline class="curve" points="{_points([*upper, *lower])}"/>')
    if len(points) > 1:
        parts.append(f'<polyline class="curve"{_dash(line)} points="{_points(points)}"/>')
    for (px, py), step, values, keys in zip(points, line.steps, line.values, line.keys, strict=True):
        says = f"{line.title}, step {step}: {number(values)} (n={len(values)}), job {' '.join(keys)}"
        parts.append(f"<g>{_marker(line, px, py)}<title>{escape(says)}</title></g>")
    return f'<g class="{line.colour}">{"".join(parts)}</g>'


def _labels(drawn: Sequence[Line], frame: Frame) -> str:
    """Names at the right, each beside the end of its line, moved apart where they would overlap."""
    left = frame.right + 14
    ends = sorted(drawn, key=lambda line: -line.means[-1])
    places = spread_out([frame.y(line.means[-1]) for line in ends], LABEL_GAP, TOP, frame.bottom)
    parts = []
    for line, place in zip(ends, places, strict=True):
        text = line.title if len(line.title) <= LABEL_LETTERS else line.title[: LABEL_LETTERS - 1] + "…"
        end, y = frame.y(line.means[-1]), f"{place:.1f}"
        if line.steps[-1] == frame.n - 1:
            parts.append(f'<line class="leader" x1="{frame.right + 7}" x2="{left}" y1="{end:.1f}" y2="{y}"/>')
        across = f'x1="{left}" x2="{left + 22}" y1="{y}" y2="{y}"'
        sample = "" if line.bound else f'<line class="curve"{_dash(line)} {across}/>'
        parts.append(f'<g class="{line.colour}">{sample}{_marker(line, left + 11, place)}</g>')
        name = f"{escape(text)}<title>{escape(line.title)}</title>"
        parts.append(f'<text class="name" x="{left + 27}" y="{y}" dy="4">{name}</text>')
    return "".join(parts)


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ascending ones, at least `gap` apart, in [low, high] if there is room."""
    placed: list[float] = []
    for position in wanted:
        placed.append(max(position, placed[-1] + gap if placed else low))
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap if i + 1 < len(placed) else high)
    return placed


def _dash(line: Line) -> str:
    dash = DASHES[line.style // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    "up": ((0, -5.2), (4.8, 3.6), (-4.8, 3.6)),
    "diamond": ((0, -5.6), (5.6, 0), (0, 5.6), (-5.6, 0)),
    "down": ((0, 5.2), (4.8, -3.6), (-4.8, -3.6)),
    "cross": (
        (-1.8, -5), (1.8, -5), (1.8, -1.8), (5, -1.8), (5, 1.8), (1.8, 1.8),
        (1.8, 5), (-1.8, 5), (-1.8, 1.8), (-5, 1.8), (-5, -1.8), (-1.8, -1.8),
    ),
    "pentagon": ((0, -5), (4.8, -1.5), (2.9, 4), (-2.9, 4), (-4.8, -1.5)),
}  # fmt: skip


def _marker(line: Line, px: float, py: float) -> str:
    shape = "circle" if line.bound else MARKERS[line.style % len(MARKERS)]
    if shape == "circle":
        return f'<circle class="marker" cx="{px:.1f}" cy="{py:.1f}" r="4.4"/>'
    return f'<polygon class="marker" points="{_points([(px + dx, py + dy) for dx, dy in SHAPES[shape]])}"/>'
