"""How long one layer's attention takes in a decode step: SentenceKV against dense attention, in one run.

    python experiments/speed.py                      the shape of Llama-3.1-8B, 8K to 128K tokens
    python experiments/speed.py --quick              8K only, a few rounds

The caches are filled directly with random K and V (reading 128K tokens with exact attention would take long on a CPU
and is not what is measured). Sentences have 20 tokens on average. All variants take turns; the figures are medians over
the rounds, with the span of the middle half; the ratio is that of the medians. What SentenceKV does once per step for
all layers (segmentation, masks) is told apart.
"""
import argparse
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sentencekv
from sentencekv import HARD, SentenceKV

H, G, D = 8, 4, 128                     # KV heads, query heads per KV head, width of a head: Llama-3.1-8B
FLAGS = torch.tensor([0, HARD], dtype=torch.uint8)

def made_up_tokens(n, seed=0):
    """(1, n) ids; 1 ends a sentence, on average after 20 tokens (8 to 32)."""
    rng, ids = random.Random(seed), []
    while len(ids) < n:
        ids += [0] * rng.randint(7, 31) + [1]
    return torch.tensor([ids[:n]])

def filled(k, v, device, **settings):
    """A SentenceKV that holds k and v (1, H, n, d), without the attention that a prompt would cost."""
    cache, exact = SentenceKV(FLAGS, **settings), sentencekv.attend_causal
    sentencekv.attend_causal = lambda q, k, v, before: q
    try:
        cache.begin(made_up_tokens(k.shape[2]).to(device))
        cache.attend(0, k.new_zeros(1, H * G, 1, D).expand(-1, -1, k.shape[2], -1), k, v)
    finally:
        sentencekv.attend_causal = exact
    return cache

def variants(n, device, dtype, budget):
    """{name: (preparation, function that does one decode step of one layer on n tokens)}."""
    k, v = (torch.randn(1, H, n, D, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(64, 1, H * G, 1, D, dtype=dtype, device=device)                  # another query every time
    new = torch.randn(1, H, 1, D, dtype=dtype, device=device)
    turn = iter(range(10**9))

    def sentence_step(cache):
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        return lambda: cache.begin(token), lambda: cache.attend(0, q[next(turn) % 64], new, new)

    def matmul():
        """As in Meta's and Hugging Face's own code (softmax in float32), but without expanding K and V."""
        scores = (q[next(turn) % 64].view(1, H, G, D) * D ** -0.5) @ k.transpose(2, 3)              # (1, H, G, n)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype) @ v
    nothing = lambda: None
    sdpa = F.scaled_dot_product_attention
    return {
        "dense, SDPA (GQA)": (nothing, lambda: sdpa(q[next(turn) % 64], k, v, enable_gqa=True)),
        "dense, SDPA (heads folded)": (nothing, lambda: sdpa(q[next(turn) % 64].view(1, H, G, D), k, v)),
        "dense, matmul": (nothing, matmul),
        "SentenceKV, mean": sentence_step(filled(k, v, device, budget=budget, rank="mean")),
        "SentenceKV, bounds": sentence_step(filled(k, v, device, budget=budget, rank="bounds")),
    }

def measure(steps, rounds, device):
    """{name: sorted ms of the preparation}, {name: sorted ms of the step}; one of each variant in turn."""
    def timed(f):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)
    times = {name: [] for name in steps}
    for r in range(rounds + 3):
        for name, (prepare, step) in steps.items():
            times[name].append((timed(prepare), timed(step)))
    return [{name: sorted(t[i] for t in pairs[3:]) for name, pairs in times.items()} for i in (0, 1)]   # 3 to warm up

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--quick", action="store_true")
    p.add_argument("--budget", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    lengths = [8192] if a.quick else [8192, 32768, 65536, 131072]
    name = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor() or platform.machine()
    print(f"{' '.join(sys.argv)}\n{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16, "
          f"{H * G} query heads, {H} KV heads of {D}, budget {a.budget}, {a.rounds} rounds")
    own = {}
    for n in lengths:
        begin, times = measure(variants(n, a.device, torch.bfloat16, a.budget), 5 if a.quick else a.rounds, a.device)
        medians = {name: statistics.median(t) for name, t in times.items()}
        best = min(m for name, m in medians.items() if name.startswith("dense"))
        print(f"\n{n} tokens")
        for name, t in times.items():
            print(f"  {name:28} {medians[name]:8.2f} ms  ({t[len(t) // 4]:.2f} to {t[3 * len(t) // 4]:.2f})"
                  f"   {best / medians[name]:5.1f} x best dense")
            own.setdefault(name, []).append(medians[name])
        print(f"  once per step, for all layers: begin() {statistics.median(begin['SentenceKV, bounds']):.2f} ms")
    for name, m in own.items():
        if len(m) > 1:
            print(f"{name:28} {lengths[0]} to {lengths[-1]} tokens: {m[-1] / m[0]:.2f} times as long")

if __name__ == "__main__":
    main()
