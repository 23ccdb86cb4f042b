"""What speed.py and gpu_check.py measure with: clocks, and caches filled with random K and V.

Reading order: interleaved -> OPTIONS -> Hosts, filled -> Dense, Offloaded -> whole_model, decoding.
"""
import math
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

import sentencekv
from experiments.living import add_copy, used_slots
from experiments.lookahead import Lookahead
from model import DenseKV, available_memory
from sentencekv import HARD, HostPool, SentenceKV

SPARE = 2048                            # tokens that every filled cache has room for beside those it holds

def setup(device):
    """What a figure depends on: {"machine": ..., "torch": ..., "threads": ..., "command": ...}."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = open("/proc/cpuinfo", encoding="utf-8", errors="replace").read().splitlines()
        field = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
        family, number = (field.get(f, "?") for f in ("cpu family", "model"))
        name = f"{field.get('model name', name)} (family {family}, model {number})"
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {name}"
    return {"machine": name, "cores": os.cpu_count(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "command": " ".join(["python", *sys.argv])}

# ------------------------------------------------------------------------------------------------------- clocks

def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

def timed(f, device):
    """Milliseconds of f(), from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return 1e3 * (time.perf_counter() - start)

def interleaved(variants, rounds, device, warm=2, until=float("inf")):
    """{name: [ms per step, one number a round]}, and the same of what comes before a step, if that is told apart.

    variants {name: (step, n, before or None)}: n steps of each in turn, again and again, each time in another order, for
    what runs before leaves its traces in CPU caches and memory; what re-selects only every n-th step is thus measured
    over whole cycles. From the time `until` (time.monotonic) on, no round is begun but one.
    """
    times, befores, order = {name: [] for name in variants}, {name: [] for name in variants}, random.Random(0)
    for r in range(rounds + warm):
        if r > warm and time.monotonic() > until:
            break
        for name in order.sample([*variants], len(variants)):
            step, n, before = variants[name]
            if before is None:
                ms = timed(lambda: [step() for _ in range(n)], device), 0.0
            else:
                early, ms = zip(*((timed(before, device), timed(step, device)) for _ in range(n)))
                ms = sum(ms), sum(early)
            if r >= warm:
                times[name].append(ms[0] / n), befores[name].append(ms[1] / n)
    return times, befores

