"""Curves of throughput against a number of deltas as an SVG picture, without a drawing library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 696, 66, 360
STEPS = 5  # of the scale of tokens, about
BLACK, GRAY = "#1c1c1c", "#6b6b6b"


@dataclass(frozen=True)
class Curve:
    """One line: tokens per second by the number of deltas, at least one point; ``name`` stands in the legend."""

    name: str
    colour: str
    points: Mapping[int, float]


def picture(curves: Sequence[Curve], base: float, title: str, subtitle: str) -> str:
    """Deltas on a scale of powers of two, tokens per second from zero; ``base`` is a dashed line across."""
    counts = sorted({count for curve in curves for count in curve.points})
    step = round_step(max(base, *(value for curve in curves for value in curve.points.values())) / STEPS)
    top = step * math.ceil(max(base, *(v for curve in curves for v in curve.points.values())) * 1.05 / step)
    powers = max(math.log2(counts[-1]), 1)

    def x(count: int) -> float:
        return LEFT + 16 + math.log2(count) / powers * (RIGHT - LEFT - 32)

    def y(value: float) -> float:
        return BOTTOM - value / top * (BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 20, title, "start", BLACK),
        text(LEFT, 37, subtitle, "start", GRAY),
        text(
            (LEFT + RIGHT) / 2, HEIGHT - 18, "distinct deltas among the requests (log scale)", "middle", BLACK
        ),
        f'<g transform="translate(20 {(TOP + BOTTOM) / 2}) rotate(-90)">'
        + text(0, 0, "new tokens per second", "middle", BLACK)
        + "</g>",
    ]
    for n in range(round(top / step) + 1):
        level = y(n * step)
        parts.append(f'<path d="M{LEFT} {level:.1f}H{RIGHT}" stroke="#e2e2e2"/>')
        parts.append(text(LEFT - 8, level + 4, f"{n * step:g}", "end", GRAY))
    for count in counts:
        parts.append(f'<path d="M{x(count):.1f} {BOTTOM}v5" stroke="{BLACK}"/>')
        parts.append(text(x(count), BOTTOM + 19, str(count), "middle", GRAY))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="{BLACK}"/>')
    parts.append(
        f'<path d="M{LEFT} {y(base):.1f}H{RIGHT}" stroke="{GRAY}" stroke-width="1.5" stroke-dasharray="6 4"/>'
    )
    for curve in curves:
        places = [(x(count), y(curve.points[count])) for count in sorted(curve.points)]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{d:.1f}" r="3.5" fill="{curve.colour}"/>' for a, d in places]
        for (across, down), count in zip(places, sorted(curve.points), strict=True):
            parts.append(text(across, down + 18, f"{curve.points[count]:.0f}", "middle", curve.colour))
    parts += legend([(f"no delta ({base:.0f})", GRAY), *((curve.name, curve.colour) for curve in curves)])
    return "\n".join([*parts, "</svg>", ""])


def legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Names and colours in a row above the curves; the first is the dashed line."""
    parts = []
    for n, (name, colour) in enumerate(entries):
        left = LEFT + n * 190
        dashes = "" if n else ' stroke-dasharray="6 4"'
        parts.append(f'<path d="M{left} 53h26" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(text(left + 32, 57, name, "start", BLACK))
    return parts


def round_step(at_least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50, ... (or 0.1, 0.2 ...) that is at least that."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= at_least * (1 - 1e-9))


def text(across: float, down: float, words: str, anchor: str, colour: str) -> str:
    return (
        f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
    )
