"""Faults that other projects had: settings of the process, copies of objects, streams, files."""
import copy
import io
import os
import pickle
import resource
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from ask import cli, options
from ask.watch import WatchedKV, most_attended
from extras.branch import fork, truncate
from extras.save import load, save
from extras.zero_copy import best_pool
from model import DenseKV, Llama
from sentencekv import SentenceKV, sentence_flags
from tokenizer import Tokenizer
from train_tiny import story

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
TEXT, FACTS = story(600, facts=4, seed=4)
QUESTION, ANSWER = (part.strip() for part in FACTS[1])
CPU = ["--device", "cpu", "--max-new-tokens", "12"]
model, tokenizer = Llama.from_pretrained(TINY), Tokenizer.from_dir(TINY)
flags = sentence_flags(tokenizer.token_bytes)

def filled(cache):
    model.prefill(torch.tensor([tokenizer.encode(TEXT, bos=True)], device="cpu"), cache)
    return cache

def answer(cache, model=model, tokenizer=tokenizer):
    ids = torch.tensor([tokenizer.encode(" " + QUESTION)], device="cpu")
    return tokenizer.decode([int(id) for id in model.generate(ids, cache, 9)])

def sentence_cache(**settings):
    return SentenceKV(flags, budget=128, host_pool=best_pool("cpu"), **settings)

def saved_and_loaded(cache, path):
    save(cache, path, model)
    return load(path, model)

KINDS = {
    "dense": lambda: filled(DenseKV()),
    "sentences": lambda: filled(sentence_cache()),
    "keep": lambda: filled(sentence_cache(keep=2)),
}

@pytest.fixture
def file(tmp_path):
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "story.txt")

def feed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))

@contextmanager
def changed(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)

SETTINGS = {
    "no change": nullcontext,
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: changed(torch.set_default_dtype, torch.float16, torch.float32),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
    "one thread": lambda: changed(torch.set_num_threads, 1, torch.get_num_threads()),
    "another folder": lambda: changed(os.chdir, tempfile.gettempdir(), os.getcwd()),
}

@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_the_process_change_nothing(kind, tmp_path):
    results = {}
    for name, setting in SETTINGS.items():
        with setting():
            cache = KINDS[kind]()
            said = answer(cache, Llama.from_pretrained(TINY), Tokenizer.from_dir(TINY))
            if kind != "dense":
                cache = saved_and_loaded(cache, tmp_path / "x")
            logits = model(torch.tensor([[5]]), cache)
            results[name] = said, logits.tolist(), logits.dtype, cache.length
    assert all(result == results["no change"] for result in results.values())
    assert ANSWER in results["no change"][0] or kind == "keep"

def test_files_and_reports_are_made_on_the_cpu_whatever_the_default_device(tmp_path):
    cache = WatchedKV.watch(filled(sentence_cache()))
    assert ANSWER in answer(cache)
    end = len(tokenizer.encode(TEXT, bos=True))
    reported = most_attended(cache, end)
    with torch.device("meta"):                      # stands for any device but the model's
        loaded = saved_and_loaded(fork(cache), tmp_path / "x")
        assert most_attended(cache, end) == reported
    assert loaded.rows[0].tokens == cache.rows[0].tokens and answer(loaded) == answer(cache)

CACHES = {
    **{kind: lambda folder, new=new: new() for kind, new in KINDS.items()},
    "fork": lambda folder: fork(filled(sentence_cache())),
    "loaded": lambda folder: saved_and_loaded(filled(sentence_cache()), folder / "x"),
}

@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_and_leave_the_originals_alone(kind, twin, tmp_path):
    cache = CACHES[kind](tmp_path)
    length, expected = cache.length, answer(CACHES[kind](tmp_path))
    second = twin(cache)
    assert answer(second, twin(model), twin(tokenizer)) == expected
    assert second.length > cache.length == length
    assert answer(cache) == expected

@pytest.mark.parametrize("wrong", [DenseKV(), None, model])
def test_extras_name_what_is_no_sentence_cache(wrong, tmp_path):
    for call in (fork, lambda c: truncate(c, 5), lambda c: save(c, tmp_path / "x", model)):
        with pytest.raises(ValueError, match=f"needs a SentenceKV, got {type(wrong).__name__}$"):
            call(wrong)

