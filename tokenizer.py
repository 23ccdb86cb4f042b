"""Text to token ids and back, for byte-level BPE tokenizers, on top of tiktoken.

    tok = Tokenizer.from_dir("Llama-3.1-8B-Instruct")
    tok.encode("Hello world")                        # [9906, 1917]; decode() gives the text back
    tok.chat([{"role": "user", "content": "Hi"}])    # the prompt of the checkpoint's chat template

Reads Meta's tokenizer.model of Llama 3, and tokenizer.json (Llama, SmolLM2, GPT-2, Qwen, DeepSeek).
The ids equal the `tokenizers` library's; a file for which they would not raises ValueError.
"""
import base64, codecs, json, operator, re, time, unicodedata
from contextlib import contextmanager
from pathlib import Path

import regex                                                # a dependency of tiktoken
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment    # a dependency of torch

BOS_NAMES = ("<|begin_of_text|>", "<|bos|>", "<s>")
STOP_NAMES = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "</s>")
MAX_ID = 1 << 22
MARK = re.compile("(\t?)\ue000(\\d+)\ue000(\t?)")           # stands for the content of a message

def need(condition, message):
    if not condition:
        raise ValueError(message)

@contextmanager
def blame(file):
    """Turn any exception into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from None

class Tokenizer:
    """Attributes: n_vocab, bos_id (or None), stop_ids (a set), added ({name: id}), chat_format (the
    Jinja template, or None), token_bytes (a list; None for special and unused ids)."""

    def __init__(self, splits, ranks, added, special, nfc=False):
        """splits: patterns, applied one after the other; ranks {b"he": 256, ...}: the lowest merges
        first; special: those ids of added {name: id} that plain text never gives."""
        tokens = [*ranks.items(), *((name.encode(), i) for name, i in added.items())]
        self._bytes = {i: token for token, i in tokens}
        need(ranks and len(self._bytes) == len(tokens), "no tokens, or two with the same id")
        need(all(type(i) is int and 0 <= i < MAX_ID for i in self._bytes), "ids must be 0 to 2**22")
        self._splits = [regex.compile(split, regex.V1 | regex.MULTILINE) for split in splits]
        self._bpe = tiktoken.Encoding("", pat_str="(?s).+", mergeable_ranks=ranks,
                                      special_tokens={})    # a piece of text stays whole
        names = sorted(filter(None, added), key=len, reverse=True)          # the longest first
        self._added = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.added, self.special, self.nfc = added, special, nfc
        self._missing = {b for b in range(256) if bytes([b]) not in ranks}
        self.n_vocab = n = max(self._bytes) + 1
        self.token_bytes = [None if i in special else self._bytes.get(i) for i in range(n)]
        self.bos_id = next((added[name] for name in BOS_NAMES if name in added), None)
        self.stop_ids = {added[name] for name in STOP_NAMES if name in added}
        self.chat_format = self._template = None

    @classmethod
    def from_dir(cls, path):
        """path: a checkpoint's directory or its tokenizer file. FileNotFoundError, ValueError."""
        names = ["", "tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
        file = next((Path(path, name) for name in names if Path(path, name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has none of {', '.join(names[1:])}")
        is_json, folder = file.suffix == ".json", Path(path) if file != Path(path) else file.parent
        with blame(file):
            tokenizer = cls(*(read_json if is_json else read_model)(file.read_bytes()))
        with blame(folder):
            tokenizer._read_settings(folder, None if is_json else META)
        return tokenizer

    def encode(self, text, bos=False, special=False):
        """str -> list of ids. Unless special=True, "<|eot_id|>" in a text is plain characters."""
        need(not bos or self.bos_id is not None, "this tokenizer has no bos token")
        ids, start = [self.bos_id] if bos else [], 0
        for match in self._added.finditer(text):
            token = self.added[match[0]]
            if special or token not in self.special:
                ids += [*self._encode_plain(text[start:match.start()]), token]
                start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        missing = self._missing.intersection(text.encode())
        need(not missing, f"the vocabulary lacks bytes of this text: {bytes(missing)!r:.60}")
        pieces = [text]
        for split in self._splits:
            pieces = [part for piece in pieces for part in cut(split, piece)]
        return [i for piece in pieces for i in self._bpe.encode_ordinary(piece)]

    def decode(self, ids):
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Yield text as the ids come. A character whose bytes lie in two tokens comes with the
        second; an unused id below n_vocab gives U+FFFD, any other id raises ValueError."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:                                           # ints, or tensors of one id
            with blame("a token id"):
                i = operator.index(i)
            need(0 <= i < self.n_vocab, f"id {i} is not in the vocabulary")
            yield decoder.decode(self._bytes.get(i, b"\xff"))
        yield decoder.decode(b"", final=True)

    def chat(self, messages, after=None, close=True):
        """Ids of a conversation in the checkpoint's format, up to the assistant's next turn.

        messages: [{"role": "system", "user" or "assistant", "content": str}, ...]. close=False
        leaves the last turn open. after="user" or "assistant": the ids go on after that role's
        open turn. With answer = encode(its text) that has no white space at its ends,
            chat(history) + answer + chat([question], after="assistant")
        equals chat([*history, answer, question]). ValueError: the template cannot take them."""
        need(self._template, "the checkpoint has no chat template, or one that does not work")
        history = {None: [], "user": ["user"], "assistant": ["user", "assistant"]}[after]
        roles = history + [message["role"] for message in messages]
        need({*roles} <= {"system", "user", "assistant"}, f"unknown role in {roles}")
        marks = [f"\t\ue000{i}\ue000\t" for i in range(len(roles))]
        contents = marks[:len(history)] + [message["content"] for message in messages]
        # A content must not give special tokens: until these are found, marks stand for contents.
        text, expected = (self._render(roles, each, close) for each in (marks, contents))
        found = [*MARK.finditer(text)]
        complete = [int(mark[2]) for mark in found] == [*range(len(marks))]
        need(complete and put(contents, text) == expected, "the chat template changes a message")
        start = found[len(history) - 1].end() if history else 0
        end = len(text) if close else found[-1].end()
        ids = []
        for part in self._added.split(text[start:end]):
            ids += [self.added[part]] if part in self.added else self.encode(put(contents, part))
        return ids

    def _render(self, roles, contents, close):
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        with blame("the chat template"):
            return self._template.render(messages=messages, add_generation_prompt=close)

    def _read_settings(self, folder, template):
        """Take vocab_size, bos, stop ids and chat template from the checkpoint's other files."""
        config, generation, names = (read_settings(folder / f"{name}.json") for name in (
            "config", "generation_config", "tokenizer_config"))
        size = config.get("vocab_size") or 0                        # the model may give unused ids
        need(size <= MAX_ID, "vocab_size in config.json is too large")
        self.token_bytes += [None] * (size - self.n_vocab)
        self.n_vocab = len(self.token_bytes)
        bos, stops = ([i for settings in (config, generation) for i in as_list(settings.get(key))]
                      for key in ("bos_token_id", "eos_token_id"))
        need({*bos, *stops} <= {*self._bytes}, f"config.json has unknown ids: {bos} or {stops}")
        tokens = {key: names[key]["content"] if isinstance(names[key], dict) else names[key]
                  for key in {"bos_token", "eos_token", "unk_token", "pad_token"} & names.keys()}
        self.bos_id = self.added.get(tokens.get("bos_token"), bos[0] if bos else self.bos_id)
        if tokens.get("bos_token", "") is None:
            self.bos_id = None
        self.stop_ids = {*stops, self.added.get(tokens.get("eos_token"))} - {None} or self.stop_ids
        template = names.get("chat_template") if names else template
        if isinstance(template, list):                              # several, each with a name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if template:
            self._use_template(template, tokens)

    def _use_template(self, template, tokens):
        """As transformers does, in a sandbox. chat_format stays None if a short talk fails."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {**tokens, "raise_exception": lambda text: need(False, text),
                                "strftime_now": time.strftime}
        try:
            self._template = environment.from_string(template)
            end = self.chat([{"role": "user", "content": "x"}], after="assistant")[0]
            self.stop_ids |= {end} & {*self.added.values()}
            self.chat_format = template
        except Exception:
            self._template = None

# Meta's directories have no template. This is the one of Llama 3.
META = ("<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")

def put(contents, text):
    """Put the contents in place of their marks. Where a template strips a mark, strip it, too."""
    def content(mark):
        text = contents[int(mark[2])]
        text = text if mark[1] else text.lstrip()
        return text if mark[3] else text.rstrip()
    return MARK.sub(content, text)

def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]

def read_settings(file):
    with blame(file):
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}

# ------------------------------------------------------------------------------- reading the files

# How a text is split into pieces; BPE merges only within a piece.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# What regex engines read in different ways: these escapes, flags and operators are unsupported.
UNSAFE = re.compile(r"\\(?![dDnpPrsSt])[A-Za-z]|\(\?(?!i:)[a-zA-Z^-]|--|~~|\|\|")
# tokenizer.json spells bytes as printable characters: those that print, the others from U+0100 on.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}

def read_model(data):
    """Meta's Llama 3 file -> the arguments of Tokenizer. It has a line of base64 and rank per token
    (b"IQ== 0": b"!" is 0); the 256 special tokens that follow are not in the file."""
    lines = re.findall(rb"(?m)^([A-Za-z\d+/]+=*) (\d{1,9})$", data)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    n = len(ranks)
    need(2 * n == len(data.split()) and [*ranks.values()] == [*range(n)] and n <= 128000,
         "not Llama 3's lines of base64 and ranks 0, 1, ... (SentencePiece is unsupported)")
    spare = [f"reserved_special_token_{i}" for i in range(248)]
    names = ["begin_of_text", "end_of_text", *spare[:2], "finetune_right_pad_id", spare[2],
             "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", *spare[3:]]
    added = {f"<|{name}|>": n + i for i, name in enumerate(names)}
    return [LLAMA3], ranks, added, {*added.values()}

def read_json(data):
    """Hugging Face's file -> the arguments of Tokenizer."""
    root = json.loads(data)
    model, normalizers = root["model"], steps_of(root.get("normalizer"), "normalizers")
    vocab, kind = model["vocab"], model.get("type", "BPE")
    need(kind == "BPE", f"model {kind!r:.40} is unsupported, only BPE is supported")
    for name in ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix"):
        need(not model.get(name), f"{name} is unsupported")
    need(normalizers in ([], [{"type": "NFC"}]), f"normalizer {normalizers} is unsupported")
    added = {}
    for token in root["added_tokens"]:
        name, i = token["content"], token["id"]
        for flag in ["lstrip", "rstrip", "single_word"] + ["normalized"] * len(normalizers):
            need(not token[flag], f"{flag} of the token {name!r:.40} is unsupported")
        need(vocab.pop(name, i) == added.setdefault(name, i) == i, f"{name!r} has two ids")
    need({*"".join(vocab)} <= BYTE_OF.keys(), "not bytes: SentencePiece is unsupported")
    check_merges(vocab, model["merges"], model.get("ignore_merges") is True)
    ranks = {bytes(map(BYTE_OF.get, token)): i for token, i in vocab.items()}
    special = {token["id"] for token in root["added_tokens"] if token["special"]}
    return split_patterns(root["pre_tokenizer"]), ranks, added, special, bool(normalizers)

def steps_of(step, key):
    """The steps of a pre-tokenizer or normalizer; key is the name of a sequence's list."""
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]

def split_patterns(pre_tokenizer):
    """The patterns that split a text, one after the other. ByteLevel, the last, spells bytes."""
    *splits, last = steps_of(pre_tokenizer, "pretokenizers") or [None]
    patterns = []
    for step in splits:
        match step:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
                  "invert": False} if not UNSAFE.search(pattern):
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": bool(single)}:
                patterns.append(r"\p{N}" if single else r"\p{N}+")
            case _:
                raise ValueError(f"{step!r:.400} in pre_tokenizer is unsupported")
    match last:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return patterns + [GPT2] * last.get("use_regex", True)
    raise ValueError(f"{last!r:.400} at the end of pre_tokenizer is unsupported")

def cut(pattern, text):
    """Cut a text at both ends of every match: digits cut "ab12" into "ab", "1" and "2"."""
    ends = [end for match in pattern.finditer(text) for end in match.span()]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if a < b]

def check_merges(vocab, merges, ignore_merges):
    """ValueError unless tiktoken, which has no list of merges, merges as the file says.

    Of all neighbours that make a token, tiktoken joins those of the lowest id; a piece that is a
    token stays whole. So the merges must be in the order of the ids and have, for each token, the
    pair that tiktoken joins last. This is enough: if both have joined the same so far, and tiktoken
    joins x, y next, then (x, y) is last_pair(x + y), as what was joined within was joined as if it
    stood alone. A token that merges cannot make is only ever a whole piece: it needs ignore_merges.
    """
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    need(max(map(len, vocab)) <= 1024, "a token is too long")
    wanted = {last_pair(token, vocab) for token in vocab if len(token) > 1}
    need(all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs)
         and len({*pairs}) == len(pairs) and wanted - {None} <= {*pairs}
         and pairs == sorted(pairs, key=lambda pair: vocab["".join(pair)])
         and (ignore_merges or None not in wanted),
         "the merges do not make the tokens in the order of their ids, as tiktoken would")

def last_pair(token, vocab):
    """The pair that tiktoken joins last to make a token, "the" -> ("th", "e"), or None."""
    parts = [*token]
    while len(parts) > 2:
        ids = [vocab.get(left + right, MAX_ID) for left, right in zip(parts, parts[1:])]
        i = ids.index(min(ids))
        if ids[i] == MAX_ID:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)
