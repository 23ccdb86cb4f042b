"""A minimal Llama (2, 3, 3.1, 3.2) that loads real checkpoints, and the plain dense KV cache.

Reading order: Config -> rotary, Attention, MLP, Block -> Llama -> DenseKV -> the loader (Hugging Face). Meta's
checkpoints and CUDA graphs need experiments/ beside this file, nothing else does.

The model owns no cache. Every layer hands its queries, keys and values to a cache object and gets the attention
output back; whatever the cache does in between (keep all of it, as DenseKV does here, or keep sentences in CPU
memory, as sentencekv.py does) is none of the model's business. A cache has two methods:

    begin(tokens)            tokens (B, T) that come next -> their positions (B, T); called once per forward.
                             Shorter rows of a prompt end with -1; begin(tokens, n): n more tokens of it follow
    attend(layer, q, k, v)   q (B, Hq, T, d), k and v (B, Hkv, T, d), q and k rotated -> (B, Hq, T, d); once per layer

Shapes: B rows, T new tokens, N tokens in the cache, D model width, Hq query heads, Hkv key-value heads,
G = Hq / Hkv query heads share one key-value head (GQA), d width of a head, V vocabulary.
"""
import json, math, os, re, warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

def demand(ok, message):
    if not ok:
        raise ValueError(message)

def demand_field(name, kind, x):
    """ValueError if x, the value of a field, is not of its kind: int, float or bool."""
    fits, wanted = {
        int: (type(x) is int and 1 <= x <= 1 << 24, "a whole number from 1 to 2^24"),
        float: (type(x) in (int, float) and 1e-12 <= x <= 1e12, "1e-12 to 1e12"),
        bool: (type(x) is bool, "true or false")}[kind]
    demand(fits, f"{name} must be {wanted}, got {x!r:.60}")

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}

@dataclass
class Config:
    """The shape of a Llama, named as in Hugging Face's config.json. ValueError for what cannot be."""
    vocab_size: int                         # V
    hidden_size: int                        # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int                # Hq
    num_key_value_heads: int = None         # Hkv; None: as many as query heads
    head_dim: int = None                    # d; None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # None, or Llama 3.1's scaling: the four numbers named in LLAMA3_ROPE
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096     # a longer context is computed, with a warning

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for field in fields(self):
            if field.name == "head_dim" and self.head_dim is None:              # made of fields that are checked by now
                self.head_dim = self.hidden_size // self.num_attention_heads
            if field.type in (int, float, bool):
                demand_field(field.name, field.type, getattr(self, field.name))
        heads, kv_heads, d, s = self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rope_scaling
        demand(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        demand(d % 2 == 0 and heads * d <= 1 << 24, f"head_dim must be even (rotary pairs) and not huge, got {d}")
        if s is not None:
            demand(isinstance(s, dict) and s.keys() == LLAMA3_ROPE.keys(),
                   f"rope_scaling must have {', '.join(LLAMA3_ROPE)}, got {s!r:.120}")
            for name, x in s.items():
                demand_field(f"rope_scaling {name}", float, x)
            demand(s["low_freq_factor"] < s["high_freq_factor"],
                   "rope_scaling: low_freq_factor must be smaller than high_freq_factor")

def rope_frequencies(c: Config) -> torch.Tensor:
    """Angle per position of each of the d/2 rotated pairs, (d/2,) float32; with Llama 3.1's scaling if set.

    The scaling slows pairs that turn fewer than `low_freq_factor` times in the original context down by `factor`,
    leaves pairs that turn more than `high_freq_factor` times alone, and blends linearly in between.
    """
    frequency = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    if not c.rope_scaling:
        return frequency
    s = c.rope_scaling
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequency / s["factor"], frequency, blend.clamp(0, 1))

