"""Forks, truncation, files, zero copy and CUDA graphs, against dense attention and plain caches.

The caches are exact in float64, so most comparisons are for equal bits. Text and settings are
small; MORE=20 python -m pytest tests/test_extras.py runs the fuzz tests 20 times as long.
"""
import copy
import hashlib
import itertools
import json
import math
import os
import random
import resource
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from experiments.shapes import random_llama
from extras import save as saving
from extras import zero_copy
from extras.branch import BranchPool, fork, truncate
from extras.cuda_graph import GraphedStep
from extras.save import load, save
from extras.zero_copy import CarefulPool, ZeroCopyPool, best_pool
from model import DenseKV
from pretended_gpu import pretended_gpu  # noqa: F401, a fixture
from sentencekv import RANKS, HostPool, Segmenter, SentenceKV, sentence_flags

ROOT = Path(__file__).resolve().parent.parent
MORE = int(os.environ.get("MORE", 1))
torch.set_num_threads(1)    # the tensors are tiny
every_rank = pytest.mark.parametrize("rank", RANKS)

# ----------------------------------------------------------------------------------- tools

TOY = [b"word", b" word", b".", b".\n\n", b'"', b" "]
TOY_FLAGS = sentence_flags(TOY)
SMALL = dict(budget=24, sink=2, recent=5, window=4, max_sentence=9)

def toy_model(seed=0, device=None, dtype=torch.float64, **changes):
    """Two layers that know the toy vocabulary."""
    shape = dict(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                 max_position_embeddings=4096)
    return random_llama("tiny", device, dtype, seed, **{**shape, **changes})

def toy_text(rng, n):
    return rng.choices(range(6), [3, 6, 1, 0.5, 0.5, 0.5], k=n)

def toy_cache(**changes):
    return SentenceKV(TOY_FLAGS, **{**SMALL, **changes})

def ragged(rows):
    """Lists of ids -> (B, T), shorter rows padded with -1."""
    T = max(map(len, rows))
    return torch.tensor([row + [-1] * (T - len(row)) for row in rows])

def column(ids):
    return torch.tensor(ids)[:, None]

def lengths(cache):
    return [len(row.tokens) for row in cache.rows]

def texts(cache):
    return [row.tokens for row in cache.rows]

def assert_close(a, b):
    assert (a - b).abs().max() < 1e-10, f"max difference {(a - b).abs().max():.2e}"

def assert_same_future(rng, model, caches, steps=12):
    """The caches give the same bits, and fetch the same, for tokens that follow in all of them."""
    B = len(caches[0].rows)
    for T in [1] * steps + [5, 1, 1]:
        tokens = torch.tensor([toy_text(rng, T) for _ in range(B)])
        first, *others = [model(tokens, cache) for cache in caches]
        assert first.isfinite().all()
        for logits in others:
            assert torch.equal(logits, first)
        for cache in caches[1:]:
            assert texts(cache) == texts(caches[0])
            if T == 1:
                assert_same_fetches(cache, caches[0])

def assert_same_fetches(a, b):
    """Both fetched the same tokens. Order may differ among sentences that are always fetched."""
    tables = []
    for sentence, taken in (a.fetched(), b.fetched()):
        table = torch.zeros(*sentence.shape[:3], max(a.room, b.room), dtype=torch.long)
        tables.append(table.scatter_(3, sentence.cpu(), taken.cpu()))
    assert torch.equal(*tables)

class Masked(DenseKV):
    """Dense attention, in a decode step over masks[layer][b][h] (lists of positions) alone."""
    masks = None

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if self.masks is None:
            return out
        G, d = q.shape[1] // k.shape[1], q.shape[3]
        for b, h in itertools.product(range(len(q)), range(k.shape[1])):
            group, at = slice(h * G, h * G + G), self.masks[layer][b][h]
            keys, values = (x[layer][b, h, at] for x in (self.keys, self.values))
            weights = (q[b, group, 0] @ keys.T / math.sqrt(d)).softmax(-1)
            out[b, group, 0] = weights @ values
        return out

def attended(cache, idle):
    """Positions that the last decode step attended to by its own account: [layer][b][h]."""
    masks = []
    for sentence, taken in zip(*(x.tolist() for x in cache.fetched())):
        masks.append([])
        for b, row in enumerate(cache.rows):
            start = [0, *itertools.accumulate(row.lengths)]
            heads = []
            for numbers, counts in zip(sentence[b], taken[b]):
                at = [len(row.tokens) - 1]                  # the token itself
                for s, n in zip(numbers, counts):
                    at += range(start[s], start[s] + n) if n else ()
                full = min(cache.settings.budget, len(row.tokens))
                assert idle[b] or len(set(at)) == len(at) == full
                heads.append(at)
            masks[-1].append(heads)
    return masks

# --------------------------------------------------------------------- everything in any order

class Interrupted(Exception):
    pass

def stop_after(n):
    def progress(done, total):
        if done == n:
            raise Interrupted
    return progress

