"""Load Meta's own checkpoints: a directory with params.json and consolidated.00.pth.

The model is the one of model.py. Meta's tensors have other names and another layout of the rotary
pairs, and its params.json leaves some settings out.
"""
import math
import re
from pathlib import Path

import torch

from model import LLAMA3_ROPE, SAFETENSORS, Config, Llama, assemble, blame, check, parse_json
from sentencekv import need


def load_meta(path, device=None, dtype=None, progress=None):
    """Load a Meta checkpoint. Arguments and errors are those of Llama.from_pretrained."""
    path = Path(path)
    config, tensors = read_meta(path)
    model = assemble(Llama, config, tensors, path, meta_name, device, dtype, progress)
    for block in model.layers:
        from_meta_layout(block.self_attn.q_proj.weight, config.head_dim)
        from_meta_layout(block.self_attn.k_proj.weight, config.head_dim)
    return model


def read_meta(path):
    """A Meta directory -> (Config, {name in the file: (file, tensor)})."""
    file, params = path / "consolidated.00.pth", path / "params.json"
    need(not (path / "consolidated.01.pth").exists(),
         f"{path}: the checkpoint is split for several GPUs: use its Hugging Face version")
    with blame(params):
        settings = parse_json(params.read_bytes())
    with blame(file):
        # weights_only: no code in the file is run
        content = dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        content.pop("rope.freqs", None)                     # recomputed
        rows = len(content["tok_embeddings.weight"])
    for name, t in content.items():
        with blame(file, name):
            plain = isinstance(t, torch.Tensor) and t.is_cpu
            need(plain and t.dtype in SAFETENSORS.values() and t.is_contiguous(),
                 "is no plain tensor of float32, float16 or bfloat16")
    with blame(params):
        config = meta_config(settings, rows, tied="output.weight" not in content)
    return config, {name: (file, t.detach()) for name, t in content.items()}


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
        check(name, p[name], int, 1, 2**24)
    width, multiple = p["dim"], p["multiple_of"]
    scaled = p.get("use_scaled_rope", False)
    check("use_scaled_rope", scaled, bool, False, True)
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
        rope_theta=p.get("rope_theta", 10000.0),
        rope_scaling=rope_scaling if scaled else None,
        tie_word_embeddings=tied,
    )


META_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def meta_name(name):
    """A parameter's name in model.py -> its name in Meta's file."""
    pattern = "|".join(map(re.escape, META_NAMES))
    return re.sub(pattern, lambda match: META_NAMES[match[0]], name)


def from_meta_layout(weight, d):
    """Reorder the rows of each head, in place: weight (H * d, D).

    Meta rotates the pairs (x[2i], x[2i + 1]), model.py rotates (x[i], x[i + d/2]).
    """
    D = weight.shape[1]
    pairs = weight.view(-1, d // 2, 2, D)                           # (H, d/2, 2, D)
    weight.copy_(pairs.transpose(1, 2).reshape(weight.shape))       # (H * d, D)