def rotate(x, cos, sin):
    """Rotary embedding, Hugging Face's layout: pair i is (x[i], x[i + d/2]). x (B, H, T, d), cos (B, 1, T, d/2)."""
    a, b = x.chunk(2, dim=-1)                                                   # (B, H, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)            # (B, H, T, d)

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.d, q_width, kv_width = c.head_dim, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, layer, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.d).transpose(1, 2)               # (B, Hq, T, d)
        k = self.k_proj(x).view(B, T, -1, self.d).transpose(1, 2)               # (B, Hkv, T, d)
        v = self.v_proj(x).view(B, T, -1, self.d).transpose(1, 2)               # (B, Hkv, T, d)
        y = cache.attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)    # (B, Hq, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                 # (B, T, D)

class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    SLICE = 4096  # tokens; the MLP's hidden layer is the widest tensor of a prefill, so it never exists whole

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache)             # (B, T, D)
        return torch.cat([s + self.mlp(self.post_attention_layernorm(s)) for s in x.split(self.SLICE, dim=1)], dim=1)

class Llama(nn.Module):
    """Parameter names are Hugging Face's without the leading "model."."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(c)         # a plain attribute: float32 for ever, whatever .to(dtype) does

    def check(self, tokens):
        """ValueError for tokens that cannot be embedded. Not at decode steps on a GPU: a look would stall them."""
        demand(tokens.ndim == 2 and 0 not in tokens.shape and tokens.dtype in (torch.int64, torch.int32),
               f"tokens must be int64 of shape (batch, at least 1), got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" or tokens.shape[1] > 1:
            V, real = self.config.vocab_size, tokens >= 0
            (low, high), gap = map(int, tokens.aminmax()), bool((real[:, 1:] > real[:, :-1]).any())
            for id in (low, high):
                demand(-1 <= id < V, f"token id {id} is not in the vocabulary of {V}")
            demand(bool(real[:, 0].all()) and not gap, "-1 is padding: it may only follow after the tokens of a row")

    def forward(self, tokens, cache, all_logits=False, progress=None):
        """tokens (B, T) -> float32 logits of each row's last token (B, V), or of every position (B, T, V).

        `cache` holds what came before; T > 1 is a prompt (or its continuation; shorter rows are filled up with -1),
        T == 1 a decode step. `progress(done, layers)` is called after every layer. Raises ValueError for tokens that
        cannot be embedded.
        """
        self.check(tokens)
        return self.compute(tokens, cache, all_logits, progress)

    def compute(self, tokens, cache, all_logits=False, progress=None, more=0):
        """forward() of tokens that have been checked; a row may hold padding alone, its logits mean nothing."""
        B, longest = len(tokens), self.config.max_position_embeddings
        positions = cache.begin(tokens, more) if more else cache.begin(tokens)  # (B, T)
        cache.model = self                                                      # whose keys and values it holds
        if getattr(cache, "length", 0) > longest:
            warnings.warn(f"the context is longer than the {longest} tokens that this model was made for")
        x = self.embed_tokens(tokens.clamp(min=0))                              # (B, T, D)
        self.inv_freq = self.inv_freq.to(x.device)                              # moves once, with the model
        angle = positions[:, None, :, None].float() * self.inv_freq             # (B, 1, T, d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, i, cache)
            if progress is not None:
                progress(i + 1, len(self.layers))
        if not all_logits:
            last = (tokens[:, 1:] >= 0).sum(1)                                  # (B,) of each row, padding follows
            x = x[torch.arange(B, device=x.device), last]                       # (B, D)
        return F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight).float()

    @torch.no_grad()
    def prefill(self, tokens, cache, chunk=None, progress=None):
        """Read a prompt (B, T), shorter rows filled up with -1 -> float32 logits of each row's last token (B, V).

        chunk: so many tokens at a time, which bounds the device memory to that of a chunk and of one layer's K and V.
        `progress(done, total)` is called after every layer of every chunk. MemoryError if it cannot fit.
        """
        T, L = tokens.shape[1], len(self.layers)
        check_settings(chunk=chunk)
        self.check(tokens)
        self.check_memory(tokens, cache)
        cuts = [*range(0, T, chunk or T), T]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:                          # a token alone would be a decode step
            del cuts[-2]
        logits = None
        for n, (i, j) in enumerate(zip(cuts, cuts[1:])):
            report = progress and (lambda done, layers: progress(n * L + done, (len(cuts) - 1) * L))
            try:
                new = self.compute(tokens[:, i:j], cache, progress=report, more=T - j)      # (B, V)
            except torch.cuda.OutOfMemoryError as e:
                raise MemoryError(f"out of device memory, reading {j - i} tokens at once: set a smaller chunk") from e
            logits = new if i == 0 else torch.where(tokens[:, i:i + 1] >= 0, new, logits)   # rows that have ended
        return logits

    def check_memory(self, tokens, cache):
        """MemoryError before, instead of a crash after, reading tokens (B, T) that host memory cannot hold."""
        c, weight, free, (B, T) = self.config, self.embed_tokens.weight, available_memory(), tokens.shape
        if getattr(cache, "keep", None) is not None and cache.length == 0:
            T = min(T, int(cache.keep * cache.budget))
        need = B * T * c.num_hidden_layers * c.num_key_value_heads * 2 * c.head_dim * weight.itemsize
        if free is not None and need > free and (hasattr(cache, "pool") or tokens.device.type == "cpu"):
            raise MemoryError(f"this prompt's cache takes {need / 1e9:.1f} GB of host memory, {free / 1e9:.1f} are "
                              "free: shorten it, or let SentenceKV(keep=...) drop some of it")

    @torch.no_grad()
    def generate(self, tokens, cache, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=None, stop_ids=(),
                 progress=None, chunk=None, cuda_graph=False):
        """Stream new tokens: yields one (B,) tensor of ids per step. tokens (B, T) is what the cache has not seen.

        temperature 0 is greedy; otherwise samples from the smallest set of tokens whose probability reaches top_p.
        A row that has produced one of `stop_ids` yields it again and again; when all rows have, generation ends. In the
        end the cache holds for each row what it would hold had the row been alone: all but the token yielded last.
        chunk: see prefill; cuda_graph: see experiments/graph.py. ValueError, at the first step, for bad arguments.
        """
        check_settings(max_new_tokens, temperature, top_p, seed, chunk)
        step_of = lambda tokens: self(tokens, cache)
        if cuda_graph:
            from experiments.graph import GraphedStep
            demand(tokens.is_cuda, "cuda_graph needs a CUDA device")
            step_of = GraphedStep(self, cache)
        rng = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=tokens.device)
        last = done = torch.zeros(tokens.shape[:1], dtype=torch.bool, device=tokens.device)
        beyond = done.long()                                                                # (B,) read after the end
        try:
            for step in range(max_new_tokens):
                logits = step_of(tokens) if step else self.prefill(tokens, cache, chunk, progress)          # (B, V)
                beyond += done
                last = torch.where(done, last, sample(logits, temperature, top_p, rng))     # (B,)
                yield last
                done = done | torch.isin(last, stops)                                       # (B,)
                if len(stops) and bool(done.all()):
                    return
                tokens = last[:, None]                                                      # (B, 1)
        finally:
            if len(stops) and bool(beyond.any()):
                cache.truncate([int(n) - int(m) for n, m in zip(cache.lengths, beyond)])

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None, progress=None):
        """Load a Hugging Face directory (config.json, *.safetensors) or a Meta one (params.json, *.pth).

        device: default CPU. dtype: default that of the checkpoint's embeddings. Parameters come with requires_grad
        False. `progress(done, total)` is called per tensor. Every tensor is accounted for: ValueError (or
        FileNotFoundError) names the file and the tensor that is missing, unexpected, mis-shaped or damaged.
        """
        path = Path(path)
        if os.path.isfile(path / "config.json"):
            return assemble(path, *read_huggingface(path), huggingface_name, device, dtype, progress)
        if os.path.isfile(path / "params.json"):
            from experiments.meta import load_meta
            return load_meta(path, device, dtype, progress)
        raise FileNotFoundError(f"{path}: no config.json (Hugging Face) and no params.json (Meta) in it")

def check_settings(max_new_tokens=0, temperature=0.0, top_p=1.0, seed=None, chunk=None):
    """ValueError for what prefill() and generate() cannot work with."""
    demand(type(max_new_tokens) is int and max_new_tokens >= 0,
           f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens!r}")
    demand(0 <= temperature < math.inf, f"temperature must be finite and at least 0, got {temperature}")
    demand(0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}")
    demand(seed is None or type(seed) is int and 0 <= seed < 1 << 63,
           f"seed must be None or a whole number from 0 to 2^63 - 1, got {seed!r}")
    demand(chunk is None or type(chunk) is int and chunk > 1, f"chunk must be None or 2 at least, got {chunk!r}")

def sample(logits, temperature=0.0, top_p=1.0, rng=None):
    """logits (B, V) -> ids (B,). Nucleus sampling; temperature 0 takes the largest logit."""
    if temperature < 1e-6:                                                      # less would overflow float32
        return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)       # (B, V) each
    if top_p < 1:
        rest = p.cumsum(-1) - p >= top_p                                        # (B, V) those before reach top_p
        rest[:, 0] = False                                                      # one is always left
        p = p.masked_fill(rest, 0)
    return ids.gather(-1, torch.multinomial(p, 1, generator=rng)).squeeze(-1)   # (B,)

# ---------------------------------------------------------------------------------------------- the dense cache

def causal_attention(q, k, v, before, step=512):
    """Exact attention of T new tokens to themselves and to what is before them; GQA without expansion.

    q (B, Hq, T, d), k and v (B, Hkv, capacity, d) -> (B, Hq, T, d); of row b the first before[b] + T keys count.
    Queries go in slices, so that no (T, N) mask or score matrix ever exists.
    """
    (B, Hq, T, d), Hkv, N = q.shape, k.shape[1], before[0] + q.shape[2]
    if len(set(before)) > 1:  # rows of different length, one at a time
        rows = [causal_attention(q[b:b + 1], k[b:b + 1], v[b:b + 1], before[b:b + 1], step) for b in range(B)]
        return torch.cat(rows)                                                  # (B, Hq, T, d)
    if T == 1:  # the G query heads of a group become G queries of one head
        q = q.reshape(B, Hkv, Hq // Hkv, d)                                     # (B, Hkv, G, d)
        return F.scaled_dot_product_attention(q, k[:, :, :N], v[:, :, :N]).reshape(B, Hq, 1, d)
    out = []
    for i in range(0, T, step):
        t = min(step, T - i)
        end = N - T + i + t                                                     # keys up to the slice's last query
        out.append(F.scaled_dot_product_attention(q[:, :, i:i + t], k[:, :, :end], v[:, :, :end], enable_gqa=True,
                                                  attn_mask=causal_lower_right(t, end)))            # (B, Hq, t, d)
    return torch.cat(out, dim=2)                                                # (B, Hq, T, d)

class DenseKV:
    """The plain cache: every key and value stays on the device. Teacher, oracle and yardstick of all others.

    keys, values: per layer (B, Hkv, capacity, d), grown by an eighth when full; row b holds `lengths[b]` tokens.
    """

    def __init__(self):
        self.lengths, self.keys, self.values = [], [], []

    @property
    def length(self):
        """Tokens in the longest row."""
        return max(self.lengths, default=0)

    def begin(self, tokens, more=0):
        """Take note of the tokens (B, T) that come next, -1 after the end of a row; return their positions (B, T)."""
        (B, T), rows = tokens.shape, len(self.lengths) or len(tokens)
        demand(rows == B, f"this cache holds {rows} rows, got tokens for {B}: use a new cache")
        self.before = self.lengths or [0] * B
        new = [1] * B if T == 1 else (tokens >= 0).sum(1).tolist()
        self.lengths = [n + t for n, t in zip(self.before, new)]
        before = torch.tensor(self.before).to(tokens.device, non_blocking=True)             # (B,)
        return before[:, None] + torch.arange(T, device=tokens.device)                      # (B, T)

    def attend(self, layer, q, k, v):
        """Store k and v (B, Hkv, T, d); attention of q (B, Hq, T, d) over all that is stored -> (B, Hq, T, d)."""
        T = k.shape[2]
        N = max(self.before) + T
        for store, new in ((self.keys, k), (self.values, v)):
            if layer == len(store):
                store.append(new[:, :, :0])
            if N > store[layer].shape[2]:
                room = T + max(64, N // 8)
                store[layer] = F.pad(store[layer][:, :, :N - T], (0, 0, 0, room))           # (B, Hkv, capacity, d)
            for b, n in enumerate(self.before):
                store[layer][b, :, n:n + T] = new[b]                                        # (Hkv, T, d)
        return causal_attention(q, self.keys[layer], self.values[layer], self.before)

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens: one number, or one per row."""
        wanted = [lengths] * len(self.lengths) if type(lengths) is int else list(lengths)
        fits = [type(n) is int and 0 < n <= m for n, m in zip(wanted, self.lengths)]
        demand(all(fits) and len(wanted) == len(self.lengths),
               f"truncate() takes lengths from 1 to {self.lengths}, got {lengths}")
        self.lengths = wanted

    def memory(self):
        """Bytes of all buffers: {"device": ..., "host": ...}."""
        return {"device": sum(t.nbytes for t in self.keys + self.values), "host": 0}

