"""The page of what was fetched: what is in its data, and what it shows in headless Chromium."""
import base64
import fcntl
import html
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ask import cli, options, page
from ask.conversation import Conversation, PlainTurns
from ask.watch import MeasuredKV, WatchedKV
from experiments import step_picture
from model import DenseKV, Llama
from sentencekv import RANKS, SentenceKV, sentence_flags
from tokenizer import Tokenizer
from train_tiny import story

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
TEXT, FACTS = story(600, facts=4, seed=4)
CPU = ["--device", "cpu", "--max-new-tokens", "16"]
BUDGET = 96
HOSTILE = ("</script><script>window.hacked = 1</script> {{data}} <!-- <img src=x "
           "onerror=\"window.hacked = 2\"> &amp; </span></div> \u2028 'quoted' ` ${1}.")
torch.set_num_threads(1)

# -------------------------------------------------------------------------------- making a page

@pytest.fixture(scope="module")
def tiny():
    return Llama.from_pretrained(TINY, dtype=torch.float32), Tokenizer.from_dir(TINY)

def talk_of(tiny, cache, name="out.html", text=TEXT):
    """A conversation that has read the text."""
    model, tokenizer = tiny
    talk = Conversation(model, tokenizer, cache, options.parse([*CPU, "--page", name]))
    talk.prefill(tokenizer.encode(text, bos=True))
    return talk

def ask(talk, questions):
    turns = PlainTurns(talk.tokenizer, end=".")
    for question in questions:
        list(talk.generate(talk.question(question, turns), turns.stop_ids, question))

def ask_both(tiny, questions, budget=BUDGET, text=TEXT, **settings):
    """-> conversations with a WatchedKV and with a DenseKV that have answered the questions."""
    flags = sentence_flags(tiny[1].token_bytes)
    cache = WatchedKV.watch(SentenceKV(flags, budget=budget, **settings))
    talks = talk_of(tiny, cache, text=text), talk_of(tiny, DenseKV(), text=text)
    for talk in talks:
        ask(talk, questions)
    return talks

def read_page(path):
    """-> the JSON object and the arrays of a page."""
    text = path.read_text(encoding="utf-8")
    run = json.loads(re.search(r'id="run">(.*?)</script>', text)[1])
    raw = zlib.decompress(base64.b64decode(re.search(r'id="data">(.*?)</script>', text)[1]))
    arrays, offset = {}, 0
    for name, n in run["arrays"]:
        low, high = np.frombuffer(raw, np.uint8)[offset:offset + 2 * n].reshape(2, n).astype(int)
        arrays[name] = low + 256 * high
        offset += 2 * n
    assert offset == len(raw)
    return run, arrays

def selections(run, arrays):
    """Per fetch, the set of sentences."""
    heads, gaps = run["layers"] * run["heads"], iter(arrays["gap"].tolist())
    current, found = [set() for _ in range(heads)], []
    for fetch, n in enumerate(arrays["changes"].tolist()):
        s = 0
        for _ in range(n):
            s += next(gaps)
            current[fetch % heads] ^= {s}
        found.append(set(current[fetch % heads]))
    return found

class Plain:
    """What a SentenceKV that nobody watches returns from fetched(), for every decode step.

    found: per step, its position, and per layer and head {sentence: taken}, best first.
    """

    def __init__(self, tiny, questions, budget=BUDGET, **settings):
        model, tokenizer = tiny
        turns = PlainTurns(tokenizer, end=".")
        cache = SentenceKV(sentence_flags(tokenizer.token_bytes), budget=budget, **settings)
        self.cache, self.found, last = cache, [], []
        model.prefill(torch.tensor([tokenizer.encode(TEXT, bos=True)]), cache)
        for question in questions:
            ids = last + turns.question(question, True, None)
            generated = model.generate(torch.tensor([ids]), cache, 16, stop_ids=turns.stop_ids)
            for step, token in enumerate(generated):
                last = token.tolist()
                if step:
                    self.found.append((cache.length - 1, self.fetched(cache)))

    @staticmethod
    def fetched(cache):
        sentence, taken = (x[:, 0].flatten(0, 1).tolist() for x in cache.fetched())
        return [{s: n for s, n in zip(*pair) if n > 0} for pair in zip(sentence, taken)]

