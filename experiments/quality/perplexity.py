"""Perplexity of real text with each method, as a ratio to dense attention.

    python -m experiments.quality.perplexity novels/*.txt manuals/*.txt --model DIR --log FILE

Each window of a text is a prompt and the tokens after it, which are decoded one by one: every
method starts from the same exact prompt. A file's folder is its genre, and has its own table.
The intervals (95%) are over windows.
"""
from collections import defaultdict

import torch
import torch.nn.functional as F

from experiments.quality.command import Lab, at_least, existing, options, run
from experiments.quality.figures import ratio, table
from experiments.quality.recording import record
from experiments.quality.simulator import Simulator
from experiments.quality.texts import windows

KEYS = ("window", "prompt", "score", "part", "method")

@torch.no_grad()
def mean_loss(model, recording, ids, method):
    """Mean loss of ids[1:], each decoded after the prompt and the ids before it."""
    logits = model(torch.tensor([ids[:-1]]), Simulator(recording, method), all_logits=True)
    return F.cross_entropy(logits[0], torch.tensor(ids[1:])).item()

def measure(lab, window, prompt):
    """Add the loss of every method on a window to the log."""
    size = len(window.ids) - prompt - 1
    missing = lab.missing(window.name, prompt, size)
    if not missing:
        return
    recording = record(lab.model, window.ids[:prompt])
    for part, name in missing:
        method = lab.method(part, name, prompt)
        loss = mean_loss(lab.model, recording, window.ids[prompt:], method)
        lab.log.add({"window": window.name, "prompt": prompt, "score": size, "part": part,
                     "method": name, "genre": window.genre, "loss": round(loss, 6)})

def report(lab, found, prompt, score):
    """Print the ratios of perplexity to dense attention, a table for each genre and one for all."""
    genres = defaultdict(list)
    for window in found:
        genres[window.genre].append((window.name, prompt, score))
    if len(genres) > 1:
        genres["all"] = [key for keys in genres.values() for key in keys]
    for genre, keys in genres.items():
        report_genre(lab, f"{genre}, {prompt} tokens, n = {len(keys)}", keys)

def report_genre(lab, title, keys):
    dense = [lab.log[(*key, 0, "dense")]["loss"] for key in keys]
    rows = {}
    for name in lab.methods:
        rows[name] = []
        for part in lab.parts:
            losses = [lab.log[(*key, part, name)]["loss"] for key in keys]
            rows[name].append(ratio([a - b for a, b in zip(losses, dense)]))
    table(title, [f"1/{part}" for part in lab.parts], rows)

def main(argv=None):
    parser = options(__doc__, parts=[8, 16, 32])
    parser.add_argument("texts", nargs="+", metavar="FILE", help="UTF-8 text, at least 100 KB")
    parser.add_argument("--windows", type=at_least(1), default=1, help="windows of each text")
    parser.add_argument("--prompt", type=at_least(64), default=4096, help="tokens of the prompt")
    parser.add_argument("--score", type=at_least(1), default=128, help="tokens that are decoded")
    args = parser.parse_args(argv)
    existing(args.texts)
    lab = Lab(args, KEYS)
    size = args.prompt + args.score + 1
    found = [window for path in args.texts
             for window in windows(path, lab.tokenizer, args.windows, size)]
    for window in found:
        measure(lab, window, args.prompt)
    report(lab, found, args.prompt, args.score)

if __name__ == "__main__":
    raise SystemExit(run(main))
