"""Text to token ids and back, for the byte-level BPE tokenizers that real checkpoints ship, on top of tiktoken.

    tok = Tokenizer.from_dir("Llama-3.1-8B-Instruct")
    tok.encode("Hello world")  # [9906, 1917], and tok.decode([9906, 1917]) is "Hello world"

Reads Llama 3's tokenizer.model (Meta) and tokenizer.json (Hugging Face: Llama 3, GPT-2, Qwen style); nothing is
downloaded. A file for which tiktoken would give other ids than the file's own library is refused with a ValueError.
"""
import base64, codecs, json, re, unicodedata
from pathlib import Path

import tiktoken

# How text is cut into pieces before BPE; no token spans two pieces. A tokenizer.json may bring its own pattern.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LONGEST, NO_ID = 1024, 1 << 22  # bytes of the longest token; a number that no id reaches
RUN = 1 << 17  # longer runs of white space are cut here: they overflow the stack of tiktoken's regex
BOS = ("<|begin_of_text|>", "<|bos|>", "<s>")
STOPS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "</s>")

# tokenizer.json spells bytes as printable characters: those that print as themselves, the others from U+0100 on.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != 32]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {**{chr(b): b for b in PRINTABLE}, **{chr(256 + i): b for i, b in enumerate(OTHERS)}}     # "Ġ" -> 32

def demand(ok, message):
    if not ok:
        raise ValueError(message)

