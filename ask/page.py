"""One HTML file that shows which sentences each token of the answers fetched.

page.html is the template, page.css its style, page.js its program, which documents what it reads:
a JSON object, and arrays of 16-bit numbers that are compressed and written in base64.
"""
import base64
import hashlib
import json
import re
import zlib
from html import escape
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch

from ask.watch import MeasuredKV, whole_sentences
from extras.save import replacing
from model import DenseKV
from sentencekv import need

FOLDER = Path(__file__).resolve().parent
LIMIT = 2_000_000                   # bytes of a page; lists get shorter until it fits
LISTED = (None, 64, 32, 16, 8)      # how many sentences per head are listed with rank and score
DENSE_LISTED = 16                   # the same for dense attention
MOST_SENTENCES = 65_535             # what a 16-bit number can name
DENSE_CHOICE = '<option value="dense">attention of the dense cache</option>'
SHOWN_SETTINGS = ("budget", "keep", "sink", "recent", "rank", "max_sentence")

def write_page(path, talk, dense=None):
    """Write the page of a conversation with a WatchedKV; returns its size in bytes.

    dense: a conversation with a DenseKV that read the same text, to compare with. Its cache is
    used up. Raises OSError if the file cannot be written, ValueError for too long a text.
    """
    lengths = talk.cache.rows[0].lengths
    need(len(lengths) <= MOST_SENTENCES,
         f"--page: {len(lengths)} sentences are too many, {MOST_SENTENCES} fit on a page")
    parts = static_parts(talk, dense)               # reads the dense cache before it is used up
    record = Record(talk, dense)
    for listed in LISTED:
        arrays = record.arrays(listed)
        parts["needs_all"] = "" if listed is None else (
            'disabled title="The run is too long for all ranks to fit on the page"')
        parts["run"] = describe(talk, record, listed, arrays)
        parts["data"] = pack(arrays)
        page = fill_template(parts)
        if len(page) <= LIMIT:
            break
    with replacing(path) as unfinished:
        unfinished.write_bytes(page)
    return len(page)

# --------------------------------------------------------------------------- what is always shown

def static_parts(talk, dense):
    """The parts of the template that do not change: {name: HTML}."""
    cache, model = talk.cache, talk.model
    parameters = sum(p.numel() for p in model.parameters())
    settings = ", ".join(f"{name} {value}" for name, value in vars(cache.settings).items()
                         if name in SHOWN_SETTINGS and value is not None)
    layers, H = len(cache.layers), cache.layers[0].vectors.shape[1]
    row = cache.rows[0]
    about = (f"a Llama of {parameters:,} parameters, {layers} layers of {H} KV heads; "
             f"{len(row.tokens):,} tokens in {len(row.lengths):,} sentences; {settings}")
    return {
        "about": escape(about),
        "answers": answers(talk, dense),
        "last": str(sum(len(answer.ids) for answer in talk.answers) - 1),
        "layers": options(layers),
        "heads": options(H),
        "text": text_spans(talk),
        "memory": memory(talk, dense),
        "needs_dense": "" if dense is not None else "hidden",
        "dense_choice": DENSE_CHOICE if dense is not None else ""}

def options(n):
    """The choices of a <select>: all, or one of n."""
    return "".join(f"<option>{choice}</option>" for choice in ["all", *range(n)])

def answers(talk, dense):
    """A line per answer: the question, a button per token, the answer of dense attention.

    The value of a button is the position of the step that predicted its token.
    """
    lines = []
    others = dense.answers if dense is not None else []
    for i, answer in enumerate(talk.answers):
        predicted = {step.position for step in answer.steps}
        line = f'<div><span class="question">{escape(answer.question.strip())}</span> '
        line += '<span role="radiogroup" aria-label="generated tokens">'
        for j, text in enumerate(token_texts(talk.tokenizer, answer.ids)):
            position = answer.start - 1 + j
            exact = "" if position in predicted else " exact"
            text = escape(text.replace("\n", "\u21b5") or "\u2026")
            line += f'<button role="radio" class="token{exact}" value="{position}">{text}</button>'
        line += "</span>"
        if i < len(others):
            stops = talk.tokenizer.stop_ids
            other = talk.tokenizer.decode([id for id in others[i].ids if id not in stops]).strip()
            line += f' <span class="other">dense: {escape(other)}</span>'
        lines.append(line + "</div>")
    return "\n".join(lines)

