"""Sections of gpu_check that ask: how fast is it? Each takes the options of gpu_check."""
import time

import torch

from experiments.speed.checkpoint import all_steps, load, prompt
from experiments.speed.clock import Variant, interleaved, timed
from experiments.speed.filled import (DEFAULT, decoding, made_up_flags, made_up_tokens,
                                      weights_read, whole_model)
from experiments.speed.gpu_common import (SIZES, bandwidths, check, floor_of, model_8b, rate, row,
                                          save)
from experiments.speed.gpu_correct import (checkpoint_tokens, fetched, graph_tokens, new_pool,
                                           pools)
from experiments.speed.parts import Parts, parts_of
from experiments.svg import short
from extras.zero_copy import best_pool, works
from extras.check_memory import available_memory
from sentencekv import RANKS, SentenceKV, sentence_flags

def bandwidth(options):
    """Copies; and fetching keys and values of single tokens and heads, 512 bytes each."""
    print(f"  {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    speed = bandwidths()
    print("  " + ", ".join(f"{name} {gbs:.1f} GB/s" for name, gbs in speed.items()), flush=True)
    save(**speed, zero_copy=works(torch.device("cuda")))
    kv = torch.ones(8, SIZES.stored, 2, 128, dtype=torch.bfloat16)
    for name, pool_class in pools().items():
        pool, found = new_pool(pool_class, kv, "cuda"), {}
        for n in SIZES.fetched:
            slot = torch.randint(SIZES.stored, (1, 8, n // 8), device="cuda")
            out = fetched(pool, slot)
            found[n] = rate(lambda: pool.fetch(slot, out), out.nbytes)
        text = ", ".join(f"{n} rows {gbs:.1f} GB/s" for n, gbs in found.items())
        print(f"  {name}: {text}", flush=True)
        save(**{name: found})

# ------------------------------------------------------------------------------ decode steps

def decode(n, options):
    """Decode steps of the whole model on n tokens; then the parts of the default rule's steps."""
    start, model, speed = time.monotonic(), model_8b(), bandwidths()
    names = [f"SentenceKV, {rank}" for rank in RANKS]
    names += ["dense, SDPA", "dense, matmul", DEFAULT + ", staged"]
    if n == SIZES.long:
        names.append("dense, offloaded")
    caches, note = whole_model(model, n, SIZES.budget, names)
    few, _ = whole_model(model, 1024, SIZES.budget, ["dense, SDPA"])
    caches["dense, 1024 tokens"] = few["dense, SDPA"]
    print(f"  {note}; {time.monotonic() - start:.0f} s to fill the caches", flush=True)
    weights = weights_read(model)
    save(memory={name: cache.memory() for name, cache in caches.items()}, weights=weights)
    steps = {name: decoding(model, cache) for name, cache in caches.items()}
    measure(steps, n, model, speed, start + options.seconds - (50 if n == SIZES.long else 20))
    ms, _ = parts_of(steps[DEFAULT], "cuda", SIZES.repeat)
    text = ", ".join(f"{part} {t:.2f}" for part, t in ms.items())
    print(f"  parts of {DEFAULT}: {text}", flush=True)
    save(parts=ms)
    if n == SIZES.long:
        growth(steps[DEFAULT], caches[DEFAULT], start + options.seconds)

def measure(steps, n, model, speed, until):
    """Let the steps {name: function} take turns; a row for each of them."""
    c, weights = model.config, weights_read(model)
    moved = {name: parts_of(step, "cuda", SIZES.repeat)[1] for name, step in steps.items()}
    if "dense, offloaded" in steps:
        layer = 4 * n * c.num_key_value_heads * c.head_dim
        moved["dense, offloaded"] = c.num_hidden_layers * layer
    repeats = {name: 1 if name == "dense, offloaded" else SIZES.repeat for name in steps}
    found = {name: Variant(step, repeat=repeats[name]) for name, step in steps.items()}
    times, _ = interleaved(found, SIZES.rounds, "cuda", until=until)
    for name, t in times.items():
        row(n, name, t, floor_of(weights, moved[name], speed), moved[name])

def growth(step, cache, end):
    """Generate many tokens in a row: device memory grows by the vectors of new sentences alone."""
    if time.monotonic() > end - 25:
        print(f"  left out, no time: {SIZES.generated} tokens in a row", flush=True)
        return

    def vectors():
        return sum(layer.vectors.nbytes for layer in cache.layers)

    def allocated():
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before, before_all = vectors(), allocated()
    ms = timed(lambda: [step() for _ in range(SIZES.generated)], "cuda")
    more, more_all = vectors() - before, allocated() - before_all
    save(generated={"ms": ms, "vectors grew": more, "allocated grew": more_all})
    check(more_all <= 1.02 * more + (1 << 20),
          f"{SIZES.generated} tokens in {ms / 1e3:.1f} s: vectors grew by {more / 1e6:.2f} MB, "
          f"all that is allocated on the device by {more_all / 1e6:.2f} MB")

def graph(options):
    """Decode steps with and without a CUDA graph: the same tokens, and the time of both."""
    until = time.monotonic() + options.seconds - 15
    model, speed = model_8b(), bandwidths()
    plain, graphed = DEFAULT, DEFAULT + ", graph"
    for n in (SIZES.short, SIZES.long):
        caches, _ = whole_model(model, n, SIZES.budget, [plain, graphed])
        for layer, other in zip(caches[plain].layers, caches[graphed].layers):
            other.vectors.copy_(layer.vectors)          # sums of keys have no fixed order on CUDA
            other.open.copy_(layer.open)
        steps = {name: decoding(model, cache, name) for name, cache in caches.items()}
        graph_tokens(n, steps[plain], steps[graphed])
        moved = parts_of(steps[plain], "cuda", SIZES.repeat)[1]
        found = {name: Variant(step, repeat=SIZES.repeat) for name, step in steps.items()}
        times, _ = interleaved(found, SIZES.rounds, "cuda", until=until)
        floor = floor_of(weights_read(model), moved, speed)
        row(n, graphed, times[graphed], floor, moved)
        row(n, plain + ", beside the graph", times[plain], floor, moved)

# ------------------------------------------------------------------------------------ prompts

class OutOfTime(Exception):
    pass

def roomy(pool_class, slots):
    """Pools that have room for so many slots at once.

    If they grow chunk by chunk, pinned blocks of all sizes are left behind in PyTorch's cache.
    """
    class RoomyPool(pool_class):
        def __init__(self, B, H, d, dtype, device):
            super().__init__(B, H, d, dtype, device)
            self.kv = self.allocate((B, slots, H, 2, d), dtype)

    return RoomyPool

def prefill(options):
    """The prompt of 256K tokens in chunks: time, peak memory, the share of the sentences."""
    end, model = time.monotonic() + options.seconds - 25, model_8b()
    V, n = model.config.vocab_size, SIZES.prompt
    if (available_memory() or 0) < 90e9:
        n //= 2
    tokens, flags = made_up_tokens(n, vocabulary=V).cuda(), made_up_flags(V)
    pool = best_pool(torch.device("cuda"))
    model.prefill(tokens[:, :4096], SentenceKV(flags, host_pool=pool))        # loads libraries
    share = 0.0

    def progress(done, total):
        nonlocal share
        share = done / total
        if time.monotonic() > end:
            raise OutOfTime

    cache = SentenceKV(flags, host_pool=roomy(pool, n + 64))
    torch.cuda.reset_peak_memory_stats()

    def run():
        try:
            model.prefill(tokens, cache, SIZES.chunk, progress)
        except OutOfTime:
            print(f"  out of time after {share:.0%} of {short(n)} tokens and layers", flush=True)

    with Parts("cuda") as parts:
        ms = timed(run, "cuda")
    report_prefill(n, ms / 1e3, share, parts.ms)

def report_prefill(n, seconds, share, ms):
    """Print and save what prefill() has measured. ms: {part: milliseconds}."""
    peak = torch.cuda.max_memory_allocated()
    sentences = sum(t for part, t in ms.items() if part not in ("attention", "reading back")) / 1e3
    save(seconds=seconds, peak=peak, parts=ms, share=share, sentences=sentences / seconds)
    text = ", ".join(f"{part} {t / 1e3:.2f}" for part, t in ms.items())
    print(f"  {seconds:.1f} s, peak with weights {peak / 1e9:.2f} GB; begin and append take "
          f"{sentences:.2f} s, {sentences / seconds:.1%}; in seconds: {text}", flush=True)
    if share == 1:
        check(peak <= 24e9, f"prefill of {short(n)} tokens has a peak of {peak / 1e9:.2f} GB, "
              "24 GB at most")

def checkpoint(options):
    """A real model: the CPU's tokens; decode steps of dense, SentenceKV and transformers."""
    if options.checkpoint is None:
        print("  left out: needs --checkpoint DIR", flush=True)
        return
    until = time.monotonic() + options.seconds - 15
    checkpoint_tokens(options.checkpoint)
    model, tokenizer = load(options.checkpoint, "cuda", torch.bfloat16)
    n = min(SIZES.short, model.config.max_position_embeddings) - 256
    flags, tokens = sentence_flags(tokenizer.token_bytes), prompt(tokenizer, n).cuda()
    found = all_steps(options.checkpoint, model, tokens, flags, SIZES.budget)
    steps = {name: step for name, (step, _) in found.items()}
    ms, peaks = {}, {}
    for name, step in steps.items():
        torch.cuda.reset_peak_memory_stats()
        ms[name] = timed(step, "cuda")                  # the prompt
        peaks[name] = torch.cuda.max_memory_allocated()
    save(prefill_ms=ms, peak=peaks)
    found = {name: Variant(step, repeat=SIZES.repeat) for name, step in steps.items()}
    times, _ = interleaved(found, SIZES.rounds, "cuda", until=until)
    floor = floor_of(weights_read(model), 0, bandwidths())
    for name, t in times.items():
        row(n, name + ", real model", t, floor, 0)
