"""RULER's needles (arXiv 2404.06654) with each method.

    python -m experiments.quality.ruler 4096_niah_single_1.jsonl --model DIR --log FILE

A file has a JSON object per line with "input", a prompt in Llama 3's chat template that ends with
the beginning of the answer, and "outputs", one value. The template is exchanged for the model's. An
answer is right if each token of the value is the likeliest one after the tokens before it. Shares
are of what dense attention answers. Intervals: Wilson, 95%.
"""
import json
import re
from pathlib import Path

import torch

from experiments.quality.answers import right_answers
from experiments.quality.command import Lab, at_least, existing, options, run
from experiments.quality.figures import share, table
from experiments.quality.recording import Recorder

KEYS = ("file", "record", "part", "method")
TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|$)", re.S)

def read_records(path):
    """[(input, value), ...]. ValueError names the line that is not a record with one output."""
    records = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            match json.loads(line):
                case {"input": str(prompt), "outputs": [str(value)]}:
                    records.append((prompt, value))
                case _:
                    raise ValueError('needs "input" and "outputs" with one value')
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records

def prompt_ids(tokenizer, prompt):
    """Ids of a prompt in Llama 3's template, in the template of this tokenizer.

    Raises ValueError if the prompt does not end in an assistant's turn.
    """
    turns = [{"role": role, "content": content} for role, content in TURN.findall(prompt)]
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("the input must end in an assistant's turn of Llama 3's chat template")
    start = turns.pop()["content"].strip()
    return tokenizer.chat(turns) + tokenizer.encode(start)

@torch.no_grad()
def measure(lab, file, number, prompt, value):
    """Add the answers of every method to one record to the log."""
    missing = lab.missing(file, number)
    if not missing:
        return
    ids = prompt_ids(lab.tokenizer, prompt)
    answer = lab.tokenizer.encode(" " + value)
    cache = Recorder()
    logits = lab.model.prefill(torch.tensor([ids]), cache)
    first = logits.argmax(-1).item() == answer[0]           # exact for every method
    compared = [lab.method(part, name, len(ids)) for part, name in missing]
    right = right_answers(lab.model, cache.recording(), answer, compared)
    for (part, name), ok in zip(missing, right):
        lab.log.add({"file": file, "record": number, "part": part, "method": name,
                     "right": first and ok})

def report(lab, file, count):
    answered = [i for i in range(count) if lab.log[file, i, 0, "dense"]["right"]]
    columns = [f"1/{part} (n = {len(answered)})" for part in lab.parts]
    rows = {name: [share([lab.log[file, i, part, name]["right"] for i in answered])
                   for part in lab.parts] for name in lab.methods if answered}
    table(file, columns, rows)
    print(f"dense: {len(answered)} of {count}")

def main(argv=None):
    parser = options(__doc__, parts=[8, 16, 32])
    parser.add_argument("files", nargs="+", metavar="FILE", help="RULER's records, JSON lines")
    parser.add_argument("--n", type=at_least(1), default=25, help="records of each file")
    args = parser.parse_args(argv)
    existing(args.files)
    tasks = {Path(path).name: read_records(path)[:args.n] for path in args.files}
    lab = Lab(args, KEYS)
    for file, records in tasks.items():
        for number, record in enumerate(records):
            measure(lab, file, number, *record)
    for file, records in tasks.items():
        report(lab, file, len(records))

if __name__ == "__main__":
    raise SystemExit(run(main))
