"""A line plot with logarithmic axes as SVG, readable on a light and on a dark page."""
import math
from html import escape
from pathlib import Path

STYLE = """text{fill:#333} .grid{stroke:#ddd} .line{fill:none;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#ddd} .grid{stroke:#444}}"""
LEFT, TOP, LEGEND, BOTTOM = 60, 40, 260, 40     # margins; the legend is on the right

def ticks(low, high):
    """1, 2 and 5 times powers of ten, from the last one <= low to the first one >= high.

    >>> ticks(3, 40)
    [2.0, 5.0, 10.0, 20.0, 50.0]
    """
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = [m * 10.0 ** e for e in exponents for m in (1, 2, 5)]
    first = max(i for i, t in enumerate(steps) if t <= low)
    last = min(i for i, t in enumerate(steps) if t >= high)
    return steps[first:max(last, first + 1) + 1]

def short(n):
    """
    >>> short(131072), short(1000)
    ('128K', '1000')
    """
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else f"{n:g}"

class Axes:
    """The scales of both axes: from values to places on the page."""

    def __init__(self, points, width, height):
        self.xs = sorted({x for x, _ in points})
        self.ys = ticks(min(y for _, y in points), max(y for _, y in points))
        self.right = width - LEGEND
        self.bottom = height - BOTTOM

    def x(self, value):
        span = math.log(self.xs[-1] / self.xs[0]) or 1
        share = math.log(value / self.xs[0]) / span
        return round(LEFT + (self.right - LEFT) * share, 1)

    def y(self, value):
        share = math.log(value / self.ys[0]) / math.log(self.ys[-1] / self.ys[0])
        return round(self.bottom - (self.bottom - TOP) * share, 1)

    def grid(self):
        """Grid lines with their numbers: list of SVG elements."""
        parts = []
        for value in self.ys:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{self.right}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        for value in self.xs:
            x = self.x(value)
            parts.append(f'<path class="grid" d="M{x} {TOP}V{self.bottom}"/>')
            parts.append(f'<text x="{x}" y="{self.bottom + 16}" text-anchor="middle">'
                         f'{short(value)}</text>')
        return parts

def line_plot(lines, path, title, y_label, width=760, height=420):
    """Write lines {name: [(tokens, y), ...]}, all numbers above 0, to an SVG file.

    Lines whose name starts with "dense" are dashed. The legend is sorted by the last value.
    """
    axes = Axes([point for points in lines.values() for point in points], width, height)
    parts = [
        f'<text x="{LEFT}" y="20" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT - 46}" y="{TOP - 8}">{escape(y_label)}</text>',
        f'<text x="{axes.right}" y="{height - 6}" text-anchor="end">tokens</text>',
        *axes.grid()]
    order = sorted(lines, key=lambda name: -lines[name][-1][1])
    for i, name in enumerate(order):
        color = f"hsl({round(360 * i / len(order))},65%,48%)"
        dash = ' stroke-dasharray="6 4"' if name.startswith("dense") else ""
        style = f'class="line" stroke="{color}"{dash}'
        points = [(axes.x(x), axes.y(y)) for x, y in lines[name]]
        text = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline {style} points="{text}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in points]
        y = TOP + 8 + 18 * i
        parts.append(f'<path {style} d="M{axes.right + 16} {y}h28"/>')
        parts.append(f'<text x="{axes.right + 50}" y="{y + 4}">{escape(name)}</text>')
    body = "\n".join(parts)
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">\n'
        f'<style>{STYLE}</style>\n{body}\n</svg>\n', encoding="utf-8")
