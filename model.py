"""A Llama (2, 3, 3.1, 3.2) that loads Hugging Face checkpoints, and the dense KV cache.

Reading order: Config, rope, Attention, MLP, Block, Llama, sample, DenseKV. The loader is last.

The model owns no cache. Every layer passes its queries, keys and values to a cache object, which
returns the output of attention: DenseKV below, or SentenceKV in sentencekv.py. A cache has

    begin(tokens)            once per forward: the next tokens (B, T) -> their positions (B, T)
    attend(layer, q, k, v)   once per layer: q (B, Hq, T, d), k, v (B, H, T, d) -> (B, Hq, T, d)
    length                   tokens of the longest row
    next_layer               whose attend() comes next; None: a forward was interrupted

T > 1 is a prompt or a follow-up, T == 1 a decode step. -1 is padding: it follows the tokens of a
shorter row, or, with T == 1, stands for a row that has finished; its outputs are meaningless.

B rows, T new tokens, D model width, Hq query heads, H key-value heads, d head width, V vocabulary.
"""
import json
import math
import re
import warnings
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sentencekv import causal_attention, need

LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

def check(name, x, kind, low, high):
    """ValueError if x is not of this type, or not from low to high."""
    fits = type(x) in ((int, float) if kind is float else (kind,)) and low <= x <= high
    need(fits, f"{name} must be {kind.__name__}, {low} to {high}, got {x!r:.60}")

@dataclass
class Config:
    """The shape of a Llama, named as in Hugging Face's config.json. ValueError for bad values."""
    vocab_size: int                         # V
    hidden_size: int                        # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int                # Hq
    num_key_value_heads: int = None         # H; None: num_attention_heads
    head_dim: int = None                    # d; None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # None, or fields as in LINEAR_ROPE or LLAMA3_ROPE
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096     # a longer context gives a warning

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        limits = {int: (1, 2**24), float: (1e-12, 1e12), bool: (False, True)}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "head_dim" and value is None:
                value = self.head_dim = self.hidden_size // self.num_attention_heads
            if field.type in limits:
                check(field.name, value, field.type, *limits[field.type])
        Hq, H, d = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        need(Hq % H == 0, f"num_attention_heads {Hq} is no multiple of num_key_value_heads {H}")
        need(d % 2 == 0 and Hq * d <= 2**24, f"head_dim must be even and not huge, got {d}")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

def check_rope_scaling(s):
    """ValueError for anything but the two scalings that rope_frequencies() computes."""
    forms = [form for form in (LINEAR_ROPE, LLAMA3_ROPE) if isinstance(s, dict)
             and s.keys() == form.keys() and s["rope_type"] == form["rope_type"]]
    need(forms, f"rope_scaling must be as {LINEAR_ROPE} or {LLAMA3_ROPE}, got {s!r:.120}")
    for name in s.keys() - {"rope_type"}:
        check(f"rope_scaling {name}", s[name], float, 1e-12, 1e12)
    need(s.get("low_freq_factor", 0) < s.get("high_freq_factor", 1),
         "rope_scaling: low_freq_factor must be smaller than high_freq_factor")

def rope_frequencies(c):
    """Angle per position of each of the d/2 rotary pairs, (d/2,) float32.

    Linear scaling divides all by `factor`. Llama 3.1's divides those that turn rarely in the
    original context, keeps those that turn often, and interpolates in between.
    """
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    frequency = 1 / c.rope_theta ** exponent                            # (d/2,)
    s = c.rope_scaling
    if s is None:
        return frequency
    if s["rope_type"] == "linear":
        return frequency / s["factor"]
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequency / s["factor"], frequency, keep.clamp(0, 1))

