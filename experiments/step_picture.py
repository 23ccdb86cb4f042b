"""Draws one decode step, that of docs/walkthrough.md, as an SVG file.

    python -m experiments.step_picture docs/decode-step.svg
"""
import sys
from html import escape
from pathlib import Path

import torch

from sentencekv import RANKS, SentenceKV, sentence_flags

WORDS = ["<s>", "Ann", " has", " a", " cat", ".", " Bob", " has", " two", " dogs", ".",
         " Who", " has", " a", " cat"]
BUDGET = 12
# fill, and the stroke that tells the same without color
STYLE = """text{fill:#222;font:13px sans-serif} .soft{fill:#5a6168} .bold{font-weight:bold}
.near{fill:#d5d9dd;stroke:#5a6168;stroke-dasharray:2 2} .far{fill:#8cc3e4;stroke:#0072b2}
.left{fill:none;stroke:#5a6168} .self{fill:#222;stroke:#222} .on-self{fill:#fff}
.line{fill:none;stroke:#5a6168} .arrow{fill:none;stroke:#0072b2;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#e8eaec} .soft{fill:#a5adb4}
.near{fill:#3a4147;stroke:#a5adb4} .far{fill:#1d5c85;stroke:#56b4e9} .left{stroke:#a5adb4}
.self{fill:#e8eaec;stroke:#e8eaec} .on-self{fill:#15181b} .line{stroke:#a5adb4}
.arrow{stroke:#56b4e9}}"""
LEFT, WIDE, TALL = 20, 50, 26        # of the first token; size of a token

def decode_step():
    """Run the walkthrough's step with the cache -> the cache, and its scores, a list."""
    vocabulary = sorted(set(WORDS))
    flags = sentence_flags([word.encode() for word in vocabulary])
    cache = SentenceKV(flags, budget=BUDGET, sink=1, recent=3, max_sentence=8, rank="mean")
    keys = torch.zeros(1, 1, 15, 2, dtype=torch.float64)              # (B, H, T, d)
    keys[0, 0, 1:6] = torch.tensor([1.0, 0.0])
    keys[0, 0, 6:11] = torch.tensor([0.0, 1.0])
    query = torch.tensor([9.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    tokens = torch.tensor([[vocabulary.index(word) for word in WORDS]])
    for part in (slice(0, 14), slice(14, 15)):
        cache.begin(tokens[:, part])
        cache.attend(0, query.expand(1, 1, tokens[:, part].shape[1], 2), keys[:, :, part],
                     keys[:, :, part])
    layer = cache.layers[0]
    everything = torch.ones_like(layer.count, dtype=torch.bool)
    score = RANKS["mean"].score(query, layer.query_mean, layer.vectors, everything)
    return cache, score[0, 0].tolist()

class Drawing:
    """SVG elements, one after the other."""

    def __init__(self):
        self.parts = []

    def text(self, x, y, text, kind="", anchor="start"):
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">'
                          f'{escape(text)}</text>')

    def box(self, x, y, width, kind, text=""):
        self.parts.append(f'<rect class="{kind}" x="{x + 1}" y="{y}" width="{width - 2}" '
                          f'height="{TALL}" rx="4"/>')
        self.text(x + width / 2, y + 18, text.strip(), f"on-{kind}", "middle")

    def path(self, kind, path):
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def write(self, path, width, height):
        body = "\n".join(self.parts)
        Path(path).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">\n<style>{STYLE}</style>\n{body}\n</svg>\n',
            encoding="utf-8")

def draw(path):
    """Host pool above, vectors and ranks below it, and the tokens that the step attends to."""
    cache, score = decode_step()
    sentence, taken = (x.flatten().tolist() for x in cache.fetched())
    fetched = {s: n for s, n in zip(sentence, taken) if n > 0}        # best first
    lengths = list(cache.rows[0].lengths)
    lengths[-1] -= 1                                                  # the token itself is the last
    start = [sum(lengths[:s]) for s in range(len(lengths))]
    near = {0, len(lengths) - 1}
    far = [s for s in fetched if s not in near]
    drawing = Drawing()
    drawing.text(LEFT, 22, "Host memory: keys and values of all tokens, by sentence", "bold")
    for s, n in enumerate(lengths):
        x = LEFT + WIDE * start[s]
        for i in range(n):
            kind = "left" if i >= fetched.get(s, 0) else "near" if s in near else "far"
            drawing.box(x + WIDE * i, 34, WIDE, kind, WORDS[start[s] + i])
        middle = x + WIDE * n / 2
        drawing.path("line", f"M{x + 3} 66v5H{x + WIDE * n - 3}v-5M{middle} 71v16")
        drawing.text(middle, 102, f"sentence {s}" if n > 1 else "sink", "soft", "middle")
        x_mean, y_mean = cache.layers[0].vectors[0, 0, s].tolist()
        rank = "" if s in near else f"rank {far.index(s) + 1}"
        vector = f"mean key ({x_mean:g}, {y_mean:g}), q . mean / \u221ad = {score[s]:.1f}"
        drawing.text(middle, 122, "always" if s in near else vector, "", "middle")
        drawing.text(middle, 142, rank, "", "middle")
    draw_attended(drawing, fetched, start, near)
    drawing.write(path, 2 * LEFT + WIDE * sum(lengths), 290)

def draw_attended(drawing, fetched, start, near):
    """The places of the budget, in the order of the ranks."""
    title = f"Device: one fetch fills the budget of {BUDGET} tokens, best rank first"
    drawing.text(LEFT, 188, title, "bold")
    place, far = 0, [s for s in fetched if s not in near]
    for s, n in fetched.items():
        x = LEFT + WIDE * place
        for i in range(n):
            kind = "near" if s in near else "far"
            drawing.box(x + WIDE * i, 216, WIDE, kind, WORDS[start[s] + i])
        middle = x + WIDE * n / 2
        rank = "always" if s in near else f"rank {far.index(s) + 1}"
        drawing.text(middle, 258, rank, "soft", "middle")
        drawing.path("arrow", f"M{middle} 198v12m-4 -5l4 5l4 -5")
        place += n
    x = LEFT + WIDE * (BUDGET - 1)
    drawing.box(x, 216, WIDE, "self", WORDS[-1])
    drawing.text(x + WIDE / 2, 258, "itself", "soft", "middle")
    last = WORDS[-1].strip()
    drawing.text(LEFT, 282, f"The token \u201c{last}\u201d attends to these {place + 1} tokens. "
                 "Empty boxes above: not fetched.", "soft")

if __name__ == "__main__":
    draw(sys.argv[1])
