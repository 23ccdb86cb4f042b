"""Everything that needs a GPU, in one call of at most eight minutes: is it right, and how fast is it.

    python experiments/gpu_check.py                      all of it
    python experiments/gpu_check.py --only fetch,graph   these parts of it
    python experiments/gpu_check.py --list               their names

Needs one CUDA GPU with 24 GB free (100 GB for the long contexts) and 100 GB of host memory. Every section is a process
of its own with a time limit: if it crashes, hangs or fails, that is told and the others go on. Results are printed at
once, and all of them are in gpu_check.json in the directory given by --out. Exit status 1 if any section failed.

Model: Llama-3.1-8B's shape with random weights, bfloat16; caches filled directly with random K and V (but for the
section "prefill"); budget 1024, everything kept, sentences of 20 tokens on average. A floor is the time of reading
once all weights that a step needs at the bandwidth of a copy on the device (bytes read and written), plus that of the
fetched bytes at the bandwidth of a copy from pinned memory.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import gpu_sections, measure
from experiments.gpu_sections import SHAPE, bandwidth, decode, fetch, graph, prefill, small
from experiments.svg import line_plot, short

# -------------------------------------------------------------------------------------------------------- sections

def sanitizer():
    """The command that runs small() under compute-sanitizer, or None."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    return tool and [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9",
                     sys.executable, __file__, "--section", "small"]

decoding = lambda n: lambda seconds: decode(n, seconds)
SECTIONS = {  # name: (seconds at most, function of the seconds or command); what matters most comes first
    "bandwidth": (40, bandwidth),
    "fetch": (60, fetch),
    "tests": (100, [sys.executable, "-m", "pytest", "-q", "-rs", "-k",
                    "(cuda or gpu or in_flight or graph) and not gpu_check"]),
    "decode-128K": (100, decoding(131072)),
    "decode-8K": (45, decoding(8192)),
    "graph": (60, graph),
    "sanitizer": (70, sanitizer),
    "decode-256K": (75, decoding(262144)),
    "decode-32K": (45, decoding(32768)),
    "prefill": (170, prefill),
}

LEAST = 19                                              # seconds; with less it is not worth starting

def run_section(name, seconds, file):
    """Run it in a process group of its own: "ok", "failed" or "out of time"."""
    run = SECTIONS[name][1]
    command = run() if run is sanitizer else run
    if command is None:
        return "left out: no such tool here"
    if not isinstance(command, list):
        command = [sys.executable, __file__, "--section", name, "--seconds", str(seconds)]
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

def targets(results):
    """Print what the figures say about the targets: ratios of medians of one section, or of two contexts."""
    rows = {(r["tokens"], r["variant"]): r["ms"] for x in results.values() for r in x.get("rows", [])}
    floors = {(r["tokens"], r["variant"]): r["floor"] for x in results.values() for r in x.get("rows", [])}
    lines, at = [], lambda n, name: rows.get((n, name), float("nan"))
    dense = lambda n: min(at(n, "dense, SDPA"), at(n, "dense, matmul"))
    for name in dict.fromkeys(name for _, name in rows if name.startswith("Sentence")):
        lines += [(f"{name}: 256K / 8K", at(262144, name) / at(8192, name), "at most 1.10"),
                  *((f"{name}: against 1024 tokens of dense, {short(n)}", at(n, name) / at(n, "dense, 1024 tokens"),
                     "at most 1.15 (look-ahead 1.10)") for n in (131072, 262144)),
                  *((f"{name}: dense / ours, {short(n)}", dense(n) / at(n, name), "above 1") for n in (32768, 131072)),
                  (f"{name}: offloaded / ours, 128K", at(131072, "dense, offloaded") / at(131072, name), "at least 20")]
        if name.endswith("graph"):
            floor = floors.get((131072, name), float("nan"))
            lines += [(f"{name}: times its floor, 128K", at(131072, name) / floor, "at most 1.35")]
    print("\n== targets")
    for what, ratio, aim in lines:
        if ratio == ratio:                                                       # not NaN: was measured
            print(f"  {what:72} {ratio:7.2f}   {aim}")

def everything(only, minutes, out):
    """All sections, one after the other; the exit status."""
    start, results, file = time.monotonic(), {}, Path(tempfile.mkdtemp()) / "section.json"
    out.mkdir(parents=True, exist_ok=True)
    setup = measure.setup("cuda")
    print("{command}\n{machine}, torch {torch}".format(**setup), flush=True)
    for name in only:
        seconds = min(SECTIONS[name][0], int(60 * minutes - (time.monotonic() - start)))
        print(f"\n== {name}, {seconds} s at most", flush=True)
        file.unlink(missing_ok=True)
        begun = time.monotonic()
        outcome = run_section(name, seconds, file) if seconds > LEAST else "left out: no time left"
        try:
            results[name] = json.loads(file.read_text())
        except (OSError, ValueError):
            results[name] = {}
        results[name] |= {"outcome": outcome, "took": time.monotonic() - begun}
        print(f"== {name}: {outcome}, {time.monotonic() - begun:.0f} s", flush=True)
        (out / "gpu_check.json").write_text(json.dumps({**setup, "sections": results}, indent=1) + "\n")
    targets(results)
    lines = {}
    for row in sorted((r for x in results.values() for r in x.get("rows", [])), key=lambda r: r["tokens"]):
        lines.setdefault(row["variant"], []).append((row["tokens"], row["ms"]))
    if lines:
        line_plot(lines, out / "gpu_check.svg", f"a decode step, {SHAPE}", "ms")
    print(f"\n{time.monotonic() - start:.0f} s; " + ", ".join(f"{name} {x['outcome']}" for name, x in results.items()))
    return int(any(x["outcome"] in ("failed", "out of time") for x in results.values()))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", metavar="NAME,...", default=",".join(SECTIONS), help="sections, in this order")
    p.add_argument("--list", action="store_true", help="print the names of all sections")
    p.add_argument("--minutes", type=float, default=7.8, help="for all of it")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "gpu_check_results"))
    p.add_argument("--section", help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=int, default=60, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.list:
        print("\n".join(SECTIONS))
        return 0
    if unknown := [name for name in a.only.split(",") if name not in SECTIONS]:
        print(f"error: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check here", file=sys.stderr)
        return 1
    if not a.section:
        return everything(a.only.split(","), a.minutes, a.out)
    measure.fair("cuda")
    (small if a.section == "small" else SECTIONS[a.section][1])(a.seconds)      # a traceback is a failure
    return int(not all(gpu_sections.RESULTS.get("checks", {}).values()))

if __name__ == "__main__":
    raise SystemExit(main())
