"""What the commands of this package share: options, the report, and errors in one line."""
import argparse
import json
import sys
from pathlib import Path
from textwrap import fill

import torch

from experiments.shapes import SHAPES
from experiments.speed import clock
from experiments.speed.filled import PRESETS, made_up_flags, variants
from experiments.svg import line_plot
from sentencekv import SentenceKV, need

MOST_ROUNDS = 200

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def parser(description, quick, lengths, rounds, shape=None, presets=PRESETS):
    """The options; lengths, rounds, shape, presets: defaults. quick: defaults for --quick.

    Without a shape, the command needs the directory of a checkpoint.
    """
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if shape is None:
        p.add_argument("directory", type=Path, help="a checkpoint in the format of Hugging Face")
    else:
        p.add_argument("--shape", help=f"one of {', '.join(SHAPES)}; default {shape}")
    p.add_argument("--lengths", help=f"numbers of tokens; default {lengths}")
    text = f"measurements of each variant; default {rounds}"
    p.add_argument("--rounds", type=int, help=text)
    text = f"of {', '.join(PRESETS)}; default {','.join(presets)}"
    p.add_argument("--variants", metavar="NAME,...", default=",".join(presets), help=text)
    p.add_argument("--budget", type=int, default=1024, help="default 1024")
    p.add_argument("--parts", action="store_true", help="measure the parts of each step, too")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    p.add_argument("--svg", type=Path, metavar="FILE", help="plot milliseconds against tokens")
    text = "other defaults, for a run of seconds: " + str(quick)
    p.add_argument("--quick", action="store_true", help=text)
    p.set_defaults(shape=shape, lengths=lengths, rounds=rounds)
    return p

def check(options):
    """ValueError for options that cannot work. Makes lists of options.lengths and .variants."""
    need(options.shape is None or options.shape in SHAPES,
         f"unknown shape {options.shape!r}; known: {', '.join(SHAPES)}")
    options.lengths = [number_of_tokens(text) for text in options.lengths.split(",")]
    need(1 <= options.rounds <= MOST_ROUNDS,
         f"--rounds must be from 1 to {MOST_ROUNDS}, got {options.rounds}")
    options.variants = options.variants.split(",")
    for name in options.variants:
        need(name in PRESETS, f"unknown variant {name!r}; known: {', '.join(PRESETS)}")
    for settings in variants(options.budget, options.variants).values():
        SentenceKV(made_up_flags(), **settings)         # raises ValueError for a bad budget
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {options.device} cannot be used: {reason}") from error
    for file in (options.json, options.svg):
        need(file is None or file.parent.is_dir(), f"{file}: there is no such directory")

def number_of_tokens(text):
    """
    >>> number_of_tokens("8K"), number_of_tokens("1000")
    (8192, 1000)
    """
    digits = text.strip().upper()
    unit = 1024 if digits.endswith("K") else 1
    digits = digits.removesuffix("K")
    need(digits.isdecimal(), f"--lengths must be numbers as in 8K,32768; got {text!r}")
    n = unit * int(digits)
    need(256 <= n <= 1 << 22, f"--lengths must be from 256 to 4096K, got {text}")
    return n

def run(measure, argv, description, quick, **defaults):
    """Parse argv, call measure(options, report), write the report; return the exit status.

    0; 2 after one line on stderr for bad options or files, or if memory does not suffice.
    """
    p = parser(description, quick=quick, **defaults)
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        p.set_defaults(**quick)
    try:
        options = p.parse_args(argv)
        check(options)
        report = Report(options)
        clock.disable_cudnn_attention(options.device)
        measure(options, report)
        report.write()
    except (ValueError, FileNotFoundError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

class Report:
    """What was measured: printed at once, and collected for --json and --svg."""

    def __init__(self, options):
        self.options = options
        self.rows = []
        self.setup = clock.setup(options.device)
        print("{command}".format(**self.setup))
        print("{machine}, {cores} cores, {threads} threads, torch {torch}".format(**self.setup))
        print(f"bfloat16, budget {options.budget}", flush=True)

    def add(self, tokens, variant, times, note="", **more):
        """One row: the summary of times, a note to print, and more figures for --json."""
        row = {"tokens": tokens, "variant": variant, **clock.summary(times), **more}
        self.rows.append(row)
        print(f"  {variant:28} {row['ms']:9.2f} ms  ({row['low']:.2f} to {row['high']:.2f})  "
              f"{note}", flush=True)

    def parts(self, tokens, variant, ms, moved):
        """The result of parts_of(), as one row."""
        self.rows.append({"tokens": tokens, "variant": variant, "parts": ms, "moved": moved})
        whole = ms["in all"]
        shares = [f"{part} {t:.2f} ({t / whole:.0%})" for part, t in ms.items() if part != "in all"]
        text = (f"{variant}, {whole:.2f} ms with timers: {', '.join(shares)}; "
                f"{moved / 1e6:.2f} MB moved")
        print(fill(text, 96, initial_indent="  ", subsequent_indent="      "), flush=True)

    def write(self):
        if self.options.json:
            text = json.dumps({**self.setup, "results": self.rows}, indent=1)
            self.options.json.write_text(text + "\n")
        if self.options.svg:
            lines = {}
            for row in self.rows:
                if "ms" in row:
                    lines.setdefault(row["variant"], []).append((row["tokens"], row["ms"]))
            title = self.options.shape or self.options.directory.name
            line_plot(lines, self.options.svg, title, "ms")