def available_memory():
    """Bytes of host memory that are free for us, or None where Linux's /proc/meminfo is not to be had."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)

# --------------------------------------------------------------------------------------------------- the loader
# Files come from anywhere and may be damaged or hostile: nothing in them is believed, and no code in them is run.

@contextmanager
def blame(path, thing=""):
    """Whatever fails inside becomes a ValueError of one line that names the file and the thing in it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as e:
        kind = {ValueError: "", KeyError: "missing field "}.get(type(e), f"{type(e).__name__}: ")
        text = " ".join(f"{repr(thing) if thing else ''} {kind}{e}".split())
        raise ValueError(f"{path}: {text[:400]}") from e

def parse_json(raw):
    """bytes -> dict. ValueError for anything but one JSON object, and for a name given twice."""
    def unique(pairs):
        for name, count in Counter(name for name, _ in pairs).items():
            demand(count == 1, f"{name!r:.100} is given {count} times")
        return dict(pairs)
    value = json.loads(raw.decode(), object_pairs_hook=unique)
    demand(isinstance(value, dict), "must hold a JSON object")
    return value

def huggingface_name(name):
    return name if name == "lm_head.weight" else "model." + name

SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def read_safetensors(path, dtypes=SAFETENSORS):
    """{name: tensor} of one file, memory-mapped: bytes are read from disk when a tensor is used.

    The format: 8 bytes of length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the raw data.
    ValueError where the header lies: bad length, wrong sizes, holes or overlaps, a name given twice.
    """
    size = os.path.getsize(path)
    with blame(path), open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        demand(2 <= n <= min(size - 8, 100_000_000),
               f"truncated or not a safetensors file (a header of {n} bytes in a file of {size})")
        header = parse_json(f.read(n))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n:]
    tensors, spans = {}, []
    for name, entry in header.items():
        with blame(path, name):
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], dtypes.get(entry["dtype"])
            demand(dtype, f"has dtype {entry['dtype']!r:.60}, supported are {', '.join(dtypes)}")
            demand(len(shape) <= 8 and all(type(i) is int and 0 <= i < 1 << 48 for i in (begin, end, *shape)),
                   f"has a bad shape {shape!r:.60} or bad offsets {begin!r:.60}, {end!r:.60}")
            demand(end - begin == math.prod(shape) * dtype.itemsize and end <= len(data),
                   f"of shape {shape} in {dtype} cannot be bytes {begin} to {end} of {len(data)}")
            t = data[begin:end] if (8 + n + begin) % dtype.itemsize == 0 else data[begin:end].clone()   # aligned
            tensors[name] = t.view(dtype).view(shape)
            spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans) + [(len(data), 0, "end of file")]:
        with blame(path, name):
            demand(begin == at, f"is at byte {begin}, but what is before it ends at {at}: a hole or an overlap")
        at = end
    return tensors