@pytest.mark.parametrize("arguments, message", [
    (["--prompt-file", "story.txt", "--save-cache", "story.txt"], "--prompt-file and --save-cache"),
    (["--prompt-file", "story.txt", "--page", "link"], "--prompt-file and --page"),
    (["--load-cache", "story.txt", "--page", "link"], "--load-cache and --page"),
    (["--save-cache", "x", "--page", "./x"], "--save-cache and --page"),
])
def test_no_file_is_written_over_another_of_the_same_run(
        arguments, message, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink("story.txt", "link")
    assert cli.main([*arguments, "--ask", "Who?", *CPU]) == 2
    assert capsys.readouterr().err == f"error: {message} are the same file, {arguments[-1]}\n"
    assert Path(file).read_text(encoding="utf-8") == TEXT and not os.path.exists("x")
    options.check(options.parse(["--load-cache", file, "--save-cache", file, "--ask", "Who?"]))

def test_a_page_that_cannot_be_written_leaves_the_old_one(file, tmp_path, capsys):
    (tmp_path / "page").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))          # bytes of a file
    page = str(tmp_path / "page")
    try:
        assert cli.main(["--prompt-file", file, "--ask", "Who?", "--page", page, *CPU]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"error: {page}: File too large\n"
    assert (tmp_path / "page").read_text() == "old" and len(os.listdir(tmp_path)) == 2

def test_nul_characters_are_no_text(file, tmp_path, monkeypatch, capsys):
    (tmp_path / "utf16").write_bytes(TEXT.encode("utf-16-le"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--prompt-file", "utf16", *CPU]) == 2
    assert capsys.readouterr().err == "error: utf16 is not a text: it contains NUL characters\n"
    feed(monkeypatch, f"W\0h\0o\n{QUESTION}\n")
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 0
    out = capsys.readouterr().out
    assert "note: this line was skipped: it is not valid UTF-8 text\n" in out and ANSWER in out

def test_ids_that_the_model_lacks_are_noticed_early(file, monkeypatch, capsys):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **options: encode(
        self, text, **options) + [1024] * ("odd" in text))
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "prefill", None)                       # calling it would fail
        assert cli.main(["--prompt-file", file, "--ask", "How odd?", *CPU]) == 2
    message = "the tokenizer does not fit the model: it gives the id 1024, the model has 1024 ids\n"
    assert capsys.readouterr().err == "error: " + message
    feed(monkeypatch, f"How odd?\n{QUESTION}\n")
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 0
    out = capsys.readouterr().out
    assert "note: this line was skipped: " + message in out and ANSWER in out

@pytest.mark.parametrize("broken", ["pipe", "full"])
def test_a_broken_standard_error_changes_nothing_else(broken, file, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    if broken == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(cli, "check_ids", lambda *args: warnings.warn("a warning"))
    for arguments, status in ((["--ask", QUESTION], 0), (["--budget", "0"], 2)):
        monkeypatch.setattr(sys, "stderr", open(os.dup(writer), "w", encoding="utf-8"))
        assert cli.main(["--prompt-file", file, *arguments, *CPU]) == status
        assert (ANSWER in capsys.readouterr().out) is (status == 0)

def test_memory_that_cannot_be_had_is_one_line(file, monkeypatch, capsys):
    monkeypatch.setattr(Llama, "prefill", lambda *args: torch.empty(1 << 50))
    assert cli.main(["--prompt-file", file, "--ask", "Who?", *CPU]) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory: ")

def test_a_standard_input_that_cannot_be_read_is_named(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", open(os.open("/dev/null", os.O_WRONLY), encoding="utf-8"))
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 2
    assert capsys.readouterr().err.startswith("error: standard input: ")

# ----------------------------------------------------------------------- the process, and arguments

@pytest.mark.parametrize("kind", ["dense", "sentences"])
def test_another_default_device_changes_nothing(kind):
    expected = answer(KINDS[kind]())
    with torch.device("meta"):                      # stands for any device but the model's
        assert answer(KINDS[kind](), Llama.from_pretrained(TINY)) == expected

@pytest.mark.parametrize("kind", ["dense", "sentences"])
def test_autocast_stores_keys_and_values_in_its_dtype(kind):
    wide = Llama.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(TEXT, bos=True)])
    new = DenseKV if kind == "dense" else sentence_cache
    with torch.autocast("cpu", torch.bfloat16):
        cache = new()
        logits = wide.prefill(ids, cache)
        answer(cache, wide)
    stored = cache.keys[0] if kind == "dense" else cache.layers[0].pool.kv
    assert stored.dtype == torch.bfloat16
    assert 0 < (logits - wide.prefill(ids, new())).abs().max() < 0.5

def test_a_compiled_model_gives_the_same_logits():
    ids = torch.tensor([tokenizer.encode(TEXT[:200], bos=True)])
    compiled = torch.compile(model, backend="eager")
    caches = [sentence_cache(), sentence_cache()]
    for tokens in (ids, ids[:, :1], ids[:, 1:2]):
        a, b = (run(tokens, cache) for run, cache in zip((model, compiled), caches))
        assert torch.equal(a, b)

@pytest.mark.parametrize("lengths", [2.0, True, None, "3", object()])
def test_lengths_that_are_none_are_refused(lengths):
    with pytest.raises(ValueError, match="truncate.. takes"):
        filled(DenseKV()).truncate(lengths)

@pytest.mark.parametrize("dtype", ["bfloat16", torch.int64, 16])
def test_a_dtype_that_is_none_for_weights_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype = .* is unsupported"):
        Llama.from_pretrained(TINY, dtype=dtype)

def test_ids_of_torch_and_numpy_are_decoded_and_what_is_no_id_is_refused():
    ids = tokenizer.encode("The dog ran.")
    for same in (torch.tensor(ids), torch.tensor(ids).numpy(), [torch.tensor([i]) for i in ids]):
        assert tokenizer.decode(same) == "The dog ran."
    for wrong in (1.0, "5", None, torch.tensor([5, 6]), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="a token id: TypeError"):
            tokenizer.decode([wrong])
