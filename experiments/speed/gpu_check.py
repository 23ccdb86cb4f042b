"""Everything that needs a GPU, in one call of at most eight minutes: is it right, is it fast?

    python -m experiments.speed.gpu_check                           all sections
    python -m experiments.speed.gpu_check --only fetch,graph        these sections
    python -m experiments.speed.gpu_check --checkpoint DIR          with a real model, too

Needs a CUDA GPU with 24 GB of free memory (80 GB for the long contexts) and 100 GB of host memory.
Every section is a process of its own with a time limit: if one crashes, hangs or fails, the others
still run. Results are printed at once and written to gpu_check.json and gpu_check.svg in the
directory --out. The exit status is 1 if any section failed.

The model has Llama-3.1-8B's shape and random weights, in bfloat16. Caches are filled directly with
random keys and values, except in the section "prefill". A floor is the time of reading once all
weights that a step needs, at the bandwidth of a copy on the device, plus the time of the fetched
bytes, at the bandwidth of a copy from pinned memory.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.speed import clock
from experiments.speed.gpu_common import RESULTS, SIZES
from experiments.speed.gpu_correct import fetch, small, sync
from experiments.speed.gpu_speed import bandwidth, checkpoint, decode, graph, prefill
from experiments.svg import line_plot, short

ROOT = Path(__file__).resolve().parents[2]
LEAST = 19                  # seconds; with less left, a section is not started

# ---------------------------------------------------------------------------------- sections

def decoding(n):
    return lambda options: decode(n, options)

def this_module(*arguments):
    """The command that runs this module in another process."""
    return [sys.executable, "-m", "experiments.speed.gpu_check", *map(str, arguments)]

def sanitizer():
    """The command that runs the section "small" under compute-sanitizer; None if it is missing."""
    name = "compute-sanitizer"
    tool = shutil.which(name) or shutil.which("/usr/local/cuda/bin/" + name)
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    return tool and [tool, *options, *this_module("--section", "small")]

def gpu_tests():
    """The command that runs the tests that need a GPU."""
    names = "(cuda or gpu or in_flight or graph) and not gpu_check"
    return [sys.executable, "-m", "pytest", "-q", "-rs", "-k", names]

# name: (seconds at most, function of the options, or a function that gives a command).
# The most important ones come first, because the total time is limited.
SECTIONS = {
    "bandwidth": (40, bandwidth),
    "fetch": (40, fetch),
    "sync": (40, sync),
    "decode-128K": (100, decoding(131072)),
    "decode-8K": (45, decoding(8192)),
    "graph": (75, graph),
    "decode-256K": (75, decoding(262144)),
    "prefill": (150, prefill),
    "checkpoint": (60, checkpoint),
    "decode-32K": (45, decoding(32768)),
    "tests": (90, gpu_tests),
    "small": (30, small),
    "sanitizer": (70, sanitizer),
}
COMMANDS = (gpu_tests, sanitizer)

def run_section(name, seconds, file, checkpoint):
    """Run a section in a process group of its own: "ok", "failed", "out of time", "left out"."""
    function = SECTIONS[name][1]
    command = this_module("--section", name, "--seconds", seconds)
    if checkpoint:
        command += ["--checkpoint", str(checkpoint)]
    if function in COMMANDS:
        command = function()
    if command is None:
        return "left out: the tool is not installed"
    environment = {**os.environ, "GPU_CHECK_FILE": str(file), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return "failed" if process.wait(seconds) else "ok"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

def everything(names, minutes, out, checkpoint=None):
    """Run the sections one after the other, write the results; returns the exit status."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    setup = clock.setup("cuda")
    print("{command}\n{machine}, torch {torch}".format(**setup), flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "section.json"
        for name in names:
            left = int(60 * minutes - (time.monotonic() - start))
            results[name] = one_section(name, left, file, checkpoint)
            text = json.dumps({**setup, "sections": results}, indent=1)
            (out / "gpu_check.json").write_text(text + "\n")
    rows = [row for result in results.values() for row in result.get("rows", [])]
    print_targets(rows)
    plot(rows, out / "gpu_check.svg")
    outcomes = {name: result["outcome"] for name, result in results.items()}
    print(f"\n{time.monotonic() - start:.0f} s; "
          + ", ".join(f"{name} {outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome in ("failed", "out of time") for outcome in outcomes.values()))

def one_section(name, left, file, checkpoint):
    """Run one section if `left` seconds suffice -> its results, with "outcome" and "took"."""
    seconds = min(SECTIONS[name][0], left)
    print(f"\n== {name}, at most {seconds} s", flush=True)
    file.unlink(missing_ok=True)
    start = time.monotonic()
    outcome = "left out: no time"
    if seconds > LEAST:
        outcome = run_section(name, seconds, file, checkpoint)
    took = time.monotonic() - start
    print(f"== {name}: {outcome}, {took:.0f} s", flush=True)
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError):
        result = {}
    return {**result, "outcome": outcome, "took": took}

# ----------------------------------------------------------------------------------- results

def print_targets(rows):
    """Print the ratios that are aimed at, as far as they were measured."""
    ms = {(row["tokens"], row["variant"]): row["ms"] for row in rows}
    floors = {(row["tokens"], row["variant"]): row["floor"] for row in rows}
    print("\n== targets")

    def show(claim, above, below, target):
        if above is not None and below is not None:
            print(f"  {claim:72} {above / below:7.2f}   {target}")

    names = dict.fromkeys(name for _, name in ms if name.startswith("SentenceKV"))
    for name in names:
        at = {n << 10: ms.get((n << 10, name)) for n in (8, 32, 128, 256)}
        show(f"{name}: 256K / 8K", at[256 << 10], at[8 << 10], "at most 1.10")
        for n in (128 << 10, 256 << 10):
            few = ms.get((n, "dense, 1024 tokens"))
            show(f"{name}: over 1024 dense tokens, {short(n)}", at[n], few, "at most 1.15")
        for n in (32 << 10, 128 << 10):
            both = [ms.get((n, "dense, SDPA")), ms.get((n, "dense, matmul"))]
            best = min((t for t in both if t is not None), default=None)
            show(f"dense over {name}, {short(n)}", best, at[n], "above 1")
        n = 128 << 10
        offloaded = ms.get((n, "dense, offloaded"))
        show(f"dense offloaded over {name}, {short(n)}", offloaded, at[n], "at least 20")
        if name.endswith(", graph"):
            show(f"{name}: over its floor, {short(n)}", at[n], floors.get((n, name)),
                 "at most 1.35")

def plot(rows, path):
    lines = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        lines.setdefault(row["variant"], []).append((row["tokens"], row["ms"]))
    if lines:
        line_plot(lines, path, f"a decode step, {SIZES.shape}", "ms")

# ------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or ROOT / "gpu_check_results")
    p.add_argument("--only", metavar="NAME,...", default=",".join(SECTIONS),
                   help="sections, in this order: " + ", ".join(SECTIONS))
    p.add_argument("--minutes", type=float, default=7.8, help="for all sections; default 7.8")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="of a real model")
    p.add_argument("--out", type=Path, default=out, help="directory of the results")
    p.add_argument("--section", help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=int, default=60, help=argparse.SUPPRESS)
    return p

def main(argv=None):
    """The command; argv: its arguments. Returns the exit status."""
    options = parser().parse_args(argv)
    names = options.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"error: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}",
              file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: no CUDA device: there is nothing to check", file=sys.stderr)
        return 1
    if not options.section:
        return everything(names, options.minutes, options.out, options.checkpoint)
    clock.disable_cudnn_attention("cuda")
    SECTIONS[options.section][1](options)               # may raise
    return int(not all(RESULTS.get("checks", {}).values()))

if __name__ == "__main__":
    raise SystemExit(main())
