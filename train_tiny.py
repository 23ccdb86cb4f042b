"""Train a tiny Llama (0.7M parameters, 1.5 MB) that finds facts in long texts, on a CPU.

    python train_tiny.py                          about 5 minutes on 2 cores -> checkpoints/mine
    python train_tiny.py --long --out DIR         the recipe of checkpoints/tiny, about 30 minutes
    python train_tiny.py --align --out DIR        also trains the paper's rule of retrieval
    python train_tiny.py --eval checkpoints/tiny  no training: exact match by length of context
    python train_tiny.py --tune checkpoints/tiny  fine-tunes, see experiments/training/tune.py

The texts come from experiments/training/corpus.py. The loss is cross-entropy; --align adds a term
for retrieval (experiments/training/align.py). The result is a Hugging Face directory.

B documents of L tokens; Hq query heads, H KV heads, G = Hq / H, d head width, V vocabulary.
"""
import argparse
import os
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":              # idle threads sleep: faster while other programs run
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from experiments.shapes import random_llama
from experiments.training.align import aligning
from experiments.training.batches import batch
from experiments.training.checkpoint import save_checkpoint
from experiments.training.corpus import VALUE, needle, story             # story: for importers
from experiments.training.tune import main as tune
from experiments.training.vocabulary import train_bpe, write_tokenizer
from model import DenseKV, Llama
from tokenizer import Tokenizer

# Stages: steps, B, L, share of copying exercises, share of prose (in half of the documents)
QUICK = [(380, 64, 32, 1.0, 0), (200, 32, 64, 0.3, 0), (290, 32, 128, 0.1, 0),
         (290, 16, 256, 0.05, 0), (260, 8, 512, 0, 0), (160, 4, 1024, 0, 0), (100, 2, 2048, 0, 0)]
LONG = [(400, 64, 32, 1.0, 0), (200, 32, 64, 0.3, 0.4), (300, 32, 128, 0.1, 0.4),
        (300, 16, 256, 0.05, 0.4), (700, 8, 512, 0, 0.4), (700, 4, 1024, 0, 0.4),
        (900, 2, 2048, 0, 0.4), (1500, 1, 4096, 0, 0.4), (250, 1, 8192, 0, 0.4)]

