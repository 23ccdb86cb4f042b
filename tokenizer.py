"""Text to token ids and back, for byte-level BPE tokenizers, on top of tiktoken.

    tok = Tokenizer.from_dir("Llama-3.1-8B-Instruct")
    tok.encode("Hello world")                        # [9906, 1917]; decode() gives the text back
    tok.chat([{"role": "user", "content": "Hi"}])    # the prompt of the checkpoint's chat template

Reads Meta's tokenizer.model of Llama 3, and tokenizer.json (Llama, SmolLM2, GPT-2, Qwen, DeepSeek).
The ids equal the `tokenizers` library's; a file for which they would not raises ValueError.
"""
import base64, codecs, itertools, json, re, time, unicodedata
from collections import namedtuple
from pathlib import Path

import regex                                                        # a dependency of tiktoken
import tiktoken

BOS_NAMES = ("<|begin_of_text|>", "<|bos|>", "<s>")
STOP_NAMES = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "</s>")
MAX_BYTES, MAX_ID = 1024, 1 << 22                                   # of a token

def need(condition, message):
    if not condition:
        raise ValueError(message)

class Tokenizer:
    """Attributes: n_vocab, bos_id (or None), stop_ids (a set), added ({name: id}), chat_format (a
    key of CHAT_FORMATS, or None), token_bytes (a list; None for special and unused ids)."""

    def __init__(self, splits, ranks, added, special, nfc=False):
        """splits: patterns, applied one after the other; ranks {b"he": 256, ...}: the lowest id
        merges first; added {"<|eot_id|>": 128009, ...}; special: those ids of added that plain text
        never gives; nfc: normalize the text."""
        tokens = [*ranks.items(), *((name.encode(), i) for name, i in added.items())]
        for token, i in tokens:
            need(type(i) is int and 0 <= i < MAX_ID and 0 < len(token) <= MAX_BYTES,
                 f"token {token[:40]!r} with id {i!r:.40} is empty, too long or has a bad id")
        self._bytes = {i: token for token, i in tokens}
        need(ranks and len(self._bytes) == len(tokens), "no tokens, or two with the same id")
        self._missing = {b for b in range(256) if bytes([b]) not in ranks}
        self._splits = [regex.compile(split, regex.V1 | regex.MULTILINE) for split in splits]
        self._bpe = tiktoken.Encoding("", pat_str="(?s).+", mergeable_ranks=ranks,
                                      special_tokens={})            # its pieces stay whole
        names = sorted(added, key=len, reverse=True)                # the longest match wins
        self._added = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self.added, self.special, self.nfc = added, special, nfc
        self.n_vocab = max(self._bytes) + 1
        self.token_bytes = [self._bytes.get(i) for i in range(self.n_vocab)]
        for i in special:
            self.token_bytes[i] = None
        self.bos_id = next((added[name] for name in BOS_NAMES if name in added), None)
        self.stop_ids = {added[name] for name in STOP_NAMES if name in added}
        self.chat_format = self._template = None

    @classmethod
    def from_dir(cls, path):
        """path: a checkpoint's directory or its tokenizer file. FileNotFoundError, ValueError."""
        names = ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
        files = [Path(path), *(Path(path, name) for name in names)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}")
        read = read_json if file.suffix == ".json" else read_model
        tokenizer = load(file, lambda data: cls(*read(data)))
        tokenizer._apply_settings(file.parent if file == files[0] else files[0])
        return tokenizer

    def encode(self, text, bos=False, special=False):
        """str -> list of ids. Unless special=True, "<|eot_id|>" in a text is plain characters."""
        need(not bos or self.bos_id is not None, "this tokenizer has no bos token")
        ids = [self.bos_id] if bos else []
        start = 0
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
        for i in ids:
            need(0 <= i < self.n_vocab, f"id {i} is not in the vocabulary")
            yield decoder.decode(self._bytes.get(i, b"\xff"))
        yield decoder.decode(b"", final=True)

    def chat(self, messages, after=None, close=True):
        """Ids of a conversation in the checkpoint's format, up to the assistant's next turn.

        messages: [{"role": "system", "user" or "assistant", "content": str}, ...]
        close=False leaves the last turn open. after=role continues a conversation: the ids begin
        with the end of that role's open turn. With answer = encode(text of the answer),
            chat(history) + answer + chat([question], after="assistant")
        equals chat([*history, answer, question]) if the answer has no white space at its ends.
        ValueError: chat_format is None, or the format has no such role."""
        template = self._template
        need(template, "the checkpoint has no chat template, or one of an unknown format")
        turns = [(message["role"], message["content"]) for message in messages]
        if template.trim:
            turns = [(role, content.strip()) for role, content in turns]
        parts, tail = [], []                                        # ids and strings
        if after is not None:
            tail = self._turn(after)[1]
        else:
            parts = [self.bos_id] if template.bos else []
            turns = template.with_system(turns)
        for role, content in turns:
            head, end = self._turn(role)
            parts += [*tail, *head, content]
            tail = end
        if close:
            parts += [*tail, *self._turn("assistant")[0]]
        ids = []
        for kind, run in itertools.groupby(parts, type):
            ids += run if kind is int else self.encode("".join(run))
        return ids

    def _turn(self, role):
        """What comes before and after the content of a message: two lists of ids and strings."""
        turn = self._template.turns[-1 if role == "assistant" else 0]
        need(role in ("user", "assistant") or role == "system" and "{role}" in turn,
             f"the chat format {self.chat_format} has no role {role!r:.40}")
        texts = turn.replace("{role}", role).split("{content}")
        return [[self.added.get(part, part) for part in self._added.split(text)] for text in texts]

    def _apply_settings(self, folder):
        """Take vocab_size, bos, stop ids and chat template from the checkpoint's other files."""
        size = read_settings(folder / "config.json").get("vocab_size")
        if type(size) is int and self.n_vocab < size <= MAX_ID:     # the model may give unused ids
            self.token_bytes += [None] * (size - self.n_vocab)
            self.n_vocab = size
        file = folder / "tokenizer_config.json"
        settings = load(file, read_tokenizer_config) if file.is_file() else {"chat_template": META}
        bos, eos = settings.get("bos_token"), settings.get("eos_token")
        bos_id, stop_ids = special_ids(folder)
        if bos_id is not None:
            self.bos_id = bos_id
        if "bos_token" in settings:                                 # null: there is none
            self.bos_id = self.added.get(bos, self.bos_id) if bos else None
        need(self.bos_id is None or self.bos_id in self._bytes,
             f"{folder}: the tokenizer has no token {self.bos_id}, which is bos in config.json")
        if eos in self.added:
            stop_ids.add(self.added[eos])
        self.stop_ids = stop_ids or self.stop_ids
        file = folder / "chat_template.jinja"
        jinja = load(file, bytes.decode) if file.is_file() else settings["chat_template"]
        self._template = read_template(jinja, self.added, eos)
        if self._template:
            self.chat_format = self._template.name
            self.stop_ids |= {part for part in self._turn("assistant")[1] if type(part) is int}

