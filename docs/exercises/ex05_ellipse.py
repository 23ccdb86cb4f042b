"""Exercise 5 of docs/exercises.md: a fourth rank.

    python -m pytest docs/exercises/ex05_ellipse.py
"""
import pytest
import torch
from helpers import FLAGS, Watched

import sentencekv
from sentencekv import SentenceKV

class Ellipse:
    """The keys of a sentence as an ellipse: their mean and their deviation in every dimension.

    vector    (..., 2 * d): the mean m and the standard deviation s of each dimension (divide by n)
    score     With x = (q + query_mean) / 2 / sqrt(d), the edge of an ellipse has the logit
              x . m + sqrt(sum_i x_i^2 s_i^2). A softmax over the candidates, summed over G.

    The three functions take and return what those of Mean and Ball do.
    """

    def features(k):
        raise NotImplementedError

    def vector(total, n):
        raise NotImplementedError

    def score(q, query_mean, vectors, candidates):
        raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

@pytest.mark.parametrize("G", [1, 3])
def test_vectors_and_scores_are_those_of_the_definition(G):
    keys, q, query_mean = (torch.rand(1, 1, n, 4) for n in (30, G, G))
    sentences = keys.view(1, 1, 5, 6, 4)
    vectors = Ellipse.vector(Ellipse.features(sentences).sum(3), 6)
    deviation = sentences.std(3, correction=0)
    want = torch.cat((sentences.mean(3), deviation), dim=-1)
    torch.testing.assert_close(vectors, want, atol=1e-4, rtol=1e-4)
    candidates = torch.tensor([[True, True, False, True, True]])
    scores = torch.zeros(4)
    for x in (q + query_mean)[0, 0] / 4:
        edges = [x @ m + (x * s).norm() for m, s in zip(sentences[0, 0].mean(1), deviation[0, 0])]
        scores += torch.stack(edges)[candidates[0]].softmax(0)
    got = Ellipse.score(q, query_mean, vectors, candidates)[0, 0]
    torch.testing.assert_close(got[candidates[0]], scores, atol=1e-4, rtol=1e-4)

def test_it_knows_in_which_direction_the_keys_of_a_sentence_differ(monkeypatch):
    """Sentence 2 varies more, but across the query. Sentence 3 has two keys along the query."""
    monkeypatch.setitem(sentencekv.RANKS, "ellipse", Ellipse)
    first, across, along, other = torch.zeros(4, 4, 8)
    across[:, 1] = torch.tensor([5.0, -5, 5, -5])
    along[:, 0] = torch.tensor([3.0, -3, 3, -3])
    for rank, best in (("ball", 2), ("ellipse", 3)):
        watched = Watched(SentenceKV(FLAGS, budget=9, sink=4, recent=1, max_sentence=4, rank=rank))
        watched.prompt([first, other, across, along, *[other] * 8])
        weights = watched.decode(9 * torch.eye(8)[0])
        assert watched.cache.fetched()[0][0, 0, 0, 1] == best       # the first one is the sink
        assert (weights[12:16].sum() > 0.9) == (rank == "ellipse")
