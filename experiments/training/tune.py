"""Fine-tune a small checkpoint on relations that it has not seen, and compare optimizers.

    python train_tiny.py --tune checkpoints/tiny --sgc             one run (AdamW without --sgc)
    python train_tiny.py --tune checkpoints/tiny --sgc --k 25 --s 4
    python train_tiny.py --tune checkpoints/tiny --compare         the table of docs/sgc.md

The training texts state and ask for facts of the four relations NEW. Their values are words that
the checkpoint has read, but never had to answer with. Old facts are those of the relations that
it was trained on: the training texts state some of them and ask for none. AdamW trains all
weights; the others train the linear layers, SGC with --all all weights. The table has

    new, old facts   share of questions that are answered exactly, all seeds together, its 95%
                     interval (Wilson's), and the shares of the worst and of the best seed
    state            bytes of the optimizer's state, and its share of AdamW's
    ms               of CPU time in the optimizer, per step
    residual         what OMP leaves unexplained, SGC.residual, mean over the steps
    found            the share of the right entries that SGC changes, see Recovery
"""
import argparse
import itertools
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.quality.figures import share, table
from experiments.training.checkpoint import save_checkpoint
from experiments.training.corpus import OTHER, PREFIX, VALUE, WORDS
from experiments.training.corpus import answer, draw_facts, needle, passage, question
from experiments.training.low_rank import GaLore, add_lora, linear_layers, merge_lora
from experiments.training.sgc import SGC, chunks, sparsify
from experiments.training.vocabulary import VOCAB
from model import DenseKV, Llama
from sentencekv import need
from tokenizer import Tokenizer

NEW = {"usual mood": "kind", "evening habit": "rests", "last deed": "found",
       "best season": "season"}             # relation: the kind of its value, in corpus.WORDS
LENGTH, BATCH = 256, 4                      # tokens of a document, documents of a step
WARM_UP = 20                                # steps
BETAS = (0.9, 0.98)                         # of all but SGC, which has its own

# Learning rates: chosen with the seeds 100 to 102, see docs/sgc.md.
RATES = {"adamw": 2e-3, "lora": 5e-3, "galore": 5e-3, "sgc": 2e-2, "exact": 2e-2}
COMPARED = {
    "AdamW": dict(method="adamw", everything=True),
    "LoRA, rank 2": dict(method="lora", rank=2, lr=1e-2),
    "LoRA, rank 8": dict(method="lora", rank=8),
    "GaLore, rank 8": dict(method="galore", rank=8),
    "SGC": dict(method="sgc"),
    "SGC, k = 25, s = 3": dict(method="sgc", k=25, s=3),
    "beta1 = 0.9, s = 4": dict(method="sgc", betas=BETAS, s=4, lr=2.8e-2),
    "beta1 = 0.9, s = 10": dict(method="sgc", betas=BETAS, s=10),
    "the same, exact recovery": dict(method="exact", betas=BETAS, k=256, s=10),
    "the same, V per entry": dict(method="exact", betas=BETAS, k=256, s=10, second="number",
                                  lr=4.2e-2),
    "beta1 = 0.9, V in R^k": dict(method="sgc", betas=BETAS, k=125, s=20, chunk=1024,
                                  second="number"),
}

# ----------------------------------------------------------------------------------------- texts

def new_facts(rng, n):
    """n facts of the new relations, no two of the same relation and name."""
    pairs = [(relation, name) for relation in NEW for name in WORDS["name"]]
    return [(relation, name, rng.choice(WORDS[NEW[relation]]))
            for relation, name in rng.sample(pairs, n)]