class Living(RuleBasedStateMachine):
    """A SentenceKV and its forks. Beside each a dense cache does the same; rows are its texts."""

    @initialize(seed=st.integers(0, 2**31), B=st.integers(1, 3), budget=st.sampled_from([24, 600]),
                rank=st.sampled_from([*RANKS]), n=st.integers(1, 40))
    def prompt(self, seed, B, budget, rank, n):
        self.rng, self.model = random.Random(seed), toy_model(seed % 3)
        cache = toy_cache(budget=budget, rank=rank)
        self.branches = [(cache, Masked(), [[] for _ in range(B)])]
        self.folder = tempfile.TemporaryDirectory()
        self.ask(0, n + 1, None)

    def pick(self, which):
        return self.branches[which % len(self.branches)]

    def compare(self, branch, tokens, chunk=None):
        """One more forward, or prompt in chunks, of both caches gives the same logits."""
        cache, dense, rows = branch
        logits = self.model.prefill(tokens, cache, chunk)
        for row, new in zip(rows, tokens.tolist()):
            row += [id for id in new if id >= 0]
        real = tokens[:, 0] >= 0
        dense.masks = attended(cache, ~real) if tokens.shape[1] == 1 else None
        assert_close(logits[real], self.model.prefill(tokens, dense)[real])
        assert texts(cache) == rows and cache.length == dense.length
        for row in cache.rows:
            fresh = Segmenter(TOY_FLAGS, 2, 9)
            fresh.extend(row.tokens)
            assert row.lengths == fresh.lengths

    @rule(which=st.integers(0, 9), steps=st.integers(1, 9), idle=st.integers(0, 5))
    def decode(self, which, steps, idle):
        cache, _, rows = branch = self.pick(which)
        for _ in range(steps):
            ids = [-1 if b == idle and len(rows) > 1 else toy_text(self.rng, 1)[0]
                   for b in range(len(rows))]
            self.compare(branch, column(ids))

    @rule(which=st.integers(0, 9), n=st.integers(2, 30), chunk=st.sampled_from([None, 5]))
    def ask(self, which, n, chunk):
        """A prompt whose rows have different lengths."""
        branch = self.pick(which)
        sizes = [self.rng.randint(1, n) for _ in branch[2]]
        sizes[self.rng.randrange(len(sizes))] = n
        self.compare(branch, ragged([toy_text(self.rng, k) for k in sizes]), chunk)

    @rule(which=st.integers(0, 9), T=st.sampled_from([1, 6, 12]), layers=st.integers(1, 3))
    def interrupt(self, which, T, layers):
        """What is left is refused, and can be repaired."""
        cache, dense, rows = branch = self.pick(which)
        tokens = torch.tensor([toy_text(self.rng, T) for _ in rows])
        chunk, after = (6, 3) if T == 12 else (None, min(layers, 2))
        with pytest.raises(Interrupted):
            self.model.prefill(tokens, cache, chunk, progress=stop_after(after))
        for call in (lambda: self.model(tokens, cache), lambda: fork(cache),
                     lambda: save(cache, Path(self.folder.name) / "refused", self.model)):
            with pytest.raises(ValueError, match="truncate"):
                call()
        assert not os.path.exists(os.path.join(self.folder.name, "refused"))
        truncate(cache, [len(row) for row in rows])

    @precondition(lambda self: len(self.branches) < 4)
    @rule(which=st.integers(0, 9), deep=st.booleans())
    def fork(self, which, deep):
        cache, dense, rows = self.pick(which)
        twin = copy.deepcopy(cache) if deep else fork(cache)
        self.branches.append((twin, copy.deepcopy(dense), copy.deepcopy(rows)))

    @rule(which=st.integers(0, 9), share=st.floats(0, 1))
    def truncate(self, which, share):
        cache, dense, rows = self.pick(which)
        sizes = [max(1, len(row) - int(share * self.rng.random() * len(row))) for row in rows]
        truncate(cache, sizes)
        dense.truncate(sizes)
        for row, n in zip(rows, sizes):
            del row[n:]

    @rule(which=st.integers(0, 9))
    def save_and_load(self, which):
        i = which % len(self.branches)
        path = Path(self.folder.name) / f"{i}.cache"
        save(self.branches[i][0], path, self.model)
        self.branches[i] = (load(path, self.model), *self.branches[i][1:])

    def teardown(self):
        if hasattr(self, "folder"):
            self.branches.clear()
            self.folder.cleanup()

Living.TestCase.settings = settings(
    deadline=None, max_examples=40 * MORE, stateful_step_count=10, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck))
TestLiving = Living.TestCase

# ------------------------------------------------------------------------ forks and truncation

@every_rank
@pytest.mark.parametrize("keep", [None, 1])
def test_branches_take_turns_and_each_goes_on_as_a_cache_that_was_never_forked(rank, keep):
    """Forked before keep=r prunes and after; the rank sees its own vectors and mean query."""
    rng, model = random.Random(3), toy_model(3)
    prompt = torch.tensor([toy_text(rng, 60)])
    cache, *alone = [toy_cache(rank=rank, keep=keep) for _ in range(4)]
    for one in (cache, *alone):
        model.prefill(prompt, one)
    branches = [cache, fork(cache)]
    branches.append(fork(branches[1]))
    for step in range(40):
        if step == 20:                                      # the third goes on from a fork of its
            branches[2] = fork(branches[2])
        for one, single in zip(branches, alone):
            token = torch.tensor([toy_text(rng, 1)])
            assert torch.equal(model(token, one), model(token, single))
            assert all(map(torch.equal, one.fetched(), single.fetched()))

