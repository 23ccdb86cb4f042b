"""The command line, python -m ask: answers, what was fetched, conversations, what goes wrong."""
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ask import cli, options
from ask.conversation import ChatTurns, Conversation, PlainTurns
from ask.report import print_fetched, progress, short
from ask.watch import Step, WatchedKV, most_attended
from model import DenseKV, Llama
from sentencekv import RANKS, SentenceKV, sentence_flags
from tokenizer import Tokenizer
from train_tiny import story

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
torch.set_num_threads(1)                # the tensors are tiny: more threads only wait

@pytest.fixture(scope="module")
def tiny():
    tokenizer = Tokenizer.from_dir(TINY)
    return Llama.from_pretrained(TINY), tokenizer, sentence_flags(tokenizer.token_bytes)

@pytest.fixture
def file(tmp_path):
    """A file with a story of 600 tokens and 4 facts."""
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "story.txt")

TEXT, FACTS = story(600, facts=4, seed=4)
QUESTION, ANSWER = FACTS[1]
CPU = ["--device", "cpu", "--max-new-tokens", "16"]

def feed(monkeypatch, text):
    """Put text, a str or bytes, on standard input."""
    raw = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

# --------------------------------------------------------------------------------- what it answers

def test_without_arguments_it_answers_three_questions_and_shows_the_facts_it_fetched(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "ask"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    for question, answer in [story(4000, seed=8)[1][i] for i in (1, 4, -2)]:
        part = done.stdout.split(f"\n{question.strip()}\n")[1].split("\n\n")[0]
        lines = [line.split(None, 1) for line in part.splitlines()]
        said = {name: text for name, text in lines[:3]}
        assert said["expected"] == answer.strip()
        assert re.fullmatch(re.escape(answer.strip()) + r"   \[[\d.]+ ms/token\]", said["dense"])
        assert said["SentenceKV"].startswith(answer.strip() + "   [")
        assert re.search(rf"100% +\d+%  {re.escape(answer.strip())}   <- the answer", part)
    assert done.stdout.count("(attention: the most") == 1

def test_it_answers_from_a_file_and_compares_with_the_dense_cache(file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["--model", "checkpoints/tiny", "--prompt-file", file, "--ask",
                     QUESTION.strip(), "--budget", "128", "--dense", "--show", "2", *CPU]) == 0
    out = capsys.readouterr().out
    assert out.count(ANSWER.strip() + "   [") == 2 and "budget 128 tokens" in out
    start = " ".join(TEXT.split())[:62]
    assert f"722,048 parameters, bfloat16, on cpu\ntext        607 tokens: {start} ...\n" in out
    table = out.split("attention  heads  sentence\n")[1].splitlines()
    assert len(table) == 4 and ANSWER.strip() in table[0] and "(attention:" in table[2]
    size = re.findall(r"KV cache: ([\d.]+) MB on the device, ([\d.]+) MB in host memory", out)
    (dense_device, dense_host), (device, host) = ([float(x) for x in row] for row in size)
    assert dense_host == 0 and 0 < device < dense_device <= host * 1.5

def test_a_text_without_a_question_is_continued(tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT + QUESTION, encoding="utf-8")
    assert cli.main(["--prompt-file", str(tmp_path / "text"), "--dense", *CPU]) == 0
    assert capsys.readouterr().out.count(ANSWER.strip()) == 2
    (tmp_path / "text").write_text(".", encoding="utf-8")           # BOS and one token
    assert cli.main(["--prompt-file", str(tmp_path / "text"), *CPU]) == 0

def test_every_setting_reaches_the_cache_and_the_models_generation(file, tiny, monkeypatch):
    given = ["--budget", "100", "--keep", "2", "--sink", "8", "--recent", "16", "--window", "9",
             "--max-pool", "3", "--rank", "mean"]
    args = options.parse(["--prompt-file", file, *given])
    model, tokenizer, _ = tiny
    talks = cli.make_conversations(args, model, tokenizer, torch.device("cpu"), compare=False)
    s = talks["SentenceKV"].cache.settings
    assert (s.budget, s.keep, s.sink, s.recent, s.window, s.max_pool, s.rank) == (
        100, 2, 8, 16, 9, 3, "mean")
    paper = options.cache_settings(options.parse(["--paper", "--budget", "99"]))
    assert (paper["keep"], paper["max_pool"], paper["budget"]) == (2, 7, 99)
    assert options.cache_settings(options.parse([])) == {"budget": 256}
    assert options.cache_settings(options.parse(["--sink", "0"])) == {"budget": 256, "sink": 0}
    assert options.cache_settings(options.parse(["--prompt-file", file])) == {}

    seen = {}
    def generate(self, tokens, cache, *args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return iter(())
    monkeypatch.setattr(Llama, "generate", generate)
    assert cli.main(["--prompt-file", file, "--ask", "Who?", "--temperature", "0.5", "--top-p",
                     "0.9", "--seed", "3", "--chunk", "99", *CPU]) == 0
    stops = set(tokenizer.encode("."))
    assert seen == {"args": (16, 0.5, 0.9, 3, stops), "kwargs": {"chunk": 99}}

def test_a_meta_directory_is_loaded_as_one(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(cli.Tokenizer, "from_dir", lambda path: "tokenizer")
    def loader(kind):
        return lambda *arguments: loaded.append((kind, arguments)) or "model"
    monkeypatch.setattr(cli.Llama, "from_pretrained", loader("hf"))
    monkeypatch.setattr(cli, "load_meta", loader("meta"))
    args = options.parse(["--model", str(tmp_path), "--dtype", "float16"])
    for name in ("params.json", "config.json"):
        (tmp_path / name).write_text("{}")
        assert cli.load_model(args, torch.device("cpu")) == ("model", "tokenizer")
    assert [kind for kind, _ in loaded] == ["meta", "hf"]
    assert loaded[0][1][:3] == (tmp_path, torch.device("cpu"), torch.float16)

def test_the_cache_gets_the_best_host_pool_of_its_device(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "best_pool", lambda device: asked.append(device) or "pool")
    (model, tokenizer, _), device = tiny, torch.device("cpu")
    talks = cli.make_conversations(options.parse([]), model, tokenizer, device, compare=True)
    assert talks["SentenceKV"].cache.host_pool == "pool" and asked == [device]
    assert list(talks) == ["dense", "SentenceKV"]
    talks = cli.make_conversations(options.parse([]), model, tokenizer, device, compare=False)
    assert list(talks) == ["SentenceKV"]

# ------------------------------------------------------------------------------ what was fetched

@pytest.mark.parametrize("rank", RANKS)
def test_the_record_of_a_step_is_the_attention_to_each_sentence_that_was_taken(rank):
    rng = torch.Generator().manual_seed(0)
    flags = sentence_flags([b" a", b" b", b"."])
    sizes = dict(budget=24, sink=2, recent=4, window=4)
    cache = WatchedKV.watch(SentenceKV(flags, rank=rank, **sizes))
    stored = [[], []]                                               # the keys of both layers
    H, G, d = 2, 2, 4
    def forward(tokens):
        T = tokens.shape[1]
        cache.begin(tokens)
        queries = []
        for layer in range(2):
            q, k, v = (2 * torch.randn(1, heads, T, d, generator=rng, dtype=torch.float64)
                       for heads in (H * G, H, H))
            cache.attend(layer, q, k, v)
            stored[layer].append(k[0])
            queries.append(q[0, :, 0])
        return queries
    forward(torch.multinomial(torch.tensor([3.0, 2, 1]), 60, True, generator=rng)[None])
    assert cache.steps == []                                        # a prompt fetches nothing
    for token in (0, 2, 1, 1):
        queries, old = forward(torch.tensor([[token]])), cache.length - 1
        step, row = cache.steps[-1], cache.rows[0]
        for layer, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            keys = torch.cat(stored[layer], dim=1)[h]               # (N, d)
            starts = [sum(row.lengths[:s]) for s in range(len(row.lengths))]
            taken = {}
            for s, n in zip(step.sentence[layer][h].tolist(), step.taken[layer][h].tolist()):
                taken[s] = list(range(starts[s], starts[s] + n))
            seen = sorted(sum(taken.values(), [])) + [old]
            assert len(seen) == 24
            group = queries[layer].view(H, G, d)[h]
            weights = torch.softmax(group @ keys[seen].T / 2, -1).mean(0)
            weight = dict(zip(seen, weights.tolist()))
            expected = [sum(weight[i] for i in taken[s]) for s in step.sentence[layer][h].tolist()]
            assert step.attention[layer][h].tolist() == pytest.approx(expected, abs=1e-5)
            sums, near = step.attention[layer][h].sum() + weight[old], step.near[layer][h]
            assert float(sums) == pytest.approx(1, abs=1e-5)
            for s, is_near in zip(step.sentence[layer][h].tolist(), near.tolist()):
                assert is_near == (s == 0 or starts[s] + row.lengths[s] > cache.length - 4)
    sentence, taken = cache.fetched()
    n = step.sentence[1].shape[1]
    assert torch.equal(step.sentence[1], sentence[1, 0, :, :n])
    assert torch.equal(step.taken[1], taken[1, 0, :, :n]) and not taken[1, 0, :, n:].any()
    assert len(cache.steps) == 4 and cache.seconds > 0

def test_watching_changes_no_answer(tiny):
    model, tokenizer, flags = tiny
    prompt = torch.tensor([tokenizer.encode(TEXT + QUESTION, bos=True)])
    plain, watched = (SentenceKV(flags, budget=96) for _ in range(2))
    WatchedKV.watch(watched)
    a, b = ([int(id) for id in model.generate(prompt, cache, 12)] for cache in (plain, watched))
    assert a == b and len(watched.steps) == 11
    assert len(watched.steps[0].sentence) == len(watched.steps[0].attention) == 4

def test_sentences_are_reported_by_their_largest_attention_and_their_share_of_fetches():
    a, b, stop = range(3)
    flags = sentence_flags([b" one", b" two", b"."])
    sizes = dict(budget=24, sink=2, recent=4, window=4, max_sentence=3)
    cache = WatchedKV.watch(SentenceKV(flags, **sizes))
    # 0 is the sink; 1 "one one one" and 2 "two." are one sentence, 3 and 4 another, 5 is recent
    cache.begin(torch.tensor([[a, b, a, a, a, b, stop, b, b, b, stop, a, stop]]))
    assert cache.rows[0].lengths == [2, 3, 2, 3, 1, 2]
    yes, no = True, False
    first = Step(
        sentence=[torch.tensor([[0, 1, 2], [5, 3, 99]])],           # 99: not taken, any number
        taken=[torch.tensor([[2, 3, 1], [2, 3, 0]])],
        near=[torch.tensor([[yes, no, no], [yes, no, no]])],
        attention=[torch.tensor([[0.75, 0.125, 0.0625], [0.75, 0.25, 0.0]])])
    second = Step(
        sentence=[torch.tensor([[0, 1], [1, 3]])],
        taken=[torch.tensor([[2, 3], [2, 3]])],
        near=[torch.tensor([[yes, no], [no, no]])],
        attention=[torch.tensor([[0.75, 0.1875], [0.125, 0.125]])])
    cache.steps = [first, second]
    found = [(f.ids, f.attention, f.share) for f in most_attended(cache)]
    assert found == [([b, b, b, stop], 0.25, 0.5), ([a, a, a, b, stop], 0.1875, 0.75)]
    second.attention[0][0, 1] = 0.0                                 # now the sum of two pieces
    assert [f.attention for f in most_attended(cache)] == [0.25, 0.1875]
    cache.steps = []
    assert most_attended(cache) == []

def test_fetched_sentences_are_shown_as_text(tiny, capsys):
    model, tokenizer, flags = tiny
    args = options.parse(CPU)
    talk = Conversation(model, tokenizer, WatchedKV.watch(SentenceKV(flags, budget=96)), args)
    talk.prefill(tokenizer.encode(TEXT, bos=True))
    print_fetched(talk, 3)
    assert capsys.readouterr().out == "    no sentence was fetched\n"
    list(talk.generate(tokenizer.encode(QUESTION), {-1}))
    print_fetched(talk, 2, expected=ANSWER, legend=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split() == ["attention", "heads", "sentence"]
    best = most_attended(talk.cache, end=talk.answers[-1].asked_at)[0]
    text = tokenizer.decode(best.ids).strip()
    assert text == ANSWER.strip()
    every = [tokenizer.decode(fetched.ids).strip() for fetched in most_attended(talk.cache)]
    assert QUESTION.strip() in every
    assert lines[2].split("  ")[-1].strip() == "<- the answer" and text in lines[2]
    assert f"{best.attention:.0%}" in lines[2] and f"{best.share:.0%}" in lines[2]

# ---------------------------------------------------------------------------------- conversations

def tokenizer_with_chat(folder, names, turn, start, eos):
    """The tiny model's tokenizer with more special tokens and a chat template.

    turn: Jinja code of a message; start: of what precedes an answer.
    """
    content = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    for name in names:
        token = dict(content["added_tokens"][0], id=1023 + len(content["added_tokens"]))
        content["added_tokens"].append({**token, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    template = ("{% for message in messages %}" + turn + "{% endfor %}"
                "{% if add_generation_prompt %}" + start + "{% endif %}")
    settings = {"chat_template": template, "bos_token": "<|begin_of_text|>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_dir(folder)

CHATS = {
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}", "<|eot_id|>"),
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{ '<|im_start|>assistant\n' }}", "<|im_end|>"),
    "zephyr": (
        ["</s>"],
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}",
        "{{ '<|assistant|>\n' }}", "</s>")}

@pytest.fixture(params=CHATS)
def chat(request, tmp_path):
    tokenizer = tokenizer_with_chat(tmp_path, *CHATS[request.param])
    assert tokenizer.chat_format is not None
    return tokenizer

@pytest.mark.parametrize("cut", [False, True])
def test_a_conversation_in_pieces_is_the_chat_template_of_the_whole(chat, cut):
    turns = ChatTurns(chat)
    closed = [] if cut else [max(chat.stop_ids)]                    # cut: the model did not end it
    ids = turns.text("A long text.")
    assert turns.fits(ids) and not turns.fits(chat.encode("A long text.", bos=False))
    ids += turns.question("Who?", True, None)
    messages = [{"role": "user", "content": "A long text.\n\nWho?"}]
    assert chat.decode(ids) == chat.decode(chat.chat(messages))
    for answer, question in (("Me", "Why?"), ("So", "When?")):
        ids += chat.encode(answer) + closed
        ids += turns.question(question, False, ids[-1])
        messages += [{"role": "assistant", "content": answer},
                     {"role": "user", "content": question}]
    assert chat.decode(ids) == chat.decode(chat.chat(messages))
    special = set(chat.added.values())
    assert [i for i in ids if i in special] == [i for i in chat.chat(messages) if i in special]

def test_a_conversation_knows_which_question_is_the_first(chat):
    turns, end = ChatTurns(chat), max(chat.stop_ids)
    talk = Conversation(None, chat, SimpleNamespace(length=5), options.parse(CPU))
    assert talk.question("Who?", turns) == turns.question("Who?", True, None)
    talk.length, talk.unread = 9, [end]
    assert talk.question("Who?", turns) == turns.question("Who?", False, end)
    assert turns.question("Who?", False, end) != turns.question("Who?", True, end)

def test_plain_turns_follow_each_other_as_text(tiny):
    tokenizer = tiny[1]
    turns = PlainTurns(tokenizer, end=".")
    assert turns.text("A text.") == [tokenizer.bos_id, *tokenizer.encode("A text.")]
    assert turns.question("Who?", True, None) == turns.question(" Who?", False, 5)
    assert turns.question("Who?", True, None) == tokenizer.encode(" Who?")
    assert turns.stop_ids == tokenizer.stop_ids | set(tokenizer.encode("."))
    assert PlainTurns(tokenizer).stop_ids == tokenizer.stop_ids

def test_a_checkpoint_without_a_known_chat_template_is_asked_in_plain_text(tiny, chat, capsys):
    args = options.parse(["--model", str(ROOT), "--ask", "Who?"])
    assert isinstance(cli.choose_turns(args, tiny[1], None), PlainTurns)
    note = capsys.readouterr().out
    assert note.count("\n") == 1 and "no chat template that is supported" in note
    assert isinstance(cli.choose_turns(args, chat, None), ChatTurns)
    assert isinstance(cli.choose_turns(args, chat, ChatTurns(chat).text("\na")), ChatTurns)
    assert capsys.readouterr().out == ""
    plain = chat.encode("A text.")
    assert isinstance(cli.choose_turns(args, chat, plain), PlainTurns)
    assert "saved without the chat template" in capsys.readouterr().out
    args.raw = True
    assert isinstance(cli.choose_turns(args, chat, None), PlainTurns)

@pytest.mark.parametrize("new_cache", [DenseKV, lambda: None])
def test_a_conversation_reads_every_token_once_the_last_of_each_answer_too(tiny, new_cache):
    model, tokenizer, flags = tiny
    cache = new_cache() or WatchedKV.watch(SentenceKV(flags, budget=128))
    talk = Conversation(model, tokenizer, cache, options.parse(CPU))
    assert talk.prefill(tokenizer.encode(TEXT, bos=True)) > 0
    turns, said = PlainTurns(tokenizer, end="."), TEXT
    for question, answer in FACTS[:3]:
        ids = talk.question(question, turns)
        assert "".join(talk.generate(ids, turns.stop_ids)) == answer
        said += question + answer
        assert len(talk.milliseconds) == len(tokenizer.encode(answer)) - 1
    expected = tokenizer.encode(said, bos=True)
    assert cache.length == talk.length == len(expected) - 1 and talk.unread == expected[-1:]
    assert talk.text_length == len(tokenizer.encode(TEXT, bos=True))
    if isinstance(cache, SentenceKV):
        assert cache.rows[0].tokens == expected[:-1]
        assert len(cache.steps) == len(talk.milliseconds)           # of the last answer alone

def test_special_tokens_that_end_an_answer_are_not_printed(tiny):
    model, tokenizer, flags = tiny
    turns = PlainTurns(tokenizer)
    talk = Conversation(model, tokenizer, SentenceKV(flags, budget=128), options.parse(CPU))
    ids = [9, tokenizer.bos_id]
    tokenizer = SimpleNamespace(stop_ids={tokenizer.bos_id}, stream=tokenizer.stream)
    talk.tokenizer = tokenizer
    talk.model = SimpleNamespace(generate=lambda *_, **__: iter(torch.tensor(ids)[:, None]),
                                 norm=model.norm)
    assert "".join(talk.generate([1], turns.stop_ids)) == "".join(tokenizer.stream([9]))
    assert talk.unread == ids[-1:]

def test_a_text_is_read_once_saved_loaded_and_asked_line_by_line(
        file, tmp_path, capsys, monkeypatch):
    saved = str(tmp_path / "story.cache")
    assert cli.main(["--prompt-file", file, "--budget", "128", "--save-cache", saved, "--chunk",
                     "100", *CPU]) == 0
    assert f"saved to {saved}" in capsys.readouterr().out
    feed(monkeypatch, "?\n" + "".join(f"{q.strip()}\r\n?\n \n" for q, _ in FACTS[:2]))
    assert cli.main(["--load-cache", saved, "--chat", *CPU]) == 0
    out = capsys.readouterr().out
    assert "loaded" in out and "budget 128 tokens" in out
    assert out.count("no sentence was fetched") == 1 and out.count("attention  heads") == 2
    for question, answer in FACTS[:2]:
        assert out.count(answer.strip()) >= 2 and question.strip() in out
        assert re.search(re.escape(answer.strip()) + r" +\[.* ms/token", out)
    assert "> " not in out and "Ctrl-D" not in out                  # no terminal: no prompt

def test_a_terminal_gets_a_prompt_and_no_echo(file, capsys, monkeypatch):
    stdin = io.StringIO(f"{QUESTION.strip()}\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["--prompt-file", file, "--chat", "--budget", "128", *CPU]) == 0
    out = capsys.readouterr().out
    assert "Ctrl-D ends" in out and out.count("\n> ") == 2 and QUESTION.strip() not in out
    assert ANSWER.strip() in out and "attention  heads" not in out

# ------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("arguments, message", [
    (["--budget", "12"], r"budget 12 must exceed sink \+ recent = 12"),
    (["--keep", "0.5"], "keep must be"),
    (["--temperature", "-1"], "temperature must be"),
    (["--top-p", "0"], "--top-p must be"),
    (["--chunk", "1"], "chunk must be"),
    (["--seed", "-1"], "seed must be"),
    (["--show", "-1"], "--show must be >= 0, got -1"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be >= 1, got 0"),
    (["--ask", "\udcff"], "--ask must be valid UTF-8"),
    (["--device", "nonsense"], "--device nonsense cannot be used: "),
    (["--device", "meta"], "--device meta is not supported, only cpu and cuda"),
    (["--save-cache", "nowhere/x"], "--save-cache nowhere/x: the folder .*nowhere does not exist"),
    (["--save-cache", "."], "--save-cache . is not a regular file"),
    (["--save-cache", "fifo"], "--save-cache fifo is not a regular file"),
    (["--save-cache", "link"], "--save-cache link is not a regular file"),
    (["--save-cache", "/dev/null"], "--save-cache /dev/null is not a regular file"),
    (["--save-cache", "/proc/x"], "--save-cache /proc/x: cannot write to /proc: "),
    (["--save-cache", "x" * 300], "x+: File name too long"),
    (["--page", "nowhere/x"], "--page nowhere/x: the folder .*nowhere does not exist"),
    (["--page", "fifo"], "--page fifo is not a regular file"),
    (["--page", "x", "--save-cache", "y", "--prompt-file", "plain"], "--page needs an answer: add"),
    (["--load-cache", "x", "--ask", "?"], "x: No such file or directory"),
    (["--load-cache", "fifo", "--ask", "?"], "--load-cache fifo is not a regular file"),
    (["--load-cache", "plain"], "--load-cache needs a question: use --ask or --chat"),
    (["--load-cache", "plain", "--ask", "?", "--paper"], "--paper cannot be combined with --load"),
    (["--load-cache", "plain", "--ask", "?", "--sink", "0"], "--sink cannot be combined with"),
    (["--load-cache", "plain", "--ask", "?", "--prompt-file", "plain"], "--prompt-file cannot be"),
    (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
    (["--prompt-file", "."], ".: Is a directory"),
    (["--prompt-file", "latin1"], "latin1 is not UTF-8 text: .* byte 0xe9 in position 3"),
    (["--prompt-file", "empty"], "empty is empty"),
    (["--model", "nowhere"], "nowhere"),
])
def test_bad_input_gives_one_line_before_the_model_is_loaded(
        arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("fifo", "link")
    Path("plain").write_text("A text.")
    Path("latin1").write_bytes("Caf\u00e9.".encode("latin-1"))
    Path("empty").write_bytes("\ufeff".encode())
    monkeypatch.setattr(cli.Llama, "from_pretrained", None)         # calling it would fail
    assert cli.main(["--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert re.match("error: .*" + message, err) and err.count("\n") == 1 and not out
    assert Path("fifo").is_fifo() and Path("link").is_symlink()
    assert sorted(os.listdir()) == ["empty", "fifo", "latin1", "link", "plain"]

def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(options.os, "access", lambda path, mode: mode != os.W_OK)
    options.check_target("--page", tmp_path / "new")
    (tmp_path / "old").write_text("")
    with pytest.raises(ValueError, match="--page .*old is write-protected"):
        options.check_target("--page", tmp_path / "old")

def test_what_the_tokenizer_cannot_encode_is_said_before_the_text_is_read(
        file, capsys, monkeypatch):
    encode = Tokenizer.encode
    def picky(self, text, **options):
        if "\u4e2d" in text:
            raise ValueError("no token for \u4e2d")
        return encode(self, text, **options)
    monkeypatch.setattr(Tokenizer, "encode", picky)
    with monkeypatch.context() as without_prefill:
        without_prefill.setattr(Llama, "prefill", None)
        assert cli.main(["--prompt-file", file, "--ask", "\u4e2d?", *CPU]) == 2
    out, err = capsys.readouterr()
    assert err == "error: no token for \u4e2d\n"
    feed(monkeypatch, f"\u4e2d?\n{QUESTION}\n")                     # one line of a conversation
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 0
    out, err = capsys.readouterr()
    assert "note: this line was skipped: no token for \u4e2d\n" in out and ANSWER.strip() in out

def test_unknown_bytes_in_a_conversation_cost_their_line_alone(file, capsys, monkeypatch):
    feed(monkeypatch, b"\xef\xbb\xbfcaf\xe9?\n\xef\xbb\xbf" + QUESTION.encode() + b"\r\n")
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 0
    out = capsys.readouterr().out
    assert "note: this line was skipped: it is not valid UTF-8 text\n" in out
    assert f"\n{QUESTION.strip()}\n" in out and ANSWER.strip() + "   [" in out

def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    for name, raw in (("a", "A\nb."), ("b", "\ufeffA\r\nb.")):
        (tmp_path / name).write_bytes(raw.encode())
    texts = [cli.read_text(options.parse(["--prompt-file", str(tmp_path / name)]))
             for name in ("a", "b")]
    assert texts[0] == texts[1] == ("A\nb.", [])

def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "usage: python -m ask" in out
    explained = re.findall(r"(?m)^  (--[\w-]+)[^\n]*?(?:  +\S|\n {20,}\S)", out)
    options = set(re.findall(r"--[\w-]+", out.split("\n\n")[0]))
    assert sorted(explained) == sorted(options - {"--help"})
    assert len(explained) == 25

# -------------------------------------------------------------------------- streams and full disks

def test_what_the_terminal_cannot_show_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("Caf\u00e9 \u4e2d\u6587\u3002 The dog ran.", encoding="utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    assert cli.main(["--prompt-file", str(tmp_path / "text"), "--ask", "\u6587?", *CPU]) == 0
    assert "Caf\u00e9 ???" in raw.getvalue().decode("cp1252")

@pytest.mark.parametrize("broken, status, error", [
    ("pipe", 141, ""), ("full", 2, "error: No space left on device\n")])
def test_output_that_cannot_be_written_ends_the_run(
        file, monkeypatch, capfd, broken, status, error):
    if broken == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    stream = open(writer, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["--prompt-file", file, "--ask", QUESTION, *CPU]) == status
    stream.close()                                                  # what Python does at exit
    assert capfd.readouterr().err == error

@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_standard_stream_is_no_fault(file, monkeypatch, name):
    feed(monkeypatch, QUESTION)
    monkeypatch.setattr(sys, name, None)
    assert cli.main(["--prompt-file", file, "--ask", QUESTION, "--chat", *CPU]) == 0

def test_warnings_are_one_line(file, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check", lambda args: warnings.warn("the context is too long"))
    assert cli.main(["--prompt-file", file, "--ask", "Who?", *CPU]) == 0
    assert capsys.readouterr().err == "warning: the context is too long\n"

def test_a_disk_that_fills_up_leaves_nothing_and_the_question_is_answered(file, tmp_path, capsys):
    arguments = ["--prompt-file", file, "--ask", QUESTION, "--save-cache", str(tmp_path / "x")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))         # bytes of a file
    try:
        assert cli.main([*arguments, *CPU]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    assert err == f"error: the cache was not saved: {tmp_path / 'x'}: File too large\n"
    assert ANSWER.strip() + "   [" in out and os.listdir(tmp_path) == ["story.txt"]

def test_an_error_in_the_middle_is_one_line(file, monkeypatch, capsys):
    def broken(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory\nsee the manual")
    monkeypatch.setattr(Llama, "prefill", broken)
    assert cli.main(["--prompt-file", file, "--ask", QUESTION, *CPU]) == 2
    assert capsys.readouterr().err == (
        "error: no device memory for so many tokens at once: set a smaller --chunk\n")

def test_progress_is_shown_after_two_seconds(monkeypatch, capsys):
    for terminal, expected in ((True, "\rlayer 2 of 3\rlayer 3 of 3\n"), (False, "")):
        clock = iter([0.0, 1.0, 3.0, 4.0])
        monkeypatch.setattr("ask.report.time.perf_counter", lambda: next(clock))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        report = progress("layer")
        for done in (1, 2, 3):
            report(done, 3)
        assert capsys.readouterr().err == expected

def test_long_texts_are_cut_and_put_on_one_line():
    assert short(" a\n b ", 10) == "a b" and short("x" * 11, 10) == "x" * 6 + " ..."
    assert short("x" * 10, 10) == "x" * 10

# ---------------------------------------------------------------------------------- interruptions

class Interrupt:
    """Raises KeyboardInterrupt in a layer of the nth forward from now on."""

    def __init__(self, monkeypatch, forward, layer):
        self.forward, self.layer, self.attend = forward, layer, {}
        for cls in (DenseKV, WatchedKV):
            self.attend[cls] = cls.attend
            monkeypatch.setattr(cls, "attend", lambda cache, *args: self(cache, *args))

    def __call__(self, cache, layer, *args):
        if layer == self.layer:
            self.forward -= 1
            if self.forward == 0:
                raise KeyboardInterrupt
        return self.attend[type(cache)](cache, layer, *args)

@pytest.mark.parametrize("forward", [1, 2, 5])
def test_ctrl_c_ends_the_program_with_one_line_and_status_130(file, monkeypatch, capsys, forward):
    Interrupt(monkeypatch, forward, layer=2)
    arguments = ["--prompt-file", file, "--ask", QUESTION]
    assert cli.main([*arguments, *CPU]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"

@pytest.mark.parametrize("forward", [3, 2, 5])         # text, question, decode steps 1, 2, ...
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_in_a_conversation_ctrl_c_ends_the_answer_and_what_was_read_stays(
        tiny, file, monkeypatch, capsys, forward, layer, dense):
    tokenizer, talks = tiny[1], {}
    make = cli.make_conversations
    monkeypatch.setattr(cli, "make_conversations", lambda *args: talks.update(make(*args)) or talks)
    (first, answer), (second, other) = FACTS[1], FACTS[2]
    feed(monkeypatch, f"{first}\n{second}\n")
    if dense:
        forward += 1                                                # both read the text first
    Interrupt(monkeypatch, forward, layer)
    options = ["--dense"] if dense else []
    arguments = ["--prompt-file", file, "--chat", "--budget", "128", *options, *CPU]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.count("[interrupted]") == 1 and err == ""
    assert out.count(other.strip() + "   [") == 1 + dense           # the second one is answered
    assert out.count(answer.strip() + "   [") == dense              # by the one that went on
    talk = talks["dense" if dense else "SentenceKV"]
    steps = forward - 2 - dense                                     # of the answer, that completed
    said = tokenizer.encode(answer)[:steps]
    kept = tokenizer.encode(first) + said if steps else []
    expected = tokenizer.encode(TEXT, bos=True) + kept + tokenizer.encode(second + other)
    assert talk.length == talk.cache.length == len(expected) - 1
    if not dense:
        assert talk.cache.rows[0].tokens == expected[:-1]

@pytest.mark.parametrize("forward", [2, 3, 4])         # question, decode steps 1 and 2
@pytest.mark.parametrize("layer", [0, 2])
def test_with_keep_ctrl_c_in_the_first_answer_leaves_the_text(
        tiny, file, monkeypatch, capsys, forward, layer):
    tokenizer, talks = tiny[1], {}
    make = cli.make_conversations
    monkeypatch.setattr(cli, "make_conversations", lambda *args: talks.update(make(*args)) or talks)
    (first, answer), second = FACTS[1], FACTS[2][0]
    options = ["--prompt-file", file, "--chat", "--budget", "256", "--keep", "2", *CPU]
    feed(monkeypatch, second)
    assert cli.main(options) == 0                                   # as if never interrupted
    expected = talks["SentenceKV"].cache
    feed(monkeypatch, f"{first}\n{second}\n")
    Interrupt(monkeypatch, forward, layer)
    assert cli.main(options) == 0
    out, err = capsys.readouterr()
    assert out.count("[interrupted]") == 1 and err == ""
    said = re.findall(r"SentenceKV  (The .*)   \[[\d.]+ ms", out)      # both the second one
    assert len(said) == 2
    cache, text = talks["SentenceKV"].cache, tokenizer.encode(TEXT, bos=True)
    if forward == 4:                                                # a step is complete: it stays
        question = tokenizer.encode(first)
        kept = text + (question + tokenizer.encode(answer))[:len(question) + 1]
        assert cache.rows[0].tokens[:len(kept)] == kept
        assert cache.rows[0].tokens[len(kept) + 1:][:5] == tokenizer.encode(second)[:5]
    else:
        assert said[0] == said[1] and cache.rows[0].tokens == expected.rows[0].tokens
        assert all(layer.pool.used == expected.layers[0].pool.used for layer in cache.layers)

def test_ctrl_c_while_waiting_for_a_question_ends_the_conversation(file, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=interrupted, isatty=lambda: True))
    assert cli.main(["--prompt-file", file, "--chat", *CPU]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"

CTRL_C = """
    import os, signal, time
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep({seconds})
"""
CLI = {                 # an ask/cli.py that interrupts itself, status, output on stderr
    "import": ("if True:" + CTRL_C, 130, "\ninterrupted\n"),
    "swallowed": ("try:" + CTRL_C + "except BaseException: pass\nimport time; time.sleep(9)", 130,
                  "\ninterrupted\n"),
    "start": ("def main():" + CTRL_C, 130, "\ninterrupted\n"),
    "main": ("def main():\n  try:" + CTRL_C + "  except KeyboardInterrupt: return 7", 7, ""),
    "exit": ("import atexit\ndef late():" + CTRL_C + "atexit.register(late)\n"
             "def main(): return 0", 130, "\ninterrupted\n"),
    "ignored": ("def main():" + CTRL_C + "    return 7", 7, "")}

@pytest.mark.parametrize("where", CLI)
def test_ctrl_c_before_and_after_the_run_is_one_line_too(tmp_path, where):
    code, status, error = CLI[where]
    ignored = where == "ignored"                                    # as in a background job
    disposition = signal.SIG_IGN if ignored else signal.default_int_handler
    (tmp_path / "ask").mkdir()
    (tmp_path / "ask" / "__main__.py").write_text((ROOT / "ask" / "__main__.py").read_text())
    (tmp_path / "ask" / "cli.py").write_text(code.format(seconds=0 if ignored else 9))
    done = subprocess.run(
        [sys.executable, "-m", "ask"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", error)
