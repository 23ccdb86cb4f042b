"""Sections of gpu_check that ask: is it right? Each takes the options of gpu_check."""
import traceback

import torch

from experiments.shapes import random_llama
from experiments.speed.checkpoint import load, prompt
from experiments.speed.filled import decoding, made_up_flags, made_up_tokens, variants
from experiments.speed.gpu_common import SIZES, check, save
from experiments.speed.parts import parts_of
from experiments.svg import short
from extras.zero_copy import ZeroCopyPool, best_pool, works
from sentencekv import HostPool, SentenceKV, sentence_flags

# ------------------------------------------------------------------------------------- pools

LATE = 200_000_000          # clock cycles for which a stream sleeps

def pools():
    """The ways to fetch that work here: {name: class of host pools}."""
    found = {"staged": HostPool}
    if works(torch.device("cuda")):
        found["zero copy"] = ZeroCopyPool
    else:
        print("  zero copy does not work here: left out", flush=True)
    return found

def new_pool(pool_class, kv, device):
    """A pool with one row, kv (H, T, 2, d)."""
    H, T, _, d = kv.shape
    pool = pool_class(1, H, d, kv.dtype, torch.device(device))
    pool.append(0, kv.to(device))
    return pool

def fetched(pool, slot):
    """What the pool holds in slot (1, H, n): (1, H, n, 2, d), on its device."""
    *_, d = pool.kv.shape
    out = torch.zeros(*slot.shape, 2, d, dtype=pool.kv.dtype, device=pool.device)
    pool.fetch(slot.to(pool.device), out)
    return out

def same_bits(x, y):
    return torch.equal(x.cpu().view(torch.int16), y.cpu().view(torch.int16))

def fetch(options):
    """Every way to fetch gives the bits of the CPU, also while one of the streams is late."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 8, 4096, 2, 128, dtype=torch.bfloat16)
    slots = torch.randint(4096, (2, 1, 8, 1023))
    expected = [fetched(new_pool(HostPool, first, "cpu"), slot) for slot in slots]
    later = [fetched(new_pool(HostPool, second, "cpu"), slot) for slot in slots]
    for name, pool_class in pools().items():
        pool = new_pool(pool_class, first, "cuda")
        check(pool.kv.is_pinned(), f"{name}: the pool is pinned")
        check(same_bits(fetched(pool, slots[0]), expected[0]), f"{name}: fetches the CPU's bits")
        new = second.cuda()
        torch.cuda.synchronize()
        if pool.stream is not None:
            with torch.cuda.stream(pool.stream):
                torch.cuda._sleep(LATE)
        pool.append(0, new)
        del new
        garbage = torch.full_like(second, 7, device="cuda")           # takes the memory just freed
        check(same_bits(fetched(pool, slots[0] + 4096), later[0]),
              f"{name}: a late write arrives unharmed")
        del garbage
        torch.cuda._sleep(LATE)
        outs = [fetched(pool, slot) for slot in slots]
        check(all(map(same_bits, outs, expected)), f"{name}: two late fetches in a row are right")

# ------------------------------------------------------------------------------------- syncs

def strict(attend):
    """attend(), in which every synchronization of CPU and GPU is an error."""
    def wrapper(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return attend(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return wrapper

def sync(options):
    """attend() of a decode step does not make the CPU wait for the GPU."""
    if "zero copy" not in pools():
        print("  left out: staged fetches have to wait", flush=True)
        return
    model = random_llama("llama-3.2-1b", "cuda", torch.bfloat16, num_hidden_layers=2)
    V = model.config.vocab_size
    tokens = made_up_tokens(1472, vocabulary=V).cuda()
    for name, settings in variants(256).items():
        cache = SentenceKV(made_up_flags(V), host_pool=ZeroCopyPool, **settings)
        model.prefill(tokens, cache)
        step = decoding(model, cache)
        for _ in range(5):                              # loads libraries; keep=r prunes
            step()
        cache.attend = strict(cache.attend)
        message = ""
        try:
            for _ in range(SIZES.strict):
                step()
        except RuntimeError as error:
            traceback.print_exc(limit=-4)
            message = f": {str(error).splitlines()[0]}"
        check(not message, f"{name}: attend() does not synchronize in a decode step{message}")

def small(options):
    """A short run, for compute-sanitizer."""
    model = random_llama("tiny", "cuda", torch.bfloat16)
    tokens = made_up_tokens(300, vocabulary=1024).cuda()
    for pool in pools().values():
        cache = SentenceKV(made_up_flags(1024), host_pool=pool, budget=64, recent=8)
        model.prefill(tokens, cache)
        step = decoding(model, cache)
        print("  tokens", [int(step()) for _ in range(6)], flush=True)

# ------------------------------------------------------------------------------------- tokens

def graph_tokens(n, plain, graphed):
    """Steps with and without a CUDA graph, of caches that hold the same, give the same tokens."""
    tokens = [[int(step()) for _ in range(SIZES.compared)] for step in (plain, graphed)]
    check(tokens[0] == tokens[1], f"{short(n)}: the same {SIZES.compared} tokens with a CUDA graph")
    moved = [parts_of(step, "cuda", SIZES.repeat)[1] for step in (plain, graphed)]
    check(moved[1] < moved[0], f"{short(n)}: the graph is replayed")          # timers see no replay

def checkpoint_tokens(checkpoint):
    """A real model generates the same tokens on CPU and GPU; the budget covers the prompt."""
    tokens = {}
    for device in ("cpu", "cuda"):
        model, tokenizer = load(checkpoint, device, torch.float32)
        text = prompt(tokenizer, 400).to(device)
        pool = best_pool(torch.device(device))
        cache = SentenceKV(sentence_flags(tokenizer.token_bytes), host_pool=pool)
        tokens[device] = [int(ids) for ids in model.generate(text, cache, SIZES.compared)]
    save(tokens=tokens)
    check(tokens["cpu"] == tokens["cuda"], "a real model: the same tokens on CPU and GPU")