def token_texts(tokenizer, ids):
    """The text of each token. A character that two tokens share belongs to the second one."""
    *texts, rest = tokenizer.stream(ids)
    texts[-1:] = [text + rest for text in texts[-1:]]
    return texts

def text_spans(talk):
    """A <span> per sentence; questions in <i>, generated text in <b>."""
    row = talk.cache.rows[0]
    tags = [""] * len(row.tokens)
    for answer in talk.answers:
        for position in range(answer.asked_at, answer.start + len(answer.ids)):
            if position < len(tags):                # the last token is not in the cache
                tags[position] = "i" if position < answer.start else "b"
    tagged = zip(tags, token_texts(talk.tokenizer, row.tokens))
    spans = []
    for length in row.lengths:
        span = ""
        for tag, run in groupby(islice(tagged, length), key=lambda pair: pair[0]):
            text = escape("".join(text for _, text in run))
            span += f"<{tag}>{text}</{tag}>" if tag else text
        spans.append(f'<span class="s" tabindex="-1">{span}</span>')
    return "".join(spans)

def memory(talk, dense):
    """Where keys, values and vectors are: rows of a table."""
    size = talk.cache.memory()
    vectors = sum(layer.vectors.nbytes for layer in talk.cache.layers)
    rows = [("keys and values, with room to grow", "host", size["host"]),
            ("semantic vectors", "device", vectors),
            ("what a step attends to, and tables", "device", size["device"] - vectors)]
    if dense is not None:
        rows.append(("for comparison: a dense cache", "device", dense.cache.memory()["device"]))
    return "".join(f"<tr><td>{what}<td>{where}<td>{size / 1e6:.2f} MB</tr>"
                   for what, where, size in rows)

# ---------------------------------------------------------------------------- what was fetched

class Record:
    """The decode steps of a conversation as arrays, see arrays(). A "fetch" is one KV head of one
    layer in one step; fetches are in the order of steps, layers, heads."""

    def __init__(self, talk, dense):
        row, layers = talk.cache.rows[0], len(talk.cache.layers)
        self.S = len(row.lengths)
        self.steps = [step for answer in talk.answers for step in answer.steps
                      if len(step.sentence) == layers]
        mass = None
        if dense is not None and self.steps:
            lengths = torch.tensor(row.lengths, device="cpu")
            owner = torch.arange(self.S, device="cpu").repeat_interleave(lengths)
            mass = dense_mass(talk, dense, owner, [step.position for step in self.steps])
        self.columns = {}
        before = False
        for i, step in enumerate(self.steps):
            fetched = np.concatenate([self.add_layer(step, layer) for layer in range(layers)])
            self.add_changes(fetched != before)                 # (layers * H, S)
            before = fetched
            if mass is not None:
                own = fetched.copy()
                own[:, owner[step.position]] = True             # the token attends to itself
                self.add_dense(torch.cat([part[:, i] for part in mass]).numpy(), own)

    def put(self, **columns):
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(np.asarray(values).ravel())

    def add_layer(self, step, layer):
        """Note one layer's fetches; returns (H, S): which sentences they took."""
        parts = (step.sentence, step.taken, step.near, step.attention, step.score)
        sentence, taken, near, attention, score = (part[layer].numpy() for part in parts)
        H, k = sentence.shape
        used = taken > 0
        by_attention = (-attention).argsort(axis=1, kind="stable").argsort(axis=1)
        place = np.broadcast_to(np.arange(k), (H, k))
        self.put(
            sentence=sentence[used],
            taken=taken[used],
            attention=root(attention[used]),
            score=upper_half(score[used]),
            place=place[used],                      # best first: 0, 1, ...
            by_attention=by_attention[used],
            entries=used.sum(1),                    # per fetch, as all that follows
            near=(used & near).sum(1),
            sink_tokens=(taken * (sentence == 0)).sum(1),
            recent_tokens=(taken * (near & (sentence > 0))).sum(1),
            far_tokens=(taken * ~near).sum(1))
        fetched = np.zeros((H, self.S), dtype=bool)
        head = np.broadcast_to(np.arange(H)[:, None], (H, k))
        fetched[head[used], sentence[used]] = True
        return fetched

    def add_changes(self, changed):
        """Note which sentences enter or leave each head's selection: gaps between numbers."""
        head, sentence = changed.nonzero()
        gap = np.diff(sentence, prepend=0)
        first = np.diff(head, prepend=-1) > 0
        gap[first] = sentence[first]
        self.put(changes=changed.sum(1), gap=gap)

    def add_dense(self, mass, fetched):
        """Note the largest masses of dense attention; both arguments are (layers * H, S)."""
        n = min(DENSE_LISTED, self.S)
        best = (-mass).argsort(axis=1, kind="stable")[:, :n]
        covered = (mass * fetched).sum(1)
        self.put(
            dense_sentence=best,
            dense_mass=root(np.take_along_axis(mass, best, axis=1)),
            covered=np.rint(covered.clip(0, 1) * 10_000))

    def arrays(self, listed=None):
        """{name: 16-bit numbers}. listed: per fetch, list the sentences among the first so many
        by rank or by attention; None: all."""
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        if not columns:
            return {}
        by_attention, entries = columns.pop("by_attention"), columns["entries"]
        if listed is not None:
            keep = (columns["place"] < listed) | (by_attention < listed)
            for name in ("sentence", "taken", "attention", "score", "place"):
                columns[name] = columns[name][keep]
            fetch = np.arange(len(entries)).repeat(entries)
            columns["entries"] = np.bincount(fetch[keep], minlength=len(entries))
        return columns

