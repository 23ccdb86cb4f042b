"""The sections of gpu_check.py: what the GPU can do, whether all is right on it, and how fast it is.

Each is a function of the seconds that it may take; it prints what it finds, and keeps it with save().
"""
import json
import os
import time
import traceback
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from experiments import measure
from experiments.measure import (decoding, interleaved, made_up_flags, made_up_tokens, summary, weights_read,
                                 whole_model)
from experiments.parts import Parts, parts_of
from experiments.shapes import random_llama
from experiments.svg import short
from model import available_memory
from sentencekv import HostPool, SentenceKV, device_alias, zero_copy_works

SHAPE, BUDGET, CYCLE = "llama-3.1-8b", 1024, 8          # steps of a variant in turn; options with refresh have 8, too
PROMPT, CHUNK = 1 << 18, 1 << 14                        # tokens of the prompt that is read, and of its pieces
SHORT, LONG, MANY = 8192, 131072, 1000                  # tokens of a context; tokens that are generated in a row
COPIED = 1 << 29                                        # bytes of a copy that is timed
RESULTS = {}                                            # of this section: {name: value}

def save(**results):
    """Keep results, and write them where the parent process looks for them."""
    RESULTS.update(results)
    if os.environ.get("GPU_CHECK_FILE"):
        Path(os.environ["GPU_CHECK_FILE"]).write_text(json.dumps(RESULTS))

def check(ok, what):
    print(f"  {'ok    ' if ok else 'FAILED'}  {what}", flush=True)
    save(checks={**RESULTS.get("checks", {}), what: bool(ok)})

# ------------------------------------------------------------------------------------------------- what it can do

