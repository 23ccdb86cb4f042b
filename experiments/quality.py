"""What is lost when each decode step may attend to few tokens only: SentenceKV, its rivals and dense attention.

    python experiments/quality.py needles               questions about facts in long texts, by length and depth
    python experiments/quality.py followup              a second question on the same cache, about another fact
    python experiments/quality.py perplexity            of long prose, token by token, against dense attention
    python experiments/quality.py recall                share of the dense attention that the attended tokens get
    python experiments/quality.py ruler FILE...         RULER's task files: for a real Llama, given with --model
    python experiments/quality.py longbench FILE...     LongBench's task files, likewise

Each explains its options with --help. A prompt is read once, densely, and every method starts from there (see
recording.py). A budget is a part of the context, --parts 16 means 1/16, but is never less than 64 tokens. An answer is
right if each of its tokens is the likeliest after those before it: that is when greedy generation gives exactly this
answer, so the true one is fed token by token. Intervals: 95%, Wilson's for shares, bootstrap over texts for means.
"""
import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":  # waiting threads sleep instead of spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.baselines import methods
from experiments.benchmarks import METRICS, longbench, read_jsonl, ruler
from experiments.corpus import draw_facts, lesson, library_prose, passage, prose_sentences, question, tell
from experiments.figures import bootstrap, heat, heat_svg, heat_text, mean_of, share_of, table
from experiments.recording import Recorder, Shown, start
from model import Llama
from sentencekv import sentence_flags
from tokenizer import Tokenizer

FOR_THE_QUESTION = 16       # tokens of the context that are left for the question

