"""Needles of the tiny model in checkpoints/tiny, in the texts that it was trained for.

    python -m experiments.quality.toy

A prompt states facts among filler sentences or prose and asks for one of them, see needle() in
experiments/training/corpus.py. An answer is right if each of its tokens is the likeliest one after
the tokens before it. Intervals: Wilson, 95%.
"""
import random
from pathlib import Path

import torch

from experiments.quality.answers import right_answers
from experiments.quality.command import Lab, at_least, options, run
from experiments.quality.figures import share, table
from experiments.quality.recording import record
from experiments.training.corpus import needle

KEYS = ("facts", "prose", "length", "seed", "part", "method")
TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"
KINDS = ((1, 0.0), (8, 0.0), (1, 1.0), (8, 1.0))        # facts in a text, share of prose

@torch.no_grad()
def measure(lab, facts, prose, length, seed):
    """Add the answers of every method to one question to the log."""
    key = (facts, prose, length, seed)
    missing = lab.missing(*key)
    if not missing:
        return
    rng = random.Random(f"{facts} {prose} {length} {seed}")
    prompt, answer = needle(rng, length, lab.tokenizer, facts, prose=prose, whole=True)
    recording = record(lab.model, prompt)
    compared = [lab.method(part, name, length) for part, name in missing]
    right = right_answers(lab.model, recording, answer, compared)
    for (part, name), ok in zip(missing, right):
        lab.log.add({**dict(zip(KEYS, key)), "part": part, "method": name, "right": ok})

def report(lab, lengths, n):
    """Print the shares of right answers, over all kinds of text."""
    columns = [f"{length}, 1/{part}" for length in lengths for part in lab.parts]
    rows = {}
    for name in ("dense", *lab.methods):
        rows[name] = []
        for length in lengths:
            for part in lab.parts:
                keys = [(*kind, length, seed, part if name != "dense" else 0, name)
                        for kind in KINDS for seed in range(n)]
                rows[name].append(share([lab.log[key]["right"] for key in keys]))
    table(f"tiny model, n = {len(KINDS) * n}", columns, rows)

def main(argv=None):
    parser = options(__doc__, parts=[16], model=TINY)
    parser.add_argument("--lengths", type=at_least(256), nargs="+", default=[2048])
    parser.add_argument("--n", type=at_least(1), default=50, help="questions of each kind of text")
    args = parser.parse_args(argv)
    lab = Lab(args, KEYS)
    for length in args.lengths:
        for facts, prose in KINDS:
            for seed in range(args.n):
                measure(lab, facts, prose, length, seed)
    report(lab, args.lengths, args.n)

if __name__ == "__main__":
    raise SystemExit(run(main))
