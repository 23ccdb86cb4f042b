"""The tiny model's tokenizer: byte-level BPE, learned from corpus.py, in Hugging Face's format."""
import json
from collections import Counter

import regex

from experiments.training.corpus import KNOWN, prose_sentences

VOCAB = 1024
BOS = "<|begin_of_text|>"               # the last id of the vocabulary
SPLIT = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+"     # every digit stands alone
         r"|\s+(?!\S)|\s+")

def most_frequent_pair(words, counts):
    """The two neighbouring tokens that occur most often; ties: the pair that was seen first."""
    pairs = Counter()
    for word, tokens in words.items():
        for pair in zip(tokens, tokens[1:]):
            pairs[pair] += counts[word]
    return max(pairs, key=pairs.get)

def merge(tokens, a, b):
    """Join every a that is followed by b, in place: [x, a, b] becomes [x, ab]."""
    i = 1
    while i < len(tokens):
        if tokens[i - 1:i + 1] == [a, b]:
            tokens[i - 1:i + 1] = [a + b]
        else:
            i += 1

def train_bpe():
    """{bytes of a token: id}: 256 bytes, merges learned from the prose, then the KNOWN words."""
    known = {f" {word}".encode() for word in KNOWN}
    counts = Counter()
    for sentence in prose_sentences():
        counts.update(regex.findall(SPLIT, sentence))
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    vocab = {bytes([byte]): byte for byte in range(256)}
    while len(vocab) + len(known - vocab.keys()) < VOCAB - 1:              # the last id is BOS
        a, b = most_frequent_pair(words, counts)
        vocab[a + b] = len(vocab)
        for tokens in words.values():
            merge(tokens, a, b)
    for word in sorted(known - vocab.keys()):
        vocab[word] = len(vocab)
    return vocab

def byte_letters():
    """Hugging Face's files spell the bytes as printable characters: {byte: character}."""
    letters = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - 188)               # 188 spell themselves
    return letters

def write_tokenizer(path, vocab):
    """Write Hugging Face's tokenizer.json to the file `path`.

    The merges are all the ways to join two tokens to a third, in the order of the third one's id.
    """
    letters = byte_letters()

    def spell(token):
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in vocab:
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges.append([spell(token[:i]), spell(token[i:])])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    bos = {"id": VOCAB - 1, "content": BOS, "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "normalizer": None,
        "post_processor": None,
        "decoder": level,
        "added_tokens": [bos],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "ignore_merges": True, "merges": merges,
                  "vocab": {spell(token): id for token, id in vocab.items()}},
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
