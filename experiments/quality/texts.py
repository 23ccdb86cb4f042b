"""Plain text files, cut into windows of tokens. docs/quality.md says where the texts come from."""
import re
from dataclasses import dataclass
from pathlib import Path

from sentencekv import need

@dataclass
class Window:
    """A part of a text."""
    name: str       # file and number, "emma.txt 0": the key of what is measured on it
    genre: str      # the name of the file's folder
    ids: list       # its tokens

def read_text(path):
    """The text of a UTF-8 file. FileNotFoundError or ValueError names the file."""
    path = Path(path)
    need(not path.is_dir(), f"{path} is a folder: give the text files in it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None

def windows(path, tokenizer, count, size):
    """`count` windows of `size` tokens, evenly spaced in a file; each starts with a sentence.

    Raises ValueError for a text that is too short.
    """
    path, text = Path(path), read_text(path)
    sentence_starts = [match.end() for match in re.finditer(r"[.?!]\s+", text)]
    found = []
    for i in range(count):
        start = next((s for s in sentence_starts if s >= i * len(text) // count), len(text))
        end = len(text) * (i + 1) // count
        ids = tokenizer.encode(text[start:min(end, start + 10 * size)])[:size]
        need(len(ids) == size, f"{path} is too short for {count} windows of {size} tokens: "
             "ask for fewer or shorter windows, or leave it out")
        found.append(Window(f"{path.name} {i}", path.resolve().parent.name, ids))
    return found

def sentences(path, rng, size):
    """Sentences of about `size` characters of a file, from a random place on: list of str."""
    text = " ".join(read_text(path).split())
    need(len(text) > size, f"{path} is too short: {size} characters are needed")
    start = rng.randrange(len(text) - size)
    found = re.split(r"(?<=[.!?]) ", text[start:start + size])
    return found[1:-1]
