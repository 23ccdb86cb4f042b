"""What several exercises share: a cache whose weights can be seen, and the tiny model's questions.

Import it first: it makes the modules of the repository's root importable.
"""
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.training.corpus import needle
from model import Llama
from sentencekv import sentence_flags
from tokenizer import Tokenizer

FLAGS = sentence_flags([b" word", b"."])

class Watched:
    """Feeds keys to a cache of one row, one layer, one head. The value of token i is unit vector i.

    So the output of attention is the list of weights: which tokens are attended to, and how much.
    Keys and queries have as many dimensions as there are tokens; the rest of them is zero.
    """

    def __init__(self, cache, size=256):
        self.cache = cache
        self.size = size                                        # most tokens
        self.tokens = 0

    def forward(self, ids, q, k):
        """ids: list of T tokens; q and k (T, d), d <= size -> the weights (T, size)."""
        T, start = len(ids), self.tokens
        wide = torch.zeros(2, T, self.size, dtype=torch.float64)
        wide[0, :, :q.shape[1]] = q * self.size ** 0.5          # attention divides by it
        wide[1, :, :k.shape[1]] = k
        v = torch.eye(self.size, dtype=torch.float64)[start:start + T]
        q, k, v = (x[None, None] for x in (*wide, v))           # (1, 1, T, size)
        self.tokens += T
        self.cache.begin(torch.tensor([ids]))
        return self.cache.attend(0, q, k, v)[0, 0]

    def prompt(self, sentences):
        """sentences: list of keys (n, d), n > 1 tokens each."""
        ids = [token for keys in sentences for token in [0] * (len(keys) - 1) + [1]]
        keys = torch.cat(sentences)
        self.forward(ids, torch.zeros_like(keys), keys)

    def decode(self, query):
        """The weights of a decode step with this query (d,) and a key of zeros: (size,)."""
        return self.forward([0], query[None], torch.zeros_like(query)[None])[0]

def tiny_model():
    """The embedded model in float32, and its tokenizer."""
    folder = ROOT / "checkpoints" / "tiny"
    torch.set_num_threads(1)        # a small model is not faster with more
    return Llama.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_dir(folder)

def toy_questions(tokenizer, n, length=2048):
    """n prompts of `length` tokens, each with a question, and the ids of its answer: (ids, ids)."""
    for seed in range(n):
        rng = random.Random(seed)
        yield needle(rng, length, tokenizer, facts=8, prose=seed % 2, whole=True)