def document(rng, tokenizer):
    """A passage with new facts, then questions and answers -> ids (L + 1,), weights (L,)."""
    def size(text):
        return len(tokenizer.encode(text))

    facts = new_facts(rng, rng.randint(3, 6))
    placed = [(rng.random(), fact) for fact in facts]
    room = int(LENGTH * rng.uniform(0.4, 0.7))
    text, _ = passage(rng, room, placed, draw_facts(rng, 20), 0.1, size=size)
    pieces = [(text, OTHER)]
    for fact in rng.sample(facts, len(facts)):
        prefix, value = answer(*fact)
        pieces += [(question(*fact), OTHER), (prefix, PREFIX), (value, VALUE)]
    ids, weights = [tokenizer.bos_id], [0.0]
    for text, weight in itertools.chain(pieces, itertools.cycle(pieces[1:])):
        new = tokenizer.encode(text)
        ids += new
        weights += [weight] * len(new)
        if len(ids) > LENGTH:
            return ids[:LENGTH + 1], weights[1:LENGTH + 1]

def new_needle(rng, tokenizer):
    """A prompt of LENGTH tokens that asks for one of 4 new facts, and the answer: ids of both."""
    def size(text):
        return len(tokenizer.encode(text))

    facts = new_facts(rng, 4)
    prefix, value = answer(*facts[0])
    end = question(*facts[0]) + prefix
    room = LENGTH - 1 - size(end)                       # without BOS and the question
    placed = [(rng.random(), fact) for fact in facts + draw_facts(rng, 4)]
    text, _ = passage(rng, room, placed, size=size)
    ids = tokenizer.encode(text)[-room:]
    return [tokenizer.bos_id, *ids, *tokenizer.encode(end)], tokenizer.encode(value)

def old_needle(rng, tokenizer):
    return needle(rng, LENGTH, tokenizer)

@torch.no_grad()
def answers(model, tokenizer, make_needle, n, seed):
    """n questions -> a list of bools: is the whole answer generated, greedily?"""
    rng = random.Random(seed)
    right = []
    for first in range(0, n, 100):
        needles = [make_needle(rng, tokenizer) for _ in range(min(100, n - first))]
        prompts, expected = zip(*needles)
        steps = model.generate(torch.tensor(prompts), DenseKV(), max(map(len, expected)))
        generated = torch.stack([*steps], dim=1).tolist()
        right += [row[:len(ids)] == ids for row, ids in zip(generated, expected)]
    return right

# -------------------------------------------------------------------------------------- training

class Exact(SGC):
    """SGC without the projection, with the exact moving mean of h: what a perfect OMP would do."""

    def projection(self, group, like):
        return torch.eye(group["chunk"]).to(like)

class Recovery:
    """Whether SGC changes the right entries: the s largest of m, the exact moving mean of h.

    SGC has m only as M = A m. This keeps m itself, so that the two can be compared.
    """

    def __init__(self, optimizer):
        group = optimizer.param_groups[0]
        self.params, self.n, self.s = group["params"], group["chunk"], group["s"]
        self.beta1 = group["betas"][0]
        self.means = [torch.zeros_like(chunks(p.detach(), self.n)) for p in self.params]

    def before_step(self):
        self.weights = [p.detach().clone() for p in self.params]
        for mean, p in zip(self.means, self.params):
            mean.lerp_(sparsify(chunks(p.grad, self.n), self.s), 1 - self.beta1)

    def found(self):
        """The share of these entries, over all chunks, that the step has changed."""
        right = every = 0
        for mean, old, p in zip(self.means, self.weights, self.params):
            largest = sparsify(mean, self.s) != 0                           # (C, n)
            changed = chunks(p.detach() - old, self.n) != 0                 # (C, n)
            right += int((largest & changed).sum())
            every += int(largest.sum())
        return right / every

def make_optimizer(model, seed, method, rank=8, everything=False, **settings):
    settings = {"lr": RATES[method], **settings}
    need(rank >= 1, f"--lora and --galore take a rank of at least 1, got {rank}")
    if method == "lora":
        added = add_lora(model, rank, seed)
        return torch.optim.AdamW(added, betas=BETAS, weight_decay=0.0, **settings)
    model.requires_grad_(everything)
    for linear in linear_layers(model):
        linear.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "galore":
        return GaLore(trained, rank=rank, betas=BETAS, **settings)
    if method == "adamw":
        return torch.optim.AdamW(trained, betas=BETAS, weight_decay=0.0, **settings)
    return (SGC if method == "sgc" else Exact)(trained, seed=seed, **settings)

