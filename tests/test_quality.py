"""experiments/quality: the simulator, the rivals, and what the commands report."""
import gzip
import json
import random
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from experiments.quality import free_answers, needles, perplexity, ruler, texts, toy, unpack
from experiments.quality.answers import right_answers
from experiments.quality.command import Lab, run
from experiments.quality.figures import bootstrap, ratio, share, wilson
from experiments.quality.log import Log
from experiments.quality.methods import (
    OracleSentences, OracleTokens, Quest, Sentences, SnapKV, StreamingLLM, methods)
from experiments.quality.recording import Recorder, record
from experiments.quality.simulator import Batch, Simulator
from experiments.training.corpus import answer, draw_facts, question, story
from model import Config, DenseKV, Llama
from sentencekv import PAPER, RANKS, SentenceKV, sentence_flags
from tokenizer import Tokenizer

torch.set_num_threads(1)
WORDS = [b" the", b" cat", b" sat", b".", b" It", b"?", b"\n\n", b'"', b" 3", b".5", b" mat", b","]
FLAGS = sentence_flags(WORDS * 4)
VOCABULARY = len(FLAGS)
INF = float("inf")

@pytest.fixture(scope="module")
def model():
    """Random weights, large enough for sharp attention; 6 query heads, 2 KV heads; float64."""
    torch.manual_seed(0)
    model = Llama(Config(VOCABULARY, 48, 64, 3, 6, 2, tie_word_embeddings=True)).double()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, 0.4)
    return model.requires_grad_(False)

def text(seed, n):
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(n)]

@torch.no_grad()
def decode(model, cache, prompt, new):
    """Logits of `new` after a prompt, one token at a time: (T, V)."""
    model(torch.tensor([prompt]), cache)
    return torch.cat([model(torch.tensor([[token]]), cache) for token in new])

@torch.no_grad()
def simulate(model, method, prompt, new):
    recording = record(model, prompt)
    return model(torch.tensor([new]), Simulator(recording, method), all_logits=True)[0]

# ------------------------------------------------------------------------------ the simulator

SETTINGS = [
    *({"rank": rank} for rank in RANKS),
    {"max_sentence": 5, "recent": 7, "sink": 0},
    {"rank": PAPER["rank"], "keep": 2, "window": 16, "max_pool": 7},
]

@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_simulated_steps_equal_the_steps_of_the_cache(model, settings):
    for seed, budget in ((1, 48), (2, 64), (3, 500)):
        prompt, new = text(seed, 200), text(seed + 50, 40)
        real = decode(model, SentenceKV(FLAGS, budget=budget, **settings), prompt, new)
        simulated = simulate(model, Sentences(FLAGS, budget=budget, **settings), prompt, new)
        torch.testing.assert_close(simulated, real, atol=1e-4, rtol=1e-4)

def test_a_budget_for_all_tokens_is_dense_attention(model):
    prompt, new = text(1, 150), text(2, 30)
    dense = decode(model, DenseKV(), prompt, new)
    torch.testing.assert_close(simulate(model, None, prompt, new), dense)
    for name, new_method in methods(FLAGS).items():
        found = simulate(model, new_method(250), prompt, new)
        torch.testing.assert_close(found, dense, msg=name)

def test_the_rows_of_a_batch_equal_single_simulators(model):
    prompt, new = text(3, 150), text(4, 20)
    recording = record(model, prompt)
    compared = [None, *(new_method(60) for new_method in methods(FLAGS).values())]
    rows = torch.tensor([new]).expand(len(compared), -1)
    batch = model(rows, Batch([Simulator(recording, m) for m in compared]), all_logits=True)
    for i, method in enumerate([None, *(new_method(60) for new_method in methods(FLAGS).values())]):
        torch.testing.assert_close(batch[i], simulate(model, method, prompt, new))

def test_a_fork_of_a_recorder_continues_as_one_prompt(model):
    prompt, questions = text(5, 90), (text(6, 20), text(7, 25))
    cache = Recorder()
    model(torch.tensor([prompt]), cache)
    forks = [cache.fork() for _ in questions]
    for fork, ids in zip(forks, questions):
        model(torch.tensor([ids]), fork)
    for fork, ids in zip(forks, questions):             # neither has changed the other
        found, whole = fork.recording(), record(model, prompt + ids)
        assert found.tokens == whole.tokens and cache.length == 90
        for name in ("keys", "values", "queries"):
            for a, b in zip(getattr(found, name), getattr(whole, name), strict=True):
                torch.testing.assert_close(a, b)