QUESTIONS = [FACTS[1][0], FACTS[3][0]]

@pytest.fixture(scope="module")
def plain(tiny):
    return Plain(tiny, QUESTIONS)

@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A page with two answers and dense attention."""
    path = tmp_path_factory.mktemp("page") / "out.html"
    size = page.write_page(path, *ask_both(tiny, QUESTIONS))
    assert size == path.stat().st_size < 400_000
    return path

# ---------------------------------------------------------------------------------- its data

@pytest.mark.parametrize("settings", [{}, {"rank": "mean", "sink": 0}, {"keep": 2, "window": 8}])
def test_the_data_are_what_fetched_returned(tiny, tmp_path, settings):
    talk, _ = ask_both(tiny, QUESTIONS, **settings)
    page.write_page(tmp_path / "out.html", talk)
    run, arrays = read_page(tmp_path / "out.html")
    expected = Plain(tiny, QUESTIONS, **settings)
    assert [n for n, _ in run["sentences"]] == expected.cache.rows[0].lengths
    assert run["steps"] == [position for position, _ in expected.found] and not run["dense"]
    fetches = [taken for _, heads in expected.found for taken in heads]
    assert selections(run, arrays) == [set(taken) for taken in fetches]
    assert arrays["entries"].tolist() == [len(taken) for taken in fetches]
    assert arrays["sentence"].tolist() == [s for taken in fetches for s in taken]
    assert arrays["taken"].tolist() == [n for taken in fetches for n in taken.values()]
    total = sum(arrays[f"{name}_tokens"] for name in ("sink", "recent", "far"))
    assert total.tolist() == [sum(taken.values()) for taken in fetches]
    assert set(total.tolist()) == {BUDGET - 1}
    sink = [taken.get(0, 0) for taken in fetches]
    assert arrays["sink_tokens"].tolist() == sink

@pytest.mark.parametrize("rank", RANKS)
def test_the_recorded_scores_are_those_that_ranked(tiny, rank, monkeypatch):
    scores, score = [], RANKS[rank].score
    def noted(*args):
        scores.append(score(*args))
        return scores[-1]
    monkeypatch.setattr(RANKS[rank], "score", noted)
    talk, _ = ask_both(tiny, [QUESTIONS[0]], rank=rank, max_sentence=3)
    steps = talk.answers[0].steps
    assert len(scores) == 2 * 4 * len(steps) > 0        # 4 layers: the cache's own, then watch's
    for i, own in enumerate(scores[::2]):
        step, layer = steps[i // 4], i % 4
        sentence, near, recorded = (x[layer] for x in (step.sentence, step.near, step.score))
        expected = own[0].gather(1, sentence)
        assert torch.equal(recorded[~near], expected[~near].float())
        assert recorded[near].isposinf().all() and near[:, 0].all() and not near[:, -1].any()
        assert (recorded[:, :-1] >= recorded[:, 1:])[:, :20].all()

def test_lists_get_shorter_until_the_page_fits(tiny, tmp_path, monkeypatch):
    talk, dense = ask_both(tiny, QUESTIONS, budget=200)
    record = page.Record(talk, None)
    full, short = record.arrays(), record.arrays(8)
    assert len(short["sentence"]) < 0.7 * len(full["sentence"])
    end = full["entries"].cumsum()
    stop = short["entries"].cumsum()
    for fetch in range(0, len(end), 7):
        every = slice(end[fetch] - full["entries"][fetch], end[fetch])
        some = slice(stop[fetch] - short["entries"][fetch], stop[fetch])
        attention = full["attention"][every]
        listed = set(short["place"][some].tolist())
        assert set(range(8)) <= listed and len(listed) <= 16
        assert sorted(attention[sorted(listed)])[-8:] == sorted(attention)[-8:]
        for name in ("sentence", "taken", "score", "attention"):
            assert short[name][some].tolist() == full[name][every][sorted(listed)].tolist()
    monkeypatch.setattr(page, "LIMIT", 1)
    page.write_page(tmp_path / "out.html", talk)
    run, arrays = read_page(tmp_path / "out.html")
    assert run["listed"] == 8 and selections(run, arrays) == selections(run, full)

def test_numbers_are_stored_as_precisely_as_they_are_shown():
    share = np.array([0, 1e-5, 0.001, 0.012, 0.3, 0.5, 1], dtype=np.float32)
    assert (page.root(share) / 255) ** 2 == pytest.approx(share, abs=4e-3)
    x = np.array([1, -2.5, 3e-9, 0.4, np.inf], dtype=np.float32)
    stored = (page.upper_half(x).astype(np.uint32) << 16).view(np.float32)
    assert stored.tolist() == pytest.approx(x.tolist(), rel=4e-3)

# ------------------------------------------------------------------------------ dense attention

@pytest.mark.parametrize("cuts", [[], [9], [4, 14]])
def test_dense_attention_is_measured_by_sentence(cuts):
    rng = torch.Generator().manual_seed(0)
    H, G, T, d = 2, 3, 20, 4
    q, k, v = (torch.randn(1, heads, T, d, generator=rng, dtype=torch.float64)
               for heads in (H * G, H, H))
    owner = torch.tensor([0] * 3 + [1] * 6 + [2] * 1 + [3] * 10)
    wanted = torch.tensor([2, 8, 9, 13, 19])
    cache = MeasuredKV.measure(DenseKV(), owner, wanted)
    for part in torch.arange(T).tensor_split(cuts):
        cache.begin(torch.zeros(1, len(part), dtype=torch.long))
        cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part])
    assert cache.mass[0].shape == (H, 5, 4)
    for w, position in enumerate(wanted.tolist()):
        for h in range(H):
            group = q[0, h * G:(h + 1) * G, position]               # (G, d)
            keys = k[0, h, :position + 1]
            weights = torch.softmax(group @ keys.T / 2, -1).mean(0)
            expected = [float(weights[owner[:position + 1] == s].sum()) for s in range(4)]
            assert cache.mass[0][h, w].tolist() == pytest.approx(expected, abs=1e-6)

def test_dense_attention_reads_what_sentencekv_said(tiny, tmp_path):
    model, tokenizer = tiny
    talk, dense = ask_both(tiny, QUESTIONS)
    ask(dense, [FACTS[0][0]])                                       # one more: another text
    row = talk.cache.rows[0]
    positions = [step.position for answer in talk.answers for step in answer.steps]
    owner = torch.arange(len(row.lengths)).repeat_interleave(torch.tensor(row.lengths))
    alone = MeasuredKV.measure(DenseKV(), owner, torch.tensor(positions))
    model.prefill(torch.tensor([row.tokens]), alone)
    page.write_page(tmp_path / "out.html", talk, dense)
    run, arrays = read_page(tmp_path / "out.html")
    assert run["dense"]
    chosen = selections(run, arrays)
    n = page.DENSE_LISTED
    for i, position in enumerate(positions):
        mass = torch.cat([part[:, i] for part in alone.mass])       # (layers * H, S)
        for head in range(len(mass)):
            fetch = i * len(mass) + head
            best = mass[head].sort(descending=True, stable=True)
            place = slice(fetch * n, (fetch + 1) * n)
            assert (arrays["dense_mass"][place] / 255) ** 2 == pytest.approx(
                best.values[:n].numpy(), abs=5e-3)
            assert arrays["dense_sentence"][place][0] == best.indices[0]
            seen = chosen[fetch] | {int(owner[position])}
            covered = float(mass[head, sorted(seen)].sum())
            assert arrays["covered"][fetch] / 10000 == pytest.approx(covered, abs=1e-3)
    assert 0.3 < arrays["covered"].mean() / 10000 < 0.99

def test_nothing_is_missed_if_the_budget_covers_the_text(tiny, tmp_path):
    page.write_page(tmp_path / "out.html", *ask_both(tiny, [QUESTIONS[0]], budget=900))
    run, arrays = read_page(tmp_path / "out.html")
    assert set(arrays["covered"].tolist()) == {10000}

# ------------------------------------------------------------------------- in the command line

def test_the_command_line_writes_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT, encoding="utf-8")
    arguments = ["--prompt-file", "text", "--budget", "96", "--page", "out.html", *CPU]
    assert cli.main([*arguments, "--ask", QUESTIONS[0], "--dense"]) == 0
    size = Path("out.html").stat().st_size
    assert capsys.readouterr().out.endswith(
        f"\nout.html: a page of {size / 1e6:.2f} MB, open it in a browser\n")
    text, (run, _) = Path("out.html").read_text(encoding="utf-8"), read_page(Path("out.html"))
    said = FACTS[1][1].strip()
    assert run["dense"] and f"dense: {said}" in text and html.escape(QUESTIONS[0].strip()) in text
    assert not re.findall(r'(?:src|href)\s*=|https?:|url\(|@import|\{\{', text)
    assert len((ROOT / "ask" / "page.js").read_text(encoding="utf-8").splitlines()) <= 300

    assert cli.main(["--prompt-file", "text", "--page", "goes on.html", *CPU]) == 0    # no question
    run, _ = read_page(Path("goes on.html"))
    first = run["steps"][0]
    assert first == len(tokens_of_text()) - 1 and "exact" not in buttons("goes on.html")[0]
    capsys.readouterr()

def tokens_of_text():
    return Tokenizer.from_dir(TINY).encode(TEXT, bos=True)

def buttons(path):
    return re.findall(r"<button role=\"radio\".*?</button>", Path(path).read_text(encoding="utf-8"))

@pytest.mark.parametrize("end", ["", KeyboardInterrupt])
def test_a_conversation_writes_a_page_whatever_ends_it(tmp_path, capsys, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT, encoding="utf-8")
    lines = iter([QUESTIONS[0], QUESTIONS[1], end])
    def readline():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line and f"{line}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "readline", readline, raising=False)
    arguments = ["--prompt-file", "text", "--chat", "--page", "out.html", *CPU]
    assert cli.main(arguments) == (130 if end else 0)
    assert "out.html: a page of" in capsys.readouterr().out
    assert len(re.findall('class="question"', Path("out.html").read_text(encoding="utf-8"))) == 2

@pytest.mark.parametrize("forward, complete", [(1, None), (2, 0), (4, 2)])
def test_an_interrupted_answer_is_shown_as_far_as_it_went(
        tiny, tmp_path, monkeypatch, forward, complete):
    flags = sentence_flags(tiny[1].token_bytes)
    talk = talk_of(tiny, WatchedKV.watch(SentenceKV(flags, budget=BUDGET)))
    forwards, attend = iter(range(1, 99)), WatchedKV.attend
    def interrupted(cache, layer, *args):
        out = attend(cache, layer, *args)
        if layer == 3 and next(forwards) == forward:
            raise KeyboardInterrupt
        return out
    monkeypatch.setattr(WatchedKV, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(talk, [QUESTIONS[0]])
    talk.recover()
    if complete is None:                                            # the question is forgotten
        assert talk.answers == []
    else:
        [answer] = talk.answers
        assert (len(answer.ids), len(answer.steps)) == (complete + 1, complete)
    ask(talk, [QUESTIONS[1]])
    page.write_page(tmp_path / "out.html", talk)
    run, _ = read_page(tmp_path / "out.html")
    shown = buttons(tmp_path / "out.html")
    assert len(run["steps"]) == len([text for text in shown if "exact" not in text])
    assert len(shown) == sum(len(answer.ids) for answer in talk.answers)

def test_without_an_answer_there_is_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert cli.main(["--prompt-file", "text", "--chat", "--page", "out.html", *CPU]) == 0
    out = capsys.readouterr().out
    assert out.endswith("note: out.html was not written: nothing was answered\n")
    assert not Path("out.html").exists()

def test_a_text_of_too_many_sentences_is_refused(tiny, tmp_path, monkeypatch):
    talk, _ = ask_both(tiny, QUESTIONS)
    monkeypatch.setattr(page, "MOST_SENTENCES", 50)
    with pytest.raises(ValueError, match=r"--page: \d+ sentences are too many, 50 fit on a page"):
        page.write_page(tmp_path / "out.html", talk)

def test_the_picture_of_the_walkthrough_is_what_its_command_draws(tmp_path):
    step_picture.draw(tmp_path / "step.svg")
    drawn, kept = (path.read_text(encoding="utf-8")
                   for path in (tmp_path / "step.svg", ROOT / "docs" / "decode-step.svg"))
    assert drawn == kept
    assert drawn.count('class="far"') == 2 * 7 and drawn.count('class="near"') == 2 * 4
    assert drawn.count('class="left"') == 3 and drawn.count('class="self"') == 1

# --------------------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, " ": 32}

class Browser:
    """Headless Chromium, driven with the DevTools protocol over a pair of pipes."""

    def __init__(self, folder):
        # Chromium reads commands from descriptor 3 and writes to 4; none of ours may be these two.
        pipes = [os.pipe(), os.pipe()]
        (stdin, self.write), (self.read, stdout) = [
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe] for pipe in pipes]
        for end in pipes[0] + pipes[1]:
            os.close(end)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}"], close_fds=False, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(stdin, 3), os.dup2(stdout, 4)))
        os.close(stdin)
        os.close(stdout)
        self.received, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self, timeout=30):
        """The next message of the browser."""
        while b"\0" not in self.received:
            assert select.select([self.read], [], [], timeout)[0], "the browser does not answer"
            new = os.read(self.read, 1 << 20)
            assert new, "the browser has ended"
            self.received += new
        line, self.received = self.received.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        while (message := self.message()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def run(self, code):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def size(self, width, height=900, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path, address="", width=1280, scheme="light"):
        self.size(width, scheme=scheme)
        self.call("Page.navigate", url="about:blank")
        self.events = []
        self.call("Page.navigate", url=f"{path.as_uri()}{address}")
        for _ in range(100):
            if self.run("document.body && document.body.dataset.ready"):
                return
            time.sleep(0.05)
        raise AssertionError(f"the page does not start: {self.troubles()}")

    def press(self, key, times=1):
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                text = {"text": key} if kind == "keyDown" and key == " " else {}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                          windowsVirtualKeyCode=KEYS[key], **text)

    def troubles(self):
        """Errors in the console, uncaught exceptions, and requests other than for the page."""
        kinds = [(event["method"], event["params"]) for event in self.events if "method" in event]
        found = [params for method, params in kinds if method == "Runtime.exceptionThrown"
                 or method == "Log.entryAdded" and params["entry"]["level"] != "verbose"
                 or method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert")]
        urls = [params["request"]["url"] for method, params in kinds
                if method == "Network.requestWillBeSent"]
        return found + [url for url in urls if not re.match(r"file:.*\.html|about:blank", url)]

    def lit(self, name="lit"):
        """Numbers of the sentences of a class."""
        return set(self.run(f"spans.map((x, s) => x.classList.contains('{name}') ? s : -1)"
                            ".filter(s => s >= 0)"))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.read)
        os.close(self.write)

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()

def recent(cache, position):
    """The sentences that the last 8 tokens up to a position touch."""
    return {cache_sentence(cache, p) for p in range(position - 7, position + 1)}

def cache_sentence(cache, position):
    ends = torch.tensor(cache.rows[0].lengths).cumsum(0)
    return int(torch.searchsorted(ends, position, right=True))

def test_what_is_lit_is_what_fetched_returned(browser, written, plain):
    browser.open(written)
    assert browser.run("tokens.length") == len(plain.found) + 2     # and two of the prefills
    for light in ("attention", "heads"):
        browser.run(f"update({{light: '{light}'}})")
        for position, heads in plain.found:
            token = browser.run(f"tokens.findIndex(x => x.value === '{position}')")
            always = recent(plain.cache, position) | {0}
            for head, taken in enumerate(heads):
                browser.run(f"update({{token: {token}, layer: '{head // 2}', head: '{head % 2}'}})")
                assert browser.lit() == set(taken) - always
                assert browser.lit("near") == always
            browser.run("update({layer: 'all', head: 'all'})")
            assert browser.lit() == set().union(*heads) - always
            later = browser.run("spans.findIndex(x => x.classList.contains('later'))")
            last = cache_sentence(plain.cache, position)
            assert later == (last + 1 if last + 1 < len(plain.cache.rows[0].lengths) else -1)
    assert browser.troubles() == []

def test_stepping_changes_what_is_lit(browser, written, plain):
    browser.open(written)
    steps = {position: set().union(*heads) - recent(plain.cache, position) - {0}
             for position, heads in plain.found}
    before = browser.run("state.token")
    assert before == 1 and browser.run("document.activeElement === document.body")
    browser.press("ArrowRight", 2)                                  # wherever the focus is
    assert browser.run("state.token") == 3 and browser.lit() == steps[int(browser.run(
        "tokens[3].value"))]
    assert browser.run("document.querySelector('[role=radio][aria-checked=true]').value === "
                       "tokens[3].value") and "token 4 of" in browser.run(
        "element('now').textContent")
    browser.press("ArrowLeft")
    assert browser.lit() == steps[int(browser.run("tokens[2].value"))]
    browser.run("tokens[0].click()")                                # with the mouse
    assert browser.lit() == set() and "exact attention" in browser.run(
        "element('summary').textContent")
    browser.press("ArrowLeft")
    assert browser.run("state.token") == 0                          # there is none before
    browser.run("element('token').focus()")
    browser.press("ArrowRight")                                     # the slider's own keys
    assert browser.run("state.token") == 1
    browser.run("element('play').focus()")
    browser.press(" ")
    assert browser.run("element('play').textContent") == "Pause"
    browser.press(" ")
    assert browser.run("element('play').textContent") == "Play"
    browser.press(" ")
    browser.run("update({token: tokens.length - 2}), new Promise(done => setTimeout(done, 2000))")
    assert browser.run("[state.token === tokens.length - 1, element('play').textContent]") == [
        True, "Play"]
    assert browser.troubles() == []

def test_the_text_is_walked_with_the_keyboard(browser, written):
    browser.open(written, "#token=5&sentence=0")
    for _ in range(30):
        browser.press("Tab")
        if browser.run("document.activeElement.closest('#text') !== null"):
            break
    assert browser.run("spans.indexOf(document.activeElement)") == 0
    lit = sorted(browser.lit())
    for expected in lit[:3]:
        browser.press("ArrowRight")
        assert browser.run("[state.sentence, spans.indexOf(document.activeElement)]") == [
            expected, expected]
    browser.press("ArrowLeft")
    assert browser.run("state.sentence") == lit[1]
    browser.press("ArrowDown")
    assert browser.run("state.sentence") == lit[1] + 1
    browser.press("ArrowUp", 2)
    assert browser.run("[state.sentence, state.token]") == [lit[1] - 1, 5]
    assert browser.run("element('quote').textContent === spans[state.sentence].textContent")

def test_a_sentence_tells_who_took_it(browser, written, tiny):
    talk, _ = ask_both(tiny, QUESTIONS)
    browser.open(written, "#token=6")
    position = int(browser.run("tokens[6].value"))
    step = next(step for answer in talk.answers for step in answer.steps
                if step.position == position)
    s = browser.run("state.sentence")                               # the brightest one
    rows, largest = {}, {}
    for layer, (sentence, taken, near, attention, score) in enumerate(zip(
            step.sentence, step.taken, step.near, step.attention, step.score)):
        for h in range(len(sentence)):
            for i, number in enumerate(sentence[h].tolist()):
                if taken[h, i] > 0 and not near[h, i]:
                    share = float(attention[h, i])
                    largest[number] = max(largest.get(number, 0), share)
                    if number == s:
                        rows[layer, h] = (i - int(near[h].sum()) + 1, float(score[h, i]),
                                          int(taken[h, i]), share)
    assert s == max(largest, key=largest.get) and rows
    shown = browser.run("[...element('rows').rows].map(row => [...row.cells].map("
                        "cell => cell.textContent))")
    assert len(shown) == len(rows)
    for layer, h, rank, score, taken, attention in shown:
        expected = rows[int(layer), int(h)]
        assert (int(rank), int(taken)) == (expected[0], expected[2])
        assert float(score) == pytest.approx(expected[1], rel=0.06)
        assert float(attention[:-1]) / 100 == pytest.approx(expected[3], abs=0.01)
    facts = browser.run("element('facts').textContent")
    length = talk.cache.rows[0].lengths[s]
    start = sum(talk.cache.rows[0].lengths[:s])
    assert facts.startswith(f"Number {s} (from 0), {length} tokens from position {start}. "
                            f"Fetched by {len(rows)} of 8 heads")
    first = browser.run("element('best').querySelector('b').textContent")
    assert first == browser.run("spans[state.sentence].textContent")

def test_what_is_missed_and_what_a_smaller_budget_loses(browser, written, plain, tiny):
    run, arrays = read_page(written)
    step = 4
    position, heads = plain.found[step]
    token = len([p for p, _ in plain.found[:step]]) + 1
    always = recent(plain.cache, position) | {0}
    n = page.DENSE_LISTED
    for head, taken in enumerate(heads):
        browser.open(written, f"#token={token}&layer={head // 2}&head={head % 2}&light=dense")
        fetch = step * 8 + head
        place = slice(fetch * n, (fetch + 1) * n)
        pairs = dict(zip(arrays["dense_sentence"][place].tolist(),
                         ((arrays["dense_mass"][place] / 255) ** 2).tolist()))
        missed = {s for s, mass in pairs.items() if mass >= 0.01 and s not in taken} - always
        assert browser.lit("missed") == missed
        assert browser.lit() == {s for s, mass in pairs.items() if mass >= 0.005} - always

        browser.run("update({light: 'heads', part: 4})")            # 24 tokens
        smaller, places = set(), BUDGET // 4 - 1
        for s, tokens in taken.items():
            if places > 0:
                smaller.add(s)
            places -= tokens
        assert browser.lit() == smaller - always
        assert browser.lit("lost") == set(taken) - smaller and browser.lit("lost")
        assert "24 tokens" in browser.run("element('budget-title').textContent")
    assert browser.troubles() == []

def test_stepping_does_not_scroll_the_page_away_from_the_text(browser, tiny, tmp_path):
    page.write_page(tmp_path / "out.html", *ask_both(tiny, [question for question, _ in FACTS] * 2))
    browser.open(tmp_path / "out.html", "#token=1", width=380)
    browser.run("scrollTo(0, 700)")
    top = "element('frame').getBoundingClientRect().top"
    before = browser.run(top)
    browser.run("goTo(tokens.length - 1)")
    assert abs(browser.run(top) - before) < 3 and browser.run("scrollY") > 600
    inside = browser.run("""(() => {
        const box = element("answers").getBoundingClientRect();
        const token = tokens[state.token].getBoundingClientRect();
        return box.top <= token.top && token.bottom <= box.bottom;
    })()""")
    assert inside and browser.run("element('answers').scrollTop") > 0
    assert browser.run("element('player').getBoundingClientRect().top") == 0

def test_the_budget_adds_up(browser, written):
    browser.open(written)
    names = ["sink", "recent", "self", "far", "free"]
    sizes = browser.run(f"{names}.map(x => Number(element('size-' + x).textContent))")
    assert sum(sizes) == pytest.approx(BUDGET, abs=0.3) and sizes[0] == 4 and sizes[2] == 1
    widths = browser.run(f"{names}.map(x => parseFloat(element('bar-' + x).style.width))")
    assert widths == pytest.approx([100 * size / BUDGET for size in sizes], abs=0.1)

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_it_fits_and_can_be_read(browser, written, width, scheme):
    browser.open(written, "#token=5&light=heads", width, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Math.max(...[...document.querySelectorAll('select, button, section, p')]"
                       ".map(x => x.getBoundingClientRect().right))") <= width
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 50 and min(ratios) >= 4.5
    assert browser.troubles() == []

CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => rgb.slice(0, 3).map(x => x / 255).map(
    x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4).reduce(
    (sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const back = numbers(getComputedStyle(document.body).backgroundColor);
  return spans.filter(span => !span.classList.contains("later")).map(span => {
    const style = getComputedStyle(span), [r, g, b, a = 1] = numbers(style.backgroundColor);
    const mixed = [r, g, b].map((x, i) => a * x + (1 - a) * back[i]);
    const [low, high] = [luminance(mixed), luminance(numbers(style.color))].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  });
})()"""

