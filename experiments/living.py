"""What lets a SentenceKV live on: branches that share what has been read, and a file to keep it in.

A branch is a pool that goes on from another one: it reads from that, and never writes to it. The pool of a cache that
was loaded is one as well; what it goes on from is the file, mapped into memory.

The file has safetensors' layout, so any reader of that format can look into it:

    tokens (B, N)                the text, -1 after the end of shorter rows: sentences are cut anew from it
    flags (V,)                   which tokens end sentences
    queries (B,)                 number of queries in query_sum
    prompt (B,)                  only after keep=r has pruned: the length of the pruned prompt
    layer.<l>.kv                 (slots, B, H, 2, d), the host pool
    layer.<l>.vectors            (B, H, S, w)
    layer.<l>.open               (B, H, w), what the open sentence's vector is made of
    layer.<l>.query_sum          (B, Hq, d)
    layer.<l>.start              (B, S + 1), only after keep=r has pruned
    sha256 (32,)                 of all bytes of the file before it, and always the last

The header's metadata has the format's name, the settings, and a fingerprint of the model. Nothing in a file is
believed: if its checksum, its shapes and its numbers are right it is loaded, and else refused with one line.
"""
import copy
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from model import SAFETENSORS, blame, demand, parse_json, read_safetensors
from sentencekv import HostPool, reduce_keys

# ------------------------------------------------------------------------------------------------------- branches

class Branch:
    """A pool (see HostPool) that goes on, from slot start[b] of row b on, where another one stops."""

    def __init__(self, base, start):
        self.base, self.start, self.own, self.device = base, start, HostPool(base.device), base.device
        self.offset = int(start.min())

    @property
    def kv(self):
        return {**{("base", l): t for l, t in self.base.kv.items()}, **self.own.kv}

    @property
    def in_place(self):
        return self.own.in_place and self.base.in_place

    def reserve(self, layer, n, like):
        self.own.reserve(layer, n - self.offset, like)

    def write(self, layer, slot, kv):
        self.own.write(layer, slot - self.start, kv)

    def fetch(self, layer, slot, out):
        here = slot - self.start[:, None, None]                                  # (B, H, n)
        self.base.fetch(layer, torch.where(here < 0, slot, 0), out)
        if layer in self.own.kv:
            own = torch.empty_like(out)
            self.own.fetch(layer, here.clamp(0, len(self.own.kv[layer]) - 1), own)
            torch.where((here < 0)[..., None, None], out, own, out=out)

    def read(self, layer, n):
        first = self.base
        while isinstance(first, Branch):
            first = first.base
        (B, H, *more), dtype = first.kv[layer].shape[1:], first.kv[layer].dtype
        out = torch.empty(B, H, n, *more, dtype=dtype, device=self.device)
        self.fetch(layer, torch.arange(n, device=self.device).expand(B, H, n), out)
        return out.permute(2, 0, 1, 3, 4)                                        # (n, B, H, 2, d)

    def wait(self):
        self.own.wait()

    def aside(self, *tensors):
        return self.own.aside(*tensors)

def cut(pool, slots):
    """The pool to go on with when what is in slots (B,) and after is forgotten."""
    if not isinstance(pool, Branch):
        return pool
    if bool((pool.start >= slots).all()):                                        # nothing of its own is left
        return Branch(pool.base, slots)
    return pool if bool((pool.start <= slots).all()) else Branch(pool, slots)

def whole(cache, what):
    """ValueError while a prompt is read in pieces: `what` needs all of it."""
    demand(cache.length and not cache.more, f"{what} needs a cache that has read a whole prompt")

def used_slots(cache):
    """Slots in use, of the row that has most."""
    return int((cache.lengths - cache.dropped).max())

def copied(x):
    return x.clone() if isinstance(x, torch.Tensor) else x