def read_huggingface(path):
    """A Hugging Face directory -> (Config, {name in the files: (file, tensor)})."""
    with blame(path / "config.json"):
        config = huggingface_config(parse_json((path / "config.json").read_bytes()))
    places, files, index = None, ["model.safetensors"], path / "model.safetensors.index.json"
    if os.path.isfile(index) and not os.path.exists(path / files[0]):
        with blame(index):
            places = parse_json(index.read_bytes())["weight_map"]
            files = sorted(set(places.values()))
            for f in files:
                demand(re.fullmatch(r"[\w.-]{1,200}\.safetensors", f),
                       f"{f!r:.100} is not the plain name of a .safetensors file")
    tensors = {}
    for f in files:
        for name, t in read_safetensors(path / f).items():
            with blame(path / f, name):
                demand(places is None or places.get(name) == f, f"is in this file, but not according to {index.name}")
            tensors[name] = (path / f, t)
    return config, tensors

def huggingface_config(j):
    """config.json of a LlamaForCausalLM -> Config. Anything that this model does not compute is refused."""
    demand(j.get("model_type") == "llama", f"model_type {j.get('model_type')!r:.60} is not supported, only 'llama'")
    for name, only in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1,
                       "quantization_config": None}.items():
        demand(j.get(name) in (None, only), f"{name} = {j.get(name)!r:.60} is not supported, only {only!r}")
    given = [j[name] for name in ("rope_scaling", "rope_parameters") if j.get(name) is not None]    # old and new name
    rope = given[0] if given else {}
    demand(isinstance(rope, dict) and given in ([], [rope], [rope, rope]),
           f"rope_scaling and rope_parameters must be one and the same object, got {given!r:.200}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    demand(kind in ("default", "llama3") and rope.keys() <= {"rope_type", "type", "rope_theta", *LLAMA3_ROPE},
           f"rope {rope!r:.200} is not supported, only the types 'default' and 'llama3'")
    scaling = {name: rope.get(name) for name in LLAMA3_ROPE} if kind == "llama3" else None
    j = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **j, **rope, "rope_scaling": scaling}
    return Config(**{field.name: j[field.name] for field in fields(Config)
                     if field.name in j or field.default is MISSING})

