"""The properties that define SentenceKV, each against a plain definition in float64.

This file needs sentencekv.py, torch, pytest and hypothesis, and travels with it. The references
below share no code with the module: they keep every token in a list and loop.
"""
import ast
import doctest
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sentencekv
from sentencekv import (PAPER, RANKS, Segmenter, SentenceKV, importance, select, sentence_flags,
                        survivors)

torch.set_num_threads(1)    # the tensors are tiny
F64 = torch.float64
quick = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2 ** 31)
ranks = pytest.mark.parametrize("rank", RANKS)

# ------------------------------------------------------------------------- plain definitions

# A toy vocabulary: words, words after a space, full stops, ends of paragraphs, spaces.
TOY = [b"Word", b" Word", b".", b".\n\n", b" "]
TOY_FLAGS = sentence_flags(TOY)

def plain_sentences(tokens, sink, cap):
    """The sentence of every token of one row of the toy vocabulary. Sentence 0 is the sink."""
    numbers, number, size = [], 0, 0
    words = stop = space = paragraph = False    # the open sentence has words, ends with a stop ...
    for i, token in enumerate(tokens):
        starts = token != 4 and paragraph
        starts = starts or token in (0, 1) and stop and words and (space or token == 1)
        words = token in (0, 1) or words and not starts
        stop = token in (2, 3) or stop and token == 4
        space = token == 4
        paragraph = token == 3 or paragraph and token == 4
        if i >= sink:
            if i == sink or starts or size == cap:
                number, size = number + 1, 0
            size += 1
        numbers.append(number)
    return numbers

def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q (G, d), k and v (n, d)."""
    weights = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=-1)
    return weights @ v

def plain_scores(rank, q, mean_q, keys):
    """{sentence: score} for {sentence: keys (n, d)}; q and mean_q (G, d): the group's queries."""
    scores = dict.fromkeys(keys, 0.0)
    for now, mean in zip(q, mean_q):
        if rank == "mean":
            for s, k in keys.items():
                scores[s] += float(mean @ k.mean(0)) / len(q)
            continue
        x = (now + mean) / 2 / math.sqrt(q.shape[1])
        center = {s: float(x @ k.mean(0)) for s, k in keys.items()}
        edge = {s: center[s] + float(x.norm() * radius(k)) for s, k in keys.items()}
        for view in (center, edge):
            total = sum(math.exp(y) for y in view.values())
            for s, y in view.items():
                scores[s] += math.exp(y) / total
    return scores

def radius(keys):
    """Root mean square distance of keys (n, d) from their mean."""
    return math.sqrt(float(((keys - keys.mean(0)) ** 2).sum(1).mean()))

