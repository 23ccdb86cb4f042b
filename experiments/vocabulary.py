"""The tiny model's tokenizer: byte-level BPE, learned from the prose of corpus.py, in Hugging Face's format."""
import json
from collections import Counter

import regex

from experiments.corpus import KNOWN, prose_sentences

VOCAB, BOS = 1024, "<|begin_of_text|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"      # every digit stands alone

def train_bpe():
    """{bytes of a token: id}: 256 bytes, merges learned from the prose, then the KNOWN words not yet among them."""
    words = {f" {word}".encode() for word in KNOWN}
    counts = Counter(w for s in prose_sentences() for w in regex.findall(SPLIT, s))
    parts = {w: [bytes([b]) for b in w.encode()] for w in counts}
    vocab = {bytes([b]): b for b in range(256)}
    while len(vocab) + len(words - vocab.keys()) < VOCAB - 1:
        pairs = Counter()
        for w, p in parts.items():
            for pair in zip(p, p[1:]):
                pairs[pair] += counts[w]
        a, b = max(pairs, key=pairs.get)
        vocab[a + b] = len(vocab)
        for p in parts.values():
            while i := next((i for i in range(1, len(p)) if p[i - 1:i + 1] == [a, b]), 0):
                p[i - 1:i + 1] = [a + b]
    return vocab | {w: len(vocab) + i for i, w in enumerate(sorted(words - vocab.keys()))}

def write_tokenizer(path, vocab):
    """Hugging Face's tokenizer.json. Merges: every way to join two tokens to a third, in the order of its id."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]       # GPT-2 writes the other bytes as 256, 257, ..
    letter = dict(zip(plain + [b for b in range(256) if b not in plain], map(chr, plain + [*range(256, 324)])))
    spell = lambda token: "".join(letter[b] for b in token)
    merges = [[spell(t[:i]), spell(t[i:])] for t in vocab for i in range(1, len(t)) if {t[:i], t[i:]} <= vocab.keys()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps({
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": level,
        "added_tokens": [{"id": VOCAB - 1, "content": BOS, "special": True, **no}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {spell(t): i for t, i in vocab.items()},
                  "merges": merges}}, ensure_ascii=False, indent=0), encoding="utf-8")
