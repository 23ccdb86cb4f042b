"""What the sections of gpu_check share: sizes, results, and the bandwidths of copies."""
import json
import os
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from experiments.speed.clock import summary
from experiments.speed.filled import random_model

SIZES = SimpleNamespace(
    shape="llama-3.1-8b",
    budget=1024,
    rounds=13,              # turns of each variant
    repeat=8,               # steps per turn, so that the CPU can run ahead of the GPU
    short=8 << 10,          # tokens of a context
    long=128 << 10,
    prompt=256 << 10,       # tokens of the prompt whose prefill is measured
    chunk=16 << 10,         # and of its chunks
    generated=1000,         # tokens that are generated in a row
    compared=80,            # tokens that are generated twice: with a CUDA graph, on the CPU
    strict=20,              # decode steps that must not synchronize
    copied=1 << 29,         # bytes of a copy that is timed
    stored=128 << 10,       # tokens in the pool that fetches are timed with
    fetched=(1024, 8192, 32768, 131072),        # how many keys and values one of them fetches
)

RESULTS = {}                # of this section

def save(**results):
    """Keep results, in the file too where the parent process looks for them."""
    RESULTS.update(results)
    file = os.environ.get("GPU_CHECK_FILE")
    if file:
        Path(file).write_text(json.dumps(RESULTS))

def check(passed, claim):
    """Print and save whether a claim holds. A claim that does not hold fails the section."""
    print(f"  {'ok    ' if passed else 'FAILED'}  {claim}", flush=True)
    save(checks={**RESULTS.get("checks", {}), claim: bool(passed)})

def row(tokens, variant, times, floor, moved):
    """Print and save one figure beside its floor (ms); moved: bytes that a step fetches."""
    figures = {"tokens": tokens, "variant": variant, **summary(times)}
    figures |= {"floor": floor, "bytes_moved": moved}
    print("  {variant:30} {ms:8.2f} ms/token ({low:.2f} to {high:.2f}), mean {mean:.2f}; "
          "floor {floor:.2f}".format(**figures), end=": ")
    print(f"{figures['ms'] / floor:.2f} times that; {moved / 1e6:.1f} MB moved", flush=True)
    save(rows=[*RESULTS.get("rows", []), figures])

def model_8b():
    return random_model(SIZES.shape, "cuda")

def rate(copy, nbytes, times=8):
    """Median GB/s of copy(), which moves nbytes; measured with CUDA events."""
    rates = []
    for _ in range(times + 2):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        copy()
        end.record()
        end.synchronize()
        rates.append(nbytes / start.elapsed_time(end) / 1e6)
    return median(rates[2:])                            # the first two warm up

def bandwidths():
    """GB/s from pinned memory to the device, back, and on the device (bytes read and written)."""
    size = SIZES.copied
    host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    a = torch.ones(size, dtype=torch.uint8, device="cuda")
    b = torch.ones(size, dtype=torch.uint8, device="cuda")
    return {"to device": rate(lambda: a.copy_(host, non_blocking=True), size),
            "to host": rate(lambda: host.copy_(a, non_blocking=True), size),
            "on device": rate(lambda: b.copy_(a), 2 * size)}

def floor_of(weights, moved, speed):
    """ms of reading the weights once on the device, and `moved` bytes from pinned memory."""
    return weights / speed["on device"] / 1e6 + moved / speed["to device"] / 1e6