def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + d/2]) of x (B, H, T, d). cos and sin (B, 1, T, d/2)."""
    a, b = x.chunk(2, dim=-1)                                           # (B, H, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)    # (B, H, T, d)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, layer, cache):
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.d).transpose(1, 2)       # (B, Hq, T, d)
        k = self.k_proj(x).view(B, T, -1, self.d).transpose(1, 2)       # (B, H, T, d)
        v = self.v_proj(x).view(B, T, -1, self.d).transpose(1, 2)       # (B, H, T, d)
        y = cache.attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))         # (B, T, D)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    SLICE = 4096    # tokens per call of the MLP: bounds the memory of its wide hidden layer

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache)     # (B, T, D)
        parts = x.split(self.SLICE, dim=1)
        return torch.cat([x + self.mlp(self.post_attention_layernorm(x)) for x in parts], dim=1)

class Llama(nn.Module):
    """The parameters have Hugging Face's names without the leading "model."."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        tied = c.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(c)     # no buffer: .to(dtype) must leave it in float32

    def forward(self, tokens, cache, all_logits=False, progress=None):
        """tokens (B, T) -> float32 logits of each row's last token (B, V), or all (B, T, V).

        `progress(done, layers)` is called after every layer. ValueError for bad tokens, and for a
        cache whose last forward was interrupted.
        """
        self.check_tokens(tokens)
        positions = cache.begin(tokens)                                 # (B, T)
        try:
            return self.compute(tokens, positions, cache, all_logits, progress)
        except BaseException:
            cache.next_layer = None
            raise

    def compute(self, tokens, positions, cache, all_logits=False, progress=None):
        """The rest of forward(), after begin(). Launches kernels only: a CUDA graph can hold it."""
        limit = self.config.max_position_embeddings
        if getattr(cache, "length", 0) > limit:
            warnings.warn(f"the context is longer than the {limit} tokens this model is made for")
        x = self.embed_tokens(tokens.clamp(min=0))                      # (B, T, D)
        self.inv_freq = self.inv_freq.to(x.device)
        angle = positions[:, None, :, None].float() * self.inv_freq     # (B, 1, T, d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, i, cache)                            # (B, T, D)
            if progress is not None:
                progress(i + 1, len(self.layers))
        if not all_logits:
            last = (tokens[:, 1:] >= 0).sum(1)                          # (B,) padding comes after
            x = x[torch.arange(len(x), device=x.device), last]          # (B, D)
        return F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight).float()

    def check_tokens(self, tokens):
        """ValueError for tokens that cannot be embedded."""
        need(isinstance(tokens, torch.Tensor), f"tokens must be a tensor, got {type(tokens)}")
        shape, V, dtype = tuple(tokens.shape), self.config.vocab_size, tokens.dtype
        need(len(shape) == 2 and 0 not in shape and dtype in (torch.int64, torch.int32),
             f"tokens must be int64 of shape (batch, at least 1), got {dtype} {shape}")
        if tokens.is_cpu or shape[1] > 1:       # never waits for a GPU at a decode step
            for id in map(int, tokens.aminmax()):
                need(-1 <= id < V, f"token id {id} is not in the vocabulary of {V}")
            real = tokens >= 0
            need(not (real[:, 1:] > real[:, :-1]).any(), "-1 is padding: no token may follow it")

    @torch.no_grad()
    def prefill(self, tokens, cache, chunk=None, progress=None):
        """forward() of a prompt (B, T), shorter rows padded with -1, in chunks -> logits (B, V).

        chunk: tokens per forward, to bound the device memory; None: all. `progress(done, total)`
        is called after every layer. MemoryError if memory does not suffice.
        """
        check_settings(chunk=chunk)
        self.check_tokens(tokens)
        self.check_memory(tokens, cache)
        T, layers, before = tokens.shape[1], len(self.layers), cache.length
        cuts = list(range(0, T, chunk or T))
        if T > 1 and cuts[-1] == T - 1:         # one token alone would be a decode step
            cuts.pop()
        chunks, total = tokens.tensor_split(cuts[1:], dim=1), len(cuts) * layers
        try:
            for n, part in enumerate(chunks):
                report = progress and (lambda i, _: progress(n * layers + i, total))
                new = self(part, cache, progress=report)                # (B, V)
                logits = torch.where(part[:, :1] >= 0, new, logits) if n else new
        except BaseException as error:
            if cache.length > before:           # a part of the prompt is in the cache
                cache.next_layer = None
            if not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            text = f"no device memory for {part.shape[1]} tokens at once: set a smaller chunk"
            raise MemoryError(text) from error
        return logits

    def check_memory(self, tokens, cache):
        """MemoryError if host memory cannot hold the keys and values of tokens (B, T)."""
        c, free = self.config, available_memory()
        size = tokens.numel() * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        size *= self.embed_tokens.weight.itemsize
        on_host = tokens.is_cpu or not isinstance(cache, DenseKV)
        if on_host and free is not None and size > free:
            raise MemoryError(f"this prompt's keys and values take {size / 1e9:.1f} GB of host "
                              f"memory, {free / 1e9:.1f} GB are free: shorten the prompt")

    def generate(self, tokens, cache, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=None,
                 stop_ids=(), progress=None, chunk=None, step=None):
        """Generate after a prompt (B, T) that is not in the cache; yields ids (B,) at each step.

        Temperature 0 is greedy; else samples from the smallest set of tokens whose probability
        reaches top_p. A row that yields one of stop_ids repeats it until all rows have finished.
        The cache holds all tokens of a row but the last. chunk, progress: see prefill. step
        computes the logits of tokens (B, 1) in place of self(tokens, cache). ValueError for bad
        arguments, at the call, and before a sample from logits that are not finite.
        """
        check_settings(max_new_tokens, temperature, top_p, seed, chunk, stop_ids)
        self.check_tokens(tokens)
        rng = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        stops = torch.tensor([*stop_ids], dtype=torch.long, device=tokens.device)
        step = step or (lambda tokens: self(tokens, cache))

        @torch.no_grad()
        def stream(tokens):
            ids = finished = torch.zeros_like(tokens[:, 0], dtype=torch.bool)   # (B,)
            for i in range(max_new_tokens):
                logits = step(tokens) if i else self.prefill(tokens, cache, chunk, progress)
                logits = logits.masked_fill(finished[:, None], 0)               # (B, V)
                need(logits.isfinite().all(), f"step {i}: the logits are not finite")
                ids = torch.where(finished, ids, sample(logits, temperature, top_p, rng))
                yield ids
                finished = finished | torch.isin(ids, stops)
                if len(stops) and finished.all():
                    return
                tokens = ids.masked_fill(finished, -1)[:, None]                 # (B, 1)
        return stream(tokens)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None, progress=None):
        """Load a Hugging Face directory; dtype None: as stored. No parameter requires a gradient.

        `progress(done, total)` is called per tensor. ValueError or FileNotFoundError names the
        file, and the tensor that is missing, unexpected, damaged or of another shape.
        """
        path = Path(path)
        config, tensors = read_huggingface(path)
        return assemble(cls, config, tensors, path, huggingface_name, device, dtype, progress)

