"""Sparse gradient compression: the optimizer, its recovery, and the fine-tuning that uses it."""
import math
import random
import re
from pathlib import Path

import pytest
import torch

import train_tiny
from experiments.shapes import random_llama
from experiments.training import tune
from experiments.training.corpus import OTHER, PREFIX, RELATIONS, VALUE, WORDS
from experiments.training.low_rank import GaLore, add_lora, merge_lora
from experiments.training.sgc import SGC, orthogonal_matching_pursuit, random_signs, sparsify
from model import DenseKV, Llama
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
torch.set_num_threads(1)

def parameters(*shapes, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]

def step(optimizer, params, seed):
    """One step with random gradients; every entry has its own size."""
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        sizes = torch.arange(1.0, p.numel() + 1).view_as(p).to(p)
        p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype) * sizes
    optimizer.step()

def plain_omp(A, y, s):
    """The textbook definition for one y (k,): least squares over all selected atoms, each round."""
    selected = []
    for _ in range(s):
        residual = y
        if selected:
            residual = y - A[:, selected] @ torch.linalg.lstsq(A[:, selected], y[:, None])[0][:, 0]
        correlation = (A.T @ residual).abs()
        correlation[selected] = -1
        selected.append(int(correlation.argmax()))
    x = y.new_zeros(A.shape[1])
    x[selected] = torch.linalg.lstsq(A[:, selected], y[:, None])[0][:, 0]
    return x

def recovered(k, s, n=256, trials=200):
    """Share of random s-sparse vectors that OMP recovers from k numbers."""
    x = sparsify(torch.randn(trials, n, generator=torch.Generator().manual_seed(k)), s).double()
    A = random_signs(k, n, k, x)
    assert set(A.unique().abs().tolist()) == {k ** -0.5}
    indices, values, _ = orthogonal_matching_pursuit(A, x @ A.T, s)
    found = torch.zeros_like(x).scatter_(1, indices, values)
    return float(((found - x).abs().amax(1) < 1e-6).float().mean())

@pytest.mark.parametrize("s", [2, 4, 8])
def test_omp_recovers_sparse_vectors_from_c_s_log_n_numbers(s):
    low, middle, high = [recovered(int(c * s * math.log(256)), s) for c in (0.6, 1.1, 2.5)]
    assert low < 0.2 < middle < 0.95 and high >= 0.98, (low, middle, high)

def test_omp_gives_dependent_atoms_no_weight_and_stays_finite():
    A = torch.eye(4)[:, [0, 0, 1, 1, 2]]                            # rank 3, atoms twice
    y = torch.tensor([[3.0, 2.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    _, values, residual = orthogonal_matching_pursuit(A, y, 5)
    assert residual.tolist() == [[0, 0, 0, 5], [0, 0, 0, 0]]
    assert sorted(values[0].tolist()) == [0, 0, 1, 2, 3] and values[1].tolist() == [0] * 5

def test_with_the_identity_and_s_k_n_equal_it_is_adamw_bit_for_bit():
    ours, theirs = (parameters((5, 3), (8,), (1, 21)) for _ in range(2))
    settings = dict(lr=0.03, betas=(0.8, 0.95), weight_decay=0.1)
    sgc = tune.Exact(ours, k=8, s=8, chunk=8, second="number", **settings)
    adamw = torch.optim.AdamW(theirs, eps=1e-8, foreach=False, **settings)
    for seed in range(6):
        step(sgc, ours, seed)
        step(adamw, theirs, seed)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs)) and sgc.residual == 0

@pytest.mark.parametrize("second", ["number", "chunk"])
def test_a_step_is_the_definition_of_the_docstring(second, monkeypatch):
    monkeypatch.setattr("experiments.training.sgc.AT_ONCE", 2)      # 3 chunks: OMP is called twice
    n, k, s, lr = 16, 8, 3, 0.05
    (w,) = parameters((5, 7), dtype=torch.float64)
    optimizer = SGC([w], lr, k, s, n, second, seed=2, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2)
    A = random_signs(k, n, 2, w)
    M, V = torch.zeros(2, 3, k, dtype=torch.float64)
    expected = w.detach().clone()
    for t in range(1, 5):
        step(optimizer, [w], seed=t)
        g = torch.cat((w.grad.flatten(), torch.zeros(13))).view(3, n)       # 35 entries, 3 chunks
        change = []
        for c in range(3):
            h = g[c] * (g[c].abs() >= g[c].abs().sort().values[-s])
            p = A @ h
            squares = p * p if second == "number" else (p * p).mean()
            M[c] = 0.7 * M[c] + 0.3 * p
            V[c] = 0.9 * V[c] + 0.1 * squares
            y = M[c] / (1 - 0.7 ** t) / ((V[c] / (1 - 0.9 ** t)).sqrt() + 1e-3)
            change.append(plain_omp(A, y, s))
        x = torch.cat(change)[:35].view(5, 7)
        expected = expected - lr * 0.2 * expected - lr * (s / k) ** 0.5 * x
        torch.testing.assert_close(w.detach(), expected)

def test_a_second_moment_in_k_numbers_loses_the_sparse_vector_and_one_number_keeps_it():
    h = sparsify(torch.randn(100, 256, generator=torch.Generator().manual_seed(0)), 8)
    for second, size, least, most in (("chunk", 1.0, 0.95, 1), ("chunk", 1e4, 0.95, 1),
                                      ("number", 1.0, 0, 0)):       # y is the signs of A h alone
        w = torch.zeros(100, 256, requires_grad=True)
        w.grad = h * size
        SGC([w], lr=0.01, k=64, s=8, second=second).step()
        right = torch.cosine_similarity(h, -w.detach()) > 0.9999
        assert least <= float(right.float().mean()) <= most
        length = w.detach().norm(dim=1) / 8 ** 0.5
        assert 0.008 < float(length.mean()) < 0.012                # lr: a typical change

@pytest.mark.parametrize("second, numbers", [("chunk", 12 + 1), ("number", 2 * 12)])
def test_the_state_has_the_claimed_size_and_continues_with_the_same_bits(second, numbers, tmp_path):
    straight = parameters((30, 9), (9,))                            # 5 chunks and 1
    first = SGC(straight, k=12, s=3, chunk=64, second=second, seed=5)
    for seed in range(3):
        step(first, straight, seed)
    assert tune.state_numbers(first) == 6 * numbers
    kept = [x for state in first.state.values() for x in state.values()]
    assert sum(x.untyped_storage().nbytes() for x in kept if torch.is_tensor(x)) == 24 * numbers
    torch.save((first.state_dict(), straight), tmp_path / "state")
    state, resumed = torch.load(tmp_path / "state")
    other = SGC(resumed, k=20, s=4, chunk=32, seed=0)               # the file's settings win
    other.load_state_dict(state)
    for seed in range(3, 6):
        step(first, straight, seed)
        step(other, resumed, seed)
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed))

