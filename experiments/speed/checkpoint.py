"""Generation with a real checkpoint, end to end: dense, SentenceKV, and the transformers library.

    python -m experiments.speed.checkpoint DIR      4K and 8K tokens of this project's documents

Each variant computes the same prompt once; then all take turns at decode steps. The last 256 of
the tokens are left for these. A model of the transformers library is measured if it is installed:
with its dense cache, with its offloaded cache (CUDA only), and with SentenceKV as its cache.
Figures are medians with the quartiles in brackets; bytes are those of the cache at the end.
"""
from pathlib import Path
from statistics import median

import torch

from experiments.speed import command
from experiments.speed.clock import Variant, interleaved, timed
from experiments.speed.filled import names_on, sentence_variants
from experiments.speed.parts import parts_of
from experiments.svg import short
from extras.cuda_graph import GraphedStep
from extras.zero_copy import best_pool
from model import DenseKV, Llama
from sentencekv import SentenceKV, Settings, need, sentence_flags
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 256         # decode steps for which there is room after the prompt

def prompt(tokenizer, n):
    """The first n tokens (1, n) of README.md and docs/, repeated if these are shorter."""
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = tokenizer.encode(text, bos=True)
    ids = ids * (n // len(ids) + 1)
    return torch.tensor([ids[:n]])

def our_steps(model, tokens, flags, budget, presets):
    """{name: (step, cache)}. step() decodes one token, its first call computes the prompt."""
    def steps(cache, name):
        graph = GraphedStep(model, cache) if name.endswith(", graph") else None
        ids = model.generate(tokens, cache, STEPS, step=graph)
        return lambda: next(ids), cache

    found = {"dense": steps(DenseKV(), "dense")}
    wanted = names_on(tokens.device, presets)
    for name, (settings, pool) in sentence_variants(budget, tokens.device).items():
        if name in wanted:
            found[name] = steps(SentenceKV(flags, host_pool=pool, **settings), name)
    return found

def their_steps(directory, tokens, dtype, budget):
    """The same for a model of the transformers library; {} if it is not installed."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        from extras.transformers_cache import SentenceCache, flags_of, use_sentencekv
    except ImportError:
        print("  transformers is left out: it is not installed", flush=True)
        return {}
    def steps(cache, prepare=lambda model: None):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(tokens.device)
        prepare(model)
        ids = tokens

        @torch.no_grad()
        def step():
            nonlocal ids
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)                       # (1, 1)
            return ids
        return step, cache

    flags = flags_of(AutoTokenizer.from_pretrained(directory))
    pool = best_pool(tokens.device)
    found = {"dense, transformers": steps(DynamicCache())}
    if tokens.device.type == "cuda":
        found["dense offloaded, transformers"] = steps(DynamicCache(offloading=True))
    found["SentenceKV, transformers"] = steps(
        SentenceCache(flags, budget=budget, host_pool=pool), use_sentencekv)
    return found

def all_steps(directory, model, tokens, flags, budget, presets=(Settings().rank, "paper")):
    """{name: (step, cache)}: ours, and theirs if there are any. presets: see variants()."""
    found = our_steps(model, tokens, flags, budget, presets)
    found.update(their_steps(directory, tokens, model.embed_tokens.weight.dtype, budget))
    return found

def cache_bytes(cache):
    """{"device": bytes, "host": bytes} of a cache of this project or of transformers."""
    if hasattr(cache, "memory"):
        return cache.memory()
    if hasattr(cache, "kv"):
        return cache.kv.memory()
    found = {"device": 0, "host": 0}
    for layer in cache.layers:                      # on a CPU, all of it counts as the device's
        for x in (layer.keys, layer.values):
            offloaded = getattr(cache, "offloading", False) and x.device.type == "cpu"
            found["host" if offloaded else "device"] += x.nbytes
    return found

def measure(options, report):
    model, tokenizer = load(options.directory, options.device, torch.bfloat16)
    flags = sentence_flags(tokenizer.token_bytes)
    limit = model.config.max_position_embeddings
    for n in options.lengths:
        need(STEPS < n <= limit, f"--lengths must be from {STEPS + 1} to {limit}, this model's "
             f"context, got {n}")
        need(options.rounds + 30 <= STEPS, f"--rounds must be at most {STEPS - 30}")
        tokens = prompt(tokenizer, n - STEPS).to(options.device)
        print(f"\n{short(n)} tokens, of which {STEPS} are for decode steps", flush=True)
        found = all_steps(options.directory, model, tokens, flags, options.budget,
                          options.variants)
        steps = {name: step for name, (step, _) in found.items()}
        prefill = {name: timed(step, options.device) for name, step in steps.items()}
        variants = {name: Variant(step) for name, step in steps.items()}
        times, _ = interleaved(variants, options.rounds, options.device)
        for name, t in times.items():
            ms = median(t)
            held = {place: size / 1e6 for place, size in cache_bytes(found[name][1]).items()}
            note = (f"{1e3 / ms:7.2f} tokens/s, {median(times['dense']) / ms:5.2f} x dense; "
                    f"prefill {prefill[name] / 1e3:.2f} s; cache {held['device']:.2f} MB on the "
                    f"device, {held['host']:.2f} MB in host memory")
            report.add(n, name, t, note, prefill_ms=prefill[name], cache_mb=held)
        for name in steps if options.parts else []:
            if not name.endswith((", graph", "transformers")):        # invisible to the timers
                report.parts(n, name, *parts_of(steps[name], options.device))

def load(directory, device, dtype):
    """The model and its tokenizer."""
    tokenizer = Tokenizer.from_dir(directory)
    return Llama.from_pretrained(directory, device, dtype), tokenizer

def main(argv=None):
    """The command; argv: its arguments. Returns the exit status."""
    return command.run(measure, argv, __doc__, lengths="4K,8K", rounds=40,
                       presets=(Settings().rank, "paper"), quick=dict(lengths="1K", rounds=2))

if __name__ == "__main__":
    raise SystemExit(main())
