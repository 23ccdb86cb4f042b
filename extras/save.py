"""Save a SentenceKV in a file, and load it for the same model.

The file has the layout of safetensors, so any reader of that format can look into it:

    tokens (B, T)             the text; -1 after the end of a shorter row
    prompt_end (B,)           number of tokens when the last prompt of the row ended
    top (1,)                  how many of the best sentences select() considers
    flags (bytes,)            sentence_flags(), as JSON
    layer.<l>.kv              (B, slots, H, 2, d), the host pool
    layer.<l>.count, ...      every tensor of the layer, see SentenceKV._new_layer()
    sha256 (32,)              of all bytes before it; always the last

Its metadata holds the format's name, the settings, and a fingerprint of the model. load() believes
nothing: a file whose checksum, shapes and numbers are not right gives a ValueError of one line.
"""
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace

import torch

from extras.branch import BranchPool, check_complete
from model import DTYPES as WEIGHTS, blame, read_safetensors
from sentencekv import (
    HostPool, Segmenter, SentenceKV, enough_sentences, need, sentence_flags)

FORMAT = "sentencekv cache 4"
DTYPES = {"I64": torch.int64, "F64": torch.float64, **WEIGHTS, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ------------------------------------------------------------------------------------- save

def save(cache, path, model):
    """Write the cache to a file. If it exists it is replaced, when the new one is complete.

    model: the Llama that computed the cache. Raises ValueError for a cache that is empty or was
    interrupted, and for a path that is not a regular file; OSError if writing fails.
    """
    check_complete(cache, "save()")
    check_fits(cache, model)
    path = Path(path)
    target = Path(os.path.realpath(path))           # a link stays one
    need(target.is_file() or not target.exists(), f"{path} is not a regular file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    unfinished = Path(f"{target}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        write(unfinished, entries(cache), metadata(cache, model))
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)

def check_fits(cache, model):
    """ValueError unless every layer of the model has stored all tokens in this cache."""
    c, weight = model.config, model.embed_tokens.weight
    G = c.num_attention_heads // c.num_key_value_heads
    need(len(cache.layers) == c.num_hidden_layers, f"this cache has {len(cache.layers)} layers, "
         f"the model {c.num_hidden_layers}: save() needs a complete cache, and its model")
    shape = (len(cache.rows), c.num_key_value_heads, G, c.head_dim)
    for layer in cache.layers:
        need(layer.query_mean.shape == shape and layer.pool.kv.dtype == weight.dtype,
             "this cache was computed by another model")
        check_counts(cache, layer.count.tolist(), layer.pool.used, pruned=layer.observed is None)

def check_counts(cache, counts, used, pruned):
    """ValueError unless a layer's counts (B, S) fit the text and the used slots of each row."""
    survivors = int((cache.settings.keep or 0) * cache.settings.budget)
    for row, count, slots in zip(cache.rows, counts, used):
        S, length = len(row.lengths), len(row.tokens)
        lost = [n - kept for n, kept in zip(row.lengths, count)]
        fits = len(count) >= S and not any(count[S:]) and all(
            0 <= gone <= n for gone, n in zip(lost, row.lengths))
        need(fits and sum(count) == slots, "the layers hold different tokens")
        if slots < length:
            need(survivors and pruned and slots >= survivors and lost[-1] == 0,
                 "tokens are missing")

def metadata(cache, model):
    settings = json.dumps(vars(cache.settings))
    return {"format": FORMAT, "settings": settings, "model": fingerprint(model)}

def fingerprint(model):
    """sha256 over names, shapes, types and sums of the bits of all parameters."""
    digest = hashlib.sha256()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, p in model.named_parameters():
        bits = p.detach().contiguous().view(integers[p.itemsize]).flatten()
        total = int(bits.sum())
        if len(bits) < 1 << 16:                     # where it is cheap, the order counts as well
            total = int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum())
        sample = bits[::4093].tolist()
        digest.update(f"{name} {[*p.shape]} {p.dtype} {total} {sample}".encode())
    return digest.hexdigest()