def plain_alpha(q, k, pool):
    """Importance of each token, by loops: q (Hq, N, d), k (H, T, d) -> list of T numbers."""
    (Hq, N, d), (H, T, _) = q.shape, k.shape
    alpha = [0.0] * T
    for head, n in itertools.product(range(Hq), range(N)):
        seen = T - N + n + 1
        logits = (k[head * H // Hq, :seen] @ q[head, n] / math.sqrt(d)).tolist()
        weights = [math.exp(x - max(logits)) for x in logits]
        for i in range(seen):
            alpha[i] += weights[i] / sum(weights)
    before, half = alpha[:T - N], pool // 2
    pooled = [max(before[max(0, i - half):i + half + 1]) for i in range(T - N)]
    return pooled + alpha[T - N:]

class Row:
    """One row of the batch as the definition sees it: lists of everything, per layer."""

    def __init__(self, layers):
        self.tokens = []
        self.stored = [[] for _ in range(layers)]       # positions that are stored
        self.k = [[] for _ in range(layers)]            # (H, d) for every position
        self.v = [[] for _ in range(layers)]
        self.queries = [[] for _ in range(layers)]      # (Hq, d) of the sentence being generated
        self.prompt_queries = [[] for _ in range(layers)]

class Feed:
    """Sends random q, k, v through a cache and says what attention is by definition."""

    def __init__(self, seed, B=1, Hq=4, H=2, d=8, layers=2, dtype=F64, words=None, **options):
        self.random = torch.Generator().manual_seed(seed)
        self.cache = SentenceKV(TOY_FLAGS, **options)
        self.s = self.cache.settings
        self.B, self.Hq, self.H, self.d, self.L, self.dtype = B, Hq, H, d, layers, dtype
        self.rows = [Row(layers) for _ in range(B)]
        self.weights = torch.tensor(words or [3.0, 6, 1, 0.5, 0.5])
        self.prompting = True

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=F64).to(self.dtype)

    def tokens(self, *lengths):
        """Random tokens (B, max(lengths)), row b has lengths[b] (or lengths[0]) of them."""
        lengths = lengths * self.B if len(lengths) == 1 else lengths
        T = max(*lengths, 1)
        ids = torch.multinomial(self.weights, self.B * T, True, generator=self.random)
        past_end = torch.arange(T) >= torch.tensor(lengths)[:, None]
        return ids.view(self.B, T).masked_fill(past_end, -1)

    def push(self, tokens, q=None, k=None, v=None):
        """One forward -> outputs (L, B, Hq, T, d); notes all that the definition needs."""
        T = tokens.shape[1]
        shape = [self.L, self.B, self.H, T, self.d]
        self.q = self.randn(self.L, self.B, self.Hq, T, self.d) if q is None else q
        k = self.randn(*shape) if k is None else k
        v = self.randn(*shape) if v is None else v
        positions = self.cache.begin(tokens)
        out = [self.cache.attend(l, self.q[l], k[l], v[l]) for l in range(self.L)]
        if T == 1 and self.prompting:
            self.prompting = False
            self.drop_tokens()
        for b, row in enumerate(self.rows):
            for t, token in enumerate(tokens[b].tolist()):
                if token >= 0:
                    assert positions[b, t] == len(row.tokens)
                    self.note(row, token, T, [x[:, b, :, t] for x in (self.q, k, v)])
        return torch.stack(out)

    def note(self, row, token, T, qkv):
        row.tokens.append(token)
        numbers = self.sentences(row)
        for l, (q, k, v) in enumerate(zip(*qkv)):
            row.stored[l].append(len(row.tokens) - 1)
            row.k[l].append(k.double())
            row.v[l].append(v.double())
            restarts = T > 1 or len(numbers) == 1 or numbers[-1] != numbers[-2]
            row.queries[l] = [] if restarts else row.queries[l]
            if T == 1:
                row.queries[l].append(q.double())
            elif self.prompting:
                row.prompt_queries[l].append(q.double())

    def drop_tokens(self):
        """keep=r, by definition: the floor(r * budget) tokens with the largest alpha remain."""
        n = int((self.s.keep or 0) * self.s.budget)
        for row, l in itertools.product(self.rows, range(self.L)):
            T = len(row.tokens)
            if self.s.keep and T > n:
                q = torch.stack(row.prompt_queries[l][-self.s.window:], dim=1)
                alpha = plain_alpha(q, torch.stack(row.k[l], dim=1), self.s.max_pool)
                for i in self.near(row):
                    alpha[i] = math.inf
                best = sorted(range(T), key=lambda i: -alpha[i])[:n]
                row.stored[l] = sorted(best)

    def sentences(self, row):
        return plain_sentences(row.tokens, self.s.sink, self.s.max_sentence)

    def near(self, row):
        """Positions always attended to: the sink, and the last tokens with their sentences."""
        numbers, n = self.sentences(row), len(row.tokens)
        oldest = numbers[max(0, n - self.s.recent)]
        return [i for i in range(n) if numbers[i] == 0 or numbers[i] >= oldest]

    def dense(self, l, b, h, q, positions):
        """Attention of the group's queries q (G, d) to these positions, by definition."""
        row = self.rows[b]
        k = torch.stack([row.k[l][i][h] for i in positions])
        v = torch.stack([row.v[l][i][h] for i in positions])
        return plain_attention(q.double(), k, v)

    def groups(self):
        """(l, b, h, slice of the group's query heads)."""
        G = self.Hq // self.H
        for l, b, h in itertools.product(range(self.L), range(self.B), range(self.H)):
            yield l, b, h, slice(h * G, h * G + G)

    def check(self, tokens, tolerance=1e-12):
        """One forward, and its output against the definition."""
        check = self.check_step if tokens.shape[1] == 1 else self.check_prompt
        check(tokens, self.push(tokens), tolerance)

    def check_prompt(self, tokens, out, tolerance=1e-12):
        """Every real token attends to all that was stored before it, and to itself."""
        for l, b, h, group in self.groups():
            n = int((tokens[b] >= 0).sum())
            for t in range(n):
                end = len(self.rows[b].stored[l]) - n + t + 1
                want = self.dense(l, b, h, self.q[l, b, group, t], self.rows[b].stored[l][:end])
                assert_close(out[l, b, group, t], want, tolerance)

    def check_step(self, tokens, out, tolerance=1e-12):
        """A decode step attends to the sink, the recent and the best sentences, no more."""
        sentence, taken = self.cache.fetched()
        for l, b, h, group in self.groups():
            row = self.rows[b]
            if tokens[b, 0] < 0:
                continue
            numbers, near = self.sentences(row), self.near(row)
            new, stored = len(row.tokens) - 1, {}
            for i in row.stored[l]:
                if i != new:
                    stored.setdefault(numbers[i], []).append(i)
            scores = self.scores(l, b, h, group, stored, {numbers[i] for i in near})
            chosen, room, last = [new], self.s.budget - 1, math.inf
            for s, n in zip(sentence[l, b, h].tolist(), taken[l, b, h].tolist()):
                if s in stored and n > 0:
                    score = scores.pop(s)
                    assert score <= last + 1e-5, "a better sentence came after a worse one"
                    assert n == min(room, len(stored[s])), "a sentence was cut before the end"
                    chosen += stored[s][:n]
                    room, last = room - n, score
                else:
                    assert n == 0, "tokens of a sentence that does not exist"
            left = max(scores.values(), default=-math.inf)
            assert left <= last + 1e-5, "a sentence was left out for a worse one"
            assert room == 0 or not scores, "the budget was not used"
            assert set(near) & set(row.stored[l]) <= set(chosen)
            assert len(chosen) == len(set(chosen)) <= self.s.budget
            want = self.dense(l, b, h, self.q[l, b, group, 0], sorted(chosen))
            assert_close(out[l, b, group, 0], want, tolerance)

    def scores(self, l, b, h, group, stored, near_numbers):
        row = self.rows[b]
        mean_q = torch.stack(row.queries[l]).mean(0)[group]
        keys = {s: torch.stack([row.k[l][i][h] for i in positions])
                for s, positions in stored.items() if s not in near_numbers}
        scores = plain_scores(self.s.rank, self.q[l, b, group, 0].double(), mean_q, keys)
        return {s: scores.get(s, math.inf) for s in stored}

def assert_close(got, want, tolerance=1e-12):
    difference = (got.double() - want.double()).abs().max()
    assert difference <= tolerance, f"largest difference {difference:.2e}"

heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
texts = st.sampled_from([None, [8.0, 8, 1, 0.2, 0.2], [1.0] * 5, [5.0, 5, 0, 0, 0]])

def options(data, rank, **fixed):
    """Random settings that are possible together."""
    sink, recent = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 7))
    budget = sink + recent + data.draw(st.integers(1, 40))
    cap = data.draw(st.sampled_from([None, 1, 3, 8]))
    cap = cap if cap is None or cap <= budget - sink - recent else None
    return dict(rank=rank, sink=sink, recent=recent, budget=budget, max_sentence=cap, **fixed)