# --------------------------------------------------------------------------------- the rivals

T, N, H, G, D, PROMPT = 5, 120, 2, 3, 8, 115
SINK, RECENT, BUDGET = 4, 32, 60

@pytest.fixture
def step():
    """A recording of one layer, and the queries (T, H, G, d) and keys (H, N, d) of new tokens."""
    torch.manual_seed(1)
    q, keys = 2 * torch.randn(T, H, G, D), torch.randn(H, N, D)
    queries = 2 * torch.randn(H * G, 32, D)
    ids = text(8, N)
    recording = SimpleNamespace(tokens=ids[:PROMPT], queries=[queries], keys=[keys[:, :PROMPT]])
    return recording, ids[PROMPT:], q, keys

def chosen(method, step):
    """The set of tokens that each new token and head attends to, as {(t, h): set}."""
    recording, new, q, keys = step
    method.begin(recording, new)
    slot, used = method.choose(0, q, keys)
    found = {}
    for t in range(T):
        for h in range(H):
            tokens = slot[t, h][used[t, h]].tolist()
            assert len(tokens) == len(set(tokens)) <= BUDGET
            assert set(range(SINK)) <= set(tokens) and max(tokens) == PROMPT + t
            found[t, h] = set(tokens)
    return found

def near(t):
    """The sink and the recent tokens of the new token t."""
    return set(range(SINK)) | set(range(PROMPT + t - RECENT + 1, PROMPT + t + 1))

def far(t):
    return range(SINK, PROMPT + t - RECENT + 1)

def attention(q, keys, position):
    """Softmax weights of queries (G, d) over the keys up to a position, averaged."""
    logits = q @ keys[:position + 1].T / D ** 0.5
    return logits.softmax(-1).mean(0)

def test_streaming_takes_the_latest_tokens(step):
    for (t, h), tokens in chosen(StreamingLLM(BUDGET), step).items():
        latest = set(range(PROMPT + t + 1 - (BUDGET - SINK), PROMPT + t + 1))
        assert tokens == set(range(SINK)) | latest