def fork(cache):
    """See SentenceKV.fork."""
    whole(cache, "fork()")
    twin = copy.copy(cache)
    vars(twin).update({name: copied(x) for name, x in vars(cache).items()})
    at, base = cache.lengths - cache.dropped, cache.pool                         # (B,) slots in use
    if isinstance(base, Branch) and torch.equal(base.start, at):                 # nothing was written since
        base = base.base
    cache.pool, twin.pool = Branch(base, at), Branch(base, at)
    cache.reach = twin.reach = used_slots(cache) + 64                            # they have no room of their own yet
    twin.layers, twin.ahead, twin.since = [], None, twin.refresh                 # it fetches anew
    for mem in cache.layers:
        add_copy(twin, mem)
    return twin

def add_copy(cache, mem):
    """One more layer for the cache, with a copy of what `mem`, a layer, keeps; but with places of its own."""
    cache.new_layer(mem.vectors.shape[1], mem.query_sum.shape[1], mem.work.shape[-1], mem.work.dtype)
    vars(cache.layers[-1]).update({name: copied(x) for name, x in vars(mem).items() if name != "work"})
    cache.turn = None                                                            # they have all attended

def truncate(cache, lengths):
    """See SentenceKV.truncate. The mean query starts anew. ValueError for no token, for more than there are, or for a
    part of a pruned prompt."""
    whole(cache, "truncate()")
    have = cache.lengths.tolist()
    wanted = [lengths] * len(have) if type(lengths) is int else list(lengths)
    least = [1] * len(have) if cache.prompt is None else cache.prompt.tolist()
    demand(len(wanted) == len(have) and all(type(n) is int and a <= n <= b for a, n, b in zip(least, wanted, have)),
           f"truncate() takes lengths from {least} (what keep=r has pruned is gone) to {have}, got {lengths}")
    lengths = torch.tensor(wanted, device=cache.lengths.device)
    gone = torch.arange(max(wanted), device=lengths.device) >= lengths[:, None]
    cache.pool = cut(cache.pool, lengths - cache.dropped)
    for mem in cache.layers:
        mem.start = None if mem.start is None else mem.start.minimum((lengths - cache.dropped)[:, None])
    replay(cache, cache.tokens()[:, :max(wanted)].masked_fill(gone, -1))
    for layer in range(len(cache.layers)):
        reopen(cache, layer)

def replay(cache, tokens):
    """The state after these tokens (B, T), whose keys and values are in the pool."""
    cache._rewind()
    cache.length, cache.turn = 1, None                                           # it has begun already
    cache.begin(torch.nn.functional.pad(tokens, (0, 1), value=-1))               # two at least: a prompt
    cache.turn = None

def reopen(cache, layer):
    """Make the vector of the open sentences anew, of the keys that they still have."""
    mem, current = cache.layers[layer], cache.current.clamp(min=0)               # (B,)
    B, H, _, _, d = mem.work.shape
    first = cache.first.gather(1, current[:, None])                              # (B, 1) position
    t = first + torch.arange(cache.max_sentence, device=first.device)            # (B, n)
    slot = (torch.minimum(t, cache.lengths[:, None] - 1) - cache.dropped[:, None])[:, None].expand(B, H, t.shape[1])
    kv = torch.empty(*slot.shape, 2, d, dtype=mem.work.dtype, device=first.device)
    cache.pool.fetch(layer, slot.contiguous(), kv)
    brought = cache.rule.brings(kv[..., 0, :].permute(2, 0, 1, 3).float())       # (n, B, H, w)
    ended = (t >= cache.lengths[:, None]).long().T                               # (n, B) 0: in the sentence
    mem.open = reduce_keys(brought.flatten(2), ended, 2, cache.rule.how)[0].view_as(mem.open)
    size = (cache.lengths - first[:, 0]).clamp(min=1)[:, None, None]
    mem.vectors[torch.arange(B, device=first.device), :, current] = cache.rule.vector(mem.open, size).to(kv.dtype)

# -------------------------------------------------------------------------------------------------------- the file

FORMAT = "sentencekv cache 2"
DTYPES = {"I64": torch.int64, "F64": torch.float64, **SAFETENSORS, "U8": torch.uint8}       # widest first: aligned
TENSORS = ("kv", "vectors", "open", "query_sum", "start")

