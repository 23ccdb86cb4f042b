"""Train a tiny Llama (0.7M parameters, 1.5 MB) that finds facts in long texts: on a CPU, in minutes.

    python train_tiny.py                             about five minutes on two cores -> checkpoints/mine
    python train_tiny.py --long --out DIR            the recipe of checkpoints/tiny, about half an hour
    python train_tiny.py --align --out DIR           also trains the paper's rule of retrieval (experiments/align.py)
    python train_tiny.py --eval checkpoints/tiny     no training: exact match over lengths of context

The texts come from experiments/corpus.py; the loss is plain cross-entropy, nothing in it (without --align) favours one
rule of retrieval over another; the result is a Hugging Face directory. B documents of L tokens; other names of shapes
as in model.py.
"""
import argparse, json, os, random, sys, time
from dataclasses import asdict
from pathlib import Path
if __name__ == "__main__":  # waiting threads sleep instead of spinning: no standstill beside a busy neighbour
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np, torch
import torch.nn.functional as F
from experiments.corpus import VALUE, copying, lesson, needle, story
from experiments.shapes import random_llama
from experiments.vocabulary import VOCAB, train_bpe, write_tokenizer
from model import DenseKV, Llama
from tokenizer import Tokenizer

SPAN = 16384                                            # positions that are seen in training
# Stages: steps, B, L, share of copying exercises, share of prose (in half of the documents)
QUICK = [(380, 64, 32, 1.0, 0), (200, 32, 64, 0.3, 0), (290, 32, 128, 0.1, 0), (290, 16, 256, 0.05, 0),
         (260, 8, 512, 0, 0), (160, 4, 1024, 0, 0), (100, 2, 2048, 0, 0)]
LONG = [(400, 64, 32, 1.0, 0), (200, 32, 64, 0.3, 0.4), (300, 32, 128, 0.1, 0.4), (300, 16, 256, 0.05, 0.4),
        (700, 8, 512, 0, 0.4), (700, 4, 1024, 0, 0.4), (900, 2, 2048, 0, 0.4), (1500, 1, 4096, 0, 0.4),
        (250, 1, 8192, 0, 0.4)]

