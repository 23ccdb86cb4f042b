"""The decode step of a whole model, with SentenceKV and with dense caches.

    python -m experiments.speed.model               8K, 32K and 128K tokens, Llama-3.2-1B's shape

The model has random weights, and the caches are filled directly with random keys and values, in
sentences of 20 tokens on average. All variants take turns; figures are medians with the quartiles
in brackets. If memory does not suffice, layers share buffers of keys and values; the output says
how many there are. These are larger than the caches of a CPU, so this changes no time.
"""
from statistics import median

import torch

from experiments.speed import command
from experiments.speed.clock import Variant, interleaved, is_cuda
from experiments.speed.filled import (decoding, memory_needed, names_on, random_model,
                                      whole_model)
from experiments.speed.parts import parts_of
from experiments.svg import short
from extras.check_memory import available_memory

def measure_length(model, n, options, report):
    """Measure all variants on n tokens."""
    names = names_on(options.device, options.variants)
    caches, note = whole_model(model, n, options.budget, names)
    print(f"  {note}", flush=True)
    steps = {name: Variant(decoding(model, cache, name)) for name, cache in caches.items()}
    times, _ = interleaved(steps, options.rounds, options.device)
    ms = {name: median(t) for name, t in times.items()}
    best = min(ms["dense, SDPA"], ms["dense, matmul"])
    for name, t in times.items():
        memory, more = caches[name].memory(), {}
        note = (f"{1e3 / ms[name]:7.2f} tokens/s, {best / ms[name]:5.2f} x dense; cache: "
                f"{memory['device'] / 1e6:.0f} MB on the device, "
                f"{memory['host'] / 1e6:.0f} MB on the host")
        if is_cuda(options.device):
            more["peak"] = peak(model, memory, steps[name].step)
            note += f"; peak with weights {more['peak'] / 1e9:.2f} GB"
        report.add(n, name, t, note, times_best_dense=best / ms[name], **memory, **more)
    if options.parts:
        for name in caches:
            if not name.endswith(", graph"):            # timers see nothing in a graph
                report.parts(n, name, *parts_of(steps[name].step, options.device, steps=2))

def peak(model, memory, step):
    """Bytes on a CUDA device during a step: weights, cache and temporary tensors."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    temporary = torch.cuda.max_memory_allocated() - before
    return sum(p.nbytes for p in model.parameters()) + memory["device"] + temporary

def measure(options, report):
    model = random_model(options.shape, options.device)
    weights = sum(p.nbytes for p in model.parameters())
    print(f"{options.shape} with random weights, {weights / 1e9:.2f} GB")
    if not is_cuda(options.device):
        print("dense offloaded is left out: on a CPU it is the same as dense")
    free = available_memory()
    for n in options.lengths:
        print(f"\n{short(n)} tokens", flush=True)
        needed = memory_needed(model.config, n, len(options.variants))
        if free is not None and needed > free:
            print(f"  left out: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            continue
        measure_length(model, n, options, report)

def main(argv=None):
    """The command; argv: its arguments. Returns the exit status."""
    return command.run(measure, argv, __doc__, shape="llama-3.2-1b", lengths="8K,32K,128K",
                       rounds=9, quick=dict(shape="tiny", lengths="2K", rounds=2))

if __name__ == "__main__":
    raise SystemExit(main())
