"""A Llama (2, 3, 3.1, 3.2) that loads Hugging Face checkpoints, and the dense KV cache.

The model owns no cache. Every layer passes its queries, keys and values to a cache object, which
returns the output of attention: DenseKV below, or SentenceKV in sentencekv.py. A cache has

    begin(tokens)            once per forward: the next tokens (B, T) -> their positions (B, T)
    attend(layer, q, k, v)   once per layer: q (B, Hq, T, d), k, v (B, H, T, d) -> (B, Hq, T, d)
    length, next_layer       tokens of the longest row; whose attend() comes next

T > 1 is a prompt or a follow-up, T == 1 a decode step. -1 is padding: it follows the tokens of a
shorter row, or, with T == 1, stands for a row that has finished; its outputs are meaningless.
B rows, T new tokens, D model width, Hq query heads, H key-value heads, d head width, V vocabulary.
"""
import json, math, warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from sentencekv import causal_attention, need

@contextmanager
def blame(what):
    """Turn any exception into a ValueError or FileNotFoundError of one line that begins with it."""
    try:
        yield
    except FileNotFoundError:
        others = ", ".join(sorted(file.name for file in what.parent.glob("*")))
        raise FileNotFoundError(f"{what} is missing; its folder has: {others:.200}") from None
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(" ".join(f"{what}: {kind}{error}".split())[:500]) from error

@dataclass
class Config:
    """The shape of a Llama; names and defaults are those of Hugging Face's config.json."""
    vocab_size: int                         # V
    hidden_size: int                        # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int                # Hq
    num_key_value_heads: int = None         # H; None: num_attention_heads
    head_dim: int = None                    # d; None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None               # see rope_frequencies()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048     # a longer context gives a warning

    @blame("Config")
    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        Hq, H, d = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        need(Hq % H == 0, f"num_attention_heads {Hq} is no multiple of num_key_value_heads {H}")
        need(d % 2 == 0 and d < 2**16, f"head_dim must be even and not huge, got {d}")
        need(self.rms_norm_eps > 0 and self.rope_theta > 0, "rms_norm_eps or rope_theta is not > 0")
        rope_frequencies(self)

@blame("rope_scaling")
def rope_frequencies(c):
    """Angle per position of each rotary pair, (d/2,) float32."""
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim
    frequency = 1 / c.rope_theta ** exponent                            # (d/2,)
    match c.rope_scaling:
        case None:
            return frequency
        case {"rope_type": "linear", "factor": factor, **rest} if factor > 0 and not rest:
            return frequency / factor
        case {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
              "high_freq_factor": high, "original_max_position_embeddings": context,
              **rest} if factor > 0 and context > 0 and low < high and not rest:
            turns = context * frequency / (2 * math.pi)     # those that turn rarely are divided
            keep = (turns - low) / (high - low)
            return torch.lerp(frequency / factor, frequency, keep.clamp(0, 1))
    raise ValueError(f"{c.rope_scaling} is unsupported")