# ------------------------------------------------------------------------------- chat templates

# The turn of a user (and of the system, if it has a {role}), then the assistant's if it differs.
CHAT_FORMATS = {
    "llama3": ["<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"],
    "chatml": ["<|im_start|>{role}\n{content}<|im_end|>\n"],
    "zephyr": ["<|{role}|>\n{content}{eos_token}\n"],
    "mistral": ["[INST]{content}[/INST]", "{content}{eos_token}"],  # of Mistral Nemo
}
# Meta's directories have no template. This is the one of Llama 3.
META = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
# Llama 3.1 to 3.3: the first two lines precede the system message, which is "" by default.
DATED = ("Cutting Knowledge Date: December 2023\n", "Today Date: {date_string}\n\n",
         'date_string = "', 'set system_message = "" %}',
         "set system_message = messages[0]['content']|trim %}")
# In Jinja: the last name of message['role'], message.role or bos_token, if it follows + or {{
VARIABLE = re.compile(r"(\+|{{-?)\s*(?:[a-z]\w*(?:\[\w+\])?(?:\.|\[['\"]))?([a-z]\w*)(?:['\"]\])?")
JOINT = re.compile(r"['\"]?\s*\+\s*['\"]?|{{-?\s*['\"]?|['\"]?\s*-?}}")
STRIPPED = re.compile(r"\n\Z|\s+(?={[{%#]-)|(?<=-[}%#]})\s+")       # Jinja leaves it out
BEFORE = r"(?:%}\n?|=\s*['\"])"                                     # where a printed text starts,
AFTER = r"(?=(?:(?<=\n)[ \t]*)?{%|['\"]\s*-?%}|\Z)"                  # and where it ends
UNUSUAL = re.compile(r"strip|<think>|SYSTEM_PROMPT|['\"]role['\"]\s*:")     # it alters messages