def fingerprint(model):
    """sha256 (hex) of all parameters' names, shapes, types and of sums of their bits: every weight counts."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        bits = p.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize]).flatten()
        place = torch.arange(1, len(bits) + 1, device=bits.device) if len(bits) < 1 << 16 else 1      # order, if cheap
        digest.update(f"{name} {[*p.shape]} {p.dtype} {int((bits * place).sum())} {bits[::4093].tolist()}".encode())
    return digest.hexdigest()

def tensors_of(cache):
    """{name: CPU tensor} of all that a cache is made of."""
    S = max(int(cache.current.max()) + 1, 1)                                     # sentences so far
    tensors = {"tokens": cache.tokens(), "flags": cache.flags[:-2], "queries": cache.queries}
    if cache.prompt is not None:
        tensors["prompt"] = cache.prompt
    for l, mem in enumerate(cache.layers):
        parts = (cache.pool.read(l, used_slots(cache)), mem.vectors[:, :, :S], mem.open, mem.query_sum,
                 None if mem.start is None else mem.start[:, :S + 1])
        tensors |= {f"layer.{l}.{name}": t.cpu() for name, t in zip(TENSORS, parts) if t is not None}
    return {name: t.cpu() for name, t in tensors.items()}

def save(cache, path):
    """See SentenceKV.save. ValueError if there is nothing to save."""
    whole(cache, "save()")
    demand(hasattr(cache, "model"), "save() needs to know the model: set cache.model to it")
    path, names = Path(path), {dtype: name for name, dtype in DTYPES.items()}
    tensors = tensors_of(cache)
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header, at = {"__metadata__": {"format": FORMAT, "settings": json.dumps(cache.settings),
                                   "model": fingerprint(cache.model)}}, 0
    for name, size in [(n, tensors[n].nbytes) for n in order] + [("sha256", 32)]:
        dtype, shape = ("U8", [32]) if name == "sha256" else (names[tensors[name].dtype], [*tensors[name].shape])
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}, at + size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    demand(not path.is_dir(), f"{path} is a folder: give the name of a file")
    digest, unfinished = hashlib.sha256(), Path(f"{path}.unfinished")
    with open(unfinished, "wb") as f:
        for raw in [len(head).to_bytes(8, "little"), head, *map(raw_bytes, map(tensors.get, order))]:
            digest.update(raw)
            f.write(raw)
        f.write(digest.digest())
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)                                   # its new name must be on the disk too
    os.fsync(folder)
    os.close(folder)

def raw_bytes(t):
    """The bytes of a CPU tensor, without a copy if they lie in order."""
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy().data

def load(cls, path, model):
    """See SentenceKV.load. ValueError names the file and what is wrong with it."""
    path = Path(path)
    check_sum(path)
    tensors = read_safetensors(path, DTYPES)
    with blame(path), open(path, "rb") as f:
        metadata = parse_json(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__", {})
        demand(metadata.get("format") == FORMAT, f"is no saved cache of this version ({FORMAT})")
        demand(metadata.get("model") == fingerprint(model), "was saved with another model, other weights or dtype")
        return assemble(cls, tensors, parse_json(metadata["settings"].encode()), model)

def check_sum(path):
    """ValueError if the file is not what was once written."""
    digest, left = hashlib.sha256(), os.path.getsize(path) - 32
    with blame(path), open(path, "rb") as f:
        demand(left > 0, "truncated")
        while left:
            raw = f.read(min(left, 1 << 24))
            demand(raw, "truncated while it was read")
            digest.update(raw)
            left -= len(raw)
        demand(f.read() == digest.digest(), "is damaged or cut off: its checksum is wrong")

def assemble(cls, tensors, settings, model):
    """A cache from tensors of which only the layout is known to be right. ValueError for what cannot be."""
    c, weight = model.config, model.embed_tokens.weight
    demand(settings.keys() == cls(torch.zeros(1, dtype=torch.uint8)).settings.keys(), f"settings {settings!r:.200}")
    cache = cls(tensors["flags"].clone(), **settings)
    B, N, V = *expect(tensors, "tokens", torch.int64, None, None).shape, c.vocab_size
    tokens = tensors["tokens"].to(weight.device)
    real = tokens >= 0
    demand(bool(real[:, 0].all()) and bool(real.any(0).all()) and not bool((real[:, 1:] > real[:, :-1]).any())
           and -1 <= int(tokens.min()) and int(tokens.max()) < V, "tokens are no text of this model")
    cache._start(B, weight.device)
    cache.unjudged, lengths = False, real.sum(1)
    if "prompt" in tensors:
        cache.prompt = expect(tensors, "prompt", torch.int64, B).to(weight.device)
        survive = int(cache.keep * cache.budget) if cache.keep is not None else 0
        demand(survive and bool((cache.prompt <= lengths).all()) and int(cache.prompt.min()) >= cache.window
               and int(cache.prompt.max()) > survive, "prompt does not fit the settings")
        cache.dropped = (cache.prompt - survive).clamp(min=0)
    replay(cache, tokens)
    for l in range(c.num_hidden_layers):
        add_layer(cache, {name: tensors.get(f"layer.{l}.{name}") for name in TENSORS}, l, c, weight)
    cache.pool = Branch(cache.pool, cache.lengths - cache.dropped) if cache.pool.stream is None else cache.pool
    cache.queries = expect(tensors, "queries", torch.int64, B).to(weight.device)
    demand(bool(((cache.queries >= 0) & (cache.queries <= lengths)).all()), "queries cannot be")
    expected = 4 + (cache.prompt is not None) + c.num_hidden_layers * (4 + (cache.prompt is not None))
    demand(len(tensors) == expected, f"has {len(tensors)} tensors instead of {expected}")
    cache.model = model
    return cache

def expect(tensors, name, dtype, *shape):
    """The tensor of that name, type and shape (None: any size)."""
    t = tensors.get(name)
    fits = t is not None and t.dtype == dtype and t.ndim == len(shape) and t.numel() > 0
    fits = fits and all(want in (None, n) for want, n in zip(shape, t.shape))
    demand(fits, f"{name} is missing, or has a wrong type or shape")
    return t

def add_layer(cache, parts, l, c, weight):
    """Layer l of the cache, from its tensors."""
    B, Hq, H, d, device = len(cache.lengths), c.num_attention_heads, c.num_key_value_heads, c.head_dim, weight.device
    kv, S = expect(parts, "kv", weight.dtype, used_slots(cache), B, H, 2, d), max(int(cache.current.max()) + 1, 1)
    cache.new_layer(H, Hq, d, weight.dtype)
    mem, w = cache.layers[l], cache.rule.width * d
    mem.vectors[:, :, :S] = expect(parts, "vectors", weight.dtype, B, H, S, w).to(device)
    mem.open = expect(parts, "open", torch.float32, B, H, w).to(device, copy=True)
    mem.query_sum = expect(parts, "query_sum", torch.float32, B, Hq, d).to(device, copy=True)
    if cache.prompt is not None:
        start, slots = expect(parts, "start", torch.int64, B, S + 1).to(device), cache.lengths - cache.dropped
        demand(bool((start >= 0).all()) and bool((start.diff() >= 0).all()) and bool((start[:, -1] == slots).all())
               and bool((start <= cache.first[:, :S + 1]).all()), f"layer.{l}.start cannot be")
        mem.start = slots[:, None].repeat(1, cache.first.shape[1])               # of those not born yet
        mem.start[:, :S + 1] = start
    if cache.pool.stream is None:                                                # the file's own bytes
        cache.pool.kv[l] = cache.pool.seen[l] = kv
    else:                                                                        # copied into pinned memory
        cache.pool.reserve(l, used_slots(cache), kv)
        cache.pool.kv[l][:used_slots(cache)] = kv