class Lab:
    """A model, its tokenizer, and the methods to compare: new[name](budget) is a new cache."""

    def __init__(self, args):
        self.tokenizer, self.model = Tokenizer.from_dir(args.model), Llama.from_pretrained(args.model)
        known = methods(sentence_flags(self.tokenizer.token_bytes))
        unknown = set(args.methods or ()) - known.keys()
        if unknown:
            raise ValueError(f"--methods: there is no {min(unknown)!r}, but {', '.join(map(repr, known))}")
        self.new = {name: known[name] for name in args.methods or known}

    def read(self, tokens, before=None):
        """Read tokens (B, T) densely, after what was recorded before: -> recording, likeliest next token (B,)."""
        recording = before.fork() if before else Recorder(sums="H2O" in self.new)
        return recording, self.model(tokens, recording).argmax(-1)

    def start(self, recording, part, length):
        """Yield every method's name and a cache of it, one after the other; the budget is 1/part of the length."""
        for name, new in self.new.items():
            yield name, start(new(max(64, length // part)), recording)

    def answered(self, cache, next_token, answers):
        """Does each row give its whole answer? next_token (B,) is what the prompt left; answers: B lists of ids."""
        width = max(map(len, answers))
        tokens, said = torch.tensor([ids + [0] * (width - len(ids)) for ids in answers]), [next_token]
        for i in range(width - 1):
            said.append(self.model(tokens[:, i:i + 1], cache).argmax(-1))
        return [row[:len(ids)] == ids for row, ids in zip(torch.stack(said, dim=1).tolist(), answers)]

# ---------------------------------------------------------------------------------------------------------- needles

def document(rng, length, tokenizer, facts, prose, asked):
    """A text of `length` tokens that tells `facts` facts among filler (a share `prose` of it: prose).

    Half of the facts are of one relation, to be told apart by the name alone. Returns the ids, and for `asked` of the
    facts (depth 0..1, ids of the question, ids of the answer).
    """
    size = lambda text: len(tokenizer.encode(text))
    (one,) = draw_facts(rng, 1)
    same = draw_facts(rng, (facts - 1) // 2, one[:1], [one[:2]])
    others = draw_facts(rng, facts - 1 - len(same), taken=[f[:2] for f in [one, *same]])
    told = [(rng.random(), fact) for fact in [one, *same, *others]]
    if length - 1 <= sum(size(tell(fact)) for _, fact in told):
        raise ValueError(f"{length} tokens are too few to tell {facts} facts: raise --lengths or lower --facts")
    text, _ = passage(rng, length - 1, told, prose=prose, size=size)
    questions = [(depth, tokenizer.encode(question(*fact)), tokenizer.encode(tell(fact)))
                 for depth, fact in rng.sample(told, asked)]
    return [tokenizer.bos_id, *tokenizer.encode(text)[1 - length:]], questions

def documents(lab, seed, n, rows, *how):
    """n texts in batches of rows: yields ids (B, L) and, one batch after the other, the questions about them."""
    rng = random.Random(seed)
    for first in range(0, n, rows):
        texts, questions = zip(*(document(rng, *how) for _ in range(min(rows, n - first))))
        yield torch.tensor(texts), [*zip(*questions)]

def ask_needles(lab, length, facts, prose, n, seed, parts):
    """n questions, up to three about one text -> depths, {part: {method: [right or not, ...]}}."""
    how = (length - FOR_THE_QUESTION, lab.tokenizer, facts, prose, min(3, facts))
    depths, right = [], {str(part): defaultdict(list) for part in parts}
    for texts, batches in documents(lab, seed, -(-n // how[-1]), max(1, 32768 // length), *how):
        text, _ = lab.read(texts)
        for batch in batches:
            depth, questions, answers = zip(*batch)
            depths += depth
            recording, next_token = lab.read(torch.tensor(questions), text)
            for part in parts:
                for name, cache in lab.start(recording, part, length):
                    right[str(part)][name] += lab.answered(cache, next_token, answers)
    return depths, right

def needles(lab, args):
    log, cells = args.log and Path(args.log), {}
    if log and log.exists():
        cells = {tuple(cell["key"]): cell for cell in read_jsonl(log, key=list, depths=list, right=dict)}
    for length, facts, prose, seed in itertools.product(args.lengths, args.facts, args.prose, args.seeds):
        key, begun = (length, facts, prose, args.n, seed), time.perf_counter()
        if key not in cells:
            depths, right = ask_needles(lab, *key, args.parts)
            cells[key] = {"key": key, "depths": depths, "right": right}
            print(f"{key}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            if log:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cells[key]) + "\n")
    kinds = [*itertools.product(args.facts, args.prose)]
    for some in [[kind] for kind in kinds] + [kinds] * (len(kinds) > 1):
        for part in map(str, args.parts):
            report_needles(lab, args, cells, some, part)

def report_needles(lab, args, cells, kinds, part):
    """Table and heat maps of all cells of these kinds of text, [(facts, prose), ...], taken together."""
    pooled = {length: [cells[(length, *kind, args.n, seed)] for kind in kinds for seed in args.seeds]
              for length in args.lengths}
    depths = {length: [d for cell in some for d in cell["depths"]] for length, some in pooled.items()}
    right = {name: {length: [ok for cell in some for ok in cell["right"][part][name]]
                    for length, some in pooled.items()} for name in lab.new}
    (facts, prose), *more = kinds
    title = "all kinds" if more else f"{facts} fact{'s' * (facts > 1)}, {'prose' if prose else 'grammar'}"
    table(f"{title}, 1/{part}", args.lengths, {name: map(share_of, of.values()) for name, of in right.items()})
    maps = {name: {length: heat(depths[length], of[length]) for length in of} for name, of in right.items()}
    for name, rows in maps.items():
        print("\n".join(heat_text(f"{name}, by depth", rows)))
    if args.svg:
        heat_svg(maps, Path(args.svg) / f"needles-{re.sub('[^a-z0-9]+', '-', title)}-{part}.svg")

# --------------------------------------------------------------------------------------------------------- follow-up

def ask_twice(lab, length, facts, prose, n, seed, part):
    """{method: [[first answer right, second right, second right in a fresh prompt], ...]}, n texts."""
    result, how = defaultdict(list), (length - FOR_THE_QUESTION, lab.tokenizer, facts, prose, 2)
    for texts, batches in documents(lab, seed, n, 1, *how):
        text, _ = lab.read(texts)
        (_, q1, a1), (_, q2, a2) = (batch[0] for batch in batches)
        right = defaultdict(list)
        recording, next_token = lab.read(torch.tensor([q1]), text)
        for name, cache in lab.start(recording, part, length):
            right[name] += lab.answered(cache, next_token, [a1])
            followed = lab.model(torch.tensor([a1[-1:] + q2]), cache).argmax(-1)
            right[name] += lab.answered(cache, followed, [a2])
        recording, next_token = lab.read(torch.tensor([q2]), text)
        for name, cache in lab.start(recording, part, length):
            result[name].append(right[name] + lab.answered(cache, next_token, [a2]))
    return result

def followup(lab, args):
    for length, facts, prose, part in itertools.product(args.lengths, args.facts, args.prose, args.parts):
        right = defaultdict(list)
        for seed in args.seeds:
            for name, answers in ask_twice(lab, length, facts, prose, args.n, seed, part).items():
                right[name] += answers
        table(f"{length} tokens, 1/{part}, {facts} facts", ("first question", "second", "second in a fresh prompt"),
              {name: map(share_of, zip(*answers)) for name, answers in right.items()})

# -------------------------------------------------------------------------------------------- perplexity and recall

def pieces(lab, args, length, seed):
    """args.n pieces of text, of `length` tokens each, in batches (B, length)."""
    bos, batch = [] if lab.tokenizer.bos_id is None else [lab.tokenizer.bos_id], max(1, 32768 // length)
    size, rng = length - len(bos), random.Random(seed)
    if args.text == "lessons":
        return torch.tensor([bos + one_lesson(rng, size, lab.tokenizer) for _ in range(args.n)]).split(batch)
    if args.text == "help":
        text = "".join(rng.sample(prose_sentences(), len(prose_sentences())))
    else:
        text = library_prose() if args.text == "library" else Path(args.text).read_text(encoding="utf-8")
    ids = lab.tokenizer.encode(text)
    if len(ids) < args.n * size:
        raise ValueError(f"{args.text}: {len(ids)} tokens are too few for --n {args.n} pieces of "
                         f"{length}: lower --n or --lengths, or give a longer --text")
    places = rng.sample(range(len(ids) // size), args.n)
    return torch.tensor([bos + ids[i * size:(i + 1) * size] for i in places]).split(batch)

def one_lesson(rng, length, tokenizer):
    """`length` tokens of a passage, and then questions about its facts with their answers."""
    ids, more = [], lesson(rng, length, 0.0)
    while len(ids) < length:
        ids += tokenizer.encode(next(more)[0])
    return ids[:length]

def perplexity(lab, args):
    for length, part in itertools.product(args.lengths, args.parts):
        losses = defaultdict(list)
        for seed in args.seeds:
            for rows in pieces(lab, args, length, seed):
                recording, _ = lab.read(rows[:, :-args.score - 1])
                for name, cache in lab.start(recording, part, length):
                    loss = [F.cross_entropy(lab.model(rows[:, i, None], cache), rows[:, i + 1], reduction="none")
                            for i in range(length - args.score - 1, length - 1)]
                    losses[name] += torch.stack(loss).mean(0).tolist()
        cells = {}
        for name, x in losses.items():
            more = [a - b for a, b in zip(x, losses["dense"])] if "dense" in losses else [math.nan] * len(x)
            low, high = map(math.exp, bootstrap(more))
            mean = lambda values: math.exp(sum(values) / len(values))
            cells[name] = f"{mean(x):.3f}", f"{mean(more):.4f} ({low:.4f}-{high:.4f})"
        table(f"{length} tokens, the last {args.score} scored, 1/{part}", ("perplexity", "ratio to dense"), cells)

def to_decode(lab, args, source, length, seed):
    """Yield prompts (B, T) and what is to be decoded after them (B, t): answers to questions, or the end of a text."""
    if source == "text":
        for rows in pieces(lab, args, length, seed):
            yield rows[:, :-args.score], rows[:, -args.score:]
    else:
        how = (length - FOR_THE_QUESTION, lab.tokenizer, args.facts[0], args.prose[0], 1)
        for text, [[(_, asked, told)]] in documents(lab, seed, args.n, 1, *how):
            yield torch.cat((text, torch.tensor([asked])), dim=1), torch.tensor([told])

def recall(lab, args):
    for length, part, source in itertools.product(args.lengths, args.parts, ("needles", "text")):
        new = {name: functools.partial(new, max(64, length // part)) for name, new in lab.new.items()
               if name != "dense"}
        shares, layers = defaultdict(list), range(len(lab.model.layers))
        for seed in args.seeds:
            for prompt, tokens in to_decode(lab, args, source, length, seed):
                shown = Shown(lab.read(prompt)[0], new)
                for token in tokens.T:
                    lab.model(token[:, None], shown)
                for key, steps in shown.share.items():
                    shares[key] += torch.stack(steps).mean(0).tolist()
        rows = {}
        for name in new:
            of_layers = [shares[layer, name] for layer in layers]
            mean = [sum(x) / len(x) for x in zip(*of_layers)]                    # of every prompt, over layers
            rows[name] = [f"{sum(x) / len(x):.3f}" for x in of_layers] + [mean_of(mean)]
        table(f"{args.text if source == 'text' else source}, {length} tokens, 1/{part}",
              [f"layer {layer}" for layer in layers] + ["mean"], rows)

# ---------------------------------------------------------------------------------------------------- the commands

COMMANDS = {"needles": needles, "followup": followup, "perplexity": perplexity, "recall": recall, "ruler": ruler,
            "longbench": longbench}

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        c = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own = name in ("ruler", "longbench")
        c.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny"), help="a Llama, see sentencekv.py --help")
        c.add_argument("--methods", nargs="+", metavar="NAME", help="only these; a wrong name tells the right ones")
        c.add_argument("--parts", type=int, nargs="+", default=[16], help="budget: 1/part of the context, 64 at least")
        c.add_argument("--n", type=int, default={"recall": 4, "perplexity": 8}.get(name, 12),
                       help="records of each file" if own else "texts or questions for each seed")
        if own:
            c.add_argument("files", nargs="+", metavar="FILE", help="jsonl")
            c.add_argument("--max-length", type=int, default=8192, help="longer prompts lose their middle")
            c.add_argument("--max-new-tokens", type=int, help="longest answer (default: the benchmark's own)")
        if name == "longbench":
            c.add_argument("--metric", choices=METRICS, help="default: that of the data set")
        if not own:
            c.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of context")
            c.add_argument("--seeds", type=int, nargs="+", default=[1])
        if name in ("needles", "followup", "recall"):
            c.add_argument("--facts", type=int, nargs="+", default=[8], help="facts told in a text")
            c.add_argument("--prose", type=float, nargs="+", default=[0.0], help="share of prose among the filler")
        if name in ("perplexity", "recall"):
            c.add_argument("--text", default="library", metavar="FILE",
                           help="UTF-8; or library (docstrings of the standard library), help (Python's help pages, "
                           "which the tiny model was trained on), lessons (made up: facts, then questions, answers)")
            c.add_argument("--score", type=int, default=64, help="last tokens of each piece, decoded one by one")
        if name == "needles":
            c.add_argument("--log", metavar="FILE", help="keep what is done here, and do not do it again")
            c.add_argument("--svg", metavar="DIR", help="write heat maps into this directory")
    args = p.parse_args(argv)
    for name, least in (("n", 1), ("parts", 1), ("lengths", 64), ("facts", 1), ("score", 1), ("max_length", 2)):
        values = getattr(args, name, least)
        if min(values if isinstance(values, list) else [values]) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    return args

@torch.no_grad()
def main(argv=None):
    try:
        args, begun = parse(argv), time.perf_counter()
        torch.set_num_threads(1)                             # in a model this small threads only wait for each other
        print(f"quality.py {' '.join(sys.argv[1:] if argv is None else argv)}   [torch {torch.__version__}, Python "
              f"{sys.version.split()[0]}]", flush=True)
        COMMANDS[args.command](Lab(args), args)
        print(f"[{time.perf_counter() - begun:.0f} s]")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    raise SystemExit(main())
