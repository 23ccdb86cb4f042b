"""How long decode steps and prompts take with SentenceKV and with dense caches, all in one run.

    python experiments/speed.py                          one layer of Llama-3.1-8B's shape, 8K to 128K tokens
    python experiments/speed.py --parts                  the same, and each step told in parts
    python experiments/speed.py --prefill                reading prompts of 4K and 8K: what SentenceKV adds
    python experiments/speed.py --model llama-3.2-1b     decode steps of a whole model with random weights
    python experiments/speed.py --quick                  a little of all of it, in under a minute

For decode steps the caches are filled directly with random K and V (reading 128K tokens with exact attention would take
hours on a CPU and is not what is measured). Sentences have 20 tokens on average. All variants take turns; the figures
are medians over the rounds, with the span of the middle half; a ratio is that of medians. The copy floor is the time of
copying what the step must touch: all vectors, plus K and V of as many tokens as the budget has.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import median
from textwrap import fill

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import measure
from experiments.measure import SPARE, filled, interleaved, made_up_flags, made_up_tokens, options, summary
from experiments.parts import Parts, parts_of
from experiments.shapes import SHAPES, random_llama
from experiments.svg import line_plot, short
from model import Config, DenseKV, Llama, available_memory, demand
from sentencekv import SentenceKV

class Report:
    """What was measured, printed at once and kept for --json and --svg."""

    def __init__(self, args):
        self.args, self.rows, self.setup = args, [], measure.setup(args.device)
        print("{command}\n{machine}, {cores} cores, {threads} threads, torch {torch}, bfloat16".format(**self.setup))
        print(f"budget {args.budget}", flush=True)

    def add(self, mode, tokens, variant, times, told="", **more):
        row = {"mode": mode, "tokens": tokens, "variant": variant, **summary(times), **more}
        self.rows.append(row)
        print(f"  {variant:28} {row['ms']:9.2f} ms  ({row['low']:.2f} to {row['high']:.2f}) {told}", flush=True)

    def parts(self, tokens, variant, ms, moved):
        """ms {part: ms per step, "in all" among them}."""
        self.rows.append({"mode": "parts", "tokens": tokens, "variant": variant, "parts": ms, "bytes_moved": moved})
        whole = ms["in all"]
        split = ", ".join(f"{name} {t:.2f} ({t / whole:.0%})" for name, t in ms.items() if name != "in all")
        print(fill(f"{variant}, {whole:.2f} ms with the timers: {split}; {moved / 1e6:.2f} MB moved", 116,
                   initial_indent="  ", subsequent_indent="      "), flush=True)

    def write(self):
        if self.args.json:
            Path(self.args.json).write_text(json.dumps({**self.setup, "results": self.rows}, indent=1) + "\n")

    def plot(self):
        """One file for each mode, of the name asked for if there is but one."""
        modes = list(dict.fromkeys(row["mode"] for row in self.rows if "ms" in row))
        for mode in modes if self.args.svg else []:
            lines, path = {}, Path(self.args.svg)
            for row in self.rows:
                if row["mode"] == mode:
                    lines.setdefault(row["variant"], []).append((row["tokens"], row["ms"]))
            path = path if len(modes) == 1 else path.with_stem(f"{path.stem}-{mode.replace(' ', '-')}")
            line_plot(lines, path, mode, "ms")

# -------------------------------------------------------------------------------------------- one layer, decoding

def layer_variants(c, n, args):
    """({name: (step, steps in a cycle, what comes before a step)}, {name: bytes}) of one layer on n tokens."""
    H, d, device, turn = c.num_key_value_heads, c.head_dim, args.device, iter(range(10**9))
    G = c.num_attention_heads // H
    k, v = (torch.randn(1, H, n, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(64, 1, H * G, 1, d, dtype=k.dtype, device=device)            # another query every time
    new, hosts = torch.randn(1, H, 1, d, dtype=k.dtype, device=device), measure.Hosts(0)
    text = made_up_tokens(SPARE, seed=1).to(device)
    steps = {
        "dense, SDPA (GQA)": lambda: F.scaled_dot_product_attention(q[next(turn) % 64], k, v, enable_gqa=True),
        "dense, SDPA (heads folded)": lambda: measure.folded(q[next(turn) % 64], k, v),
        "dense, matmul": lambda: measure.matmul(q[next(turn) % 64], k, v)}
    steps, caches = {name: (step, 1, None) for name, step in steps.items()}, {}
    for name, settings in options(args.budget).items():
        cache = caches[name] = filled(k, v, G, hosts=hosts, **settings)
        i = iter(range(10**9))                                                   # the text is read from its start
        steps[name] = (lambda cache=cache: cache.attend(0, q[next(turn) % 64], new, new),
                       settings.get("refresh", 1),
                       lambda cache=cache, i=i: cache.begin(text[:, (t := next(i) % SPARE):t + 1]))
    kv = torch.randn(args.budget, 1, H, 2, d, dtype=k.dtype, pin_memory=k.is_cuda)
    for name in ("mean", "spread"):
        vectors = caches[f"SentenceKV, {name}"].layers[0].vectors.clone()
        floor = [(x, torch.empty_like(x, device=device)) for x in (vectors, kv)]
        steps[f"copy floor, {name}"] = lambda f=floor: [b.copy_(a, non_blocking=True) for a, b in f], 1, None
    return steps, {name: cache.memory() for name, cache in caches.items()}

def layer(report, args):
    """One layer's decode step."""
    c, own = Config(**SHAPES[args.shape]), {}
    print(f"one layer of {args.shape}: {c.num_attention_heads} query heads, {c.num_key_value_heads} KV heads of "
          f"{c.head_dim}; caches filled directly with random K and V, no prefill")
    for n in args.lengths or ([4096] if args.quick else [8192, 32768, 65536, 131072]):
        print(f"\n{short(n)} tokens")
        steps, memory = layer_variants(c, n, args)
        times, before = interleaved(steps, args.rounds or (3 if args.quick else 40), args.device)
        ms = {name: median(t) for name, t in times.items()}
        best = min(t for name, t in ms.items() if name.startswith("dense"))
        for name, t in times.items():
            told = f"{best / ms[name]:6.1f} x the best dense"
            if name in memory:
                floor = ms["copy floor, mean" if "mean" in name else "copy floor, spread"]
                told += (f", {ms[name] / floor:4.1f} x its copy floor; "
                         f"begin(), once for all layers, {median(before[name]):.2f}")
            told = told if "floor, " not in name else ""
            report.add("one layer", n, name, t, told, times_best_dense=best / ms[name], **memory.get(name, {}))
            own.setdefault(name, {})[n] = ms[name]
        for name in memory if args.parts else []:
            step, cycle, begin = steps[name]
            report.parts(n, name, *parts_of(lambda: (begin(), step()), cycle, args.device))
    for name, m in own.items():
        if len(m) > 1:
            print(f"{name:28} {short(min(m))} to {short(max(m))} tokens: {m[max(m)] / m[min(m)]:.2f} times as long")