def check_settings(max_new_tokens=0, temperature=0., top_p=1., seed=None, chunk=None, stop_ids=()):
    """ValueError for bad arguments of prefill() and generate()."""
    check("max_new_tokens", max_new_tokens, int, 0, 2**62)
    check("temperature", temperature, float, 0, 1e12)
    check("top_p", top_p, float, 1e-12, 1)
    check("seed", 0 if seed is None else seed, int, 0, 2**63 - 1)
    check("chunk", 2 if chunk is None else chunk, int, 2, 2**62)
    need(isinstance(stop_ids, (set, frozenset, list, tuple)) and {*map(type, stop_ids)} <= {int},
         f"stop_ids must be a set of ids, got {stop_ids!r:.60}")

def sample(logits, temperature=0.0, top_p=1.0, rng=None):
    """logits (B, V) -> ids (B,). Nucleus sampling; temperature 0 takes the largest logit."""
    if temperature < 1e-6:                                              # less would overflow
        return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)       # (B, V) each
    if top_p < 1:
        outside = p.cumsum(-1) - p >= top_p                             # those before reach top_p
        outside[:, 0] = False                                           # one is always left
        p = p.masked_fill(outside, 0)
    return ids.gather(-1, torch.multinomial(p, 1, generator=rng)).squeeze(-1)   # (B,)

