"""Exercise 3 of docs/exercises.md: the rank of the default, from its description.

    python -m pytest docs/exercises/ex03_ball.py
"""
import pytest
import torch

import sentencekv

class MyBall:
    """The keys of a sentence as a ball: mean key m and radius R, the rms distance from the mean.

    features  (..., d) -> (..., d + 1): what one key contributes; contributions are summed
    vector    the sum over n keys -> (..., d + 1): m and R. Rounding must not make R NaN.
    score     q, query_mean (B, H, G, d), vectors (B, H, S, d + 1), candidates (B, S) -> (B, H, S)

    x is halfway between a query and its mean query, divided by sqrt(d). The center of a ball has
    the logit x . m, its edge has x . m + |x| R. Both become probabilities by a softmax over the
    candidates. The score of a sentence is the sum of both, over the G queries of the group.
    """

    def features(k):
        raise NotImplementedError

    def vector(total, n):
        raise NotImplementedError

    def score(q, query_mean, vectors, candidates):
        raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

@pytest.mark.parametrize("n", [1, 2, 7])
def test_vectors_and_scores_are_those_of_the_cache(n):
    random = torch.Generator().manual_seed(n)
    keys = 1 + torch.randn(2, 3, 5, n, 8, generator=random, dtype=torch.float64)    # S = 5
    q, query_mean = 3 * torch.randn(2, 2, 3, 2, 8, generator=random, dtype=torch.float64)
    candidates = torch.tensor([[True] * 5, [True, False, True, True, False]])
    vectors = MyBall.vector(MyBall.features(keys).sum(3), n)
    want = sentencekv.Ball.vector(sentencekv.Ball.features(keys).sum(3), n)
    torch.testing.assert_close(vectors, want, atol=1e-6, rtol=1e-6)
    got = MyBall.score(q, query_mean, vectors, candidates)
    want = sentencekv.Ball.score(q, query_mean, want, candidates)
    real = candidates[:, None].expand(2, 3, 5)
    torch.testing.assert_close(got[real].float(), want[real].float())

def test_equal_keys_have_radius_zero_in_spite_of_rounding():
    for value in range(1, 100):
        key = torch.full((8,), value / 100)
        vector = MyBall.vector(sum(MyBall.features(key) for _ in range(7)), 7)
        assert vector.isfinite().all() and vector[-1] < 1e-2