def test_parameters_without_a_gradient_stay_and_groups_have_their_own_settings():
    a, b, c = parameters((40,), (40,), (40,))
    starts = [p.detach().clone() for p in (a, b, c)]
    a.grad, c.grad = torch.ones(40), torch.ones(40)
    SGC([{"params": [a, b]}, {"params": [c], "k": 4, "s": 1}], k=8, s=2, chunk=16).step()
    changed = [int((p != start).sum()) for p, start in zip((a, b, c), starts)]
    assert 3 < changed[0] <= 6 and changed[1] == 0 and 1 < changed[2] <= 3

@pytest.mark.parametrize("settings, message", [
    (dict(s=20, k=10), "SGC needs 1 <= s <= k <= chunk, got s 20, k 10, chunk 256: OMP recovers"),
    (dict(s=0), "got s 0"), (dict(k=64, chunk=32), "got s 6, k 64, chunk 32"),
    (dict(second="none"), 'second must be "chunk" or "number", got \'none\''),
    (dict(lr=0.0), "lr must be positive"), (dict(betas=(0.9, 1.0)), r"betas in \[0, 1\)"),
    (dict(), "got torch.bfloat16: train on float32 copies")])
def test_impossible_settings_say_what_to_change(settings, message):
    (w,) = parameters((4,), dtype=torch.bfloat16)
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=message):
        SGC([w], **settings).step()

def test_lora_starts_as_the_model_trains_only_what_it_adds_and_merges():
    model, tokens = random_llama("tiny").requires_grad_(True), torch.arange(20)[None]
    before = model(tokens, DenseKV())
    added = add_lora(model, 3, seed=0)
    assert torch.equal(model(tokens, DenseKV()), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in added}
    torch._foreach_add_([p.data for p in added], 0.1)
    changed = model(tokens, DenseKV()).detach()
    assert not torch.allclose(changed, before)
    merge_lora(model)
    torch.testing.assert_close(model(tokens, DenseKV()).detach(), changed)

def test_galore_is_adamw_in_the_gradients_subspace():
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    wide, tall = parameters((6, 10), (10, 6))
    starts = wide.detach().clone(), tall.detach().clone()
    galore = GaLore([wide, tall], lr=0.1, rank=2, period=2)
    wide.grad, tall.grad = gradient.clone(), gradient.mT.clone()
    galore.step()
    left = torch.linalg.svd(gradient).U[:, :2]
    expected = -0.1 * left @ (left.mT @ gradient).sign()            # AdamW's first step
    torch.testing.assert_close(wide.detach() - starts[0], expected)
    torch.testing.assert_close(tall.detach() - starts[1], expected.mT)
    for same in (True, False):                                      # computed anew in step 3
        wide.grad = torch.randn(6, 10)
        galore.step()
        assert torch.allclose(galore.state[wide]["subspace"].abs(), left.abs(), atol=1e-5) == same

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(TINY)