def dense_mass(talk, dense, owner, positions):
    """What dense attention gives to each sentence at the same positions of the same text.

    owner (N,): the sentence of each token. The dense cache reads SentenceKV's questions and answers
    in place of its own. Returns a list of (H, positions, S), one per layer.
    """
    tokens, known = talk.cache.rows[0].tokens, dense.text_length
    cache = dense.cache
    if known:
        cache.truncate(known)
    else:
        cache = DenseKV()
    cache = MeasuredKV.measure(cache, owner, torch.tensor(positions, device="cpu"))
    talk.model.prefill(talk.tensor(tokens[known:]), cache, talk.args.chunk)
    return cache.mass

def root(share):
    """A share from 0 to 1 as a number from 0 to 255 that is precise where the share is small."""
    return np.rint(255 * np.sqrt(share.clip(0, 1)))

def upper_half(x):
    """The upper 16 bits of float32 numbers, rounded: sign, exponent and 7 bits of the fraction."""
    bits = x.astype(np.float32).view(np.uint32)
    return (bits + 0x8000) >> 16

# ------------------------------------------------------------------------------------ the file

def describe(talk, record, listed, arrays):
    """The JSON object that page.js reads."""
    cache = talk.cache
    owner, _ = whole_sentences(cache)
    run = {
        "budget": cache.settings.budget,
        "recent": cache.settings.recent,
        "layers": len(cache.layers),
        "heads": cache.layers[0].vectors.shape[1],
        "sentences": list(zip(cache.rows[0].lengths, owner.tolist())),
        "steps": [step.position for step in record.steps],
        "dense": "covered" in arrays,
        "listed": listed,
        "arrays": [[name, len(values)] for name, values in arrays.items()]}
    return json.dumps(run, separators=(",", ":"))

def pack(arrays):
    """All numbers in base64: per array the low bytes, then the high bytes, deflated."""
    parts = []
    for values in arrays.values():
        values = values.astype(np.uint16)
        parts += [(values & 255).astype(np.uint8).tobytes(),
                  (values >> 8).astype(np.uint8).tobytes()]
    return base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()

def fill_template(parts):
    """The page as bytes. parts: {name: HTML}; text in it is escaped. The page's policy allows its
    own style and script alone, and no network."""
    style, script = read("page.css"), read("page.js")
    parts = {
        "style": style,
        "script": script,
        "style_hash": sha256(style),
        "script_hash": sha256(script),
        **parts}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read("page.html"))
    return page.encode("utf-8", "replace")

def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")

def sha256(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
