"""Caches that are filled directly with random keys and values, so that no long prompt is computed.

Reading order: made_up_tokens -> variants -> SharedMemory -> filled -> whole_model -> decoding.
"""
import copy
import itertools
import math
import random
from collections import defaultdict
from unittest import mock

import torch

import sentencekv
from experiments.shapes import SHAPES, random_llama
from experiments.speed.clock import is_cuda, wait
from experiments.speed.dense import SPARE, Dense, Offloaded, folded, matmul
from extras.cuda_graph import GraphedStep
from extras.zero_copy import best_pool
from extras.check_memory import available_memory
from model import Config, Llama
from sentencekv import PAPER, RANKS, HostPool, SentenceKV, Settings, sentence_flags

DEFAULT = f"SentenceKV, {Settings().rank}"

# ------------------------------------------------------------------------- text and settings

def made_up_tokens(n, seed=0, vocabulary=2):
    """Random ids (1, n) in sentences of 8 to 32 tokens, 20 on average.

    An id ends a sentence if id % 20 == 1; see made_up_flags().
    """
    rng = random.Random(seed)
    ids = []
    while len(ids) < n:
        sentence = [0] * rng.randint(7, 31) + [1]
        ids += [end + 20 * rng.randrange(max(1, vocabulary // 20)) for end in sentence]
    return torch.tensor([ids[:n]])

def made_up_flags(vocabulary=2):
    """The sentence flags that go with made_up_tokens()."""
    return sentence_flags([b".\n\n" if i % 20 == 1 else b" word" for i in range(vocabulary)])

PRESETS = [*RANKS, "paper"]

def variants(budget, presets=PRESETS):
    """What is compared: {name: settings of SentenceKV}.

    presets: names of rules, with the default settings; "paper" stands for the paper's settings,
    and "mean", the paper's rule, for these with all tokens kept.
    """
    paper = dict(PAPER, budget=budget)
    special = {"paper": paper, PAPER["rank"]: dict(paper, keep=None)}
    found = {}
    for name in presets:
        found[f"SentenceKV, {name}"] = special.get(name, dict(rank=name, budget=budget))
    return found

# ---------------------------------------------------------------------------- filled caches

class SharedMemory:
    """Host memory for the pools of several caches, which do not run at the same time.

    At most `limit` bytes for each shape: if there are more layers than fit, layers share memory.
    pinned: PyTorch rounds pinned memory up to a power of two.
    """

    def __init__(self, limit, pinned=False):
        self.limit = limit
        self.pinned = pinned
        self.blocks = defaultdict(list)                 # (shape, dtype) -> tensors

    def pool_class(self, base):
        """A subclass of base, HostPool or a subclass of it, for the pools of one cache."""
        memory, numbers = self, itertools.count()

        class SharedPool(base):
            def __init__(self, *arguments):
                self.number, self.appending = next(numbers), False
                super().__init__(*arguments)

            def append(self, b, kv):
                self.appending = True
                super().append(b, kv)
                self.appending = False

            def allocate(self, shape, dtype):
                if not self.appending:                  # not for keys and values
                    return super().allocate(shape, dtype)
                return memory.block(self.number, tuple(shape), dtype, super().allocate)

        return SharedPool

    def block(self, number, shape, dtype, allocate):
        """The block of layer `number`; allocated if it is not there and fits."""
        blocks = self.blocks[shape, dtype]
        size = math.prod(shape) * dtype.itemsize
        if self.pinned:
            size = 1 << (size - 1).bit_length()
        fits = not blocks or (len(blocks) + 1) * size <= self.limit
        if number >= len(blocks) and fits:
            blocks.append(allocate(shape, dtype))
        return blocks[number % len(blocks)]

def filled(k, v, group, layers=1, vocabulary=2, memory=None, host_pool=HostPool, **settings):
    """A SentenceKV that holds k, v (1, H, n, d) in every layer. Attention is not computed.

    group: query heads per KV head. memory: a SharedMemory for the pools; None: memory of their
    own. Every layer has vectors of its own.
    """
    _, H, n, d = k.shape
    memory = memory or SharedMemory(float("inf"))
    pool_class = memory.pool_class(host_pool)
    cache = SentenceKV(made_up_flags(vocabulary), host_pool=pool_class, **settings)
    q = torch.randn(1, H * group, 1, d, dtype=k.dtype, device=k.device)
    with mock.patch.object(sentencekv, "causal_attention", lambda q, k, v: q):
        cache.begin(made_up_tokens(n, vocabulary=vocabulary).to(k.device))
        cache.attend(0, q.expand(-1, -1, n, -1), k, v)
    kv = torch.stack((k[0], v[0]), dim=2)                             # (H, n, 2, d)
    for _ in range(1, layers):
        layer = copy.deepcopy({**vars(cache.layers[0]), "pool": None})
        layer = type(cache.layers[0])(**layer)
        layer.pool = pool_class(1, H, d, k.dtype, k.device)
        layer.pool.append(0, kv)
        cache.layers.append(layer)
    cache.next_layer = layers
    wait(k.device)
    return cache

# ------------------------------------------------------------------------------ whole models

def random_model(shape, device, **changes):
    """A bfloat16 model of a named shape with random weights. MemoryError if it does not fit."""
    with torch.device("meta"):
        empty = Llama(Config(**{**SHAPES[shape], **changes}))
    size = 2 * sum(p.numel() for p in empty.parameters())
    free = torch.cuda.mem_get_info(device)[0] if is_cuda(device) else available_memory()
    if free is not None and size > free:
        raise MemoryError(f"{shape} takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    changes = {"max_position_embeddings": 1 << 24, **changes}
    return random_llama(shape, device, torch.bfloat16, **changes)

def memory_limits(device):
    """Bytes that one kind of buffer may take: (on the device, in host memory)."""
    host = (available_memory() or 8 << 30) // 4
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0] // 3, min(host, 16 << 30)  # pinning takes long
    return host, host

def memory_needed(config, n, caches):
    """Bytes that whole_model() takes at least for n tokens (bfloat16): a rough bound."""
    layer = 4 * n * config.num_key_value_heads * config.head_dim
    vectors = caches * config.num_hidden_layers * layer // 8
    return 8 * layer + vectors

def whole_model(model, n, budget, names):
    """Caches that hold the same n random tokens in all layers: {name: cache}, and a note.

    names: which ones; see names_on(). The note says how many buffers of keys
    and values the layers use. On CUDA, ", staged" fetches through a pinned buffer, as sentencekv.py
    does, ", graph" is for a CUDA graph, and the others read host memory in place if possible.
    """
    torch.manual_seed(0)
    c, weight = model.config, model.embed_tokens.weight
    H, layers, device = c.num_key_value_heads, c.num_hidden_layers, weight.device
    on_device, on_host = memory_limits(device)
    shape = (1, H, n, c.head_dim)
    k = torch.randn(shape, dtype=weight.dtype, device=device)
    v = torch.randn(shape, dtype=weight.dtype, device=device)
    caches = dense_caches(k, v, layers, names, on_device // 2, on_host // 4)
    dense = {id(x) for cache in caches.values() for x in cache.keys or ()}
    memory = SharedMemory(on_host, pinned=is_cuda(device))
    for name, (settings, pool) in sentence_variants(budget, device).items():
        if name in names:
            caches[name] = filled(k, v, c.num_attention_heads // H, layers, c.vocab_size,
                                  memory, pool, **settings)
    pools = {len(blocks) for (shape, _), blocks in memory.blocks.items() if shape[1] >= n}
    return caches, (f"{layers} layers use {len(dense)} dense buffers and {min(pools, default=0)} "
                    f"pools of {2 * k.nbytes / 1e6:.0f} MB")

def dense_caches(k, v, layers, names, on_device, on_host):
    """The dense ones among `names`: {name: cache}. on_device, on_host: bytes for K, and for V."""
    caches = {}
    attentions = {"dense, SDPA": folded, "dense, matmul": matmul}
    wanted = [name for name in attentions if name in names]
    if wanted:
        keys = Dense.buffers(k, layers, on_device)
        values = Dense.buffers(v, layers, on_device)
        for name in wanted:
            caches[name] = Dense(attentions[name], keys, values, k.shape[2])
    if "dense, offloaded" in names:
        caches["dense, offloaded"] = Offloaded(folded, k, v, layers, on_host)
    return caches

def names_on(device, presets=PRESETS):
    """The names of all caches that the device allows; presets: see variants()."""
    names = ["dense, SDPA", "dense, matmul", *variants(1024, presets)]
    if is_cuda(device):
        names += ["dense, offloaded", DEFAULT + ", staged", DEFAULT + ", graph"]
    return names

def sentence_variants(budget, device):
    """{name: (settings, class of the host pools)}."""
    pool = best_pool(device)
    found = {name: (settings, pool) for name, settings in variants(budget).items()}
    if is_cuda(device):
        settings = found[DEFAULT][0]
        found[DEFAULT + ", staged"] = settings, HostPool
        found[DEFAULT + ", graph"] = settings, pool
    return found

def weights_read(model):
    """Bytes of the weights that a decode step reads.

    These are all but the embeddings, unless those are the output matrix as well.
    """
    tied = model.lm_head is None
    embeddings = model.embed_tokens.weight
    return sum(p.nbytes for p in model.parameters() if tied or p is not embeddings)

def decoding(model, cache, name=""):
    """A function that decodes one token with the whole model: greedy generation -> ids (1,).

    name: what whole_model() calls the cache; ", graph" at the end stands for a CUDA graph.
    """
    step = GraphedStep(model, cache) if name.endswith(", graph") else None
    start = torch.zeros(1, 1, dtype=torch.long, device=model.embed_tokens.weight.device)
    ids = model.generate(start, cache, SPARE, step=step)
    return lambda: next(ids)
