"""Published shapes of Llamas, and models of these shapes with random weights."""
import torch

from extras.meta import LLAMA3_ROPE
from model import Config, Llama
from sentencekv import need

LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0,
              rms_norm_eps=1e-5, max_position_embeddings=131072)
LLAMA32 = dict(LLAMA3, rope_scaling={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True)
SHAPES = {
    "llama-3.1-8b": dict(LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, rope_scaling=LLAMA3_ROPE),
    "llama-3.2-1b": dict(LLAMA32, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32),
    "llama-3.2-3b": dict(LLAMA32, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24),
    "tiny": dict(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, rope_theta=100000.0,
                 rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=16384),
}

def random_llama(shape, device=None, dtype=None, seed=0, **changes):
    """A model of a named shape (a key of SHAPES) with random weights.

    device: default CPU. dtype: default float32. changes: replace fields of its Config.
    Norms are 1; matrices are normal with deviation 1 / sqrt(inputs). Raises ValueError for an
    unknown shape.
    """
    need(shape in SHAPES, f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    with torch.device("meta"):                              # allocates no memory yet
        model = Llama(Config(**{**SHAPES[shape], **changes})).to(dtype or torch.float32)
    model = model.to_empty(device=device or "cpu").requires_grad_(False)
    rng = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 1:
            p.fill_(1.0)
        else:
            p.normal_(0, p.shape[1] ** -0.5, generator=rng)
    return model