def available_memory():
    """Bytes of free host memory, or None on systems without /proc/meminfo."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", file.read_text()) if file.exists() else None
    return found and 1024 * int(found[1])

class DenseKV:
    """Keeps all keys and values on the device: what every other cache is compared with.

    keys, values: per layer (B, H, capacity, d); row b holds lengths[b] tokens.
    """

    def __init__(self):
        self.keys, self.values, self.lengths, self.next_layer = [], [], [], 0

    @property
    def length(self):
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    def complete(self):
        return not self.lengths or self.next_layer == len(self.keys) > 0

    def begin(self, tokens):
        """Note the next tokens (B, T), see the top of this file -> their positions (B, T)."""
        (B, T), rows = tokens.shape, len(self.lengths)
        need(self.complete(), "a forward was interrupted: truncate the cache or use a new one")
        need(rows in (0, B), f"this cache holds {rows} rows, got tokens for {B}: use a new cache")
        new = (tokens >= 0).sum(1).tolist()
        need(rows or min(new) > 0, "-1 is padding: every row of the first prompt needs a token")
        self.next_layer = None                              # until the bookkeeping is done
        self.before = self.lengths or [0] * B
        self.lengths = [n + m for n, m in zip(self.before, new)]
        self.next_layer = 0
        start = torch.tensor(self.before).to(tokens.device, non_blocking=True)          # (B,)
        return start[:, None] + torch.arange(T, device=tokens.device)                   # (B, T)

    def attend(self, layer, q, k, v):
        """Store k and v (B, H, T, d); attention of q (B, Hq, T, d) over all stored tokens."""
        T, N = q.shape[2], max(self.before) + q.shape[2]
        known = layer < len(self.keys) or not any(self.before)
        need(layer == self.next_layer and known, f"layer {layer} is not the next: use a new cache")
        for buffers, new in ((self.keys, k), (self.values, v)):
            if layer == len(buffers):
                buffers.append(new[:, :, :0])
            if N > buffers[layer].shape[2]:
                more = (0, 0, 0, T + max(64, N // 8))
                with torch.inference_mode(False):           # a buffer that any mode can write to
                    buffers[layer] = F.pad(buffers[layer], more)            # (B, H, capacity, d)
            for b, n in enumerate(self.before):
                buffers[layer][b, :, n:n + T] = new[b]                                  # (H, T, d)
        self.next_layer = layer + 1
        keys, values = self.keys[layer], self.values[layer]
        if len(set(self.before)) == 1:
            return causal_attention(q, keys[:, :, :N], values[:, :, :N])
        rows = [causal_attention(q[b, None], keys[b, None, :, :n + T], values[b, None, :, :n + T])
                for b, n in enumerate(self.before)]
        return torch.cat(rows)                                                  # (B, Hq, T, d)

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens of each row: an int, or an int per row."""
        held = self.lengths if self.complete() else self.before
        wanted = [lengths] * len(held) if type(lengths) is int else list(lengths)
        fits = [type(n) is int and 0 < n <= most for n, most in zip(wanted, held)]
        need(all(fits) and len(wanted) == len(held),
             f"truncate() takes lengths from 1 to {held}, got {lengths}")
        self.lengths, self.next_layer = wanted, len(self.keys)

    def memory(self):
        """Bytes of all buffers: {"device": ..., "host": ...}."""
        return {"device": sum(t.nbytes for t in self.keys + self.values), "host": 0}