def script(data, B):
    """Row lengths of some forwards: prompts in pieces, decode steps, follow-ups, idle rows."""
    pieces = [data.draw(st.integers(3, 30)) for _ in range(data.draw(st.integers(1, 3)))]
    steps = data.draw(st.integers(1, 12))
    follow_up = data.draw(st.integers(2, 12))
    uneven = data.draw(st.booleans())
    for T in (*pieces, *[1] * steps, follow_up, 1, 1):
        least = 0 if T == 1 else 1
        rows = [data.draw(st.integers(least, T)) if uneven else T for _ in range(B)]
        rows[data.draw(st.integers(0, B - 1))] = T
        yield rows

# --------------------------------------------------------------------- what a decode step attends to

@ranks
@quick
@given(seed=seeds, head=heads, B=st.integers(1, 3), words=texts, data=st.data())
def test_a_step_attends_exactly_to_the_sink_the_recent_and_the_best_sentences(
        rank, seed, head, B, words, data):
    """Also in batches of uneven rows, after prompts in pieces and follow-ups, and with idle rows."""
    feed = Feed(seed, B, *head, words=words, **options(data, rank))
    for lengths in script(data, B):
        feed.check(feed.tokens(*lengths))

@ranks
@quick
@given(seed=seeds, B=st.integers(1, 2), keep=st.sampled_from([1, 1.5, 2]),
       pool=st.sampled_from([1, 3, 7]), data=st.data())