def test_forks_share_host_memory_and_those_of_one_cache_make_no_chain():
    rng, model, cache = random.Random(0), toy_model(), toy_cache()
    model.prefill(torch.tensor([toy_text(rng, 3000)]), cache)
    host = cache.memory()["host"]
    forks = [fork(cache) for _ in range(20)]
    for one in forks:
        model.prefill(torch.tensor([toy_text(rng, 5)]), one)
        assert all(a.pool.base is b.pool for a, b in zip(one.layers, cache.layers))
        assert one.memory()["host"] < host / 20
    assert cache.length == 3000 and cache.memory()["host"] == host
    assert {one.length for one in forks} == {3005}
    truncate(forks[0], 2990)
    assert all(a.pool.base is b.pool for a, b in zip(forks[0].layers, cache.layers))

@pytest.mark.parametrize("written", [0, 5])
def test_branches_that_are_cut_back_into_what_they_share_leave_each_other_alone(written):
    """Also where one row is cut below the fork and the other is not, by one branch only."""
    rng, model = random.Random(3), toy_model(3)
    start = [toy_text(rng, 50), toy_text(rng, 31)]
    cache = toy_cache(budget=600)
    model.prefill(ragged(start), cache)
    branches = [(cache, start), (fork(cache), copy.deepcopy(start))]
    for one, rows in list(branches):                        # both go on, and are forked again
        more = [toy_text(rng, 6), toy_text(rng, 6)]
        model.prefill(ragged(more), one)
        for row, new in zip(rows, more):
            row += new
        branches.append((fork(one), copy.deepcopy(rows)))
    for sizes, (one, rows) in itertools.product([[52, 33], [50, 20], [30, 25]], branches):
        for _ in range(written):
            new = toy_text(rng, 2)
            model(column(new), one)
            for row, id in zip(rows, new):
                row.append(id)
        back = [min(n, len(row)) for n, row in zip(sizes, rows)]
        truncate(one, back)
        more = [toy_text(rng, 30), toy_text(rng, 35)]
        for row, n, new in zip(rows, back, more):
            row[n:] = new
        model.prefill(ragged(more), one)
        for other, text in branches:                        # all of them are what they should be
            dense = DenseKV()
            model.prefill(ragged(text), dense)
            step = torch.tensor([[1], [1]])
            assert_close(model(step, other), model(step, dense))
            truncate(other, [len(row) for row in text])

def test_a_fork_has_room_where_one_row_grows_fast_and_the_other_hardly():
    rng, model, cache, dense = random.Random(3), toy_model(3), toy_cache(budget=900), DenseKV()
    rows = ragged([toy_text(rng, 400), toy_text(rng, 20)])
    model.prefill(rows, cache)
    model.prefill(rows, dense)
    one = fork(cache)
    for _ in range(3):
        more = ragged([toy_text(rng, 3), toy_text(rng, 300)])
        assert_close(model.prefill(more, one), model.prefill(more, dense))

@every_rank
@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck),
          phases=(Phase.generate,))
@given(seed=st.integers(0, 2**31), T=st.integers(2, 90), share=st.floats(0, 1))
def test_after_truncate_a_cache_is_as_if_the_rest_had_been_one_prompt(rank, seed, T, share):
    rng = random.Random(seed)
    model = toy_model(num_hidden_layers=1)                  # keys depend on tokens alone
    rows = [toy_text(rng, T + 36), toy_text(rng, T + 36)]
    cache, fresh = toy_cache(rank=rank), toy_cache(rank=rank)
    model(torch.tensor(rows)[:, :T], cache)
    for t in range(T, T + 30):
        model(torch.tensor(rows)[:, t:t + 1], cache)
    model(torch.tensor(rows)[:, T + 30:], cache)
    n = 2 + int(share * (T + 34))
    truncate(cache, n)
    model(torch.tensor(rows)[:, :n], fresh)
    for a, b in zip(cache.layers, fresh.layers):
        S = min(a.count.shape[1], b.count.shape[1])
        assert torch.equal(a.count[:, :S], b.count[:, :S])
        assert not a.count[:, S:].any() and not b.count[:, S:].any()
        assert_close(a.open, b.open)
        real = (a.count[:, :S] > 0)[:, None, :, None]
        assert_close(*(x.vectors[:, :, :S].masked_fill(~real, 0) for x in (a, b)))
    for _ in range(8):
        token = column(toy_text(rng, 2))
        assert_close(model(token, cache), model(token, fresh))
        sizes = [x.fetched()[1].sum() for x in (cache, fresh)]
        assert sizes[0] == sizes[1]

@pytest.mark.parametrize("seed", range(3))
def test_what_comes_after_a_pruned_prompt_can_be_forgotten_and_the_prompt_cannot(seed):
    """Tokens that were forgotten leave no trace: as if they had never come."""
    rng, model = random.Random(seed), toy_model(seed)
    cache = toy_cache(keep=1, rank=[*RANKS][seed % len(RANKS)])
    model(ragged([toy_text(rng, 60), toy_text(rng, 41)]), cache)
    with pytest.raises(ValueError, match="has not pruned this prompt yet.*use a new cache"):
        truncate(cache, [50, 41])
    truncate(cache, [60, 41])                               # changes nothing
    for _ in range(9):
        model(column(toy_text(rng, 2)), cache)
    longer = fork(cache)
    for T in (1, 1, 1, 1, 1, 1, 6, 1):
        model(torch.tensor([toy_text(rng, T), toy_text(rng, T)]), longer)
    for sizes in ([69, 50], [68, 50], [61, 42]):
        truncate(longer, sizes)
        truncate(cache, sizes)
        assert lengths(longer) == sizes
        assert_same_future(rng, model, [fork(longer), fork(cache)])
    with pytest.raises(ValueError, match=r"from \[\d+, \d+\] \(keep=r has pruned .* \[61, 42\]"):
        truncate(cache, [20, 42])
    for layer in cache.layers:
        assert layer.pool.used == [61 - 60 + 24, 42 - 41 + 24]