def test_a_text_with_html_in_it_shows_as_it_is_and_does_nothing(
        browser, tiny, tmp_path, monkeypatch):
    text = f"A dog ran. {HOSTILE} The cat sat on the mat. " + TEXT[:900]
    question = (" <b onclick='window.hacked = 3'>Who</b> "
                "</script><script>window.hacked = 4</script>?")
    talks = ask_both(tiny, [question], text=text)
    talks[1].answers[0].ids = tiny[1].encode("<img src=x onerror='window.hacked = 5'>")
    ids, texts = talks[0].answers[0].ids, page.token_texts
    monkeypatch.setattr(page, "token_texts", lambda tokenizer, given: (
        [HOSTILE] * len(ids) if given is ids else texts(tokenizer, given)))
    page.write_page(tmp_path / "out.html", *talks)
    browser.open(tmp_path / "out.html")
    tokens = talks[0].cache.rows[0].tokens
    assert browser.run("element('text').textContent") == tiny[1].decode(tokens)
    assert HOSTILE in tiny[1].decode(tokens)
    assert browser.run("document.querySelector('.question').textContent") == question.strip()
    assert browser.run("tokens[1].textContent") == HOSTILE
    assert "hacked = 5'>" in browser.run("document.querySelector('.other').textContent")
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.images.length + document.scripts.length") == 3
    assert browser.troubles() == []

