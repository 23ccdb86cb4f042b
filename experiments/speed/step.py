"""The decode step of one layer, with SentenceKV and with dense attention.

    python -m experiments.speed.step                8K to 128K tokens, Llama-3.1-8B's shape
    python -m experiments.speed.step --parts        the same, with the parts of each step

Caches are filled directly with random keys and values, in sentences of 20 tokens on average. All
variants take turns; figures are medians with the quartiles in brackets. The time of SentenceKV
contains the layer's share of begin(), which runs once per forward for all layers of the shape.
The copy floor is the time of copying what a step has to touch: all semantic vectors, and keys and
values of as many tokens as the budget has.
"""
import itertools
from statistics import median

import torch
import torch.nn.functional as F

from experiments.shapes import SHAPES
from experiments.speed import command
from experiments.speed.clock import Variant, interleaved
from experiments.speed.dense import folded, matmul
from experiments.speed.filled import SharedMemory, filled, made_up_tokens, variants
from experiments.speed.parts import parts_of
from experiments.svg import short
from extras.zero_copy import best_pool
from model import Config

def sdpa(q, k, v):
    """Attention of one token, as most people write it."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

def decode_steps(config, n, options):
    """The variants on n tokens: {name: Variant}, and the caches of SentenceKV: {name: cache}."""
    H, d, device = config.num_key_value_heads, config.head_dim, options.device
    group = config.num_attention_heads // H
    make = dict(dtype=torch.bfloat16, device=device)
    k = torch.randn(1, H, n, d, **make)
    v = torch.randn(1, H, n, d, **make)
    new = torch.randn(1, H, 1, d, **make)
    queries = itertools.cycle(torch.randn(64, 1, H * group, 1, d, **make))
    steps, caches = {}, {}

    def add_dense(name, attention):
        steps[name] = Variant(lambda: attention(next(queries), k, v))

    def add_sentence(name, cache):
        text = itertools.cycle(made_up_tokens(4096, seed=1).to(device).split(1, dim=1))
        caches[name] = cache
        steps[name] = Variant(
            step=lambda: cache.attend(0, next(queries), new, new),
            before=lambda: cache.begin(next(text)))

    add_dense("dense, SDPA (GQA)", sdpa)
    add_dense("dense, SDPA (heads folded)", folded)
    add_dense("dense, matmul", matmul)
    memory, pool = SharedMemory(0), best_pool(k.device)
    for name, settings in variants(options.budget, options.variants).items():
        add_sentence(name, filled(k, v, group, memory=memory, host_pool=pool, **settings))
    return steps, caches

def copy_floor(cache, budget):
    """A Variant that copies what a decode step of one layer has to touch."""
    vectors = cache.layers[0].vectors.clone()                         # (1, H, S, w)
    _, _, H, _, d = cache.layers[0].pool.kv.shape
    kv = torch.randn(budget, H, 2, d, dtype=vectors.dtype, pin_memory=vectors.is_cuda)
    pairs = [(x, torch.empty_like(x, device=vectors.device)) for x in (vectors, kv)]
    return Variant(lambda: [to.copy_(x, non_blocking=True) for x, to in pairs])

def measure_length(config, n, options, report):
    """Measure all variants on n tokens -> {name: median ms}."""
    steps, caches = decode_steps(config, n, options)
    floors = {name: f"copy floor, {cache.settings.rank}" for name, cache in caches.items()}
    for name, floor in floors.items():
        steps[floor] = copy_floor(caches[name], options.budget)
    times, begins = interleaved(steps, options.rounds, options.device)
    layers = config.num_hidden_layers
    totals = {name: [step + begin / layers for step, begin in zip(times[name], begins[name])]
              for name in times}
    ms = {name: median(total) for name, total in totals.items()}
    best = min(t for name, t in ms.items() if name.startswith("dense"))
    for name, total in totals.items():
        note, more = "", {"times_best_dense": best / ms[name]}
        if name in caches:
            begin = median(begins[name])
            more |= {"begin": begin, **caches[name].memory()}
            more["times_copy_floor"] = ms[name] / ms[floors[name]]
            note = (f"{best / ms[name]:6.1f} x the best dense, {more['times_copy_floor']:4.1f} x "
                    f"its copy floor; begin() {begin:.2f} ms / {layers}")
        report.add(n, name, total, note, **more)
    for name in caches if options.parts else []:
        variant = steps[name]
        report.parts(n, name, *parts_of(lambda: (variant.before(), variant.step()),
                                        options.device))
    return {name: ms[name] for name in caches}

def measure(options, report):
    config = Config(**SHAPES[options.shape])
    print(f"one layer of {options.shape}: {config.num_attention_heads} query heads, "
          f"{config.num_key_value_heads} KV heads of {config.head_dim}")
    ms = {}
    for n in sorted(options.lengths):
        print(f"\n{short(n)} tokens")
        ms[n] = measure_length(config, n, options, report)
    shortest, longest = min(ms), max(ms)
    for name in ms[longest] if longest > shortest else []:
        ratio = ms[longest][name] / ms[shortest][name]
        print(f"{name}: {short(longest)} takes {ratio:.2f} times as long as {short(shortest)}")

def main(argv=None):
    """The command; argv: its arguments. Returns the exit status."""
    return command.run(measure, argv, __doc__, shape="llama-3.1-8b", lengths="8K,32K,64K,128K",
                       rounds=40, quick=dict(shape="tiny", lengths="2K", rounds=3))

if __name__ == "__main__":
    raise SystemExit(main())
