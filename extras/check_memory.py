"""Does a prompt fit into memory?"""
import re
from pathlib import Path

from model import DenseKV

def available_memory():
    """Bytes of free host memory, or None on systems without /proc/meminfo."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", file.read_text()) if file.exists() else None
    return found and 1024 * int(found[1])

def check_memory(model, tokens, cache):
    """MemoryError if host memory cannot hold the keys and values of tokens (B, T)."""
    c, free = model.config, available_memory()
    size = tokens.numel() * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    size *= model.embed_tokens.weight.itemsize
    on_host = tokens.is_cpu or not isinstance(cache, DenseKV)
    if on_host and free is not None and size > free:
        raise MemoryError(f"this prompt's keys and values take {size / 1e9:.1f} GB of host "
                          f"memory, {free / 1e9:.1f} GB are free: shorten the prompt")