def entries(cache):
    """What a file contains: list of (name, dtype, shape, function that yields CPU tensors)."""
    def entry(name, tensor):
        return name, tensor.dtype, tensor.shape, lambda: [tensor.cpu()]

    length = cache.length
    rows = [row.tokens + [-1] * (length - len(row.tokens)) for row in cache.rows]
    found = [entry("tokens", torch.tensor(rows)), entry("prompt_end", torch.tensor([row.prompt_end for row in cache.rows])),
             entry("top", torch.tensor([cache.top])),
             entry("flags", pack_flags(cache.flags))]
    for l, layer in enumerate(cache.layers):
        pool = layer.pool
        B, _, *shape = pool.kv.shape
        shape = (B, max(pool.used), *shape)
        found.append((f"layer.{l}.kv", pool.kv.dtype, shape, lambda pool=pool: padded_rows(pool)))
        for name, x in vars(layer).items():
            if torch.is_tensor(x) and name != "fetched":
                found.append(entry(f"layer.{l}.{name}", x))
    return sorted(found, key=lambda item: -item[1].itemsize)          # so all are aligned

def pack_flags(flags):
    """The flags as JSON in a uint8 tensor."""
    text = json.dumps([x.decode("latin-1") if isinstance(x, bytes) else x for x in flags])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

def padded_rows(pool):
    """The rows of a pool, one after the other, zeros after the end of a shorter one."""
    N = max(pool.used)
    for b, n in enumerate(pool.used):
        row = stored(pool, b)                                         # (n, H, 2, d)
        yield row
        if n < N:
            yield row.new_zeros(N - n, *row.shape[1:])

def stored(pool, b):
    """What a pool holds of row b, in CPU memory: (n, H, 2, d)."""
    if isinstance(pool, BranchPool):
        shared = stored(pool.base, b)[:pool.start[b]]
        return torch.cat((shared, stored(pool.own, b)))
    pool.finish_writes()
    return pool.kv[b, :pool.used[b]]

def write(path, contents, about):
    """Write a new file that contains the entries, and make sure that it is on the disk."""
    header, at = {"__metadata__": about}, 0
    for name, dtype, shape, _ in contents:
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = dict(dtype=NAMES[dtype], shape=[*shape], data_offsets=[at, at + size])
        at += size
    header["sha256"] = dict(dtype="U8", shape=[32], data_offsets=[at, at + 32])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        def put(data):
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for _, _, _, tensors in contents:
            for tensor in tensors():
                put(raw_bytes(tensor))
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())

def raw_bytes(tensor):
    """The bytes of a CPU tensor; copied only if they do not lie in order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data

def sync_folder(folder):
    """Make sure that the new name of the file is on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

# ------------------------------------------------------------------------------------- load