def state_numbers(optimizer):
    """Numbers in the optimizer's state, without the counters of steps."""
    states = optimizer.state.values()
    tensors = [x for state in states for x in state.values() if torch.is_tensor(x)]
    return sum(x.numel() for x in tensors if x.ndim > 0)

def train(model, tokenizer, optimizer, steps, seed):
    """-> the means over all steps: ms in the optimizer, residual of OMP, Recovery.found()."""
    rng = random.Random(seed)
    recovery = Recovery(optimizer) if isinstance(optimizer, SGC) else None
    group = optimizer.param_groups[0]
    rate = group["lr"]
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(1, steps + 1):
        documents = [document(rng, tokenizer) for _ in range(BATCH)]
        x, w = map(torch.tensor, zip(*documents))                           # (B, L + 1), (B, L)
        logits = model(x[:, :-1], DenseKV(), all_logits=True)               # (B, L, V)
        losses = F.cross_entropy(logits.mT, x[:, 1:], reduction="none")     # (B, L)
        optimizer.zero_grad()
        ((losses * w).sum() / w.sum()).backward()
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        # Warm-up, constant until half of the steps, then linearly down to 2%.
        group["lr"] = rate * min(step / WARM_UP, 1, max(0.02, 2 - 2 * (step - 1) / steps))
        need(losses.isfinite().all(), f"step {step}: the loss is not finite, try a smaller --lr")
        if recovery:
            recovery.before_step()
        begin = time.process_time()
        optimizer.step()
        took = 1000 * (time.process_time() - begin)
        found = (optimizer.residual, recovery.found()) if recovery else (math.nan, math.nan)
        sums += torch.tensor([took, *found])
    return (sums / steps).tolist()

def run(path, seed, steps, needles, **settings):
    """Fine-tune the checkpoint once -> (the model, its results by name)."""
    model = Llama.from_pretrained(path, dtype=torch.float32)
    tokenizer = Tokenizer.from_dir(path)
    full = 2 * sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, seed, **settings)
    ms, residual, found = train(model, tokenizer, optimizer, steps, seed)
    merge_lora(model)
    model.requires_grad_(False)
    numbers = state_numbers(optimizer)
    return model, {
        "new": answers(model, tokenizer, new_needle, needles, seed + 1000),
        "old": answers(model, tokenizer, old_needle, needles, seed + 1000),
        "state": numbers / full, "bytes": 4 * numbers, "ms": ms,
        "residual": residual, "found": found}

# -------------------------------------------------------------------------------------- commands

def parse(argv):
    parser = argparse.ArgumentParser(
        prog="train_tiny.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tune", type=Path, metavar="DIR", required=True, help="the checkpoint to start from")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--sgc", action="store_true", help="use SGC instead of AdamW")
    method.add_argument("--lora", type=int, metavar="RANK", help="use LoRA with AdamW")
    method.add_argument("--galore", type=int, metavar="RANK", help="use GaLore")
    method.add_argument("--compare", action="store_true", help="run every row of the table")
    add("--k", type=int, help="SGC: numbers per chunk in the first moment (61)")
    add("--s", type=int, help="SGC: entries of a chunk that a step changes (6)")
    add("--chunk", type=int, help="SGC: entries per chunk (256)")
    add("--second", choices=["chunk", "number"], help="SGC: what has a second moment (chunk)")
    add("--all", dest="everything", action="store_true", default=None,
        help="SGC: train the embedding and the norms too")
    add("--lr", type=float, help="learning rate; default: chosen for the method")
    add("--steps", type=int, default=150)
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    add("--needles", type=int, default=200, help="questions about new facts, and about old ones")
    add("--out", type=Path, help="directory to write the result of the last run to")
    return parser, parser.parse_args(argv)

