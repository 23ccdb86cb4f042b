"""Where the time of a step goes: timers around functions of sentencekv.py, put there from outside.

sentencekv.py knows nothing of this. Timers cost time themselves, so the sum of the parts is a
little more than the time of a step without them.
"""
import time
from collections import defaultdict
from contextlib import ExitStack
from unittest import mock

import torch

import model
import sentencekv
from experiments.speed.clock import is_cuda, timed
from experiments.speed.dense import Dense, Offloaded
from model import DenseKV
from sentencekv import RANKS, HostPool, SentenceKV

PARTS = [
    (SentenceKV, "begin", "begin"),
    (sentencekv, "select", "selecting"),
    (HostPool, "fetch", "fetching"),
    (sentencekv, "grouped_attention", "attention"),
    (sentencekv, "causal_attention", "attention"),
    (model, "causal_attention", "attention"),
    (Dense, "attend", "attention"),
    (Offloaded, "attend", "attention"),
    (SentenceKV, "_store", "append: vectors"),
    (HostPool, "append", "append: pool"),
    (DenseKV, "attend", "append: pool"),
    (HostPool, "read", "reading back"),
    (SentenceKV, "_prune", "pruning"),
]

def functions():
    """All (owner, name, part): those of PARTS, in subclasses of the pool too, and all rules."""
    pools = [HostPool]
    for pool in pools:
        pools += pool.__subclasses__()
    overridden = []
    for owner, name, part in PARTS:
        if owner is HostPool:
            overridden += [(pool, name, part) for pool in pools if name in vars(pool)]
    rules = [(rule, "score", "ranking") for rule in RANKS.values()]
    return [x for x in PARTS if x[0] is not HostPool] + overridden + rules

class Parts:
    """A context in which the time of each part is measured.

    ms: {part: milliseconds}; moved: bytes that were fetched from and appended to the pools. The
    time of a part within a part counts for the inner one alone. On CUDA, times are those between
    events on the current stream: they contain gaps in which the GPU waits for the CPU. What a CUDA
    graph replays is invisible.
    """

    def __init__(self, device):
        self.cuda = is_cuda(device)
        self.spans = []                 # (part, the part around it or None, start, end)
        self.open = [None]              # the parts that we are in
        self.moved = 0

    def __enter__(self):
        self.patches = ExitStack()
        for owner, name, part in functions():
            wrapper = self.timer(part, getattr(owner, name))
            self.patches.enter_context(mock.patch.object(owner, name, wrapper))
        return self

    def __exit__(self, *error):
        self.patches.close()

    def timer(self, part, function):
        """The function with a timer around it."""
        def wrapper(*arguments, **named):
            outer, start = self.open[-1], self.now()
            self.open.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self.open.pop()
                self.spans.append((part, outer, start, self.now()))
                if part in ("fetching", "append: pool") and outer != part:
                    self.moved += largest(*arguments, *named.values())
        return wrapper

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def ms(self):
        total = defaultdict(float)
        for part, outer, start, end in self.spans:
            if self.cuda:
                end.synchronize()
            ms = start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
            total[part] += ms
            if outer is not None:
                total[outer] -= ms
        return dict(total)

def largest(*arguments):
    """Bytes of the largest tensor."""
    return max(x.nbytes for x in arguments if isinstance(x, torch.Tensor))

def parts_of(step, device, steps=20):
    """Measure the parts of a step: ({part: ms per step}, bytes moved per step).

    "rest" is what no timer covers; "in all" is the sum.
    """
    with Parts(device) as parts:
        total = timed(lambda: [step() for _ in range(steps)], device)
    ms = parts.ms
    ms["rest"] = total - sum(ms.values())
    ms["in all"] = total
    return {part: t / steps for part, t in ms.items()}, parts.moved / steps