def load(path, model, host_pool=HostPool):
    """The cache that was saved; model: the Llama that computed it.

    On the CPU, keys and values stay in the file, which is memory-mapped; host_pool: see SentenceKV.
    Raises FileNotFoundError, or ValueError for a file that is damaged or of another model.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    need(path.is_file(), f"{path} is not a regular file")
    check_sum(path)
    with blame(path):
        tensors = read_safetensors(path, DTYPES)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        about = header.get("__metadata__", {})
        need(about.get("format") == FORMAT, f"is no saved cache of this version ({FORMAT})")
        need(about.get("model") == fingerprint(model),
             "was saved with another model, other weights or another dtype")
        settings = json.loads(about["settings"])
        return assemble(tensors, settings, model, host_pool)

def check_sum(path):
    """ValueError if the file is not what was once written."""
    digest = hashlib.sha256()
    with blame(path), open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - 32
        need(left > 0, "is cut off")
        while left > 0:
            data = file.read(min(left, 1 << 24))
            need(data, "was cut off while it was read")
            digest.update(data)
            left -= len(data)
        need(file.read() == digest.digest(), "is damaged or cut off: its checksum is wrong")

@torch.inference_mode(False)
@torch.no_grad()
def assemble(tensors, settings, model, host_pool):
    """A cache from tensors of which only the layout is known. ValueError if they cannot be one."""
    cache = SentenceKV(unpack_flags(tensors), host_pool=host_pool, **settings)
    need(settings == vars(cache.settings), "settings are missing")
    cache.rows = read_text(cache, tensors, model.config.vocab_size)
    B = len(cache.rows)
    cache.length = max(len(row.tokens) for row in cache.rows)
    ends = expect(tensors, "prompt_end", torch.int64, (B,)).tolist()
    for row, end in zip(cache.rows, ends):
        need(0 <= end <= len(row.tokens), "prompt_end is wrong")
        row.prompt_end = end
    for l in range(model.config.num_hidden_layers):
        cache.layers.append(read_layer(cache, tensors, f"layer.{l}.", model))
    used = {tuple(layer.pool.used) for layer in cache.layers}
    observed = {layer.observed is None for layer in cache.layers}
    need(len(used) == len(observed) == 1, "the layers do not fit together")
    cache.top = int(expect(tensors, "top", torch.int64, (1,)))
    enough = max(enough_sentences(row.lengths, cache.settings.budget) for row in cache.rows)
    need(enough <= cache.top <= cache.room, "top is wrong")
    tensors.pop("sha256", None)
    need(not tensors, f"{[*tensors][:1]} is unexpected")
    cache.next_layer = len(cache.layers)
    return cache

def expect(tensors, name, dtype, shape):
    """Take a tensor of this dtype and shape (None: any size) out of `tensors`."""
    x = tensors.pop(name, None)
    fits = x is not None and x.dtype == dtype and x.ndim == len(shape) and x.numel() > 0
    fits = fits and all(want in (None, n) for want, n in zip(shape, x.shape))
    need(fits, f"{name} is missing, or has a wrong dtype or shape")
    return x

def unpack_flags(tensors):
    """See pack_flags()."""
    text = expect(tensors, "flags", torch.uint8, (None,)).numpy().tobytes()
    flags, kind = json.loads(text), type(sentence_flags([b"."])[0])
    need(isinstance(flags, list) and flags, "flags are no list")
    if kind is bytes:
        flags = [x.encode("latin-1") for x in flags]
    need(all(type(x) is kind for x in flags), "flags are wrong")
    return flags

def read_text(cache, tensors, vocabulary):
    """The rows of the cache, cut into sentences anew."""
    tokens = expect(tensors, "tokens", torch.int64, (None, None))     # (B, T)
    real = tokens >= 0
    order = bool(real[:, 0].all()) and not bool((real[:, 1:] > real[:, :-1]).any())
    need(order and bool(real[:, -1].any()) and -1 <= int(tokens.min())
         and int(tokens.max()) < vocabulary, "tokens are no text of this model")
    s, rows = cache.settings, []
    for ids in tokens.tolist():
        row = Segmenter(cache.flags, s.sink, s.max_sentence)
        row.extend(ids)
        row.extend([])                              # no token is new
        rows.append(row)
    return rows

def read_layer(cache, tensors, prefix, model):
    """A layer like those that the cache itself makes, with the content of the file."""
    c, weight, B = model.config, model.embed_tokens.weight, len(cache.rows)
    H, d = c.num_key_value_heads, c.head_dim
    count = tensors.get(prefix + "count")
    S = max(len(row.lengths) for row in cache.rows)
    need(count is not None and count.ndim == 2 and count.shape[1] >= S,
         f"{prefix}count is missing, or has a wrong shape")
    cache.room = max(cache.room, count.shape[1])
    q = weight.new_zeros(B, c.num_attention_heads, 1, d)
    layer = cache._new_layer(q, q[:, :H])
    for name, x in vars(layer).items():
        if name == "observed" and prefix + name not in tensors:       # keep=r has pruned already
            layer.observed = None
        elif torch.is_tensor(x):
            x.copy_(expect(tensors, prefix + name, x.dtype, x.shape))
    kv = expect(tensors, prefix + "kv", weight.dtype, (B, None, H, 2, d))
    used = layer.count.sum(1).tolist()
    check_counts(cache, layer.count.tolist(), used, pruned=layer.observed is None)
    need(max(used) == kv.shape[1], f"{prefix}kv has a wrong shape")
    fill(layer, kv, used, cache.host_pool)
    return layer

def fill(layer, kv, used, host_pool):
    """Put kv (B, slots, H, 2, d) from the file into the layer's pool."""
    if layer.pool.stream is None:                   # what is appended goes to memory of its own
        layer.pool.kv = kv
        layer.pool.used = used
        layer.pool = BranchPool(layer.pool, used, host_pool)
    else:
        B, N, *shape = kv.shape
        layer.pool.kv = layer.pool.allocate((B, N + N // 8 + 16, *shape), kv.dtype)
        layer.pool.kv[:, :N] = kv
        layer.pool.used = used
