"""Figures with their doubt, tables, and heat maps as text and as SVG."""
import math
import random
from html import escape

def wilson(right, n, z=1.96):
    """95% interval of a share, `right` of n: (low, high).

    >>> [round(x, 3) for x in wilson(95, 100)]
    [0.888, 0.978]
    """
    p, d = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, (p + z * z / (2 * n)) / d - half), min(1.0, (p + z * z / (2 * n)) / d + half)

def bootstrap(values, rounds=2000, seed=0):
    """95% interval of the mean of some numbers, by drawing from them again and again: (low, high)."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(rounds))
    return means[round(0.025 * (rounds - 1))], means[round(0.975 * (rounds - 1))]

def share_of(right):
    """A list of bools as a share with its interval: "0.950 (.888-.978)"."""
    low, high = wilson(sum(right), len(right))
    return f"{sum(right) / len(right):.3f} ({low:.3f}-{high:.3f})".replace("(0.", "(.").replace("-0.", "-.")

def mean_of(values, digits=3):
    low, high = bootstrap(values)
    return f"{sum(values) / len(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

def table(title, columns, rows):
    """Print a markdown table; rows: {name: [cell, ...]}."""
    print(f"\n| {title} | {' | '.join(map(str, columns))} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    print(flush=True)

# ------------------------------------------------------------------------------------------------------- heat maps

def heat(depths, right, bins=10):
    """Share of right answers by depth 0..1, in `bins` of equal width: [0.9, None (nothing there), ...].

    >>> heat([0.05, 0.07, 0.95], [True, False, True], 2)
    [0.5, 1.0]
    """
    cells = [[] for _ in range(bins)]
    for depth, ok in zip(depths, right):
        cells[min(int(depth * bins), bins - 1)].append(ok)
    return [sum(cell) / len(cell) if cell else None for cell in cells]

def heat_text(title, rows):
    """rows {label: [share or None, ...]} -> lines of text: a digit is tenths, rounded down, # is all, . is nothing."""
    letter = lambda share: "." if share is None else "#" if share == 1 else str(int(10 * share))
    return [title] + [f"  {label!s:>6}  {''.join(map(letter, cells))}" for label, cells in rows.items()]

def heat_svg(maps, path, cell=14):
    """Write heat maps side by side, three in a line: maps {title: {label: [share or None, ...]}}, start to end of the
    text from left to right. Red is 0, yellow a half, green 1."""
    bins, lines = (len(next(iter(x.values()))) for x in (next(iter(maps.values())),)), len(next(iter(maps.values())))
    (bins,) = bins
    wide, high, parts = 60 + bins * cell, 34 + lines * cell, []
    for i, (title, rows) in enumerate(maps.items()):
        x0, y0 = i % 3 * wide, i // 3 * high
        parts.append(f'<text x="{x0 + 44}" y="{y0 + 16}" font-weight="bold">{escape(title)}</text>')
        for r, (label, shares) in enumerate(rows.items()):
            y = y0 + 22 + r * cell
            parts.append(f'<text x="{x0 + 40}" y="{y + cell - 3}" text-anchor="end">{escape(str(label))}</text>')
            for c, share in enumerate(shares):
                color = "#ddd" if share is None else f"hsl({round(120 * share)},65%,50%)"
                parts.append(f'<rect x="{x0 + 44 + c * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                             f'fill="{color}"><title>{"no data" if share is None else f"{share:.2f}"}</title></rect>')
    size = f'width="{wide * min(3, len(maps))}" height="{high * -(-len(maps) // 3)}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
                    + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")
