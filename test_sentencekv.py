"""Every claim of the README, checked against plain references. Run: python -m pytest

The references here are written the slow, obvious way (loops over tokens, float64) and share no code with what they
check. A cache is tested alone, fed with random q, k and v, so that a failure names the line that broke.
"""
import base64
import contextlib
import copy
import ctypes
import doctest
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import weakref
import weakref
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sentencekv
import tokenizer as T
from experiments import (align, ask, baselines, benchmarks, figures, gpu_check, gpu_sections, living, measure, parts, quality,
                         recording, rules, speed, svg)
from experiments.corpus import VALUE
from experiments.graph import GraphedStep
from experiments.lookahead import Lookahead
from experiments.merges import check_merges
from experiments.recording import start
from experiments.shapes import SHAPES, random_llama
from model import LLAMA3_ROPE, Config, DenseKV, Llama, available_memory, rope_frequencies, rotate, sample
from sentencekv import HARD, PAPER, SOFT, SPACE, SentenceKV, segment, sentence_flags
from tokenizer import Tokenizer
from train_tiny import TrainingCache, batch, needle, story

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other
MORE = int(os.environ.get("MORE", 1))  # MORE=20 python -m pytest -k "damage or killed or grow": longer, by hand
quick = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))

# ----------------------------------------------------------------------------------------------- plain references

# A toy vocabulary: ids 0-5 are words, words after a space, full stops, paragraph ends, closing quotes, white space.
TOY = [b"word", b" word", b".", b".\n\n", b'"', b" "]
TOY_FLAGS = sentence_flags(TOY)


def plain_sentences(tokens, sink, cap):
    """Sentence number of every token (sink: -1) of one row, by a loop over its tokens that knows the toy vocabulary."""
    ids, sentence, size, state = [], -1, 0, "open"
    for i, token in enumerate(tokens):
        if i < sink:
            ids.append(-1)
            continue
        extends = token in (4, 5)
        begins = not extends and (state == "ended" or state == "maybe" and token == 1)
        if sentence == -1 or begins or size == cap:
            sentence, size = sentence + 1, 0
        size += 1
        ids.append(sentence)
        if token == 3:
            state = "ended"
        elif token == 2:
            state = "maybe"
        elif token == 5 and state == "maybe":
            state = "ended"
        elif not extends:
            state = "open"
    return ids


class Plain:
    """All that went through a cache, kept as lists, and attention by definition in float64."""

    def __init__(self, B, Hq, H, d, sink, recent, cap):
        self.tokens, self.known = [[] for _ in range(B)], [[] for _ in range(B)]
        self.B, self.Hq, self.H, self.d, self.sink, self.recent, self.cap = B, Hq, H, d, sink, recent, cap

    def add(self, tokens):
        for row, new in zip(self.tokens, tokens.tolist()):
            row += new

    def sentences(self, b):
        if len(self.known[b]) != len(self.tokens[b]):
            self.known[b] = plain_sentences(self.tokens[b], self.sink, self.cap)
        return self.known[b]

    def near(self, b):
        """Positions that are always attended: the sink, and the recent window rounded out to whole sentences."""
        ids, n = self.sentences(b), len(self.tokens[b])
        oldest = ids[max(n - self.recent, 0)]
        return [i for i in range(n) if i < self.sink or i >= n - self.recent or ids[i] >= oldest]


def plain_attention(q, k, v):
    """The queries of one group: q (G, d), k and v (n, d) -> (G, d), float64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=-1) @ v


def fetched_tokens(cache):
    """cache.fetched() as (layers, B, H, S): the tokens fetched of each of the S sentences that there are."""
    sentence, taken = (t.cpu() for t in cache.fetched())
    room = torch.zeros(*sentence.shape[:3], cache.first.shape[1] - 1, dtype=torch.long).scatter_(3, sentence, taken)
    S = int(cache.current.max()) + 1
    assert not room[..., S:].any()
    return room[..., :S]


class Feed:
    """A cache with random q, k, v going through it; `rows` remembers all keys and values as the oracle sees them."""

    def __init__(self, seed, B=1, Hq=4, H=2, d=8, layers=1, dtype=torch.float64, words=None, device="cpu",
                 lookahead=False, **setting):
        self.rng = torch.Generator().manual_seed(seed)
        self.cache = (Lookahead if lookahead else SentenceKV)(TOY_FLAGS, **setting)
        self.B, self.Hq, self.H, self.d, self.layers, self.dtype, self.device = B, Hq, H, d, layers, dtype, device
        c = self.cache
        self.plain = Plain(B, Hq, H, d, c.sink, c.recent, c.max_sentence)
        self.k = torch.zeros(layers, B, H, 0, d, dtype=dtype)
        self.v = torch.zeros(layers, B, H, 0, d, dtype=dtype)
        self.weights = torch.tensor(words or [3.0, 6, 1, 0.5, 0.5, 0.5])

    def random(self, *shape):
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def push(self, T, tokens=None, q=None, k=None, v=None, more=0):
        """T more tokens through all layers -> outputs (layers, B, Hq, T, d); keeps q, k, v of the call."""
        if tokens is None:
            tokens = torch.multinomial(self.weights, self.B * T, True, generator=self.rng).view(self.B, T)
        self.q = self.random(self.layers, self.B, self.Hq, T, self.d) if q is None else q
        k = self.random(self.layers, self.B, self.H, T, self.d) if k is None else k
        v = self.random(self.layers, self.B, self.H, T, self.d) if v is None else v
        self.k, self.v = torch.cat((self.k, k), 3), torch.cat((self.v, v), 3)
        self.plain.add(tokens)
        to = lambda t: t.to(self.device)
        self.positions = self.cache.begin(to(tokens), more)
        return torch.stack([self.cache.attend(l, to(self.q[l]), to(k[l]), to(v[l])) for l in range(self.layers)]).cpu()

    def expect(self, attended):
        """Attention of the last call's queries, by definition. attended(l, b, h, t) -> list of positions."""
        out, G = torch.zeros(self.q.shape, dtype=torch.float64), self.Hq // self.H
        for l, b, h, t in itertools.product(range(self.layers), range(self.B), range(self.H), range(self.q.shape[3])):
            at = attended(l, b, h, t)
            group = slice(h * G, h * G + G)
            out[l, b, group, t] = plain_attention(self.q[l, b, group, t], self.k[l, b, h, at], self.v[l, b, h, at])
        return out

    def causal(self):
        n, T = self.k.shape[3], self.q.shape[3]
        return self.expect(lambda l, b, h, t: list(range(n - T + t + 1)))

    def reported(self, kept=None):
        """Positions that the cache says the last step attended to: [l][b][h] -> sorted list, fetched ones apart."""
        fetched = fetched_tokens(self.cache)
        result = {}
        for l, b, h in itertools.product(*map(range, fetched.shape[:3])):
            ids = self.plain.sentences(b)
            far = []
            for s, taken in enumerate(fetched[l, b, h].tolist()):
                members = [i for i, x in enumerate(ids) if x == s and (kept is None or i in kept[l][b])]
                assert taken <= len(members)
                far += members[:taken]
            result[l, b, h] = far
        return result


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def assert_close(a, b, dtype=torch.float64):
    difference = (a.double() - b.double()).abs()
    assert difference.max() <= TOLERANCE[dtype], f"max {difference.max():.2e}, mean {difference.mean():.2e}"


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
layouts = st.sampled_from([None, [8.0, 8, 1, 0.2, 0.2, 0.2], [1.0, 1, 1, 1, 1, 1], [5.0, 5, 0, 0, 0, 0]])

# --------------------------------------------------------------------------------------------- 1. exact when it fits