def test_keep_r_stores_exactly_the_most_important_tokens_of_the_prompt(rank, seed, B, keep, pool,
                                                                       data):
    setting = options(data, rank, keep=keep, max_pool=pool)
    setting["window"] = data.draw(st.integers(1, min(6, setting["budget"])))
    feed = Feed(seed, B, 4, 2, layers=1, **setting)
    for lengths in script(data, B):
        feed.check(feed.tokens(*lengths))
    for row, used in zip(feed.rows, feed.cache.layers[0].pool.used):
        assert used == len(row.stored[0])

@ranks
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (torch.float32, 2e-5),
                                              (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_a_budget_that_covers_the_context_equals_dense_attention(rank, dtype, tolerance):
    feed = Feed(1, B=2, dtype=dtype, rank=rank, budget=150, recent=7)
    for length in (60, *[1] * 15, 20, *[1] * 15):
        tokens = feed.tokens(length)
        feed.check_prompt(tokens, feed.push(tokens), tolerance)     # all tokens, by definition

@ranks
def test_the_sentence_that_the_query_asks_for_is_found(rank):
    """Each sentence's keys point along an axis of its own: its values come back, wherever it is."""
    d, n = 64, 50
    tokens = torch.tensor([([1] * 5 + [2]) * n])
    axis = torch.eye(d, dtype=F64)[torch.tensor(plain_sentences(tokens[0].tolist(), 2, 8))]
    feed = Feed(3, Hq=1, H=1, d=d, layers=1, budget=24, sink=2, recent=4, max_sentence=8, rank=rank)
    feed.push(tokens, k=axis[None, None, None])
    numbers = feed.sentences(feed.rows[0])
    for wanted in (1, 2, 17, 30, n - 3):
        feed.cache.rows[0].prompt_end = len(feed.cache.rows[0].tokens)     # a new mean query
        q = 1000 * torch.eye(d, dtype=F64)[wanted].view(1, 1, 1, 1, d)
        out = feed.push(torch.tensor([[1]]), q=q, k=torch.zeros(1, 1, 1, 1, d, dtype=F64))
        values = [feed.rows[0].v[0][i][0] for i, s in enumerate(numbers) if s == wanted]
        assert_close(out[0, 0, 0, 0], torch.stack(values).mean(0), 1e-5)

@ranks
@pytest.mark.parametrize("keep, B", [(None, 2), (1, 1)])    # keep=1: few tokens of many sentences
def test_the_budget_is_filled_by_a_row_that_overtakes_and_by_remains_of_sentences(rank, keep, B):
    feed = Feed(5, B, 2, 1, layers=1, budget=200, max_sentence=20, rank=rank, keep=keep, window=2)
    feed.push(torch.tensor([([1] * 19 + [3]) * 100, [1, 3, 1] + [-1] * 1997][:B]))
    feed.push(torch.tensor([[1, 1] + [-1] * 148, [3] * 150][:B]))
    feed.check(torch.tensor([[1], [1]][:B]))

@ranks
@pytest.mark.parametrize("prompt", [[1], ([1] * 25 + [2]) * 20 + [3] * 100])
def test_many_short_sentences_fill_the_budget_and_a_text_can_begin_with_one_token(rank, prompt):
    feed = Feed(4, layers=1, Hq=1, H=1, budget=60, sink=2, recent=4, rank=rank)
    assert feed.push(torch.tensor([prompt])).isfinite().all()
    for token in [3] * 90 + [1] * 40:               # the layers grow on the way
        feed.check(torch.tensor([[token]]))

# --------------------------------------------------------------------------- rows and interruptions

@ranks
@pytest.mark.parametrize("keep", [None, 1.5])
def test_a_row_of_a_batch_is_what_it_would_be_alone(rank, keep):
    setting = dict(budget=32, recent=5, window=4, max_pool=3, rank=rank, keep=keep)
    forwards = [(40, 70, 55), (0, 9, 4), *[(1, 1, 1)] * 4, (1, 0, 1), (1, 0, 0), (3, 8, 0), (1, 1, 1)]
    batch, alone = Feed(0, 3, **setting), [Feed(0, 1, **setting) for _ in range(3)]
    for lengths in forwards:
        tokens = batch.tokens(*lengths)
        k, v = (batch.randn(2, 3, 2, tokens.shape[1], 8) for _ in range(2))
        out = batch.push(tokens, k=k, v=v)
        for b, n in enumerate(lengths):
            if n > 0:
                mine = [x[:, b:b + 1, :, :n] for x in (batch.q, k, v)]
                assert_close(out[:, b, :, :n], alone[b].push(tokens[b:b + 1, :n], *mine)[:, 0])

@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("attended", [0, 1, 2])
def test_an_interrupted_forward_is_noticed(T, attended):
    for first in (True, False):
        feed = Feed(6, layers=3, budget=40, recent=5)
        if not first:
            feed.push(feed.tokens(20))
        feed.cache.begin(feed.tokens(T))
        for layer in range(attended):
            feed.cache.attend(layer, *(feed.randn(1, h, T, 8) for h in (4, 2, 2)))
        with pytest.raises(ValueError, match="interrupted|earlier forward"):
            feed.push(feed.tokens(4))

def test_an_interruption_inside_of_a_call_is_noticed(monkeypatch):
    for owner, where in ((Segmenter, "extend"), (SentenceKV, "_prompt"), (SentenceKV, "_store")):
        feed = Feed(7, budget=40, recent=5)
        feed.push(feed.tokens(20))
        def stop(*args, **kwargs):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, stop)
            with pytest.raises(KeyboardInterrupt):
                feed.push(feed.tokens(5))
        with pytest.raises(ValueError, match="interrupted: use a new cache"):
            feed.cache.begin(feed.tokens(5))
        with pytest.raises(ValueError, match="expected attend"):
            feed.cache.attend(0, *(feed.randn(1, h, 5, 8) for h in (4, 2, 2)))

