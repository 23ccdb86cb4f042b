"""Clocks for the benchmarks: variants take turns; results are medians with quartiles.

Reading order: setup, timed -> Variant, interleaved -> summary.
"""
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

def processor():
    """The name of the CPU; Linux knows it better than the platform module."""
    name = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return name
    fields = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if ":" in line:
            key, value = line.split(":", 1)
            fields[key.strip()] = value.strip()
    family, number = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{fields.get('model name', name)} (family {family}, model {number})"

def setup(device):
    """What a figure depends on, as a dict for the report."""
    machine = processor()
    if is_cuda(device):
        machine = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {machine}"
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else sys.argv[0]
    return {
        "machine": machine,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join(["python", program, *sys.argv[1:]]),
    }

def is_cuda(device):
    return torch.device(device).type == "cuda"

def disable_cudnn_attention(device):
    """Attention without cuDNN, for all variants. Prints that it is so; does nothing on a CPU.

    cuDNN makes a new plan for every number of keys, and a dense cache has a new one in each step.
    """
    if is_cuda(device):
        torch.backends.cuda.enable_cudnn_sdp(False)
        print("scaled_dot_product_attention runs without cuDNN", flush=True)

def wait(device):
    """Wait until the device has finished all work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)

def timed(function, device):
    """Milliseconds that function() takes, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return 1e3 * (time.perf_counter() - start)

@dataclass
class Variant:
    """Something to measure. A turn consists of `repeat` steps."""
    step: Callable
    before: Callable = None         # called before each step; its time is measured apart
    repeat: int = 1

    def turn(self, device):
        """Take one turn: milliseconds (per step, per call of before)."""
        if self.before is None:
            total = timed(lambda: [self.step() for _ in range(self.repeat)], device)
            return total / self.repeat, 0.0
        before = step = 0.0
        for _ in range(self.repeat):
            before += timed(self.before, device)
            step += timed(self.step, device)
        return step / self.repeat, before / self.repeat

def interleaved(variants, rounds, device, warm=2, until=float("inf")):
    """Let variants {name: Variant} take turns, in a new random order in every round.

    So every variant meets the same machine, and the caches as different variants leave them. The
    first `warm` rounds do not count. No round starts after the time `until` (time.monotonic), but
    at least one counts. Returns {name: [ms per step]} and {name: [ms of before]}, one number per
    round.
    """
    steps = {name: [] for name in variants}
    befores = {name: [] for name in variants}
    order = random.Random(0)
    for r in range(warm + rounds):
        if r > warm and time.monotonic() > until:
            break
        for name in order.sample(list(variants), len(variants)):
            step, before = variants[name].turn(device)
            if r >= warm:
                steps[name].append(step)
                befores[name].append(before)
    return steps, befores

def summary(times):
    """The median, the quartiles and the mean.

    >>> summary([5, 1, 2, 3, 4])
    {'ms': 3, 'low': 2, 'high': 4, 'mean': 3, 'rounds': 5}
    """
    ordered = sorted(times)
    n = len(ordered)
    return {
        "ms": statistics.median(ordered),
        "low": ordered[n // 4],
        "high": ordered[(3 * n - 1) // 4],
        "mean": statistics.mean(ordered),
        "rounds": n,
    }