@quick
@given(st.integers(0, 2**31), heads, st.integers(1, 3), layouts, st.integers(1, 60), st.integers(0, 5),
       st.sampled_from(["mean", "bounds"]), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_budget_that_covers_the_context_equals_dense_attention(seed, heads, B, words, T, sink, rank, dtype):
    feed = Feed(seed, B, *heads, dtype=dtype, words=words, budget=160, sink=sink, recent=7, rank=rank)
    assert_close(feed.push(T), feed.causal(), dtype)
    for _ in range(24):
        assert_close(feed.push(1), feed.causal(), dtype)
    assert_close(feed.push(9), feed.causal(), dtype)
    assert_close(feed.push(1), feed.causal(), dtype)


@pytest.mark.parametrize("first", [1, 3])
def test_a_context_that_came_token_by_token_equals_dense_attention_too(first):
    feed = Feed(0, 2, 4, 2, layers=2, budget=100, sink=6, recent=4)
    assert_close(feed.push(first), feed.causal())
    for _ in range(80):
        assert_close(feed.push(1), feed.causal())


# --------------------------------------------------------------------------------- 2, 3. any budget is what it says

small = dict(seed=st.integers(0, 2**31), heads=heads, B=st.integers(1, 2), words=layouts, T=st.integers(2, 90),
             budget=st.integers(12, 60), sink=st.integers(0, 4), recent=st.integers(1, 7),
             rank=st.sampled_from(["mean", "bounds"]))


@quick
@given(**small)
def test_any_budget_equals_dense_attention_masked_to_the_tokens_reported(seed, heads, B, words, T, budget, sink,
                                                                         recent, rank):
    feed = Feed(seed, B, *heads, layers=2, words=words, budget=budget, sink=sink, recent=recent, rank=rank)
    assert_close(feed.push(T), feed.causal())
    for _ in range(8):
        out, far = feed.push(1), feed.reported()
        assert_close(out, feed.expect(lambda l, b, h, t: sorted(far[l, b, h] + feed.plain.near(b))))


@quick
@given(**small)
def test_the_budget_is_never_exceeded_and_never_left_unused(seed, heads, B, words, T, budget, sink, recent, rank):
    feed = Feed(seed, B, *heads, words=words, budget=budget, sink=sink, recent=recent, rank=rank)
    feed.push(T)
    for _ in range(20):
        feed.push(1)
        for (l, b, h), far in feed.reported().items():
            near = feed.plain.near(b)
            assert not set(near) & set(far)                       # nothing attended to twice
            assert len(near) + len(far) == min(budget, len(feed.plain.tokens[b]))


def test_the_longest_possible_tail_fits_the_ring():
    """Without punctuation, over one period of the cap, the oldest recent token is each token of its sentence in turn."""
    for T in range(40, 50):
        feed = Feed(T, budget=30, sink=2, recent=6, max_sentence=9, words=[1.0, 1, 0, 0, 0, 0])
        feed.push(T)
        for _ in range(2):
            out, far = feed.push(1), feed.reported()
            assert_close(out, feed.expect(lambda l, b, h, t: sorted(far[l, b, h] + feed.plain.near(b))))


@pytest.mark.parametrize("keep, words, short", [(None, 20, 500), (2, 20, 0), (1, 3, 0)])
def test_the_room_is_filled_however_short_the_best_sentences_are(keep, words, short):
    """Half of the sentences have one or two tokens, and rank first; or keep=r has left few tokens of each, or none."""
    feed = Feed(0, Hq=2, H=1, d=4, budget=400, sink=4, recent=8, keep=keep, window=8, rank="mean")
    tokens = torch.tensor([([1] * words + [2]) * (3003 // (words + 1)) + [1, 3, 3, 1, 3, 3] * short])
    T = tokens.shape[1]
    k = feed.random(1, 1, 1, T, 4)
    k[..., 3003:, 0] = 9
    feed.push(T, tokens, k=k)
    for _ in range(150):
        feed.push(1, torch.tensor([[3]]), q=torch.tensor([5.0, 0, 0, 0], dtype=torch.float64).expand(1, 1, 2, 1, 4))
        near = len(feed.plain.near(0))
        assert int(feed.cache.fetched()[1].sum()) + near == 400


@quick
@given(**small)
def test_a_higher_scored_sentence_is_never_left_out_for_a_lower_one(seed, heads, B, words, T, budget, sink, recent,
                                                                    rank):
    feed = Feed(seed, B, *heads, words=words, budget=budget, sink=sink, recent=recent, rank=rank)
    feed.push(T)
    queries = [[] for _ in range(B)]                                  # of the sentence being generated, per row
    for _ in range(12):
        feed.push(1)
        fetched = fetched_tokens(feed.cache)
        for b in range(B):
            ids = feed.plain.sentences(b)
            if len(ids) == 1 or ids[-1] != ids[-2]:
                queries[b] = []
            queries[b].append(feed.q[0, b, :, 0])
            near = feed.plain.near(b)
            far = sorted({x for i, x in enumerate(ids) if i not in near})
            for h in range(feed.H):
                group = slice(h * feed.Hq // feed.H, (h + 1) * feed.Hq // feed.H)
                scores = {}
                for s in far:
                    keys = feed.k[0, b, h, [i for i, x in enumerate(ids) if x == s]]
                    if rank == "mean":
                        scores[s] = float(torch.stack(queries[b])[:, group].mean((0, 1)) @ keys.mean(0))
                    else:                                             # the largest product of any point in the box
                        scores[s] = sum(float(max(q * low, q * high)) for query in feed.q[0, b, group, 0]
                                        for q, low, high in zip(query, keys.amin(0), keys.amax(0)))
                order = sorted(far, key=lambda s: -scores[s])
                room = budget - len(near)
                for s in order:
                    size = ids.count(s)
                    assert fetched[0, b, h, s] == min(size, max(room, 0)), (scores, order)
                    room -= size
                assert fetched[0, b, h].sum() == sum(fetched[0, b, h, s] for s in far)


def chosen(feed, b, h, base, queries, width):
    """Positions that a fetch should bring of the first `base` tokens: near ones, then whole sentences, best first."""
    ids, group = feed.plain.sentences(b), slice(h * feed.Hq // feed.H, (h + 1) * feed.Hq // feed.H)
    near = feed.plain.near(b)
    scores = {}
    for s in {x for i, x in enumerate(ids) if i not in near}:
        keys = feed.k[0, b, h, [i for i, x in enumerate(ids) if x == s]]
        if feed.cache.settings["rank"] == "mean":
            scores[s] = float(torch.stack(queries[b])[:, group].mean((0, 1)) @ keys.mean(0))
        else:
            scores[s] = sum(float(max(q * low, q * high)) for query in queries[b][-1][group]
                            for q, low, high in zip(query, keys.amin(0), keys.amax(0)))
    places = [i for i in near if i < base]
    for s in sorted(scores, key=lambda s: -scores[s]):
        places += [i for i, x in enumerate(ids) if x == s]
    return places[:width]


@quick
@given(refresh=st.integers(1, 5), lookahead=st.booleans(), **{**small, "budget": st.integers(17, 60)})
def test_with_refresh_and_lookahead_a_step_attends_to_what_was_chosen_then_and_to_what_came_since(
        seed, heads, B, words, T, budget, sink, recent, rank, refresh, lookahead):
    feed = Feed(seed, B, *heads, words=words, budget=budget, sink=sink, recent=recent, rank=rank, refresh=refresh,
                lookahead=lookahead)
    places, queries, since = None, [[] for _ in range(B)], 0
    fetch = lambda base: {(b, h): chosen(feed, b, h, base, queries, budget - refresh)
                          for b in range(B) for h in range(feed.H)}
    for n in (T, *[1] * 11, 4, *[1] * 5):
        out = feed.push(n)
        if n > 1:
            places, queries = None, [[] for _ in range(B)]
            assert_close(out, feed.causal())
            continue
        N = len(feed.plain.tokens[0])
        for b in range(B):
            ids = feed.plain.sentences(b)
            if N == 1 or ids[-1] != ids[-2]:
                queries[b] = []
            queries[b].append(feed.q[0, b, :, 0])
        if places is None or since == refresh:
            places, since = fetch(N - 1), 0
        places, since = {at: p + [N - 1] for at, p in places.items()}, since + 1
        assert_close(out, feed.expect(lambda l, b, h, t: sorted(places[b, h])))
        assert all(len(p) <= budget and len(set(p)) == len(p) for p in places.values())
        if lookahead and since == refresh:
            places, since = fetch(N), 0


@quick
@given(**small)
def test_sink_recent_and_open_sentence_are_always_attended(seed, heads, B, words, T, budget, sink, recent, rank):
    feed = Feed(seed, B, *heads, words=words, budget=budget, sink=sink, recent=recent, rank=rank)
    feed.push(T)
    for _ in range(6):
        before = feed.push(1)
    for b in range(B):                # a value that only this token has must show in the output of every head
        ids, n = feed.plain.sentences(b), len(feed.plain.tokens[b])
        must = {*range(min(sink, n)), *range(max(n - recent, 0), n), *[i for i, x in enumerate(ids) if x == ids[-1]]}
        assert must <= set(feed.plain.near(b)) and int(feed.cache.plan.near[b]) + 1 == len(feed.plain.near(b))
    assert before.isfinite().all()


@pytest.mark.parametrize("rank", ["mean", "bounds"])
def test_nothing_kept_is_ever_unreachable(rank):
    """All keys of a sentence are one axis, and no two sentences share it: a query along it must return its values."""
    d, tokens = 80, torch.tensor([([1] * 5 + [2]) * 61][:1])
    feed = Feed(5, Hq=1, H=1, d=d, budget=24, sink=2, recent=4, max_sentence=8, rank=rank)
    ids = torch.tensor(plain_sentences(tokens[0].tolist(), 2, 8))
    axis = torch.eye(d, dtype=torch.float64)[ids % d].view(1, 1, 1, -1, d)           # the sink's -1 is the last axis
    feed.push(300, tokens[:, :300], k=axis[..., :300, :])
    for t in range(300, 360):                                        # ask for every sentence in turn
        asked = t - 300
        if t > 300 and rank == "mean":                               # the mean query is of the whole open sentence
            feed.cache.layers[0].query_sum.zero_()
        out = feed.push(1, tokens[:, t:t + 1], k=axis[..., t:t + 1, :],
                        q=1000 * torch.eye(d, dtype=torch.float64)[asked].view(1, 1, 1, 1, d))
        members = [i for i in range(t + 1) if ids[i] == asked]
        assert members and set(ids[members].tolist()) == {asked}
        assert_close(out[0, 0, 0, 0], feed.v[0, 0, 0, members].mean(0), torch.float32)


# ------------------------------------------------------------------------------------- 4. sentences, vectors, pool


@quick
@given(refresh=st.integers(1, 5), lookahead=st.booleans(), **{**small, "budget": st.integers(17, 60)})
def test_vectors_are_the_means_or_bounds_of_exactly_the_sentences_keys(seed, heads, B, words, T, budget, sink, recent,
                                                                       rank, refresh, lookahead):
    feed = Feed(seed, B, *heads, layers=2, words=words, budget=budget, sink=sink, recent=recent, rank=rank,
                refresh=refresh, lookahead=lookahead)
    for length in (T, 1, 1, 1, 5, *[1] * 20):
        feed.push(length)
    for b in range(B):
        ids = feed.plain.sentences(b)
        near = feed.plain.near(b)
        for s in {x for i, x in enumerate(ids) if i not in near}:
            members = [i for i, x in enumerate(ids) if x == s]
            assert feed.cache.first[b, s:s + 2].tolist() == [members[0], members[-1] + 1]
            for l in range(2):
                keys = feed.k[l, b, :, members]                       # (H, n, d)
                want = keys.mean(1) if rank == "mean" else torch.cat((keys.amax(1), -keys.amin(1)), -1)
                assert_close(feed.cache.layers[l].vectors[b, :, s], want, torch.float32)


@quick
@given(keep=st.sampled_from([None, 1.5]), share=st.floats(0, 1), **{**small, "budget": st.integers(17, 60)})
def test_after_going_back_the_vectors_are_those_of_a_cache_that_never_read_more(seed, heads, B, words, T, budget, sink,
                                                                               recent, rank, keep, share):
    """Also of the sentence that was cut, and that goes on with other words."""
    setting = dict(layers=2, words=words, budget=budget, sink=sink, recent=recent, rank=rank, keep=keep, window=2)
    ours, other = Feed(seed, B, *heads, **setting), Feed(seed, B, *heads, **setting)
    for feed in (ours, other):
        feed.push(T + 30)
    ours.push(12)
    for _ in range(8):
        ours.push(1)
    n = T + 30 + int(share * 20)
    ours.cache.truncate(n)
    tokens = ours.plain.tokens = [row[:n] for row in ours.plain.tokens]
    ours.k, ours.v = ours.k[..., :n, :], ours.v[..., :n, :]
    if n > T + 31:                                                    # the other one reads just what is left
        other.push(n - T - 30, torch.tensor(tokens)[:, T + 30:], k=ours.k[..., T + 30:, :], v=ours.v[..., T + 30:, :])
    elif n == T + 31:
        return
    for step in range(25):
        out = ours.push(1)
        same = other.push(1, torch.tensor(ours.plain.tokens)[:, -1:], ours.q, ours.k[..., -1:, :], ours.v[..., -1:, :])
        assert_close(out, same)
    assert torch.equal(ours.cache.current, other.cache.current)
    for b, S in enumerate((ours.cache.current + 1).tolist()):         # of what comes after them nothing is asked
        assert torch.equal(ours.cache.first[b, :S], other.cache.first[b, :S])
        for mine, theirs in zip(ours.cache.layers, other.cache.layers):
            assert_close(mine.vectors[b, :, :S], theirs.vectors[b, :, :S], torch.float32)
            assert_close(mine.open[b], theirs.open[b], torch.float32)


@quick
@given(**small)
def test_every_token_is_in_exactly_one_sentence_or_the_sink_and_the_pool_holds_its_bits(seed, heads, B, words, T,
                                                                                        budget, sink, recent, rank):
    feed = Feed(seed, B, *heads, layers=2, words=words, budget=budget, sink=sink, recent=recent, rank=rank,
                dtype=torch.bfloat16)
    for length in (T, 1, 1, 1, 7, 1):
        feed.push(length)
    n = feed.k.shape[3]
    for b in range(B):
        first = feed.cache.first[b].tolist()
        assert first[0] == min(sink, n) and first[-1] == n and first == sorted(first)
        ids = [sum(f <= i for f in first) - 1 for i in range(n)]
        assert ids == feed.plain.sentences(b)
    for l in range(2):
        pool = feed.cache.pool.kv[l][:n].permute(3, 1, 2, 0, 4)       # (2, B, H, n, d)
        assert torch.equal(pool[0], feed.k[l]) and torch.equal(pool[1], feed.v[l])


# --------------------------------------------------------------------------------------------------- 5. keep = r


def plain_importance(q, k, pool):
    """Attention of the last N queries to each token, summed: q (Hq, N, d), k (H, T, d) -> list of T floats."""
    Hq, N, d = q.shape
    H, T, _ = k.shape
    alpha = [0.0] * T
    for h in range(Hq):
        for n in range(N):
            seen = T - N + n + 1
            logits = [float(q[h, n].double() @ k[h * H // Hq, i].double()) / math.sqrt(d) for i in range(seen)]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            for i in range(seen):
                alpha[i] += weights[i] / sum(weights)
    return [max(alpha[max(0, i - pool // 2):i + pool // 2 + 1]) for i in range(T)]


@settings(quick, max_examples=12)
@given(st.integers(0, 2**31), heads, st.integers(1, 2), st.sampled_from([1, 1.5, 2]), st.sampled_from([1, 7]),
       st.integers(60, 110), st.sampled_from(["mean", "bounds"]))
def test_keep_r_keeps_exactly_the_most_attended_tokens(seed, heads, B, r, pool, T, rank):
    budget, sink, recent = 30, 3, 5
    feed = Feed(seed, B, *heads, layers=2, budget=budget, sink=sink, recent=recent, keep=r, window=6, pool=pool,
                rank=rank, max_sentence=10)
    assert_close(feed.push(T), feed.causal())                         # the prompt itself is read with everything
    count = int(r * budget)
    kept = [[None] * B for _ in range(2)]
    for l in range(2):
        for b in range(B):
            alpha = plain_importance(feed.q[l, b, :, -6:], feed.k[l, b], pool)
            for i in feed.plain.near(b):
                alpha[i] = math.inf
            kept[l][b] = sorted(sorted(range(T), key=lambda i: -alpha[i])[:count])
            for h in range(feed.H):
                bits = feed.cache.pool.kv[l][:count, b, h, 0]
                where = [(feed.k[l, b, h] == row).all(-1).nonzero()[0, 0].item() for row in bits]
                assert where == sorted(where) and len(set(where)) == count       # (sums in another order: no exact ties)
                assert sorted(alpha[i] for i in where) == pytest.approx(sorted(alpha[i] for i in kept[l][b]))
            kept[l][b] = where
            for s in set(feed.plain.sentences(b)) - {-1}:             # vectors: of the kept keys alone
                members = [i for i in where if feed.plain.sentences(b)[i] == s]
                keys = feed.k[l, b, :, members]
                if members:
                    want = keys.mean(1) if rank == "mean" else torch.cat((keys.amax(1), -keys.amin(1)), -1)
                    assert_close(feed.cache.layers[l].vectors[b, :, s], want, torch.float32)
    for length in [1] * 20 + [6] + [1] * 6:                           # what comes later is all kept
        n = feed.k.shape[3]
        for l in range(2):
            for b in range(B):
                kept[l][b] = kept[l][b] + list(range(n, n + length))
        out = feed.push(length)
        if length == 1:
            far = feed.reported(kept)
            assert_close(out, feed.expect(lambda l, b, h, t: sorted(far[l, b, h] + feed.plain.near(b))))
            assert all(len(far[l, b, h]) + len(feed.plain.near(b)) == budget for l, b, h in far)
        else:
            assert_close(out, feed.expect(lambda l, b, h, t: [i for i in kept[l][b] if i <= n + t]))


def test_a_prompt_that_keep_covers_loses_nothing():
    feed = Feed(1, budget=40, keep=2, window=4, recent=5)
    feed.push(80)
    assert int(feed.cache.dropped) == 0 and len(feed.cache.layers) == 1 and feed.cache.layers[0].start is None


# ------------------------------------------------------------------------------------------- 6. pieces and batches


@quick
@given(st.integers(0, 2**31), heads, st.lists(st.integers(2, 40), min_size=2, max_size=5), layouts)
def test_a_prompt_in_pieces_equals_the_prompt_at_once(seed, heads, pieces, words):
    a, b = (Feed(seed, 2, *heads, words=words, budget=48, recent=5) for _ in range(2))
    T = sum(pieces)
    tokens, q, k, v = a.random(2, T).abs().mul(2).long().clamp(max=5), *(a.random(1, 2, h, T, 8) for h in
                                                                         (heads[0], heads[1], heads[1]))
    whole = a.push(T, tokens, q, k, v)
    parts, at = [], 0
    for n in pieces:
        parts.append(b.push(n, tokens[:, at:at + n], *(x[..., at:at + n, :] for x in (q, k, v))))
        at += n
    assert_close(torch.cat(parts, 3), whole)
    one = (a.random(2, 1).abs().long().clamp(max=5), *(a.random(1, 2, h, 1, 8) for h in (heads[0], heads[1], heads[1])))
    assert_close(a.push(1, *one), b.push(1, *one))
    assert torch.equal(fetched_tokens(a.cache), fetched_tokens(b.cache))


@quick
@given(st.integers(0, 2**31), heads, st.integers(2, 70), st.sampled_from([None, 1.5]))
def test_a_row_of_a_batch_equals_the_same_prompt_alone(seed, heads, T, keep):
    setting = dict(budget=32, recent=5, keep=keep, window=2)
    batch, alone = Feed(seed, 3, *heads, **setting), Feed(seed, 1, *heads, **setting)
    for length in (T, 1, 1, 1, 4, 1, 1):
        out = batch.push(length)
        row = alone.push(length, torch.tensor(batch.plain.tokens[1])[None, -length:], batch.q[:, 1:2],
                         batch.k[:, 1:2, :, -length:], batch.v[:, 1:2, :, -length:])
        assert_close(out[:, 1:2], row)


# ----------------------------------------------------------------------------------------------------- 7. memory


def vector_bytes(cache):
    return sum(s.vectors.nbytes for s in cache.layers) + cache.first.nbytes + cache.text.nbytes


def resident():
    """Bytes of memory that this process has, or 0 where the system does not tell."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0


def test_device_bytes_grow_by_the_vectors_of_sentences_alone_and_the_process_by_the_pool_alone():
    n = 1200 + 400 * MORE
    feed = Feed(0, layers=2, H=2, d=32, budget=64, recent=8, words=[8.0, 8, 1, 0.2, 0.2, 0.2], dtype=torch.float32)
    feed.push(200)
    feed.push(1)
    start, vectors, process = feed.cache.memory(), vector_bytes(feed.cache), resident()
    generated = torch.multinomial(feed.weights, n, True, generator=feed.rng)
    for token in generated:
        feed.plain.tokens[0].append(int(token))
        feed.cache.begin(token.view(1, 1))
        for l in range(2):
            feed.cache.attend(l, *(feed.random(1, h, 1, 32) for h in (4, 2, 2)))
    end, grown = feed.cache.memory(), resident() - process
    assert end["device"] - start["device"] == vector_bytes(feed.cache) - vectors
    sentences, room = int(feed.cache.current) + 1, feed.cache.first.shape[1] - 1
    assert sentences <= room <= (sentences + 65) * 17 // 16 + 65
    data = (n + 201) * 2 * 2 * 2 * 32 * 4                             # K and V in two layers and heads
    assert data <= end["host"] <= data * 1.3
    assert grown <= end["host"] - start["host"] + vector_bytes(feed.cache) + 24e6
    device, host = (end[name] - start[name] for name in ("device", "host"))
    print(f"{n} tokens: device +{device}, host +{host}, process +{grown}")
    mine = torch.stack([feed.cache.pool.read(l, n + 201)[:, 0, :, 0].transpose(0, 1) for l in range(2)])
    assert torch.equal(mine[:, :, :201], feed.k[:, 0]) and bool((mine[:, :, 201:] != 0).all())   # nothing was lost


@pytest.mark.parametrize("words", [[8.0, 8, 1, 0.2, 0.2, 0.2], [1.0, 1, 2, 2, 1, 1]])
def test_the_host_asks_the_device_for_a_number_once_in_64_tokens_at_most(words, monkeypatch):
    feed = Feed(3, layers=2, budget=64, recent=8, words=words)
    feed.push(100)
    asked = []
    for name in ("__int__", "__bool__", "__float__", "item", "tolist", "cpu", "numpy", "nonzero"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, n=name, f=plain: asked.append((step, n)) or f(self, *a))
    token = torch.multinomial(feed.weights, 600, True).view(600, 1, 1).unbind()
    q, k = feed.random(1, 4, 1, 8), feed.random(1, 2, 1, 8)
    monkeypatch.setattr(feed.cache, "_look", lambda: None)            # for NaN: on the CPU that costs nothing
    for step in range(600):
        feed.cache.begin(token[step])
        for l in range(2):
            feed.cache.attend(l, q, k, k)
    steps = sorted({s for s, _ in asked})
    assert 3 <= len(steps) <= 11 and all(b - a >= 64 for a, b in zip(steps, steps[1:])), asked


def test_device_bytes_for_longer_prompts_grow_by_the_vectors_of_sentences_alone():
    rest = set()
    for T in (300, 1200, 4800):
        feed = Feed(0, Hq=2, H=1, budget=64, recent=8, dtype=torch.float32)
        tokens = torch.tensor([[1] * 9 + [2]] * (T // 10)).view(1, T)
        feed.push(T, tokens)
        feed.push(1)
        rest.add(feed.cache.memory()["device"] - vector_bytes(feed.cache))
        assert feed.cache.first.shape[1] - 1 <= (T // 10 + 65) * 17 // 16 + 65
    assert len(rest) == 1


def test_memory_is_the_sum_of_all_tensors_that_the_cache_holds():
    """Found by walking the objects, not by the list that memory() itself keeps; step-sized scratch is left out."""
    feed = Feed(3, layers=3, budget=64, recent=8, keep=1, window=4)
    for length in (150, 1, 1, 5, 1):
        feed.push(length)
    found = {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, (list, tuple, dict)):
            for y in x.values() if isinstance(x, dict) else x:
                walk(y)
        elif hasattr(x, "__dict__"):
            walk(list(vars(x).values()))
    walk(feed.cache)
    device = [feed.cache.flags, feed.cache.first, feed.cache.text, feed.cache.layers[0].work]
    device += [t for mem in feed.cache.layers for t in (mem.vectors, mem.open, mem.query_sum, mem.start)]
    device += [mem.valid for mem in feed.cache.layers]
    host = [*feed.cache.pool.kv.values()]
    assert feed.cache.memory() == {"device": sum(t.nbytes for t in device), "host": sum(t.nbytes for t in host)}
    total = sum(feed.cache.memory().values())
    assert total <= sum(found.values()) <= total + 40_000             # masks and indices of the last step


# ----------------------------------------------------------------------------------------------- 8. segmentation


def sentences_of(tokens, cap=64):
    """Token strings -> the sentences that segment() makes of them."""
    flags = sentence_flags([t if t is None else t.encode() for t in tokens])[None]
    starts, _, _ = segment(flags, torch.tensor([0]), torch.tensor([0]), cap)
    cuts = [*starts[0].nonzero()[:, 0].tolist(), len(tokens)]
    return ["".join(t or "<special>" for t in tokens[a:b]) for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("tokens, sentences", [
    (["Hello", " there", ".", " Bye", "."], ["Hello there.", " Bye."]),
    (["He", " said", ' "', "Stop", '."', " Then", " he", " left", ".)", " Why", "?"],
     ['He said "Stop."', " Then he left.)", " Why?"]),
    (["end", ".", '"', ")", " Next"], ['end.")', " Next"]),                              # closing quotes as own tokens
    (["end", ".", ' "', "Next", '"'], ["end.", ' "Next"']),                              # an opening quote is no closer
    (["Pi", " is", " ", "3", ".", "14", " or", " 3", ".1", ".", " Ok"], ["Pi is 3.14 or 3.1.", " Ok"]),
    (["see", " example", ".com", ",", " a", ".", "b", ".", "c"], ["see example.com, a.b.c"]),
    (["end", ".", " ", "Next"], ["end. ", "Next"]),                                      # white space as its own token
    (["end", ".", "\n", "Next", ".\n", "More"], ["end.\n", "Next.\n", "More"]),          # merged with a line break
    (["Title", "\n\n", "Text", ".\n\n", "More"], ["Title\n\n", "Text.\n\n", "More"]),
    (["Title", "\r\n\r\n", "Text"], ["Title\r\n\r\n", "Text"]),
    (["你好", "。", "再见", "！」", "好"], ["你好。", "再见！」", "好"]),                    # CJK stops need no space
    (["هل", "؟", "نعم"], ["هل؟", "نعم"]),
    (["What", "?!", " No", "...", " Yes", "…", " So"], ["What?!", " No...", " Yes…", " So"]),
    (["hi", None, "you"], ["hi<special>", "you"]),                                       # a special token ends a turn
    ([" ", "\n", "Hi", " you"], [" \nHi you"]),                                          # leading white space is no end
    (["x", " =", " f", "(", "a", ")", "\n", "y", " =", " 2", "\n"], ["x = f(a)\ny = 2\n"]),
])
def test_sentences_are_cut_where_a_reader_would(tokens, sentences):
    assert sentences_of(tokens) == sentences


def test_text_without_punctuation_is_cut_at_the_length_cap():
    assert sentences_of(["a"] * 10 + ["."] + [" b"] * 5, cap=4) == ["aaaa", "aaaa", "aa.", " b b b b", " b"]


@quick
@given(st.lists(st.integers(0, 15), min_size=1, max_size=80), st.integers(1, 9), st.data())
def test_streaming_and_bulk_segmentation_agree_and_no_sentence_exceeds_the_cap(flags, cap, data):
    flags = torch.tensor([flags, flags[::-1]], dtype=torch.uint8)
    zero = torch.zeros(2, dtype=torch.long)
    bulk, *state = segment(flags, zero, zero, cap)
    at, ended, length, parts = 0, zero, zero, []
    while at < flags.shape[1]:
        n = data.draw(st.integers(1, 5))
        starts, ended, length = segment(flags[:, at:at + n], ended, length, cap)
        parts.append(starts)
        at += n
    assert torch.equal(torch.cat(parts, 1), bulk)
    assert torch.equal(ended, state[0]) and torch.equal(length, state[1])
    assert bulk[:, 0].all()
    for row in bulk:
        cuts = [*row.nonzero()[:, 0].tolist(), len(row)]
        assert max(b - a for a, b in zip(cuts, cuts[1:])) <= cap


def test_flags_come_from_the_tokenizers_own_bytes_even_broken_ones():
    assert sentence_flags([b"a.", b" a", b"\xe3\x80", b"", None]).tolist() == [SOFT, SPACE, 0, 0, HARD]


# ------------------------------------------------------------------------------------------ settings and calls


@pytest.mark.parametrize("wrong, message", [
    (dict(budget=48, sink=32, recent=16), r"budget 48 must exceed sink \+ recent = 48: raise"),
    (dict(budget=0), "budget must be a whole number of at least 1, got 0"),
    (dict(budget=64.0), "budget must be a whole number"),
    (dict(sink=-1), "sink must be a whole number of at least 0"),
    (dict(recent=0), "recent must be"),
    (dict(window=0), "window must be"),
    (dict(keep=0.5), "keep must be None .* or a number of at least 1, got 0.5"),
    (dict(keep=float("nan")), "keep must be"),
    (dict(keep=True), "keep must be"),
    (dict(pool=4), "pool must be odd, got 4"),
    (dict(rank="best"), "rank must be one of mean, bounds, spread, got 'best'"),
    (dict(refresh=0), "refresh must be a whole number of at least 1, got 0"),
    (dict(budget=48, sink=4, recent=32, refresh=13), r"budget 48 must exceed sink \+ recent \+ refresh - 1 = 48"),
    (dict(max_sentence=0), "max_sentence must be a whole number of at least 1, got 0"),
    (dict(budget=64, sink=4, recent=32, max_sentence=29), r"max_sentence 29 must fit into .* = 28$"),
])
def test_impossible_settings_say_what_to_change(wrong, message):
    with pytest.raises(ValueError, match=message):
        SentenceKV(TOY_FLAGS, **wrong)


def test_impossible_calls_say_what_to_change():
    with pytest.raises(ValueError, match="flags must be the .* uint8 tensor that sentence_flags"):
        SentenceKV([0, 1, 2])
    with pytest.raises(ValueError, match="window of 200 tokens is longer than the prompt of 150"):
        Feed(0, keep=2, budget=64, window=200).push(150)
    Feed(0, keep=2, budget=64, window=200).push(120)                  # nothing is dropped, so nothing is judged
    for tokens in (torch.ones(5, dtype=torch.long), torch.ones(1, 0, dtype=torch.long), torch.ones(1, 5)):
        with pytest.raises(ValueError, match=r"tokens must be int64 of shape \(batch, at least 1\), got torch"):
            Feed(0).cache.begin(tokens)
    for row in ([-1, -1, 1, 2, 1], [1, -1, 2, 1, -1]):
        with pytest.raises(ValueError, match="-1 is padding: it may only follow after the tokens of a row"):
            Feed(0).cache.begin(torch.tensor([[1] * 5, row]))
    with pytest.raises(ValueError, match="every piece of a prompt must have more than one token"):
        Feed(0).push(1, more=5)
    with pytest.raises(ValueError, match="more must be the number of tokens that follow, got -1"):
        Feed(0).push(5, more=-1)


@pytest.mark.parametrize("message, layer, q, k, dtype", [
    (r"q \(2, 4, 3, 8\) is not \(B, Hq, T, d\) for the tokens \(2, 4\)", 0, (2, 4, 3, 8), None, None),
    (r"q \(2, 3, 4, 8\) is not", 0, (2, 3, 4, 8), (2, 3, 1, 8), None),              # heads and tokens swapped
    (r"q \(1, 4, 3, 8\) is not", 0, (1, 4, 3, 8), (1, 2, 3, 8), None),
    ("every layer attends once, in order: 0 is next, got 3", 3, None, None, None), ("got -1", -1, None, None, None),
    (r"2 KV heads of 8, got k \(2, 1, 3, 8\)", 1, None, (2, 1, 3, 8), None),
    (r"2 KV heads of 8, got k \(2, 2, 3, 4\)", 1, (2, 4, 3, 4), (2, 2, 3, 4), None),
    (r"this cache holds torch.float32, .* of torch.float16", 0, None, None, torch.float16),
])
def test_a_layer_that_does_not_fit_is_refused(message, layer, q, k, dtype):
    cache = SentenceKV(TOY_FLAGS, budget=64)
    if k is None and q is not None:
        with pytest.raises(ValueError, match=r"for the tokens None of begin\(\)"):
            cache.attend(0, *(torch.zeros(2, h, 3, 8) for h in (4, 2, 2)))
    cache.begin(torch.ones(2, 3, dtype=torch.long))
    for l in range(2):
        cache.attend(l, *(torch.zeros(2, h, 3, 8) for h in (4, 2, 2)))
    cache.begin(torch.ones(2, 3 + (k is None and q is not None), dtype=torch.long))
    if layer == 1:
        cache.attend(0, *(torch.zeros(2, h, 3, 8) for h in (4, 2, 2)))
    q, k = torch.zeros(q or (2, 4, 3, 8), dtype=dtype), torch.zeros(k or (2, 2, 3, 8), dtype=dtype)
    with pytest.raises(ValueError, match=message):
        cache.attend(layer, q, k, k)


def test_every_layer_attends_once_in_every_forward():
    for T, after in ((5, 0), (5, 1), (1, 0), (1, 1)):
        feed = Feed(0, layers=2, budget=64)
        feed.push(20)
        kv = [feed.random(1, h, T, 8) for h in (4, 2, 2)]
        feed.cache.begin(torch.ones(1, T, dtype=torch.long))
        for layer in range(after):
            feed.cache.attend(layer, *kv)
        with pytest.raises(ValueError, match=f"in order: {after} is next, got {1 - after}"):
            feed.cache.attend(1 - after, *kv)                         # left out, or a second time
        with pytest.raises(ValueError, match=rf"begin\(\) came when {after} of 2 layers had attended"):
            feed.cache.begin(torch.ones(1, T, dtype=torch.long))
    fresh = SentenceKV(TOY_FLAGS, budget=64)
    fresh.begin(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"begin\(\) came when 0 of 0 layers"):
        fresh.begin(torch.ones(1, 5, dtype=torch.long))


def test_a_model_that_tracks_gradients_can_decode():
    cache, x = SentenceKV(TOY_FLAGS, budget=64), torch.ones(1, 1, 9, 4, requires_grad=True)
    cache.begin(torch.ones(1, 9, dtype=torch.long))
    cache.attend(0, x, x, x)
    cache.begin(torch.ones(1, 1, dtype=torch.long))
    assert not cache.attend(0, x[:, :, :1], x[:, :, :1], x[:, :, :1]).requires_grad
    feed = Feed(0, B=2, budget=64)
    with pytest.raises(ValueError, match="nothing was fetched yet"):
        feed.cache.fetched()
    feed.push(5)
    with pytest.raises(ValueError, match="this cache holds 2 rows, got tokens for 3: use a new cache"):
        feed.cache.begin(torch.zeros(3, 1, dtype=torch.long))


def test_a_smallest_possible_budget_fetches_one_token_at_a_time():
    feed = Feed(0, budget=10, sink=4, recent=5)
    feed.push(50)
    for _ in range(10):
        out, far = feed.push(1), feed.reported()
        assert_close(out, feed.expect(lambda l, b, h, t: sorted(far[l, b, h] + feed.plain.near(b))))


def test_the_papers_settings_are_one_preset():
    assert PAPER == dict(rank="mean", keep=2, budget=1024, sink=32, recent=32, window=32, pool=7)
    feed = Feed(0, Hq=2, H=1, **PAPER)
    feed.push(3000)
    feed.push(1)
    assert len(feed.cache.pool.kv[0]) < 2500 and feed.cache.dropped == 3000 - 2048


def test_sentencekv_imports_torch_and_the_standard_library_alone():
    source = (ROOT / "sentencekv.py").read_text()
    modules = re.findall(r"^(?:from|import) (\w+)", source, re.M)
    assert set(modules) == {"contextlib", "functools", "torch", "types", "warnings"}


# ---------------------------------------------------------------------------------------- 12. the ways to fetch


class Staged(sentencekv.HostPool):
    """The pool as it is where the device cannot read host memory in place (here: pretended)."""

    def __init__(self, device):
        super().__init__(device)
        self.in_place = False


@quick
@given(**small)
def test_staged_and_in_place_fetches_are_equal_to_the_bit(seed, heads, B, words, T, budget, sink, recent, rank):
    outs = []
    for pool in (sentencekv.HostPool, Staged):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sentencekv, "HostPool", pool)
            feed = Feed(seed, B, *heads, layers=2, words=words, budget=budget, sink=sink, recent=recent, rank=rank)
            outs.append([feed.push(length) for length in (T, 1, 1, 1, 4, 1)])
            assert feed.cache.pool.in_place == (pool is not Staged)
    assert all(map(torch.equal, *outs))


@pytest.mark.parametrize("pool", [sentencekv.HostPool, Staged])
def test_a_fetch_brings_what_is_in_the_slots(pool):
    kv, slot = torch.randn(20, 1, 3, 2, 4).bfloat16(), torch.randint(20, (1, 3, 5))          # as the check for GPUs does
    got = gpu_sections.fetched(gpu_sections.pool_with(kv, "cpu", pool is not Staged), slot, kv)
    assert torch.equal(got, kv[slot, 0, torch.arange(3)[:, None]])
    pool, kv = pool(torch.device("cpu")), torch.randn(20, 2, 3, 2, 4)
    pool.reserve(0, 20, kv)
    pool.write(0, torch.arange(20)[:, None].expand(20, 2), kv)
    for n in (3, 9, 5):
        out, slot = torch.empty(2, 3, n, 2, 4), torch.randint(20, (2, 3, n))
        pool.fetch(0, slot, out)
        for b, h, i in itertools.product(range(2), range(3), range(n)):
            assert torch.equal(out[b, h, i], kv[slot[b, h, i], b, h])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: streams, pinned memory and zero "
                                                                      "copy cannot be run here")


@needs_cuda
@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("setting", [dict(), dict(keep=2, window=8, pool=7, rank="mean")])
def test_cuda_fetches_the_same_sentences_and_bits_as_the_cpu(zero_copy, setting):
    feeds = [Feed(3, 2, 8, 2, d=16, layers=3, dtype=torch.float32, budget=64, recent=8, device=device, **setting)
             for device in ("cpu", "cuda")]
    for length in (400, 1, 1, 1, 30, *[1] * 40):
        outs = [feed.push(length) for feed in feeds]
        if length == 400 and not zero_copy:
            feeds[1].cache.pool.in_place = False
        assert_close(*outs, torch.float32)
        for l in range(3):
            n = living.used_slots(feeds[0].cache)
            torch.cuda.synchronize()
            a, b = (feed.cache.pool.kv[l][:n] for feed in feeds)
            assert torch.equal(a, b) and b.is_pinned()
    assert torch.equal(*(fetched_tokens(feed.cache) for feed in feeds))


@needs_cuda
def test_a_decode_step_with_zero_copy_never_waits_for_the_gpu():
    feed = Feed(3, 1, 8, 2, d=16, layers=2, dtype=torch.float16, budget=64, recent=8, device="cuda")
    feed.push(400)
    feed.push(1)
    assert feed.cache.pool.in_place, "zero copy does not work on this machine"
    token, q, k = torch.ones(1, 1, dtype=torch.long, device="cuda"), *(torch.randn(1, h, 1, 16, device="cuda").half()
                                                                       for h in (8, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        feed.cache.begin(token)
        for l in range(2):
            feed.cache.attend(l, q, k, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("setting", [dict(), dict(refresh=3), dict(lookahead=True), dict(refresh=2, lookahead=True)])
def test_cuda_options_compute_what_the_cpu_computes(setting):
    feeds = [Feed(3, 2, 8, 2, d=16, layers=3, dtype=torch.float32, budget=64, recent=8, device=device, **setting)
             for device in ("cpu", "cuda")]
    for length in (400, *[1] * 150, 30, *[1] * 40):
        assert_close(*(feed.push(length) for feed in feeds), torch.float32)


@needs_cuda
@pytest.mark.parametrize("setting", [dict(), dict(rank="mean"), dict(keep=2)])
def test_a_cuda_graph_gives_the_same_tokens(tiny, setting):
    model, tokenizer, flags = tiny
    model, flags = copy.deepcopy(model).cuda(), flags.cuda()
    prompt = torch.tensor([tokenizer.encode(story(2000, seed=3)[0], bos=True)]).cuda()
    texts, read = [], SentenceKV(flags, budget=128, **setting)
    model.prefill(prompt, read)                                       # once: on CUDA sums may differ in the last bit
    for graph in (False, True):
        cache = read.fork()
        texts.append([int(x) for x in model.generate(prompt[:, :1], cache, 300, cuda_graph=graph)])
        assert cache.length == prompt.shape[1] + 300 and cache.tokens()[0, -299:].tolist() == texts[-1][:-1]
        texts[-1] += [int(x) for x in model.generate(prompt[:, :50], cache, 20)]      # and goes on without
    assert texts[0] == texts[1]


def test_a_cuda_graph_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device"):
        next(toy_model().generate(torch.ones(1, 5, dtype=torch.long), SentenceKV(TOY_FLAGS, budget=64), cuda_graph=True))
    for cache in (DenseKV(), SentenceKV(TOY_FLAGS, budget=64, refresh=2), Lookahead(TOY_FLAGS, budget=64)):
        with pytest.raises(ValueError, match="a CUDA graph needs a SentenceKV with refresh=1"):
            GraphedStep(toy_model(), cache)


def test_a_graph_is_captured_once_and_replayed_until_the_host_has_to_ask(monkeypatch):
    """The bookkeeping of GraphedStep without a GPU: which steps run, which are captured, which only replayed."""
    model, cache, log = toy_model(), SentenceKV(TOY_FLAGS, budget=64), []

    class Graph:                                                      # what is captured runs here at once
        def replay(self):
            log.append("replay")
            if log[-3:-1] != ["capture", "run"]:                      # a graph changes tensors in place, nothing else
                before = [(x, vars(x).copy()) for x in (cache, *cache.layers)]
                compute(step.tokens, cache)
                for x, names in before:
                    vars(x).update(names)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(log.append("capture")))
    compute = model.compute
    monkeypatch.setattr(model, "compute", lambda *a, **k: log.append("run") or compute(*a, **k))
    model.prefill(torch.ones(1, 600, dtype=torch.long), cache)
    del log[:]
    step = GraphedStep(model, cache)
    for n in range(600, 820):
        step(torch.ones(1, 1, dtype=torch.long))
        assert cache.length == n + 1 == int(cache.lengths[0])
        told = [cache.plan, *(mem.valid for mem in cache.layers)]     # the graph's own, whoever did the step before
        assert n in (600, 640, 704, 768) or all(a is b for a, b in zip(told, [step.told[0]["plan"]] + [
            x["valid"] for x in step.told[1:]]))
    anew = ["run capture run replay"]                                 # a step as ever, then it is recorded
    assert " ".join(log) == " ".join(anew + ["replay"] * 38 +         # from 600 to 640, where the host looks: more vectors
                                     anew + ["replay"] * 62 +         # to 704: a larger pool
                                     anew + ["replay"] * 62 + ["run"] + ["replay"] * 51)            # 768: nothing moved
    del log[:]
    twin = cache.fork()                                               # from now on it writes to a pool of its own
    for _ in range(3):
        step(torch.ones(1, 1, dtype=torch.long))
    assert log == ["run", "capture", "run", "replay", "replay"] and int(twin.lengths) == 820


@needs_cuda
def test_a_cuda_graph_after_a_fork_and_without_zero_copy_gives_the_same_tokens(tiny):
    model, tokenizer, flags = tiny
    model, flags = copy.deepcopy(model).cuda(), flags.cuda()
    prompt = torch.tensor([tokenizer.encode(story(1000, seed=3)[0], bos=True)]).cuda()
    texts, read = [], SentenceKV(flags, budget=128)
    model.prefill(prompt, read)
    for graph, in_place in ((False, True), (True, True), (True, False)):
        cache = read.fork()
        cache.pool.base.in_place &= in_place                          # what all of them share
        texts.append([int(x) for x in model.generate(prompt[:, :1], cache.fork(), 200, cuda_graph=graph)])
        steps = model.generate(prompt[:, :1], cache, 60, cuda_graph=graph)
        texts[-1] += [int(next(steps)) for _ in range(20)]
        cache.fork()                                                  # between two steps
        texts[-1] += [int(x) for x in steps]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("how", ["prompt", "fork", "truncate", "load"])
def test_the_pool_has_room_for_64_tokens_after_whatever_came_before(tmp_path, how):
    """Else a step would have to wait for a larger one, or a replayed CUDA graph would write beyond it."""
    model, cache, path = saved(tmp_path, max_sentence=5)
    if how == "prompt":
        model.prefill(torch.ones(2, 7, dtype=torch.long), cache)
    elif how == "truncate":
        cache.truncate([40, 33])
    else:
        cache = cache.fork() if how == "fork" else SentenceKV.load(path, model)
    one = torch.ones(2, 1, dtype=torch.long)
    model(one, cache)
    places = lambda: [t.data_ptr() for t in (cache.text, *cache.pool.kv.values())]
    before, steps = places(), 0
    step = GraphedStep(model, cache)
    while step.steady():
        model(one, cache)
        steps += 1
        assert places() == before
    assert steps > 0 and cache.length % 64 == 0                       # then the host looks


def test_tokens_of_32_bits_are_taken_as_well():
    model, cache = toy_model(), SentenceKV(TOY_FLAGS, budget=64)
    ids = [*model.generate(torch.ones(1, 20, dtype=torch.int32), cache, 5)]
    assert cache.tokens().tolist()[0] == [1] * 20 + [int(x) for x in ids[:-1]]


def test_state_that_a_graph_reads_and_writes_stays_where_it_is():
    """A replay works on the tensors that were there when it was captured: between two prompts they must not move."""
    feed = Feed(0, 2, 4, 2, layers=2, budget=64, recent=8)
    feed.push(100)
    feed.push(1)
    c = feed.cache

    def state():
        layers = [x for mem in c.layers for x in (mem.vectors, mem.open, mem.query_sum, mem.work)]
        pools = [*c.pool.kv.values(), c.text]
        state = (c.lengths, c.current, c.ended, c.queries, c.broken, c.first)
        return [t.data_ptr() for t in (*state, *layers, *pools)]
    before = state()
    for _ in range(128 - 101):
        feed.push(1)
        assert state() == before
    feed.push(1)
    assert state() != before                                          # the host has asked, and made room


@needs_cuda
def test_nothing_is_overwritten_while_a_copy_is_in_flight():
    """The side stream is made slow on purpose; what a prompt wrote must arrive all the same, and be fetched right."""
    feeds = [Feed(9, 1, 4, 2, d=16, layers=2, dtype=torch.float32, budget=64, recent=8, device=device)
             for device in ("cpu", "cuda")]
    for length in (300, 1, 1, 50, 1, 1):
        if feeds[1].cache.pool is not None:
            with torch.cuda.stream(feeds[1].cache.pool.stream):
                torch.cuda._sleep(50_000_000)
        assert_close(*(feed.push(length) for feed in feeds), torch.float32)


# ------------------------------------------------------------------------------------ 13. a cache that lives on


class Masked(DenseKV):
    """Dense attention, at a decode step masked to masks[layer] (B, H, N): what a small budget should compute."""

    def attend(self, layer, q, k, v):
        dense = super().attend(layer, q, k, v)
        if q.shape[2] > 1 or self.masks is None:
            return dense
        mask, out = self.masks[layer], torch.empty_like(dense)
        for b, h in itertools.product(range(q.shape[0]), range(k.shape[1])):
            group = slice(h * q.shape[1] // k.shape[1], (h + 1) * q.shape[1] // k.shape[1])
            at = mask[b][h]
            out[b, group, 0] = plain_attention(q[b, group, 0], self.keys[layer][b, h, at], self.values[layer][b, h, at])
        return out


def toy_model(seed=0, **changes):
    """Two layers that read the toy vocabulary, in float64."""
    shape = dict(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=4, max_position_embeddings=4096)
    return random_llama("tiny", dtype=torch.float64, seed=seed, **{**shape, **changes})


def ragged(rows):
    """Lists of ids -> (B, T), shorter rows filled up with -1."""
    T = max(map(len, rows))
    return torch.tensor([row + [-1] * (T - len(row)) for row in rows])


def toy_text(rng, n):
    return rng.choices(range(6), [3, 6, 1, 0.5, 0.5, 0.5], k=n)


class Living(RuleBasedStateMachine):
    """A SentenceKV and its forks, each beside a dense cache that goes the same way; texts are lists of ids per row."""

    @initialize(seed=st.integers(0, 2**31), B=st.integers(1, 3), covers=st.booleans(),
                rank=st.sampled_from(["mean", "bounds"]), n=st.integers(1, 40), chunk=st.sampled_from([None, 2, 7]))
    def read(self, seed, B, covers, rank, n, chunk):
        self.rng, self.model, self.covers = random.Random(seed), toy_model(seed), covers
        self.setting = dict(budget=600 if covers else 24, sink=2, recent=5, rank=rank, max_sentence=9)
        if covers:                                                    # then no setting changes what is computed
            self.setting |= dict(refresh=self.rng.randint(1, 4))
        self.kind = Lookahead if covers and self.rng.random() < 0.5 else SentenceKV
        cache, dense, rows = self.kind(TOY_FLAGS, **self.setting), Masked(), [[] for _ in range(B)]
        self.branches, self.folder = [(cache, dense, rows)], tempfile.TemporaryDirectory()
        self.ask(0, n + 1, chunk)

    def compare(self, branch, tokens, chunk=None):
        """Read tokens with both; with a small budget the dense cache attends to what SentenceKV says it did."""
        cache, dense, rows = branch
        got = self.model.prefill(tokens, cache, chunk)
        for row, new in zip(rows, tokens.tolist()):
            row += [id for id in new if id >= 0]
        dense.masks = self.attended(cache, rows) if tokens.shape[1] == 1 and not self.covers else None
        assert_close(got, self.model.prefill(tokens, dense))
        assert cache.tokens().tolist() == ragged(rows).tolist() and cache.lengths.tolist() == dense.lengths

    def attended(self, cache, rows):
        fetched, masks = fetched_tokens(cache), []
        plain = Plain(len(rows), 4, 2, 4, 2, 5, 9)
        plain.tokens = rows
        for layer in fetched.tolist():
            masks.append([[plain.near(b) + [i for s, n in enumerate(head) if n
                                            for i in [j for j, x in enumerate(plain.sentences(b)) if x == s][:n]]
                           for head in row] for b, row in enumerate(layer)])
            for at, row in zip(masks[-1], rows):
                assert all(len(set(head)) == len(head) == min(24, len(row)) for head in at)
        return masks

    @rule(which=st.integers(0, 9), steps=st.integers(1, 12))
    def decode(self, which, steps):
        branch = self.branches[which % len(self.branches)]
        for _ in range(steps):
            self.compare(branch, torch.tensor([toy_text(self.rng, 1) for _ in branch[2]]))

    @rule(which=st.integers(0, 9), n=st.integers(2, 30), chunk=st.sampled_from([None, 5]))
    def ask(self, which, n, chunk):
        """A prompt, its rows of different lengths."""
        branch = self.branches[which % len(self.branches)]
        lengths = [self.rng.randint(1, n) for _ in branch[2]]
        lengths[self.rng.randrange(len(lengths))] = n
        self.compare(branch, ragged([toy_text(self.rng, k) for k in lengths]), chunk)

    @precondition(lambda self: len(self.branches) < 4)
    @rule(which=st.integers(0, 9))
    def fork(self, which):
        cache, dense, rows = self.branches[which % len(self.branches)]
        vars(dense).pop("model", None)                                # which deepcopy would copy as well
        self.branches.append((cache.fork(), copy.deepcopy(dense), copy.deepcopy(rows)))

    @rule(which=st.integers(0, 9), share=st.floats(0, 1))
    def truncate(self, which, share):
        cache, dense, rows = self.branches[which % len(self.branches)]
        lengths = [max(1, len(row) - int(share * self.rng.random() * len(row))) for row in rows]
        cache.truncate(lengths)
        dense.truncate(lengths)
        for row, n in zip(rows, lengths):
            del row[n:]

    @rule(which=st.integers(0, 9))
    def save_and_load(self, which):
        i = which % len(self.branches)
        path = Path(self.folder.name) / f"{i}.cache"
        self.branches[i][0].save(path)
        self.branches[i] = (self.kind.load(path, self.model), *self.branches[i][1:])

    def teardown(self):
        self.branches.clear()
        self.folder.cleanup()


Living.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=10, phases=(Phase.generate,),
                                    suppress_health_check=list(HealthCheck))
TestLiving = Living.TestCase


def alone(row, cache, b, kept_tokens=None):
    """Row b of a batch holds what a cache of its own holds: text, sentences, vectors, and what was fetched last."""
    n, S = row.length, int(row.current[0]) + 1
    assert row.tokens()[0].tolist() == cache.tokens()[b][:n].tolist() and int(cache.lengths[b]) == n
    assert torch.equal(row.first[0, :S], cache.first[b, :S]) and int(row.far[0]) == int(cache.far[b])
    for mine, theirs in zip(row.layers, cache.layers):
        assert_close(mine.vectors[0, :, :S], theirs.vectors[b, :, :S])
    if row.layers[0].fetched:
        a, c = fetched_tokens(row)[:, 0, :, :S], fetched_tokens(cache)[:, b, :, :S]
        assert torch.equal(a, c)


@quick
@given(st.integers(0, 2**31), st.sampled_from([None, 1.5]), st.sampled_from(["mean", "bounds"]),
       st.lists(st.integers(4, 70), min_size=2, max_size=4), st.sampled_from([None, 2, 9]))
def test_rows_of_different_length_each_equal_the_same_prompt_alone(seed, keep, rank, lengths, chunk):
    rng, model = random.Random(seed), toy_model(seed)
    for block in model.layers:                                        # attention with peaks: no two tokens alike
        block.self_attn.q_proj.weight *= 8
    setting = dict(budget=24, sink=2, recent=5, rank=rank, max_sentence=9, keep=keep, window=4)
    cache, rows = SentenceKV(TOY_FLAGS, **setting), [SentenceKV(TOY_FLAGS, **setting) for _ in lengths]
    for lengths, T in ((lengths, 0), *[(0, 1)] * 3, ([rng.randint(1, 9) for _ in rows], 0), *[(0, 1)] * 3):
        texts = [toy_text(rng, n) for n in (lengths or [1] * len(rows))]
        if max(map(len, texts)) == 1 and not T:                       # a prompt of one token each is a decode step
            continue
        out = model.prefill(ragged(texts), cache, chunk)
        for b, (row, text) in enumerate(zip(rows, texts)):
            # (a row of one token, in a longer batch, is a prompt: its own cache must not take it for a decode step)
            assert_close(out[b:b + 1], model.prefill(torch.tensor([text + [-1] * (len(text) == 1 and not T)]), row))
            alone(row, cache, b)


@quick
@given(st.integers(0, 2**31), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([None, 1, 2.5]),
       st.sampled_from([1, 3]), st.sampled_from(["mean", "bounds"]))
def test_a_prompt_in_chunks_equals_the_prompt_at_once_also_where_keep_prunes_it(seed, pieces, keep, pool, rank):
    setting = dict(budget=24, sink=2, recent=5, window=7, keep=keep, pool=pool, rank=rank)
    whole, parts = Feed(seed, 2, 4, 2, layers=2, **setting), Feed(seed, 2, 4, 2, layers=2, **setting)
    pieces, at, out = [max(n, 2) for n in pieces] + [8], 0, []
    whole.push(sum(pieces))
    for i, n in enumerate(pieces):
        piece = slice(at, at + n)
        out.append(parts.push(n, torch.tensor(whole.plain.tokens)[:, piece], whole.q[..., piece, :],
                              whole.k[..., piece, :], whole.v[..., piece, :], more=sum(pieces[i + 1:])))
        at += n
    assert_close(torch.cat(out, 3), whole.causal())
    assert parts.cache.dropped.tolist() == whole.cache.dropped.tolist()
    assert len(parts.cache.pool.kv[0]) <= (living.used_slots(parts.cache) + 64) * 1.2 + (0 if keep else 64)      # memory given back
    for mine, other in zip(parts.cache.layers, whole.cache.layers):
        assert torch.equal(mine.vectors, other.vectors) and mine.asked is None
        assert keep is None or mine.start is None or torch.equal(mine.start, other.start)
    for _ in range(3):
        step = whole.push(1)
        assert_close(parts.push(1, torch.tensor(whole.plain.tokens)[:, -1:], whole.q, whole.k[..., -1:, :],
                                whole.v[..., -1:, :]), step)
        assert torch.equal(fetched_tokens(parts.cache), fetched_tokens(whole.cache))


def test_pruning_gives_the_memory_of_the_pieces_back_before_it_takes_more(monkeypatch):
    feed, alive = Feed(0, budget=64, recent=8, keep=1, window=4), []
    feed.push(200, more=100)
    old = weakref.ref(feed.cache.pool.kv[0])
    allocate = sentencekv.HostPool.allocate
    monkeypatch.setattr(sentencekv.HostPool, "allocate", lambda *a: alive.append(old() is not None) or allocate(*a))
    feed.push(100)
    assert alive == [False] and len(feed.cache.pool.kv[0]) < 200


def test_the_vectors_of_a_prompt_in_pieces_are_made_once():
    feed, made = Feed(0, layers=2, budget=64), []
    feed.cache.rule, rule = copy.copy(feed.cache.rule), feed.cache.rule
    feed.cache.rule.brings = lambda k: made.append(len(k)) or rule.brings(k)
    for n, more in ((30, 25), (20, 5), (5, 0)):
        feed.push(n, more=more)
    assert made == [55] * 4                                           # once a layer and head, of all keys


def test_a_prompt_that_goes_on_cannot_be_forked_cut_saved_or_pruned_by_one_token():
    feed = Feed(0, budget=24, sink=2, recent=5, window=4, keep=1, max_sentence=9)
    feed.push(60, more=2)
    for name, call in (("fork", feed.cache.fork), ("truncate", lambda: feed.cache.truncate(30)),
                       ("save", lambda: feed.cache.save("nowhere"))):
        with pytest.raises(ValueError, match=rf"{name}\(\) needs a cache that has read a whole prompt"):
            call()
    with pytest.raises(ValueError, match="every piece of a prompt must have more than one token"):
        feed.cache.begin(torch.ones(1, 1, dtype=torch.long))
    feed.push(2)
    assert int(feed.cache.dropped) == 62 - 24


@quick
@given(st.integers(0, 2**31), st.integers(2, 90), st.floats(0, 1), st.sampled_from(["mean", "bounds"]),
       st.sampled_from([None, 1.5]))
def test_after_truncate_a_cache_is_what_it_would_be_had_the_rest_been_one_prompt(seed, T, share, rank, keep):
    setting = dict(layers=2, budget=24, sink=2, recent=5, window=2, rank=rank, keep=keep)
    feed, fresh = Feed(seed, 2, 4, 2, **setting), Feed(seed + 1, 2, 4, 2, **setting)
    for n in (T, *[1] * 30, 6):
        feed.push(n)
        T = T if keep else 1                                          # with keep=r, the prompt stays what it is
    n = T + int(share * (feed.k.shape[3] - T))
    feed.cache.truncate([n, n])
    tokens, k, v = torch.tensor(feed.plain.tokens)[:, :n], feed.k[..., :n, :], feed.v[..., :n, :]
    if not keep:
        fresh.push(n, F.pad(tokens, (0, n == 1), value=-1), *(F.pad(x, (0, 0, 0, n == 1)) for x in (feed.q[..., :1, :]
                   .expand(-1, -1, -1, n, -1), k, v)))
        one = [feed.random(2, 2, h, 1, 8) for h in (4, 2, 2)]
        token = torch.multinomial(feed.weights, 2, True, generator=feed.rng).view(2, 1)
        outs = [f.push(1, token, *one) for f in (feed, fresh)]
        assert_close(*outs)
        S = min(f.cache.first.shape[1] for f in (feed, fresh)) - 1    # room for sentences differs, not the sentences
        assert torch.equal(feed.cache.first[:, :S], fresh.cache.first[:, :S])
        assert torch.equal(*(fetched_tokens(f.cache) for f in (feed, fresh)))
    else:
        assert feed.cache.length == n and feed.cache.tokens().tolist() == tokens.tolist()
        with pytest.raises(ValueError, match="what keep=r has pruned is gone"):
            feed.cache.truncate(int(feed.cache.prompt[0]) - 1 if feed.cache.prompt is not None else 0)


def test_after_truncate_the_room_is_filled_however_many_short_sentences_come():
    feed = Feed(0, Hq=2, H=1, d=4, budget=300, sink=2, recent=5)
    feed.push(4000)
    feed.cache.truncate(600)
    feed.plain.tokens[0] = feed.plain.tokens[0][:600]
    feed.k, feed.v = feed.k[..., :600, :], feed.v[..., :600, :]
    for _ in range(280):                                              # each a sentence of its own, and asked for
        k = torch.tensor([9.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 1, 4)
        feed.push(1, torch.tensor([[3]]), q=k.expand(1, 1, 2, 1, 4), k=k)
        assert int(feed.cache.fetched()[1].sum()) + len(feed.plain.near(0)) == 300


def test_truncate_says_what_it_can_do():
    feed = Feed(0, 2, budget=64)
    feed.push(20)
    for wrong in (0, 21, [5], [5, 21], [5, 5.0], -3):
        with pytest.raises(ValueError, match=r"truncate\(\) takes lengths from \[1, 1\] .* to \[20, 20\], got"):
            feed.cache.truncate(wrong)
        with pytest.raises(ValueError, match=r"truncate\(\) takes lengths from 1 to \[20, 20\], got"):
            dense = DenseKV()
            dense.begin(torch.zeros(2, 20))
            dense.truncate(wrong)
    assert feed.cache.length == 20


@pytest.mark.parametrize("written", [0, 1, 5])
def test_a_fork_cut_back_into_what_it_shares_leaves_the_other_alone(written):
    """Also where one row is cut below the fork and the other is not, and whatever was written since."""
    rng, model = random.Random(3), toy_model(3)
    cache = SentenceKV(TOY_FLAGS, budget=600, sink=2, recent=5, max_sentence=9)
    rows = [toy_text(rng, 50), toy_text(rng, 31)]
    model.prefill(ragged(rows), cache)
    fork = cache.fork()
    branches = [(cache, copy.deepcopy(rows)), (fork, copy.deepcopy(rows))]
    for round, lengths in enumerate(([40, 31], [50, 20], [30, 20])):
        for one, rows in branches:
            for _ in range(written):
                new = toy_text(rng, 2)
                rows = [row + [id] for row, id in zip(rows, new)]
                model(torch.tensor(new)[:, None], one)
            one.truncate([min(n, len(row)) for n, row in zip(lengths, rows)])
            rows = [row[:n] for n, row in zip(lengths, rows)]
            more = [toy_text(rng, 30), toy_text(rng, 35)]
            rows = [row + new for row, new in zip(rows, more)]
            branches[one is fork] = (one, rows)
            assert_close(model.prefill(ragged(more), one), model.prefill(ragged(rows), DenseKV()))
        for one, rows in branches:
            assert one.tokens().tolist() == ragged(rows).tolist()
            step = torch.tensor([[1], [1]])
            dense = DenseKV()
            model.prefill(ragged(rows), dense)
            assert_close(model(step, one), model(step, dense))
            one.truncate([len(row) for row in rows])


@pytest.mark.parametrize("rank", ["mean", "bounds", "spread"])
def test_branches_choose_by_their_own_vectors_and_queries(rank):
    """Each goes on as a cache that was never forked, though they take turns, and their texts differ."""
    rng, model = random.Random(3), toy_model(3)
    setting = dict(budget=24, sink=2, recent=5, max_sentence=9, rank=rank)
    start, texts = toy_text(rng, 60), [toy_text(rng, 40), toy_text(rng, 40)]
    cache, alone_ = SentenceKV(TOY_FLAGS, **setting), [SentenceKV(TOY_FLAGS, **setting) for _ in texts]
    for one in (cache, *alone_):
        model.prefill(ragged([start]), one)
    for ids in zip(*texts):
        branches = [cache, cache.fork()] if cache.length == 60 else branches
        for id, branch, single in zip(ids, branches, alone_):
            step = torch.tensor([[id]])
            assert torch.equal(model(step, branch), model(step, single))
            alone(single, branch, 0)


def test_an_uneven_fork_makes_room_for_its_shortest_row():
    rng, model, cache = random.Random(3), toy_model(3), SentenceKV(TOY_FLAGS, budget=900, max_sentence=9)
    rows = [toy_text(rng, 400), toy_text(rng, 20)]
    model.prefill(ragged(rows), cache)
    fork, dense = cache.fork(), DenseKV()
    model.prefill(ragged(rows), dense)
    for _ in range(3):                                                # one row grows fast, the other hardly
        more = [toy_text(rng, 3), toy_text(rng, 300)]
        assert_close(model.prefill(ragged(more), fork), model.prefill(ragged(more), dense))


@pytest.mark.parametrize("kind, refresh", [(SentenceKV, 4), (Lookahead, 1), (Lookahead, 2)])
def test_a_fork_between_two_fetches_fetches_for_itself(kind, refresh):
    rng, model = random.Random(3), toy_model(3)
    cache, text = kind(TOY_FLAGS, budget=600, sink=2, recent=5, max_sentence=9, refresh=refresh), toy_text(rng, 50)
    model.prefill(ragged([text]), cache)
    for id in toy_text(rng, 2):
        model(torch.tensor([[id]]), cache)
        text.append(id)
    for one in (cache.fork(), cache):
        dense = DenseKV()
        model.prefill(ragged([text]), dense)
        for id in toy_text(rng, 6):
            assert_close(model(torch.tensor([[id]]), one), model(torch.tensor([[id]]), dense))


def test_a_hundred_forks_share_one_pool():
    model, rng = toy_model(), random.Random(0)
    cache = SentenceKV(TOY_FLAGS, budget=40, sink=2, recent=5, max_sentence=9)
    model.prefill(torch.tensor([toy_text(rng, 3000)]), cache)
    before, base = cache.memory()["host"], cache.pool
    forks = [cache.fork() for _ in range(100)]
    for fork in forks:
        model.prefill(torch.tensor([toy_text(rng, 5)]), fork)
        assert fork.pool.base is base                                 # no chain of branches, however many there are
        own = sum(t.nbytes for t in fork.pool.own.kv.values())
        assert own < before / 20 and fork.memory()["host"] == before + own
    assert cache.length == 3000 and all(fork.length == 3005 for fork in forks)


def test_rows_that_finish_at_different_times_are_what_they_would_be_alone():
    rng, model = random.Random(5), toy_model(5)
    prompts = [toy_text(rng, n) for n in (12, 30, 21, 5)]
    for new_cache in (DenseKV, lambda: SentenceKV(TOY_FLAGS, budget=24, sink=2, recent=5, max_sentence=9)):
        batch, rows = new_cache(), [new_cache() for _ in prompts]
        sampling = dict(max_new_tokens=12, stop_ids={2})
        got = torch.stack([*model.generate(ragged(prompts), batch, **sampling)], dim=1).tolist()
        ends = []
        for b, (row, prompt) in enumerate(zip(rows, prompts)):
            want = [int(x) for x in model.generate(torch.tensor([prompt]), row, **sampling)]
            assert got[b] == want + [2] * (len(got[b]) - len(want))
            assert int(batch.lengths[b]) == int(row.lengths[0]) == len(prompt) + len(want) - 1
            ends.append(want[-1:])
        assert len({len(row.tokens()[0]) if hasattr(row, "tokens") else row.length for row in rows}) > 1
        follow = [end + toy_text(rng, 3) for end in ends]
        out = model.prefill(ragged(follow), batch)
        for b, row in enumerate(rows):
            assert_close(out[b:b + 1], model.prefill(torch.tensor([follow[b]]), row))


def test_generation_that_is_not_listened_to_any_more_leaves_each_row_as_alone():
    rng, model, cache = random.Random(5), toy_model(5), DenseKV()
    prompts = [toy_text(rng, n) for n in (12, 30, 21, 5)]
    lengths = [len(p) for p in prompts]
    generator = model.generate(ragged(prompts), cache, 12, stop_ids={0, 1, 3})
    done = torch.zeros(4, dtype=torch.bool)
    for step in range(5):
        lengths = [n + (step > 0 and not d) for n, d in zip(lengths, done.tolist())]
        done |= torch.isin(next(generator), torch.tensor([0, 1, 3]))
    generator.close()
    assert cache.lengths == lengths and len(set(lengths)) == 4 and bool(done.any()) and not bool(done.all())


def saved(folder, **setting):
    """A model, a cache of two uneven rows with some generated tokens, and the file it is saved in."""
    model, rng = toy_model(3), random.Random(3)
    cache = SentenceKV(TOY_FLAGS, **dict(budget=24, sink=2, recent=5, max_sentence=9, rank="mean", window=4) | setting)
    model.prefill(ragged([toy_text(rng, 50), toy_text(rng, 31)]), cache)
    for _ in range(7):
        model(torch.tensor([[1], [1]]), cache)                        # the sentence goes on: its queries count
    path = Path(folder) / "some.cache"
    cache.save(path)
    return model, cache, path


@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("rank", ["mean", "bounds"])
def test_a_loaded_cache_goes_on_bit_for_bit_as_if_it_had_never_stopped(tmp_path, keep, rank):
    model, cache, path = saved(tmp_path, keep=keep, rank=rank)
    loaded, size = SentenceKV.load(path, model), path.stat().st_size
    assert loaded.settings == cache.settings and torch.equal(loaded.tokens(), cache.tokens())
    base = loaded.pool.base.kv[0]
    assert base.untyped_storage().nbytes() >= size                    # a piece of the mapped file, not a copy
    rng = random.Random(4)
    for T in (*[1] * 20, 6, *[1] * 5):
        tokens = torch.tensor([toy_text(rng, T), toy_text(rng, T)])
        assert torch.equal(model.prefill(tokens, loaded), model.prefill(tokens, cache))
        if T == 1:
            assert torch.equal(fetched_tokens(loaded), fetched_tokens(cache))
    loaded.save(path)                                                 # over the file that it was loaded from
    again = SentenceKV.load(path, model)
    assert torch.equal(model(torch.tensor([[1], [1]]), again), model(torch.tensor([[1], [1]]), cache))
    assert os.listdir(tmp_path) == ["some.cache"]


def test_a_cache_of_another_model_is_refused(tmp_path):
    model, cache, path = saved(tmp_path)
    other = toy_model(3)
    other.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    for other in (other, toy_model(3).float(), toy_model(3, num_hidden_layers=3)):
        with pytest.raises(ValueError, match="saved with another model, other weights or dtype"):
            SentenceKV.load(path, other)
    swapped = toy_model(3)
    weight = swapped.layers[0].mlp.up_proj.weight
    weight[[2, 5]] = weight[[5, 2]]
    with pytest.raises(ValueError, match="another model"):
        SentenceKV.load(path, swapped)


def sign(path, raw):
    """Write a file whose checksum is right, whatever else is not."""
    path.write_bytes(raw[:-32] + hashlib.sha256(raw[:-32]).digest())


def altered(raw, change):
    """The file with its header and {name: tensor} changed by change(metadata, tensors), laid out and signed anew."""
    n = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:8 + n]), raw[8 + n:]
    metadata, names = header.pop("__metadata__"), {v: k for k, v in living.DTYPES.items()}
    tensors = {name: torch.frombuffer(bytearray(data[slice(*e["data_offsets"])]), dtype=living.DTYPES[e["dtype"]])
               .view(e["shape"]) for name, e in header.items()}
    change(metadata, tensors)
    header, data = {"__metadata__": metadata}, b""
    for name, t in sorted(tensors.items(), key=lambda item: item[0] == "sha256"):
        piece = bytes(living.raw_bytes(t)) if t.numel() else b""
        place, data = [len(data), len(data) + len(piece)], data + piece
        header[name] = {"dtype": names[t.dtype], "shape": [*t.shape], "data_offsets": place}
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def setting(**changes):
    def change(metadata, tensors):
        metadata["settings"] = json.dumps({**json.loads(metadata["settings"]), **changes})
    return change


def tensor(name, change):
    def apply(metadata, tensors):
        t = change(tensors[name])
        tensors.pop(name) if t is None else tensors.update({name: t})
    return apply


LIES = {
    "format": lambda m, t: m.update(format="another"), "no settings": lambda m, t: m.pop("settings"),
    "settings no json": lambda m, t: m.update(settings="{"), "settings a list": lambda m, t: m.update(settings="[1]"),
    "unknown setting": setting(more=1), "budget": setting(budget=0), "huge budget": setting(budget=1 << 40),
    "budget is text": setting(budget="24"), "rank": setting(rank="best"), "keep": setting(keep=0.1),
    "other rank": setting(rank="bounds"), "pruned though all is kept": setting(keep=None),
    "less kept": setting(keep=1.2), "window": setting(window=99),
    "token too large": tensor("tokens", lambda t: t + 5), "token below -1": tensor("tokens", lambda t: t * 2 - 3),
    "padding first": tensor("tokens", lambda t: t.flip(1)), "one row less": tensor("tokens", lambda t: t[:1]),
    "tokens of no row": tensor("tokens", lambda t: t[:0]), "tokens flat": tensor("tokens", lambda t: t.flatten()),
    "shorter text": tensor("tokens", lambda t: t[:, :40]), "tokens missing": tensor("tokens", lambda t: None),
    "longest row padded": tensor("tokens", lambda t: torch.cat((t, t[:, :1] * 0 - 1), dim=1)),
    "tokens of another type": tensor("tokens", lambda t: t.double()),
    "flags missing": tensor("flags", lambda t: None), "flags empty": tensor("flags", lambda t: t[:0]),
    "flags of another type": tensor("flags", lambda t: t.long()),
    "queries negative": tensor("queries", lambda t: t - 100), "queries many": tensor("queries", lambda t: t + 100),
    "queries missing": tensor("queries", lambda t: None),
    "prompt longer than text": tensor("prompt", lambda t: t + 30),
    "prompt short": tensor("prompt", lambda t: t * 0 + 4),
    "prompt negative": tensor("prompt", lambda t: -t), "prompt missing": tensor("prompt", lambda t: None),
    "kv shorter": tensor("layer.1.kv", lambda t: t[:-1]),
    "kv longer": tensor("layer.1.kv", lambda t: torch.cat((t, t))),
    "kv missing": tensor("layer.0.kv", lambda t: None), "kv of another type": tensor("layer.0.kv", lambda t: t.float()),
    "vectors fewer": tensor("layer.0.vectors", lambda t: t[:, :, :-1]),
    "vectors wider": tensor("layer.0.vectors", lambda t: torch.cat((t, t), dim=-1)),
    "query_sum of another type": tensor("layer.0.query_sum", lambda t: t.double()),
    "start negative": tensor("layer.0.start", lambda t: t - 10),
    "start too large": tensor("layer.0.start", lambda t: t + 1000),
    "start falls": tensor("layer.0.start", lambda t: t.flip(1)),
    "start ends early": tensor("layer.0.start", lambda t: t.minimum(t.amax(1, keepdim=True) - 1)),
    "start wide": tensor("layer.0.start", lambda t: torch.cat((t, t[:, -1:].expand(-1, 99)), dim=1)),
    "start missing": tensor("layer.1.start", lambda t: None),
    "a tensor too many": lambda m, t: t.update({"layer.2.kv": t["layer.1.kv"]}),
    "no checksum": tensor("sha256", lambda t: None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_signed_cache_file_that_lies_is_refused(tmp_path, lie):
    model, _, path = saved(tmp_path, keep=1)
    raw = path.read_bytes()
    sign(path, altered(raw, lambda metadata, tensors: None))
    SentenceKV.load(path, model)                                      # laid out anew it is right
    sign(path, altered(raw, LIES[lie]))
    with pytest.raises(ValueError) as e:
        SentenceKV.load(path, model)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600


def mutate_cache(rng, raw):
    """Bits flipped, pieces cut, doubled or zeroed; half of the time with a checksum that is right."""
    raw = bytearray(raw)
    limit = len(raw) if rng.random() < 0.5 else 8 + int.from_bytes(raw[:8], "little")     # anywhere, or in the header
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(limit), rng.randint(1, 40)
        kind = rng.randrange(5)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:at + n]
        elif kind == 2:
            raw[at:at] = raw[at:at + n]
        elif kind == 3:
            raw[at:at + n] = bytes(n)
        else:
            raw[at:at + 1] = rng.choice([b"9", b"-", b"0", b'"', b"e9", b"[", b"}", b"null"])
        limit = max(1, min(limit, len(raw)))
    return bytes(raw)


def test_random_damage_to_a_cache_file_is_refused_or_harmless(tmp_path):
    model, cache, path = saved(tmp_path, keep=1)
    raw, rng, harmless, rounds = path.read_bytes(), random.Random(7), 0, 250 * MORE
    for i in range(rounds):
        damaged = mutate_cache(rng, raw)
        path.write_bytes(damaged)
        if i % 2 and len(damaged) > 32:
            sign(path, damaged)
        try:
            loaded = SentenceKV.load(path, model)
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            continue
        harmless += 1
        assert i % 2 or damaged == raw                                # without a right checksum nothing gets through
        try:
            logits = model(torch.tensor([[1], [1]]), loaded)          # and what does, works: keys are keys
            assert logits.shape == (2, 6)
        except ValueError as e:                                       # or are no numbers, if somebody signed that
            assert i % 2 and "NaN or inf in q, k or v" in str(e)
    assert 0 < harmless < rounds / 2


CRASH = """
import sys
sys.path.insert(0, {root!r})
import torch
from test_sentencekv import toy_model, saved
import tempfile
model, cache, _ = saved(tempfile.mkdtemp())
print("ready", flush=True)
while True:
    cache.save({path!r})
    model(torch.tensor([[1], [1]]), cache)
    print(cache.length, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    rng, path, seen = random.Random(time.time_ns()), tmp_path / "some.cache", set()
    model, cache, first = saved(tmp_path / "..")
    shutil.move(first, path)
    for _ in range(3 * MORE):
        process = subprocess.Popen([sys.executable, "-c", CRASH.format(root=str(ROOT), path=str(path))],
                                   stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
        seen.add(SentenceKV.load(path, model).length)
    assert seen <= set(range(57, 10_000)) and (len(seen) > 1 or MORE == 1)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("T", [1, 7])
def test_nan_or_inf_names_the_layer_and_the_token_it_came_with(where, bad, T):
    feed = Feed(0, 2, layers=3, budget=64, recent=8, dtype=torch.float16)
    feed.push(40)
    feed.push(1)
    inputs = {name: feed.random(3, 2, h, T, 8) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    inputs[where][1, 1, 0, T // 2, 3] = bad                           # layer 1, row 1
    with pytest.raises(ValueError, match=f"NaN or inf in q, k or v of layer 1 within the first {41 + T} tokens"):
        feed.push(T, torch.ones(2, T, dtype=torch.long), **inputs)
    with pytest.raises(ValueError, match="NaN or inf"):               # the cache stays refused,
        feed.cache.begin(torch.ones(2, 5, dtype=torch.long))
    feed.cache.truncate(41)                                           # until what is wrong is cut off
    feed.cache.begin(torch.ones(2, 1, dtype=torch.long))
    for l in range(3):
        out = feed.cache.attend(l, *(feed.random(2, h, 1, 8) for h in (4, 2, 2)))
        assert out.isfinite().all()


def test_numbers_as_large_as_float16_can_hold_are_no_fault():
    feed = Feed(0, budget=64, recent=8, dtype=torch.float16)
    feed.push(3, v=torch.full((1, 1, 2, 3, 8), 65504.0).half(), k=torch.full((1, 1, 2, 3, 8), 60.0).half())


def test_products_beyond_what_float16_can_hold_still_tell_the_better_sentence():
    """q . k is 80,000 for the first sentence and 96,000 for the second; float16 ends at 65,504."""
    tokens, d = torch.tensor([[1, 1, 1, 2] * 30]), 64
    k = torch.ones(1, 1, 1, 120, d)
    k[..., 4:8, :], k[..., 8:12, :] = 50, 60
    feed = Feed(0, 1, 1, 1, d=d, budget=24, sink=2, recent=6, max_sentence=4, rank="mean", dtype=torch.float16)
    feed.push(120, tokens, q=torch.ones(1, 1, 1, 120, d).half(), k=k.half())
    feed.push(1, q=torch.full((1, 1, 1, 1, d), 25.0).half())
    sentence, taken = (x.flatten().tolist() for x in feed.cache.fetched())
    assert sentence[:2] == [2, 1] and taken[:2] == [4, 4]            # the sink has cut two tokens off the first
    alpha = sentencekv.importance(torch.full((1, 1, 2, d), 60.0).half(), k[0].half(), torch.tensor([[118, 119]]))
    assert alpha.isfinite().all() and alpha[0, 8:12].sum() > 1.99


def test_memory_that_cannot_be_pinned_is_used_as_it_is_with_one_warning(monkeypatch):
    zeros, pool = torch.zeros, sentencekv.HostPool(torch.device("cpu"))
    pool.pinned = True
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k) if not pin_memory else
                        (_ for _ in ()).throw(RuntimeError("CUDA error: cannot pin")))
    with pytest.warns(UserWarning, match="host memory could not be pinned") as caught:
        for layer in range(3):
            pool.reserve(layer, 5, zeros(1, 1, 2, 2, 4))
    assert len(caught) == 1 and not pool.pinned and not pool.in_place
    kv, slot = torch.randn(5, 1, 2, 2, 4), torch.arange(5)[:, None]
    pool.write(0, slot, kv)
    out = torch.empty(1, 2, 5, 2, 4)
    pool.fetch(0, slot.T[:, None].expand(1, 2, 5), out)               # by way of a staging buffer
    assert torch.equal(out.permute(2, 0, 1, 3, 4), kv)


def test_too_little_host_memory_is_told_before_the_prompt_is_read(monkeypatch):
    model, tokens = toy_model(), torch.ones(2, 1000, dtype=torch.long)
    need = 2 * 1000 * 2 * 2 * 2 * 4 * 8                               # rows, tokens, layers, heads, K and V, d, bytes
    monkeypatch.setattr("model.available_memory", lambda: need - 1)
    for cache in (DenseKV(), SentenceKV(TOY_FLAGS, budget=64)):
        with pytest.raises(MemoryError, match=r"takes 0.0 GB of host memory, 0.0 are free: .*keep="):
            model.prefill(tokens, cache)
        assert cache.length == 0
    model.prefill(tokens, SentenceKV(TOY_FLAGS, budget=64, keep=2))
    monkeypatch.setattr("model.available_memory", lambda: need)
    model.prefill(tokens, SentenceKV(TOY_FLAGS, budget=64))


def test_available_memory_is_what_the_system_says():
    free = available_memory()
    if free is None:
        assert not os.path.exists("/proc/meminfo")
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert total / 1000 < free <= total


def test_running_out_of_memory_names_the_setting_to_change(monkeypatch):
    model, zeros = toy_model(), torch.zeros
    def out(*args, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Llama, "compute", out)
    with pytest.raises(MemoryError, match="reading 50 tokens at once: set a smaller chunk"):
        model.prefill(torch.ones(1, 80, dtype=torch.long), DenseKV(), chunk=50)
    def full(*args, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError, match=r"no host memory for 11 tokens of a layer: keep fewer \(keep=...\)"):
        sentencekv.HostPool(torch.device("cpu")).reserve(0, 10, torch.ones(1, 1, 2, 2, 4))


def test_a_context_beyond_what_the_model_was_made_for_is_warned_of():
    model = toy_model(max_position_embeddings=20)
    for cache in (DenseKV(), SentenceKV(TOY_FLAGS, budget=64)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.prefill(torch.ones(1, 20, dtype=torch.long), cache)
        with pytest.warns(UserWarning, match="longer than the 20 tokens that this model was made for"):
            model(torch.ones(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize("T, chunk, pieces", [(10, None, [10]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 2, [3]),
                                              (4, 9, [4]), (1, 4, [1]), (5, 5, [5])])
def test_prefill_cuts_a_prompt_so_that_no_piece_is_a_decode_step(T, chunk, pieces, monkeypatch):
    model, cache, seen, reports = toy_model(), DenseKV(), [], []
    begin = cache.begin
    monkeypatch.setattr(cache, "begin",
                        lambda tokens, more=0: seen.append((tokens.shape[1], more)) or begin(tokens))
    model.prefill(torch.ones(1, T, dtype=torch.long), cache, chunk, lambda *report: reports.append(report))
    assert seen == [(n, sum(pieces[i + 1:])) for i, n in enumerate(pieces)]
    assert reports == [(i + 1, 2 * len(pieces)) for i in range(2 * len(pieces))]


def test_prefill_refuses_chunks_that_make_no_sense():
    for chunk in (1, 0, 2.0):
        with pytest.raises(ValueError, match="chunk must be None or 2 at least"):
            toy_model().prefill(torch.ones(1, 9, dtype=torch.long), DenseKV(), chunk=chunk)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(getattr(self, "bytes", 0), t.nbytes)
        return out


def test_in_chunks_no_tensor_is_larger_than_a_layers_keys_and_values_or_its_chunk_needs(monkeypatch):
    model = toy_model(hidden_size=512, num_key_value_heads=1, num_attention_heads=2)
    monkeypatch.setattr(sentencekv, "causal_lower_right",             # (its own class does not go with being watched)
                        lambda t, n: torch.ones(t, n, dtype=torch.bool).tril(n - t))
    T, chunk, largest = 4000, 64, Largest()
    with largest:
        model.prefill(torch.ones(1, T, dtype=torch.long), SentenceKV(TOY_FLAGS, budget=64), chunk)
    assert largest.bytes <= max(T * 1.2 * 2 * 4 * 8, 2 * chunk * T * 8)   # one layer's pool; scores of a chunk
    assert largest.bytes < T * 512 * 8 / 3                            # nothing like the hidden states of the prompt


# ------------------------------------------------------------------------------ 9. the model and its loaders

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, rms_norm_eps=1e-3, rope_scaling=None, tie_word_embeddings=False)
TO_META = {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.q_proj": "attention.wq",
           "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
           "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
           "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def small_model(seed=0, **changes):
    """Two layers that fit on a page, and not one weight like another."""
    model = random_llama("tiny", seed=seed, **{**SMALL, **changes})
    for p in model.parameters():                # norms that are not 1, so that a lost or swapped one is seen
        if p.ndim == 1:
            p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def hf_tensors(model):
    return {n if n == "lm_head.weight" else "model." + n: p.detach() for n, p in model.named_parameters()}


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors_parts(tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": place}
        data += raw
    return header, data


def write_safetensors(path, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def config_json(c):
    rope = None if c.rope_scaling is None else {"rope_type": "llama3", **c.rope_scaling}
    return {**vars(c), "model_type": "llama", "rope_scaling": rope, "torch_dtype": "float32", "pretraining_tp": 1}


def write_hf(path, model, shards=1):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(model.config)))
    tensors = hf_tensors(model)
    if shards == 1:
        write_safetensors(path / "model.safetensors", *safetensors_parts(tensors))
        return path
    places = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for f in set(places.values()):
        write_safetensors(path / f, *safetensors_parts({n: t for n, t in tensors.items() if places[n] == f}))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def write_meta(path, model, **params):
    """The inverse of the documented permutation: of each head's rows the halves are interleaved."""
    c, content = model.config, {"rope.freqs": torch.zeros(4)}
    for name, p in model.named_parameters():
        t = p.detach().clone()
        if "q_proj" in name or "k_proj" in name:
            heads = t.view(-1, c.head_dim, t.shape[1])
            rows = [heads[:, i // 2 + i % 2 * (c.head_dim // 2)] for i in range(c.head_dim)]
            t = torch.stack(rows, 1).reshape(t.shape)
        for ours, theirs in TO_META.items():
            name = name.replace(ours, theirs)
        content[name] = t
    path.mkdir()
    torch.save(content, path / "consolidated.00.pth")
    (path / "params.json").write_text(json.dumps({
        "dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads, "vocab_size": -1, "multiple_of": 8, "ffn_dim_multiplier": 0.5,
        "norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "use_scaled_rope": c.rope_scaling is not None,
        **params}))
    return path


def tokens_of(model, B, T, seed=0):
    return torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, tokens):
    return model(tokens, DenseKV(), all_logits=True)


def assert_same(a, b, tolerance=0.0):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, f"max difference {(a - b).abs().max():.2e}"


# ------------------------------------------------------------------------------------------ what the model computes

def plain_forward(model, tokens):
    """The definition of Llama in float64, position by position, head by head. tokens (T,) -> logits (T, V)."""
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    norm = lambda x, g: x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps) * g
    d, G = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    frequency = plain_frequencies(c)

    def turn(x, t):                                                             # (d,) at position t
        out = x.clone()
        for i in range(d // 2):
            cos, sin, a, b = math.cos(t * frequency[i]), math.sin(t * frequency[i]), x[i], x[i + d // 2]
            out[i], out[i + d // 2] = a * cos - b * sin, a * sin + b * cos
        return out
    x = w["embed_tokens.weight"][tokens]
    for n in range(c.num_hidden_layers):
        at = lambda s: w[f"layers.{n}.{s}.weight"]
        h = norm(x, at("input_layernorm"))
        rows = lambda s: (h @ at(f"self_attn.{s}_proj").T).view(len(h), -1, d)
        q, k, v = rows("q"), rows("k"), rows("v")
        y = torch.zeros_like(q)
        for head in range(c.num_attention_heads):
            keys = torch.stack([turn(k[s, head // G], s) for s in range(len(h))])
            for t in range(len(h)):
                p = (keys[:t + 1] @ turn(q[t, head], t) / math.sqrt(d)).softmax(0)
                y[t, head] = p @ v[:t + 1, head // G]
        x = x + y.flatten(1) @ at("self_attn.o_proj").T
        h = norm(x, at("post_attention_layernorm"))
        gate = h @ at("mlp.gate_proj").T
        x = x + (gate / (1 + torch.exp(-gate)) * (h @ at("mlp.up_proj").T)) @ at("mlp.down_proj").T
    return norm(x, w["norm.weight"]) @ w["embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"].T


def plain_frequencies(c):
    """Llama 3.1's rule, as published: by wavelength, pair by pair."""
    out = []
    for i in range(c.head_dim // 2):
        f = c.rope_theta ** (-2 * i / c.head_dim)
        if c.rope_scaling:
            s, wavelength = c.rope_scaling, 2 * math.pi / f
            low = s["original_max_position_embeddings"] / s["low_freq_factor"]
            high = s["original_max_position_embeddings"] / s["high_freq_factor"]
            if wavelength > low:
                f = f / s["factor"]
            elif wavelength >= high:
                smooth = (s["original_max_position_embeddings"] / wavelength - s["low_freq_factor"]) / (
                    s["high_freq_factor"] - s["low_freq_factor"])
                f = (1 - smooth) * f / s["factor"] + smooth * f
        out.append(f)
    return out


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 6},
    {"rope_theta": 100.0, "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                           "original_max_position_embeddings": 8}}], ids=str)
def test_logits_equal_a_plain_float64_forward(changes):
    model = small_model(**changes).double()
    tokens = tokens_of(model, 2, 11)
    want = torch.stack([plain_forward(model, row) for row in tokens])
    assert_same(all_logits(model, tokens), want.float(), 2e-5)                  # the angles are float32
    assert_same(model(tokens, DenseKV()), want[:, -1].float(), 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rope_frequencies_equal_the_plain_formula(shape):
    c = Config(**SHAPES[shape])
    torch.testing.assert_close(rope_frequencies(c).double(), torch.tensor(plain_frequencies(c), dtype=torch.double),
                               rtol=1e-6, atol=0)


def test_llama3_scaling_leaves_blends_and_slows():
    c = Config(**SHAPES["llama-3.1-8b"])
    ratio = rope_frequencies(c) / rope_frequencies(Config(**{**SHAPES["llama-3.1-8b"], "rope_scaling": None}))
    assert (ratio[:20] == 1).all() and (ratio[-20:] == 1 / 8).all() and ((ratio > 0.13) & (ratio < 0.99)).any()


@pytest.mark.parametrize("shape, count", [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400),
                                          ("llama-3.2-3b", 3_212_749_824)])
def test_named_shapes_have_the_published_parameter_counts(shape, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(Config(**SHAPES[shape])).parameters()) == count
    assert SHAPES[shape]["rope_scaling"]["factor"] == (8.0 if shape == "llama-3.1-8b" else 32.0)


def test_random_weights_are_those_of_their_seed():
    first, same, other = (random_llama("tiny", seed=seed).embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_bfloat16_leaves_the_rotary_frequencies_in_float32():
    model = small_model()
    assert torch.equal(model.bfloat16().inv_freq, rope_frequencies(model.config))


def test_mlp_in_slices_equals_the_whole(monkeypatch):
    model = small_model()
    tokens = tokens_of(model, 2, 50)
    whole = all_logits(model, tokens)
    monkeypatch.setattr(type(model.layers[0]), "SLICE", 7)
    assert_same(all_logits(model, tokens), whole, 1e-5)


def test_forward_can_be_trained():
    model = small_model().double().requires_grad_(True)
    tokens = tokens_of(model, 1, 9)
    loss = lambda: all_logits(model, tokens).double().square().sum()
    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    w = model.layers[0].self_attn.k_proj.weight
    direction = torch.randn(w.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w += 1e-3 * direction
        up = loss()
        w -= 2e-3 * direction
        slope = (up - loss()) / 2e-3
    assert abs(slope - (w.grad * direction).sum()) < 1e-2 * max(1, abs(slope))


# ------------------------------------------------------------------------------------------------------- the cache

@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 99))
def test_dense_cache_in_pieces_equals_at_once(pieces, seed):
    model = small_model()
    tokens, cache = tokens_of(model, 2, sum(pieces), seed), DenseKV()
    got = torch.cat([model(t, cache, all_logits=True) for t in tokens.split(pieces, dim=1)], dim=1)
    assert_same(got, all_logits(model, tokens), 2e-5)
    assert cache.length == sum(pieces)


def test_dense_cache_grows_over_many_single_steps():
    model = small_model()
    tokens, cache = tokens_of(model, 1, 200), DenseKV()
    got = torch.stack([model(tokens[:, i:i + 1], cache) for i in range(200)], dim=1)
    assert_same(got, all_logits(model, tokens), 2e-5)
    assert 2 * 2 * 2 * 200 * 4 * 4 <= cache.memory()["device"] <= 2 * 2 * 2 * (200 + 64) * 4 * 4
    addresses = [k.data_ptr() for k in cache.keys]
    model(tokens[:, :1], cache)
    assert addresses == [k.data_ptr() for k in cache.keys]                      # a step copies nothing


def test_dense_cache_long_prompt_in_query_slices():
    model = small_model()
    tokens = tokens_of(model, 1, 1200)
    last = all_logits(model, tokens)[:, [511, 512, 1199]]
    want = torch.stack([model(tokens[:, :n], DenseKV()) for n in (512, 513, 1200)], dim=1)
    assert_same(last, want, 2e-5)


@pytest.mark.parametrize("tokens, message", [
    (torch.zeros(3, 4, dtype=torch.long), "2 rows, got tokens for 3"), (torch.zeros(2, 1), "float32"),
    (torch.zeros(2, 0, dtype=torch.long), "at least 1"), (torch.zeros(2, dtype=torch.long), "(2,)"),
    (torch.zeros(2, 2, dtype=torch.bool), "bool"), (torch.tensor([[0], [37]]), "37 is not in the vocabulary of 37"),
    (torch.tensor([[0, 1], [-2, 3]]), "-2 is not"),
    (torch.tensor([[0, 1], [-1, 3]]), "-1 is padding"), (torch.tensor([[0, -1, 1]] * 2), "-1 is padding")], ids=str)
def test_tokens_that_cannot_be_are_refused_and_leave_the_cache_alone(tokens, message):
    model, cache = small_model(), DenseKV()
    model(tokens_of(model, 2, 5), cache)
    with pytest.raises(ValueError) as e:
        model(tokens, cache)
    assert message in str(e.value) and cache.length == 5


# ---------------------------------------------------------------------------------------------------------- generate

def test_greedy_generation_is_the_argmax_of_the_logits():
    model = small_model()
    tokens = tokens_of(model, 2, 6)
    got = torch.stack(list(model.generate(tokens, DenseKV(), 9)), dim=1)
    for i in range(9):
        assert torch.equal(got[:, i], all_logits(model, torch.cat((tokens, got[:, :i]), 1))[:, -1].argmax(-1))


def test_sampling_with_a_seed_is_repeatable():
    model = small_model()
    tokens = tokens_of(model, 3, 5)
    run = lambda seed: torch.stack(list(model.generate(tokens, DenseKV(), 20, 1.5, 0.95, seed))).tolist()
    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("top_p, kept", [(1e-320, {0}), (0.1, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}),
                                         (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4000, 4)
    got = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    if top_p == 0.76:                                                           # a tie: either of the two last
        got = got.clamp(max=2)
    assert set(got.tolist()) == kept


def test_sampling_follows_the_probabilities_and_the_temperature():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None].expand(20000, 4)
    for temperature in (1.0, 2.0):
        counts = sample(logits, temperature, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
        assert_same(counts, (logits[0] / temperature).softmax(0), 0.02)
    assert (sample(logits * 1000, 1e-300, 1.0) == 0).all() and (sample(logits, 1e-5, 0.9) == 0).all()


def test_rows_stop_independently_and_generation_ends_with_the_last():
    model = small_model()
    tokens = tokens_of(model, 3, 7)
    free = torch.stack(list(model.generate(tokens, DenseKV(), 30, 1.0, seed=5)), dim=1)
    stops = {int(free[0, 3]), int(free[1, 8])}
    got = torch.stack(list(model.generate(tokens, DenseKV(), 30, 1.0, seed=5, stop_ids=stops)), dim=1)
    ends = []
    for row, plain in zip(got.tolist(), free.tolist()):
        end = next((i for i, t in enumerate(row) if t in stops), len(row) - 1)
        assert all(t == row[end] for t in row[end:])
        ends.append(end)
    assert len(set(ends)) > 1 and got.shape[1] == min(max(ends) + 1, 30)
    first = min(ends)
    assert torch.equal(got[:, :first + 1], free[:, :first + 1])
    assert [len(list(model.generate(tokens, DenseKV(), n))) for n in (0, 1)] == [0, 1]


@pytest.mark.parametrize("name, value", [
    ("max_new_tokens", -1), ("max_new_tokens", 1.5), ("temperature", -1), ("temperature", math.inf),
    ("temperature", math.nan), ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("seed", -1), ("seed", 0.5),
    ("seed", 1 << 64)])
def test_generate_refuses_arguments_that_make_no_sense(name, value):
    model = small_model()
    with pytest.raises(ValueError, match=name):
        list(model.generate(tokens_of(model, 1, 3), DenseKV(), **{name: value}))


# ------------------------------------------------------------------------------------------------------- the loaders

@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hugging_face_round_trip(tmp_path, shards, tied, dtype):
    model = small_model(tie_word_embeddings=tied, rope_scaling=LLAMA3_ROPE).to(dtype)
    calls = []
    got = Llama.from_pretrained(write_hf(tmp_path / "m", model, shards), progress=lambda *a: calls.append(a))
    assert vars(got.config) == vars(model.config) and calls == [(i, 21 - tied) for i in range(1, 22 - tied)]
    for (name, p), q in zip(model.named_parameters(), got.parameters(), strict=True):
        assert torch.equal(p, q) and q.dtype == dtype and not q.requires_grad, name
    assert Llama.from_pretrained(tmp_path / "m", dtype=torch.float64).norm.weight.dtype == torch.float64
    for file in (tmp_path / "m").glob("*.safetensors"):                         # the model does not live in the file
        with open(file, "r+b") as f:
            f.write(bytes(file.stat().st_size))
    assert torch.equal(all_logits(got, tokens_of(got, 1, 8)), all_logits(model, tokens_of(got, 1, 8)))


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
                                     {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}])
def test_meta_round_trip_converts_the_rotary_layout(tmp_path, changes):
    model = small_model(**changes)
    got = Llama.from_pretrained(write_meta(tmp_path / "m", model))
    for (name, p), q in zip(model.named_parameters(), got.named_parameters(), strict=True):
        assert name == q[0] and torch.equal(p, q[1]) and not q[1].requires_grad, name
    assert got.config.rope_scaling == model.config.rope_scaling
    assert torch.equal(all_logits(got, tokens_of(got, 2, 30)), all_logits(model, tokens_of(got, 2, 30)))


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_configurations_of_all_ages_mean_the_same(tmp_path, scaling):
    model = small_model(num_key_value_heads=4, rope_theta=500.0, rope_scaling=scaling)
    j = config_json(Llama.from_pretrained(write_hf(tmp_path / "m", model)).config)
    kind = "llama3" if scaling else "default"
    new = dict(j, rope_parameters={"rope_theta": 500.0, "rope_type": kind, **(scaling or {})})
    del new["rope_scaling"], new["rope_theta"]
    old = {n: v for n, v in j.items() if n not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
    old["rope_scaling"] = {"type": "llama3", **scaling} if scaling else None
    for variant in (new, old, dict(old, num_key_value_heads=None, head_dim=None)):
        (tmp_path / "m/config.json").write_text(json.dumps(variant))
        assert vars(Llama.from_pretrained(tmp_path / "m").config) == vars(model.config)
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):
        j.pop(name)
    (tmp_path / "m/config.json").write_text(json.dumps(j))
    c = Llama.from_pretrained(tmp_path / "m").config
    assert (c.rms_norm_eps, c.max_position_embeddings, c.rope_theta) == (1e-6, 2048, 10000)     # as Hugging Face's


@pytest.mark.parametrize("wrong", ["llama3", [], {**LLAMA3_ROPE, "more": 1.0}, {"factor": 8.0}], ids=str)
def test_a_config_with_another_rope_scaling_says_what_it_must_have(wrong):
    with pytest.raises(ValueError, match="rope_scaling must have factor, low_freq_factor"):
        Config(**{**SMALL, "rope_scaling": wrong})


@pytest.mark.parametrize("padding", range(8))
def test_safetensors_data_need_not_be_aligned(tmp_path, padding):
    model = small_model()
    path = write_hf(tmp_path / "m", model)
    header, data = safetensors_parts(hf_tensors(model))
    write_safetensors(path / "model.safetensors", json.dumps(header).encode() + b" " * padding, data)
    assert torch.equal(Llama.from_pretrained(path).lm_head.weight, model.lm_head.weight)


Q = "model.layers.1.self_attn.q_proj.weight"
FIRST = "model.embed_tokens.weight"
ENTRY = {"a key is missing": lambda e: e.pop("shape"), "not an object": None, "dtype unknown": {"dtype": "F8_E4M3"},
         "dtype null": {"dtype": None}, "dtype a list": {"dtype": ["F32"]}, "dtype lies": {"dtype": "F16"},
         "negative shape": {"shape": [-16, -16]}, "float shape": {"shape": [16.0, 16]}, "bool shape": {"shape": [True,
         256]},
         "huge shape": {"shape": [1 << 62, 1 << 62]}, "endless shape": {"shape": [10 ** 99] * 99999},
         "zero shape": {"shape": [0, 16]}, "text shape": {"shape": "16"}, "shape null": {"shape": None},
         "one offset": {"data_offsets": [0]}, "three offsets": {"data_offsets": [0, 1024, 2048]},
         "float offsets": {"data_offsets": [0.0, 1024.0]}, "text offsets": {"data_offsets": ["0", "1024"]},
         "negative offsets": {"data_offsets": [-1024, 0]}, "backward offsets": {"data_offsets": [1024, 0]},
         "huge offsets": {"data_offsets": [1 << 70, (1 << 70) + 1024]}, "overlap": {"data_offsets": [0, 1024]},
         "beyond the end": {"data_offsets": [1 << 20, (1 << 20) + 1024]}}


@pytest.mark.parametrize("change", ENTRY)
def test_a_lying_safetensors_entry_names_file_and_tensor(tmp_path, change):
    model = small_model()
    path = write_hf(tmp_path / "m", model)
    header, data = safetensors_parts(hf_tensors(model))
    how = ENTRY[change]
    if callable(how):
        how(header[Q])
    else:
        header[Q] = "nonsense" if how is None else {**header[Q], **how}
    write_safetensors(path / "model.safetensors", header, data)
    refuse(path, "model.safetensors: '", "overlap" if change == "overlap" else Q)


def refuse(path, *words, kinds=ValueError):
    with pytest.raises(kinds) as e:
        Llama.from_pretrained(path)
    assert type(e.value) in (ValueError, FileNotFoundError) and "\n" not in str(e.value) and len(str(e.value)) < 700
    for word in words:
        assert str(word) in str(e.value), str(e.value)


def whole_files():
    """name -> (bytes of model.safetensors, what the message must name)"""
    header, data = safetensors_parts(hf_tensors(small_model()))
    raw = json.dumps(header).encode()
    start = struct.pack("<Q", len(raw))
    twice = raw[:-1] + b', "model.norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    extra = json.dumps({**header, "model.extra\nname": {"dtype": "F32", "shape": [0], "data_offsets": [0,
            0]}}).encode()
    pack = lambda h, d=data: struct.pack("<Q", len(h)) + h + d
    return {"empty": (b"", "truncated"), "seven bytes": (b"1234567", "truncated"), "only a length": (start,
            "truncated"),
            "half a header": (start + raw[:50], "truncated"), "huge length": (b"\xff" * 8 + raw + data, "truncated"),
            "length 0": (bytes(8) + raw + data, "header of 0"), "short length": (pack(raw[:-9], raw[-9:] + data),
            "JSON"),
            "data cut": (pack(raw, data[:-1]), "cannot be bytes"), "data added": (pack(raw, data + b"x"),
            "end of file"),
            "not UTF-8": (pack(b'{"\xff": 1}'), "UnicodeDecodeError"), "a list": (pack(b"[1]"), "JSON object"),
            "deep": (pack(b'{"a":' * 50000), "RecursionError"), "a name twice": (pack(twice), "model.norm.weight"),
            "no tensors": (pack(b"{}", b""), "2 layers"), "an extra tensor": (pack(extra), "model.extra\\nname"),
            "big number": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "model.safetensors")}


@pytest.mark.parametrize("case", whole_files())
def test_a_damaged_safetensors_file_is_refused(tmp_path, case):
    path = write_hf(tmp_path / "m", small_model())
    content, word = whole_files()[case]
    (path / "model.safetensors").write_bytes(content)
    refuse(path, path, word)


@pytest.mark.parametrize("how, word", [("missing", "is missing"), ("unexpected", "unexpected"), ("shape", "(16, 16)"),
                                       ("transposed", "has shape")])
def test_every_tensor_is_accounted_for(tmp_path, how, word):
    model = small_model()
    path, tensors = write_hf(tmp_path / "m", model), hf_tensors(model)
    name = "model.layers.0.mlp.up_proj.weight" if how == "transposed" else Q
    if how == "missing":
        del tensors[name]
    elif how == "unexpected":
        tensors[name := "layers.1.self_attn.q_proj.weight"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(16, 15) if how == "shape" else tensors[name].T
    write_safetensors(path / "model.safetensors", *safetensors_parts(tensors))
    refuse(path, path, repr(name), word)


def test_tied_embeddings_with_another_head_are_refused_and_with_the_same_accepted(tmp_path):
    model = small_model(tie_word_embeddings=True)
    path, tensors = write_hf(tmp_path / "m", model), hf_tensors(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)    # old files have it
    tensors["lm_head.weight"] = tensors[FIRST].clone()
    write_safetensors(path / "model.safetensors", *safetensors_parts(tensors))
    assert torch.equal(Llama.from_pretrained(path).embed_tokens.weight, model.embed_tokens.weight)
    tensors["lm_head.weight"][3, 3] += 1
    write_safetensors(path / "model.safetensors", *safetensors_parts(tensors))
    refuse(path, "lm_head.weight", "differs")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    write_safetensors(path / "model.safetensors", *safetensors_parts(tensors))
    refuse(path, "lm_head.weight")


INDEX = {"outside": ({Q: "../model.safetensors"}, "../model.safetensors"), "absolute": ({Q: "/etc/passwd"},
         "/etc/passwd"),
         "backslash": ({Q: "..\\x.safetensors"}, "x.safetensors"), "not text": ({Q: 5}, "index.json"),
         "other kind": ({Q: "model.bin"}, "model.bin"), "empty name": ({Q: ""}, "index.json"),
         "nul": ({Q: "a\0.safetensors"}, "index.json"), "null": ({Q: None}, "index.json"),
         "no such shard": ({Q: "model-7.safetensors"}, Q),
         "wrong shard": ({Q: "model-00001-of-00003.safetensors", FIRST: "model-00002-of-00003.safetensors"}, FIRST)}


@pytest.mark.parametrize("case", INDEX)
def test_a_lying_index_is_refused(tmp_path, case):
    path = write_hf(tmp_path / "m", small_model(), shards=3)
    index = path / "model.safetensors.index.json"
    j = json.loads(index.read_text())
    j["weight_map"].update(INDEX[case][0])
    index.write_text(json.dumps(j))
    refuse(path, path, INDEX[case][1], kinds=(ValueError, FileNotFoundError))


def test_a_tensor_in_two_shards_is_refused_and_so_is_an_index_without_map(tmp_path):
    model = small_model()
    path = write_hf(tmp_path / "m", model, shards=2)
    second = path / "model-00002-of-00002.safetensors"
    places = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {n: t for n, t in hf_tensors(model).items() if places[n] == second.name}
    write_safetensors(second, *safetensors_parts({**tensors, FIRST: torch.zeros(37, 16)}))
    refuse(path, second, FIRST)
    write_safetensors(second, *safetensors_parts({n: t for n, t in tensors.items() if n != Q}))
    assert Q in tensors
    refuse(path, path, Q)
    for text in ("", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {}}'):
        (path / "model.safetensors.index.json").write_text(text)
        refuse(path, path)
    second.unlink()
    (path / "model.safetensors.index.json").unlink()
    refuse(path, path / "model.safetensors", kinds=FileNotFoundError)


CONFIG = [("vocab_size", "37"), ("vocab_size", None), ("vocab_size", 1 << 40), ("hidden_size", True), ("hidden_size",
          0),
          ("hidden_size", 16.0), ("hidden_size", 17), ("intermediate_size", []), ("num_hidden_layers", 1 << 24),
          ("num_hidden_layers", 1), ("num_hidden_layers", -2), ("num_attention_heads", 0), ("num_attention_heads", 3),
          ("num_attention_heads", 1 << 24), ("num_key_value_heads", 3), ("num_key_value_heads", 0),
          ("num_key_value_heads", 4),
          ("head_dim", 3), ("head_dim", 0), ("head_dim", 1 << 24), ("head_dim", 8), ("rms_norm_eps", 0),
          ("rms_norm_eps", math.nan), ("rms_norm_eps", None), ("rms_norm_eps", True), ("rope_theta", "1e4"),
          ("rope_theta", math.inf), ("rope_theta", -1), ("rope_theta", 1e-300), ("tie_word_embeddings", "false"),
          ("tie_word_embeddings", None), ("max_position_embeddings", -1), ("model_type", "mistral"), ("model_type",
          None),
          ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("quantization_config", {"bits": 4}),
          ("partial_rotary_factor", 0.5), ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_scaling",
          "llama3"),
          ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}), ("rope_scaling", {"rope_type": "llama3"}),
          ("rope_scaling", {"rope_type": "llama3", **LLAMA3_ROPE, "factor": None}),
          ("rope_scaling", {"rope_type": "llama3", **LLAMA3_ROPE, "low_freq_factor": 4.0}),
          ("rope_scaling", {"rope_type": ["llama3"]}), ("rope_parameters",
          {"full_attention": {"rope_type": "llama3"}}),
          ("rope_parameters", {"rope_type": "default", "rope_theta": 0}), ("rope_parameters", [1])]


@pytest.mark.parametrize("name, value", CONFIG)
def test_a_wrong_config_is_refused(tmp_path, name, value):
    path = write_hf(tmp_path / "m", small_model())
    j = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**j, name: value}))
    fits = name in ("num_hidden_layers", "hidden_size", "head_dim", "num_key_value_heads", "num_attention_heads") \
        and type(value) is int and value > 0
    refuse(path, path, *([] if fits else ["config.json", name.split("_")[0]]))
    if name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "model_type"):
        (path / "config.json").write_text(json.dumps({n: v for n, v in j.items() if n != name}))
        refuse(path, "config.json", name if name == "model_type" else f"missing field '{name}'")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": 1, "a": 2}', "\ufeff{}", "[" * 50000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    path = write_hf(tmp_path / "m", small_model())
    (path / "config.json").write_text(text)
    refuse(path, path / "config.json")


def test_directories_in_place_of_files_and_nothing_at_all_are_refused(tmp_path):
    refuse(tmp_path, tmp_path, "config.json", kinds=FileNotFoundError)
    refuse(tmp_path / "nowhere", tmp_path, kinds=FileNotFoundError)
    path = write_hf(tmp_path / "m", small_model())
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
        (path / name).mkdir()
        refuse(path, name, kinds=(ValueError, FileNotFoundError))
    meta = write_meta(tmp_path / "meta", small_model())
    (meta / "consolidated.00.pth").unlink()
    refuse(meta, "consolidated.00.pth", kinds=FileNotFoundError)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["LOADER_TEST_TRAP"],)


def test_code_in_a_pth_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOADER_TEST_TRAP", str(tmp_path / "trap"))
    path = write_meta(tmp_path / "m", small_model())
    torch.save({"tok_embeddings.weight": Code()}, path / "consolidated.00.pth")
    refuse(path, path / "consolidated.00.pth")
    assert not (tmp_path / "trap").exists()


WQ = "layers.1.attention.wq.weight"
META = {"value is no tensor": ({WQ: [1, 2]}, WQ), "name is no text": ({5: torch.zeros(1)}, "5"),
        "integers": ({WQ: torch.zeros(16, 16, dtype=torch.int32)}, WQ), "shape": ({WQ: torch.zeros(16, 15)}, WQ),
        "a vector": ({WQ: torch.zeros(16)}, WQ), "far larger than its memory": ({WQ: torch.zeros(1, 1).expand(16,
        16)}, WQ),
        "sparse": ({WQ: torch.zeros(16, 16).to_sparse()}, WQ), "on no device": ({WQ: torch.zeros(16, 16,
        device="meta")}, WQ),
        "no embedding": ({"tok_embeddings.weight": None}, "consolidated.00.pth"), "extra": ({"lora": torch.zeros(1)},
        "lora"),
        "our names": ({"layers.1.self_attn.q_proj.weight": torch.zeros(16, 16)}, "q_proj")}


@pytest.mark.parametrize("case", META)
def test_a_damaged_meta_checkpoint_is_refused(tmp_path, case):
    path = write_meta(tmp_path / "m", small_model())
    content = torch.load(path / "consolidated.00.pth", weights_only=True)
    torch.save({**content, **META[case][0]}, path / "consolidated.00.pth")
    refuse(path, path, META[case][1])


@pytest.mark.parametrize("name, value", [
    ("dim", "16"), ("dim", 1 << 30), ("n_layers", 3), ("n_heads", 0), ("n_kv_heads", 3), ("multiple_of", 0),
    ("vocab_size", 5),
    ("ffn_dim_multiplier", math.nan), ("ffn_dim_multiplier", "2"), ("norm_eps", None), ("rope_theta", -1),
    ("use_scaled_rope", "false"), ("moe_args", {}), ("quantization_args", {})])
def test_wrong_meta_parameters_are_refused(tmp_path, name, value):
    config = name in ("n_layers", "n_kv_heads", "norm_eps", "ffn_dim_multiplier") or value == 1 << 30  # named as there
    refuse(write_meta(tmp_path / "m", small_model(), **{name: value}), tmp_path / "m", "" if config else name)


def test_a_meta_checkpoint_without_output_matrix_or_in_parts_or_torn_is_refused(tmp_path):
    path = write_meta(tmp_path / "m", small_model())
    file = path / "consolidated.00.pth"
    whole, content = file.read_bytes(), torch.load(file, weights_only=True)
    del content["output.weight"]
    torch.save(content, file)
    refuse(path, "output.weight")
    for raw in (b"", b"nonsense", whole[:1000], whole[:-100]):
        file.write_bytes(raw)
        refuse(path, file)
    (path / "consolidated.01.pth").write_bytes(b"")
    refuse(path, path, "split")


def mutate_loader(rng, raw):
    raw, pieces = bytearray(raw), [b"0", b"-1", b"1e9", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"NaN",
    b",", b'"']
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(raw))
        j = min(len(raw), i + rng.choice((1, 1, 2, 5, 40)))
        raw[i:j] = rng.choice((bytes([rng.randrange(256)]), b"", rng.choice(pieces), raw[i:j] * 2))
    return bytes(raw)


def fuzz(tmp_path, rounds, seed):
    """Random damage of each text: the right error, or the same weights. -> {text: [refused, loaded]}"""
    rng, model, counts = random.Random(seed), small_model(), {}
    single, sharded = write_hf(tmp_path / "one", model), write_hf(tmp_path / "many", model, shards=3)
    header, data = safetensors_parts(hf_tensors(model))
    raw = json.dumps(header).encode()
    index, config = sharded / "model.safetensors.index.json", single / "config.json"
    files = {"header": (single / "model.safetensors", raw, lambda b: struct.pack("<Q", len(b)) + b + data),
             "index": (index, index.read_bytes(), bytes), "config": (config, config.read_bytes(), bytes)}
    for name, (file, good, pack) in files.items():
        whole, results = file.read_bytes(), [0, 0]
        for _ in range(rounds):
            file.write_bytes(pack(mutate_loader(rng, good)))
            try:
                got = Llama.from_pretrained(file.parent)
            except (ValueError, FileNotFoundError) as e:
                assert type(e) in (ValueError,
                FileNotFoundError) and str(file.parent) in str(e) and "\n" not in str(e)
                results[0] += 1
            else:
                assert all(map(torch.equal, got.parameters(), model.parameters()))
                results[1] += 1
        file.write_bytes(whole)
        counts[name] = results
    return counts


def test_random_damage_is_refused_or_harmless(tmp_path):
    for refused, loaded in fuzz(tmp_path, 100 * MORE, seed=0).values():
        assert refused + loaded == 100 * MORE and refused > 30 * MORE


# --------------------------------------------------------------------------------------- 9. the tokenizer

LLAMA_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN = T.LLAMA3.replace("{1,3}", "")


def split_then_bytes(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def added_token(content, i, special=True, **flags):
    return {"id": i, "content": content, "special": special, "lstrip": False, "rstrip": False,
            "single_word": False, "normalized": False} | flags


def tokenizer_json(merges=("t h", "th e", "i n", "Ġ the", "Ġ Ġ"), pattern=T.LLAMA3, specials=LLAMA_SPECIALS):
    """A small byte-level BPE tokenizer.json: the 256 bytes, one token per merge, then the special tokens."""
    vocab = {c: i for i, c in enumerate(T.BYTE_OF)}
    vocab |= {m.replace(" ", ""): 256 + i for i, m in enumerate(merges)}
    return {"version": "1.0", "normalizer": None, "pre_tokenizer": split_then_bytes(pattern),
            "added_tokens": [added_token(s, len(vocab) + i) for i, s in enumerate(specials)],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": list(merges)}}


def tokenizer_model(extra=(b"th", b"the", b" the")):
    tokens = [bytes([b]) for b in range(256)] + list(extra)
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


def load_json(folder, root):
    (folder / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    return Tokenizer.from_dir(folder)


def load_model(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_json(tmp_path_factory.mktemp("tok"), tokenizer_json())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    root = tokenizer_json(pattern=QWEN, specials=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    root["normalizer"] = {"type": "NFC"}
    root["added_tokens"] += [added_token("<tool", 300, False), added_token("<tool_call>", 301, False)]
    return load_json(tmp_path_factory.mktemp("qwen"), root)


def test_tokenizer_merges_the_lowest_id_first_and_never_across_pieces(tok):
    t, h, e, i, n, space = (T.BYTE_OF[c] for c in "theinĠ")
    byte = {b: i for i, b in enumerate(T.BYTE_OF.values())}
    assert tok.encode("the in") == [257, byte[space], 258]
    assert tok.encode("x the") == [byte[ord("x")], 259]                  # "Ġthe" is the last merge, but it merges
    assert tok.encode("the  the") == [257, byte[space], 259]             # two spaces: the second belongs to the word
    assert tok.encode("the\n\n  ") == [257, byte[10], byte[10], 260]
    assert tok.encode("1234") == [byte[b] for b in b"1234"]
    assert tok.encode("") == [] and tok.decode([]) == ""


def test_tokenizer_prefers_a_low_id_over_the_leftmost_pair(tmp_path):
    tok = load_json(tmp_path, tokenizer_json(["b c", "a b"]))
    assert [tok.token_bytes[i] for i in tok.encode("abc")] == [b"a", b"bc"]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=80))
def test_tokenizer_round_trips_any_text_byte_for_byte_and_streams_it(tok, qwen, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and b"".join(tok.token_bytes[i] for i in ids) == text.encode()
    assert "".join(tok.stream(ids)) == text
    assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text) or "<tool" in text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 265), max_size=60))
def test_tokenizer_decodes_any_ids_as_their_bytes_with_replacement(tok, ids):
    text = b"".join(tok.encoding.decode_single_token_bytes(i) for i in ids).decode(errors="replace")
    assert tok.decode(ids) == text == "".join(tok.stream(ids))


def test_tokenizer_stream_holds_a_character_back_until_its_last_byte(tok):
    pieces = list(tok.stream(tok.encode("a中!")))
    assert [p for p in pieces if p] == ["a", "中", "!"] and "\ufffd" not in "".join(pieces)
    assert "".join(tok.stream(tok.encode("中")[:2])) == "\ufffd" and tok.decode(tok.encode("中")[:2]) == "\ufffd"


def test_tokenizer_text_cannot_forge_a_special_token_unless_asked(tok):
    text = "a<|eot_id|>b<|begin_of_text|>"
    eot, bos = tok.added["<|eot_id|>"], tok.bos_id
    assert not {eot, bos} & set(tok.encode(text)) and tok.decode(tok.encode(text)) == text
    ids = tok.encode(text, special=True)
    assert ids[1] == eot and ids[-1] == bos and len(ids) == 4 and tok.decode(ids) == text
    assert tok.encode("a", bos=True) == [bos, *tok.encode("a")]
    with pytest.raises(ValueError, match="no bos"):
        Tokenizer(T.GPT2, {bytes([b]): b for b in range(256)}, {}, set()).encode("a", bos=True)


def test_tokenizer_added_tokens_that_are_not_special_are_always_matched_longest_first(qwen):
    text = "x<tool_call>y<tool z<|im_end|>"
    ids = qwen.encode(text)
    assert ids.count(301) == ids.count(300) == 1 and qwen.added["<|im_end|>"] not in ids
    assert qwen.token_bytes[301] == b"<tool_call>" and qwen.decode(ids) == text
    assert qwen.bos_id is None and qwen.stop_ids == {qwen.added["<|im_end|>"], qwen.added["<|endoftext|>"]}


def test_tokenizer_applies_nfc_only_where_the_file_asks(tok, qwen):
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9" and tok.decode(tok.encode("e\u0301")) == "e\u0301"


def test_tokenizer_gpt2_and_llama_3_patterns_cut_numbers_and_contractions_their_own_way(tmp_path):
    root = tokenizer_json(["' s", "S x", "' S", "1 2", "12 3", "123 4"])
    llama = load_json(tmp_path, root)
    assert [llama.token_bytes[i] for i in llama.encode("a's 1234'S")] == [b"a", b"'s", b" ", b"123", b"4", b"'S"]
    assert [llama.token_bytes[i] for i in llama.encode("a'Sx")] == [b"a", b"'S", b"x"]
    root["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    del root["model"]["type"]                                            # as in GPT-2's own file
    gpt2 = load_json(tmp_path, root)
    assert [gpt2.token_bytes[i] for i in gpt2.encode("a's 1234'S")] == [b"a", b"'s", b" ", b"1234", b"'", b"S"]


def test_tokenizer_token_bytes_covers_the_vocabulary_and_hides_special_and_unused_ids(tmp_path):
    root = tokenizer_json()
    root["added_tokens"].append(added_token("<|far|>", 270))
    tok = load_json(tmp_path, root)
    assert tok.n_vocab == len(tok.token_bytes) == 271 and tok.token_bytes[257] == b"the"
    assert all(tok.token_bytes[i] is None for i in range(261, 271))
    assert {b for b in tok.token_bytes[:256]} == {bytes([b]) for b in range(256)}


def test_tokenizer_ids_outside_the_vocabulary_are_named(tok):
    for bad in (-1, tok.n_vocab, 10**12):
        with pytest.raises(ValueError, match=str(bad)):
            tok.decode([bad])


def test_tokenizer_lone_surrogates_are_refused(tok, qwen):
    for text in ("a\ud800", "\udfff", "x" * 9 + "\ud83d y"):
        with pytest.raises(ValueError, match="surrogate"):
            tok.encode(text)
        with pytest.raises(ValueError, match="surrogate"):
            qwen.encode(text)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "\t ", "\u3000", "中"])
def test_tokenizer_a_very_long_run_takes_linear_time_and_round_trips(tok, unit):
    text, start = "x" + unit * 1_000_000 + "y", time.perf_counter()
    assert tok.decode(tok.encode(text)) == text
    assert time.perf_counter() - start < 10


def test_tokenizer_cutting_a_long_run_of_spaces_changes_no_id(tok):
    for n in (T.RUN - 1, T.RUN, T.RUN + 1, T.RUN + 2, 2 * T.RUN + 1):
        assert tok.encode(" " * n + "the") == tok.encoding.encode_ordinary(" " * n + "the"), n


def test_tokenizer_model_file_numbers_the_special_tokens_as_llama_3_does(tmp_path):
    tok = load_model(tmp_path, tokenizer_model())
    n = 259
    order = {"begin_of_text": 0, "end_of_text": 1, "reserved_special_token_0": 2, "reserved_special_token_1": 3,
             "finetune_right_pad_id": 4, "reserved_special_token_2": 5, "start_header_id": 6, "end_header_id": 7,
             "eom_id": 8, "eot_id": 9, "python_tag": 10, "reserved_special_token_3": 11,
             "reserved_special_token_247": 255}
    assert {name: tok.added[f"<|{name}|>"] - n for name in order} == order and len(tok.added) == 256
    assert tok.n_vocab == n + 256 and tok.bos_id == n and tok.stop_ids == {n + 1, n + 8, n + 9}
    assert tok.encode("the the") == [257, 258]
    assert not {*tok.encode("<|eot_id|><|reserved_special_token_9|>")} & {*tok.added.values()}


def test_tokenizer_model_and_json_of_one_vocabulary_agree(tmp_path):
    extra = [b"th", b"he", b"the", b" the", b"aa", b"  "]
    (tmp_path / "a").mkdir()
    model = load_model(tmp_path / "a", tokenizer_model(extra))
    to_char = {b: c for c, b in T.BYTE_OF.items()}
    tokens = ["".join(to_char[b] for b in t) for t in [bytes([b]) for b in range(256)] + extra]
    root = tokenizer_json()
    root["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    root["model"]["merges"] = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))
                               if t[:i] in tokens and t[i:] in tokens]
    root["model"]["ignore_merges"] = True
    root["added_tokens"] = [added_token(s, i) for s, i in model.added.items()]
    both = load_json(tmp_path, root)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("thea \n中'1") for _ in range(rng.randrange(30)))
        assert both.encode(text) == model.encode(text)
    assert both.token_bytes == model.token_bytes
    root["model"]["merges"].append(["t", "he"])                          # a pair twice
    with pytest.raises(ValueError, match="merges"):
        load_json(tmp_path, root)
    root["model"]["merges"].pop()
    pairs = root["model"]["merges"]
    pairs[pairs.index(["t", "he"])] = ["th", "e"]                        # one pair twice, one of the same token gone
    with pytest.raises(ValueError, match="merges"):
        load_json(tmp_path, root)
    pairs.pop()
    with pytest.raises(ValueError, match="merges"):
        load_json(tmp_path, root)


def test_tokenizer_finds_its_file_in_the_directory_below_it_or_by_its_own_path(tmp_path):
    (tmp_path / "original").mkdir()
    below = tmp_path / "original" / "tokenizer.model"
    below.write_bytes(tokenizer_model())
    assert Tokenizer.from_dir(tmp_path).n_vocab == Tokenizer.from_dir(str(below)).n_vocab == 259 + 256
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    assert load_json(tmp_path, tokenizer_json()).n_vocab == 261 + 5       # tokenizer.json comes first
    assert Tokenizer.from_dir(tmp_path / "tokenizer.json").n_vocab == 261 + 5


def test_tokenizer_missing_files_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*tokenizer\.model") as error:
            Tokenizer.from_dir(folder)
        assert str(folder) in str(error.value)


def test_tokenizer_chat_is_the_llama_3_template_and_content_cannot_end_its_turn(tok):
    bos, _, start, end, eot = (tok.added[s] for s in LLAMA_SPECIALS)
    ids = tok.chat([{"role": "system", "content": " the\n"}, {"role": "user", "content": "in<|eot_id|>"}])
    e = tok.encode
    assert ids == [bos, start, *e("system"), end, *e("\n\nthe"), eot,
                   start, *e("user"), end, *e("\n\nin<|eot_id|>"), eot, start, *e("assistant"), end, *e("\n\n")]
    assert ids.count(eot) == 2 and tok.chat([]) == [bos, start, *e("assistant"), end, *e("\n\n")]


@pytest.mark.parametrize("name", ["<|begin_of_text|>", "<|bos|>", "<s>"])
def test_tokenizer_finds_the_bos_token_by_its_usual_names(tmp_path, name):
    tok = load_json(tmp_path, tokenizer_json(specials=["<|other|>", name]))
    assert tok.bos_id == tok.added[name] and tok.encode("", bos=True) == [tok.bos_id]


def test_tokenizer_chat_needs_the_header_tokens(qwen):
    with pytest.raises(ValueError, match="Llama 3"):
        qwen.chat([{"role": "user", "content": "hi"}])


BAD_MODELS = {
    "a SentencePiece protobuf": (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>", "SentencePiece"),
    "an empty file": (b"", "no token"),
    "bad base64": (b"!!!! 0\n" + tokenizer_model(), "base64"),
    "bad padding": (tokenizer_model() + b"QQ 259\n", "adding"),
    "a rank that is no number": (tokenizer_model() + b"QUE= x\n", "base64"),
    "a gap in the ranks": (tokenizer_model() + b"QUE= 300\n", "ranks"),
    "a rank twice": (tokenizer_model() + b"QUE= 258\n", "ranks"),
    "a token twice": (tokenizer_model() + b"IQ== 259\n", "ranks"),
    "a stray word": (tokenizer_model() + b"stray\n", "base64"),
    "a missing byte": (b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(255)), "xff"),
    "a negative rank": (tokenizer_model() + b"QUE= -1\n", "base64"),
    "more than 128000 tokens": (tokenizer_model([b"%06d" % i for i in range(128001 - 256)]), "Llama 3"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_tokenizer_a_bad_model_file_gives_one_line_that_names_it(tmp_path, what):
    data, says = BAD_MODELS[what]
    with pytest.raises(ValueError, match=says) as error:
        load_model(tmp_path, data)
    assert str(tmp_path / "tokenizer.model") in str(error.value) and "\n" not in str(error.value)


def change(*path, to):
    def apply(root):
        for key in path[:-1]:
            root = root[key]
        root[path[-1]] = to
    return apply


def without(*path):
    def apply(root):
        for key in path[:-1]:
            root = root[key]
        del root[path[-1]]
    return apply


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = ("added_tokens", 0)
BAD_JSONS = {
    "Unigram": (change("model", "type", to="Unigram"), "Unigram"),
    "WordPiece": (change("model", "type", to="WordPiece"), "WordPiece"),
    "byte_fallback": (change("model", "byte_fallback", to=True), "byte_fallback"),
    "dropout": (change("model", "dropout", to=0.1), "dropout"),
    "word suffix": (change("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix"),
    "subword prefix": (change("model", "continuing_subword_prefix", to="##"), "##"),
    "SentencePiece spaces": (change("model", "vocab", "▁", to=999), "▁"),
    "NFKC": (change("normalizer", to={"type": "NFKC"}), "normalizer"),
    "no pre_tokenizer": (change("pre_tokenizer", to=None), "pre_tokenizer"),
    "unknown pre_tokenizer": (change("pre_tokenizer", to={"type": "Whitespace"}), "Whitespace"),
    "prefix space": (change("pre_tokenizer", to=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space"),
    "no split": (change("pre_tokenizer", to=BYTE_LEVEL | {"use_regex": False}), "use_regex"),
    "prefix space after a split": (change("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", to=True),
                                   "pre_tokenizer"),
    "two splits": (change("pre_tokenizer", "pretokenizers", 1, "use_regex", to=True), "pre_tokenizer"),
    "Removed": (change("pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"), "Removed"),
    "inverted split": (change("pre_tokenizer", "pretokenizers", 0, "invert", to=True), "pre_tokenizer"),
    "string split": (change("pre_tokenizer", "pretokenizers", 0, "pattern", to={"String": " "}), "String"),
    "bad regex": (change("pre_tokenizer", to=split_then_bytes("(")), "arenthesis"),
    "unknown class in regex": (change("pre_tokenizer", to=split_then_bytes(r"\p{Nope}")), "Regex"),
    "deep regex": (change("pre_tokenizer", to=split_then_bytes("(" * 9999 + ")" * 9999)), "nested"),
    "no merges": (without("model", "merges"), "merges"),
    "no vocab": (without("model", "vocab"), "vocab"),
    "no model": (without("model"), "vocab"),
    "no added_tokens": (without("added_tokens"), "added_tokens"),
    "model is a list": (change("model", to=[]), "vocab"),
    "vocab is a list": (change("model", "vocab", to=[1]), "vocab"),
    "merges is a number": (change("model", "merges", to=3), "merges"),
    "merge of three": (change("model", "merges", 0, to="a b c"), "merges"),
    "merge of numbers": (change("model", "merges", 0, to=[1, 2]), "str"),
    "merge of no token": (change("model", "merges", 1, to="q z"), "merges"),
    "merge of no token beside": (change("model", "merges", slice(5, 5), to=["q z"]), "merges"),
    "merge of halves beside": (change("model", "merges", slice(2, 2), to=["t he"]), "merges"),
    "merge of three beside": (change("model", "merges", slice(2, 2), to=["t h e"]), "merges"),
    "merge that is missing": (without("model", "merges", 1), "merges"),
    "merges in another order": (change("model", "merges", slice(0, 3), to=["i n", "t h", "th e"]), "merges"),
    "merge that BPE never makes": (change("model", "merges", 1, to="t he"), "merges"),
    "id twice": (change("model", "vocab", "in", to=0), ""),
    "special id taken": (change(*ADDED, "id", to=5), "same id"),
    "special name in the vocab": (change("model", "vocab", LLAMA_SPECIALS[0], to=999), "two ids"),
    "special name twice": (change("added_tokens", 1, "content", to=LLAMA_SPECIALS[0]), "two ids"),
    "empty special": (change(*ADDED, "content", to=""), "empty"),
    "surrogate special": (change(*ADDED, "content", to="\ud800"), "surrogate"),
    "special name is a number": (change(*ADDED, "content", to=7), "int"),
    "lstrip": (change(*ADDED, "lstrip", to=True), "flag"),
    "rstrip": (change(*ADDED, "rstrip", to=True), "flag"),
    "single_word": (change(*ADDED, "single_word", to=True), "flag"),
    "negative id": (change(*ADDED, "id", to=-1), "-1"),
    "fractional id": (change(*ADDED, "id", to=0.5), "0.5"),
    "boolean id": (change("model", "vocab", "Ġthe", to=True), ""),
    "huge id": (change(*ADDED, "id", to=2**40), str(2**40)),
    "text id": (change("model", "vocab", "th", to="256"), "str"),
    "missing byte": (without("model", "vocab", "Ġ"), ""),
    "long token": (change("model", "vocab", "a" * 9999, to=999), "too long"),
}


@pytest.mark.parametrize("what", BAD_JSONS)
def test_tokenizer_a_bad_json_file_gives_one_line_that_names_it(tmp_path, what):
    apply, says = BAD_JSONS[what]
    root = tokenizer_json()
    apply(root)
    with pytest.raises(ValueError) as error:
        load_json(tmp_path, root)
    message = str(error.value)
    assert str(tmp_path / "tokenizer.json") in message and says in message and "\n" not in message


def test_tokenizer_normalized_added_tokens_are_refused_under_nfc_only(tmp_path):
    root = tokenizer_json()
    root["added_tokens"][0]["normalized"] = True
    load_json(tmp_path, root)
    root["normalizer"] = {"type": "NFC"}
    with pytest.raises(ValueError, match="flag"):
        load_json(tmp_path, root)


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"\xff\xfe{", b'{"model": 1e999}', b"[" * 200_000])
def test_tokenizer_what_is_no_json_gives_one_line_that_names_it(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json: \w+") as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["", "a*", "a", r"\p{L}+", "(a+)+$"])
def test_tokenizer_a_pattern_that_skips_text_never_loses_it_silently(tmp_path, pattern):
    tok = load_json(tmp_path, tokenizer_json(pattern=pattern))
    with pytest.raises(ValueError, match="skips|tiktoken"):
        tok.encode("a" * 40 + " b")


def test_tokenizer_a_token_its_merges_cannot_make_is_refused_but_kept_under_ignore_merges(tmp_path):
    root = tokenizer_json(["b c"], pattern=r"\S+|\s+", specials=[])
    root["model"]["vocab"]["abcd"] = 257                                 # nothing joins into abcd
    root["model"]["ignore_merges"] = True
    tok = load_json(tmp_path, root)
    assert tok.encode("abcd") == [257]
    assert [tok.token_bytes[i] for i in tok.encode("xabcd")] == [b"x", b"a", b"bc", b"d"]
    root["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="merges"):
        load_json(tmp_path, root)


def plain_bpe(piece, vocab, merges, ignore_merges):
    """What a tokenizer.json says of one piece: the first of the listed merges that is possible, leftmost, again and
    again; with ignore_merges a piece that is a token stays whole."""
    parts = [piece] if ignore_merges and piece in vocab else [*piece]
    while possible := [pair for pair in merges if pair in zip(parts, parts[1:])]:
        i = [*zip(parts, parts[1:])].index(possible[0])
        parts[i:i + 2] = ["".join(possible[0])]
    return [vocab[part] for part in parts]


def test_tokenizer_files_that_are_accepted_are_merged_as_they_say():
    rng, accepted, refused = random.Random(0), 0, 0
    for _ in range(400):
        letters, tokens = "abc"[:rng.randrange(1, 4)], []
        for _ in range(rng.randrange(1, 8)):                             # joined from others, or at random
            parts = [*letters, *tokens] if rng.random() < 0.8 else [rng.choice(letters) * 2]
            tokens.append(rng.choice(parts) + rng.choice(parts))
        tokens = [*dict.fromkeys(tokens)]
        vocab = {c: i for i, c in enumerate([*T.BYTE_OF, *tokens])}
        merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= vocab.keys()]
        if rng.random() < 0.5:                                           # in another order of the pairs of a token
            merges = sorted(rng.sample(merges, len(merges)), key=lambda pair: vocab["".join(pair)])
        if rng.random() < 0.2:
            rng.shuffle(merges)
        merges, ignore_merges = [pair for pair in merges if rng.random() < 0.9], rng.random() < 0.5
        try:
            check_merges(vocab, merges, ignore_merges)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        tok = Tokenizer(r"\S+", {bytes(map(T.BYTE_OF.get, t)): i for t, i in vocab.items()}, {}, set())
        for text in [*tokens, *("".join(rng.choices(letters, k=rng.randrange(1, 12))) for _ in range(20))]:
            assert tok.encode(text) == plain_bpe(text, vocab, merges, ignore_merges), (text, tokens, merges)
    assert accepted > 100 and refused > 100


def mutate_tokenizer(data, rng):
    """Damage a file: flip, drop or insert bytes, cut it, repeat a part, or swap numbers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(max(len(data), 1)), rng.randrange(6)
        if not data:
            break
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at:at + rng.choice((1, 9, 200))]
        elif kind == 2:
            data[at:at] = rng.choice((b"0", b'"', b",", b"}", b"\\ud800", b"null", b"\n", b"-1", b"1e9", b"\xff"))
        elif kind == 3:
            data = data[:max(1, at)]
        elif kind == 4:
            data[at:at] = data[at:at + 30]
        else:
            digits = [i for i, b in enumerate(data) if 48 <= b < 58] or [0]
            data[rng.choice(digits)] = 48 + rng.randrange(10)
    return bytes(data)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_tokenizer_a_damaged_file_gives_a_value_error_or_a_working_tokenizer(tmp_path, name):
    good = json.dumps(tokenizer_json()).encode() if name.endswith("json") else tokenizer_model()
    rng, refused = random.Random(0), 0
    for _ in range(200 * MORE):
        (tmp_path / name).write_bytes(mutate_tokenizer(good, rng))
        try:
            tok = Tokenizer.from_dir(tmp_path)
        except ValueError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
            continue
        for text in ("the in\n\n x中é <|eot_id|>", "a  b 123"):
            try:
                assert tok.decode(tok.encode(text)) == text
            except ValueError as error:
                assert "skips" in str(error) or "tiktoken" in str(error)
    assert 50 * MORE < refused < 200 * MORE


# --------------------------------------------------------------------------------- 10. the tiny model answers

TINY = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    tokenizer = Tokenizer.from_dir(TINY)
    return Llama.from_pretrained(TINY), tokenizer, sentence_flags(tokenizer.token_bytes)


def exact_match(tiny, length, n, new_cache, seed=1):
    """Share of n questions, each at the end of a prompt of `length` tokens with 8 facts, answered to the letter."""
    model, tokenizer, _ = tiny
    rng, right = random.Random(seed), 0
    for i in range(n):
        prompt, answer = needle(rng, length, tokenizer, depth=(i + 0.5) / n, whole=True)
        out = [int(t) for t in model.generate(torch.tensor([prompt]), new_cache(), len(answer))]
        right += out == list(answer)
    return right / n


@pytest.mark.parametrize("length, n", [(512, 20), (2048, 16), (4096, 10), (8192, 4)])
def test_the_tiny_model_answers_at_every_depth_and_sentencekv_with_a_16th_of_the_context_does_too(tiny, length, n):
    dense = exact_match(tiny, length, n, DenseKV)
    sentence = exact_match(tiny, length, n, lambda: SentenceKV(tiny[2], budget=max(128, length // 16)))
    assert dense >= 0.9 and sentence >= 0.9, (dense, sentence)


def test_a_budget_that_covers_the_prompt_gives_the_logits_of_the_dense_cache(tiny):
    model, tokenizer, flags = tiny
    model = Llama.from_pretrained(TINY, dtype=torch.float32)
    prompt, answer = needle(random.Random(3), 700, tokenizer, whole=True)
    dense, sentence = DenseKV(), SentenceKV(flags, budget=1024)
    for tokens in (prompt, *([t] for t in answer), answer):
        a, b = (model(torch.tensor([tokens]), cache) for cache in (dense, sentence))
        assert (a - b).abs().max() < 2e-3 and a.argmax() == b.argmax()


def test_follow_up_questions_are_answered_from_one_reading(tiny):
    model, tokenizer, flags = tiny
    right = 0
    for seed in range(3):
        text, facts = story(2000, facts=8, seed=seed)
        cache, last = SentenceKV(flags, budget=160), []
        model(torch.tensor([tokenizer.encode(text, bos=True)]), cache)
        for question, answer in facts[::-2]:
            want = tokenizer.encode(answer)
            out = [int(t) for t in model.generate(torch.tensor([last + tokenizer.encode(question)]), cache, len(want))]
            right, last = right + (out == want), out[-1:]
    assert right >= 11, f"{right} of 12"


# ------------------------------------------------------------------------------------------- 11. README and CLI

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "


@pytest.mark.parametrize("file", ["README.md", "docs/walkthrough.md"])
def test_the_python_in_the_documents_runs_as_it_stands_and_prints_what_they_say(file, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks, names = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S), {}
    assert blocks
    for block in blocks:
        exec(compile(block, file, "exec"), names)
    printed = capsys.readouterr().out
    for line in re.findall(r"# prints (.*)", "".join(blocks)):
        assert line in printed


def test_the_readmes_two_commands_are_those_of_ci():
    commands = [line for line in README.splitlines() if line.startswith(SETUP)]
    assert commands == [SETUP + "sentencekv.py", SETUP + "-m pytest"]
    assert [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if ".venv" in line] == commands[::-1]


def test_the_readme_names_every_file_and_every_setting():
    names = [p.name for p in ROOT.iterdir() if p.suffix in (".py", ".txt")]
    settings = list(inspect.signature(SentenceKV).parameters)
    names += [p.name for p in (ROOT / "experiments").glob("*.py")]
    assert [name for name in names + settings if f"`{name}" not in README] == []


def test_the_names_that_the_readme_gives_to_the_papers_symbols_are_in_the_code():
    table = README.split("## The paper's symbols in the code")[1].split("**Different")[0]
    names = {name for name in re.findall(r"`(\w+)`", table)}
    code = (ROOT / "sentencekv.py").read_text(encoding="utf-8")
    assert len(names) >= 15 and [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_docstring_examples_are_true():
    assert doctest.testmod(sentencekv).failed == 0 and doctest.testmod(sentencekv).attempted >= 5


def test_the_command_line_answers_from_a_file_and_shows_what_it_fetched(tmp_path, capsys):
    text, facts = story(1500, facts=6, seed=4)
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    question, answer = facts[2]
    assert ask.main(["--prompt-file", str(tmp_path / "story.txt"), "--ask", question.strip(), "--budget", "128",
                     "--max-new-tokens", "16", "--dense", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count(answer.strip()) >= 2 and "fetched  attention" in out and "MB in host memory" in out


def test_the_command_line_speaks_llama_3s_chat_template(tok, tmp_path):
    (tmp_path / "text.txt").write_text("Bob lives in Oslo.", encoding="utf-8")
    arguments = ["--prompt-file", str(tmp_path / "text.txt"), "--ask", "Where is Bob?", "--ask", "Why?"]
    ids, asked, turn, stop = ask.prompts(ask.parse(arguments), tok)
    first = tok.chat([{"role": "user", "content": "Bob lives in Oslo.\n\nWhere is Bob?"}])
    assert asked == [("Where is Bob?", None), ("Why?", None)]
    assert tok.decode(ids + turn("Where is Bob?", True)) == tok.decode(first) and stop == tok.stop_ids
    assert tok.decode(turn("Why?", False)) == tok.decode(tok.chat([{"role": "user", "content": "Why?"}])[1:])
    ids, asked, turn, _ = ask.prompts(ask.parse([*arguments, "--raw"]), tok)
    assert tok.decode(ids + turn("Where is Bob?", True)) == "<|begin_of_text|>Bob lives in Oslo. Where is Bob?"


def test_a_text_is_read_once_saved_loaded_and_asked_line_by_line(tmp_path, capsys, monkeypatch):
    text, facts = story(900, facts=4, seed=4)
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    (file, saved), cpu = (str(tmp_path / name) for name in ("story.txt", "story.cache")), ["--device", "cpu"]
    assert ask.main(["--prompt-file", file, "--budget", "128", "--save-cache", saved, "--chunk", "100", *cpu]) == 0
    assert f"saved to {saved}" in capsys.readouterr().out
    lines = "?\n" + "".join(f"{question.strip()}\n?\n\n" for question, _ in facts[:2])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert ask.main(["--load-cache", saved, "--chat", *cpu]) == 0
    out = capsys.readouterr().out
    assert "loaded" in out and "budget 128" in out and out.count("nothing was fetched") == 1
    for question, answer in facts[:2]:
        assert out.count(answer.strip()) >= 2 and question.strip() in out     # answered, and shown as fetched
        assert re.search(re.escape(answer.strip()) + r" +\[.* ms/token", out)   # and no more said than that
    for wrong, message in ((["--budget", "99", "--ask", "Who?"], "--budget does not go"), ([], "needs a question")):
        assert ask.main(["--load-cache", saved, *wrong, *cpu]) == 2
        assert message in capsys.readouterr().err


def test_a_conversation_reads_every_token_once_the_last_of_each_answer_too(tiny):
    model, tokenizer, flags = tiny
    text, facts = story(600, facts=4, seed=4)
    talk = ask.Conversation(model, tokenizer, ask.Watched(flags, budget=128), ask.parse(["--max-new-tokens", "16"]))
    talk.read(tokenizer.encode(text, bos=True), "test")
    said = text
    for question, answer in facts[:3]:
        written = "".join(talk.answer(tokenizer.encode(question), set(tokenizer.encode("."))))
        assert written == answer
        said += question + written
    assert tokenizer.decode(talk.ids + talk.unread) == "<|begin_of_text|>" + said
    assert talk.cache.length == len(talk.ids) and len(talk.unread) == 1


def test_a_text_without_a_question_is_continued(tmp_path, capsys):
    text, facts = story(600, facts=4, seed=4)
    (tmp_path / "story.txt").write_text(text + facts[1][0], encoding="utf-8")
    assert ask.main(["--prompt-file", str(tmp_path / "story.txt"), "--max-new-tokens", "16", "--device", "cpu"]) == 0
    assert facts[1][1].strip() in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--model", "nowhere"], "error: nowhere"),
    (["--prompt-file", "nowhere.txt"], "error: .*nowhere.txt"),
    (["--budget", "20"], r"error: budget 20 must exceed sink \+ recent = 36"),
    (["--temperature", "-1"], "error: temperature must be"),
    (["--device", "nonsense"], "error: --device nonsense cannot be used"),
    (["--save-cache", "nowhere/x"], "error: --save-cache nowhere/x: there is no such folder"),
    (["--save-cache", "."], "error: --save-cache . is a folder"),
    (["--load-cache", "x", "--ask", "?", "--paper"], "error: --paper does not go with --load-cache"),
    (["--prompt-file", "checkpoints/tiny/model.safetensors"], "error: checkpoints/tiny/model.safetensors is no UTF-8"),
    (["--chunk", "1"], "error: chunk must be"), (["--top-p", "0"], "error: top_p must be"),
    (["--seed", "-1"], "error: seed must be"), (["--show", "-1"], "error: --show must be at least 0, got -1"),
    (["--max-new-tokens", "0"], "error: --max-new-tokens must be at least 1, got 0"),
])
def test_the_command_line_says_what_is_wrong_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert ask.main(["--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert re.match(message, err) and err.count("\n") == 1 and not out     # before anything is read


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        ask.main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("--budget", "--keep", "--rank", "--dense", "--model", "--seed", "--chat"))


def test_ctrl_c_ends_cleanly(monkeypatch, capsys):
    monkeypatch.setattr(ask, "run", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask.main([]) == 130 and capsys.readouterr().err == "\ninterrupted\n"


# ------------------------------------------------------------------------- 13. quality: rivals, measures, scoring

RIVALS = [name for name, new in baselines.methods(TOY_FLAGS).items() if isinstance(new(64), baselines.Rival)]


class Random:
    """Random tokens, q, k, v in float64, the same for every cache of the same seed; remembers all that went through."""

    def __init__(self, seed, B=2, Hq=4, H=2, d=8, layers=1):
        self.rng, self.shape, self.layers = torch.Generator().manual_seed(seed), (B, Hq, H, d), layers
        self.tokens, self.q, self.k, self.v = torch.zeros(B, 0, dtype=torch.long), [], [], []

    def next(self, T):
        B, Hq, H, d = self.shape
        tokens = torch.multinomial(torch.tensor([3.0, 6, 1, 0.5, 0.5, 0.5]), B * T, True, generator=self.rng).view(B, T)
        random = lambda heads: torch.randn(self.layers, B, heads, T, d, generator=self.rng, dtype=torch.float64)
        new = random(Hq), random(H), random(H)
        self.tokens = torch.cat((self.tokens, tokens), 1)
        self.q, self.k, self.v = (torch.cat((*old[-1:], x), 3)[None] for old, x in zip((self.q, self.k, self.v), new))
        return tokens, *new

    def into(self, T, *caches):
        """T more of everything through the caches: their outputs."""
        tokens, q, k, v = self.next(T)
        for cache in caches:
            cache.begin(tokens)
        return [torch.stack([cache.attend(l, q[l], k[l], v[l]) for l in range(self.layers)]) for cache in caches]

    def weights(self, b, h, t=-1, layer=0):
        """Attention of query t to everything up to it, by definition, one row for each query head of the group."""
        q, k = self.q[0][layer, b], self.k[0][layer, b, h]
        G, N = len(q) // self.shape[2], k.shape[0]
        t = t % N
        return torch.stack([torch.softmax(k[:t + 1] @ q[h * G + g, t] / math.sqrt(k.shape[1]), 0) for g in range(G)])


def rows_and_heads(random):
    return itertools.product(range(random.shape[0]), range(random.shape[2]))


def positions_of(mask):
    return mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", baselines.methods(TOY_FLAGS))
def test_any_method_with_a_budget_that_covers_the_context_equals_dense_attention(name):
    random, cache, dense = Random(1, layers=2), baselines.methods(TOY_FLAGS)[name](200), DenseKV()
    for T in (90, *[1] * 40, 9, 1, 1, 30, 1):
        out, expected = random.into(T, cache, dense)
        assert_close(out, expected)


@pytest.mark.parametrize("name", baselines.methods(TOY_FLAGS))
def test_any_method_works_from_an_empty_cache_token_by_token(name):
    settings = baselines.methods(TOY_FLAGS)[name]
    random, cache, dense = Random(2), settings(100), DenseKV()
    for _ in range(60):
        out, expected = random.into(1, cache, dense)
        assert_close(out, expected)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_attends_to_budget_tokens_and_exactly_to_its_mask(name):
    random, cache = Random(3), baselines.methods(TOY_FLAGS)[name](60)
    random.into(150, cache)
    for T in [1] * 12 + [7] + [1] * 3:
        (out,) = random.into(T, cache)
        if T > 1:
            continue
        N, mask = cache.length, cache.mask[0]
        assert (mask.sum(-1) == 60).all() and mask.shape[-1] == N
        assert mask[..., :4].all() and mask[..., -32:].all()
        for b, h in rows_and_heads(random):
            at = positions_of(mask[b, h])
            expected = plain_attention(random.q[0][0, b, 2 * h:2 * h + 2, -1], random.k[0][0, b, h, at],
                                       random.v[0][0, b, h, at])
            assert_close(out[0, b, 2 * h:2 * h + 2, 0], expected)


@pytest.mark.parametrize("name", ["StreamingLLM", "SnapKV", "H2O"])
def test_what_was_evicted_never_comes_back_and_a_follow_up_does_not_see_it(name):
    random, cache = Random(4), baselines.methods(TOY_FLAGS)[name](60)
    random.into(150, cache)
    random.into(1, cache)
    held = cache.mask[0]
    for T in (1, 1, 7, 1):
        before = cache.held(0)
        (out,) = random.into(T, cache)
        if T > 1:
            for (b, h), t in itertools.product(rows_and_heads(random), range(T)):
                at = positions_of(before[b, h]) + [*range(before.shape[-1], before.shape[-1] + t + 1)]
                q = random.q[0][0, b, 2 * h:2 * h + 2, cache.length - T + t]
                assert_close(out[0, b, 2 * h:2 * h + 2, t],
                             plain_attention(q, random.k[0][0, b, h, at], random.v[0][0, b, h, at]))
        else:
            assert not (cache.mask[0][..., :held.shape[-1]] & ~held).any()
            held = cache.mask[0]


def test_sentencekv_competes_with_the_papers_settings_at_the_common_windows():
    made = {name: new(100) for name, new in baselines.methods(TOY_FLAGS).items() if name.startswith("SentenceKV")}
    tell = lambda c: (c.rule, c.keep, c.pool_width, c.window, c.sink, c.recent, c.budget, c.refresh, type(c))
    same, R = (32, 4, 32, 100, 1, SentenceKV), sentencekv.RANKS
    assert {name: tell(cache) for name, cache in made.items()} == {
        "SentenceKV": (R["spread"], None, 1, *same), "SentenceKV, bounds": (R["bounds"], None, 1, *same),
        "SentenceKV, mean": (R["mean"], None, 1, *same), "SentenceKV, paper": (R["mean"], 2, 7, *same),
        "SentenceKV, paper, keep 3": (R["mean"], 3, 7, *same),
        "SentenceKV, refresh 2": (R["spread"], None, 1, *same[:4], 2, SentenceKV),
        "SentenceKV, refresh 8": (R["spread"], None, 1, *same[:4], 8, SentenceKV),
        "SentenceKV, lookahead": (R["spread"], None, 1, *same[:5], Lookahead)}


def best_of(scores, far, room):
    """The `room` far positions with the largest scores."""
    return sorted(sorted(far, key=lambda i: -scores[i])[:room])


def test_streamingllm_attends_to_the_sink_and_the_latest_tokens():
    random, cache = Random(5), baselines.StreamingLLM(60)
    for T in (100, 1, 1, 20, 1):
        random.into(T, cache)
    N = cache.length
    assert all(positions_of(row) == [*range(4), *range(N - 56, N)] for row in cache.mask[0].flatten(0, 1))


def test_snapkv_keeps_what_the_last_queries_attend_to_max_pooled_over_seven():
    random, cache = Random(6), baselines.SnapKV(60)
    for T in (120, 1):
        random.into(T, cache)
    for b, h in rows_and_heads(random):
        alpha = torch.zeros(120)
        for t in range(88, 120):
            alpha[:t + 1] += random.weights(b, h, t).sum(0)
        pooled = [float(max(alpha[max(0, i - 3):i + 4])) for i in range(120)]
        held = best_of(pooled, [*range(4, 88)], 24)               # then token 88 left the recent window
        values = lambda positions: pytest.approx(sorted(pooled[i] for i in positions), rel=1e-6)    # neighbours tie
        taken = positions_of(cache.mask[0][b, h])
        assert taken[:4] == [*range(4)] and taken[-32:] == [*range(89, 121)]
        assert sorted(pooled[i] for i in taken[4:-32]) == values(best_of(pooled, held + [88], 24))


def test_h2o_keeps_what_got_the_most_attention_of_all_queries_also_while_it_generates():
    random, cache = Random(7), baselines.H2O(50)
    random.into(40, cache)
    score = {}
    for b, h in rows_and_heads(random):
        score[b, h] = torch.zeros(40, dtype=torch.float64)
        for t in range(40):
            score[b, h][:t + 1] += random.weights(b, h, t).sum(0)
    held = {key: [*range(4), *best_of(score[key], [*range(4, 8)], 14), *range(8, 40)] for key in score}
    for T in [1] * 40 + [9] + [1] * 20:                             # generated tokens compete as well
        random.into(T, cache)
        N = cache.length
        for b, h in rows_and_heads(random):
            key, s = (b, h), torch.cat((score[b, h], torch.zeros(T, dtype=torch.float64)))
            if T > 1:                                             # a follow-up: its queries add what they attend to
                for t in range(N - T, N):
                    s[:t + 1] += random.weights(b, h, t).sum(0)
                held[key], score[key] = held[key] + [*range(N - T, N)], s
                held[key] = [*range(4), *best_of(s, [i for i in held[key] if 4 <= i < N - 32], 14), *range(N - 32, N)]
                continue
            held[key] = [*range(4), *best_of(s, [i for i in held[key] + [N - 1] if 4 <= i < N - 32], 14),
                         *range(N - 32, N)]
            assert positions_of(cache.mask[0][b, h]) == held[key]
            q, k = random.q[0][0, b, 2 * h:2 * h + 2, -1], random.k[0][0, b, h, held[key]]
            s[held[key]] += torch.softmax(q @ k.T / math.sqrt(8), -1).sum(0)
            score[key] = s


def plain_blocks(random, cache, size, score):
    """The mask of whole blocks by score(b, h, positions of the block), the last one cut."""
    N = cache.length
    for b, h in rows_and_heads(random):
        blocks = [[*range(i, min(i + size, N))] for i in range(0, N, size)]
        far = []
        for block in sorted(blocks, key=lambda block: -score(b, h, block)):
            far += [i for i in block if 4 <= i < N - cache.recent]
        near = [*range(4), *range(N - cache.recent, N)]
        assert positions_of(cache.mask[0][b, h]) == sorted(near + far[:cache.room])


@pytest.mark.parametrize("recent", [32, 1])
def test_quest_takes_the_pages_of_16_with_the_largest_bounds(recent):
    random, cache = Random(8), baselines.Quest(75, recent=recent)
    random.into(187, cache)

    def bound(b, h, page):
        k = random.k[0][0, b, h, page]
        return sum(float(torch.maximum(q * k.amax(0), q * k.amin(0)).sum())
                   for q in random.q[0][0, b, 2 * h:2 * h + 2, -1])
    for T in [1] * 6 + [15, 1]:                                       # 194 tokens: a page of two; 209: a page of one
        random.into(T, cache)
        if T == 1:
            plain_blocks(random, cache, 16, bound)
            pages = random.k[0][0].split(16, dim=2)
            assert torch.equal(cache.bounds[0], torch.stack([torch.cat((k.amax(2), -k.amin(2)), -1) for k in pages], 2))


def test_infllm_ranks_blocks_of_32_by_the_four_keys_that_the_queries_after_them_liked():
    random, cache = Random(9), baselines.InfLLM(90)
    random.into(180, cache)
    random.into(1, cache)
    random.into(9, cache)

    def score(b, h, block):
        q, k = random.q[0][0, b, 2 * h:2 * h + 2].mean(0), random.k[0][0, b, h]
        liked = {m: float(sum(q[m + 1:m + 33] @ k[m])) if m + 1 < len(q) else 0.0 for m in block}
        best = sorted(block, key=lambda m: -liked[m])[:4]
        return float(sum(q[-1] @ k[m] for m in best))
    for _ in range(3):
        random.into(1, cache)
        plain_blocks(random, cache, 32, score)


def plain_tail(ids, recent):
    return ids.index(ids[max(len(ids) - recent, 0)])


@pytest.mark.parametrize("name", ["oracle, tokens", "oracle, sentences"])
def test_the_oracles_take_what_really_gets_the_most_attention(name):
    random, cache = Random(10), baselines.methods(TOY_FLAGS)[name](60)
    for T in (140, 1, 1, 6, 1):
        random.into(T, cache)
    N = cache.length
    for b, h in rows_and_heads(random):
        mass = random.weights(b, h).mean(0)
        ids = plain_sentences(random.tokens[b].tolist(), 4, 8)
        if name == "oracle, tokens":
            tail, order = N - 32, sorted(range(4, N - 32), key=lambda i: -mass[i])
        else:
            tail = plain_tail(ids, 32)
            members = {s: [i for i in range(4, tail) if ids[i] == s] for s in ids[4:tail]}
            order = [i for s in sorted(members, key=lambda s: -sum(mass[members[s]])) for i in members[s]]
        assert positions_of(cache.mask[0][b, h]) == sorted([*range(4), *order[:60 - 4 - (N - tail)], *range(tail, N)])


class ByDefinition(baselines.Sentences):
    """SentenceKV's rules without its vectors and sums, sentence by sentence."""

    def __init__(self, *args, rank):
        super().__init__(*args)
        self.rank, self.asked, self.starts_anew = rank, {}, True

    def read(self, layer, q, sums=None):
        self.asked[layer] = [[] for _ in q]                                      # queries of the open sentence, per row

    def scores(self, layer, q):
        (B, Hq, _, d), k, S = q.shape, self.k(layer), int(self.ids.max()) + 1
        result = torch.full((B, 2, S), -torch.inf, dtype=k.dtype)
        for b, asked in enumerate(self.asked[layer]):
            if self.starts_anew and self.ids[b, -1] != self.ids[b, -2]:
                asked.clear()
            asked.append(q[b, :, 0].view(2, 2, d))                               # (H, G, d)
            mean = torch.stack(asked).mean(0)
            for s, h in itertools.product(range(S), range(2)):
                keys = k[b, h, (self.ids[b] == s) & (self.t >= self.sink)]
                if len(keys):
                    result[b, h, s] = torch.stack([self.score(*x, keys) for x in zip(asked[-1][h], mean[h])]).mean()
        return result

    def score(self, q, mean, keys):
        """One sentence, one query head: q and mean (d,), keys (n, d)."""
        if self.rank == "mean":
            return mean @ keys.mean(0)
        if self.rank == "bounds":
            return torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()
        q = (q + mean) / 2
        return q @ keys.mean(0) + q.abs() @ keys.std(0, correction=0)


@pytest.mark.parametrize("rank", sentencekv.RANKS)
@pytest.mark.parametrize("seed", range(3))
def test_sentencekv_attends_to_what_the_same_rule_takes_among_the_rivals(seed, rank):
    """The segmentation of the rivals, their rounded window, and how recall reads what a SentenceKV attended to."""
    random, rival = Random(seed, layers=2), ByDefinition(70, TOY_FLAGS, rank=rank)
    cache = SentenceKV(TOY_FLAGS, budget=70, rank=rank)
    for T in (160, *[1] * 6, 40, 1, 1):
        tokens, q, k, v = random.next(T)
        where = torch.arange(rival.length, rival.length + T).double()[:, None].expand(k.shape[1:])
        for c, values in ((rival, v), (cache, where[None].expand(k.shape))):
            c.begin(tokens)
            for layer in range(2):
                c.attend(layer, q[layer], k[layer], values[layer])
                if c is cache and T == 1:
                    assert torch.equal(recording.attended(cache, layer), rival.mask[layer])


def test_attention_sums_are_sums_of_attention():
    random = Random(11)
    random.next(300)
    sums = recording.attention_sums(random.q[0][0][:, :, -170:], random.k[0][0])
    for b, h in rows_and_heads(random):
        expected = torch.zeros(300, dtype=torch.float64)
        for t in range(130, 300):
            expected[:t + 1] += random.weights(b, h, t).sum(0)
        assert (sums[b, h] - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def lab():
    lab = quality.Lab(quality.parse(["needles"]))
    lab.model = lab.model.float()                                 # so that equal means equal
    return lab


@torch.no_grad()
def test_a_cache_that_starts_from_a_recording_equals_one_that_read_the_prompt(lab):
    text, facts = story(700, seed=8)
    text, question = (lab.tokenizer.encode(t, bos=i == 0) for i, t in enumerate((text, facts[2][0])))
    recorded, _ = lab.read(torch.tensor([text]))
    lab.read(torch.tensor([lab.tokenizer.encode(facts[5][0])]), recorded)        # another fork disturbs nothing
    recorded, next_token = lab.read(torch.tensor([question]), recorded)
    for name, new in lab.new.items():
        started, real = start(new(80), recorded), new(80)
        assert lab.model(torch.tensor([text + question]), real).argmax(-1) == next_token
        for tokens in ([next_token.item()], [5], [77], question, [9], [10]):
            a, b = (lab.model(torch.tensor([tokens]), cache) for cache in (started, real))
            assert (a - b).abs().max() < 1e-3, name


@torch.no_grad()
def test_what_was_attended_to_is_told_of_the_layer_that_is_asked_for():
    feed = Feed(0, Hq=2, H=1, layers=2, budget=40, sink=2, recent=5, refresh=2, max_sentence=9, dtype=torch.float32)
    place = lambda t: t.view(1, 1, 1, -1, 1).float().expand(2, 1, 1, -1, 8)          # values are positions
    feed.push(200, v=place(torch.arange(200)))
    feed.push(1, v=place(torch.tensor([200])))
    masks = [recording.attended(feed.cache, l)[0, 0] for l in range(2)]
    assert not torch.equal(*masks)
    for mask, sentence, taken in zip(masks, *feed.cache.fetched()):
        first = feed.cache.first[0, sentence[0, 0]].tolist()
        fetched = [f + i for f, n in zip(first, taken[0, 0].tolist()) for i in range(n)]
        assert mask[fetched].all() and set(mask.nonzero().flatten().tolist()) == {*fetched, *feed.plain.near(0)}


def test_recall_is_the_attention_mass_of_the_tokens_attended_to(lab):
    text, facts = story(500, seed=8)
    recorded, _ = lab.read(torch.tensor([lab.tokenizer.encode(text)]))
    shown = recording.Shown(recorded, {(name, budget): functools.partial(lab.new[name], budget)
                                       for name in lab.new if name != "dense" for budget in (60, 900)})
    dense = recorded.fork()
    for token in lab.tokenizer.encode(facts[3][0])[:6]:
        assert torch.equal(*(lab.model(torch.tensor([[token]]), cache) for cache in (shown, dense)))
    assert set(map(len, shown.share.values())) == {6}
    for layer in range(4):
        last = {name: float(shares[-1]) for (l, name), shares in shown.share.items() if l == layer}
        q, k = dense.queries[layer][0, :, -1], dense.keys[layer][0, :, :dense.length].repeat_interleave(2, 0)
        weights = torch.softmax((k @ q[..., None])[..., 0] * 32 ** -0.5, -1).mean(0)
        assert last["StreamingLLM", 60] == pytest.approx(float(weights[:4].sum() + weights[-56:].sum()), abs=1e-4)
        for (name, budget), share in last.items():
            assert share <= last["oracle, tokens", budget] + 1e-6
            assert budget == 60 or share == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rule, rank", [("spread, half mean query", "spread"), ("bounds", "bounds"),
                                        ("mean, mean query (paper)", "mean")])
def test_the_rules_that_were_tried_contain_those_of_sentencekv(rule, rank):
    random, tried = Random(12), rules.Tried(70, TOY_FLAGS, rule, torch.ones(4))
    plain = ByDefinition(70, TOY_FLAGS, rank=rank)
    plain.starts_anew = False                                     # as all that is decoded here counts as one sentence
    for T in (160, 1, 1, 1):
        random.into(T, tried, plain)
    assert torch.equal(tried.mask[0], plain.mask[0])


def test_every_rule_that_was_tried_tells_sentences_apart():
    random, tried = Random(13), [rules.Tried(70, TOY_FLAGS, rule, 0.5 ** torch.arange(4)) for rule in rules.RULES]
    for T in (160, 1, 1):
        random.into(T, *tried)
    masks = [cache.mask[0] for cache in tried]
    assert all((mask.sum(-1) == 70).all() for mask in masks)
    assert sum(torch.equal(a, b) for a, b in itertools.combinations(masks, 2)) <= 3      # hardly two are the same


def test_what_the_rules_know_about_a_sentence():
    random, cache = Random(14), rules.Tried(70, TOY_FLAGS, "bounds", 0.5 ** torch.arange(4))
    random.into(90, cache)
    s, ids = rules.Summary(cache, 0, 0.5 ** torch.arange(4)), cache.ids[1]
    at = [i for i in range(4, 90) if ids[i] == 3]
    k = random.k[0][0, 1, 1, at].float()
    turned = torch.stack([rotate(x, torch.cos(-i * s.inv_freq), torch.sin(-i * s.inv_freq)) for i, x in zip(at, k)])
    half = -(-len(k) // 2)
    middle = sum(at) / len(at) * s.inv_freq
    weights = recording.attention_sums(random.q[0][0][:, :, -32:], random.k[0][0])[1, 1, at].float()[:, None]
    for mine, want in ((s.mean, k.mean(0)), (s.high, k.amax(0)), (s.low, k.amin(0)),
                       (s.deviation, k.std(0, correction=0)), (s.plain_mean, turned.mean(0)),
                       (s.plain_high, turned.amax(0)), (s.halves[0], k[:half].mean(0)), (s.halves[1], k[half:].mean(0)),
                       (s.middle_mean, rotate(turned.mean(0), middle.cos(), middle.sin())),
                       (s.outlier, max(k, key=lambda x: float((x - k.mean(0)).norm()))),
                       (s.weighted_mean, (k * weights).sum(0) / weights.sum())):
        assert (mine[1, 1, 0, 3] - want).abs().max() < 1e-3


# What the commands of quality.py do

@torch.no_grad()
def test_an_answer_is_right_exactly_if_greedy_generation_gives_it(lab):
    said = []
    text, batches = next(quality.documents(lab, 5, 4, 4, 400, lab.tokenizer, 8, 0.0, 3))
    recorded, _ = lab.read(text)
    for _, questions, answers in (zip(*batch) for batch in batches):
        asked, next_token = lab.read(torch.tensor(questions), recorded)
        for name in ("dense", "SentenceKV", "StreamingLLM"):
            judged = lab.answered(start(lab.new[name](64), asked), next_token, answers)
            tokens = torch.cat((text, torch.tensor(questions)), 1)
            rows = [lab.model.generate(row[None], lab.new[name](64), len(ids)) for row, ids in zip(tokens, answers)]
            assert judged == [[int(t) for t in row] == ids for row, ids in zip(rows, answers)]
            said += judged
    assert {True, False} == {*said}


def test_a_document_has_the_length_and_tells_the_facts_it_is_asked_about(lab):
    for facts, prose, asked in ((1, 0.0, 1), (8, 1.0, 3)):
        ids, questions = quality.document(random.Random(3), 600, lab.tokenizer, facts, prose, asked)
        text = lab.tokenizer.decode(ids)
        assert len(ids) == 600 and len(questions) == asked and text.startswith("<|begin_of_text|>")
        for depth, question, answer in questions:
            told = lab.tokenizer.decode(answer)
            assert told in text and told.split(" is ")[0].removeprefix(" The") in lab.tokenizer.decode(question)
            assert abs(text.index(told) / len(text) - depth) < 0.15
    with pytest.raises(ValueError, match="40 tokens are too few to tell 8 facts"):
        quality.document(random.Random(3), 40, lab.tokenizer, 8, 0.0, 1)
    a, b, c = (quality.document(random.Random(seed), 600, lab.tokenizer, 8, 0.0, 2) for seed in (1, 1, 2))
    assert a == b != c


FEW = ["--methods", "dense", "SentenceKV", "StreamingLLM", "--lengths", "512", "--parts", "8"]


def cells(out, name):
    """The numbers of a method's line in a printed table, without the intervals."""
    (line,) = re.findall(rf"(?m)^\| {re.escape(name)} \|(.*)\|$", out)
    return [float(cell.split()[0]) for cell in line.split("|")]


def test_needles_are_found_by_length_and_depth_and_a_log_goes_on_where_it_stopped(tmp_path, capsys):
    log, arguments = tmp_path / "log.jsonl", ["needles", *FEW, "--n", "6", "--seeds", "1", "2"]
    arguments += ["--log", str(log), "--svg", str(tmp_path)]
    assert quality.main(arguments) == 0
    first = capsys.readouterr()
    assert cells(first.out, "dense") == [1.0] and cells(first.out, "SentenceKV")[0] > 0.7
    assert cells(first.out, "StreamingLLM")[0] < 0.5
    assert "8 facts, grammar, 1/8 | 512" in first.out and first.err.count("(512, 8, 0.0, 6, ") == 2
    done = log.read_text()
    assert done.count("\n") == 2 and len(json.loads(done.splitlines()[0])["right"]["8"]["dense"]) == 6
    assert quality.main(arguments) == 0
    again = capsys.readouterr()
    assert again.err == "" and log.read_text() == done
    assert [line for line in again.out.splitlines() if line[:1] == "|"] == [
        line for line in first.out.splitlines() if line[:1] == "|"]
    svg = ElementTree.parse(tmp_path / "needles-8-facts-grammar-8.svg").getroot()
    assert len([e for e in svg if e.tag.endswith("rect")]) == 3 * 10
    log.write_text("{}\n")
    assert quality.main(arguments) == 2
    assert re.fullmatch(r"error: .*log.jsonl, line 1: needs a field 'key' of type list\n", capsys.readouterr().err)


def test_a_follow_up_is_asked_on_the_same_cache(capsys):
    assert quality.main(["followup", *FEW[:3], "SnapKV", *FEW[4:], "--n", "6", "--lengths", "1024"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "dense") == [1, 1, 1] and min(cells(out, "SentenceKV")) >= 0.8
    assert cells(out, "SnapKV")[1] <= 0.5


@torch.no_grad()
def test_a_follow_up_reads_every_token_once_and_a_fresh_prompt_has_the_second_question_alone(lab, monkeypatch):
    made = []

    class Spy(recording.Recorder):
        def __init__(self, budget):
            super().__init__()
            made.append(self)
    monkeypatch.setattr(lab, "new", {"spy": Spy})
    assert quality.ask_twice(lab, 500, 8, 0.0, 1, 7, 8) == {"spy": [[True, True, True]]}
    ids, ((_, q1, a1), (_, q2, a2)) = quality.document(random.Random(7), 484, lab.tokenizer, 8, 0.0, 2)
    assert [cache.tokens[0].tolist() for cache in made] == [ids + q1 + a1 + q2 + a2[:-1], ids + q2 + a2[:-1]]


@torch.no_grad()
def test_perplexity_is_that_of_the_last_tokens_given_all_before(lab, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(story(2500, seed=3)[0], encoding="utf-8")
    arguments = ["perplexity", *FEW, "--text", str(tmp_path / "text.txt"), "--n", "3", "--score", "20"]
    (rows,) = quality.pieces(lab, quality.parse(arguments), 512, seed=1)
    assert rows.shape == (3, 512) and len({*map(tuple, rows.tolist())}) == 3
    logits = lab.model(rows[:, :-1], DenseKV(), all_logits=True)[:, -20:]
    loss = -logits.log_softmax(-1).gather(2, rows[:, -20:, None]).mean()
    monkeypatch.setattr(lab, "new", {"StreamingLLM": baselines.StreamingLLM, "dense": lab.new["dense"]})
    quality.perplexity(lab, quality.parse(arguments))
    out = capsys.readouterr().out
    perplexity, ratio = cells(out, "StreamingLLM")
    assert cells(out, "dense") == [pytest.approx(float(loss.exp()), abs=1e-3), 1.0]
    assert ratio == pytest.approx(perplexity / float(loss.exp()), abs=1e-3) and abs(ratio - 1) > 1e-3
    assert quality.main(["perplexity", *FEW, "--text", "lessons", "--n", "6"]) == 0
    out = capsys.readouterr().out
    assert 1.0 < cells(out, "SentenceKV")[1] < cells(out, "StreamingLLM")[1]


@pytest.mark.parametrize("text", ["library", "help", "lessons"])
def test_pieces_of_text_are_of_the_length_asked_for_and_repeatable(lab, text):
    args = quality.parse(["perplexity", "--text", text, "--n", "2"])
    a, b, c = (torch.cat(quality.pieces(lab, args, 256, seed)) for seed in (1, 1, 2))
    assert a.shape == (2, 256) and torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:, 0] == lab.tokenizer.bos_id).all()


def test_recall_decodes_the_answers_of_needles_and_the_end_of_texts(lab):
    args = quality.parse(["recall", "--n", "2", "--score", "6", "--text", "help"])
    (prompt, tokens), = quality.to_decode(lab, args, "text", 256, 4)
    (rows,) = quality.pieces(lab, args, 256, 4)
    assert tokens.shape == (2, 6) and torch.equal(torch.cat((prompt, tokens), 1), rows)
    for prompt, tokens in quality.to_decode(lab, args, "needles", 500, 4):
        text = lab.tokenizer.decode(prompt[0].tolist())
        assert text.endswith("?") and lab.tokenizer.decode(tokens[0].tolist()) in text


def test_recall_of_needles_and_of_text_is_told_by_layer(capsys):
    methods = ["SentenceKV", "oracle, tokens"]
    assert quality.main(["recall", *FEW[4:], "--methods", *methods, "--n", "1", "--score", "6", "--text", "help"]) == 0
    out = capsys.readouterr().out
    tables = out.split("\n\n")[1:3]
    assert "needles, 512 tokens, 1/8" in tables[0] and "help, 512 tokens, 1/8" in tables[1]
    for part in tables:
        ours, best = cells(part, "SentenceKV"), cells(part, "oracle, tokens")
        assert len(ours) == 5 and all(0 < a <= b <= 1 for a, b in zip(ours, best))
        assert ours[4] == pytest.approx(sum(ours[:4]) / 4, abs=2e-3)


@pytest.mark.parametrize("arguments, message", [
    (["needles", "--methods", "nonsense"], "error: --methods: there is no 'nonsense', but 'dense', 'SentenceKV'"),
    (["needles", "--n", "0"], "error: --n must be at least 1"),
    (["needles", "--lengths", "64", "--facts", "8"], "error: 48 tokens are too few to tell 8 facts"),
    (["needles", "--model", "nowhere"], "error: .*nowhere"),
    (["perplexity", "--text", "nowhere.txt"], "error: .*nowhere.txt"),
    (["perplexity", "--text", "README.md", "--n", "90"], "error: README.md: .* too few for --n 90 pieces of 2048"),
    (["ruler", "nowhere.jsonl"], "error: .*nowhere.jsonl"),
])
def test_quality_says_what_is_wrong_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert quality.main(arguments) == 2
    err = capsys.readouterr().err
    assert re.match(message, err) and err.count("\n") == 1


@pytest.mark.parametrize("module", [baselines, benchmarks, figures])
def test_examples_in_experiments_are_true(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 2


def test_wilsons_interval_is_the_one_of_the_textbook():
    assert figures.wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert figures.wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert figures.wilson(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert figures.share_of([True, False, True, True]) == "0.750 (.301-.954)"


def test_bootstrap_is_about_two_standard_errors_wide():
    values = [random.Random(1).gauss(5, 2) for _ in range(1)] + [random.Random(i).gauss(5, 2) for i in range(400)]
    low, high = figures.bootstrap(values)
    assert low < sum(values) / len(values) < high and 0.3 < high - low < 0.5
    assert figures.bootstrap([3.0] * 9) == (3.0, 3.0)


def test_heat_maps_show_every_cell(tmp_path):
    rows = {1024: figures.heat([0.0, 0.31, 0.32, 1.0], [True, True, False, False], 4), 2048: [1.0, 0.5, 0.99, 0.0]}
    assert rows[1024] == [1.0, 0.5, None, 0.0]
    assert figures.heat_text("T", rows) == ["T", "    1024  #5.0", "    2048  #590"]
    figures.heat_svg({"a < b": rows, "c": rows, "d": rows, "e": rows}, tmp_path / "map.svg")
    svg = ElementTree.parse(tmp_path / "map.svg").getroot()
    cells = [e for e in svg if e.tag.endswith("rect")]
    assert len(cells) == 32 and len({(e.get("x"), e.get("y")) for e in cells}) == 32
    assert [e.get("fill") for e in cells[:4]] == ["hsl(120,65%,50%)", "hsl(60,65%,50%)", "#ddd", "hsl(0,65%,50%)"]
    assert [e[0].text for e in cells[:4]] == ["1.00", "0.50", "no data", "0.00"]
    assert all(float(e.get("x")) + float(e.get("width")) <= float(svg.get("width")) for e in cells)
    assert all(float(e.get("y")) + float(e.get("height")) <= float(svg.get("height")) for e in cells)


# RULER and LongBench

def test_scores_of_known_answers():
    assert benchmarks.f1("The answer is: Paris!", "paris") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))   # the: gone
    assert benchmarks.f1("rome rome", "rome") == pytest.approx(2 / 3) and benchmarks.f1("", "rome") == 0.0
    assert benchmarks.f1("Oslo", "Rome") == 0.0 and benchmarks.f1("A Rome", "the rome.") == 1.0
    assert benchmarks.rouge_l("the cat sat", "the cat sat") == 1.0 and benchmarks.rouge_l("a b", "c d") == 0.0
    assert benchmarks.rouge_l("The Cat", "the cAT") == 1.0
    assert benchmarks.rouge_l("b a", "a b") == 0.5                              # in order: one of two words
    assert benchmarks.rouge_l("police killed the gunman", "police kill the gunman") == 0.75
    assert benchmarks.exact("The Rome.", "rome") == 1.0 and benchmarks.exact("Rome now", "rome") == 0.0
    assert benchmarks.all_in("12, 34", ["12", "99"]) == 0.5 and benchmarks.any_in("12, 34", ["99", "12"]) == 1.0
    assert benchmarks.any_in("Lorem", ["ipsum"]) == 0.0 and benchmarks.all_in("FITJT and x", ["fitjt"]) == 1.0
    assert benchmarks.best(benchmarks.f1, ["rome", "in oslo"], False, "oslo") == pytest.approx(2 / 3)
    assert benchmarks.best(benchmarks.exact, ["rome"], True, "\nRome\nQuestion: more") == 1.0
    assert benchmarks.best(benchmarks.exact, ["rome"], False, "\nRome\nQuestion: more") == 0.0


def test_the_middle_of_a_long_prompt_is_cut():
    assert benchmarks.cut_middle([*range(9)], 9) == [*range(9)] and benchmarks.cut_middle([*range(9)], 2) == [0, 8]
    assert benchmarks.cut_middle([*range(9)], 5) == [0, 1, 6, 7, 8]


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("content, message", [
    ("", "no records in it"), ("{\n", "line 1: no JSON"),
    ('{"input": "x", "outputs": ["y"]}\n\n[1]\n', "line 3: needs a field 'input'"),
    ('{"outputs": ["y"]}', "line 1: needs a field 'input' of type str"),
    ('{"input": "x", "outputs": "y"}', "line 1: needs a field 'outputs' of type list"),
    ('{"input": "x", "outputs": []}', "line 1: needs a field 'outputs' of type list"),
    ('{"input": "x", "outputs": [7]}', "line 1: needs a field 'outputs' of type list"),
])
def test_a_bad_benchmark_file_gives_one_line_that_names_it(tmp_path, capsys, content, message):
    (tmp_path / "4096_niah.jsonl").write_text(content)
    assert quality.main(["ruler", str(tmp_path / "4096_niah.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "4096_niah.jsonl" in err and message in err and err.count("\n") == 1


def test_ruler_files_are_run_and_scored(tmp_path, capsys):
    """Files of RULER's format, in the language of the tiny model: a right, a half right and a wrong record."""
    text, facts = story(900, facts=6, seed=4)
    question, answer = facts[2]
    value = answer.split(" is ")[1].rstrip(".")
    record = lambda *outputs: {"index": 0, "input": "<|begin_of_text|>" + text + question, "outputs": outputs}
    files = [write_jsonl(tmp_path / "4096_niah_single_1.jsonl", record(value.upper()), record(value, "nonsense")),
             write_jsonl(tmp_path / "4096_qa_1.jsonl", record("nonsense", value), record("nonsense"))]
    assert quality.main(["ruler", *files, *FEW[:3], "--max-new-tokens", "12", "--parts", "8"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "dense") == [75.0, 50.0] and cells(out, "SentenceKV") == [75.0, 50.0]
    assert quality.main(["ruler", files[0], *FEW[:2], "--n", "1", "--max-new-tokens", "1"]) == 0
    assert cells(capsys.readouterr().out, "dense") == [0.0]                     # cut off before the value
    assert quality.main(["ruler", files[0], *FEW[:2], "--max-length", "30", "--max-new-tokens", "12"]) == 0
    assert cells(capsys.readouterr().out, "dense")[0] < 75.0                    # the fact was in the middle


def test_ruler_prompts_hold_their_own_special_tokens(tok, lab):
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>Hi<|eot_id|>"
    ids = benchmarks.ruler_prompt(tok, {"input": text})
    assert ids[:2] == [tok.added["<|begin_of_text|>"], tok.added["<|start_header_id|>"]] and tok.decode(ids) == text
    assert benchmarks.ruler_prompt(lab.tokenizer, {"input": "Hi"}) == lab.tokenizer.encode("Hi", bos=True)


def test_longbench_prompts_keep_both_ends_and_the_question(tok, lab):
    record = {"context": "start " + "the " * 900 + "end", "input": "Who is it?", "answers": ["me"]}
    for tokenizer in (tok, lab.tokenizer):
        ids = benchmarks.longbench_prompt(tokenizer, record, 200)
        text = tokenizer.decode(ids)
        assert 150 < len(ids) <= 210 and ids[0] == tokenizer.bos_id and "start the the" in text and "the end\n" in text
        assert "Question: Who is it?\nAnswer:" in text
        short = tokenizer.decode(benchmarks.longbench_prompt(tokenizer, {**record, "context": "One."}, 200))
        assert "One.\n\nAnswer from" in short
    assert tok.decode(benchmarks.longbench_prompt(tok, record, 200)).endswith("<|end_header_id|>\n\n")


def test_longbench_files_are_run_and_scored(tmp_path, monkeypatch, capsys):
    """With a model that says known things: prompts, answers and scores are those of the data set, or of --metric."""
    asked = []

    def says(lab, ids, length, args):
        asked.append((lab.tokenizer.decode(ids), length))
        for name in lab.new:
            yield name, "Rome and Oslo\nmore"
    monkeypatch.setattr(benchmarks, "answers", says)
    record = {"context": "Long.", "input": "Where?", "answers": ["Paris", "rome"]}
    qa = write_jsonl(tmp_path / "a.jsonl", {**record, "dataset": "hotpotqa"},
                     {**record, "answers": ["oslo and rome more"]})
    trec = write_jsonl(tmp_path / "trec.jsonl", {**record, "answers": ["Rome and Oslo"]})
    assert quality.main(["longbench", qa, trec, "--methods", "dense"]) == 0
    assert cells(capsys.readouterr().out, "dense") == [pytest.approx(100 * (0.4 + 1) / 2, abs=0.1), 100.0]
    assert [length for _, length in asked] == [32, 64, 64] and "Long." in asked[0][0] and "Where?" in asked[0][0]
    assert quality.main(["longbench", qa, trec, *FEW[:2], "--metric", "exact", "--max-new-tokens", "5"]) == 0
    assert cells(capsys.readouterr().out, "dense") == [0.0, 100.0] and asked[-1][1] == 5


# The loss that trains the paper's rule

def test_the_alignment_loss_is_the_cross_entropy_from_attention_to_the_papers_scores():
    rng, B, L, H, G, d = torch.Generator().manual_seed(0), 2, 60, 2, 2, 4
    tokens = torch.multinomial(torch.tensor([3.0, 6, 0, 1.5]), B * L, True, generator=rng).view(B, L)
    weights = torch.full((B, L), 0.05)
    weights[:, [5, 30, 41, 59]] = VALUE
    cache = align.AligningCache(tokens, weights, torch.arange(L).expand(B, L), TOY_FLAGS)
    q, k = (torch.randn(B, heads, L, d, generator=rng, dtype=torch.float64) for heads in (H * G, H))
    losses = []
    for b in range(B):
        ids = plain_sentences(tokens[b].tolist(), 0, 64)
        for t in [t for t in (5, 30, 41, 59) if ids[t] > 1]:
            for h in range(H):
                group = q[b, h * G:h * G + G]
                attention = torch.stack([torch.softmax(k[b, h, :t + 1] @ one[t] / 2, 0) for one in group]).mean(0)
                members = [[i for i in range(L) if ids[i] == s] for s in range(ids[t] - 1)]      # not the one before
                mean = group[:, [i for i in range(t + 1) if ids[i] == ids[t]]].mean((0, 1))
                scores = torch.stack([4 * mean @ k[b, h, at].mean(0) / 2 for at in members]).log_softmax(0)
                losses.append(-sum(attention[at].sum() * score for at, score in zip(members, scores)))
    found = cache.alignment(q.unflatten(1, (H, G)), k)
    assert len(losses) > 8 and float(found) == pytest.approx(float(sum(losses) / len(losses)), abs=1e-4)
    out = cache.attend(0, q, k, k)
    assert float(cache.extra_loss) == pytest.approx(0.3 * float(found), abs=1e-5)
    assert_close(out, TrainingCache(None).attend(0, q, k, k))


@torch.enable_grad()
def test_training_against_the_alignment_loss_lowers_it(tiny):
    model, tokenizer, _ = tiny
    model = Llama.from_pretrained(TINY, dtype=torch.float32).requires_grad_(True)
    tokens, weights, positions = batch(random.Random(1), 2, 256, 0, 0.0, tokenizer)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(6):
        torch.manual_seed(0)                                          # the same rows every time
        cache = align.aligning(tokenizer)(tokens[:, :-1], weights, positions)
        model(tokens[:, :-1], cache)
        losses.append(float(cache.extra_loss.detach()))
        optimizer.zero_grad()
        cache.extra_loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ------------------------------------------------------------------------------- 14. speed: the benchmark runs


def test_the_quick_benchmark_runs_and_writes_figures_and_plots(tmp_path, capsys):
    assert speed.main(["--quick", "--json", str(tmp_path / "a.json"), "--svg", str(tmp_path / "a.svg")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report.keys() == {"machine", "cores", "torch", "threads", "command", "results"}
    variants = {(row["mode"], row["variant"]) for row in report["results"]}
    for name in measure.options(1024):
        assert {("one layer", name), ("whole model", name), ("parts", name)} <= variants
    for row in report["results"]:
        assert row["parts"]["in all"] > 0 if row["mode"] == "parts" else 0 < row["low"] <= row["ms"] <= row["high"]
    plots = sorted(tmp_path.glob("*.svg"))
    assert [p.name for p in plots] == ["a-one-layer.svg", "a-prefill-1-layers.svg", "a-whole-model.svg"]
    for plot in plots:
        drawn = ElementTree.parse(plot).getroot()
        assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) >= 4
    out = capsys.readouterr().out
    assert all(word in out for word in (report["machine"], "x its copy floor", "against dense", "tokens/s", "ranking"))


def test_steps_are_measured_over_whole_cycles_and_told_by_the_step(monkeypatch):
    monkeypatch.setattr(measure, "timed", lambda f, device: f() and 8.0 or 8.0)
    calls = []
    step, before = lambda: calls.append("step"), lambda: calls.append("before")
    times, befores = measure.interleaved({"a": (step, 4, before), "b": (step, 4, None)}, 9, "cpu", warm=0)
    assert times == {"a": [8.0] * 9, "b": [2.0] * 9} and befores == {"a": [8.0] * 9, "b": [0.0] * 9}
    a, b = ["before", "step"] * 4, ["step"] * 4
    rounds = [calls[i:i + 12] for i in range(0, 9 * 12, 12)]          # every round has both, in another order
    assert len(calls) == 9 * 12 and all(r in (a + b, b + a) for r in rounds) and a + b in rounds and b + a in rounds


def test_the_docstring_examples_of_the_benchmark_are_true():
    for module in (measure, svg):
        assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted > 0


@pytest.mark.parametrize("arguments, message", [
    ("--lengths 8K,x", "--lengths 8K,x: not numbers"), ("--lengths 1", "--lengths must be from 256"),
    ("--shape huge", "unknown shape 'huge'; known: llama-3.1-8b"), ("--model huge", "unknown shape 'huge'"),
    ("--budget 20", r"budget 20 must exceed sink \+ recent"), ("--rounds -1", "--rounds must be"),
    ("--device nonsense", "--device nonsense cannot be used"), ("--json nowhere/x", "nowhere/x: there is no such"),
    ("--budget x", "argument --budget: invalid int"), ("--what", "unrecognized arguments"),
])
def test_the_benchmark_says_what_is_wrong_in_one_line(arguments, message, capsys):
    assert speed.main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert re.match("error: " + message, err) and err.count("\n") == 1


@pytest.mark.parametrize("setting", [dict(rank="mean"), dict(rank="bounds"), dict(keep=2, pool=7, window=8)])
def test_a_cache_filled_directly_is_the_one_that_has_read(setting):
    rng = torch.Generator().manual_seed(0)
    k, v, new = (torch.randn(1, 2, n, 16, generator=rng) for n in (500, 500, 1))
    queries = torch.randn(6, 1, 8, 1, 16, generator=rng)
    options = dict(budget=64, recent=8, **setting)
    with pytest.MonkeyPatch.context() as patch:                                  # the same queries judge (keep=2)
        patch.setattr(torch, "randn", lambda *shape, **_: torch.ones(shape))
        cache = measure.filled(k, v, 4, layers=3, **options)
    read = SentenceKV(measure.made_up_flags(), **options)
    read.begin(measure.made_up_tokens(500))
    for layer in range(3):
        read.attend(layer, torch.ones(1, 8, 500, 16), k, v)
    for q in queries:
        outs = []
        for c in (cache, read):
            c.begin(torch.zeros(1, 1, dtype=torch.long))
            outs.append(torch.stack([c.attend(layer, q, new, new) for layer in range(3)]))
        assert torch.equal(*outs)
    assert cache.memory() == read.memory()


def test_layers_share_the_host_memory_that_there_is():
    k = torch.randn(1, 2, 500, 16)
    for most, distinct in ((0, 1), (1 << 19, 3), (1 << 30, 4)):                   # a layer: 144 KB
        hosts = measure.Hosts(most)
        for _ in range(2):                                                       # the second cache takes the same
            cache = measure.filled(k, k, 4, layers=4, hosts=hosts, budget=64)
            assert len({kv.data_ptr() for kv in cache.pool.kv.values()}) == len(*hosts.kinds.values())
        assert len(*hosts.kinds.values()) == distinct


def test_parts_tell_where_the_time_and_the_bytes_go_and_leave_nothing_behind():
    before = sentencekv.select, sentencekv.HostPool.fetch, sentencekv.RANKS["mean"].vector, SentenceKV.begin
    k = torch.randn(1, 2, 500, 16)
    cache, token = measure.filled(k, k, 4, budget=64), torch.zeros(1, 1, dtype=torch.long)
    step = lambda: (cache.begin(token), cache.attend(0, torch.randn(1, 8, 1, 16), k[:, :, :1], k[:, :, :1]))
    ms, moved = parts.parts_of(step, 1, "cpu", 5)
    assert {"ranking: product", "ranking: pick", "fetch", "attention", "store", "rest", "in all"} <= ms.keys()
    assert min(ms.values()) >= 0 and abs(sum(ms.values()) - 2 * ms["in all"]) < 1e-6
    assert moved == 65 * 2 * 2 * 16 * 4                                          # 64 places are fetched, 1 is stored
    assert before == (sentencekv.select, sentencekv.HostPool.fetch, sentencekv.RANKS["mean"].vector, SentenceKV.begin)


def tensors_in(*things):
    """All tensors in CPU memory among things, and in lists of them."""
    for x in things:
        if isinstance(x, (list, tuple)):
            yield from tensors_in(*x)
        elif type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu":
            yield x


class PretendedStream:
    """A stream that does everything at once; an event as well."""

    def __init__(self, device=None, enable_timing=False):
        self.timed = enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        assert self.timed and end.timed, "events without enable_timing"
        return 1e3 * (end.at - self.at)

    def wait_stream(self, other):
        assert isinstance(other, PretendedStream)

    record_event, synchronize, wait_event = lambda self: PretendedStream(), lambda self: None, wait_stream


class PretendedGraph:
    """The calls that were captured, with the tensors that they had and gave; replay() makes them anew, in place."""

    def __init__(self):
        self.calls, self.before = [], {}

    def replay(self):
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tensors_in(result), tensors_in(func(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class PretendedGPU(TorchFunctionMode):
    """While it lasts there is a CUDA device, in CPU memory: storages that were made on it are marked (`here`), and
    their tensors say that they are on CUDA.

    As with a real one: tensors of both sides cannot be mixed; moving a tensor copies it; pinned memory can be seen from
    the device, if zero_copy; a sync is an error while a graph is captured, or if set_sync_debug_mode() says so; a
    capture changes no memory; bytes on the device are counted. But all is done at once, and the bits are the CPU's.
    """

    def __init__(self, patch):
        super().__init__()
        self.zero_copy, self.strict, self.graph, self.bytes, self.peak = True, False, None, 0, 0
        for name, fake in dict(
                Stream=PretendedStream, Event=PretendedStream, CUDAGraph=PretendedGraph, graph=self.capture,
                stream=nullcontext, current_stream=PretendedStream, is_available=lambda: True, _sleep=lambda n: None,
                synchronize=lambda device=None: self.demand(not self.graph, "a sync while a graph is captured"),
                is_current_stream_capturing=lambda: self.graph is not None, get_device_name=lambda device=None: "none",
                set_sync_debug_mode=lambda mode: setattr(self, "strict", mode == "error"),
                memory_stats=lambda: {"requested_bytes.all.current": self.bytes},
                mem_get_info=lambda device: (1 << 30, 1 << 30), max_memory_allocated=lambda: self.peak,
                reset_peak_memory_stats=lambda: setattr(self, "peak", self.bytes)).items():
            patch.setattr(torch.cuda, name, fake)
        generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device=None: generator())
        patch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.wait_stream(stream))

    def demand(self, ok, message):
        if not ok:
            raise RuntimeError(message)

    @contextlib.contextmanager
    def capture(self, graph):
        self.graph = graph
        yield
        self.graph = None
        for storage, old in graph.before.values():
            storage.copy_(old)

    def count(self, more):
        self.bytes += more
        self.peak = max(self.peak, self.bytes)

    def is_here(self, x):
        return getattr(x.untyped_storage(), "here", False)

    def alias(self, owner):
        """Pinned memory as the device sees it: another storage at the same place."""
        memory, host = owner.__cuda_array_interface__, owner.host.untyped_storage()
        self.demand(self.zero_copy and host.pinned, "this memory cannot be seen from the device")
        raw = (ctypes.c_uint8 * memory["shape"][0]).from_address(memory["data"][0])
        raw.owner = owner
        return torch.frombuffer(raw, dtype=torch.uint8)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, args, kwargs, device = func.__name__, list(args), dict(kwargs or {}), None
        getter = func.__self__.__name__ if name == "__get__" else None
        if getter in ("device", "is_cuda") and self.is_here(args[0]):
            return torch.device("cuda", 0) if getter == "device" else True
        if getter or func is torch.device:
            return func(*args, **kwargs)
        if name in ("cpu", "cuda"):
            func, args = torch.Tensor.to, [args[0], name]
        for held, key, x in [(args, *pair) for pair in enumerate(args)] + [(kwargs, *pair) for pair in kwargs.items()]:
            if isinstance(x, torch.device) or type(x) is str and x in ("cpu", "cuda"):
                device = torch.device(x).type
                held[key] = "cpu" if device == "cuda" else x
        pinned, given = kwargs.pop("pin_memory", False), list(tensors_in(*args, *kwargs.values()))
        if name == "is_pinned":
            return getattr(given[0].untyped_storage(), "pinned", False)
        sides = {self.is_here(x) for x in given if x.ndim or self.is_here(x)}    # a CPU number goes with both
        here = device == "cuda" if device else True in sides
        moves = func is torch.Tensor.to and here != self.is_here(args[0])
        waits = (moves or len(sides) == 2) and not kwargs.get("non_blocking") or True in sides and name in (
            "item", "tolist", "nonzero", "equal", "__int__", "__bool__", "__float__", "__index__")
        self.demand(len(sides) < 2 or name in ("copy_", "__setitem__"), f"{name}() of tensors on CUDA and on the CPU")
        self.demand(not waits or not self.strict and not self.graph, f"{name}() waits for the device")
        if moves:
            args[0] = args[0].clone()
        if hasattr(args and args[0], "__cuda_array_interface__"):
            func, kwargs = self.alias, {}
        if self.graph:
            for storage in (x.untyped_storage() for x in given):
                self.graph.before.setdefault(storage._cdata, (storage, storage.clone()))
        result, known = func(*args, **kwargs), {x.untyped_storage()._cdata for x in given}
        if self.graph:
            self.graph.calls.append((func, args, kwargs, result))
        for storage in (x.untyped_storage() for x in tensors_in(result)):
            if storage._cdata not in known and not hasattr(storage, "here"):
                storage.here, storage.pinned, size = here, pinned, here * (func != self.alias) * storage.nbytes()
                self.count(size)
                weakref.finalize(storage, self.count, -size)
        return result


@pytest.fixture
def pretended_gpu(monkeypatch):
    sentencekv.zero_copy_works.cache_clear()
    with PretendedGPU(monkeypatch) as gpu:
        yield gpu
        gc.collect()                                                  # pools end while there is a device to wait for
    sentencekv.zero_copy_works.cache_clear()


def test_the_dense_caches_that_are_measured_are_dense(pretended_gpu):
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 300, 16, generator=rng) for _ in range(2))
    buffers = lambda x: measure.Dense.buffers(x, 3, 1 << 30)
    caches = [DenseKV(), measure.Dense(measure.folded, buffers(k), buffers(v), 300),
              measure.Dense(measure.matmul, buffers(k), buffers(v), 300),
              measure.Offloaded(measure.folded, k, v, 3, 1 << 30)]
    caches[0].begin(torch.zeros(1, 300, dtype=torch.long))
    for layer in range(3):
        caches[0].attend(layer, torch.zeros(1, 8, 300, 16), k, v)
    for _ in range(5):
        for cache in caches:
            assert cache.begin(torch.zeros(1, 1, dtype=torch.long)).tolist() == [[cache.length - 1]]
        for layer in range(3):
            q, k, v = (torch.randn(1, heads, 1, 16, generator=rng) for heads in (8, 2, 2))
            outs = [cache.attend(layer, q, k, v) for cache in caches]
            for out in outs[1:]:
                assert (out - outs[0]).abs().max() < 1e-5


def test_the_gpu_check_needs_a_gpu_and_says_so_in_one_line():
    command = [sys.executable, str(ROOT / "experiments" / "gpu_check.py")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = lambda *arguments: subprocess.run([*command, *arguments], capture_output=True, text=True, env=hidden)
    done, helped, wrong = run(), run("--help"), run("--only", "nothing")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "no CUDA device" in done.stderr
    assert helped.returncode == 0 and "--only" in helped.stdout
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no section 'nothing'")
    assert wrong.stderr.count("\n") == 1


def test_a_section_of_the_gpu_check_that_crashes_or_hangs_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    python = lambda code: [sys.executable, "-c", code]
    monkeypatch.setattr(gpu_check, "SECTIONS", {
        "crash": (20, python("import os; os.abort()")), "hang": (1, python("import time; time.sleep(60)")),
        "fine": (20, python("import os; open(os.environ['GPU_CHECK_FILE'], 'w').write('{\"rows\": [{\"tokens\": 8192, "
                            "\"variant\": \"dense\", \"ms\": 2, \"floor\": 1}]}')"))})
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    monkeypatch.setattr(measure, "setup", lambda device: dict(machine="this", torch="t", command="c"))
    assert gpu_check.everything(["crash", "hang", "fine"], 1, tmp_path / "out") == 1
    results = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["sections"]
    assert [x["outcome"] for x in results.values()] == ["failed", "out of time", "ok"]
    assert (tmp_path / "out" / "gpu_check.svg").is_file()
    assert gpu_check.everything(["fine"], 0.001, tmp_path / "out") == 0


def finite(x):
    """Are all numbers in x, as read from JSON, finite?"""
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return all(map(finite, inner)) and (type(x) not in (int, float) or math.isfinite(x))


SPEEDS = ["to device", "to host", "on device", "zero_copy", *(f"{n} rows" for n in (1024, 8192, 32768, 131072))]
PREFILL = ["seconds", "peak", "parts", "share", "building"]


@pytest.mark.parametrize("section, seconds, zero_copy, rows, checks, saved", [
    ("bandwidth", 9, True, 0, 0, SPEEDS), ("bandwidth", 9, False, 0, 0, SPEEDS),
    ("fetch", 9, True, 0, 14, []), ("fetch", 9, False, 0, 4, []), ("small", 9, True, 0, 0, []),
    ("decode-128K", 45, True, 10, 1, ["memory", "weights", "parts", "thousand"]),
    ("decode-8K", 9, True, 9, 0, ["memory", "weights", "parts"]), ("graph", 9, True, 2, 4, []),
    ("prefill", 60, True, 0, 1, PREFILL), ("prefill", 9, True, 0, 0, PREFILL)])       # all of it, and out of time
def test_a_section_of_the_gpu_check_runs_on_a_pretended_gpu(section, seconds, zero_copy, rows, checks, saved,
                                                           pretended_gpu, tmp_path, monkeypatch, capsys):
    """On a tiny model. What it says about times means nothing, the rest is checked as on a real GPU."""
    pretended_gpu.zero_copy, file = zero_copy, tmp_path / "section.json"
    for shape in ("llama-3.1-8b", "llama-3.2-1b"):
        monkeypatch.setitem(SHAPES, shape, SHAPES["tiny"])
    for name, value in dict(RESULTS={}, BUDGET=128, CYCLE=2, PROMPT=2048, CHUNK=300, SHORT=500, LONG=600, MANY=150,
                            COPIED=1 << 16).items():
        monkeypatch.setattr(gpu_sections, name, value)
    for name, n in (("8K", 500), ("128K", 600)):
        monkeypatch.setitem(gpu_check.SECTIONS, f"decode-{name}", (seconds, gpu_check.decoding(n)))
    monkeypatch.setenv("GPU_CHECK_FILE", str(file))
    assert gpu_check.main(["--section", section, "--seconds", str(seconds)]) == 0      # so all checks are true
    results = json.loads(file.read_text()) if file.exists() else {}
    assert finite(results) and results.keys() == {*saved, *["rows"] * (rows > 0), *["checks"] * (checks > 0)}
    assert len(results.get("checks", {})) == checks and len(results.get("rows", [])) == rows
    assert all(0 < row["floor"] and 0 < row["low"] <= row["ms"] for row in results.get("rows", []))
    if section == "decode-128K":
        grown = results["thousand"]
        assert 0 < grown["vectors grew"] <= grown["allocated grew"] < grown["vectors grew"] + 4096
        gpu_check.targets({"any": {"rows": [{**row, "tokens": n} for row in results["rows"]
                                            for n in (8192, 32768, 131072, 262144)]}})
        assert capsys.readouterr().out.split("targets\n")[1].count("\n") == 6 * 6     # six variants, none left out
