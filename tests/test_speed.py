"""The benchmarks: they measure what they claim to measure, and the GPU check runs."""
import doctest
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

import sentencekv
from experiments import svg
from experiments.shapes import SHAPES, random_llama
from experiments.speed import (checkpoint, clock, command, filled, gpu_check, gpu_common,
                               gpu_correct, gpu_speed, prefill, step)
from experiments.speed import model as whole
from experiments.speed.clock import Variant, interleaved
from experiments.speed.dense import Dense, Offloaded, folded, matmul
from experiments.speed.filled import SharedMemory, made_up_flags, made_up_tokens, variants
from experiments.speed.parts import Parts, functions, parts_of
from extras.zero_copy import ZeroCopyPool
from model import DenseKV
from pretended_gpu import pretended_gpu  # noqa: F401, a fixture
from sentencekv import PAPER, RANKS, HostPool, SentenceKV, Settings

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"
DEFAULT = Settings().rank

torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other


def random_tensors(*shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


# ---------------------------------------------------------------------------- the commands


def run_quick(module, tmp_path, *arguments):
    """Run the command with --quick: (rows of the JSON file, lines of the plot)."""
    files = tmp_path / "a.json", tmp_path / "a.svg"
    arguments += "--quick", "--parts", "--json", str(files[0]), "--svg", str(files[1])
    assert module.main(arguments) == 0
    report = json.loads(files[0].read_text())
    assert report.keys() == {"machine", "cores", "torch", "threads", "command", "results"}
    rows = {row["variant"]: row for row in report["results"] if "ms" in row}
    for row in rows.values():
        assert 0 < row["low"] <= row["ms"] <= row["high"]
    lines = ElementTree.parse(files[1]).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(rows)
    parts = {row["variant"]: row for row in report["results"] if "parts" in row}
    for row in parts.values():
        ms = dict(row["parts"])
        assert min(ms.values()) > 0 and sum(ms.values()) == pytest.approx(2 * ms["in all"])
    return rows, parts


STEP_PARTS = {"begin", "ranking", "selecting", "fetching", "attention", "append: pool",
              "append: vectors", "rest", "in all"}


def test_a_decode_step_of_one_layer_is_measured_with_its_share_of_begin(tmp_path, capsys):
    rows, parts = run_quick(step, tmp_path)
    ours = {f"SentenceKV, {name}" for name in [*RANKS, "paper"]}
    floors = {f"copy floor, {rank}" for rank in RANKS}
    dense = {"dense, SDPA (GQA)", "dense, SDPA (heads folded)", "dense, matmul"}
    assert rows.keys() == ours | floors | dense and parts.keys() == ours
    assert all(row["parts"].keys() == STEP_PARTS for row in parts.values())
    best = min(rows[name]["ms"] for name in dense)
    for name in ours:
        assert rows[name]["times_best_dense"] == pytest.approx(best / rows[name]["ms"])
        assert rows[name]["ms"] > rows[name]["begin"] / SHAPES["tiny"]["num_hidden_layers"] > 0
        # 1023 tokens are fetched and one place is left for the new one; one token is stored.
        assert parts[name]["moved"] == 1025 * 2 * 2 * 32 * 2
    assert "x its copy floor" in capsys.readouterr().out


def test_begin_counts_once_per_forward(monkeypatch, capsys):
    """Its time is divided by the layers: 8 ms for 4 layers, 1 ms for a step."""
    times = {name: [1.0] * 3 for name in variants(1024)}
    dense = {"dense, matmul": [6.0] * 3, **{f"copy floor, {rank}": [0.5] * 3 for rank in RANKS}}
    begins = {**{name: [8.0] * 3 for name in times}, **{name: [0.0] * 3 for name in dense}}
    monkeypatch.setattr(step, "interleaved", lambda *a: ({**times, **dense}, begins))
    assert step.main(["--quick"]) == 0
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith(f"  {filled.DEFAULT} "))
    assert "3.00 ms  (3.00 to 3.00)" in line and "2.0 x the best dense" in line
    assert "6.0 x its copy floor" in line


def test_the_copy_floor_is_all_vectors_and_a_budget_of_keys_and_values():
    k, = random_tensors((1, 2, 500, 16))
    cache = filled.filled(k, k, 4, budget=64)
    copies = step.copy_floor(cache, 64).step()
    assert copies[0].shape == cache.layers[0].vectors.shape
    assert copies[1].nbytes == 64 * 2 * 2 * 16 * 4


