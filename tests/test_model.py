"""The model, the dense cache, generation and the loaders, against plain float64 references."""
import json
import math
import os
import random
import struct
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sentencekv
from experiments.shapes import SHAPES, random_llama
from extras.check_memory import available_memory, check_memory
from extras.meta import LLAMA3_ROPE, load_meta, meta_config
from model import Config, DenseKV, Llama, huggingface_config, rope_frequencies, sample
from sentencekv import SentenceKV, sentence_flags

torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other
MORE = int(os.environ.get("MORE", 1))  # MORE=20: longer fuzzing, by hand

LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}

# --------------------------------------------------------------------------------- tools

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, rope_scaling=None,
             tie_word_embeddings=False)


def small_model(seed=0, **changes):
    """Two layers; norms that are not 1, so that a lost or swapped one is seen."""
    model = random_llama("tiny", seed=seed, **{**SMALL, **changes})
    for p in model.parameters():
        if p.ndim == 1:
            p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def tokens_of(model, B, T, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (B, T), generator=rng)


def sentence_cache(**changes):
    """A SentenceKV whose budget covers every text here: it must compute what DenseKV does."""
    words = [b" word", b".", b" Next", b"\n\n"]
    return SentenceKV(sentence_flags(words * 10), **{"budget": 600, "max_sentence": 9, **changes})


CACHES = pytest.mark.parametrize("new_cache", [DenseKV, sentence_cache])


def uneven(rows):
    """Lists of ids -> (B, T), shorter rows padded with -1."""
    T = max(map(len, rows))
    return torch.tensor([row + [-1] * (T - len(row)) for row in rows])


def all_logits(model, tokens):
    return model(tokens, DenseKV(), all_logits=True)


def assert_same(a, b, tolerance=0.0):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance, f"max difference {(a - b).abs().max():.2e}"


# --------------------------------------------------------------------------------- the model