def test_calls_that_cannot_be_right_change_nothing_and_say_so():
    feed = Feed(8, B=2, budget=40, recent=5)
    with pytest.raises(ValueError, match="every row needs a token in the first forward"):
        feed.cache.begin(torch.tensor([[1, 1], [-1, -1]]))
    feed.push(feed.tokens(20))
    for tokens, message in [
            ([[1], [1]], "got list"), (torch.ones(3, 1, dtype=torch.long), "holds 2 rows, got tokens for 3"),
            (torch.tensor([[1, 1], [-1, 1]]), "-1 is padding"),
            (torch.tensor([[1, 1], [1, -2]]), "-1 is padding"),
            (torch.ones(2, 0, dtype=torch.long), "int64"),
            (torch.ones(2, 3), "int64"), (torch.ones(2, dtype=torch.long), "int64")]:
        with pytest.raises(ValueError, match=message):
            feed.cache.begin(tokens)
    feed.check(feed.tokens(1))                      # nothing was lost
    q, k = feed.randn(2, 4, 3, 8), feed.randn(2, 2, 3, 8)
    feed.cache.begin(feed.tokens(3))
    for index, q, k, v, message in [
            (1, q, k, k, "for layer 0, got layer 1"), (0, q[:1], k, k, "for 2 x 3 tokens"),
            (0, q, k, k[:, :, :2], "for 2 x 3 tokens"), (0, q[:, :3], k, k, "for 2 x 3 tokens"),
            (0, q, k.float(), k.float(), "of torch.float32"), (0, q, k[:, :1], k[:, :1], "of before"),
            (0, q[..., :4], k[..., :4], k[..., :4], "the H, d and dtype of before")]:
        with pytest.raises(ValueError, match=message):
            feed.cache.attend(index, q, k, v)