def test_the_overhead_of_a_prefill_is_computed_round_by_round(monkeypatch, capsys):
    times = {name: [10.0, 24.0, 33.0] for name in variants(1024)}
    times["dense"] = [10.0, 20.0, 30.0]
    monkeypatch.setattr(prefill, "interleaved", lambda *a, **b: (times, None))
    assert prefill.main(["--quick"]) == 0
    assert capsys.readouterr().out.count("+10.0% (+0.0 to +20.0) over dense") == len(times) - 1


def test_the_prefill_of_a_prompt_is_measured_against_dense(tmp_path, capsys):
    rows, parts = run_quick(prefill, tmp_path)
    assert rows.keys() == parts.keys() == {"dense", *variants(1024)}
    assert rows["dense"]["overhead_percent"] == 0
    ours = parts[filled.DEFAULT]
    assert {"begin", "attention", "append: pool", "append: vectors"} <= ours["parts"].keys()
    assert ours["moved"] == 2 * 1024 * 2 * 2 * 32 * 2     # two layers of K and V, stored once
    assert "over dense" in capsys.readouterr().out


def test_a_decode_step_of_a_whole_model_is_measured(tmp_path, capsys):
    rows, parts = run_quick(whole, tmp_path, "--variants", f"{DEFAULT},paper")
    ours = {filled.DEFAULT, "SentenceKV, paper"}
    assert rows.keys() == {"dense, SDPA", "dense, matmul"} | ours
    best = min(rows["dense, SDPA"]["ms"], rows["dense, matmul"]["ms"])
    for row in rows.values():
        assert row["times_best_dense"] == pytest.approx(best / row["ms"])
    assert rows["dense, SDPA"]["device"] > rows[filled.DEFAULT]["device"]
    assert rows["dense, SDPA"]["host"] == 0 < rows[filled.DEFAULT]["host"]
    assert parts[filled.DEFAULT]["moved"] == 4 * 1025 * 2 * 2 * 32 * 2
    assert "tokens/s" in capsys.readouterr().out


def test_a_checkpoint_is_measured_end_to_end(tmp_path, capsys):
    rows, _ = run_quick(checkpoint, tmp_path, str(TINY))
    ours = variants(1024, [DEFAULT, "paper"])
    assert {"dense", *ours} <= rows.keys() <= {"dense", "dense, transformers", *ours}
    assert all(row["prefill_ms"] > 0 for row in rows.values())
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("module, arguments, message", [
    (step, "--lengths 8K,x", "--lengths must be numbers as in 8K,32768; got 'x'"),
    (step, "--lengths 1", "--lengths must be from 256"),
    (step, "--shape huge", "unknown shape 'huge'; known: llama-3.1-8b"),
    (step, "--variants huge", "unknown variant 'huge'; known: mean"),
    (whole, "--budget 20", "budget 20 must exceed sink"),
    (prefill, "--rounds 0", "--rounds must be"),
    (step, "--device nonsense", "--device nonsense cannot be used"),
    (step, "--json nowhere/x", "nowhere/x: there is no such directory"),
    (step, "--budget x", "argument --budget: invalid int"),
    (prefill, "--what", "unrecognized arguments"),
    (checkpoint, "", "the following arguments are required: directory"),
    (checkpoint, "no/such/place", "no/such/place"),
    (checkpoint, f"{TINY} --lengths 100K", "--lengths must be from 257 to"),
])
def test_a_command_says_in_one_line_what_is_wrong(module, arguments, message, capsys):
    assert module.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert out == "" or module is checkpoint            # before anything is measured


def test_what_does_not_fit_into_memory_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(whole, "available_memory", lambda: 1000)
    assert whole.main(["--quick"]) == 0
    assert "left out: takes 0.0 GB, 0.0 GB are free" in capsys.readouterr().out
    monkeypatch.setattr(filled, "available_memory", lambda: 1000)
    assert whole.main(["--quick"]) == 2
    assert "error: tiny takes 0.0 GB" in capsys.readouterr().err


def test_the_examples_in_docstrings_are_true():
    for module in (clock, command, svg):
        result = doctest.testmod(module)
        assert result.failed == 0 < result.attempted


# ------------------------------------------------------------------------------- the clocks