def assemble(path, config, tensors, spell, device, dtype, progress):
    """A model from tensors {spell(name): (file, tensor)}, after comparing the names and every shape."""
    demand(config.num_hidden_layers <= len(tensors),
           f"{path}: the config asks for {config.num_hidden_layers} layers, there are {len(tensors)} tensors")
    with torch.device("meta"):                                                  # names and shapes without memory
        model = Llama(config)
    shapes = {spell(name): p.shape for name, p in model.named_parameters()}
    missing = [name for name in shapes if name not in tensors]
    with blame(path, missing and missing[0]):
        demand(not missing, f"is missing ({len(missing)} of {len(shapes)} tensors are)")
    table = tensors[spell("embed_tokens.weight")][1]
    for name, (file, t) in tensors.items():
        with blame(file, name):
            if name.endswith(("rotary_emb.inv_freq", "rope.freqs")):            # in older files; recomputed
                continue
            if name == spell("lm_head.weight") and config.tie_word_embeddings:  # allowed, if it is the same
                demand(torch.equal(t, table), "differs from the embeddings, yet tie_word_embeddings is true")
                continue
            demand(name in shapes, "is unexpected, this model has no such tensor")
            demand(t.shape == shapes[name], f"has shape {tuple(t.shape)}, the config asks for {tuple(shapes[name])}")
            demand(t.dtype in SAFETENSORS.values() and t.device.type == "cpu" and t.is_contiguous(),
                   f"is no plain tensor of float32, float16 or bfloat16, but {t.dtype}")
    state, dtype = {}, dtype or table.dtype
    for name, _ in model.named_parameters():
        state[name] = tensors[spell(name)][1].detach().to(device=device or "cpu", dtype=dtype, copy=True)
        if progress is not None:
            progress(len(state), len(shapes))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)