class Tokenizer:
    """encode, decode and stream; n_vocab, bos_id (or None), stop_ids (a set), token_bytes (None: special or unused)."""

    def __init__(self, pattern, ranks, added, special, nfc=False):
        """ranks {b"he": 256, ...} in merge order; added {"<|eot_id|>": 128009, ...}; special: a set of ids."""
        self._bytes = {i: t if isinstance(t, bytes) else t.encode() for t, i in {**ranks, **added}.items()}
        demand(len(self._bytes) == len(ranks) + len(added), "two tokens have the same id")
        for i, t in self._bytes.items():
            demand(type(i) is int and 0 <= i < NO_ID and 0 < len(t) <= LONGEST,
                   f"token {t[:40]!r} with id {i!r:.40} is empty, too long or has a bad id")
        for b in range(256):
            demand(bytes([b]) in ranks, f"no token is the byte {bytes([b])!r}")
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        self.n_vocab, self.added, self.special, self.nfc = max(self._bytes) + 1, added, special, nfc
        self.token_bytes = [None if i in special else self._bytes.get(i) for i in range(self.n_vocab)]
        self.bos_id = next((added[name] for name in BOS if name in added), None)
        self.stop_ids = {added[name] for name in STOPS if name in added}
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    @classmethod
    def from_dir(cls, path):
        """path: a checkpoint directory, or the tokenizer file itself. FileNotFoundError, or ValueError in one line."""
        names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        file = next((p for p in [Path(path), *(Path(path, name) for name in names)] if p.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has none of {', '.join(names)}")
        try:
            return (read_json if file.suffix == ".json" else read_model)(file.read_bytes())
        except Exception as error:
            raise ValueError(f"{file}: {type(error).__name__}: {error}") from None

    def encode(self, text, bos=False, special=False):
        """str -> list of ids. Unless `special`, "<|eot_id|>" in text is plain characters: no text can forge a token."""
        demand(not bos or self.bos_id is not None, "this tokenizer has no bos token")
        ids, start = [self.bos_id] if bos else [], 0
        for match in self._added.finditer(text):
            if special or self.added[match[0]] not in self.special:
                ids += self._encode_plain(text[start:match.start()]) + [self.added[match[0]]]
                start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        cuts = [0, *(m.end() for m in re.finditer(rf"\s{{1,{RUN}}}(?=(\s?))", text) if m[1]), None]
        try:
            ids = [i for a, b in zip(cuts, cuts[1:]) for i in self.encoding.encode_ordinary(text[a:b])]
        except BaseException as error:  # a panic in tiktoken's Rust is not an Exception
            raise ValueError(f"tiktoken: {error}") if type(error).__name__ == "PanicException" else error
        demand(self.encoding.decode_bytes(ids) == text.encode(), "the tokenizer's split pattern skips some of the text")
        return ids

    def decode(self, ids):
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Yield text as the ids come; a character whose bytes lie in two tokens comes whole, with the second."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            demand(i in self._bytes, f"id {i} is not in the vocabulary")
            yield decoder.decode(self._bytes[i])
        yield decoder.decode(b"", final=True)

    def chat(self, messages):
        """Llama 3's template for [{"role": "user", "content": "Hi"}, ...], up to the assistant's next turn -> ids."""
        names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        for name in names:
            demand(name in self.added, f"the chat template is Llama 3's, and this tokenizer has no {name}")
        ids, start, end, eot = ([self.added[name]] for name in names)
        for m in [*messages, {"role": "assistant", "content": ""}]:
            ids += start + self.encode(m["role"]) + end + self.encode("\n\n" + m["content"].strip()) + eot
        return ids[:-1]

def read_model(data):
    """Meta's Llama 3 file: a line of base64 and rank per token (b"IQ== 0": b"!" is 0); 256 special tokens follow."""
    lines = re.findall(rb"(?m)^([A-Za-z\d+/]+=*) (\d{1,9})$", data)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    n = len(ranks)
    demand(2 * n == len(data.split()) and sorted(ranks.values()) == [*range(n)] and n <= 128000,
           "not Llama 3's lines of base64 and ranks 0, 1, ... (SentencePiece is not supported)")
    spare = [f"reserved_special_token_{i}" for i in range(248)]
    names = ["begin_of_text", "end_of_text", *spare[:2], "finetune_right_pad_id", spare[2], "start_header_id",
             "end_header_id", "eom_id", "eot_id", "python_tag", *spare[3:]]
    return Tokenizer(LLAMA3, ranks, {f"<|{name}|>": n + i for i, name in enumerate(names)}, {*range(n, n + 256)})

def read_json(data):
    """Hugging Face's file: the split pattern, the vocabulary, the merges and the added tokens."""
    match json.loads(data):
        case {"model": {"vocab": dict(vocab), "merges": list(merges), **model}, "added_tokens": list(tokens),
              "pre_tokenizer": pre, **other}:
            nfc = other.get("normalizer")
        case _:
            raise ValueError("not BPE: vocab, merges, added_tokens or pre_tokenizer is missing or has a wrong type")
    off = ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix")
    demand(model.get("type", "BPE") == "BPE" and not any(map(model.get, off)) and nfc in (None, {"type": "NFC"}),
           f"not plain byte-level BPE: normalizer {nfc!r:.60}, model {model!r:.200}")
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False} if pre.get("use_regex", True):
            pattern = GPT2
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            pass
        case _:
            raise ValueError(f"pre_tokenizer {pre!r:.400} is not supported")
    added = {}
    for t in tokens:
        name, flags = t["content"], [t["lstrip"], t["rstrip"], t["single_word"], nfc and t["normalized"]]
        demand(not any(flags) and name not in added and vocab.pop(name, t["id"]) == t["id"],
               f"added token {name!r:.40} has two ids or an unsupported flag: {flags}")
        added[name] = t["id"]
    for c in {*"".join(vocab)}:
        demand(c in BYTE_OF, f"{c!r} in the vocabulary is no byte: SentencePiece is not supported")
    from experiments.merges import check_merges                                 # the only use of another file here
    check_merges(vocab, merges, model.get("ignore_merges") is True)
    return Tokenizer(pattern, {bytes(map(BYTE_OF.get, token)): i for token, i in vocab.items()}, added,
                     {t["id"] for t in tokens if t["special"]}, bool(nfc))