# ------------------------------------------------------------------------------------------ whole model, decoding

def random_model(shape, device, **changes):
    """A bfloat16 model; ValueError if it does not fit."""
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in Llama(Config(**{**SHAPES[shape], **changes})).parameters())
    free = torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else available_memory()
    demand(free is None or size < free, f"{shape} takes {size / 1e9:.1f} GB, {(free or 0) / 1e9:.1f} are free")
    return random_llama(shape, device, torch.bfloat16, max_position_embeddings=1 << 24, **changes)

def whole(report, args):
    """A whole model's decode step."""
    shape = args.model or "tiny"
    model, free = random_model(shape, args.device), available_memory()
    weights = sum(p.nbytes for p in model.parameters())
    print(f"\n{shape} with random weights ({weights / 1e9:.2f} GB); caches filled directly with random K and V, no "
          "prefill")
    if not model.embed_tokens.weight.is_cuda:
        print("dense offloaded is left out: on a CPU it is the same as dense resident")
    for n in args.lengths or ([4096] if args.quick else [8192, 32768, 131072]):
        need = measure.needed(model.config, n, 2, len(options(args.budget)))
        print(f"\n{short(n)} tokens", flush=True)
        if free is not None and need > free:
            print(f"  left out: takes at least {need / 1e9:.1f} GB, {free / 1e9:.1f} are free")
            continue
        decode(report, model, n, weights, args)