# --------------------------------------------------------------------------------- the loader
# Files may be damaged or hostile: everything in them is checked, and no code in them is run.

@contextmanager
def blame(path, name=None):
    """Turn any exception into a ValueError of one line that names the file and what is in it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as e:
        kind = {ValueError: "", KeyError: "missing field "}.get(type(e), f"{type(e).__name__}: ")
        text = f"{'' if name is None else repr(name)} {kind}{e}"
        raise ValueError(f"{path}: {' '.join(text.split()):.400}") from e

def parse_json(raw):
    """bytes -> dict. ValueError for anything but one JSON object, and for a name given twice."""
    def unique(pairs):
        names = {}
        for name, value in pairs:
            need(name not in names, f"{name!r:.100} is given twice")
            names[name] = value
        return names
    value = json.loads(raw.decode(), object_pairs_hook=unique)
    need(isinstance(value, dict), "must hold a JSON object")
    return value

SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def read_header(path):
    """The JSON header of a safetensors file, and the offset of the data that follow it."""
    with blame(path), open(path, "rb") as file:
        raw, size = file.read(8), path.stat().st_size
        need(raw != b"version ", "is a Git LFS pointer, not the weights: run `git lfs pull`")
        n = int.from_bytes(raw, "little")
        need(2 <= n <= min(size - 8, 100_000_000),
             f"truncated or not a safetensors file (a header of {n} bytes in a file of {size})")
        return parse_json(file.read(n)), 8 + n

def read_safetensors(path, dtypes=SAFETENSORS):
    """{name: tensor} of one file, memory-mapped: bytes are read from disk when a tensor is used.

    The format: 8 bytes with the length of the header, the header, a JSON object {name: {dtype,
    shape, data_offsets}}, and the data. ValueError for wrong sizes, gaps and overlaps.
    """
    header, start = read_header(path)
    header.pop("__metadata__", None)
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)[start:]
    tensors, spans = {}, []
    for name, entry in header.items():
        with blame(path, name):
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
            need(dtype in [*dtypes], f"has dtype {dtype!r:.60}, supported: {', '.join(dtypes)}")
            need(all(type(n) is int and n >= 0 for n in (begin, end, *shape)),
                 f"has a bad shape {shape!r:.60} or bad offsets {begin!r:.60}, {end!r:.60}")
            part = data[begin:end]
            if part.storage_offset() % dtypes[dtype].itemsize:          # not aligned
                part = part.clone()
            tensors[name] = part.view(dtypes[dtype]).view(shape)        # checks the size
            spans.append((begin, end, name))
    at = 0
    for begin, end, name in [*sorted(spans), (len(data), 0, "end of file")]:
        with blame(path, name):
            need(begin == at, f"is at byte {begin}, expected {at}: there is a gap or an overlap")
        at = end
    return tensors

def existing(file):
    """The file itself; FileNotFoundError that names what there is instead, if unsupported."""
    if not file.is_file():
        found = [f.name for f in file.parent.glob("*") if f.suffix in (".bin", ".gguf", ".pth")]
        text = f" (found {min(found)}, which is unsupported: use safetensors)" if found else ""
        raise FileNotFoundError(f"{file}: no such file{text}")
    return file

def read_huggingface(path):
    """A directory -> (Config, {name in the files: (file, tensor)})."""
    meta = (path / "params.json").is_file() and not (path / "config.json").exists()
    need(not meta, f"{path}: a Meta checkpoint: use extras.meta.load_meta(path)")
    with blame(path / "config.json"):
        config = huggingface_config(parse_json(existing(path / "config.json").read_bytes()))
    places, files, index = None, ["model.safetensors"], path / "model.safetensors.index.json"
    if index.is_file() and not (path / files[0]).exists():
        with blame(index):
            places = parse_json(index.read_bytes())["weight_map"]
            files = sorted(set(places.values()))
            for f in files:
                need(re.fullmatch(r"[\w.-]{1,200}\.safetensors", f),
                     f"{f!r:.100} is not the plain name of a .safetensors file")
    tensors = {}
    for f in files:
        for name, t in read_safetensors(existing(path / f)).items():
            fits = places is None or places.get(name) == f
            need(fits, f"{path / f}: {name!r:.200} is in this file, but not in {index.name}")
            tensors[name] = (path / f, t)
    return config, tensors

DEFAULTS = {"llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
            "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
                        "num_key_value_heads": 8, "sliding_window": 4096}}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "partial_rotary_factor": 1, "quantization_config": None}

def huggingface_config(j):
    """config.json -> Config. ValueError for everything that this model does not compute."""
    kind = j.get("model_type")
    need(kind in [*DEFAULTS], f"model_type {kind!r:.60} is unsupported, only {[*DEFAULTS]} are")
    j = {**DEFAULTS[kind], **j}
    for name, only in ONLY.items():
        need(j.get(name) in (None, only), f"{name} = {j.get(name)!r:.60} is unsupported")
    window = j.get("sliding_window")
    wide = type(window) is int and window >= j["max_position_embeddings"]
    need(window is None or wide, f"sliding_window = {window!r:.60} is shorter than the context")
    given = [j[name] for name in ("rope_scaling", "rope_parameters") if j.get(name) is not None]
    rope = given[0] if given else {}
    need(isinstance(rope, dict) and all(other == rope for other in given),
         f"rope_scaling and rope_parameters must be one and the same object, got {given!r:.200}")
    scaling = {"rope_type": rope.get("type", "default"), **rope}
    theta = scaling.pop("rope_theta", j.get("rope_theta", 10000.0))
    scaling.pop("type", None)
    if scaling == {"rope_type": "default"}:
        scaling = None
    j = {**j, "rope_theta": theta, "rope_scaling": scaling}
    return Config(**{field.name: j[field.name] for field in fields(Config)
                     if field.name in j or field.default is MISSING})

def huggingface_name(name):
    return name if name == "lm_head.weight" else "model." + name

def assemble(model_class, config, tensors, path, spell, device, dtype, progress):
    """A model whose parameter `name` is a copy of tensors[spell(name)], a pair (file, tensor)."""
    layers, n = config.num_hidden_layers, len(tensors)
    need(layers <= n, f"{path}: the config asks for {layers} layers, there are {n} tensors")
    with torch.device("meta"):                              # names and shapes without memory
        model = model_class(config)
    shapes = {spell(name): p.shape for name, p in model.named_parameters()}
    check_tensors(tensors, shapes, path, spell("embed_tokens.weight"), spell("lm_head.weight"))
    dtype, state = dtype or tensors[spell("embed_tokens.weight")][1].dtype, {}
    for name, _ in model.named_parameters():
        tensor = tensors[spell(name)][1]
        state[name] = tensor.to(device=device or "cpu", dtype=dtype, copy=True)
        if progress is not None:
            progress(len(state), len(shapes))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)

def check_tensors(tensors, shapes, path, embeddings, head):
    """ValueError unless the tensors are exactly those of {name: shape}."""
    missing = [name for name in shapes if name not in tensors]
    need(not missing, f"{path}: {missing[:1]} is missing, {len(missing)} of {len(shapes)} are")
    for name, (file, t) in tensors.items():
        with blame(file, name):
            if name.endswith("rotary_emb.inv_freq"):        # in older files; recomputed
                continue
            if name == head and head not in shapes:         # tied, yet in the file
                need(torch.equal(t, tensors[embeddings][1]), "differs from the tied embeddings")
                continue
            shape = shapes.get(name)
            need(shape is not None, "is unexpected, this model has no such tensor")
            need(t.shape == shape, f"has shape {tuple(t.shape)}, config.json: {tuple(shape)}")