def test_variants_take_turns_in_changing_order(monkeypatch):
    calls = []

    def timed(function, device):
        function()
        return {"step": 8.0, "before": 3.0}[calls[-1]]

    monkeypatch.setattr(clock, "timed", timed)
    a = Variant(lambda: calls.append("step"), before=lambda: calls.append("before"), repeat=4)
    b = Variant(lambda: calls.append("step"), repeat=4)
    steps, befores = interleaved({"a": a, "b": b}, 9, "cpu", warm=1)
    assert steps == {"a": [8.0] * 9, "b": [2.0] * 9}
    assert befores == {"a": [3.0] * 9, "b": [0.0] * 9}
    turns = {"a": ["before", "step"] * 4, "b": ["step"] * 4}
    rounds = [calls[i:i + 12] for i in range(0, len(calls), 12)]
    orders = [turns["a"] + turns["b"], turns["b"] + turns["a"]]
    assert len(rounds) == 10 and all(r in orders for r in rounds)
    assert all(order in rounds for order in orders)


def test_no_round_starts_after_the_time_is_up():
    variant = Variant(lambda: None)
    steps, _ = interleaved({"a": variant}, 9, "cpu", warm=2, until=time.monotonic() - 1)
    assert len(steps["a"]) == 1


def test_parts_exclude_inner_parts_count_bytes_and_leave_nothing_behind(monkeypatch):
    k, q = random_tensors((1, 2, 500, 16), (1, 8, 1, 16))
    cache = filled.filled(k, k, 4, budget=64)
    token = torch.zeros(1, 1, dtype=torch.long)
    originals = [getattr(owner, name) for owner, name, _ in functions()]

    def one():
        cache.begin(token)
        time.sleep(0.002)
        cache.attend(0, q, k[:, :, :1], k[:, :, :1])

    slow = HostPool.append
    monkeypatch.setattr(HostPool, "append", lambda *a: (time.sleep(0.01), slow(*a)))
    ms, moved = parts_of(one, "cpu", steps=3)
    assert ms.keys() == STEP_PARTS
    assert ms["append: pool"] >= 10 > ms["append: vectors"] > 0       # the inner one alone
    assert ms["rest"] >= 2 and sum(ms.values()) == pytest.approx(2 * ms["in all"])
    assert moved == 65 * 2 * 2 * 16 * 4
    monkeypatch.undo()
    assert originals == [getattr(owner, name) for owner, name, _ in functions()]


def test_parts_see_a_fetch_that_a_subclass_overrides():
    class OtherPool(HostPool):
        def fetch(self, slot, out):
            time.sleep(0.01)
            super().fetch(slot, out)

    k, = random_tensors((1, 2, 100, 16))
    pool = OtherPool(1, 2, 16, k.dtype, k.device)
    pool.append(0, torch.stack((k[0], k[0]), dim=2))
    out = torch.zeros(1, 2, 5, 2, 16)
    with Parts("cpu") as parts:
        pool.fetch(torch.zeros(1, 2, 5, dtype=torch.long), out)
    assert parts.ms["fetching"] >= 10 and parts.moved == out.nbytes


# ------------------------------------------------------------------------- caches to measure


def test_the_variants_are_all_rules_and_the_settings_of_the_paper():
    assert variants(200)["SentenceKV, paper"] == {**PAPER, "budget": 200}
    assert [s["rank"] for s in variants(200).values()] == [*RANKS, "mean"]
    assert variants(200)["SentenceKV, mean"] == {**PAPER, "budget": 200, "keep": None}
    assert variants(200, [DEFAULT]) == {f"SentenceKV, {DEFAULT}": dict(rank=DEFAULT, budget=200)}
    assert filled.DEFAULT in variants(200)


def test_a_step_reads_all_weights_but_the_embeddings_unless_they_are_the_output_matrix_too():
    tied, untied = (random_llama("tiny", tie_word_embeddings=tie) for tie in (True, False))
    size = sum(p.nbytes for p in tied.parameters())
    assert filled.weights_read(tied) == filled.weights_read(untied) == size


def test_made_up_text_has_sentences_of_8_to_32_tokens():
    cache = SentenceKV(made_up_flags(1000), max_sentence=64)
    cache.begin(made_up_tokens(20000, vocabulary=1000))
    lengths = cache.rows[0].lengths[2:-1]
    assert min(lengths) == 8 and max(lengths) == 32 and len(set(lengths)) == 25
    assert sum(lengths) / len(lengths) == pytest.approx(20, abs=1)


