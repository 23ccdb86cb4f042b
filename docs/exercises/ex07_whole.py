"""Exercise 7 of docs/exercises.md: keep=r drops whole sentences only.

    python -m pytest docs/exercises/ex07_whole.py
"""
import pytest
import torch
from helpers import FLAGS

from sentencekv import SentenceKV, importance

def whole_sentences(score, count, n):
    """Which sentences to keep: list of bool.

    In descending score, each sentence is kept if the kept ones then hold at most n tokens in all.
    A sentence that does not fit is skipped; a smaller one after it can still be kept. score, count:
    lists, one number per sentence. Equal scores: the earlier sentence comes first.

    >>> whole_sentences([1.0, 9.0, 5.0, 4.0], [3, 2, 4, 1], n=6)
    [False, True, True, False]
    """
    raise NotImplementedError

class WholeSentences(SentenceKV):
    """SentenceKV whose keep=r drops sentences, not tokens.

    The score of a sentence is the mean importance of its tokens; it is infinite for the sink, and
    for each sentence that reaches into the last `recent` tokens.
    """

    def _prune(self, layer):
        """keep=r: store only the best whole sentences of each row, at most floor(r * budget)."""
        raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

def test_whole_sentences_are_kept_by_score_as_long_as_they_fit():
    assert whole_sentences([1.0, 9.0, 5.0, 4.0], [3, 2, 4, 1], 6) == [False, True, True, False]
    assert whole_sentences([1.0, 9.0, 5.0, 4.0], [3, 2, 4, 1], 5) == [False, True, False, True]
    assert whole_sentences([2.0, 2.0, 2.0], [3, 3, 3], 7) == [True, True, False]

@pytest.mark.parametrize("T", [2, 40, 200])
@pytest.mark.parametrize("keep, max_pool", [(1, 1), (1.7, 3)])
def test_the_cache_keeps_exactly_these_sentences(T, keep, max_pool):
    random = torch.Generator().manual_seed(T)
    setting = dict(window=4, budget=30, recent=5, max_sentence=7, keep=keep, max_pool=max_pool)
    cache = WholeSentences(FLAGS, **setting)
    tokens = (torch.rand(2, T + 1, generator=random) < 0.25).long()
    q, k = (3 * torch.randn(2, h, T + 1, 8, generator=random) for h in (4, 2))
    for part in (slice(0, T), slice(T, T + 1)):
        cache.begin(tokens[:, part])
        cache.attend(0, q[:, :, part], k[:, :, part], k[:, :, part])
    for b, row in enumerate(cache.rows):
        sentence = torch.tensor(row.sentence)
        kept = torch.ones(T + 1, dtype=torch.bool)
        n = int(30 * keep)
        if T > n:
            alpha = importance(q[b, :, T - 4:T], k[b, :, :T], max_pool)
            score = [float(alpha[sentence[:T] == s].mean()) for s in range(sentence[T - 1] + 1)]
            for s in (0, *sentence[T - 5:T].tolist()):
                score[s] = float("inf")
            count = sentence[:T].bincount().tolist()
            kept[:T] = torch.tensor(whole_sentences(score, count, n))[sentence[:T]]
        used = cache.layers[0].count[b, :sentence[-1] + 1]
        assert used.tolist() == sentence[kept].bincount(minlength=len(used)).tolist()
        assert torch.equal(cache.layers[0].pool.read(b)[:, :, 0], k[b][:, kept])
