"""Meta's own checkpoints, a directory with params.json and consolidated.00.pth: loaded by Llama.from_pretrained.

The model is the one of model.py. What differs are the names of the tensors, the layout of the rotary pairs, and a
params.json that leaves some things unsaid.
"""
import os
import re

import torch

from model import LLAMA3_ROPE, Config, assemble, blame, demand, demand_field, parse_json

def load_meta(path, device, dtype, progress):
    """See Llama.from_pretrained."""
    return from_meta_layout(assemble(path, *read_meta(path), meta_name, device, dtype, progress))

def read_meta(path):
    """A Meta directory -> (Config, {name in the file: (file, tensor)})."""
    file, params = path / "consolidated.00.pth", path / "params.json"
    demand(not os.path.exists(path / "consolidated.01.pth"),
           f"{path}: the checkpoint is split for several GPUs; use the Hugging Face version of this model")
    with blame(file):
        content = dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))   # runs no code in it
        rows = len(content["tok_embeddings.weight"])
    with blame(params):
        config = meta_config(parse_json(params.read_bytes()), rows, tied="output.weight" not in content)
    return config, {name: (file, t) for name, t in content.items()}

def meta_config(p, rows, tied):
    """params.json -> Config. Unsaid there: Llama 3.2 (1B and 3B, narrower than 4096) has another factor of the rope
    scaling than 3.1 (32, not 8, as Hugging Face publishes it), and only 3.2 may come without an output matrix."""
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
             "norm_eps", "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len"}
    demand(p.keys() <= known, f"{min(p.keys() - known, default='')!r:.60} is not supported")
    for name in ("dim", "n_heads", "multiple_of"):
        demand_field(name, int, p[name])
    D, scaled, factor = p["dim"], p.get("use_scaled_rope", False), 32.0 if p["dim"] < 4096 else 8.0
    demand_field("use_scaled_rope", bool, scaled)
    demand(p.get("vocab_size", -1) in (-1, rows),
           f"vocab_size {p.get('vocab_size')!r:.60}, but tok_embeddings.weight has {rows} rows")
    demand(not tied or scaled and D < 4096, "output.weight is missing, and this is no Llama 3.2 of 1B or 3B")
    hidden = int((p.get("ffn_dim_multiplier") or 1) * int(2 * 4 * D / 3))
    return Config(
        rows, D, -(-hidden // p["multiple_of"]) * p["multiple_of"], p["n_layers"], p["n_heads"], p.get("n_kv_heads"),
        rms_norm_eps=p.get("norm_eps", 1e-5), rope_theta=p.get("rope_theta", 10000.0),
        rope_scaling={**LLAMA3_ROPE, "factor": factor} if scaled else None, tie_word_embeddings=tied)

META_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
              "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
              "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
              "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
              "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}

def meta_name(name):
    return re.sub("|".join(META_NAMES), lambda match: META_NAMES[match[0]], name)

def from_meta_layout(model):
    """Meta rotates neighbours (x[2i], x[2i+1]), this model (x[i], x[i + d/2]): reorder the rows of each head."""
    for block in model.layers:
        for w in (block.self_attn.q_proj.weight, block.self_attn.k_proj.weight):
            pairs = w.view(-1, block.self_attn.d // 2, 2, w.shape[1])                       # (H, d/2, 2, D)
            w.copy_(pairs.transpose(1, 2).reshape(w.shape))                                 # (H * d, D)
    return model