@pytest.mark.parametrize("wrong, message", [
    (dict(budget=48, sink=32, recent=16), "budget 48 must exceed sink . recent = 48"),
    (dict(budget=64.0), "budget must be an int from 1 to 1048576, got 64.0"),
    (dict(budget=1 << 21), "budget must be"), (dict(sink=-1), "sink must be"),
    (dict(recent=0), "recent must be"), (dict(window=0), "window must be"),
    (dict(keep=1, window=2000), "window must be <= keep"), (dict(keep="2"), "keep must be"),
    (dict(keep=0.5), "keep must be None or a number of at least 1, got 0.5"),
    (dict(keep=float("nan")), "keep must be"), (dict(max_pool=4), "max_pool must be odd, got 4"),
    (dict(rank="best"), f"rank must be one of {', '.join(RANKS)}, got 'best'"),
    (dict(rank=["ball"]), "rank must"), (dict(flags=[b".", None]), "flags must be sentence_flags"),
    (dict(budget=64, recent=32, max_sentence=29), "must be an int from 1 to 28"),
    (dict(max_sentence=0), "max_sentence must"), (dict(max_sentence=3.0), "max_sentence must")])
def test_impossible_settings_say_what_to_change(wrong, message):
    with pytest.raises(ValueError, match=message):
        SentenceKV(**{"flags": TOY_FLAGS, **wrong})

def test_the_papers_settings_are_one_preset():
    assert PAPER == dict(rank="mean", keep=2, budget=1024, sink=32, recent=32, window=32, max_pool=7,
                         max_sentence=64)
    feed = Feed(9, Hq=2, H=1, layers=1, **PAPER)
    q, k = feed.randn(1, 2, 3000, 8), feed.randn(1, 1, 3000, 8)
    feed.cache.begin(feed.tokens(3000))
    feed.cache.attend(0, q, k, k)
    feed.cache.begin(feed.tokens(1))
    feed.cache.attend(0, q[:, :, :1], k[:, :, :1], k[:, :, :1])
    assert feed.cache.layers[0].pool.used == [2049]
    assert feed.cache.layers[0].pool.kv.shape[1] < 2500             # the memory was given back

# ------------------------------------------------------------------------ vectors, pool and memory

@ranks
@quick
@given(seed=seeds, words=texts, keep=st.sampled_from([None, 1.5]), data=st.data())
def test_a_vector_is_made_of_exactly_the_stored_keys_of_its_sentence(rank, seed, words, keep, data):
    feed = Feed(seed, B=2, words=words, **options(data, rank, keep=keep, window=1))
    for lengths in script(data, 2):
        feed.push(feed.tokens(*lengths))
    for l, layer in enumerate(feed.cache.layers):
        for b, row in enumerate(feed.rows):
            numbers = feed.sentences(row)
            for s in set(numbers):
                positions = [i for i in row.stored[l] if numbers[i] == s]
                assert layer.count[b, s] == len(positions)
                if positions:
                    keys = torch.stack([row.k[l][i] for i in positions], dim=1)     # (H, n, d)
                    want = keys.mean(1)
                    if rank == "ball":
                        want = torch.cat((want, torch.tensor([[radius(k)] for k in keys])), dim=1)
                    assert_close(layer.vectors[b, :, s], want, 1e-3)

