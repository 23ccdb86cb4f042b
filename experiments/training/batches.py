"""Batches for training: documents of corpus.py as ids, the weights of the loss, and positions."""
import numpy as np
import torch

from experiments.training.corpus import copying, lesson
from experiments.training.vocabulary import VOCAB

SPAN = 16384                            # positions that training covers

def document(rng, L, copies, prose, tokenizer):
    """One document for training -> ids (L + 1,), the weight of each in the loss (L + 1,)."""
    if rng.random() < copies:
        pieces = copying(rng, L)
    else:
        pieces = lesson(rng, L, prose if rng.random() < 0.5 else 0.0)
    ids, weights = [VOCAB - 1], [0.0]
    while len(ids) <= L:
        text, weight = next(pieces)
        new = tokenizer.encode(text)
        ids += new
        weights += [weight] * len(new)
    return ids[:L + 1], weights[:L + 1]

def batch(rng, B, L, copies, prose, tokenizer):
    """-> ids (B, L + 1), weights of the loss (B, L), positions (B, L).

    In half of the documents the positions jump ahead where a sentence begins, over up to SPAN
    positions in all. So a model that is trained at length 1024 works at 8192.
    """
    noise = np.random.default_rng(rng.getrandbits(64))
    stops = tokenizer.encode(".") + tokenizer.encode("?")
    x = np.zeros((B, L + 1), dtype=int)
    w = np.zeros((B, L + 1), dtype=np.float32)
    positions = np.tile(np.arange(L), (B, 1))
    for b in range(B):
        x[b], w[b] = document(rng, L, copies, prose, tokenizer)
        if rng.random() < 0.5:
            starts = np.isin(np.append(0, x[b, :L - 1]), stops)         # (L,) of sentences
            gaps = starts * noise.exponential(size=L) ** rng.choice((1, 3))
            extra = L * (SPAN / L) ** rng.random() - L                  # log-uniform
            positions[b] += (gaps.cumsum() / max(gaps.sum(), 1e-9) * extra).astype(int)
    return torch.from_numpy(x), torch.from_numpy(w[:, 1:]), torch.from_numpy(positions)