def test_truncate_says_what_it_can_do():
    model, cache = toy_model(), toy_cache()
    with pytest.raises(ValueError, match="needs a cache that holds a prompt"):
        truncate(cache, 1)
    twin = fork(cache)                              # an empty cache has an empty fork
    model(torch.ones(2, 9, dtype=torch.long), twin)
    assert twin.length == 9 and cache.length == 0 and not cache.layers
    model(torch.ones(2, 20, dtype=torch.long), cache)
    for wrong in (0, 21, [5], [5, 21], [5, 5.0], -3, None, True, "5", torch.tensor(5)):
        with pytest.raises(ValueError, match=r"truncate\(\) takes lengths from \[1, 1\] to \[20"):
            truncate(cache, wrong)
    assert cache.length == 20

# ----------------------------------------------------------------- interruptions, line by line

TRACED = tuple(str(ROOT / name) for name in ("sentencekv.py", "extras/branch.py"))

def run_lines(call, stop=None):
    """Run call() -> lines that it ran in TRACED; KeyboardInterrupt before line number `stop`."""
    n = 0

    def trace(frame, event, _):
        nonlocal n
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        n += event == "line"
        if n == stop and event == "line":
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return n

def refused(cache):
    """Does the cache refuse the next forward?"""
    try:
        cache._check_tokens(torch.ones(2, 1, dtype=torch.long))
    except ValueError as error:
        assert "use a new cache, or truncate" in str(error)
        return True
    return False

@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("kind", ["prompt", "decode", "truncate", "prune"])
def test_an_interruption_at_any_line_leaves_a_cache_that_works_or_can_be_repaired(kind, keep):
    """While keep=r prunes it may also ask for a new cache."""
    rng, model, answers = random.Random(1), toy_model(1), {"works": 0, "repaired": 0, "new": 0}
    start = toy_cache(keep=keep)
    model(ragged([toy_text(rng, 60), toy_text(rng, 41)]), start)
    for _ in range(0 if kind == "prune" else 20):
        model(column(toy_text(rng, 2)), start)
    tokens = [toy_text(rng, 9), toy_text(rng, 4)] if kind == "prompt" else [[1], [4]]
    sizes = before = lengths(start)
    if kind == "truncate":
        sizes = [n - 18 for n in before]                    # a sentence less: that may be lost

    def call(cache):
        return truncate(cache, [n - 7 for n in before]) if kind == "truncate" else model(
            ragged(tokens), cache)

    twin = fork(start)
    total = run_lines(lambda: call(twin))
    for line in [1, total, *rng.sample(range(2, total), 10 * MORE)]:
        cache, other = fork(start), fork(start)
        assert run_lines(lambda: call(cache), stop=line) == line
        if not refused(cache):
            answers["works"] += 1
            if lengths(cache) != before:                    # it was complete
                call(other)
        else:
            if kind == "prune":
                call(other)
            try:
                truncate(cache, sizes)
            except ValueError as error:
                assert kind == "prune" and keep and "use a new cache" in str(error)
                answers["new"] += 1
                continue
            truncate(other, sizes)
            answers["repaired"] += 1
        assert_same_future(rng, model, [cache, other], steps=3)
    assert answers["works"] and answers["repaired"] + answers["new"] > 3, answers
    assert (answers["new"] > 0) == (kind == "prune" and keep is not None)

def test_a_cache_whose_first_prompt_was_interrupted_asks_for_a_new_one():
    rng, model = random.Random(1), toy_model(1, num_hidden_layers=3)
    prompt = torch.tensor([toy_text(rng, 30)])
    for layers in (1, 2):
        cache = toy_cache()
        with pytest.raises(Interrupted):
            model(prompt, cache, progress=stop_after(layers))
        with pytest.raises(ValueError, match="interrupted: use a new cache, or truncate"):
            model(prompt, cache)
        with pytest.raises(ValueError):
            save(cache, "/nowhere", model)
        truncate(cache, 20)                                 # it cannot know how many layers come
        with pytest.raises(ValueError, match="use a new cache"):
            model(prompt, cache)

def test_caches_from_inference_mode_go_on_outside_of_it(tmp_path):
    rng, model, cache, plain = random.Random(1), toy_model(1), toy_cache(), toy_cache()
    prompt = torch.tensor([toy_text(rng, 60)])
    model(prompt, plain)
    with torch.inference_mode():
        model(prompt, cache)
        twin = fork(cache)
        save(cache, tmp_path / "cache", model)
        loaded = load(tmp_path / "cache", model)
        for one in (cache, twin, loaded):
            model(torch.tensor([[1]]), one)
            truncate(one, 50)
    truncate(plain, 50)
    assert_same_future(rng, model, [plain, cache, twin, loaded])

# ------------------------------------------------------------------------------------- files

def saved(folder, new=7, **changes):
    """A model, a cache of two uneven rows with generated tokens, and the file it is saved in."""
    model, rng, cache = toy_model(3), random.Random(3), toy_cache(**changes)
    model.prefill(ragged([toy_text(rng, 50), toy_text(rng, 31)]), cache)
    for _ in range(new):
        model(torch.tensor([[1], [1]]), cache)              # the sentence goes on
    path = Path(folder) / "some.cache"
    save(cache, path, model)
    return model, cache, path

