"""How many questions about a long text are still answered when each step may attend to few tokens only.

    python experiments/quality.py                          1K, 4K and 8K tokens, budget 128, 100 needles each
    python experiments/quality.py --lengths 1024 --n 20    quicker

A needle is one fact among seven others of its kind, somewhere in a text of filler that fills the prompt exactly; the
model is asked for it and must write the whole answer, exactly. All rules get the same prompts, and the same budget.
The interval is Wilson's, at 95%.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import DenseKV, Llama
from sentencekv import SentenceKV, sentence_flags
from tokenizer import Tokenizer
from train_tiny import evaluate

RULES = {
    "dense": None,
    "bounds, all kept": dict(rank="bounds"),
    "mean, all kept": dict(rank="mean"),
    "paper: mean, keep 2, pool 7": dict(rank="mean", keep=2, pool=7),
}

def wilson(p, n, z=1.96):
    """The interval of a share p of n: (low, high)."""
    d = 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return (p + z * z / (2 * n)) / d - half, (p + z * z / (2 * n)) / d + half

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny"))
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    p.add_argument("--budget", type=int, default=128)
    p.add_argument("--n", type=int, default=100)
    p.add_argument("--seed", type=int, default=2025)
    a = p.parse_args()
    tokenizer, model = Tokenizer.from_dir(a.model), Llama.from_pretrained(a.model)
    flags = sentence_flags(tokenizer.token_bytes)
    print(f"{' '.join(sys.argv)}: budget {a.budget}, {a.n} needles, seed {a.seed}, torch {torch.__version__}")
    for length in a.lengths:
        for name, rule in RULES.items():
            start = time.perf_counter()
            new_cache = DenseKV if rule is None else lambda: SentenceKV(flags, budget=a.budget, **rule)
            share = evaluate(model, tokenizer, length, a.n, a.seed, new_cache, whole=True)
            low, high = wilson(share, a.n)
            print(f"{length:6} tokens  {name:28} {share:.2f}  ({low:.2f} to {high:.2f})  "
                  f"[{time.perf_counter() - start:.0f} s]", flush=True)

if __name__ == "__main__":
    main()