def test_snapkv_takes_what_the_last_queries_of_the_prompt_attend_to(step):
    recording, _, _, keys = step
    for head in range(H * G):                           # each query would like the token after it
        recording.queries[0][head, :31] += 9 * keys[head // G, PROMPT - 31:PROMPT]
    for (t, h), tokens in chosen(SnapKV(BUDGET), step).items():
        score = torch.zeros(PROMPT)
        for head in range(h * G, (h + 1) * G):
            for i, query in enumerate(recording.queries[0][head]):
                seen = PROMPT - 32 + i + 1
                score[:seen] += (query @ keys[h, :seen].T / D ** 0.5).softmax(-1)
        pooled = [max(score[max(0, i - 3):i + 4]).item() for i in range(PROMPT)]
        best = sorted((pooled[i] for i in far(t)), reverse=True)        # neighbors can tie
        found = sorted((pooled[i] for i in tokens - near(t)), reverse=True)
        assert near(t) <= tokens and len(tokens) == BUDGET
        assert found == pytest.approx(best[:BUDGET - SINK - RECENT])

def test_quest_takes_pages_in_the_order_of_their_bounds(step):
    _, _, q, keys = step
    for (t, h), tokens in chosen(Quest(BUDGET), step).items():
        bounds = {}
        for page in range(-(-N // 16)):
            k = keys[h, 16 * page:16 * page + 16]
            products = q[t, h][:, None] * k                             # (G, 16, d)
            bounds[page] = products.amax(1).sum(-1).mean().item()
        expected = []
        for page in sorted(bounds, key=bounds.get, reverse=True):
            expected += [i for i in far(t) if i // 16 == page]
        assert tokens == near(t) | set(expected[:BUDGET - SINK - RECENT])

def test_the_oracle_of_tokens_takes_those_with_the_most_attention(step):
    _, _, q, keys = step
    for (t, h), tokens in chosen(OracleTokens(BUDGET), step).items():
        weights = attention(q[t, h], keys[h], PROMPT + t)
        best = sorted(far(t), key=lambda i: -weights[i])
        assert tokens == near(t) | set(best[:BUDGET - SINK - RECENT])

def test_the_oracle_of_sentences_takes_those_with_the_most_attention(step):
    _, _, q, keys = step
    method = OracleSentences(FLAGS, budget=BUDGET, recent=RECENT)
    for (t, h), tokens in chosen(method, step).items():
        position, sentence = PROMPT + t, method.sentence.tolist()
        weights = attention(q[t, h], keys[h], position)
        oldest = sentence[position + 1 - RECENT]
        expected = [i for i in range(position + 1) if sentence[i] in (0, *range(oldest, N))]
        others = range(1, oldest)
        mass = {s: sum(weights[i] for i in range(position + 1) if sentence[i] == s) for s in others}
        for s in sorted(mass, key=mass.get, reverse=True):
            expected += [i for i in range(position) if sentence[i] == s]
        expected.remove(position)
        assert tokens == set(expected[:BUDGET - 1]) | {position}

# ------------------------------------------------------------------------- answers and figures

def test_an_answer_is_right_if_greedy_decoding_gives_it(model):
    """The true answer is fed, so it must be compared with what generate() yields."""
    prompt = text(9, 120)
    budget, outcomes = 48, set()
    for seed in range(8):
        cache = SentenceKV(FLAGS, budget=budget)
        said = [int(t) for t in model.generate(torch.tensor([prompt + [seed]]), cache, 6)]
        wrong = said[:4] + [(said[4] + 1) % VOCABULARY] + said[5:]
        recording = record(model, prompt + [seed])
        for answer, value, expected in ((said, 1, True), (wrong, 1, False), (wrong, 5, None)):
            method = Sentences(FLAGS, budget=budget)
            right, _ = right_answers(model, recording, answer, [method, None], value)
            assert expected is None or right == expected
            outcomes.add((expected, right))
    assert {(True, True), (False, False), (None, False)} <= outcomes

def test_intervals():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    rng = random.Random(0)
    above, below = 0, 0
    for i in range(200):                        # 95% intervals of a mean that is known, 0
        low, high = bootstrap([rng.gauss(0, 1) for _ in range(40)], rounds=200, seed=i)
        above += low > 0
        below += high < 0
    assert 1 <= above <= 13 and 1 <= below <= 13
    assert ratio([0.0, 0.0]) == "1.000 (1.000-1.000)" and share([True]).startswith("1.000 (.207-")

# ---------------------------------------------------------------------------------- the log

def test_a_log_continues_where_it_stopped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, ("a", "b"))
    log.add({"a": 1, "b": "x", "loss": 2.5})
    with pytest.raises(ValueError, match="is in the log"):
        log.add({"a": 1, "b": "x", "loss": 3.0})
    with open(path, "a") as file:
        file.write('{"a": 2, "b": "y", "lo')                # an interrupted write
    log = Log(path, ("a", "b"))
    assert (1, "x") in log and (2, "y") not in log and log[1, "x"]["loss"] == 2.5
    log.add({"a": 2, "b": "y", "loss": 1.0})
    assert len(path.read_text().splitlines()) == 2 and (2, "y") in Log(path, ("a", "b"))
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a record"):
        Log(path, ("a", "b"))

# ------------------------------------------------------------------------------- the commands

TINY = str(toy.TINY)

@pytest.fixture
def prose(tmp_path):
    """A text file of filler sentences and facts in a folder "stories"."""
    path = tmp_path / "stories" / "one.txt"
    path.parent.mkdir()
    path.write_text(story(6000, facts=20, seed=1, prose=0.5)[0], encoding="utf-8")
    return path

def test_windows_start_with_sentences_and_do_not_overlap(prose):
    tokenizer = Tokenizer.from_dir(TINY)
    found = texts.windows(prose, tokenizer, 3, 400)
    whole = prose.read_text()
    starts = [whole.index(tokenizer.decode(window.ids)[:60]) for window in found]
    assert all(whole[:start].rstrip()[-1] in ".?!" for start in starts)
    assert starts[0] + 1500 < starts[1] and starts[1] + 1500 < starts[2]
    assert {(window.genre, len(window.ids)) for window in found} == {("stories", 400)}
    with pytest.raises(ValueError, match="one.txt is too short for 20 windows of 4000"):
        texts.windows(prose, tokenizer, 20, 4000)

def test_perplexity_reports_what_the_caches_give_and_resumes(prose, tmp_path, capsys, monkeypatch):
    log = tmp_path / "log.jsonl"
    options = [str(prose), "--model", TINY, "--log", str(log), "--prompt", "300", "--score", "12",
               "--windows", "2", "--parts", "4", "--methods"]
    assert run(perplexity.main, [*options, "SentenceKV"]) == 0
    model, tokenizer = Llama.from_pretrained(TINY, dtype=torch.float32), Tokenizer.from_dir(TINY)
    flags, differences = sentence_flags(tokenizer.token_bytes), []
    for window in texts.windows(prose, tokenizer, 2, 313):
        prompt, new, target = window.ids[:300], window.ids[300:-1], torch.tensor(window.ids[301:])
        losses = [F.cross_entropy(decode(model, cache, prompt, new), target).item()
                  for cache in (SentenceKV(flags, budget=75), DenseKV())]
        differences.append(losses[0] - losses[1])
    assert max(differences) - min(differences) > 1e-3
    assert f"| SentenceKV | {ratio(differences)} |" in capsys.readouterr().out

    recorded = []
    monkeypatch.setattr(perplexity, "record", lambda *a: recorded.append(a) or record(*a))
    assert run(perplexity.main, [*options, "SentenceKV"]) == 0 and not recorded
    assert run(perplexity.main, [*options, "SentenceKV", "Quest"]) == 0 and len(recorded) == 2
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "SentenceKV"] * 2 + ["Quest"] * 2

@pytest.fixture
def known_facts(monkeypatch):
    """Facts that the tiny model knows how to answer."""
    def draw(rng):
        facts = draw_facts(rng, 5, ["phone number", "secret code"])
        return [(question(*fact).strip(), answer(*fact)[0].strip(), answer(*fact)[1].rstrip("."))
                for fact in facts]
    monkeypatch.setattr(needles, "draw_facts", draw)

def test_needles_are_right_as_often_as_generated_answers(prose, known_facts, monkeypatch):
    """Without a chat template: the tiny model has none."""
    args = SimpleNamespace(model=TINY, parts=[8], methods=["SentenceKV", "StreamingLLM"], log=None)
    lab = Lab(args, needles.KEYS)

    def chat(messages):
        return [lab.tokenizer.bos_id] + lab.tokenizer.encode(" " + messages[0]["content"])
    monkeypatch.setattr(lab.tokenizer, "chat", chat)
    prompts = []                                        # of what right_answers() was asked

    def noted(model, recording, *arguments):
        prompts.append(recording.tokens)
        return right_answers(model, recording, *arguments)
    monkeypatch.setattr(needles, "right_answers", noted)
    counts = {"dense": 0, "SentenceKV": 0, "StreamingLLM": 0}
    for seed in range(3):
        body, facts, depths = needles.document(str(prose), seed, 700, lab.tokenizer)
        places = [body.index(start + value + ".") / len(body) for _, start, value in facts]
        assert places == pytest.approx(depths, abs=0.12)
        needles.measure(lab, str(prose), seed, 700)
        for i, (asked, start, value) in enumerate(facts):
            ids = chat([{"role": "user", "content": f"{body}\n\n{asked}"}])
            assert len(ids) <= 700 and ids == prompts[5 * seed + i]
            said = lab.model.generate(torch.tensor([ids]), DenseKV(), 20)
            said = lab.tokenizer.decode(int(t) for t in said)
            key = ("one.txt", seed, 700, i)
            assert lab.log[(*key, 0, "dense")]["right"] or start + value not in said
            for name in counts:
                counts[name] += lab.log[(*key, 0 if name == "dense" else 8, name)]["right"]
    assert counts["dense"] >= 13 and counts["SentenceKV"] >= 11 and counts["StreamingLLM"] <= 8

def test_ruler_exchanges_the_chat_template(tmp_path):
    header = "<|start_header_id|>{}<|end_header_id|>"
    prompt = ("<|begin_of_text|>" + header.format("system") + "Be brief.<|eot_id|>"
              + header.format("user") + "A text.\nWhat?<|eot_id|>"
              + header.format("assistant") + " The number is")
    seen = []
    tokenizer = SimpleNamespace(chat=lambda turns: seen.append(turns) or [1], encode=list)
    assert ruler.prompt_ids(tokenizer, prompt) == [1, *"The number is"]
    assert seen == [[{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": "A text.\nWhat?"}]]
    with pytest.raises(ValueError, match="must end in an assistant's turn"):
        ruler.prompt_ids(tokenizer, "plain text")
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"input": prompt, "outputs": ["17"]}) + "\n")
    assert ruler.read_records(path) == [(prompt, "17")]
    path.write_text(json.dumps({"input": prompt, "outputs": ["17", "18"]}) + "\n")
    with pytest.raises(ValueError, match="line 1: needs"):
        ruler.read_records(path)

def test_ruler_answers_are_right_if_all_of_the_value_is(monkeypatch):
    args = SimpleNamespace(model=TINY, parts=[8], methods=["SentenceKV"], log=None)
    lab = Lab(args, ruler.KEYS)

    def chat(turns):
        return [lab.tokenizer.bos_id] + lab.tokenizer.encode(" " + turns[0]["content"])
    monkeypatch.setattr(lab.tokenizer, "chat", chat)
    body, asked = story(600, facts=6, seed=3)
    header = "<|start_header_id|>{}<|end_header_id|>"
    for i, (question_of, sentence) in enumerate(asked):
        start, _, value = sentence.rstrip(".").partition(" is ")
        first, *rest = value.split(" ")
        other = "7" if first == "4" else "4"
        turns = [header.format("user") + body + question_of,
                 header.format("assistant") + start + " is"]
        prompt = "<|eot_id|>".join(turns)
        ruler.measure(lab, "true", i, prompt, value)
        ruler.measure(lab, "false", i, prompt, " ".join([other, *rest]))    # only the first token
    for name, part in (("dense", 0), ("SentenceKV", 8)):
        assert sum(lab.log["true", i, part, name]["right"] for i in range(6)) >= 5
        assert not any(lab.log["false", i, part, name]["right"] for i in range(6))

def test_the_toy_keeps_its_needles(capsys):
    assert run(toy.main, ["--n", "2", "--lengths", "512", "--parts", "8"]) == 0
    rows = dict(line[2:].split(" | ", 1) for line in capsys.readouterr().out.splitlines()
                if line.startswith("| "))
    assert rows["dense"].startswith("1.000") and rows["SentenceKV"].startswith("1.000")
    assert not rows["StreamingLLM"].startswith("1.000")

def test_texts_are_unpacked_from_the_packages(tmp_path):
    def r_string(line):
        raw = line.encode()
        kind = b"\x00\x04\x00\x09" if line.isascii() else b"\x00\x00\x80\x09"
        return kind + len(raw).to_bytes(4, "big") + raw
    files = {f"python3.11/html/_sources/{name}.rst.txt": b"Text." for name in unpack.MANUALS}
    files["anarchism/markdown/secA1.md.gz"] = gzip.compress(b"See [this](x.html).\n\n" * 10000)
    files["anarchism/markdown/secA2.md.gz"] = gzip.compress(b"Too short.")
    page = b"<head>no</head><p>One\ntwo.</p><pre>a\n b</pre><script>no</script><p>End.</p>"
    files["debian-handbook/html/en-US/a.html"] = files["debian-handbook/html/en-US/b.html"] = page
    for name, content in files.items():
        path = tmp_path / "in/usr/share/doc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    novel = b"".join(map(r_string, ["CHAPTER I", "", "It was", "caf\u00e9 time.", "", "The end."]))
    database = b"".join(len(novel).to_bytes(4, "big") + zlib.compress(novel) for _ in range(6))
    path = tmp_path / "in/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    path.parent.mkdir(parents=True)
    path.write_bytes(database)
    command = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert run(unpack.main, command) == 0
    found = {str(file.relative_to(tmp_path / "out")): file.read_text()
             for file in tmp_path.glob("out/*/*")}
    assert found["novels/emma.txt"] == "CHAPTER I\n\nIt was caf\u00e9 time.\n\nThe end."
    assert found["essays/secA1.txt"].startswith("See this.\n\nSee this.")
    halves = found["technical/handbook-1.txt"] + found["technical/handbook-2.txt"]
    assert halves == "One two.\n\na\n b\n\nEnd.\n\nOne two.\n\na\n b\n\nEnd."
    assert "essays/secA2.txt" not in found and len(found) == 6 + 1 + 2 + len(unpack.MANUALS)
    assert run(unpack.main, command) == 2               # nothing is overwritten

def test_errors_are_one_line(prose, capsys):
    for arguments, message in (
            ([str(prose), "--model", TINY, "--methods", "Quests"], "'Quests' is unknown"),
            ([str(prose.parent), "--model", TINY], "is not a file"),
            ([str(prose), "--model", TINY, "--parts", "0"], "--parts must be at least 1")):
        assert run(perplexity.main, arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1

# --------------------------------------------------------------------------- free answers

@pytest.mark.parametrize("settings", [dict(budget=40), dict(budget=40, keep=1.5, window=8)])
def test_a_cache_that_starts_from_a_recording_decodes_as_one_that_read_the_prompt(settings):
    model, tokenizer = Llama.from_pretrained(TINY, dtype=torch.float32), Tokenizer.from_dir(TINY)
    flags, ids = sentence_flags(tokenizer.token_bytes), tokenizer.encode(story(900, seed=2)[0])
    prompt, new = ids[:150], ids[150:160]
    started = free_answers.Started(flags, record(model, prompt), **settings)
    read = SentenceKV(flags, **settings)
    with torch.no_grad():
        model.prefill(torch.tensor([prompt]), read)
        for part in [[token] for token in new] + [ids[160:170], ids[170:171]]:  # with a follow-up
            logits = [model(torch.tensor([part]), cache) for cache in (started, read)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(*(cache.fetched()[0] for cache in (started, read)))

@pytest.mark.parametrize("stop, expected", [(6, "345"), (3, ""), (30, "3456")])
def test_an_answer_ends_with_a_stop_id_or_after_so_many_tokens(stop, expected, monkeypatch):
    """A model that counts: the token after id n is n + 1."""
    monkeypatch.setattr(free_answers, "MOST_TOKENS", 4)
    lab = SimpleNamespace(
        model=lambda tokens, cache: F.one_hot(tokens[:, -1] + 1, 32),
        tokenizer=SimpleNamespace(stop_ids={stop}, decode=lambda ids: "".join(map(str, ids))))
    assert free_answers.greedy_answer(lab, None, 3) == expected

def test_a_value_counts_as_a_number_of_its_own():
    assert free_answers.contains("The code is 4711.", " 4711")
    assert not free_answers.contains("47112 or 14711", " 4711")

def test_free_answers_with_a_covering_budget_are_those_of_dense_attention(
        prose, known_facts, tmp_path, capsys, monkeypatch):
    def chat(self, messages):
        return self.encode(" " + messages[0]["content"], bos=True)
    monkeypatch.setattr(Tokenizer, "chat", chat)
    log = tmp_path / "log.jsonl"
    options = [str(prose), "--model", TINY, "--log", str(log), "--length", "500", "--n", "1",
               "--parts", "1", "4", "--methods", "SentenceKV"]
    assert run(free_answers.main, options) == 0
    out = capsys.readouterr().out
    assert "dense: " in out and "of 5" in out
    records = [json.loads(line) for line in log.read_text().splitlines()]
    answers = {(r["fact"], r["part"]): r["answer"] for r in records}
    assert len(answers) == 15 and any(answers.values())
    _, facts, _ = needles.document(str(prose), 0, 500, Tokenizer.from_dir(TINY))
    right = [facts[r["fact"]][2].strip() in r["answer"] for r in records]
    assert [r["right"] for r in records] == right and 0 < sum(right) < len(right)
    assert all(answers[i, 0] == answers[i, 1] for i in range(5))    # the budget covers all
    assert run(free_answers.main, [*options[:-1], "Quest"]) == 2
    assert "'Quest' has no cache" in capsys.readouterr().err