class TrainingCache:
    """Attention for training: it stores nothing, takes positions (B, L), and has gradients.

    Plain matrix products, 256 queries at a time: on a CPU their backward is faster than SDPA's.
    """
    length = 0
    def __init__(self, positions):
        self.positions = positions

    def begin(self, tokens):
        return self.positions

    def attend(self, layer, q, k, v):
        (B, Hq, L, d), H = q.shape, k.shape[1]
        q = q.view(B, H, Hq // H, L, d) * d ** -0.5                     # (B, H, G, L, d)
        out = []
        for i in range(0, L, 256):
            queries = q[:, :, :, i:i + 256]                             # (B, H, G, t, d)
            t = queries.shape[3]
            keys, values = k[:, :, :i + t], v[:, :, :i + t]             # (B, H, i + t, d)
            scores = queries.flatten(2, 3) @ keys.mT                    # (B, H, G * t, i + t)
            scores = scores.view(B, H, -1, t, i + t)
            scores[..., i:] += torch.full((t, t), -torch.inf, dtype=q.dtype).triu(1)
            weights = scores.softmax(-1).flatten(2, 3)                  # (B, H, G * t, i + t)
            out.append((weights @ values).view(B, H, -1, t, d))
        return torch.cat(out, dim=3).view(B, Hq, L, d)

def new_model(seed):
    """Large embeddings and a small last norm: with small embeddings it never learns to retrieve."""
    model = random_llama("tiny", seed=seed)                 # normal, deviation 1 / sqrt(inputs)
    width = model.config.hidden_size
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    scale = {"embed_tokens": width ** 0.5, "norm": width ** -0.5,
             "o_proj": residual, "down_proj": residual}
    for name, p in model.named_parameters():
        p *= scale.get(name.split(".")[-2], 1.0)
    return model

def make_optimizers(masters):
    """[(optimizer, its learning rate)]: Muon for the matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, p in masters.items():
        is_matrix = p.ndim == 2 and name != "embed_tokens.weight"
        (matrices if is_matrix else rest).append(p)
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, 0.02), (adam, 0.01)]

def train(out, recipe, seed, tokenizer, align=None):
    """bf16 compute on float32 master weights; writes a checkpoint every 250 steps.
    align: see aligning() in experiments/training/align.py; None: cross-entropy alone.
    """
    rng, model = random.Random(seed), new_model(seed)
    masters = {name: p.clone() for name, p in model.named_parameters()}
    model = model.bfloat16().requires_grad_(True)
    optimizers = make_optimizers(masters)
    stages = [stage for steps, *stage in recipe for _ in range(steps)]
    begin = time.time()
    for step, stage in enumerate(stages, start=1):
        x, w, positions = batch(rng, *stage, tokenizer)
        cache = TrainingCache(positions)
        if align:
            cache = align(cache, x[:, :-1], w)
        logits = model(x[:, :-1], cache, all_logits=True)                       # (B, L, V)
        losses = F.cross_entropy(logits.mT, x[:, 1:], reduction="none")         # (B, L)
        loss = (losses * w).sum() / w.sum() + (cache.extra_loss if align else 0)
        loss.backward()
        for p, master in zip(model.parameters(), masters.values()):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        # 100 steps of warm-up, constant until half of the steps, then linearly down to 2%.
        decay = min(step / 100, 1, max(0.02, 2 - 2 * (step - 1) / len(stages)))
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(masters.values()))
        if step % 250 == 0 or step == len(stages):
            save_checkpoint(out, model.config, masters)
        if step % 20 == 0:
            values = w == VALUE
            right = (logits.argmax(-1) == x[:, 1:])[values].float().mean()
            print(f"step {step}/{len(stages)}  L {stage[1]}  loss {losses[values].mean():.3f}  "
                  f"right {right:.1%}  {time.time() - begin:.0f} s", file=sys.stderr)

@torch.no_grad()
def evaluate(model, tokenizer, length, n=200, seed=0, new_cache=DenseKV, **kind):
    """Share of n needles whose whole answer is generated, greedily; kind: arguments of needle."""
    rng, right, rows = random.Random(seed), 0, max(1, 32768 // length)
    for first in range(0, n, rows):
        needles = [needle(rng, length, tokenizer, **kind) for _ in range(min(rows, n - first))]
        prompts, answers = zip(*needles)
        tokens = torch.tensor(prompts, device=model.norm.weight.device)         # (rows, length)
        steps = model.generate(tokens, new_cache(), max(map(len, answers)))
        generated = torch.stack([*steps], dim=1).tolist()
        right += sum(row[:len(ids)] == ids for row, ids in zip(generated, answers))
    return right / n

def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints/mine"), help="directory to write")
    add("--long", action="store_true", help="the recipe of checkpoints/tiny")
    add("--align", action="store_true", help="also train the paper's rule of retrieval")
    add("--seed", type=int, default=0)
    add("--eval", type=Path, metavar="DIR", help="do not train, evaluate this checkpoint")
    add("--needles", type=int, default=24, help="questions per length in the evaluation")
    add("--density", type=float, default=0.0, help="share of facts among sentences (0: 8 facts)")
    return parser.parse_args(argv)

def main(argv):
    torch.set_flush_denormal(True)
    if any(word.split("=")[0] == "--tune" for word in argv):
        return tune(argv)
    args = parse(argv)
    if not args.eval:
        if not hasattr(torch.optim, "Muon"):
            sys.exit(f"training needs torch 2.9 or newer (for Muon), this is {torch.__version__}")
        if (args.out / "model.safetensors").exists():
            sys.exit(f"{args.out} already holds a checkpoint: choose another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(args.out / "tokenizer.json", train_bpe())
        tokenizer = Tokenizer.from_dir(args.out)
        align = aligning(tokenizer) if args.align else None
        train(args.out, LONG if args.long else QUICK, args.seed, tokenizer, align)
    path = args.eval or args.out
    model, tokenizer = Llama.from_pretrained(path), Tokenizer.from_dir(path)
    for L in (256, 512, 1024, 2048, 4096, 8192):
        exact = evaluate(model, tokenizer, L, args.needles, density=args.density)
        print(f"{L:5} tokens: {exact:.1%} exact", flush=True)

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("stopped; the last checkpoint that was written is complete")