OPTIONS = ("k", "s", "chunk", "second", "everything")

def chosen_settings(parser, args):
    """The options as {name: settings of run()}."""
    given = {name: getattr(args, name) for name in ("lr", *OPTIONS)
             if getattr(args, name) is not None}
    if not args.sgc and given.keys() - {"lr"}:
        parser.error("--k, --s, --chunk, --second and --all are settings of --sgc")
    if args.compare:
        if given or args.out:
            parser.error("--compare has settings of its own, and writes no checkpoint")
        return COMPARED
    if args.sgc:
        return {"SGC": dict(method="sgc", **given)}
    if args.lora is not None:
        return {f"LoRA, rank {args.lora}": dict(method="lora", rank=args.lora, **given)}
    if args.galore is not None:
        return {f"GaLore, rank {args.galore}": dict(method="galore", rank=args.galore, **given)}
    return {"AdamW": dict(method="adamw", everything=True, **given)}

def untuned(path, seeds, needles):
    """The row of the checkpoint as it is."""
    model, tokenizer = Llama.from_pretrained(path, dtype=torch.float32), Tokenizer.from_dir(path)
    results = [{kind: answers(model, tokenizer, make_needle, needles, seed + 1000)
                for kind, make_needle in (("new", new_needle), ("old", old_needle))}
               for seed in seeds]
    return shares(results) + [""] * 4

def shares(results):
    """Results of several seeds -> the share of new facts and of old ones, as text."""
    cells = []
    for kind in ("new", "old"):
        by_seed = [result[kind] for result in results]
        each = [sum(right) / len(right) for right in by_seed]
        seeds = f"{min(each):.3f} to {max(each):.3f}".replace("0.", ".")
        cells.append(f"{share(sum(by_seed, []))}, {seeds}")
    return cells

def cells(results):
    """Results of several seeds -> a row of the table."""
    def mean(name):
        return sum(result[name] for result in results) / len(results)

    recovery = ["" if math.isnan(mean(name)) else f"{mean(name):.2f}"
                for name in ("residual", "found")]
    return shares(results) + [f"{mean('bytes') / 1000:,.0f} kB ({mean('state'):.1%})",
                              f"{mean('ms'):.1f}", *recovery]

def save(out, model, path):
    need(model.config.vocab_size == VOCAB, "--out: only the tiny tokenizer's vocabulary of "
         f"{VOCAB} can be written, {path} has {model.config.vocab_size}")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(path / "tokenizer.json", out)
    save_checkpoint(out, model.config, dict(model.named_parameters()))

def compare(parser, args):
    need(args.steps > 0 and args.needles > 0, "--steps and --needles must be positive")
    need(args.out is None or not (args.out / "model.safetensors").exists(),
         f"{args.out} already holds a checkpoint: choose another --out")
    settings = chosen_settings(parser, args)
    rows = {"before": untuned(args.tune, args.seeds, args.needles)}
    for name, chosen in settings.items():
        results = []
        for seed in args.seeds:
            model, result = run(args.tune, seed, args.steps, args.needles, **chosen)
            results.append(result)
            new, old = (sum(result[kind]) / args.needles for kind in ("new", "old"))
            print(f"{name}, seed {seed}: new {new:.3f}, old {old:.3f}", file=sys.stderr)
        rows[name] = cells(results)
    table("", ["new facts", "old facts", "state", "ms", "residual", "found"], rows)
    if args.out:
        save(args.out, model, args.tune)

def main(argv):
    """The command line of `train_tiny.py --tune`."""
    parser, args = parse(argv)
    torch.set_num_threads(1)                            # the model is too small for more
    try:
        compare(parser, args)
    except (ValueError, OSError) as error:
        sys.exit(f"train_tiny.py: {error}")