def plain_frequencies(c):
    """Both scalings as published: by wavelength, pair by pair."""
    out = []
    for i in range(c.head_dim // 2):
        f = c.rope_theta ** (-2 * i / c.head_dim)
        s = c.rope_scaling
        if s and s["rope_type"] == "linear":
            f = f / s["factor"]
        elif s:
            old = s["original_max_position_embeddings"]
            wavelength = 2 * math.pi / f
            if wavelength > old / s["low_freq_factor"]:
                f = f / s["factor"]
            elif wavelength >= old / s["high_freq_factor"]:
                smooth = (old / wavelength - s["low_freq_factor"]) / (
                    s["high_freq_factor"] - s["low_freq_factor"])
                f = (1 - smooth) * f / s["factor"] + smooth * f
        out.append(f)
    return out


def plain_forward(model, tokens):
    """Llama by definition in float64, position by position. tokens (T,) -> logits (T, V)."""
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    d, G = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    frequency = plain_frequencies(c)

    def norm(x, g):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps) * g

    def turn(x, t):                                         # (d,) at position t
        out = x.clone()
        for i in range(d // 2):
            cos, sin = math.cos(t * frequency[i]), math.sin(t * frequency[i])
            a, b = x[i], x[i + d // 2]
            out[i], out[i + d // 2] = a * cos - b * sin, a * sin + b * cos
        return out

    x = w["embed_tokens.weight"][tokens]
    for n in range(c.num_hidden_layers):
        layer = lambda name: w[f"layers.{n}.{name}.weight"]
        h = norm(x, layer("input_layernorm"))
        q, k, v = ((h @ layer(f"self_attn.{s}_proj").T).view(len(h), -1, d) for s in "qkv")
        y = torch.zeros_like(q)
        for head in range(c.num_attention_heads):
            keys = torch.stack([turn(k[s, head // G], s) for s in range(len(h))])
            for t in range(len(h)):
                p = (keys[:t + 1] @ turn(q[t, head], t) / math.sqrt(d)).softmax(0)
                y[t, head] = p @ v[:t + 1, head // G]
        x = x + y.flatten(1) @ layer("self_attn.o_proj").T
        h = norm(x, layer("post_attention_layernorm"))
        gate = h @ layer("mlp.gate_proj").T
        hidden = gate / (1 + torch.exp(-gate)) * (h @ layer("mlp.up_proj").T)
        x = x + hidden @ layer("mlp.down_proj").T
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return norm(x, w["norm.weight"]) @ w[head].T


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
    {"head_dim": 6}, {"rope_scaling": LINEAR_ROPE},
    {"rope_theta": 100.0, "rope_scaling": {**LLAMA3_ROPE, "factor": 4.0,
                                           "original_max_position_embeddings": 8}}], ids=str)
def test_logits_equal_a_plain_float64_forward(changes):
    model = small_model(**changes).double()
    tokens = tokens_of(model, 2, 11)
    want = torch.stack([plain_forward(model, row) for row in tokens])
    assert_same(all_logits(model, tokens), want.float(), 2e-5)      # the angles are float32
    assert_same(model(tokens, DenseKV()), want[:, -1].float(), 2e-5)


def test_rope_frequencies_equal_the_plain_formula_and_stay_in_float32():
    shape = SHAPES["llama-3.1-8b"]
    configs = [Config(**each) for each in SHAPES.values()]
    configs.append(Config(**{**shape, "rope_scaling": LINEAR_ROPE}))
    for c in configs:
        want = torch.tensor(plain_frequencies(c), dtype=torch.double)
        torch.testing.assert_close(rope_frequencies(c).double(), want, rtol=1e-6, atol=0)
    plain = rope_frequencies(Config(**{**shape, "rope_scaling": None}))
    ratio = rope_frequencies(Config(**shape)) / plain
    assert (ratio[:20] == 1).all() and (ratio[-20:] == 1 / 8).all()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()
    model = small_model()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            frequency = rope_frequencies(model.config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert frequency.dtype == torch.float32
        assert torch.equal(model.to(dtype).inv_freq, frequency)


@pytest.mark.parametrize("shape, count", [
    ("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400),
    ("llama-3.2-3b", 3_212_749_824)])
def test_named_shapes_have_the_published_parameter_counts(shape, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(Config(**SHAPES[shape])).parameters()) == count
    factor = 8.0 if shape == "llama-3.1-8b" else 32.0
    assert SHAPES[shape]["rope_scaling"] == {**LLAMA3_ROPE, "factor": factor}


def test_random_weights_are_those_of_their_seed():
    first, same, other = (random_llama("tiny", seed=seed).embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_forward_can_be_trained():
    model = small_model().double().requires_grad_(True)
    tokens = tokens_of(model, 1, 9)
    loss = lambda: all_logits(model, tokens).double().square().sum()
    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    w = model.layers[0].self_attn.k_proj.weight
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(w.shape, dtype=torch.double, generator=rng)
    with torch.no_grad():
        w += 1e-3 * direction
        up = loss()
        w -= 2e-3 * direction
        slope = (up - loss()) / 2e-3
    assert abs(slope - (w.grad * direction).sum()) < 1e-2 * max(1, abs(slope))


def test_a_context_beyond_what_the_model_was_made_for_gives_a_warning():
    model = small_model(max_position_embeddings=20)
    for cache in (DenseKV(), sentence_cache()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.prefill(tokens_of(model, 1, 20), cache)
        with pytest.warns(UserWarning, match="longer than max_position_embeddings"):
            model(tokens_of(model, 1, 1), cache)


@pytest.mark.parametrize("tokens, message", [
    (torch.zeros(3, 4, dtype=torch.long), "2 rows, got tokens for 3"),
    (torch.zeros(2, 1), "tokens must be int64 (B, T)"),
    (torch.zeros(2, 0, dtype=torch.long), "tokens must be int64 (B, T)"),
    (torch.zeros(2, dtype=torch.long), "tokens must be int64 (B, T)"),
    ([[1, 2], [3, 4]], "tokens must be int64 (B, T)"),
    (torch.zeros(2, 2, dtype=torch.bool), "tokens must be int64 (B, T)"),
    (torch.tensor([[0], [37]]), "token ids must be -1 to 36"),
    (torch.tensor([[0, 1], [-2, 3]]), "token ids must be -1 to 36"),
    (torch.tensor([[0, 1], [-1, 3]]), "-1 is padding"),
    (torch.tensor([[0, -1, 1]] * 2), "-1 is padding")], ids=str)
def test_bad_tokens_are_refused_and_leave_the_cache_alone(tokens, message):
    model, cache, clean = small_model(), DenseKV(), DenseKV()
    for each in (cache, clean):
        model(tokens_of(model, 2, 5), each)
    for call in (model, model.prefill, model.generate):
        with pytest.raises(ValueError) as e:
            list(call(tokens, cache))
        assert message in str(e.value) and cache.length == 5
    step = tokens_of(model, 2, 1)
    assert torch.equal(model(step, cache), model(step, clean))


# --------------------------------------------------------------------------------- the dense cache


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 99))
def test_dense_cache_in_pieces_equals_at_once(pieces, seed):
    model = small_model()
    tokens, cache = tokens_of(model, 2, sum(pieces), seed), DenseKV()
    parts = [model(t, cache, all_logits=True) for t in tokens.split(pieces, dim=1)]
    assert_same(torch.cat(parts, dim=1), all_logits(model, tokens), 2e-5)
    assert cache.length == sum(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_cache_grows_over_many_single_steps(dtype):
    model = small_model().to(dtype)
    tokens, cache = tokens_of(model, 1, 200), DenseKV()
    got = torch.stack([model(tokens[:, i:i + 1], cache) for i in range(200)], dim=1)
    assert_same(got, all_logits(model, tokens), 2e-5 if dtype == torch.float32 else 0.3)
    assert {t.dtype for t in cache.keys + cache.values} == {dtype}
    token_bytes = 2 * 2 * 2 * 4 * dtype.itemsize             # layers, K and V, heads, d
    device = cache.memory()["device"]
    assert 200 * token_bytes <= device <= (200 + 64 + 200 / 8) * token_bytes
    addresses = [k.data_ptr() for k in cache.keys]
    model(tokens[:, :1], cache)
    assert addresses == [k.data_ptr() for k in cache.keys]   # a step copies nothing


def test_dense_cache_long_prompt_in_query_slices():
    model = small_model()
    tokens = tokens_of(model, 1, 1200)
    last = all_logits(model, tokens)[:, [511, 512, 1199]]
    want = torch.stack([model(tokens[:, :n], DenseKV()) for n in (512, 513, 1200)], dim=1)
    assert_same(last, want, 2e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([None, 3, 7]))
def test_uneven_rows_equal_each_row_alone(seed, B, chunk):
    """Prompts, follow-ups that some rows lack, and decode steps in which some rows idle."""
    rng, model, batch = random.Random(seed), small_model(seed % 9), DenseKV()
    text = lambda least: [rng.randrange(37) for _ in range(rng.randint(least, 20))]
    rows = [[] for _ in range(B)]
    for forward in range(8):
        if forward in (0, 4):
            new = [text(least=1 if forward == 0 else 0) for _ in rows]
            if max(map(len, new)) < 2:                      # that would be a decode step
                new[0] = [1, 2]
        else:
            new = [text(1)[:rng.randint(0, 1)] for _ in rows]
            new[0] = new[0] or [3]
        out = model.prefill(uneven(new), batch, chunk)
        rows = [row + ids for row, ids in zip(rows, new)]
        assert batch.lengths == [len(row) for row in rows]
        assert batch.length == max(batch.lengths)
        for b, row in enumerate(rows):
            if new[b]:
                assert_same(out[b], all_logits(model, torch.tensor([row]))[0, -1], 3e-5)


def test_a_row_without_a_token_in_the_first_prompt_is_refused():
    cache = DenseKV()
    with pytest.raises(ValueError, match="every row of the first prompt needs a token"):
        small_model()(torch.tensor([[1, 2], [-1, -1]]), cache)
    assert cache.length == 0


def test_truncate_forgets_the_end_and_says_what_it_can_do():
    model, cache = small_model(), DenseKV()
    tokens = tokens_of(model, 2, 20)
    model(tokens, cache)
    for wrong in (0, 21, [5], [5, 21], [5, 5.0], -3):
        with pytest.raises(ValueError, match=r"truncate\(\) takes 1 to \[20, 20\]"):
            cache.truncate(wrong)
    cache.truncate([7, 12])
    out = model(tokens[:, :2], cache)
    for b, n in enumerate((7, 12)):
        alone = torch.cat((tokens[b:b + 1, :n], tokens[b:b + 1, :2]), dim=1)
        assert_same(out[b:b + 1], model(alone, DenseKV()), 2e-5)


def test_a_cache_of_another_model_is_refused():
    small, cache = small_model(), DenseKV()
    small(tokens_of(small, 1, 5), cache)
    with pytest.raises(ValueError, match="layer 2 is not the next"):
        small_model(num_hidden_layers=3)(tokens_of(small, 1, 5), cache)
    cache = DenseKV()
    cache.begin(torch.ones(1, 3, dtype=torch.long))
    q = torch.zeros(1, 4, 3, 4)
    with pytest.raises(ValueError, match="layer 1 is not the next"):
        cache.attend(1, q, q, q)


@CACHES
@pytest.mark.parametrize("chunk", [None, 4])
def test_an_interrupted_forward_is_noticed_wherever_it_stops(new_cache, chunk):
    """Ctrl-C in a first prompt, a follow-up, or a decode step, after any layer of any chunk."""
    model = small_model()
    prompt, more = tokens_of(model, 2, 12), tokens_of(model, 2, 9, seed=1)
    steps = [(prompt, 0), (more, 12), (more[:, :1], 12)]
    for tokens, before in steps:
        layers = 2 * math.ceil(tokens.shape[1] / (chunk or 99))
        for stop in range(1, layers + 1):
            cache = new_cache()
            if before:
                model.prefill(prompt, cache)

            def interrupt(done, total):
                assert total == layers
                if done == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                if chunk:
                    model.prefill(tokens, cache, chunk, interrupt)
                else:
                    model(tokens, cache, progress=interrupt)
            for next_tokens in (more, more[:, :1]):
                with pytest.raises(ValueError, match="interrupted: .*truncate"):
                    model(next_tokens, cache)
            if new_cache is not DenseKV:
                continue
            text = prompt if before else prompt[:, :4]      # what all layers hold
            if not before and stop <= 2:
                with pytest.raises(ValueError, match=r"truncate\(\) takes 1 to"):
                    cache.truncate(1)
                continue
            cache.truncate(text.shape[1])
            clean = DenseKV()
            model.prefill(text, clean)
            for each in (more, more[:, :1]):
                assert_same(model(each, cache), model(each, clean), 2e-5)


@CACHES
def test_an_interruption_between_or_before_chunks_is_noticed(new_cache, monkeypatch):
    """Ctrl-C while begin() reads the tokens: before all chunks nothing has changed."""
    model = small_model()
    tokens, cache = tokens_of(model, 1, 9), new_cache()
    begin = cache.begin

    def interrupted(part):
        if cache.length >= stop:
            raise KeyboardInterrupt
        return begin(part)

    for stop in (0, 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache, "begin", interrupted)
            model.prefill(tokens, cache, chunk=4)
        if stop == 0:
            assert_same(model(tokens, cache), model(tokens, DenseKV()), 2e-5)
            cache = new_cache()
            begin = cache.begin
    with pytest.raises(ValueError, match="interrupted"):
        model(tokens, cache)


def test_a_begin_that_fails_changes_nothing(monkeypatch):
    cache, model = DenseKV(), small_model()
    tokens = tokens_of(model, 1, 5)
    model(tokens, cache)
    monkeypatch.setattr("builtins.zip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens, cache)
    monkeypatch.undo()
    twice = torch.cat((tokens, tokens), dim=1)
    assert_same(model(tokens, cache), all_logits(model, twice)[:, -1], 2e-5)


@CACHES
def test_prefill_in_inference_mode_and_generation_outside_of_it(new_cache):
    model = small_model()
    tokens = tokens_of(model, 2, 9)
    caches = [new_cache(), new_cache()]
    model(tokens, caches[0])
    with torch.inference_mode():
        model(tokens, caches[1])
    texts = [torch.stack([*model.generate(tokens, cache, 100)]) for cache in caches]
    assert torch.equal(*texts)


# --------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize("T, chunk, pieces", [
    (10, None, [10]), (10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (4, 3, [2, 2]), (4, 9, [4]),
    (1, 4, [1]), (5, 5, [5])])
def test_prefill_cuts_a_prompt_so_that_no_piece_is_a_decode_step(T, chunk, pieces, monkeypatch):
    model, cache, seen, reports = small_model(), DenseKV(), [], []
    begin = cache.begin
    monkeypatch.setattr(cache, "begin", lambda t: seen.append(t.shape[1]) or begin(t))
    if chunk:
        with pytest.raises(ValueError, match="chunk must be None, or 3 or more"):
            model(tokens_of(model, 1, T), cache, all_logits=True, chunk=chunk)
    tokens = tokens_of(model, 1, T)
    got = model.prefill(tokens, cache, chunk, lambda *report: reports.append(report))
    assert seen == pieces
    assert reports == [(i + 1, 2 * len(pieces)) for i in range(2 * len(pieces))]
    assert_same(got, model(tokens, DenseKV()), 2e-5)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.nbytes)
        return out


@CACHES
def test_chunks_bound_the_largest_tensor(new_cache, monkeypatch):
    model = small_model(hidden_size=512, num_key_value_heads=1, num_attention_heads=2, head_dim=4)
    mask = lambda t, n: torch.ones(t, n, dtype=torch.bool).tril(n - t)
    monkeypatch.setattr(sentencekv, "causal_lower_right", mask)     # its class cannot be watched
    T, chunk, largest = 4000, 64, LargestTensor()
    with largest:
        model.prefill(tokens_of(model, 1, T), new_cache(), chunk)
    one_layer, scores = T * 1.2 * 2 * 4 * 4, 2 * chunk * T * 4
    assert largest.bytes <= max(one_layer, scores) < T * 512 * 4 / 3    # less than hidden states


def test_too_little_host_memory_for_a_prompt_is_noticed(monkeypatch):
    model = small_model()
    tokens = tokens_of(model, 2, 1000)
    size = 2 * 1000 * 2 * 2 * 2 * 4 * 4             # rows, tokens, layers, heads, K and V, d, bytes
    for cache in (DenseKV(), sentence_cache(budget=64)):
        monkeypatch.setattr("extras.check_memory.available_memory", lambda: size - 1)
        with pytest.raises(MemoryError, match="take 0.0 GB of host memory, 0.0 GB are free"):
            check_memory(model, tokens, cache)
        for free in (size, None):
            monkeypatch.setattr("extras.check_memory.available_memory", lambda: free)
            check_memory(model, tokens, cache)


def test_available_memory_is_what_the_system_says():
    free = available_memory()
    if free is None:
        assert not os.path.exists("/proc/meminfo")
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert total / 1000 < free <= total


# --------------------------------------------------------------------------------- generate


def test_greedy_generation_is_the_argmax_of_the_logits():
    model, cache = small_model(), DenseKV()
    tokens = tokens_of(model, 2, 6)
    got = torch.stack([*model.generate(tokens, cache, 9, chunk=4)], dim=1)
    text = torch.cat((tokens, got), dim=1)
    assert torch.equal(got, all_logits(model, text)[:, 5:-1].argmax(-1))
    assert cache.lengths == [14, 14]                        # all but the last token


def test_sampling_with_a_seed_is_repeatable():
    model = small_model()
    tokens = tokens_of(model, 3, 5)
    run = lambda seed: torch.stack([*model.generate(tokens, DenseKV(), 20, 1.5, 0.95, seed)])
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("top_p, kept", [
    (1e-12, {0}), (0.1, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}),
    (1.0, {0, 1, 2, 3})])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4000, 4)
    got = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    if top_p == 0.76:                                       # a tie: either of the two last
        got = got.clamp(max=2)
    assert set(got.tolist()) == kept


def test_sampling_follows_the_probabilities_and_the_temperature():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None].expand(20000, 4)
    for temperature in (1.0, 2.0):
        ids = sample(logits, temperature, 1.0, torch.Generator().manual_seed(0))
        want = (logits[0] / temperature).softmax(0)
        assert_same(ids.bincount(minlength=4) / 20000, want, 0.02)
    assert (sample(logits * 1000, 1e-300, 1.0) == 0).all()
    assert (sample(logits, 1e-5, 0.9) == 0).all()


def test_rows_stop_independently_and_generation_ends_with_the_last():
    model = small_model()
    tokens = tokens_of(model, 3, 7)
    run = lambda **more: torch.stack(
        [*model.generate(tokens, DenseKV(), 30, 1.0, seed=5, **more)], dim=1)
    free = run()
    stops = {int(free[0, 3]), int(free[1, 8])}
    got = run(stop_ids=stops)
    ends = []
    for row in got.tolist():
        end = next((i for i, t in enumerate(row) if t in stops), len(row) - 1)
        assert all(t == row[end] for t in row[end:])
        ends.append(end)
    assert len(set(ends)) > 1 and got.shape[1] == min(max(ends) + 1, 30)
    first = min(ends)
    assert torch.equal(got[:, :first + 1], free[:, :first + 1])
    assert [len([*model.generate(tokens, DenseKV(), n)]) for n in (0, 1)] == [0, 1]


@CACHES
def test_rows_that_finish_at_different_times_are_what_they_would_be_alone(new_cache):
    """Also if nobody listens any more; and the batch goes on with a follow-up prompt."""
    if new_cache is sentence_cache:
        new_cache = lambda: sentence_cache(budget=24, window=4, sink=2, recent=5)   # a choice
    model = small_model(seed=5).double()
    rng = random.Random(5)
    prompts = [[rng.randrange(37) for _ in range(n)] for n in (12, 30, 21, 5)]
    free = [*model.generate(uneven(prompts), new_cache(), 5, 2.0, seed=7)]
    stops = {int(free[0][0]), int(free[2][2])}              # rows 0 and 2 end early
    batch = new_cache()
    stream = model.generate(uneven(prompts), batch, 12, 2.0, seed=7, stop_ids=stops)
    got = torch.stack([next(stream) for _ in range(5)], dim=1).tolist()
    stream.close()
    follow, rows = [], []
    for prompt, ids in zip(prompts, got):
        end = next((i + 1 for i, id in enumerate(ids) if id in stops), len(ids))
        assert ids[end:] == [ids[end - 1]] * (len(ids) - end)
        rows.append(new_cache())
        model(torch.tensor([prompt]), rows[-1])
        for id in ids[:end - 1]:                            # all but the last
            model(torch.tensor([[id]]), rows[-1])
        follow.append([ids[end - 1], *(rng.randrange(37) for _ in range(3))])
    assert len({row.length - len(prompt) for row, prompt in zip(rows, prompts)}) > 1
    assert batch.length == max(row.length for row in rows)
    for new in (follow, [[1]] * 4):
        out = model(uneven(new), batch)
        for b, row in enumerate(rows):
            assert_same(out[b:b + 1], model(torch.tensor([new[b]]), row), 1e-5)


@pytest.mark.parametrize("name, value", [
    ("max_new_tokens", -1), ("max_new_tokens", 1.5), ("max_new_tokens", None),
    ("temperature", -1), ("temperature", math.inf), ("temperature", math.nan),
    ("temperature", None), ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("top_p", None),
    ("seed", 0.5), ("seed", 1 << 64), ("stop_ids", 2), ("stop_ids", None), ("stop_ids", {1.5}),
    ("stop_ids", "2"), ("chunk", 2), ("chunk", 0)])
def test_generate_refuses_bad_arguments_at_the_first_step(name, value):
    model, cache = small_model(), DenseKV()
    with pytest.raises(ValueError, match=r"generate\(\): |chunk must be"):
        next(model.generate(tokens_of(model, 1, 3), cache, **{name: value}))
    if name == "chunk":
        with pytest.raises(ValueError, match="chunk must be None, or 3 or more"):
            model.prefill(tokens_of(model, 1, 9), cache, chunk=value)
    assert cache.length == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_not_sampled_from(bad):
    model = small_model()
    tokens = tokens_of(model, 2, 5)
    calls = []

    def step(tokens):
        calls.append(tokens)
        logits = torch.zeros(2, 37)
        logits[0, 7] = 1
        if len(calls) == 2:
            logits[1, 9] = bad
        return logits

    for temperature in (0.0, 1.0):
        calls.clear()
        stream = model.generate(tokens, DenseKV(), 9, temperature, seed=0, step=step)
        seen = [next(stream), next(stream)]
        assert torch.equal(calls[0], seen[0][:, None])      # step has replaced the model
        with pytest.raises(ValueError, match="step 2: the logits are not finite"):
            next(stream)
    model.norm.weight[3] = bad
    with pytest.raises(ValueError, match="step 0: the logits are not finite"):
        next(model.generate(tokens, DenseKV(), 9))


def test_a_finished_row_idles_and_its_logits_do_not_matter():
    model = small_model()
    tokens, steps = tokens_of(model, 2, 5), []

    def step(tokens):
        steps.append(tokens.flatten().tolist())
        logits = torch.zeros(2, 37)
        logits[0, 7] = logits[1, len(steps)] = 1
        return logits.masked_fill(tokens < 0, math.nan)

    ids = [x.tolist() for x in model.generate(tokens, DenseKV(), 9, stop_ids=[7, 4], step=step)]
    assert ids[1:] == [[7, 1], [7, 2], [7, 3], [7, 4]]
    assert steps == [ids[0], [-1, 1], [-1, 2], [-1, 3]]


# --------------------------------------------------------------------------------- checkpoints

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Q = "model.layers.1.self_attn.q_proj.weight"
FIRST = "model.embed_tokens.weight"
TO_META = {"embed_tokens": "tok_embeddings", "lm_head": "output",
           "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
           "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
           "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
           "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
           "post_attention_layernorm": "ffn_norm"}


def hf_tensors(model):
    prefix = lambda name: name if name == "lm_head.weight" else "model." + name
    return {prefix(name): p.detach() for name, p in model.named_parameters()}


def safetensors_parts(tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": place}
        data += raw
    return header, data


def pack(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write_tensors(path, tensors):
    path.write_bytes(pack(*safetensors_parts(tensors)))


def config_json(c):
    return {**vars(c), "model_type": "llama", "torch_dtype": "float32", "pretraining_tp": 1}


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_hf(path, model, shards=1):
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", config_json(model.config))
    tensors = hf_tensors(model)
    if shards == 1:
        write_tensors(path / "model.safetensors", tensors)
        return path
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
              for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write_tensors(path / file, {n: t for n, t in tensors.items() if places[n] == file})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return path


def write_meta(path, model, **params):
    """The inverse of the documented permutation: the halves of each head are interleaved."""
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
    write_json(path / "params.json", {
        "dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads, "vocab_size": -1, "multiple_of": 8,
        "ffn_dim_multiplier": 0.5, "norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta,
        "use_scaled_rope": c.rope_scaling is not None, **params})
    return path


def refuse(path, *words, kinds=ValueError, load=Llama.from_pretrained):
    """Loading fails with an error of one line that has these words."""
    with pytest.raises(kinds) as e:
        load(path)
    message = str(e.value)
    assert type(e.value) in (ValueError, FileNotFoundError)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("dtype, shards, tied", [
    (torch.float32, 1, False), (torch.float32, 3, True), (torch.float16, 3, False),
    (torch.bfloat16, 1, True)], ids=str)
def test_hugging_face_round_trip(tmp_path, dtype, shards, tied):
    model = small_model(tie_word_embeddings=tied, rope_scaling=LLAMA3_ROPE).to(dtype)
    calls, path = [], write_hf(tmp_path / "m", model, shards)
    got = Llama.from_pretrained(path, progress=lambda *each: calls.append(each))
    assert vars(got.config) == vars(model.config)
    assert calls == [(i, 21 - tied) for i in range(1, 22 - tied)]
    for (name, p), q in zip(model.named_parameters(), got.parameters(), strict=True):
        assert torch.equal(p, q) and q.dtype == dtype and not q.requires_grad, name
    wide = Llama.from_pretrained(str(path), dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    for file in path.glob("*.safetensors"):                 # the model does not live in the file
        with open(file, "r+b") as f:
            f.write(bytes(file.stat().st_size))
    tokens = tokens_of(got, 1, 8)
    assert torch.equal(all_logits(got, tokens), all_logits(model, tokens))


@pytest.mark.parametrize("changes", [
    {}, {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
    {"rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}], ids=str)
def test_meta_round_trip_converts_the_rotary_layout(tmp_path, changes):
    model, calls = small_model(**changes), []
    path = write_meta(tmp_path / "m", model)
    got = load_meta(str(path), progress=lambda *each: calls.append(each))
    for (name, p), q in zip(model.named_parameters(), got.named_parameters(), strict=True):
        assert name == q[0] and torch.equal(p, q[1]) and not q[1].requires_grad, name
    assert got.config.rope_scaling == model.config.rope_scaling
    assert calls[-1] == (len(calls), len(list(model.parameters())))
    tokens = tokens_of(got, 2, 30)
    assert torch.equal(all_logits(got, tokens), all_logits(model, tokens))
    assert load_meta(path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    refuse(path, "config.json is missing", "params.json", kinds=FileNotFoundError)


def test_llama_3_1_in_metas_format_has_the_factor_8():
    p = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
         "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-5, "rope_theta": 500000.0,
         "use_scaled_rope": True}
    want = Config(**SHAPES["llama-3.1-8b"])
    want.max_position_embeddings = 4096                     # not in params.json
    assert meta_config(p, 128256, tied=False) == want


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE, {**LINEAR_ROPE, "factor": 2.0}], ids=str)
def test_configurations_of_all_ages_mean_the_same(tmp_path, scaling):
    model = small_model(num_key_value_heads=4, rope_theta=500.0, rope_scaling=scaling)
    path = write_hf(tmp_path / "m", model)
    j = config_json(model.config)
    new = dict(j, rope_parameters={"rope_theta": 500.0, "rope_type": "default", **(scaling or {})})
    del new["rope_scaling"], new["rope_theta"]
    optional = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    old = {name: value for name, value in j.items() if name not in optional}
    if scaling:
        old["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
        del old["rope_scaling"]["rope_type"]
    both = {**j, "rope_parameters": scaling}
    for variant in (new, old, both, dict(old, num_key_value_heads=None, head_dim=None)):
        write_json(path / "config.json", variant)
        assert vars(Llama.from_pretrained(path).config) == vars(model.config)
    write_json(path / "config.json", {**j, "rope_scaling": LINEAR_ROPE, "rope_parameters": new})
    refuse(path, "rope_scaling and rope_parameters differ")
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):
        j.pop(name)
    write_json(path / "config.json", j)
    c = Llama.from_pretrained(path).config                  # Hugging Face's defaults
    assert (c.rms_norm_eps, c.max_position_embeddings, c.rope_theta) == (1e-6, 2048, 10000)


def test_mistral_is_loaded_where_its_window_is_not_shorter_than_the_context(tmp_path):
    model = small_model(max_position_embeddings=500)
    path = write_hf(tmp_path / "m", model)
    j = {**config_json(model.config), "model_type": "mistral"}
    for window in (None, 500, 4096):
        write_json(path / "config.json", {**j, "sliding_window": window})
        assert vars(Llama.from_pretrained(path).config) == vars(model.config)
    for window in (499, "4096"):
        write_json(path / "config.json", {**j, "sliding_window": window})
        refuse(path, path / "config.json", "sliding window" if window == 499 else "TypeError")
    write_json(path / "config.json", {**j, "max_position_embeddings": 4097})
    refuse(path, "sliding window = 4096 < context")          # Hugging Face's default


@pytest.mark.parametrize("wrong", [
    "llama3", [], {**LLAMA3_ROPE, "more": 1.0}, {"factor": 8.0}, {"rope_type": "linear"},
    {**LLAMA3_ROPE, "rope_type": "linear"}, {"rope_type": "yarn", "factor": 8.0},
    {"rope_type": "linear", "factor": 0}, {**LLAMA3_ROPE, "factor": None},
    {**LLAMA3_ROPE, "low_freq_factor": 4.0}], ids=str)
def test_a_wrong_rope_scaling_is_refused(wrong):
    with pytest.raises(ValueError, match="rope_scaling"):
        Config(**{**SMALL, "rope_scaling": wrong})


@pytest.mark.parametrize("changes, word", [
    ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
    ({"head_dim": 3}, "even"), ({"head_dim": 2**23}, "huge"), ({"hidden_size": 12}, "even"),
    ({"hidden_size": "16"}, "Config: TypeError"), ({"num_attention_heads": 0}, "Config: Zero"),
    ({"rms_norm_eps": 0}, "rms_norm_eps or rope_theta is not > 0"),
    ({"rms_norm_eps": None}, "NoneType")],
    ids=str)
def test_a_config_that_cannot_be_says_why(changes, word):
    with pytest.raises(ValueError, match=word):
        Config(**{**SMALL, **changes})


@pytest.mark.parametrize("padding", range(4))
def test_safetensors_data_need_not_be_aligned(tmp_path, padding):
    model = small_model()
    path = write_hf(tmp_path / "m", model)
    header, data = safetensors_parts(hf_tensors(model))
    raw = json.dumps(header).encode() + b" " * padding
    (path / "model.safetensors").write_bytes(pack(raw, data))
    assert torch.equal(Llama.from_pretrained(path).lm_head.weight, model.lm_head.weight)


# What a lying entry of a safetensors header may be: None is no object at all.
ENTRY = {
    "a key is missing": lambda e: e.pop("shape"), "not an object": None,
    "dtype unknown": {"dtype": "F8_E4M3"}, "dtype null": {"dtype": None},
    "dtype a list": {"dtype": ["F32"]}, "dtype lies": {"dtype": "F16"},
    "negative shape": {"shape": [-16, -16]}, "float shape": {"shape": [16.0, 16]},
    "huge shape": {"shape": [1 << 62, 1 << 62]}, "endless shape": {"shape": [10 ** 99] * 99999},
    "zero shape": {"shape": [0, 16]}, "text shape": {"shape": "16"}, "no shape": {"shape": None},
    "another shape": {"shape": [32, 8]}, "wide shape": {"shape": [True, 256]},
    "one offset": {"data_offsets": [0]}, "three offsets": {"data_offsets": [0, 1024, 2048]},
    "float offsets": {"data_offsets": [0.0, 1024.0]},
    "text offsets": {"data_offsets": ["0", "1024"]},
    "negative offsets": {"data_offsets": [-1024, 0]},
    "backward offsets": {"data_offsets": [1024, 0]},
    "huge offsets": {"data_offsets": [1 << 70, (1 << 70) + 1024]},
    "overlap": {"data_offsets": [0, 1024]},
    "beyond the end": {"data_offsets": [1 << 20, (1 << 20) + 1024]}}


@pytest.mark.parametrize("change", ENTRY)
def test_a_lying_safetensors_entry_is_refused(tmp_path, change):
    model = small_model()
    path = write_hf(tmp_path / "m", model)
    header, data = safetensors_parts(hf_tensors(model))
    how = ENTRY[change]
    if callable(how):
        how(header[Q])
    else:
        header[Q] = "nonsense" if how is None else {**header[Q], **how}
    (path / "model.safetensors").write_bytes(pack(header, data))
    refuse(path, path)


def whole_files():
    """name -> (bytes of model.safetensors, what the message must name)"""
    header, data = safetensors_parts(hf_tensors(small_model()))
    raw = json.dumps(header).encode()
    start = struct.pack("<Q", len(raw))
    twice = raw[:-1] + b', "model.norm.weight": ' + json.dumps(header[Q]).encode() + b"}"
    extra = {**hf_tensors(small_model()), "model.extra\nname": torch.zeros(2)}
    tensors = hf_tensors(small_model())
    del tensors[Q]
    shared, fewer = safetensors_parts(tensors)
    shared[Q] = shared[Q.replace("1", "0")]
    early = {name: {**entry, "data_offsets": [at - 32 for at in entry["data_offsets"]]}
             for name, entry in header.items() if name not in ("__metadata__", FIRST)}
    broken = "no safetensors file, or cut off"
    return {
        "empty": (b"", "model.safetensors"), "seven bytes": (b"1234567", broken),
        "only a length": (start, broken), "half a header": (start + raw[:50], broken),
        "huge length": (b"\xff" * 8 + raw + data, broken),
        "length 0": (bytes(8) + raw + data, "JSON"),
        "short length": (pack(raw[:-9], raw[-9:] + data), "JSON"),
        "data cut": (pack(raw, data[:-1]), "model.safetensors"),
        "data added": (pack(raw, data + b"x"), "its tensors have"),
        "not UTF-8": (pack(b'{"\xff": 1}', data), "Unicode"),
        "a list": (pack(b"[1]", data), "model.safetensors"),
        "deep": (pack(b'{"a":' * 50000, data), "RecursionError"),
        "a name twice": (pack(twice, data), "model.safetensors"),
        "a gap": (pack({n: e for n, e in header.items() if n != Q}, data), "is at byte"),
        "shared bytes": (pack(shared, fewer), "is at byte"),
        "an overlap": (pack({FIRST: header[FIRST], **early}, data[32:]), "is at byte"),
        "no tensors": (pack(b"{}", b"x"), "its tensors have 0 bytes"),
        "an extra tensor": (pack(*safetensors_parts(extra)), "Unexpected key", "model.extra"),
        "big number": (pack(b'{"a": ' + b"9" * 5000 + b"}", data), "model.safetensors"),
        "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs")}


@pytest.mark.parametrize("case", whole_files())
def test_a_damaged_safetensors_file_is_refused(tmp_path, case):
    path = write_hf(tmp_path / "m", small_model())
    content, word, *_ = whole_files()[case]
    (path / "model.safetensors").write_bytes(content)
    refuse(path, path, word)


@pytest.mark.parametrize("how, word", [
    ("missing", "Missing key"), ("unexpected", "Unexpected key"), ("shape", "[16, 16]"),
    ("transposed", "size mismatch"), ("spelled twice", "is there twice")])
def test_every_tensor_is_accounted_for(tmp_path, how, word):
    model = small_model()
    path, tensors = write_hf(tmp_path / "m", model), hf_tensors(model)
    name = "model.layers.0.mlp.up_proj.weight" if how == "transposed" else Q
    if how == "missing":
        del tensors[name]
    elif how == "unexpected":
        name = "layers.1.self_attn.q_proj.bias"
        tensors[name] = torch.zeros(16)
    elif how == "spelled twice":
        tensors[name.removeprefix("model.")] = tensors[name] + 1
    else:
        tensors[name] = torch.zeros(16, 15) if how == "shape" else tensors[name].T
    write_tensors(path / "model.safetensors", tensors)
    refuse(path, path, name.removeprefix("model."), word)


def test_tied_embeddings_are_accepted_with_the_same_head_only(tmp_path):
    model = small_model(tie_word_embeddings=True)
    path, tensors = write_hf(tmp_path / "m", model), hf_tensors(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)    # in old files
    tensors["lm_head.weight"] = tensors[FIRST].clone()
    write_tensors(path / "model.safetensors", tensors)
    got = Llama.from_pretrained(path)
    assert got.lm_head is None and torch.equal(got.embed_tokens.weight, model.embed_tokens.weight)
    tensors["lm_head.weight"][3, 3] += 1
    write_tensors(path / "model.safetensors", tensors)
    refuse(path, "lm_head.weight", "differs")


def test_the_files_decide_which_tensors_there_are(tmp_path):
    """The index says which tensor is in which file; it can only repeat what the files say."""
    model = small_model()
    path = write_hf(tmp_path / "m", model, shards=2)
    index, second = path / "model.safetensors.index.json", path / "model-00002-of-00002.safetensors"
    places = json.loads(index.read_text())["weight_map"]
    for text in ("", '{"weight_map": null}', json.dumps({"weight_map": {Q: "../x.safetensors"}})):
        index.write_text(text)
        got = Llama.from_pretrained(path)
        assert all(map(torch.equal, got.parameters(), model.parameters()))
    tensors = {n: t for n, t in hf_tensors(model).items() if places[n] == second.name}
    write_tensors(second, {**tensors, FIRST: torch.zeros(37, 16)})
    refuse(path, second, "embed_tokens.weight is there twice")
    del tensors[Q]
    write_tensors(second, tensors)
    refuse(path, path, "Missing key", Q.removeprefix("model."))
    second.unlink()
    refuse(path, path, "Missing key")


CONFIG = {
    "vocab_size": ["37", None, 1 << 40], "hidden_size": [True, 0, 16.0, 17],
    "intermediate_size": [[]], "num_hidden_layers": [1 << 24, 1, -2],
    "num_attention_heads": [0, 3, 1 << 24], "num_key_value_heads": [3, 0, 4],
    "head_dim": [3, 1 << 24, 8], "rms_norm_eps": [0, math.nan, None], "rope_theta": ["1e4", -1],
    "tie_word_embeddings": ["false", True], "model_type": ["qwen2", None, ["llama"]],
    "hidden_act": ["gelu"], "attention_bias": [True], "mlp_bias": [True],
    "quantization_config": [{"bits": 4}], "partial_rotary_factor": [0.5],
    "rope_scaling": [
        "llama3", {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "llama3"},
        {**LLAMA3_ROPE, "factor": None}, {**LLAMA3_ROPE, "low_freq_factor": 4.0},
        {"rope_type": ["llama3"]}, {"type": "linear"}, {"type": "linear", "factor": "4"},
        {"type": "linear", "factor": 4.0, "hidden_size": 16}],
    "rope_parameters": [
        {"full_attention": {"rope_type": "llama3"}}, [1],
        {"rope_type": "default", "partial_rotary_factor": 0.5}]}


@pytest.mark.parametrize("name", CONFIG)
def test_a_wrong_config_is_refused(tmp_path, name):
    path = write_hf(tmp_path / "m", small_model())
    j = json.loads((path / "config.json").read_text())
    for value in CONFIG[name]:
        write_json(path / "config.json", {**j, name: value})
        refuse(path, path)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "model_type")
    if name in required:
        del j[name]
        write_json(path / "config.json", j)
        refuse(path, "config.json", name)


@pytest.mark.parametrize("text", [
    "", "[]", "{", "null", '{"a": 1, "a": 2}', "\ufeff{}", "[" * 50000], ids=range(7))
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    path = write_hf(tmp_path / "m", small_model())
    (path / "config.json").write_text(text)
    refuse(path, path / "config.json")


def test_files_that_are_missing_or_unsupported_are_named(tmp_path):
    both = (ValueError, FileNotFoundError)
    refuse(tmp_path, tmp_path, "config.json is missing", kinds=FileNotFoundError)
    refuse(tmp_path / "nowhere", tmp_path, kinds=FileNotFoundError)
    path = write_hf(tmp_path / "m", small_model())
    (path / "model.safetensors").unlink()
    refuse(path, path / "model.safetensors", kinds=FileNotFoundError)
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.00.pth"):
        (path / name).write_bytes(b"x")
        refuse(path, "model.safetensors is missing", name, kinds=FileNotFoundError)
        (path / name).unlink()
    (path / "model.safetensors").mkdir()
    refuse(path, "model.safetensors", kinds=both)
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    refuse(path, "config.json", kinds=both)
    meta = write_meta(tmp_path / "meta", small_model())
    (meta / "consolidated.00.pth").unlink()
    refuse(meta, "consolidated.00.pth", kinds=FileNotFoundError, load=load_meta)
    (meta / "params.json").unlink()
    refuse(meta, "params.json", kinds=FileNotFoundError, load=load_meta)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["LOADER_TEST_TRAP"],)


def test_code_in_a_pth_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOADER_TEST_TRAP", str(tmp_path / "trap"))
    path = write_meta(tmp_path / "m", small_model())
    torch.save({"tok_embeddings.weight": Code()}, path / "consolidated.00.pth")
    refuse(path, path / "consolidated.00.pth", load=load_meta)
    assert not (tmp_path / "trap").exists()


WQ = "layers.1.attention.wq.weight"
META = {
    "value is no tensor": ({WQ: [1, 2]}, WQ), "name is no text": ({5: torch.zeros(1)}, "int"),
    "integers": ({WQ: torch.zeros(16, 16, dtype=torch.int32)}, WQ),
    "shape": ({WQ: torch.zeros(16, 15)}, "q_proj"), "a vector": ({WQ: torch.zeros(16)}, "q_proj"),
    "far larger than its memory": ({WQ: torch.zeros(1, 1).expand(16, 16)}, WQ),
    "sparse": ({WQ: torch.zeros(16, 16).to_sparse()}, WQ),
    "on no device": ({WQ: torch.zeros(16, 16, device="meta")}, WQ),
    "no embedding": ({"tok_embeddings.weight": None}, "consolidated.00.pth"),
    "extra": ({"lora": torch.zeros(1)}, "lora"),
    "our names": ({"layers.1.self_attn.q_proj.weight": torch.zeros(16, 16)}, "q_proj")}


def test_a_damaged_meta_checkpoint_is_refused(tmp_path):
    path = write_meta(tmp_path / "m", small_model())
    file = path / "consolidated.00.pth"
    whole, content = file.read_bytes(), torch.load(file, weights_only=True)
    for change, word in META.values():
        torch.save({**content, **change}, file)
        refuse(path, path, word, load=load_meta)
    for raw in (b"", b"nonsense", whole[:1000], whole[:-100]):
        file.write_bytes(raw)
        refuse(path, file, load=load_meta)
    del content["output.weight"]
    torch.save(content, file)
    refuse(path, "output.weight", load=load_meta)
    (path / "consolidated.01.pth").write_bytes(b"")
    refuse(path, path, "split", load=load_meta)


@pytest.mark.parametrize("name, value", [
    ("dim", "16"), ("dim", 1 << 30), ("n_layers", 3), ("n_heads", 0), ("n_kv_heads", 3),
    ("multiple_of", 0), ("vocab_size", 5), ("ffn_dim_multiplier", math.nan),
    ("ffn_dim_multiplier", "2"), ("norm_eps", None), ("rope_theta", -1),
    ("use_scaled_rope", "false"), ("moe_args", {}), ("quantization_args", {})])
def test_wrong_meta_parameters_are_refused(tmp_path, name, value):
    as_config = ("n_layers", "n_kv_heads", "norm_eps", "ffn_dim_multiplier")
    path = write_meta(tmp_path / "m", small_model(), **{name: value})
    word = "" if name in as_config or value == 1 << 30 else name
    refuse(path, path, word, load=load_meta)


def damage(rng, raw):
    raw = bytearray(raw)
    pieces = [b"0", b"-1", b"1e9", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"NaN", b",",
              b'"']
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(raw))
        j = min(len(raw), i + rng.choice((1, 1, 2, 5, 40)))
        byte = bytes([rng.randrange(256)])
        raw[i:j] = rng.choice((byte, b"", rng.choice(pieces), raw[i:j] * 2))
    return bytes(raw)


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Of the header and the config: the right error, or the same weights."""
    rng, model, rounds = random.Random(0), small_model(), 100 * MORE
    single = write_hf(tmp_path / "one", model)
    header, data = safetensors_parts(hf_tensors(model))
    config = single / "config.json"
    targets = [
        (single / "model.safetensors", json.dumps(header).encode(), lambda raw: pack(raw, data)),
        (config, config.read_bytes(), bytes)]
    for file, good, make in targets:
        whole, refused = file.read_bytes(), 0
        for _ in range(rounds):
            file.write_bytes(make(damage(rng, good)))
            try:
                got = Llama.from_pretrained(file.parent)
            except (ValueError, FileNotFoundError) as e:
                assert type(e) in (ValueError, FileNotFoundError)
                assert str(file.parent) in str(e) and "\n" not in str(e)
                refused += 1
            else:
                assert all(map(torch.equal, got.parameters(), model.parameters()))
        file.write_bytes(whole)
        assert refused > 30 * MORE