def test_the_page_allows_no_other_script_and_no_network(browser, written):
    browser.open(written)
    browser.run("""(() => {
        const script = document.createElement("script");
        script.textContent = "window.hacked = 6";
        document.body.append(script);
        const image = new Image();
        image.src = "https://example.org/x.png";
        document.body.append(image);
        return new Promise(done => setTimeout(done, 200));
    })()""")
    assert browser.run("typeof window.hacked") == "undefined"
    blocked = [event for event in browser.events if "Content Security Policy" in json.dumps(event)]
    assert len(blocked) >= 2

def test_a_link_opens_the_view_that_it_names(browser, written):
    browser.open(written, "#token=4&layer=2&head=1&light=heads&part=2&sentence=30")
    browser.run("new Promise(done => setTimeout(done, 400))")
    assert browser.run("[state, location.hash]") == [
        {"token": 4, "layer": "2", "head": "1", "light": "heads", "part": "2", "sentence": 30},
        "#token=4&layer=2&head=1&light=heads&part=2&sentence=30"]
    browser.open(written, "#token=999&layer=77&head=x&light=%22%5D&part=3&sentence=-4")
    assert browser.run("[state.layer, state.head, state.light, state.part]") == [
        "all", "all", "attention", 1]
    assert browser.run("state.token === tokens.length - 1 && state.sentence >= 0")
    assert browser.troubles() == []

def test_a_shortened_page_says_so(browser, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 1)
    talk, _ = ask_both(tiny, QUESTIONS, budget=200)
    page.write_page(tmp_path / "out.html", talk)
    browser.open(tmp_path / "out.html", "#token=5&part=4&light=dense")
    assert browser.run("state.light === 'attention'")
    assert browser.run("element('part').disabled && element('part').value") == "1"
    step = talk.answers[0].steps[4]
    fetched = set(step.sentence[0][0][step.taken[0][0] > 0].tolist())
    browser.run("update({layer: '0', head: '0'})")
    assert browser.lit() | browser.lit("near") >= fetched and browser.lit() <= fetched
    unlisted = fetched - set(browser.run("view.fetches[0].entries.map(entry => entry.s)"))
    browser.run(f"update({{sentence: {min(unlisted)}}})")
    assert browser.run("[...element('rows').rows[0].cells].map(x => x.textContent)") == [
        "0", "0", "> 8"]
    assert browser.run("[...document.querySelectorAll('[hidden]')].length") == 2   # no --dense
    assert browser.troubles() == []
