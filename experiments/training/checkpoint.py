"""Writes a model as a Hugging Face directory."""
import json
from dataclasses import asdict

import torch

from experiments.training.vocabulary import VOCAB

def save_checkpoint(out, config, weights):
    """Write config.json and model.safetensors: header length, JSON header, bfloat16 tensors."""
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in weights.items():
        parts.append(tensor.detach().bfloat16().view(torch.int16).numpy().tobytes())
        start, end = end, end + len(parts[-1])
        header[f"model.{name}"] = {"dtype": "BF16", "shape": [*tensor.shape],
                                   "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                 # aligns the data
    unfinished = out / "unfinished"
    unfinished.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))
    unfinished.replace(out / "model.safetensors")
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": "bfloat16", "bos_token_id": VOCAB - 1, "eos_token_id": None,
              **asdict(config)}
    (out / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