class Template(namedtuple("Template", "name turns bos trim system preface")):
    """system: added if the first message is not the system's (or None); preface: precedes it."""

    def with_system(self, turns):
        if turns and turns[0][0] == "system":
            return [("system", self.preface + turns[0][1]), *turns[1:]]
        return turns if self.system is None else [("system", self.system), *turns]

def read_template(jinja, added, eos):
    """-> Template, or None if the format or its system message is unknown. The Jinja code is never
    run: its expressions, written as {role}, {content} and so on, are compared with the formats."""
    text = STRIPPED.sub("", jinja).replace("\\n", "\n")
    text = VARIABLE.sub(r"\1{\2}", text)
    text = re.sub(r"{content} *\| *trim", "{content}|trim", JOINT.sub("", text))
    for name, turns in CHAT_FORMATS.items():
        tokens = re.findall(r"<\|\w+\|>", turns[0]) + [eos] * ("{eos_token}" in turns[-1])
        for content in ("{content}", "{content}|trim"):
            user, assistant = (turns[i].replace("{content}", content) for i in (0, -1))
            start = assistant.split(content)[0].replace("{role}", "assistant")
            if (all(token in added for token in tokens) and printed("user", user, text)
                    and printed("assistant", assistant, text) and printed("", start, text)):
                return read_details(name, eos, text, content)
    return None

def printed(role, turn, text):
    """Does the template print this turn, and nothing else with it?"""
    return any(re.search(BEFORE + re.escape(written) + AFTER, text)
               for written in (turn, turn.replace("{role}", role)))

def read_details(name, eos, text, content):
    """The rest of read_template(): bos, trim and system messages. content: as text writes it."""
    trim = content != "{content}"
    if UNUSUAL.search(text) or "trim" in text and not trim:
        return None
    turns = [turn.replace("{eos_token}", eos or "") for turn in CHAT_FORMATS[name]]
    bos = "bos_token" in text or "<|begin_of_text|>" in text
    if all(line in text for line in DATED):
        today = re.search(r'strftime_now\("(.*?)"\)', text)
        fixed = re.search(r'date_string = "(.*?)"', text)
        date = time.strftime(today[1]) if today else fixed[1]
        preface = "".join(DATED[:2]).replace("{date_string}", date)
        return Template(name, turns, bos, trim, preface, preface)
    if "{role}" not in turns[0]:
        return Template(name, turns, bos, trim, None, "")
    head, tail = CHAT_FORMATS[name][0].replace("{role}", "system").split("{content}")
    message = f"({re.escape(content)}|[^{{}}'\"]+?)"
    messages = re.findall(BEFORE + re.escape(head) + message + re.escape(tail) + AFTER, text)
    defaults = {*messages} - {content}
    if len(messages) != text.count(head) or len(defaults) > 1:
        return None
    return Template(name, turns, bos, trim, next(iter(defaults), None), "")

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