@pytest.mark.parametrize("name", variants(200))
def test_a_cache_that_is_filled_directly_equals_one_after_a_prompt(name):
    settings = variants(200)[name]
    k, v, new = random_tensors((1, 2, 500, 16), (1, 2, 500, 16), (1, 2, 1, 16))
    queries = torch.randn(6, 1, 8, 1, 16)
    q, = random_tensors((1, 8, 1, 16), seed=1)
    with pytest.MonkeyPatch.context() as patch:         # the same queries judge importance
        patch.setattr(torch, "randn", lambda *shape, **_: q)
        cache = filled.filled(k, v, 4, layers=3, vocabulary=1000, **settings)
    read = SentenceKV(made_up_flags(1000), **settings)
    read.begin(made_up_tokens(500, vocabulary=1000))
    for layer in range(3):
        read.attend(layer, q.expand(-1, -1, 500, -1), k, v)
    for query in queries:
        outs = []
        for c in (cache, read):
            c.begin(torch.zeros(1, 1, dtype=torch.long))
            outs.append(torch.stack([c.attend(layer, query, new, new) for layer in range(3)]))
        assert torch.equal(*outs)
        assert len({layer.vectors.data_ptr() for layer in cache.layers}) == 3
    assert cache.memory() == read.memory()


@pytest.mark.parametrize("limit, pinned, distinct", [
    (0, False, 1), (1 << 19, False, 3), (1 << 19, True, 2), (1 << 30, False, 4)])
def test_layers_share_host_memory_only_if_it_is_short(limit, pinned, distinct):
    k, = random_tensors((1, 2, 500, 16))                # a layer: 148 KB, 256 KB if pinned
    memory, blocks = SharedMemory(limit, pinned), set()
    for _ in range(2):                                  # the second cache uses the same memory
        cache = filled.filled(k, k, 4, layers=4, memory=memory, budget=64)
        blocks |= {layer.pool.kv.data_ptr() for layer in cache.layers}
        for layer in cache.layers:
            assert torch.equal(layer.pool.read(0)[:, :, 0], k[0])
    assert len(blocks) == distinct == sum(map(len, memory.blocks.values()))
    others = [layer.pool.allocate((3, 5), torch.float32) for layer in cache.layers]
    assert len({x.data_ptr() for x in others}) == 4     # only keys and values are shared


def test_dense_buffers_are_shared_only_if_memory_is_short():
    k, = random_tensors((1, 2, 500, 16))
    for limit, distinct in ((0, 1), (2 * k.nbytes, 2), (1 << 30, 4)):
        buffers = Dense.buffers(k, 4, limit)
        assert len(buffers) == 4 and len({x.data_ptr() for x in buffers}) == distinct
        assert all(torch.equal(x[:, :, :500], k) for x in buffers)


def test_the_dense_caches_compute_dense_attention(pretended_gpu):
    k, v = random_tensors((1, 2, 300, 16), (1, 2, 300, 16))
    keys, values = (Dense.buffers(x, 3, 1 << 30) for x in (k, v))
    caches = [DenseKV(), Dense(folded, keys, values, 300), Dense(matmul, keys, values, 300),
              Offloaded(folded, k, v, 3, 1 << 30)]
    caches[0].begin(torch.zeros(1, 300, dtype=torch.long))
    for layer in range(3):
        caches[0].attend(layer, torch.zeros(1, 8, 300, 16), k, v)
    for seed in range(5):
        for cache in caches:
            position = cache.begin(torch.zeros(1, 1, dtype=torch.long))
            assert position.tolist() == [[cache.length - 1]] == [[300 + seed]]
        for layer in range(3):
            shapes = (1, 8, 1, 16), (1, 2, 1, 16), (1, 2, 1, 16)
            q, k, v = random_tensors(*shapes, seed=10 * seed + layer)
            expected, *outs = [cache.attend(layer, q, k, v) for cache in caches]
            for out in outs:
                torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------------------- the GPU check


