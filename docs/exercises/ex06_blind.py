"""Exercise 6 of docs/exercises.md: why is the mean blind?

    python -m pytest docs/exercises/ex06_blind.py
"""
import pytest
import torch
from helpers import FLAGS, Watched

from sentencekv import SentenceKV

def needle_and_decoys(n, a, b, decoys):
    """Keys of 1 + decoys sentences of n tokens, for the query (1, 0, 0, 0): list of (n, 4).

    Sentence 0 has the needle: one of its keys has the product a with the query, the others 0. All
    keys of the decoys have the product b with it.
    """
    raise NotImplementedError

def blind_range(n, b):
    """(low, high): Ball finds the needle if a > low, but Mean only if a > high.

    For queries so long that a softmax leaves everything to its largest logit.
    """
    raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

@pytest.mark.parametrize("n", [2, 3, 6, 20])
@pytest.mark.parametrize("b", [0.5, 2.0])
def test_the_range_is_where_the_mean_misses_and_the_ball_finds(n, b):
    low, high = blind_range(n, b)
    setting = dict(sink=2, recent=1, budget=2 * n + 5, max_sentence=n)
    for a, by_ball, by_mean in ((0.95 * low, 3, 3), (1.05 * low, 0, 3), (0.95 * high, 0, 3),
                                (1.05 * high, 0, 0)):
        sentences = needle_and_decoys(n, a, b, decoys=3)
        for rank, want in (("ball", by_ball), ("mean", by_mean)):
            watched = Watched(SentenceKV(FLAGS, rank=rank, **setting))
            watched.prompt([torch.zeros(2, 4), *sentences, torch.zeros(2, 4)])
            watched.decode(200 * torch.eye(4)[0])
            order = watched.cache.fetched()[0][0, 0, 0].tolist()
            far = [s for s in order if 1 <= s <= 4]             # sentence 1 has the needle
            assert far.index(1) == want

@pytest.mark.parametrize("n", [6, 20])
def test_dense_attention_looks_at_the_needle_and_the_mean_loses_it(n):
    sentences = needle_and_decoys(n, 0.95 * blind_range(n, 1.0)[1], 1.0, decoys=5)
    for rank, budget, found in (("mean", 200, True), ("mean", 2 * n + 5, False),
                                ("ball", 2 * n + 5, True)):
        setting = dict(rank=rank, budget=budget, sink=2, recent=1, max_sentence=n)
        watched = Watched(SentenceKV(FLAGS, **setting))
        watched.prompt([torch.zeros(2, 4), *sentences, torch.zeros(2, 4)])
        weight = watched.decode(4 * torch.eye(4)[0])[2:2 + n].max()
        assert weight > 0.99 if found else weight == 0