def save(out, config, weights):
    """config.json, and model.safetensors: 8 bytes (length of the header), the header, the tensors in bfloat16."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in weights.items():
        raw = t.detach().bfloat16().view(torch.int16).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[f"model.{name}"], data = {"dtype": "BF16", "shape": [*t.shape], "data_offsets": place}, data + raw
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    (out / "unfinished").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (out / "unfinished").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": VOCAB - 1, "eos_token_id": None, **asdict(config)}, indent=1), encoding="utf-8")

class TrainingCache:
    """No cache at all: whole documents at positions of our choice, and attention that autograd can walk back through.
    Plain matrix products, 256 queries at a time: on a CPU their way back is faster than that of SDPA."""

    def __init__(self, positions):
        self.positions, self.extra_loss = positions, 0.0                        # (B, L)

    def begin(self, tokens):
        return self.positions

    def attend(self, layer, q, k, v):
        (B, Hq, L, d), Hkv, out = q.shape, k.shape[1], []
        for i, q in zip(range(0, L, 256), (q.view(B, Hkv, Hq // Hkv, L, d) * d ** -0.5).split(256, dim=3)):
            t = q.shape[3]                                                      # q (B, Hkv, G, t, d)
            scores = (q.flatten(2, 3) @ k[:, :, :i + t].mT).view(B, Hkv, -1, t, i + t)
            scores[..., i:] += torch.full((t, t), -torch.inf, dtype=q.dtype).triu(1)    # (B, Hkv, G, t, i + t)
            out.append((scores.softmax(-1).flatten(2, 3) @ v[:, :, :i + t]).view(B, Hkv, -1, t, d))
        return torch.cat(out, dim=3).view(B, Hq, L, d)

def new_model(seed):
    """Wide embeddings and a small last norm: with the usual small embeddings it never learned to retrieve."""
    model = random_llama("tiny", seed=seed)                                    # normal, deviation 1/sqrt(inputs)
    width, out = model.config.hidden_size, (2 * model.config.num_hidden_layers) ** -0.5
    scale = {"embed_tokens": width ** 0.5, "norm": width ** -0.5, "o_proj": out, "down_proj": out}
    for name, p in model.named_parameters():
        p *= scale.get(name.split(".")[-2], 1.0)
    return model

def batch(rng, B, L, copies, prose, tokenizer):
    """-> ids (B, L + 1), weights of the loss (B, L), positions (B, L). In half of the documents positions jump ahead
    where a sentence begins, up to SPAN of them for L tokens: so a model trained at length 1024 works at 8192."""
    x, w, positions = np.zeros((B, L + 1), int), np.zeros((B, L + 1), np.float32), np.tile(np.arange(L), (B, 1))
    encode, chance = tokenizer.encoding.encode_ordinary, np.random.default_rng(rng.getrandbits(64))
    for b in range(B):
        pieces = copying(rng, L) if rng.random() < copies else lesson(rng, L, prose if rng.random() < 0.5 else 0.0)
        x[b, 0], n = VOCAB - 1, 1
        while n <= L:
            text, weight = next(pieces)
            ids = encode(text)[:L + 1 - n]
            x[b, n:n + len(ids)], w[b, n:n + len(ids)], n = ids, weight, n + len(ids)
        if rng.random() < 0.5:
            starts = np.isin(np.append(0, x[b, :L - 1]), encode(".") + encode("?"))     # after the end of another
            gaps = starts * chance.exponential(size=L) ** rng.choice((1, 3))
            extra = L * (SPAN / L) ** rng.random() - L                          # log-uniform
            positions[b] += (gaps.cumsum() / max(gaps.sum(), 1e-9) * extra).astype(int)
    return torch.from_numpy(x), torch.from_numpy(w[:, 1:]), torch.from_numpy(positions)

def train(out, recipe, seed, tokenizer, align=None):
    """bf16 compute on float32 masters, Muon for the matrices, AdamW for the rest; a checkpoint every 250 steps.
    align(tokens, weights, positions) makes a TrainingCache that adds a loss of its own."""
    rng, model = random.Random(seed), new_model(seed)
    masters = {name: p.clone() for name, p in model.named_parameters()}
    model = model.bfloat16().requires_grad_(True)
    rest = [p for name, p in masters.items() if p.ndim == 1 or name == "embed_tokens.weight"]
    matrices = [p for name, p in masters.items() if p.ndim == 2 and name != "embed_tokens.weight"]
    optimizers = {0.02: torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
                  0.01: torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)}
    stages = [stage for steps, *stage in recipe for _ in range(steps)]
    work, begun = [B * L * (L + 1650) for B, L, *_ in stages], time.time()     # what a step takes, in some unit
    for step, stage in enumerate(stages):
        x, w, positions = batch(rng, *stage, tokenizer)
        cache = align(x[:, :-1], w, positions) if align else TrainingCache(positions)
        logits = model(x[:, :-1], cache, all_logits=True)                       # (B, L, V)
        losses = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")    # (B, L)
        ((losses * w).sum() / w.sum() + cache.extra_loss).backward()
        for p, master in zip(model.parameters(), masters.values()):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for rate, optimizer in optimizers.items():      # 100 steps of warm-up, flat to half time, then down to 2%
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 100, 1, max(0.02, 2 - 2 * step / len(stages)))
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(masters.values()))
        if (step + 1) % 250 == 0 or step + 1 == len(stages):
            save(out, model.config, masters)
        if (step + 1) % 20 == 0:
            values, spent = w == VALUE, time.time() - begun
            right = (logits.argmax(-1) == x[:, 1:])[values].float().mean()
            print(f"step {step + 1}/{len(stages)}  L {stage[1]}  loss {losses[values].mean():.3f}  right {right:.1%}"
                  f"  {sum(B * L for B, L, *_ in stages[:step + 1]) / spent:.0f} tokens/s"
                  f"  {spent / sum(work[:step + 1]) * sum(work[step + 1:]) / 60:.1f} minutes left", file=sys.stderr)

@torch.no_grad()
def evaluate(model, tokenizer, length, n=200, seed=0, new_cache=DenseKV, **kind):
    """Share of n needles (`kind`: arguments of needle) whose whole answer is generated greedily, token for token."""
    rng, right, size = random.Random(seed), 0, max(1, 32768 // length)
    for first in range(0, n, size):
        prompts, answers = zip(*(needle(rng, length, tokenizer, **kind) for _ in range(min(size, n - first))))
        tokens = torch.tensor(prompts, device=model.norm.weight.device)
        rows = torch.stack([*model.generate(tokens, new_cache(), max(map(len, answers)))], dim=1)
        right += sum(row[:len(ids)] == ids for row, ids in zip(rows.tolist(), answers))
    return right / n

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mine"), help="a directory without a checkpoint")
    parser.add_argument("--long", action="store_true", help="the recipe of checkpoints/tiny")
    parser.add_argument("--align", action="store_true", help="a loss that trains the paper's rule of retrieval as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", type=Path, metavar="DIR", help="no training: evaluate this checkpoint")
    parser.add_argument("--needles", type=int, default=24, help="questions to evaluate with, for each length")
    parser.add_argument("--density", type=float, default=0.0, help="share of facts among sentences (0: 8 facts)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if not args.eval:
        if not hasattr(torch.optim, "Muon"):
            sys.exit(f"training needs torch.optim.Muon (torch 2.9 or newer), this is torch {torch.__version__}")
        if (args.out / "model.safetensors").exists():
            sys.exit(f"{args.out} holds a checkpoint already: give another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(args.out / "tokenizer.json", train_bpe())
        tokenizer, align = Tokenizer.from_dir(args.out), None
        if args.align:
            from experiments.align import aligning
            align = aligning(tokenizer)
        train(args.out, LONG if args.long else QUICK, args.seed, tokenizer, align)
    path, n = args.eval or args.out, args.needles
    model, tokenizer = Llama.from_pretrained(path), Tokenizer.from_dir(path)
    for L in (256, 512, 1024, 2048, 4096, 8192):
        print(f"{L:5} tokens: {evaluate(model, tokenizer, L, n, density=args.density):.1%} exact", flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what was saved so far is a whole checkpoint")