def decode(report, model, n, weights, args):
    caches, shared = measure.whole_model(model, n, args.budget)
    cycle = lambda name: options(args.budget).get(name, {}).get("refresh", 1)
    steps = {name: (measure.decoding(model, cache, name), cycle(name), None) for name, cache in caches.items()}
    times, _ = interleaved(steps, args.rounds or (2 if args.quick else 9), args.device)
    ms = {name: median(t) for name, t in times.items()}
    best = min(ms["dense, SDPA"], ms["dense, matmul"])
    print(f"  {shared}" if args.device == "cpu" else f"  {shared}, pinned")
    for name, t in times.items():
        memory, more = caches[name].memory(), {}
        told = (f"{1e3 / ms[name]:7.2f} tokens/s, {best / ms[name]:5.2f} x dense; cache {memory['device'] / 1e6:.0f} "
                f"MB on the device, {memory['host'] / 1e6:.0f} on the host")
        if torch.device(args.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            extra = -torch.cuda.memory_allocated()
            steps[name][0]()
            more["peak"] = weights + memory["device"] + extra + torch.cuda.max_memory_allocated()
            told += f"; peak (weights, cache, temporary) {more['peak'] / 1e9:.2f} GB"
        report.add("whole model", n, name, t, told, times_best_dense=best / ms[name], **memory, **more)
    for name in [name for name in caches if not name.endswith("graph")]:         # timers see nothing in a graph
        ms, moved = parts_of(steps[name][0], steps[name][1], args.device, 2)
        if args.parts:
            report.parts(n, name, ms, moved)
        elif moved:
            print(f"  {name}: {moved / 1e6:.2f} MB moved per step")

# ------------------------------------------------------------------------------------------------------- prompts

def prefill(report, args):
    """What SentenceKV adds to reading a prompt."""
    shape, layers = args.shape if args.shape_given else "llama-3.2-1b", (2, 1)
    lengths = args.lengths or [4096, 8192]
    if args.quick:
        shape, layers, lengths = "tiny", (1,), args.lengths or [1024]
    for L in layers:
        model = random_model(shape, args.device, num_hidden_layers=L)
        for n in lengths:
            print(f"\nreading {short(n)} tokens, {shape} cut to {L} layers")
            V = model.config.vocab_size
            tokens, flags = made_up_tokens(n, vocabulary=V).to(args.device), made_up_flags(V)
            new = {"dense": DenseKV, **{name: lambda s=s: SentenceKV(flags, **s)
                                        for name, s in options(args.budget).items()
                                        if not {"refresh", "lookahead"} & s.keys()}}
            steps = {name: (lambda f=f: model.prefill(tokens, f()), 1, None) for name, f in new.items()}
            times, _ = interleaved(steps, args.rounds or (2 if args.quick else 5), args.device, warm=1)
            for name, t in times.items():
                over = summary([100 * (a / b - 1) for a, b in zip(t, times["dense"])])      # round by round
                told = f"{over['ms']:+6.1f}% ({over['low']:+.1f} to {over['high']:+.1f}) against dense"
                report.add(f"prefill {L} layers", n, name, t, told, overhead_percent=over["ms"])
            for name, (step, _, _) in steps.items():
                report.parts(n, name, *parts_of(step, 1, args.device, 1))

# ------------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def parse(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a little of everything, for a look whether it runs")
    p.add_argument("--parts", action="store_true", help="tell each step in parts: ranking, fetch, attention, rest")
    p.add_argument("--prefill", action="store_true", help="measure reading, not decoding")
    p.add_argument("--model", metavar="SHAPE", help="measure a whole model with random weights")
    p.add_argument("--shape", metavar="SHAPE", help="for one layer (llama-3.1-8b) or --prefill (llama-3.2-1b)")
    p.add_argument("--lengths", help="numbers of tokens, as in 8K,32K,100000")
    p.add_argument("--budget", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=0, help="measurements of each variant; 0: as many as suit the mode")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", metavar="FILE", help="write all figures there")
    p.add_argument("--svg", metavar="FILE", help="plot milliseconds against tokens; of several modes, a file each")
    a = p.parse_args(argv)
    a.shape_given, a.shape = a.shape is not None, a.shape or "llama-3.1-8b"
    for name in {a.shape, a.model or a.shape}:
        demand(name in SHAPES, f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    sizes = [x.strip().upper() for x in a.lengths.split(",")] if a.lengths is not None else []
    demand(all(x.removesuffix("K").isdecimal() for x in sizes), f"--lengths {a.lengths}: not numbers as in 8K,32768")
    a.lengths = [int(x.removesuffix("K")) * (1024 if x.endswith("K") else 1) for x in sizes]
    demand(all(256 <= n <= 1 << 22 for n in a.lengths), "--lengths must be from 256 to 4096K")
    demand(0 <= a.rounds <= SPARE // 8 - 16, f"--rounds must be from 0 to {SPARE // 8 - 16}, got {a.rounds}")
    SentenceKV(made_up_flags(), budget=a.budget)                                 # says what is wrong with it
    try:
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {a.device} cannot be used: {str(e).splitlines()[0]}") from e
    for file in filter(None, (a.json, a.svg)):
        demand(Path(file).parent.is_dir(), f"{file}: there is no such directory")
    return a

def main(argv=None):
    """Returns the exit status: 0; 2, after one line that says why, for arguments that cannot work."""
    try:
        args = parse(argv)
        report = Report(args)
        measure.fair(args.device)
        chosen = [f for f, wanted in ((layer, not args.prefill and not args.model), (whole, args.model),
                                      (prefill, args.prefill)) if wanted]
        args.parts = args.parts or args.quick
        for run in [layer, whole, prefill] if args.quick and chosen == [layer] else chosen:
            run(report, args)
            report.write()
        report.plot()
    except (ValueError, MemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    raise SystemExit(main())