def summary(times):
    """The median and the span of the middle half.

    >>> summary([5, 1, 2, 3, 4])
    {'ms': 3, 'low': 2, 'high': 4, 'mean': 3, 'rounds': 5}
    """
    t = sorted(times)
    return {"ms": statistics.median(t), "low": t[len(t) // 4], "high": t[(3 * len(t) - 1) // 4],
            "mean": statistics.mean(t), "rounds": len(t)}

# --------------------------------------------------------------------------------------------- text and settings

def made_up_tokens(n, seed=0, vocabulary=2):
    """(1, n) ids; one with id % 20 == 1 ends a sentence, on average after 20 tokens (8 to 32)."""
    rng, ids = random.Random(seed), []
    while len(ids) < n:
        ids += [0] * rng.randint(7, 31) + [1]
    return torch.tensor([[i + 20 * rng.randrange(max(1, vocabulary // 20)) for i in ids[:n]]])

def made_up_flags(vocabulary=2):
    flags = torch.zeros(vocabulary, dtype=torch.uint8)
    flags[1::20] = HARD
    return flags

OPTIONS = {  # what is compared, each option by itself
    "mean": dict(rank="mean"), "bounds": dict(rank="bounds"), "spread": dict(), "spread, keep=2": dict(keep=2),
    "spread, refresh=8": dict(refresh=8), "spread, lookahead": dict(lookahead=True)}

def fair(device):
    """On a GPU: attention without cuDNN, for all variants alike. It makes a plan for every new number of keys, which a
    dense cache has at every step."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        print("scaled_dot_product_attention without cuDNN", flush=True)

def options(budget):
    """{name: settings for new_cache}."""
    return {f"SentenceKV, {name}": dict(s, budget=budget) for name, s in OPTIONS.items()}

def new_cache(flags, lookahead=False, **settings):
    """A SentenceKV, or a Lookahead."""
    return (Lookahead if lookahead else SentenceKV)(flags, **settings)

# ------------------------------------------------------------------------------------------------ filled caches

class Hosts:
    """Host memory that caches use one after another: at most `most` bytes of a shape, then layers share it."""

    def __init__(self, most):
        self.most, self.kinds = most, defaultdict(list)

    @contextmanager
    def lent(self):
        """While this lasts, new pools get their memory for K and V from here."""
        layers, make = [], HostPool.allocate

        def allocate(pool, shape, dtype):
            if len(shape) != 5 or shape[3] != 2:                                 # not (C, B, H, 2, d)
                return make(pool, shape, dtype)
            i, shape = len(layers), tuple(layers[0] if layers else shape)        # all layers are like the first
            layers.append(shape)
            kind, size = self.kinds[shape, dtype], math.prod(shape) * dtype.itemsize
            size = 1 << (size - 1).bit_length() if pool.pinned else size         # as PyTorch rounds pinned blocks
            if i >= len(kind) and (not kind or (len(kind) + 1) * size <= self.most):
                kind.append(make(pool, shape, dtype))
                kind[-1].copy_(kind[0])
            return kind[i % len(kind)]
        with mock.patch.object(HostPool, "allocate", allocate):
            yield

def filled(k, v, group, layers=1, hosts=None, vocabulary=2, **settings):
    """A SentenceKV that holds k and v (1, H, n, d) in every layer, without the attention that a prompt would cost.

    group: query heads per KV head. Every layer has vectors of its own, of the same content.
    """
    (_, H, n, d), cache = k.shape, new_cache(made_up_flags(vocabulary), **settings)
    q = torch.randn(1, H * group, 1, d, dtype=k.dtype, device=k.device).expand(-1, -1, n, -1)
    with (hosts or Hosts(0)).lent(), mock.patch.object(sentencekv, "attend_causal", lambda q, *more, **named: q):
        cache.begin(made_up_tokens(n).to(k.device))
        cache.attend(0, q, k, v)
        wait(k.device)                                                           # the pool is written
        for layer in range(1, layers):
            add_copy(cache, cache.layers[0])
            cache.pool.reserve(layer, used_slots(cache), k.new_zeros(1, 1, H, 2, d))
    return cache

def folded(q, k, v):
    """Attention of one token with the query heads of a group as queries: q (1, Hq, 1, d), k and v (1, H, N, d)."""
    return F.scaled_dot_product_attention(q.view(1, k.shape[1], -1, q.shape[3]), k, v).reshape(q.shape)

def matmul(q, k, v):
    """As in Meta's and Hugging Face's own code (softmax in float32), but without expanding K and V."""
    H, d = k.shape[1], q.shape[3]
    heads, out = (q.view(H, -1, d) * d ** -0.5, k[0], v[0]), []                  # (H, G, d), (H, N, d), (H, N, d)
    # On a CPU a batched product would copy K and V that are slices of larger buffers: there, head by head.
    for q_, k_, v_ in [heads] if q.is_cuda or k.is_contiguous() else zip(*heads):
        out.append(torch.softmax(q_ @ k_.mT, dim=-1, dtype=torch.float32).to(v.dtype) @ v_)
    return torch.stack(out).reshape(q.shape)

class Dense(DenseKV):
    """A DenseKV that holds n tokens and attends at decode steps in the given way. keys, values: one per layer."""

    def __init__(self, attention, keys, values, n):
        self.attention, self.keys, self.values, self.lengths = attention, keys, values, [n]

    @staticmethod
    def buffers(x, layers, most):
        """x (1, H, n, d) with room for more, one for each layer; of `most` bytes together, then layers share them."""
        own = [F.pad(x, (0, 0, 0, SPARE)) for _ in range(max(1, min(layers, most // x.nbytes)))]
        return [own[layer % len(own)] for layer in range(layers)]

    def attend(self, layer, q, k, v):
        n = self.length
        self.keys[layer][:, :, n - 1:n], self.values[layer][:, :, n - 1:n] = k, v
        return self.attention(q, self.keys[layer][:, :, :n], self.values[layer][:, :, :n])

class Offloaded(Dense):
    """Dense, but whole layers wait in pinned CPU memory: while one computes, a side stream copies the next one to the
    other of two buffers, as Hugging Face's offloaded cache does. For CUDA, two layers or more, and decode steps.

    host[l] (C, B, H, 2, d), buffers: two of that on the device.
    """

    def __init__(self, attention, k, v, layers, most):
        self.attention, self.lengths, self.turn, self.started = attention, [k.shape[2]], 0, False
        kv = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4)                   # (n, B, H, 2, d)
        shape, own = (len(kv) + SPARE, *kv.shape[1:]), max(1, min(layers, most // (2 * kv.nbytes)))  # pinned: rounded
        own = [torch.zeros(shape, dtype=k.dtype, pin_memory=k.is_cuda) for _ in range(own)]
        for host in own:
            host[:len(kv)] = kv.cpu()
        self.host = [own[layer % len(own)] for layer in range(layers)]
        self.buffers = [torch.zeros(shape, dtype=k.dtype, device=k.device) for _ in range(2)]
        self.stream, self.free = torch.cuda.Stream(k.device), [torch.cuda.Event(), torch.cuda.Event()]
        torch.cuda.synchronize(k.device)

    def bring(self, layer, n, place):
        """Start copying the first n tokens of a layer into a buffer, as soon as nothing uses that any more."""
        self.stream.wait_event(self.free[place])
        with torch.cuda.stream(self.stream):
            self.buffers[place][:n].copy_(self.host[layer][:n], non_blocking=True)

    def attend(self, layer, q, k, v):
        n, here, last = self.length, self.turn % 2, layer + 1 == len(self.host)
        if not self.started:
            self.bring(layer, n - 1, here)
            self.started = True
        torch.cuda.current_stream().wait_stream(self.stream)                     # this layer has come
        self.bring(0 if last else layer + 1, n if last else n - 1, 1 - here)     # the next one; 0: for the next token
        kv = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4)                   # (1, B, H, 2, d)
        self.buffers[here][n - 1:n] = kv
        self.host[layer][n - 1:n].copy_(kv, non_blocking=True)
        keys, values = self.buffers[here][:n].permute(3, 1, 2, 0, 4)             # (B, H, n, d) each
        out = self.attention(q, keys, values)
        self.free[here].record()
        self.turn += 1
        return out

    def memory(self):
        return {"device": sum(b.nbytes for b in self.buffers), "host": sum(h.nbytes for h in self.host)}

def room_for(device):
    """Bytes that one kind of buffer may take: (on the device, in host memory)."""
    host = (available_memory() or 8 << 30) // 4
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 3, min(host, 16 << 30)      # pinning more takes long
    return host, host

def needed(config, n, itemsize, variants):
    """Bytes that filling takes at least: K and V, a dense layer, a pool, temporary ones; vectors of every variant."""
    layer = 2 * n * config.num_key_value_heads * config.head_dim * itemsize
    return 8 * layer + variants * config.num_hidden_layers * layer // 15

def whole_model(model, n, budget, only=None):
    """({name: a cache that holds n random tokens in all layers}, how layers share memory); only: the names wanted.

    The random numbers are the same every time.
    """
    torch.manual_seed(0)
    c, weight = model.config, model.embed_tokens.weight
    L, H, group = c.num_hidden_layers, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    device, host = room_for(weight.device)
    k, v = (torch.randn(1, H, n, c.head_dim, dtype=weight.dtype, device=weight.device) for _ in range(2))
    wanted, caches, hosts, keys = lambda name: only is None or name in only, {}, Hosts(host), []
    if wanted("dense, SDPA") or wanted("dense, matmul"):
        keys, values = (Dense.buffers(x, L, device // 2) for x in (k, v))
        caches = {"dense, SDPA": Dense(folded, keys, values, n), "dense, matmul": Dense(matmul, keys, values, n)}
    if weight.is_cuda and wanted("dense, offloaded"):
        caches["dense, offloaded"] = Offloaded(folded, k, v, L, host // 4)
    settings = options(budget)
    if weight.is_cuda:
        more = [", staged", ", graph"]
        settings |= {f"SentenceKV, spread{name}": settings["SentenceKV, spread"] for name in more}
    for name in filter(wanted, settings):
        caches[name] = filled(k, v, group, L, hosts, c.vocab_size, **settings[name])
        caches[name].pool.in_place &= not name.endswith("staged")
    pools = min([L, *(len(kind) for kind in hosts.kinds.values())])
    size = 2 * k.nbytes / 1e6
    return caches, f"{L} layers use {len(set(map(id, keys)))} dense buffers and {pools} pools of {size:.0f} MB"

def weights_read(model):
    """Bytes of the weights that a decode step reads: not the embeddings, unless they are the output matrix as well."""
    tied = model.lm_head is None
    return sum(p.nbytes for p in model.parameters() if tied or p is not model.embed_tokens.weight)

def decoding(model, cache, name=""):
    """A function that does one decode step of the whole model: greedy generation, one token a call.

    name: what whole_model() calls the cache; it tells whether a CUDA graph is wanted.
    """
    start = torch.zeros(1, 1, dtype=torch.long, device=model.embed_tokens.weight.device)
    tokens = model.generate(start, cache, 1 << 30, **({"cuda_graph": True} if name.endswith("graph") else {}))
    return lambda: next(tokens)
