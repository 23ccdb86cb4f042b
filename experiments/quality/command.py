"""What the commands of this folder share: options, the model, the methods, the log."""
import argparse
import sys
from pathlib import Path

import torch

from experiments.quality.log import Log
from experiments.quality.methods import methods
from model import Llama
from sentencekv import need, sentence_flags
from tokenizer import Tokenizer

SMALLEST_BUDGET = 64

def options(doc, parts, model=None):
    """An argument parser with the options of all commands."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, required=model is None, metavar="DIR",
                        help="a checkpoint, as for python -m ask")
    parser.add_argument("--parts", type=int, nargs="+", default=parts, metavar="N",
                        help=f"budgets: 1/N of the prompt, at least {SMALLEST_BUDGET} tokens")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these; see methods.py")
    parser.add_argument("--log", metavar="FILE",
                        help="JSON lines; a run with the same log computes only what is missing")
    return parser

class Lab:
    """A model in float32, its tokenizer, the methods to compare, and the log of results."""

    def __init__(self, args, keys):
        need(min(args.parts) >= 1, f"--parts must be at least 1, got {min(args.parts)}")
        self.parts = args.parts
        self.log = Log(args.log, keys)
        self.tokenizer = Tokenizer.from_dir(args.model)
        known = methods(sentence_flags(self.tokenizer.token_bytes))
        chosen = args.methods or list(known)
        for name in chosen:
            need(name in known, f"--methods: {name!r} is unknown; there are {', '.join(known)}")
        self.methods = {name: known[name] for name in chosen}
        self.model = Llama.from_pretrained(args.model, dtype=torch.float32)

    def missing(self, *key):
        """(part, name) of every method without a record. Part 0 is dense attention."""
        pairs = [(0, "dense")] + [(part, name) for part in self.parts for name in self.methods]
        return [pair for pair in pairs if (*key, *pair) not in self.log]

    def method(self, part, name, length):
        """A new method with 1/part of a prompt of this length as its budget."""
        if name == "dense":
            return None
        return self.methods[name](max(SMALLEST_BUDGET, length // part))

def run(main, argv=None):
    """Call main(argv) with one thread; print errors of the user's input in one line."""
    torch.set_num_threads(1)        # a small model is not faster with more
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

def at_least(least):
    """A type for argparse: an int of at least `least`."""
    def integer(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value
    return integer

def existing(paths):
    """ValueError unless all are files."""
    for path in paths:
        need(Path(path).is_file(), f"{path} is not a file")