def load(file, read):
    """read(bytes of the file); an error in it becomes a ValueError that names the file."""
    try:
        return read(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from None

def read_settings(file):
    """The settings in a JSON file; {} if there is no such file."""
    settings = load(file, json.loads) if file.is_file() else {}
    need(isinstance(settings, dict), f"{file} has no settings")
    return settings

def read_tokenizer_config(data):
    """-> {"bos_token": name or None, "eos_token": the same, "chat_template": Jinja code or ""}."""
    config, settings = json.loads(data), {}
    for key in {"bos_token", "eos_token"} & config.keys():
        token = config[key]
        settings[key] = token["content"] if isinstance(token, dict) else token
    found = config.get("chat_template")
    if isinstance(found, list):                                     # several, each with a name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    settings["chat_template"] = found or ""
    for key, value in settings.items():
        need(value is None or isinstance(value, str), f"{key} {value!r:.60} is no string")
    return settings

def special_ids(folder):
    """-> bos id (or None), set of eos ids, from config.json and generation_config.json."""
    ids = {"bos_token_id": [], "eos_token_id": []}
    for file in (Path(folder, "config.json"), Path(folder, "generation_config.json")):
        settings = read_settings(file)
        for key in ids:
            value = settings.get(key)
            values = value if isinstance(value, list) else [] if value is None else [value]
            need(all(type(i) is int and i >= 0 for i in values),
                 f"{file}: {key} {value!r:.60} is no token id")
            ids[key] += values
    return next(iter(ids["bos_token_id"]), None), {*ids["eos_token_id"]}

def read_model(data):
    """Meta's Llama 3 file -> the arguments of Tokenizer. It has a line of base64 and rank per token
    (b"IQ== 0": b"!" is 0); the 256 special tokens that follow are not in the file."""
    lines = re.findall(rb"(?m)^([A-Za-z\d+/]+=*) (\d{1,9})$", data)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    n = len(ranks)
    need(2 * n == len(data.split()) and sorted(ranks.values()) == [*range(n)] and n <= 128000,
         "not Llama 3's lines of base64 and ranks 0, 1, ... (SentencePiece is unsupported)")
    spare = [f"reserved_special_token_{i}" for i in range(248)]
    names = ["begin_of_text", "end_of_text", *spare[:2], "finetune_right_pad_id", spare[2],
             "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", *spare[3:]]
    added = {f"<|{name}|>": n + i for i, name in enumerate(names)}
    return [LLAMA3], ranks, added, {*added.values()}

def read_json(data):
    """Hugging Face's file -> the arguments of Tokenizer."""
    match json.loads(data):
        case {"model": {"vocab": dict(vocab), "merges": list(merges), **model},
              "added_tokens": list(tokens), "pre_tokenizer": pre, **other}:
            normalizers = flatten(other.get("normalizer"), "normalizers")
        case _:
            raise ValueError("not BPE: vocab, merges, added_tokens or pre_tokenizer is missing or "
                             "has a wrong type")
    off = ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix")
    need(model.get("type", "BPE") == "BPE" and not any(map(model.get, off)),
         f"not byte-level BPE: {model!r:.200}")
    need(normalizers in ([], [{"type": "NFC"}]), f"normalizer {normalizers!r:.200} is unsupported")
    added = {}
    for t in tokens:
        name = t["content"]
        flags = [t["lstrip"], t["rstrip"], t["single_word"], normalizers and t["normalized"]]
        need(not any(flags) and name not in added and vocab.pop(name, t["id"]) == t["id"],
             f"added token {name!r:.40} has two ids or an unsupported flag: {flags}")
        added[name] = t["id"]
    for character in {*"".join(vocab)}:
        need(character in BYTE_OF,
             f"{character!r} in the vocabulary is no byte: SentencePiece is unsupported")
    check_merges(vocab, merges, model.get("ignore_merges") is True)
    ranks = {bytes(map(BYTE_OF.get, token)): i for token, i in vocab.items()}
    special = {t["id"] for t in tokens if t["special"]}
    return split_patterns(pre), ranks, added, special, bool(normalizers)

def flatten(step, key):
    """[step], or the steps of a sequence (of sequences); key is the name of the sequence's list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for outer in step[key] for inner in flatten(outer, key)]

def split_patterns(pre_tokenizer):
    """The patterns that split a text, one after the other. ByteLevel, the last, spells bytes."""
    *splits, last = flatten(pre_tokenizer, "pretokenizers") or [None]
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
    """Raise ValueError unless tiktoken merges as the file says.

    Tiktoken has no list of merges: of all neighbours that make a token, it joins those of the
    lowest id; a piece that is a token stays whole. So the merges must be in the order of the ids,
    and must have, for each token, the pair that tiktoken joins last. This is enough. Suppose that
    both have joined the same so far, and tiktoken joins x, y next. What was joined within x + y was
    joined as if it stood alone, so (x, y) is last_pair(x + y). The file has this pair, and none
    before it is possible. A token that merges cannot make is only ever a whole piece: it needs
    ignore_merges."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    known = all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs)
    wanted = {last_pair(token, vocab) for token in vocab if 1 < len(token) <= MAX_BYTES}
    need(known and len({*pairs}) == len(pairs) and wanted - {None} <= {*pairs}
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
