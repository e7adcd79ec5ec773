"""One small SVG of lines with their points, for the pictures that benchmarks leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLOURS = ("#1b7837", "#999999", "#762a83", "#e08214")


def draw(path: str | Path, x_name: str, y_name: str, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    """Write `path`: each of `series` over `x`, the y axis from 0."""
    top, right = max(max(values) for values in series.values()), max(x)
    bottom = HEIGHT - MARGIN

    def place(at: float, value: float) -> tuple[float, float]:
        return MARGIN + (WIDTH - 2 * MARGIN) * at / right, bottom - (HEIGHT - 2 * MARGIN) * value / top

    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    lines.append('<rect width="100%" height="100%" fill="white"/>')
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(at, value) for at, value in zip(x, values, strict=True)]
        trace = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        lines.append(f'<polyline points="{trace}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(points) <= 20:
            lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points]
        lines.append(
            f'<text x="{WIDTH - MARGIN}" y="{20 + 16 * number}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    for value in (0.0, top / 2, top):
        _, y = place(0, value)
        lines.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for at in (0.0, right / 2, right):
        a, _ = place(at, 0)
        lines.append(f'<text x="{a:.1f}" y="{bottom + 16}" text-anchor="middle">{at:g}</text>')
    lines.append(f'<line x1="{MARGIN}" y1="{bottom}" x2="{WIDTH - MARGIN}" y2="{bottom}" stroke="black"/>')
    lines.append(f'<line x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{bottom}" stroke="black"/>')
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{x_name}</text>')
    lines.append(f'<text x="{MARGIN}" y="{MARGIN - 12}">{y_name}</text></svg>')
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