def rate(copy, nbytes, times=8):
    """Median GB/s of copy(), which moves so many bytes; by CUDA events."""
    rates = []
    for _ in range(times + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        copy()
        end.record()
        end.synchronize()
        rates.append(nbytes / start.elapsed_time(end) / 1e6)
    return median(rates[2:])

def bandwidths():
    """GB/s: pinned memory to the device and back, and a copy on the device (bytes read and written)."""
    size = COPIED
    host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    here, there = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return {"to device": rate(lambda: here.copy_(host, non_blocking=True), size),
            "to host": rate(lambda: host.copy_(here, non_blocking=True), size),
            "on device": rate(lambda: there.copy_(here), 2 * size)}

def bandwidth(seconds):
    """Copies, and fetching rows of 512 bytes (K and V of a token and head) in place or by staging."""
    print(f"  {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    speed, works = bandwidths(), zero_copy_works(torch.device("cuda"))
    print("  " + ", ".join(f"{name} {gbs:.1f} GB/s" for name, gbs in speed.items()))
    print(f"  zero copy {'works' if works else 'does NOT work: fetches are staged'}", flush=True)
    save(**speed, zero_copy=works)
    kv = torch.ones(COPIED // 256, 256, dtype=torch.bfloat16, pin_memory=True)   # 1 GB of rows
    seen = device_alias(kv, torch.device("cuda")) if works else None
    for n in (1024, 8192, 32768, 131072):
        rows = torch.randint(len(kv), (n,), device="cuda")
        out = torch.empty(n, 256, dtype=kv.dtype, device="cuda")
        staging = torch.empty(n, 256, dtype=kv.dtype, pin_memory=True)

        def staged():
            torch.index_select(kv, 0, rows.cpu(), out=staging)
            out.copy_(staging, non_blocking=True)
        found = {"staged": rate(staged, out.nbytes)}
        if works:
            found["zero copy"] = rate(lambda: torch.index_select(seen, 0, rows, out=out), out.nbytes)
            words = seen.view(torch.int64), out.view(torch.int64)                # would larger loads be faster?
            found["zero copy, 8 bytes at a time"] = rate(lambda: torch.index_select(words[0], 0, rows, out=words[1]),
                                                         out.nbytes)
        told = ", ".join(f"{name} {gbs:.1f} GB/s" for name, gbs in found.items())
        print(f"  {n:7} rows of 512 bytes: {told}", flush=True)
        save(**{f"{n} rows": found})

# ------------------------------------------------------------------------------------------------------ is it right

def bits(x):
    return x.cpu().view(torch.int16)

def pool_with(kv, device, in_place):
    pool = HostPool(torch.device(device))
    pool.in_place = pool.in_place and in_place
    pool.reserve(0, len(kv), kv)
    pool.write(0, torch.arange(len(kv), device=device)[:, None], kv.to(device))
    return pool

def fetched(pool, slot, kv):
    """What the pool, filled with kv (C, B, H, 2, d), has in slot (B, H, n): (B, H, n, 2, d)."""
    out = torch.zeros(*slot.shape, *kv.shape[3:], dtype=kv.dtype, device=pool.device)
    pool.fetch(0, slot.to(pool.device), out)
    return out

def fetch(seconds):
    """All ways to fetch give the CPU's bits, also while streams are late; no sync in a decode step."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 4096, 1, 8, 2, 128, dtype=torch.bfloat16)
    slots = torch.randint(4096, (2, 1, 8, 1023))
    wanted = [[bits(fetched(pool_with(kv, "cpu", True), slot, kv)) for slot in slots] for kv in (a, b)]
    for name, in_place in (("zero copy", True), ("staged", False)):
        pool = pool_with(a, "cuda", in_place)
        if pool.in_place != in_place:
            print(f"  left out: {name} does not work here", flush=True)
            continue
        check(pool.kv[0].is_pinned(), f"{name}: the pool is pinned")
        check(torch.equal(bits(fetched(pool, slots[0], a)), wanted[0][0]), f"{name}: the CPU's bits")
        new, slot = b.cuda(), torch.arange(4096, device="cuda")[:, None]
        torch.cuda.synchronize()
        with torch.cuda.stream(pool.stream):
            torch.cuda._sleep(200_000_000)                                       # the copy stream is late
        pool.write(0, slot, new)
        del new
        garbage = torch.full_like(b, 7, device="cuda")                           # wants the memory just freed
        check(torch.equal(bits(fetched(pool, slots[0], b)), wanted[1][0]), f"{name}: a late write arrives unharmed")
        torch.cuda._sleep(200_000_000)                                           # the device is late
        outs = [fetched(pool, slot, b) for slot in slots]
        right = all(torch.equal(bits(x), y) for x, y in zip(outs, wanted[1]))
        check(right, f"{name}: two fetches in a row, both right")
        del garbage
    no_sync()

def no_sync():
    """Decode steps of a model while every sync is an error."""
    model = random_llama("llama-3.2-1b", "cuda", torch.bfloat16, num_hidden_layers=2)
    V = model.config.vocab_size
    for settings in measure.options(256).values():
        cache = measure.new_cache(made_up_flags(V), **settings)
        model.prefill(made_up_tokens(1472, vocabulary=V).cuda(), cache)           # the host looks at 1472 and 1536
        if not cache.pool.in_place:
            return print("  left out: the sync test, since staged fetches have to wait", flush=True)
        step = decoding(model, cache)
        for _ in range(9):                                                       # libraries are loaded by now
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):                                                  # of the 64 until the host asks again
                step()
            message = ""
        except RuntimeError as e:
            traceback.print_exc(limit=-4)
            message = f": {str(e).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(not message, f"20 decode steps with {settings} wait for nothing{message}")

def small(seconds):
    """A short run, for compute-sanitizer."""
    model = random_llama("tiny", "cuda", torch.bfloat16)
    for in_place in (True, False):
        cache = SentenceKV(made_up_flags(1024), budget=64, recent=8)
        model.prefill(made_up_tokens(300, vocabulary=1024).cuda(), cache)
        cache.pool.in_place = cache.pool.in_place and in_place
        step = decoding(model, cache)
        print([int(step()) for _ in range(6)], flush=True)

# ------------------------------------------------------------------------------------------------------ is it fast

def tell(n, name, times, weights, moved, speed):
    """One row: ms per token and its floor."""
    floor = weights / speed["on device"] / 1e6 + moved / speed["to device"] / 1e6
    row = {"tokens": n, "variant": name, **summary(times), "floor": floor, "bytes_moved": moved}
    print(f"  {name:30} {row['ms']:8.2f} ms/token ({row['low']:.2f} to {row['high']:.2f}), mean {row['mean']:.2f}; "
          f"floor {floor:.2f}: {row['ms'] / floor:.2f} times that; {moved / 1e6:.1f} MB moved", flush=True)
    save(rows=[*RESULTS.get("rows", []), row])

def decode(n, seconds):
    """A decode step of the whole model on n tokens, all variants in turn; then 8 steps of one of them in parts."""
    start, model, speed = time.monotonic(), random_model(), bandwidths()
    c, weights = model.config, weights_read(model)
    names = [name for name, s in measure.options(BUDGET).items() if "keep" not in s]
    names += ["dense, SDPA", "dense, matmul", "SentenceKV, spread, staged"] + ["dense, offloaded"] * (n == LONG)
    caches, shared = whole_model(model, n, BUDGET, names)
    caches["dense, 1024 tokens"] = whole_model(model, 1024, BUDGET, ["dense, SDPA"])[0]["dense, SDPA"]
    print(f"  {shared}; {time.monotonic() - start:.0f} s to fill the caches", flush=True)
    save(memory={name: cache.memory() for name, cache in caches.items()}, weights=weights)
    steps = {name: (decoding(model, cache), 1 if "offloaded" in name else CYCLE, None)
             for name, cache in caches.items()}
    parts = {name: parts_of(step, cycle, "cuda", cycle) for name, (step, cycle, _) in steps.items()}
    until = start + seconds - (50 if n == LONG else 20)
    times, _ = interleaved(steps, 13, "cuda", until=until)
    for name, t in times.items():
        layer = 4 * n * c.num_key_value_heads * c.head_dim                       # bytes
        tell(n, name, t, weights, c.num_hidden_layers * layer if "offloaded" in name else parts[name][1], speed)
    ms, _ = parts_of(steps["SentenceKV, spread"][0], CYCLE, "cuda", CYCLE)
    print("  in parts, spread: " + ", ".join(f"{part} {t:.2f}" for part, t in ms.items()), flush=True)
    save(parts=ms)
    growth(steps["SentenceKV, spread"][0], caches["SentenceKV, spread"], n, start + seconds)

def growth(step, cache, n, end):
    """MANY tokens at 128K: what is added on the device but for vectors?"""
    if n != LONG or time.monotonic() > end - 25:
        return print(f"  left out: {MANY:,} tokens in a row", flush=True) if n == LONG else None
    vectors = lambda: sum(mem.vectors.nbytes for mem in cache.layers) + cache.first.nbytes + cache.text.nbytes
    torch.cuda.synchronize()
    requested = lambda: torch.cuda.memory_stats()["requested_bytes.all.current"]
    before, allocated, start = vectors(), requested(), time.monotonic()
    for _ in range(MANY):
        step()
    torch.cuda.synchronize()
    seconds, more, all_ = time.monotonic() - start, vectors() - before, requested() - allocated
    save(thousand={"seconds": seconds, "vectors grew": more, "allocated grew": all_})
    check(all_ <= more * 1.02 + (1 << 20), f"{MANY:,} tokens in {seconds:.1f} s: vectors, `first` and `text` grew by "
          f"{more / 1e6:.2f} MB, all that is allocated on the device by {all_ / 1e6:.2f} MB")

def graph(seconds):
    """The same tokens with and without a CUDA graph, and the time of both."""
    model, speed, names = random_model(), bandwidths(), ["SentenceKV, spread", "SentenceKV, spread, graph"]
    weights = weights_read(model)
    for n in (SHORT, LONG):
        caches, _ = whole_model(model, n, BUDGET, names)
        for one, other in zip(*(cache.layers for cache in caches.values())):     # sums of keys come in any order there
            other.vectors.copy_(one.vectors)
            other.open.copy_(one.open)
        steps = {name: decoding(model, cache, name) for name, cache in caches.items()}
        plain, graphed = ([int(step()) for _ in range(80)] for step in steps.values())      # one after the other
        check(plain == graphed, f"{short(n)}: the same 80 tokens with and without a CUDA graph")
        moved, seen = (parts_of(step, CYCLE, "cuda", CYCLE)[1] for step in steps.values())
        check(seen < moved, f"{short(n)}: it is replayed")                       # since Parts does not see a replay
        times, _ = interleaved({name: (step, CYCLE, None) for name, step in steps.items()}, 13, "cuda")
        for name in names[1:]:                                                   # the other is told in "decode"
            tell(n, name, times[name], weights, moved, speed)

class Late(Exception):
    pass

def prefill(seconds):
    """Reading 256K tokens in pieces: time, peak memory, and what the sentences cost; as far as the time goes.

    Room for all of them is made with the first piece: growing piece by piece leaves pinned blocks of all sizes behind.
    """
    model, reached, end, reserve = random_model(), [0, 1], time.monotonic() + seconds - 25, HostPool.reserve
    n, V = PROMPT if (available_memory() or 0) > 90e9 else PROMPT // 2, model.config.vocab_size
    tokens = made_up_tokens(n, vocabulary=V).cuda()
    model.prefill(tokens[:, :4096], SentenceKV(made_up_flags(V), budget=BUDGET))            # libraries are loaded

    def progress(done, total):
        reached[:] = done, total
        if time.monotonic() > end:
            raise Late
    cache, start = SentenceKV(made_up_flags(V), budget=BUDGET), time.monotonic()
    torch.cuda.reset_peak_memory_stats()
    at_once = lambda pool, layer, m, like: reserve(pool, layer, max(m, n), like)
    with mock.patch.object(HostPool, "reserve", at_once), Parts("cuda") as parts:
        try:
            model.prefill(tokens, cache, CHUNK, progress)
        except Late:
            print(f"  out of time after {reached[0] / reached[1]:.0%} of {short(n)} tokens and layers", flush=True)
        torch.cuda.synchronize()
    took, peak, ms = time.monotonic() - start, torch.cuda.max_memory_allocated(), parts.ms
    building = sum(t for part, t in ms.items() if part not in ("attention", "read back")) / 1e3
    save(seconds=took, peak=peak, parts=ms, share=reached[0] / reached[1], building=building / took)
    split = ", ".join(f"{part} {t / 1e3:.2f}" for part, t in ms.items())
    print(f"  {took:.1f} s, peak {peak / 1e9:.2f} GB with the weights; sentences (segmentation, vectors, packing, "
          f"storing) {building:.2f} s, {building / took:.1%}: {split}", flush=True)
    if reached[0] == reached[1]:
        check(peak <= 24e9, f"{short(n)} tokens are read with a peak of {peak / 1e9:.2f} GB, 24 GB at most")

def random_model():
    return random_llama(SHAPE, "cuda", torch.bfloat16, max_position_embeddings=1 << 24)
