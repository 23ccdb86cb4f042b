"""Exercise 10 of docs/exercises.md: select again only when the query turns.

    python -m pytest docs/exercises/ex10_lazy.py
    python docs/exercises/ex10_lazy.py                  # the measurement on the tiny model
    python docs/exercises/ex10_lazy.py DIR FILE ...     # on another model and real texts
"""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import FLAGS, Watched, tiny_model, toy_questions

from experiments.quality.figures import share
from extras.branch import fork
from model import Llama
from sentencekv import HostPool, SentenceKV, sentence_flags
from tokenizer import Tokenizer

class Lazy(SentenceKV):
    """SentenceKV whose layers keep what they fetched, until the query turns.

    A layer selects, as SentenceKV does, in the first decode step after a prompt, and whenever the
    cosine between a query (of any row and head) and its query at the last selection is at most
    `threshold`. Otherwise it reads nothing from the host: it attends to what it fetched at the last
    selection and to all tokens since. Each of these takes the place of the token that ranked
    lowest. Before this would reach a token that was near (sink, recent) at the last selection, the
    layer selects again.

    selected, reused: how many decode steps of a layer did the one and the other.
    """

    def __init__(self, flags, threshold, **settings):
        raise NotImplementedError

@torch.no_grad()
def measure(n=100, budget=128, thresholds=(1, 0.8, 0.6, 0.4, 0.2, 0, -1)):
    """Print what is saved and lost in the answers to n questions about texts of 2,048 tokens."""
    model, tokenizer = tiny_model()
    flags = sentence_flags(tokenizer.token_bytes)
    results = {threshold: [] for threshold in thresholds}
    for prompt, answer in toy_questions(tokenizer, n):
        cache = Lazy(flags, 1, budget=budget)
        model.prefill(torch.tensor([prompt]), cache)
        for threshold in thresholds:
            branch = fork(cache)
            branch.threshold = threshold
            logits = [model(torch.tensor([[token]]), branch) for token in answer[:-1]]
            logits = torch.cat(logits)                                # (tokens, V)
            loss = F.cross_entropy(logits, torch.tensor(answer[1:]))
            right = logits.argmax(-1).tolist() == answer[1:]
            reused = branch.reused / (branch.reused + branch.selected)
            results[threshold].append((right, float(loss), reused))
    for threshold, rows in results.items():
        right, loss, reused = zip(*rows)
        print(f"threshold {threshold:5}: reused {sum(reused) / n:.3f}, right {share(right)}, "
              f"loss {sum(loss) / n:.4f}")

@torch.no_grad()
def measure_text(directory, files, budget=128, thresholds=(1, 0.95, 0.9, 0.8, 0.6)):
    """Print what is saved, and the loss of 128 tokens after 2,048 of each file, token by token."""
    model = Llama.from_pretrained(directory, dtype=torch.float32)
    tokenizer = Tokenizer.from_dir(directory)
    flags = sentence_flags(tokenizer.token_bytes)
    results = {threshold: [] for threshold in thresholds}
    for file in files:
        ids = tokenizer.encode(Path(file).read_text(encoding="utf-8"), bos=True)[:2048 + 128]
        cache = Lazy(flags, 1, budget=budget)
        model.prefill(torch.tensor([ids[:2048]]), cache)
        for threshold in thresholds:
            branch = fork(cache)
            branch.threshold = threshold
            logits = torch.cat([model(torch.tensor([[id]]), branch) for id in ids[2048:-1]])
            loss = float(F.cross_entropy(logits, torch.tensor(ids[2049:])))
            results[threshold].append((branch.reused / (branch.reused + branch.selected), loss))
    for threshold, rows in results.items():
        reused, loss = torch.tensor(rows).mean(0).tolist()
        print(f"threshold {threshold:5}: reused {reused:.3f}, loss {loss:.4f}")

# ------------------------------------------------------------------------------------------ tests