@every_rank
@pytest.mark.parametrize("keep, new", [(None, 7), (1, 7), (1, 0)])
def test_a_loaded_cache_goes_on_bit_for_bit_as_if_it_had_never_stopped(tmp_path, rank, keep, new):
    """After keep=r has pruned, before, and without it; and once more from the loaded cache."""
    model, cache, path = saved(tmp_path, new, keep=keep, rank=rank)
    loaded = load(path, model)
    assert vars(loaded.settings) == vars(cache.settings) and loaded.length == cache.length
    maps = Path("/proc/self/maps")                          # keys and values stay in the file
    assert not maps.exists() or str(path.resolve()) in maps.read_text()
    assert loaded.memory()["host"] < loaded.layers[0].pool.base.kv.nbytes * 2
    assert_same_future(random.Random(4), model, [cache, loaded])
    sizes = [n - 6 for n in lengths(cache)]
    for one in (cache, loaded):
        truncate(one, sizes)
    save(loaded, path, model)                               # over the file that it is mapped from
    again = load(path, model)
    assert_same_future(random.Random(5), model, [cache, loaded, again])
    assert os.listdir(tmp_path) == ["some.cache"]

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_caches_of_every_dtype_are_saved_and_loaded(tmp_path, dtype):
    model, cache = toy_model(dtype=dtype), toy_cache()
    model(ragged([toy_text(random.Random(0), 33), [1, 2, 3]]), cache)
    path = tmp_path / "some.cache"
    save(cache, str(path), model)
    assert_same_future(random.Random(4), model, [cache, load(str(path), model)], steps=2)

def test_a_cache_of_another_model_is_refused(tmp_path):
    model, cache, path = saved(tmp_path)
    changed, swapped = toy_model(3), toy_model(3)
    changed.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    weight = swapped.layers[0].mlp.up_proj.weight
    weight[[2, 5]] = weight[[5, 2]]
    deeper = toy_model(3, num_hidden_layers=3)
    for other in (changed, swapped, toy_model(3).float(), deeper):
        with pytest.raises(ValueError, match="saved with another model, other weights or another"):
            load(path, other)
    other = tmp_path / "other.cache"
    wider = toy_model(3, num_key_value_heads=4)
    for model, message in ((deeper, "has 2 layers, the model 3"), (wider, "by another model"),
                           (toy_model(3).float(), "by another model")):
        with pytest.raises(ValueError, match=message):
            save(cache, other, model)
    with pytest.raises(ValueError, match=r"save\(\) needs a cache that holds a prompt"):
        save(toy_cache(), other, model)
    with pytest.raises(FileNotFoundError, match="other.cache: no such file"):
        load(other, model)
    with pytest.raises(ValueError, match="is not a regular file"):
        load(tmp_path, model)

def test_only_regular_files_are_replaced_and_a_link_or_a_mode_stays(tmp_path):
    model, cache, path = saved(tmp_path)
    fifo, link, dangling = (tmp_path / name for name in ("fifo", "link", "dangling"))
    os.mkfifo(fifo)
    for wrong in (fifo, tmp_path):
        with pytest.raises(ValueError, match=f"{wrong} is not a regular file"):
            save(cache, wrong, model)
        with pytest.raises(ValueError, match=f"{wrong} is not a regular file"):
            load(wrong, model)
    with pytest.raises(FileNotFoundError, match="missing: no such folder"):
        save(cache, tmp_path / "missing" / "x.cache", model)
    os.chmod(path, 0o640)
    link.symlink_to(path.name)
    dangling.symlink_to("new.cache")
    before = path.read_bytes()
    model(torch.tensor([[1], [1]]), cache)
    for name in (link, dangling):
        save(cache, name, model)
        assert name.is_symlink() and load(name, model).length == 58
    assert path.read_bytes() != before and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert fifo.is_fifo()
    assert {*os.listdir(tmp_path)} == {"some.cache", "new.cache", "fifo", "link", "dangling"}

