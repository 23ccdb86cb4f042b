"""Intervals and Markdown tables."""
import math
import random

def wilson(right, n, z=1.96):
    """95% interval of a share, `right` of n: (low, high).

    >>> [round(x, 3) for x in wilson(95, 100)]
    [0.888, 0.978]
    """
    p = right / n
    scale = 1 + z * z / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)

def bootstrap(values, rounds=2000, seed=0):
    """95% interval of the mean of some values, by drawing from them with replacement."""
    rng = random.Random(seed)
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(rounds))
    return means[round(0.025 * (rounds - 1))], means[round(0.975 * (rounds - 1))]

def share(answers):
    """A list of bools as a share with its interval.

    >>> share([True] * 95 + [False] * 5)
    '.950 (.888-.978)'
    """
    low, high = wilson(sum(answers), len(answers))
    text = f"{sum(answers) / len(answers):.3f} ({low:.3f}-{high:.3f})"
    return text.replace("0.", ".")

def ratio(differences):
    """Differences of losses as a ratio of perplexities with its interval.

    >>> ratio([0.1, 0.1])
    '1.105 (1.105-1.105)'
    """
    low, high = bootstrap(differences)
    mean = sum(differences) / len(differences)
    return f"{math.exp(mean):.3f} ({math.exp(low):.3f}-{math.exp(high):.3f})"

def table(title, columns, rows):
    """Print a Markdown table. rows: {name: [cell, ...]}."""
    print(f"\n| {title} | {' | '.join(map(str, columns))} |")
    print("|" + " --- |" * (len(columns) + 1))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    print(flush=True)