def feed(cache, B=2, seed=0):
    """Random forwards with a follow-up and an idle row -> outputs, 0 where there is no token."""
    random = torch.Generator().manual_seed(seed)
    for lengths in ((40, 30), *[(1, 1)] * 9, (1, 0), *[(1, 1)] * 4, (9, 5), *[(1, 1)] * 6):
        T = max(lengths)
        real = torch.arange(T) < torch.tensor(lengths)[:, None]             # (B, T)
        tokens = (torch.rand(B, T, generator=random) < 0.2).long().where(real, -1)
        q, k, v = (torch.randn(3, B, h, T, 8, generator=random) for h in (4, 2, 2))
        cache.begin(tokens)
        out = torch.stack([cache.attend(layer, q[layer], k[layer], v[layer]) for layer in range(3)])
        yield out * real[:, None, :, None]

@pytest.mark.parametrize("keep", [None, 1])
def test_at_threshold_1_it_is_sentencekv(keep):
    setting = dict(budget=24, recent=3, keep=keep, window=8)
    lazy = Lazy(FLAGS, 1, **setting)
    for got, want in zip(feed(lazy), feed(SentenceKV(FLAGS, **setting)), strict=True):
        assert torch.equal(got, want)
    assert (lazy.selected, lazy.reused) == (3 * 20, 0)

def test_a_budget_that_covers_the_text_is_exact_at_any_threshold():
    lazy, full = Lazy(FLAGS, -2, budget=100), SentenceKV(FLAGS, budget=100)
    for got, want in zip(feed(lazy), feed(full), strict=True):
        torch.testing.assert_close(got, want)
        for mine, other in zip(lazy.layers, full.layers):
            torch.testing.assert_close(mine.query_mean, other.query_mean)
    assert (lazy.selected, lazy.reused) == (3 * 3, 3 * 17)      # after two prompts and an idle row

@pytest.mark.parametrize("threshold, fetches", [(0.5, [1, 1, 1, 2, 2, 3]), (1, [1, 2, 3, 4, 5, 6])])
def test_it_fetches_when_the_query_turns_and_then_finds_what_it_asks_for(threshold, fetches):
    fetched, axes = [], torch.eye(16)
    class CountingPool(HostPool):
        def fetch(self, slot, out):
            fetched.append(slot)
            super().fetch(slot, out)
    setting = dict(budget=12, sink=2, recent=1, max_sentence=4, host_pool=CountingPool)
    watched = Watched(Lazy(FLAGS, threshold, **setting))
    watched.prompt([9 * axes[i].expand(4, 16) for i in range(16)])
    for axis, want in zip((3, 3, 3, 7, 7, 12), fetches):
        weights = watched.decode(axes[axis])
        assert weights[4 * axis:4 * axis + 4].sum() > 0.9
        assert len(fetched) == want

@pytest.mark.parametrize("budget, longest", [(12, 3), (13, 6), (30, 6), (9, 1)])
def test_the_lowest_ranked_make_room_for_new_tokens(budget, longest):
    sink, recent = 2, 4
    setting = dict(budget=budget, sink=sink, recent=recent, max_sentence=longest)
    watched = Watched(Lazy(FLAGS, -2, **setting))
    watched.prompt([torch.zeros(3, 4)] * 20)
    past, reused = set(), 0
    for _ in range(50):
        attended = set(watched.decode(torch.zeros(4)).nonzero().flatten().tolist())
        sentence = watched.cache.rows[0].sentence
        oldest = sentence[-recent:][0]                              # of the recent sentences
        near = {i for i, s in enumerate(sentence) if s == 0 or s >= oldest}
        if watched.cache.reused > reused:
            assert len(attended - past) == 1
            near |= near_before                                     # at the last selection
        assert near <= attended and len(attended) == budget
        past, near_before, reused = attended, near, watched.cache.reused
    assert reused >= 25

if __name__ == "__main__":
    measure_text(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else measure()