def test_gpu_check_without_a_gpu_says_so_in_one_line(monkeypatch, capsys):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "experiments.speed.gpu_check"]
    done = subprocess.run(line, capture_output=True, text=True, env=hidden, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no CUDA device: there is nothing to check\n"
    assert gpu_check.main(["--only", "nothing"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no section 'nothing'; there are bandwidth")
    assert err.count("\n") == 1


ROW = '{"rows": [{"tokens": 8192, "variant": "dense", "ms": 2, "floor": 1}]}'


def test_gpu_check_goes_on_when_a_section_crashes_or_hangs(tmp_path, monkeypatch):
    def python(code):
        return lambda: [sys.executable, "-c", code]

    write = f"import os; open(os.environ['GPU_CHECK_FILE'], 'w').write('{ROW}')"
    sections = {"crash": (20, python("import os; os.abort()")),
                "hang": (1, python("import time; time.sleep(60)")),
                "fine": (20, python(write)), "missing": (20, lambda: None)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    monkeypatch.setattr(gpu_check, "COMMANDS", [f for _, f in sections.values()])
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    setup = dict(machine="this", torch="t", command="c")
    monkeypatch.setattr(clock, "setup", lambda device: setup)
    out = tmp_path / "out"
    assert gpu_check.everything(list(sections), 1, out) == 1
    results = json.loads((out / "gpu_check.json").read_text())["sections"]
    assert [x["outcome"].split(":")[0] for x in results.values()] == [
        "failed", "out of time", "ok", "left out"]
    assert results["fine"]["rows"] == json.loads(ROW)["rows"]
    assert "rows" not in results["crash"] and "rows" not in results["missing"]
    assert (out / "gpu_check.svg").is_file()
    assert gpu_check.everything(["hang"], 1, out) == 1
    assert gpu_check.everything(["fine"], 0.001, out) == 0
    results = json.loads((out / "gpu_check.json").read_text())["sections"]
    assert results["fine"]["outcome"] == "left out: no time"


def test_gpu_check_runs_every_section_as_a_command_that_it_understands(monkeypatch, tmp_path):
    """The arguments of the process of a section are those that the section's main() takes."""
    seen = []
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda command, **_: seen.append(
        command) or SimpleNamespace(wait=lambda seconds: 0, poll=lambda: 0))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    for name in gpu_check.SECTIONS:
        assert gpu_check.run_section(name, 33, tmp_path / "x", TINY) == "ok"
    ours = [c for c in seen if "pytest" not in c]
    assert len(ours) == len(seen) - 1
    for command in ours:
        options = gpu_check.parser().parse_args(command[command.index("-m") + 2:])
        assert options.section in gpu_check.SECTIONS
        assert "sanitizer" in command[0] or (options.seconds, options.checkpoint) == (33, TINY)


def finite(x):
    """Are all numbers in x, which was read from JSON, finite?"""
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return all(map(finite, inner)) and (type(x) not in (int, float) or math.isfinite(x))


SMALL = dict(budget=128, rounds=2, repeat=2, prompt=1024, chunk=300, short=500, long=600,
             generated=20, compared=8, strict=3, copied=1 << 16, stored=2048, fetched=(64, 1024))
SPEEDS = {"to device", "to host", "on device", "zero_copy", "staged"}
PREFILL = {"seconds", "peak", "parts", "share", "sentences"}
N = len(RANKS)


def small_sizes(monkeypatch):
    """Sections of gpu_check on a tiny model, with results of their own."""
    for shape in ("llama-3.1-8b", "llama-3.2-1b"):
        monkeypatch.setitem(SHAPES, shape, SHAPES["tiny"])
    for name, value in SMALL.items():
        monkeypatch.setattr(gpu_common.SIZES, name, value)
    monkeypatch.setattr(gpu_common, "RESULTS", {})
    monkeypatch.setattr(gpu_check, "RESULTS", gpu_common.RESULTS)
    monkeypatch.setitem(gpu_check.SECTIONS, "decode-128K", (9, gpu_check.decoding(600)))


@pytest.mark.parametrize("section, seconds, zero_copy, rows, checks, saved", [
    ("bandwidth", 9, True, 0, 0, SPEEDS | {"zero copy"}),
    ("bandwidth", 9, False, 0, 0, SPEEDS),
    ("fetch", 9, True, 0, 8, set()),
    ("fetch", 9, False, 0, 4, set()),
    ("sync", 9, True, 0, N + 1, set()),
    ("sync", 9, False, 0, 0, set()),
    ("small", 9, True, 0, 0, set()),
    ("decode-128K", 45, True, N + 5, 1, {"memory", "weights", "parts", "generated"}),
    ("graph", 20, True, 4, 4, set()),
    ("checkpoint", 9, True, 5, 1, {"tokens", "prefill_ms", "peak"}),
    ("prefill", 60, True, 0, 1, PREFILL),
    ("prefill", 9, True, 0, 0, PREFILL),
])
def test_a_section_of_gpu_check_runs_on_a_pretended_gpu(
        section, seconds, zero_copy, rows, checks, saved, pretended_gpu, tmp_path, monkeypatch,
        capsys):
    """On a tiny model. Times mean nothing here; everything else is checked as on a real GPU."""
    pretended_gpu.zero_copy, file = zero_copy, tmp_path / "section.json"
    small_sizes(monkeypatch)
    monkeypatch.setenv("GPU_CHECK_FILE", str(file))
    arguments = ["--section", section, "--seconds", str(seconds), "--checkpoint", str(TINY)]
    assert gpu_check.main(arguments) == 0               # so all checks have passed
    results = json.loads(file.read_text()) if file.exists() else {}
    expected = {*saved, *["rows"] * (rows > 0), *["checks"] * (checks > 0)}
    assert finite(results) and results.keys() == expected
    assert len(results.get("checks", {})) == checks and len(results.get("rows", [])) == rows
    for row in results.get("rows", []):
        assert 0 < row["floor"] and 0 < row["low"] <= row["ms"]


def test_a_roomy_pool_does_not_grow():
    pool = gpu_speed.roomy(HostPool, 100)(1, 2, 16, torch.float32, torch.device("cpu"))
    place, (kv,) = pool.kv.data_ptr(), random_tensors((2, 20, 2, 16))
    for _ in range(5):
        pool.append(0, kv)
    assert pool.used == [100] and pool.kv.data_ptr() == place


def broken_fetch(pool, slot, out):
    out.fill_(1)


def late_append(pool, b, kv):
    """New tokens are not there yet when they are fetched."""
    HostPool.append(pool, b, torch.zeros_like(kv) if pool.used[b] else kv)


@pytest.mark.parametrize("section, owner, name, value, failed", [
    ("fetch", ZeroCopyPool, "fetch", broken_fetch, "zero copy: fetches the CPU's bits"),
    ("fetch", ZeroCopyPool, "append", late_append, "zero copy: a late write arrives unharmed"),
    ("sync", gpu_correct, "ZeroCopyPool", HostPool, "paper: attend.. does not synchronize"),
])
def test_a_fault_makes_a_section_of_gpu_check_fail(
        section, owner, name, value, failed, pretended_gpu, monkeypatch, capsys):
    small_sizes(monkeypatch)
    monkeypatch.setattr(owner, name, value)
    assert gpu_check.main(["--section", section]) == 1
    assert re.search(f"FAILED .*{failed}", capsys.readouterr().out)


def test_gpu_check_prints_the_ratios_that_are_aimed_at(capsys):
    ms = {"dense, SDPA": 60, "dense, matmul": 50, "dense, offloaded": 1000,
          "dense, 1024 tokens": 8, "SentenceKV, x, graph": 10}
    rows = [dict(tokens=n << 10, variant=name, ms=t + n / 128, floor=4)
            for n in (8, 32, 128, 256) for name, t in ms.items()]
    gpu_check.print_targets(rows)
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()[2:]]
    name = "SentenceKV, x, graph"
    assert lines == [
        [f"{name}: 256K / 8K", f"{12 / (10 + 1 / 16):.2f}", "at most 1.10"],
        [f"{name}: over 1024 dense tokens, 128K", f"{11 / 9:.2f}", "at most 1.15"],
        [f"{name}: over 1024 dense tokens, 256K", f"{12 / 10:.2f}", "at most 1.15"],
        [f"dense over {name}, 32K", f"{50.25 / 10.25:.2f}", "above 1"],
        [f"dense over {name}, 128K", f"{51 / 11:.2f}", "above 1"],
        [f"dense offloaded over {name}, 128K", f"{1001 / 11:.2f}", "at least 20"],
        [f"{name}: over its floor, 128K", f"{11 / 4:.2f}", "at most 1.35"]]
    gpu_check.print_targets(rows[:1])
    assert capsys.readouterr().out == "\n== targets\n"