def test_a_disk_that_is_full_or_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    model, cache, path = saved(tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("some.cache", "new.cache"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError) as error:
                save(cache, tmp_path / name, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        assert error.value.errno
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            def interrupt(*_):
                raise KeyboardInterrupt
            patch.setattr(os, name, interrupt)
            save(cache, tmp_path / "new.cache", model)
    assert os.listdir(tmp_path) == ["some.cache"] and path.read_bytes() == before

def sign(path, raw):
    """Write a file whose checksum is right, whatever else is not."""
    path.write_bytes(raw[:-32] + hashlib.sha256(raw[:-32]).digest())

def altered(raw, change):
    """The file with its metadata and {name: tensor} changed by change(), laid out anew."""
    n = int.from_bytes(raw[:8], "little")
    header, data, tensors = json.loads(raw[8:8 + n]), raw[8 + n:], {}
    metadata = header.pop("__metadata__")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=saving.DTYPES[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    change(metadata, tensors)
    header, data = {"__metadata__": metadata}, b""
    for name, t in sorted(tensors.items(), key=lambda item: item[0] == "sha256"):
        piece = bytes(saving.raw_bytes(t)) if t.numel() else b""
        header[name] = dict(dtype=saving.NAMES[t.dtype], shape=[*t.shape],
                            data_offsets=[len(data), len(data) + len(piece)])
        data += piece
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data

def setting(**changes):
    def change(metadata, tensors):
        metadata["settings"] = json.dumps({**json.loads(metadata["settings"]), **changes})
    return change

def without_setting(metadata, tensors):
    found = json.loads(metadata["settings"])
    del found["sink"]
    metadata["settings"] = json.dumps(found)

def tensor(name, change):
    def apply(metadata, tensors):
        t = change(tensors[name])
        tensors.pop(name) if t is None else tensors.update({name: t})
    return apply

def add(t, index, value):
    t = t.clone()
    t[index] += value
    return t

def flags_as(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)

MISSING = ("tokens", "prompt_end", "top", "flags", "sha256", "layer.0.kv", "layer.1.count",
           "layer.0.vectors", "layer.1.open", "layer.0.query_mean")
LIES = {
    **{f"{name} missing": tensor(name, lambda t: None) for name in MISSING},
    "format": lambda m, t: m.update(format="another"),
    "no settings": lambda m, t: m.pop("settings"),
    "settings no JSON": lambda m, t: m.update(settings="{"),
    "settings a list": lambda m, t: m.update(settings="[1]"),
    "a setting missing": without_setting,
    "unknown setting": setting(more=1),
    "budget": setting(budget=0),
    "huge budget": setting(budget=1 << 50),
    "budget is text": setting(budget="24"),
    "rank": setting(rank="best"),
    "keep": setting(keep=0.1),
    "pruned though all is kept": setting(keep=None),
    "more kept": setting(keep=2),
    "token too large": tensor("tokens", lambda t: t + 5),
    "token below -1": tensor("tokens", lambda t: t * 2 - 3),
    "padding first": tensor("tokens", lambda t: t.flip(1)),
    "one row less": tensor("tokens", lambda t: t[:1]),
    "tokens of no row": tensor("tokens", lambda t: t[:0]),
    "tokens flat": tensor("tokens", lambda t: t.flatten()),
    "shorter text": tensor("tokens", lambda t: t[:, :40]),
    "longest row padded": tensor("tokens", lambda t: torch.cat((t, t[:, :1] * 0 - 1), dim=1)),
    "tokens of another dtype": tensor("tokens", lambda t: t.double()),
    "flags empty": tensor("flags", lambda t: flags_as([])),
    "flags no list": tensor("flags", lambda t: flags_as({"0": 1})),
    "flags of another kind": tensor("flags", lambda t: flags_as([None, 1.5])),
    "flags of another dtype": tensor("flags", lambda t: t.long()),
    "prompt_end negative": tensor("prompt_end", lambda t: t - 100),
    "prompt_end beyond": tensor("prompt_end", lambda t: t + 100),
    "top small": tensor("top", lambda t: t - t),
    "top large": tensor("top", lambda t: t + 10 ** 6),
    "kv shorter": tensor("layer.1.kv", lambda t: t[:, :-1]),
    "kv longer": tensor("layer.1.kv", lambda t: torch.cat((t, t), dim=1)),
    "kv of another dtype": tensor("layer.0.kv", lambda t: t.float()),
    "vectors fewer": tensor("layer.0.vectors", lambda t: t[:, :, :-1]),
    "vectors wider": tensor("layer.0.vectors", lambda t: torch.cat((t, t), dim=-1)),
    "query_mean of another dtype": tensor("layer.0.query_mean", lambda t: t.double()),
    "count negative": tensor("layer.0.count", lambda t: add(add(t, (0, 3), -50), (0, 4), 50)),
    "count above the text": tensor("layer.0.count", lambda t: t * 3),
    "count after the text": tensor("layer.0.count", lambda t: add(add(t, (0, 2), -1), (0, -1), 1)),
    "count short": tensor("layer.0.count", lambda t: t[:, :3]),
    "count of fewer tokens": tensor("layer.0.count", lambda t: add(t, (0, 0), -1)),
    "the open sentence has lost a token": tensor(
        "layer.0.count", lambda t: add(t, (0, int((t[0] > 0).nonzero()[-1])), -1)),
    "observed again": lambda m, t: t.update(
        {"layer.1.observed": torch.zeros(2, 4, 4, 4, dtype=torch.float64)}),
    "a tensor too many": lambda m, t: t.update({"layer.2.kv": t["layer.1.kv"]}),
}

def refuse(path, model):
    """Loading raises one line that names the file."""
    with pytest.raises(ValueError) as error:
        load(path, model)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 600

def test_a_signed_file_that_lies_is_refused(tmp_path):
    model, cache, path = saved(tmp_path, keep=1)
    raw = path.read_bytes()
    sign(path, altered(raw, lambda metadata, tensors: None))
    assert_same_future(random.Random(0), model, [cache, load(path, model)], steps=2)
    for lie, change in LIES.items():
        sign(path, altered(raw, change))
        try:
            refuse(path, model)
        except BaseException as error:
            raise AssertionError(f"not refused: {lie}") from error

def damage(rng, raw):
    """Bits flipped, pieces cut out, doubled or zeroed, anywhere or in the header."""
    raw = bytearray(raw)
    limit = len(raw) if rng.random() < 0.5 else 8 + int.from_bytes(raw[:8], "little")
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

def test_random_damage_to_a_file_is_refused_or_harmless(tmp_path):
    """Every second file is signed, as if its damage had been there when it was written."""
    model, cache, path = saved(tmp_path, keep=1)
    raw, rng, harmless, rounds = path.read_bytes(), random.Random(7), 0, 200 * MORE
    for i in range(rounds):
        damaged = damage(rng, raw)
        path.write_bytes(damaged)
        if i % 2 and len(damaged) > 32:
            sign(path, damaged)
        try:
            loaded = load(path, model)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        harmless += 1
        assert i % 2 or damaged == raw      # without a right checksum nothing gets through
        for T in (1, 3, 1):                 # and what does is a cache that works
            assert model(torch.ones(2, T, dtype=torch.long), loaded).shape == (2, 6)
        fork(loaded)
        save(loaded, path, model)
        load(path, model)
    assert 0 < harmless < rounds / 2

SAVE_FOREVER = """
import sys, tempfile
sys.path[:0] = {folders!r}
from test_extras import *
model, cache, _ = saved(tempfile.mkdtemp())
print("ready", flush=True)
while True:
    save(cache, {path!r}, model)
    model(torch.tensor([[1], [1]]), cache)
"""

def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    model, _, path = saved(tmp_path)
    folders = [str(ROOT), str(ROOT / "tests")]
    code, seen = SAVE_FOREVER.format(folders=folders, path=str(path)), set()
    for _ in range(2 * MORE):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1 + random.random() * 0.3)
        process.kill()
        process.wait()
        seen.add(load(path, model).length)
    assert min(seen) >= 57 and max(seen) > 57

# --------------------------------------------------------------------------------- host pools

def test_a_cache_can_be_copied_and_pickled_on_the_cpu_and_says_what_to_use_on_cuda(pretended_gpu):
    rng, model = random.Random(3), toy_model()
    cache = toy_cache(host_pool=best_pool("cpu"))
    model(torch.tensor([toy_text(rng, 60)]), cache)
    assert_same_future(rng, model, [fork(cache), copy.deepcopy(cache)])
    on_gpu, gpu_model = toy_cache(host_pool=best_pool("cuda")), toy_model(device="cuda")
    gpu_model(torch.tensor([toy_text(rng, 60)]).cuda(), on_gpu)
    with pytest.raises(TypeError, match=r"use fork\(\) of extras/branch.py"):
        copy.deepcopy(on_gpu)

@pytest.mark.parametrize("works", [True, False])
def test_the_best_pool_is_zero_copy_where_it_works(works, pretended_gpu):
    pretended_gpu.zero_copy = works
    assert zero_copy.works(torch.device("cuda")) is works
    assert best_pool(torch.device("cuda")) is (ZeroCopyPool if works else CarefulPool)
    assert best_pool("cpu") is CarefulPool and issubclass(CarefulPool, HostPool)

def test_memory_that_cannot_be_pinned_is_used_with_one_warning(pretended_gpu, monkeypatch):
    """The cache goes on with pageable memory where it was pinned until then; bits are equal."""
    rng, kinds = random.Random(0), (HostPool, ZeroCopyPool)
    model = toy_model(device="cuda")
    caches = [toy_cache(host_pool=kind) for kind in kinds]
    for cache in caches:
        model(torch.tensor([toy_text(random.Random(0), 40)]).cuda(), cache)
    empty = torch.empty

    def no_pinned(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    tokens = torch.tensor([toy_text(rng, 500)]).cuda()
    expected = [model(tokens, caches[0]), model(tokens[:, :1], caches[0])]
    monkeypatch.setattr(torch, "empty", no_pinned)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [model(tokens, caches[1]), model(tokens[:, :1], caches[1])]
    assert [str(w.message) for w in caught] == [
        "host memory cannot be pinned: fetching will be slower"]
    assert all(map(torch.equal, got, expected))
    assert not caches[1].layers[0].pool.kv.is_pinned()

def test_too_little_host_memory_says_what_to_do(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match="no host memory for 0.0 GB .* lower keep, or shorten"):
        CarefulPool(1, 2, 4, torch.float32, torch.device("cpu"))

@every_rank
@pytest.mark.parametrize("keep", [None, 1])
def test_zero_copy_and_cuda_graphs_compute_what_the_cpu_does(rank, keep, pretended_gpu):
    """Also after forks, follow-ups, truncation and loading, with rows that idle in some steps."""
    rng, model, on_gpu = random.Random(0), toy_model(), toy_model(device="cuda")
    caches = [toy_cache(rank=rank, keep=keep),
              *(toy_cache(rank=rank, keep=keep, host_pool=kind)
                for kind in (HostPool, ZeroCopyPool, ZeroCopyPool))]
    steps = [lambda tokens, cache=cache: on_gpu(tokens, cache) for cache in caches[1:3]]
    graphed = GraphedStep(on_gpu, caches[3])
    steps.append(graphed)

    def compare(tokens, steps):
        expected, real = model(tokens, caches[0]), tokens[:, 0] >= 0
        for step, cache in zip(steps, caches[1:]):
            assert_close(step(tokens.to("cuda")).cpu()[real], expected[real])
            if tokens.shape[1] == 1 and bool(real.all()):
                assert_same_fetches(cache, caches[0])

    def decode(n):
        for i in range(n):
            compare(column([toy_text(rng, 1)[0], -1 if i % 5 == 3 else toy_text(rng, 1)[0]]), steps)

    def prompt(*sizes):
        compare(ragged([toy_text(rng, n) for n in sizes]),
                [lambda tokens, cache=cache: on_gpu(tokens, cache) for cache in caches[1:]])

    prompt(60, 41)
    decode(25)
    twins = [fork(cache) for cache in caches]
    decode(4)
    prompt(3, 7)
    decode(6)
    for cache in caches:
        truncate(cache, [n - 4 for n in lengths(cache)])
    decode(6)
    captures, replays = len(pretended_gpu.graphs), sum(g.replays for g in pretended_gpu.graphs)
    assert captures < 8 and replays > 30                    # it was not captured in every step
    caches[:], steps[2] = twins, GraphedStep(on_gpu, twins[3])
    steps[:2] = [lambda tokens, cache=cache: on_gpu(tokens, cache) for cache in caches[1:3]]
    decode(8)                                               # in branches
    assert sum(g.replays for g in pretended_gpu.graphs) > replays + 5

def test_a_decode_step_with_zero_copy_never_waits_for_the_gpu(pretended_gpu):
    rng, model = random.Random(0), toy_model(device="cuda")
    for kind, waits in ((ZeroCopyPool, False), (HostPool, True)):
        cache = toy_cache(host_pool=kind)
        for T in (60, 1):
            model(torch.tensor([toy_text(rng, T)]).cuda(), cache)
        twin = fork(cache)
        for one in (cache, twin):
            tokens = torch.tensor([[1]]).cuda()
            positions = one.begin(tokens)
            torch.cuda.set_sync_debug_mode("error")
            try:
                model.compute(tokens, positions, one)
                assert not waits
            except RuntimeError as error:
                assert waits and "waits for the device" in str(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")

def test_a_cuda_graph_generates_loads_and_recovers(tmp_path, pretended_gpu):
    rng, model, on_gpu = random.Random(0), toy_model(), toy_model(device="cuda")
    prompt, cache = torch.tensor([toy_text(rng, 60)]), toy_cache()
    expected = [int(x) for x in model.generate(prompt, cache, 40)]
    path = tmp_path / "some.cache"
    save(cache, path, model)
    on_gpu.load_state_dict(model.state_dict())
    for host_pool in (ZeroCopyPool, HostPool):              # the latter: steps without a graph
        graphed = toy_cache(host_pool=host_pool)
        step = GraphedStep(on_gpu, graphed)
        found = on_gpu.generate(prompt.cuda(), graphed, 40, step=step)
        assert [int(x) for x in found] == expected
        assert texts(graphed) == texts(cache)
        loaded = load(path, on_gpu, host_pool)
        assert loaded.layers[0].pool.kv.is_pinned()
        step = GraphedStep(on_gpu, loaded)
        one = fork(cache)
        for _ in range(6):
            token = torch.tensor([toy_text(rng, 1)])
            assert torch.equal(step(token.cuda()).cpu(), model(token, one))
        assert (sum(g.replays for g in pretended_gpu.graphs) > 0)
        held = lengths(loaded)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            def interrupt(*_):
                raise KeyboardInterrupt
            patch.setattr(type(on_gpu), "compute", interrupt)
            patch.setattr(torch.cuda.CUDAGraph, "replay", interrupt)
            step(torch.tensor([[1]]).cuda())
        with pytest.raises(ValueError, match="use a new cache, or truncate"):
            step(torch.tensor([[1]]).cuda())
        truncate(loaded, held)
        truncate(one, held)
        assert torch.equal(step(torch.tensor([[2]]).cuda()).cpu(), model(torch.tensor([[2]]), one))

def test_a_cuda_graph_needs_a_cuda_device_and_a_sentence_cache(pretended_gpu):
    with pytest.raises(ValueError, match="needs a CUDA device, the model is on cpu"):
        GraphedStep(toy_model(), toy_cache())
    with pytest.raises(ValueError, match="needs a SentenceKV"):
        GraphedStep(toy_model(device="cuda"), DenseKV())

# ----------------------------------------------------------------------------- on a real GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

@needs_cuda
@pytest.mark.parametrize("host_pool", [HostPool, ZeroCopyPool])
@pytest.mark.parametrize("keep", [None, 1])
def test_cuda_fetches_the_same_sentences_and_tokens_as_the_cpu(host_pool, keep):
    """The side stream is made slow on purpose: what a prompt wrote arrives all the same."""
    rng, model, on_gpu = random.Random(0), toy_model(), toy_model().cuda()
    caches = toy_cache(keep=keep), toy_cache(keep=keep, host_pool=host_pool)
    for T in (400, 1, 1, 1, 30, *[1] * 40):
        pools = [layer.pool for layer in caches[1].layers]
        for pool in pools:
            with torch.cuda.stream(pool.stream):
                torch.cuda._sleep(10_000_000)
        tokens = torch.tensor([toy_text(rng, T), toy_text(rng, T)])
        assert_close(model(tokens, caches[0]), on_gpu(tokens.cuda(), caches[1]).cpu())
        if T == 1:
            assert_same_fetches(caches[1], caches[0])
    for a, b in zip(*(cache.layers for cache in caches)):
        assert b.pool.kv.is_pinned() and a.pool.used == b.pool.used
        for row in range(2):
            assert_close(a.pool.read(row), b.pool.read(row).cpu())

@needs_cuda
def test_a_real_cuda_graph_gives_the_tokens_of_eager_steps():
    rng, model = random.Random(0), toy_model().cuda()
    prompt, cache = torch.tensor([toy_text(rng, 600)]).cuda(), toy_cache(host_pool=ZeroCopyPool)
    model.prefill(prompt, cache)
    found = []
    for graph in (False, True):
        one = fork(cache)
        step = GraphedStep(model, one) if graph else None
        found.append([int(x) for x in model.generate(prompt[:, :5], one, 300, step=step)])
    assert found[0] == found[1]
