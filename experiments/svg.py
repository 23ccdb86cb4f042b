"""A plot with logarithmic axes as SVG, readable on a light and on a dark page."""
import math
from html import escape

STYLE = ("text{fill:#333}.grid{stroke:#ddd}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
         ".line{fill:none;stroke-width:2}")

def ticks(low, high):
    """1, 2 and 5 times powers of ten, from the last one below `low` to the first one above `high`.

    >>> ticks(3, 40)
    [2.0, 5.0, 10.0, 20.0, 50.0]
    """
    steps = [m * 10.0 ** e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
             for m in (1, 2, 5)]
    first = max(i for i, t in enumerate(steps) if t <= low)
    last = min(i for i, t in enumerate(steps) if t >= high)
    return steps[first:max(last, first + 1) + 1]

def short(n):
    """
    >>> short(131072), short(1000)
    ('128K', '1000')
    """
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else f"{n:g}"

def line_plot(lines, path, title, y_label, width=760, height=420):
    """lines {name: [(x, y), ...]}, all above 0; x are numbers of tokens. Dense ones are dashed; the legend is sorted
    by the last value."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = ticks(*(f(y for points in lines.values() for _, y in points) for f in (min, max)))
    left, top, right, bottom = 60, 40, width - 260, height - 40
    wide, high = math.log(xs[-1] / xs[0]) or 1, math.log(ys[-1] / ys[0])
    at = lambda x, y: (round(left + (right - left) * math.log(x / xs[0]) / wide, 1),
                       round(bottom - (bottom - top) * math.log(y / ys[0]) / high, 1))
    parts = [f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>',
             f'<text x="{left - 46}" y="{top - 8}">{escape(y_label)}</text>',
             f'<text x="{right}" y="{height - 6}" text-anchor="end">tokens</text>']
    for y in ys:
        h = at(xs[0], y)[1]
        parts += [f'<path class="grid" d="M{left} {h}H{right}"/>',
                  f'<text x="{left - 6}" y="{h + 4}" text-anchor="end">{y:g}</text>']
    for x in xs:
        w = at(x, ys[0])[0]
        parts += [f'<path class="grid" d="M{w} {top}V{bottom}"/>',
                  f'<text x="{w}" y="{bottom + 16}" text-anchor="middle">{short(x)}</text>']
    order = sorted(lines, key=lambda name: -lines[name][-1][1])
    for i, name in enumerate(order):
        color = f"hsl({round(360 * i / len(order))},65%,48%)"
        dash = ' stroke-dasharray="6 4"' if name.startswith("dense") else ""
        points, y, style = [at(*p) for p in lines[name]], top + 8 + 18 * i, f'class="line" stroke="{color}"{dash}'
        parts.append(f'<polyline {style} points="{" ".join(f"{x},{h}" for x, h in points)}"/>')
        parts += [f'<circle cx="{x}" cy="{h}" r="3" fill="{color}"/>' for x, h in points]
        parts += [f'<path {style} d="M{right + 16} {y}h28"/>',
                  f'<text x="{right + 50}" y="{y + 4}">{escape(name)}</text>']
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="sans-serif" font-size="12">\n<style>{STYLE}</style>\n'
                + "\n".join(parts) + "\n</svg>\n")