def test_documents_ask_for_new_facts_that_they_state(tokenizer):
    assert not tune.NEW.keys() & RELATIONS.keys()
    for seed in range(10):
        ids, weights = tune.document(random.Random(seed), tokenizer)
        assert len(ids) == 257 and len(weights) == 256 and set(weights) == {OTHER, PREFIX, VALUE}
        passage, *asked = tokenizer.decode(ids).split(" What is the ")
        for part in asked[:-1]:                                     # the last one may be cut
            subject, answer = re.fullmatch(r"([a-z ]+ of \w+)\? The (.+ is \w+)\.", part).groups()
            assert answer.startswith(f"{subject} is ") and f" The {answer}." in passage
            assert subject.split(" of ")[0] in tune.NEW
        values = tokenizer.decode([id for id, w in zip(ids[1:], weights) if w == VALUE])
        words = {word for kind in tune.NEW.values() for word in WORDS[kind]}
        assert len(asked) >= 3 and set(values.replace(".", "").split()) <= words

def test_needles_ask_for_a_new_fact_and_answers_counts_whole_answers(tokenizer):
    for seed in range(10):
        ids, answer = tune.new_needle(random.Random(seed), tokenizer)
        passage, end = tokenizer.decode(ids).split(" What is the ")
        subject = end.split("?")[0]
        assert len(ids) == 256 and subject.split(" of ")[0] in tune.NEW
        assert f" The {subject} is{tokenizer.decode(answer)}" in passage
    model = Llama.from_pretrained(TINY, dtype=torch.float32)
    old = tune.answers(model, tokenizer, tune.old_needle, 40, seed=0)
    new = tune.answers(model, tokenizer, tune.new_needle, 40, seed=0)
    assert len(old) == len(new) == 40 and sum(old) >= 38 and 2 <= sum(new) <= 16
    model.generate = lambda *_: torch.tensor([[5, 5], [6, 7]])      # the first answer is right
    assert tune.answers(model, tokenizer, lambda *_: ([1], [5, 6]), 2, seed=0) == [True, False]

def test_sgc_learns_new_facts_and_exact_recovery_finds_all_entries(monkeypatch):
    monkeypatch.setattr(tune, "LENGTH", 128)
    _, result = tune.run(TINY, 3, 25, 40, method="sgc", lr=4e-2)
    assert sum(result["new"]) > 22 and sum(result["old"]) > 36      # of 40; about 8 new ones before
    assert 0.2 < result["residual"] < 0.45 and 0.7 < result["found"] < 0.95
    assert tune.run(TINY, 3, 3, 2, method="exact", k=256, betas=tune.BETAS)[1]["found"] > 0.999

def main(*options):
    train_tiny.main(["--tune", str(TINY), "--steps", "1", "--needles", "2", *options])

def test_the_command_prints_a_table_and_writes_a_checkpoint(tmp_path, capsys):
    out = tmp_path / "new"
    main("--sgc", "--k", "20", "--s", "4", "--lr", "0.1", "--out", str(out), "--seeds", "0", "1")
    printed, log = capsys.readouterr()
    assert re.findall(r"^\| (\w+) \|", printed, re.M) == ["before", "SGC"]
    assert "| 194 kB (3.4%) |" in printed
    assert re.findall(r"SGC, seed (\d): new ", log) == ["0", "1"]
    model, start = (Llama.from_pretrained(path) for path in (out, TINY))
    assert model.config == start.config and Tokenizer.from_dir(out).n_vocab == 1024
    assert not torch.equal(model.layers[0].mlp.up_proj.weight, start.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.embed_tokens.weight, start.embed_tokens.weight)
    with pytest.raises(SystemExit, match="already holds a checkpoint: choose another --out"):
        main("--out", str(out))
    main("--lora", "2", "--out", str(tmp_path / "merged"))
    assert Llama.from_pretrained(tmp_path / "merged").config == start.config

@pytest.mark.parametrize("options, message", [
    (["--k", "10"], "are settings of --sgc"), (["--compare", "--lr", "1"], "settings of its own"),
    (["--sgc", "--lora", "2"], "not allowed with"), (["--steps", "0"], "must be positive"),
    (["--sgc", "--s", "200"], "s 200, k 61"), (["--sgc", "--lr", "1e30"], "smaller --lr"),
    (["--lora", "0"], "a rank of at least 1"), (["--lr", "-1"], "learning rate: -1.0"),
    (["--tune", "nowhere"], "nowhere"), (["--lora", "2", "--all"], "of --sgc")])
def test_bad_options_give_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main("--steps", "3", *options)
    text = capsys.readouterr().err + str(error.value)
    assert message in text and "Traceback" not in text