def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + d/2]) of x (B, H, T, d). cos and sin (B, 1, T, d/2)."""
    a, b = x.chunk(2, dim=-1)                                           # (B, H, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)    # (B, H, T, d)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, layer, cache):
        split = lambda x: x.unflatten(2, (-1, self.d)).transpose(1, 2)
        q = rotate(split(self.q_proj(x)), cos, sin)                     # (B, Hq, T, d)
        k = rotate(split(self.k_proj(x)), cos, sin)                     # (B, H, T, d)
        v = split(self.v_proj(x))                                       # (B, H, T, d)
        y = cache.attend(layer, q, k, v)                                # (B, Hq, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))                # (B, T, D)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, layer, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache)     # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))

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

    def forward(self, tokens, cache, all_logits=False, progress=None, chunk=None):
        """tokens (B, T) -> float32 logits of each row's last token (B, V), or all (B, T, V)."""
        self.check_tokens(tokens)
        need(chunk is None or chunk > 2 and not all_logits, "chunk must be None, or 3 or more")
        T, layers, begun = tokens.shape[1], len(self.layers), False
        parts = tokens.tensor_split(math.ceil(T / (chunk or T)), dim=1)     # none of one token
        try:
            for n, part in enumerate(parts):
                positions, begun = cache.begin(part), True                  # (B, T)
                report = progress and (lambda i: progress(n * layers + i, len(parts) * layers))
                new = self.compute(part, positions, cache, all_logits, report)
                logits = torch.where(part[:, :1] >= 0, new, logits) if n else new
        except BaseException:
            if begun:
                cache.next_layer = None     # it has only a part of the tokens
            raise
        if getattr(cache, "length", 0) > self.config.max_position_embeddings:
            warnings.warn("the context is longer than max_position_embeddings of this model")
        return logits

    def compute(self, tokens, positions, cache, all_logits=False, progress=None):
        """Logits, after cache.begin(). Launches kernels only, so that a CUDA graph can hold it."""
        x = self.embed_tokens(tokens.clamp(min=0))                      # (B, T, D)
        self.inv_freq = self.inv_freq.to(x.device)
        angle = positions[:, None, :, None].float() * self.inv_freq     # (B, 1, T, d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, i, cache)                            # (B, T, D)
            if progress is not None:
                progress(i + 1)
        if not all_logits:
            last = (tokens[:, 1:] >= 0).sum(1)                          # (B,) padding comes after
            x = x[torch.arange(len(x), device=x.device), last]          # (B, D)
        return F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight).float()

    def check_tokens(self, tokens):
        """ValueError for tokens that cannot be embedded."""
        fits = torch.is_tensor(tokens) and tokens.dtype in (torch.int64, torch.int32)
        need(fits and tokens.ndim == 2 and tokens.numel() > 0, "tokens must be int64 (B, T)")
        if tokens.is_cpu or tokens.shape[1] > 1:        # never waits for a GPU at a decode step
            V, real = self.config.vocab_size, tokens >= 0
            need(-1 <= tokens.min() and tokens.max() < V, f"token ids must be -1 to {V - 1}")
            need(not (real[:, 1:] > real[:, :-1]).any(), "-1 is padding: no token may follow it")

    @torch.no_grad()
    def prefill(self, tokens, cache, chunk=None, progress=None):
        """forward() of a prompt; parts of at most `chunk` tokens bound the device memory."""
        return self(tokens, cache, chunk=chunk, progress=progress)

    @torch.no_grad()
    def generate(self, tokens, cache, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=None,
                 stop_ids=(), progress=None, chunk=None, step=None):
        """Generate after a prompt (B, T) that is not in the cache; yields ids (B,) at each step.

        Temperature 0 is greedy; else samples from the smallest set of tokens whose probability
        reaches top_p. A row that yields one of stop_ids repeats it until all rows have finished.
        The cache holds all tokens of a row but the last. step(tokens) replaces self(tokens, cache).
        ValueError at the first step for bad arguments; and for logits that are not finite.
        """
        with blame("generate()"):
            self.check_tokens(tokens)
            need(max_new_tokens >= 0 and 0 <= temperature < 1e12 and 1e-12 < top_p <= 1,
                 "max_new_tokens and temperature must be at least 0, top_p above 0, at most 1")
            need({*map(type, [max_new_tokens, *stop_ids])} == {int}, "stop_ids must be ints")
            stops = torch.tensor([*stop_ids], dtype=torch.long, device=tokens.device)
            rng = seed if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        step = step or (lambda tokens: self(tokens, cache))
        ids = finished = torch.zeros_like(tokens[:, 0], dtype=torch.bool)       # (B,)
        for i in range(max_new_tokens):
            logits = step(tokens) if i else self.prefill(tokens, cache, chunk, progress)
            logits = logits.masked_fill(finished[:, None], 0)                   # (B, V)
            need(logits.isfinite().all(), f"step {i}: the logits are not finite")
            ids = torch.where(finished, ids, sample(logits, temperature, top_p, rng))
            yield ids
            finished = finished | torch.isin(ids, stops)
            if finished.all():
                return
            tokens = ids.masked_fill(finished, -1)[:, None]                     # (B, 1)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None, progress=None):
        """Load a Hugging Face directory; dtype None: as stored. Errors name the file."""
        path, tensors = Path(path), {}
        with blame(path / "config.json"):
            config = huggingface_config(json.loads((path / "config.json").read_bytes()))
        for file in sorted(path.glob("model*.safetensors")) or [path / "model.safetensors"]:
            with blame(file):
                for name, tensor in read_safetensors(file).items():
                    name = name.removeprefix("model.")
                    need(name not in tensors, f"{name} is there twice")
                    tensors[name] = tensor
        return assemble(config, tensors, path, device, dtype, progress)

def sample(logits, temperature=0.0, top_p=1.0, rng=None):
    """logits (B, V) -> ids (B,). Nucleus sampling; temperature 0 takes the largest logit."""
    if temperature < 1e-6:                                              # less would overflow
        return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)       # (B, V) each
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                 # those before reach top_p
    return ids.gather(-1, torch.multinomial(p, 1, generator=rng)).squeeze(-1)   # (B,)

