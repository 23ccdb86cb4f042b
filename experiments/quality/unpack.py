"""Makes plain text files from four Debian packages, for the commands in this folder.

    apt-get download r-cran-janeaustenr anarchism debian-handbook python3.11-doc
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python -m experiments.quality.unpack unpacked texts

Writes novels (Jane Austen), essays (An Anarchist FAQ) and technical text (the Debian handbook in
two halves, chapters of Python's manual), one folder each. It refuses to overwrite files.
"""
import argparse
import gzip
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from experiments.quality.command import run
from sentencekv import need

NOVELS = ("emma", "mansfield", "northanger", "persuasion", "pride", "sense")
MANUALS = ("howto/descriptor howto/logging-cookbook howto/regex "
           "library/argparse library/asyncio-task library/collections library/datetime").split()

def paragraphs(text):
    """A text with one line per paragraph and an empty line in between."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return "\n\n".join(part for part in parts if part)

def compressed_objects(data):
    """The objects of R's lazy-load database: each is a length of 4 bytes and a zlib stream."""
    start = 0
    while start < len(data):
        stream = zlib.decompressobj()
        content = stream.decompress(data[start + 4:])
        need(stream.eof, "not a database of R")
        yield content
        start = len(data) - len(stream.unused_data)

def r_strings(content):
    """The ASCII and UTF-8 strings of an object that R has serialized: type, length, bytes."""
    start = 0
    while match := re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09").search(content, start):
        (length,) = struct.unpack(">i", content[match.end():match.end() + 4])
        start = match.end()
        if 0 <= length < 2000:
            start += 4 + length
            yield content[match.end() + 4:start].decode("utf-8", "replace")

def novels(source):
    data = (source / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for name, content in zip(NOVELS, compressed_objects(data), strict=True):
        yield name, paragraphs("\n".join(r_strings(content)))

def essays(source):
    for file in sorted(source.glob("usr/share/doc/anarchism/markdown/sec*.md.gz")):
        text = gzip.decompress(file.read_bytes()).decode("utf-8")
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)            # links
        text = paragraphs(re.sub(r"[_*`]", "", text))
        if len(text) > 100_000:
            yield file.name.split(".")[0], text

class Page(HTMLParser):
    """Collects the text of a page; a line break in <pre> becomes \\x01, to survive paragraphs()."""
    BLOCKS = set("p div li h1 h2 h3 h4 h5 pre dt dd tr br table ul section".split())
    HIDDEN = set("script style head nav".split())

    def __init__(self, text):
        super().__init__()
        self.parts, self.hidden, self.preformatted = [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in self.HIDDEN
        self.preformatted += tag == "pre"
        self.parts += ["\n\n"] * (tag in self.BLOCKS)

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN
        self.preformatted -= tag == "pre"
        self.parts += ["\n\n"] * (tag in self.BLOCKS)

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data.replace("\n", "\x01") if self.preformatted else data)

def handbook(source):
    """The handbook in two halves."""
    pages = sorted(source.glob("usr/share/doc/debian-handbook/html/en-US/*.html"))
    text = "\n\n".join(paragraphs("".join(Page(page.read_text("utf-8")).parts)) for page in pages)
    text = text.replace("\x01", "\n")
    half = text.index("\n\n", len(text) // 2)
    yield "handbook-1", text[:half]
    yield "handbook-2", text[half:]

def manuals(source):
    for name in MANUALS:
        file = source / f"usr/share/doc/python3.11/html/_sources/{name}.rst.txt"
        yield name.replace("/", "-"), file.read_text("utf-8")

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="folder for the texts")
    args = parser.parse_args(argv)
    genres = {"novels": (novels,), "essays": (essays,), "technical": (handbook, manuals)}
    for genre, readers in genres.items():
        folder = args.out / genre
        folder.mkdir(parents=True, exist_ok=True)
        for reader in readers:
            for name, text in reader(args.source):
                with open(folder / f"{name}.txt", "x", encoding="utf-8") as file:
                    file.write(text)

if __name__ == "__main__":
    raise SystemExit(run(main))
