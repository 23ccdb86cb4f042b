"""Load Meta's own checkpoints: a directory with params.json and consolidated.00.pth.

The model is the one of model.py. Meta's tensors have other names and another layout of the rotary
pairs, and its params.json leaves some settings out.
"""
import json
import math
import re
from pathlib import Path

import torch

from model import DTYPES, Config, assemble, blame
from sentencekv import need

# Of Llama 3.1; Meta's files do not have it. Llama 3.2's factor is 32.
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_meta(path, device=None, dtype=None, progress=None):
    """Load a Meta checkpoint. Arguments and errors are those of Llama.from_pretrained."""
    path = Path(path)
    config, content = read_meta(path)
    tensors = {}
    with blame(path / "consolidated.00.pth"):
        for name, tensor in content.items():
            ours = model_name(name)
            need(ours != name or name == "norm.weight", f"{name!r} is unexpected")
            tensors[ours] = tensor
    model = assemble(config, tensors, path / "consolidated.00.pth", device, dtype, progress)
    for block in model.layers:
        from_meta_layout(block.self_attn.q_proj.weight, config.head_dim)
        from_meta_layout(block.self_attn.k_proj.weight, config.head_dim)
    return model


def read_meta(path):
    """A Meta directory -> (Config, {name in the file: tensor})."""
    file, params = path / "consolidated.00.pth", path / "params.json"
    need(not (path / "consolidated.01.pth").exists(),
         f"{path}: the checkpoint is split for several GPUs: use its Hugging Face version")
    with blame(params):
        settings = json.loads(params.read_bytes())
    with blame(file):
        # weights_only: no code in the file is run
        content = dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        content.pop("rope.freqs", None)                     # recomputed
        rows = len(content["tok_embeddings.weight"])
    for name, t in content.items():
        with blame(f"{file}: {name!r}"):
            plain = isinstance(t, torch.Tensor) and t.is_cpu
            need(plain and t.dtype in DTYPES.values() and t.is_contiguous(),
                 "is no plain tensor of float32, float16 or bfloat16")
    with blame(params):
        config = meta_config(settings, rows, tied="output.weight" not in content)
    return config, {name: t.detach() for name, t in content.items()}


PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
          "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len"}


def meta_config(p, rows, tied):
    """params.json -> Config, for embeddings of so many rows. ValueError for unknown settings.

    Two settings are not in the file. Llama 3.2 (1B and 3B, narrower than 4096) has 32 as the
    factor of the rope scaling, Llama 3.1 has 8. Only Llama 3.2 may lack an output matrix.
    """
    unknown = sorted(p.keys() - PARAMS)
    need(not unknown, f"{unknown[:1]} is unsupported")
    for name in ("dim", "n_heads", "multiple_of"):
        need(type(p[name]) is int and 0 < p[name] < 2**24, f"{name} cannot be {p[name]!r:.60}")
    width, multiple = p["dim"], p["multiple_of"]
    scaled = p.get("use_scaled_rope", False)
    need(type(scaled) is bool, f"use_scaled_rope cannot be {scaled!r:.60}")
    need(p.get("vocab_size", -1) in (-1, rows),
         f"vocab_size {p.get('vocab_size')!r:.60}, but tok_embeddings.weight has {rows} rows")
    is_llama32 = scaled and width < 4096
    need(not tied or is_llama32, "output.weight is missing, and this is no Llama 3.2 of 1B or 3B")
    hidden = int((p.get("ffn_dim_multiplier") or 1) * int(2 * 4 * width / 3))
    rope_scaling = {**LLAMA3_ROPE, "factor": 32.0 if is_llama32 else 8.0}
    return Config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=math.ceil(hidden / multiple) * multiple,
        num_hidden_layers=p["n_layers"],
        num_attention_heads=p["n_heads"],
        num_key_value_heads=p.get("n_kv_heads"),
        rms_norm_eps=p.get("norm_eps", 1e-5),
        max_position_embeddings=4096,
        rope_theta=p.get("rope_theta", 10000.0),
        rope_scaling=rope_scaling if scaled else None,
        tie_word_embeddings=tied,
    )


NAMES = {
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def model_name(name):
    """A tensor's name in Meta's file -> the parameter's name in model.py."""
    pattern = "|".join(map(re.escape, NAMES))
    return re.sub(pattern, lambda match: NAMES[match[0]], name)


def from_meta_layout(weight, d):
    """Reorder the rows of each head, in place: weight (H * d, D).

    Meta rotates the pairs (x[2i], x[2i + 1]), model.py rotates (x[i], x[i + d/2]).
    """
    D = weight.shape[1]
    pairs = weight.view(-1, d // 2, 2, D)                           # (H, d/2, 2, D)
    weight.copy_(pairs.transpose(1, 2).reshape(weight.shape))       # (H * d, D)