class DenseKV:
    """All keys and values on the device, (B, H, capacity, d) per layer. Writes to them in place."""
    def __init__(self):
        self.keys, self.values, self.lengths, self.next_layer = [], [], [], 0

    @property
    def length(self):
        return max(self.lengths, default=0)

    def complete(self):
        return not self.lengths or self.next_layer == len(self.keys) > 0

    def begin(self, tokens):
        """Note the next tokens (B, T), see the top of this file -> their positions (B, T)."""
        (B, T), new = tokens.shape, (tokens >= 0).sum(1).tolist()
        before = self.lengths or [0] * B
        need(self.complete(), "a forward was interrupted: truncate the cache or use a new one")
        need(len(before) == B, f"this cache holds {len(before)} rows, got tokens for {B}")
        need(self.lengths or min(new) > 0, "every row of the first prompt needs a token")
        lengths = [n + m for n, m in zip(before, new)]
        self.before, self.lengths, self.next_layer = before, lengths, 0
        start = torch.tensor(before, device=tokens.device)[:, None]                     # (B, 1)
        return start + torch.arange(T, device=tokens.device)                            # (B, T)

    def attend(self, layer, q, k, v):
        """Store k and v (B, H, T, d); attention of q (B, Hq, T, d) over all stored tokens."""
        T, N = q.shape[2], max(self.before) + q.shape[2]
        known = layer < len(self.keys) or not any(self.before)
        need(layer == self.next_layer and known, f"layer {layer} is not the next: use a new cache")
        for buffers, new in ((self.keys, k), (self.values, v)):
            if layer == len(buffers):
                buffers.append(new[:, :, :0])
            if N > buffers[layer].shape[2]:
                with torch.inference_mode(False):           # a buffer that any mode can write to
                    buffers[layer] = F.pad(buffers[layer], (0, 0, 0, T + max(64, N // 8)))
            for b, n in enumerate(self.before):
                buffers[layer][b, :, n:n + T] = new[b]                                  # (H, T, d)
        self.next_layer = layer + 1
        keys, values = self.keys[layer], self.values[layer]
        rows = [causal_attention(q[b, None], keys[b, None, :, :n + T], values[b, None, :, :n + T])
                for b, n in enumerate(self.before)]
        return torch.cat(rows)                                                  # (B, Hq, T, d)

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens of each row: an int, or an int per row."""
        held = self.lengths if self.complete() else self.before
        wanted = list(lengths) if type(lengths) in (list, tuple) else [lengths] * len(held)
        fits = [type(n) is int and 0 < n <= most for n, most in zip(wanted, held)]
        need(len(wanted) == len(held) and all(fits), f"truncate() takes 1 to {held}, got {lengths}")
        self.lengths, self.next_layer = wanted, len(self.keys)

    def memory(self):
        return {"device": sum(x.nbytes for x in self.keys + self.values), "host": 0}

# ---------------------------------------------------------------------------------- the loader
SUPPORTED = {"model_type": ["llama", "mistral"], "hidden_act": [None, "silu"],
             "attention_bias": [None, False], "mlp_bias": [None, False],
             "partial_rotary_factor": [None, 1], "quantization_config": [None]}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def huggingface_config(j):
    """config.json -> Config. ValueError for everything that this model does not compute."""
    for name, supported in SUPPORTED.items():
        need(j.get(name) in supported, f"{name} = {j.get(name)!r:.60} is not in {supported}")
    window = j.get("sliding_window", 4096 if j["model_type"] == "mistral" else None)
    need(window is None or window >= j["max_position_embeddings"], f"sliding {window = } < context")
    rope = dict(j.get("rope_parameters") or j.get("rope_scaling") or {})
    need(j.get("rope_scaling") in (None, rope), "rope_scaling and rope_parameters differ")
    theta = rope.pop("rope_theta", j.get("rope_theta", 10000.0))
    scaling = {"rope_type": rope.pop("type", "default"), **rope}
    scaling = None if scaling == {"rope_type": "default"} else scaling
    j = {**j, "rope_scaling": scaling, "rope_theta": theta}
    return Config(**{name: j[name] for name in Config.__annotations__ if name in j})

def read_safetensors(file, dtypes=DTYPES):
    """The tensors of a file, {name: tensor}, memory-mapped.

    The format: 8 bytes with the length of the header; the header, a JSON object {name: {dtype,
    shape, data_offsets}}; the data of the tensors, which fill the rest without a gap.
    """
    raw = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8).numpy()
    start = 8 + int.from_bytes(raw[:8], "little")
    need(start < len(raw), f"no safetensors file, or cut off: it begins with {bytes(raw[:40])}")
    header, tensors, at = json.loads(bytes(raw[8:start])), {}, 0
    header.pop("__metadata__", None)
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        need(begin == at < end, f"{name!r} is at byte {begin}, not {at}")
        dtype = dtypes[header[name]["dtype"]]
        size, at = (end - begin) // dtype.itemsize, end
        part = torch.frombuffer(raw, dtype=dtype, count=size, offset=start + begin)
        tensors[name] = part.view(header[name]["shape"])
    need(start + at == len(raw), f"its tensors have {at} bytes, not {len(raw) - start}")
    return tensors

def assemble(config, tensors, path, device=None, dtype=None, progress=None):
    """A Llama with copies of these tensors, {parameter: tensor}, which were read from path."""
    need(dtype in (None, torch.float64, *DTYPES.values()), f"{dtype = !r} is unsupported")
    tensors = {name: t for name, t in tensors.items() if "inv_freq" not in name}    # of old files
    with blame(path), torch.device("meta"):                 # allocates no memory
        need(config.num_hidden_layers <= len(tensors), f"there are only {len(tensors)} tensors")
        model = Llama(config)
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            same = torch.equal(tensors.pop("lm_head.weight"), tensors["embed_tokens.weight"])
            need(same, "lm_head.weight differs from the tied embeddings")
        model.load_state_dict(tensors, assign=True)         # raises for other names or shapes
    dtype, state = dtype or model.embed_tokens.weight.dtype, {}
    for name, tensor in tensors.items():
        state[name] = tensor.to(device or "cpu", dtype, copy=True)
        if progress is not None:
            progress(len(state), len(tensors))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)
