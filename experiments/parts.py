"""Where the time of a step goes: timers put around sentencekv.py's functions from outside, no hooks inside."""
import time
from collections import defaultdict
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import model
import sentencekv
from experiments.measure import Dense, timed
from sentencekv import HostPool, SentenceKV

FUNCTIONS = [(sentencekv, "select", "ranking: pick"), (HostPool, "fetch", "fetch"), (HostPool, "write", "store"),
             (HostPool, "reserve", "store"), (HostPool, "read", "read back"), (sentencekv, "reduce_keys", "vectors"),
             (SentenceKV, "begin", "begin (segmentation, masks)"), (sentencekv, "importance", "importance"),
             (sentencekv, "survivors", "importance"), (sentencekv, "attend_causal", "attention"),
             (model, "causal_attention", "attention"), (Dense, "attend", "attention")]
PRODUCTS = (torch.Tensor.matmul, torch.matmul, torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.einsum)
OPS = {**dict.fromkeys(PRODUCTS, "ranking: product"), F.scaled_dot_product_attention: "attention",
       torch.stack: "packing", torch.Tensor.contiguous: "packing", torch.Tensor.aminmax: "watch for NaN"}

class Parts(TorchFunctionMode):
    """While it lasts, tells where the time goes: ms {part: milliseconds}; moved: bytes that fetch and write moved.

    A part within a part counts as the outer one. On CUDA the time is that between events on the stream, so it has the
    gaps in it where the GPU waits for the CPU. What a CUDA graph replays is not seen.
    """

    def __init__(self, device):
        super().__init__()
        self.cuda, self.inside, self.spans, self.moved = torch.device(device).type == "cuda", False, [], 0

    def __enter__(self):
        self.patches = ExitStack()
        for owner, name, part in FUNCTIONS:
            if hasattr(owner, name):
                f = self.timer(part, getattr(owner, name), name in ("fetch", "write"))
                self.patches.enter_context(mock.patch.object(owner, name, f))
        for rule in sentencekv.RANKS.values():
            for name in ("brings", "join", "vector"):
                f = self.timer("vectors", getattr(rule, name))
                self.patches.enter_context(mock.patch.object(rule, name, f))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not self.inside and func in OPS:
            func = self.timer(OPS[func], func)
        return func(*args, **(kwargs or {}))

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timer(self, part, f, moves=False):
        def wrapper(*args, **named):
            if self.inside:
                return f(*args, **named)
            self.inside, start = True, self.mark()
            try:
                return f(*args, **named)
            finally:
                self.spans.append((part, start, self.mark()))
                self.inside = False
                if moves:                                                        # the largest is what is moved
                    self.moved += max(x.nbytes for x in (*args, *named.values()) if isinstance(x, torch.Tensor))
        return wrapper

    @property
    def ms(self):
        total = defaultdict(float)
        for part, start, end in self.spans:
            if self.cuda:
                end.synchronize()
            total[part] += start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
        return dict(total)

def parts_of(step, n, device, times=20):
    """ms per step of each part, "rest" and "in all" among them, and the bytes moved per step; n steps are a cycle."""
    steps = n * max(1, times // n)
    with Parts(device) as parts:
        total = timed(lambda: [step() for _ in range(steps)], device)
    ms = parts.ms
    ms["rest"] = total - sum(ms.values())
    return {name: t / steps for name, t in ms.items()} | {"in all": total / steps}, parts.moved / steps