@quick
@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float32]), data=st.data())
def test_the_pool_holds_every_bit_in_text_order(seed, dtype, data):
    feed = Feed(seed, B=2, dtype=dtype, budget=40, recent=5)
    for lengths in script(data, 2):
        feed.push(feed.tokens(*lengths))
    for l, layer in enumerate(feed.cache.layers):
        for b, row in enumerate(feed.rows):
            for got, want in zip(layer.pool.read(b).unbind(2), (row.k[l], row.v[l])):
                assert torch.equal(got, torch.stack(want, dim=1).to(dtype))         # (H, n, d)

def test_the_device_grows_by_vectors_alone():
    def bytes_after(T):
        feed = Feed(10, Hq=2, H=1, layers=2, dtype=torch.float32, budget=64, recent=8)
        feed.push(torch.tensor([[1] * 9 + [2]] * (T // 10)).view(1, T))
        feed.push(torch.tensor([[1]]))
        room = feed.cache.room
        assert room <= 2 * (T // 10) + 70
        vectors = sum(layer.vectors.nbytes for layer in feed.cache.layers)
        tables = sum(x.count.nbytes for x in feed.cache.layers) + room
        return feed.cache.memory(), feed.cache.memory()["device"] - vectors - tables
    (small, rest), (large, same_rest) = bytes_after(300), bytes_after(3000)
    assert rest == same_rest and large["host"] >= 9 * small["host"]

def test_memory_counts_every_tensor_that_the_cache_holds():
    feed, found = Feed(11, layers=3, budget=64, recent=8, keep=1, window=4), {}
    for length in (150, 1, 1, 5, 1):
        feed.push(feed.tokens(length))
    def walk(x):
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.nbytes
        elif isinstance(x, (list, tuple)):
            [walk(y) for y in x]
        elif hasattr(x, "__dict__"):
            walk(list(vars(x).values()))
    walk(feed.cache)
    assert sum(found.values()) == sum(feed.cache.memory().values())

def test_inference_mode_default_dtype_and_gradients_do_no_harm():
    torch.set_default_dtype(F64)
    try:
        feed = Feed(12, dtype=torch.float32, budget=40, recent=5)
        with torch.inference_mode():
            feed.push(feed.tokens(50))
        for layer in feed.cache.layers:
            assert layer.open.dtype == layer.query_mean.dtype == torch.float32
        for _ in range(3):
            feed.check(feed.tokens(1), 2e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.ones(1, 2, 1, 8, requires_grad=True)
    cache = SentenceKV(TOY_FLAGS)
    cache.begin(torch.ones(1, 1, dtype=torch.long))
    assert not cache.attend(0, x, x, x).requires_grad

@ranks
def test_products_beyond_float16_still_rank_the_better_sentence(rank):
    q = torch.full((1, 1, 1, 64), 200.0, dtype=torch.float32)
    features = RANKS[rank].features(torch.stack((torch.full((64,), 20.0), torch.full((64,), 30.0))))
    vectors = RANKS[rank].vector(features, 1)[None, None].half()
    scores = RANKS[rank].score(q, q, vectors, torch.ones(1, 2, dtype=torch.bool))[0, 0].tolist()
    assert scores[0] < scores[1] < math.inf

# ------------------------------------------------------------------------------- the pure functions

@quick
@given(data=st.data(), B=st.integers(1, 2), H=st.integers(1, 2), S=st.integers(1, 9),
       places=st.integers(1, 30))
def test_select_takes_whole_sentences_in_descending_score(data, B, H, S, places):
    count = torch.tensor([[data.draw(st.integers(0, 6)) for _ in range(S)] for _ in range(B)])
    scores = torch.stack([torch.randperm(S) for _ in range(B * H)]).view(B, H, S).float()
    slot, used, sentence, taken = select(scores, count, places, top=S)
    for b, h in itertools.product(range(B), range(H)):
        starts = [0, *itertools.accumulate(count[b].tolist())]
        want = []
        for s in scores[b, h].argsort(descending=True).tolist():
            want += range(starts[s], starts[s + 1])
        want = want[:places]
        assert slot[b, h][used[b, h]].tolist() == want
        assert used[b, h].tolist() == [True] * len(want) + [False] * (places - len(want))
        assert (slot[b, h][~used[b, h]] == 0).all()
        again = [starts[s] + i for s, n in zip(sentence[b, h].tolist(), taken[b, h].tolist())
                 for i in range(n)]
        assert again == want

@quick
@given(seed=seeds, head=heads, N=st.integers(1, 5), T=st.integers(6, 30), pool=st.sampled_from([1, 3, 7]))
def test_importance_is_the_attention_that_the_last_queries_give(seed, head, N, T, pool):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(head[0], N, 8, generator=random, dtype=F64)
    k = torch.randn(head[1], T, 8, generator=random, dtype=F64)
    assert_close(importance(q, k, pool), torch.tensor(plain_alpha(q, k, pool)), 1e-5)

def test_survivors_are_the_largest_in_text_order_and_ties_go_to_the_earlier():
    assert survivors(torch.tensor([1.0, 5, 2, 5, math.inf, 2, 2]), 4).tolist() == [1, 2, 3, 4]

# ------------------------------------------------------------------------------------- segmentation

@pytest.mark.parametrize("text", [       # "|": a sentence ends here
    "It rained.| Then it stopped!| Why?| Nobody knows…| 300 people asked",
    "Pi is 3.14, see notes.md or x.org/?q=1.| Mr. Bean met J. R. Smith of the U.S. Senate.| Next",
    "She likes tea etc. and so on... or … hm.| \"Why?\" he asked.| “Stop.”| **Bold.**| More.[2]| End",
    "1. Open the box.| A title\n\n|One\nline",
    "他来了。|「好。」|走！| یہ ایک ہے۔| وہ"])
def test_sentences_end_where_a_reader_ends_them(text):
    want = [sentence.strip() for sentence in text.split("|")]
    tokens = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text.replace("|", ""))
    row, got = Segmenter(sentence_flags([token.encode() for token in tokens]), 0, 999), {}
    for token, number in zip(tokens, row.extend(range(len(tokens)))):
        got[number] = got.get(number, "") + token
    assert [sentence.strip() for sentence in got.values()] == want

@quick
@given(tokens=st.lists(st.integers(-1, 4), max_size=80), sink=st.integers(0, 5), cap=st.integers(1, 9))
def test_segmentation_is_that_of_the_definition(tokens, sink, cap):
    row = Segmenter(TOY_FLAGS, sink, cap)
    numbers = row.extend(tokens)
    real = [token for token in tokens if token >= 0]
    assert [n for n, token in zip(numbers, tokens) if token >= 0] == plain_sentences(real, sink, cap)
    assert row.tokens == real and sum(row.lengths) == len(real)
    assert all(n <= cap for n in row.lengths[1:])

def test_special_tokens_end_a_sentence_and_unknown_ids_do_not():
    row = Segmenter(sentence_flags([b" Hi", None, b"\xe3\x80"]), 0, 64)
    assert row.extend([0, 1, 1, 0, 2, 99, 0]) == [1, 1, 1, 2, 2, 2, 2]

# ------------------------------------------------------------------------------------ the file itself

def test_the_module_imports_torch_and_the_standard_library_alone():
    tree = ast.parse(Path(sentencekv.__file__).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch"}

def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(sentencekv).failed == 0
