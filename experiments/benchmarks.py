"""RULER and LongBench: their files, how a long prompt is cut, and how an answer is scored. They are for a real Llama.

A RULER file (arXiv 2404.06654) has a record per line with "input", the whole prompt, and "outputs", what must be in the
answer. A LongBench file (arXiv 2308.14508) has "context", "input" (the question) and "answers" (any of which will do).
"""
import functools
import json
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

import torch

from experiments.figures import mean_of, table

# -------------------------------------------------------------------------------------------------------------- files

def read_jsonl(path, **fields):
    """The records of a file, one JSON object per line, with at least these fields: read_jsonl(path, input=str, ...)."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: no JSON ({type(e).__name__}: {e})") from None
            for name, kind in fields.items():
                value = record.get(name) if isinstance(record, dict) else None
                texts = name not in ("outputs", "answers") or value and all(isinstance(x, str) for x in value)
                if not isinstance(value, kind) or not texts:
                    raise ValueError(f"{path}, line {number}: needs a field {name!r} of type {kind.__name__}"
                                     f"{' with texts in it' * (name in ('outputs', 'answers'))}")
            records.append(record)
    if not records:
        raise ValueError(f"{path}: no records in it")
    return records

def cut_middle(ids, length):
    """At most `length` ids: the first and the last half of it. The middle is lost, as in LongBench.

    >>> cut_middle([1, 2, 3, 4, 5, 6, 7], 4)
    [1, 2, 6, 7]
    """
    return ids if len(ids) <= length else ids[:length // 2] + ids[len(ids) - (length - length // 2):]

# ------------------------------------------------------------------------------------------------------------ scoring

def normal(text):
    """Lower case, without punctuation and articles, one space between words.

    >>> normal("The  cat's hat, a HAT!")
    'cats hat hat'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))

def harmonic(common, said, wanted):
    return 2 * common / (said + wanted) if common else 0.0

def f1(text, answer):
    """Words in common, as often as they occur in both: harmonic mean of precision and recall.

    >>> f1("The cat sat on a mat.", "a cat on the mat")                         # cat sat on mat: 3 of 4, and 3 of 3
    0.8571428571428571
    """
    said, wanted = normal(text).split(), normal(answer).split()
    return harmonic(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))

def rouge_l(text, answer):
    """The longest common subsequence of words, as a harmonic mean likewise.

    >>> rouge_l("one two three four", "one three two four five")                # one two four: 3 of 4, and 3 of 5
    0.6666666666666666
    """
    said, wanted = text.lower().split(), answer.lower().split()
    row = [0] * (len(wanted) + 1)                            # row[j]: with the first j words of the answer
    for word in said:
        before, row = row, [0]
        for j, other in enumerate(wanted):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return harmonic(row[-1], len(said), len(wanted))

def exact(text, answer):
    return float(normal(text) == normal(answer))

def all_in(text, outputs):
    """RULER's string match: the share of the outputs that the text contains, whatever the case.

    >>> all_in("It is 12 and 34.", ["12", "34", "56", "it IS"])
    0.75
    """
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)

def any_in(text, outputs):
    """RULER's match for questions and answers: one output is enough."""
    return float(any(output.lower() in text.lower() for output in outputs))

METRICS = {"f1": f1, "rouge": rouge_l, "exact": exact}
LONGBENCH = {  # data set: metric, longest answer in tokens (LongBench's own choices); another data set: f1, 64
    **dict.fromkeys(("multifieldqa_en", "triviaqa", "2wikimqa", "hotpotqa", "musique"), ("f1", 32)),
    "narrativeqa": ("f1", 128), "qasper": ("f1", 128), "gov_report": ("rouge", 512), "qmsum": ("rouge", 512),
    "multi_news": ("rouge", 512), "samsum": ("rouge", 128), "trec": ("exact", 64),
    "passage_retrieval_en": ("exact", 32), "passage_count": ("exact", 32)}
FIRST_LINE = ("trec", "triviaqa", "samsum")                  # few-shot tasks: what follows the first line is not meant
RULER = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}         # longest answers, in tokens

FOR_THE_TEMPLATE = 16

# ----------------------------------------------------------------------------------------------------------- the runs

def answers(lab, ids, length, args):
    """Yield every method's name and greedy answer of at most `length` tokens; the prompt is read once for all."""
    stops, (recording, first) = lab.tokenizer.stop_ids, lab.read(torch.tensor([ids]))
    for name, cache in lab.start(recording, args.parts[0], len(ids)):
        said = [first.item()]
        if said[0] not in stops and length > 1:
            said += (int(token) for token in lab.model.generate(first[:, None], cache, length - 1, stop_ids=stops))
        yield name, lab.tokenizer.decode(t for t in said if t not in stops)

def measure(lab, args, tasks):
    """tasks: {title: [(ids of the prompt, longest answer, function that scores a text), ...]}; prints a table."""
    scores = {title: defaultdict(list) for title in tasks}
    for title, records in tasks.items():
        for ids, length, score in records:
            for name, text in answers(lab, cut_middle(ids, args.max_length), args.max_new_tokens or length, args):
                scores[title][name].append(100 * score(text))
    table(f"1/{args.parts[0]}", tasks, {name: [mean_of(scores[title][name], 1) for title in tasks] for name in lab.new})

def ruler(lab, args):
    tasks = {}
    for file in map(Path, args.files):
        task = next((task for task in RULER if f"_{task}" in f"_{file.stem}"), "niah")
        match = any_in if task == "qa" else all_in
        tasks[file.stem] = [(ruler_prompt(lab.tokenizer, record), RULER[task],
                             functools.partial(match, outputs=record["outputs"]))
                            for record in read_jsonl(file, input=str, outputs=list)[:args.n]]
    measure(lab, args, tasks)

def ruler_prompt(tokenizer, record):
    """The files hold Llama 3's whole chat template and the answer's first words: their special tokens are meant."""
    ids = tokenizer.encode(record["input"], special=True)
    return ids if tokenizer.bos_id in (None, *ids[:1]) else [tokenizer.bos_id, *ids]

def longbench(lab, args):
    tasks = {}
    for file in map(Path, args.files):
        tasks[file.stem] = []
        for record in read_jsonl(file, context=str, input=str, answers=list)[:args.n]:
            data = record.get("dataset", file.stem)
            metric, length = LONGBENCH.get(data, ("f1", 64))
            ids = longbench_prompt(lab.tokenizer, record, args.max_length)
            tasks[file.stem].append((ids, length, functools.partial(
                best, METRICS[args.metric or metric], record["answers"], data in FIRST_LINE)))
    measure(lab, args, tasks)

def best(metric, answers, first_line, text):
    """The score of a text against the answer that suits it best."""
    text = text.lstrip("\n").split("\n")[0] if first_line else text
    return max(metric(text, answer) for answer in answers)

def longbench_prompt(tokenizer, record, length):
    """The text and the question, `length` tokens with the middle cut; as a chat if there are Llama 3's tokens."""
    text = record["context"] + "\n\nAnswer from the text above, as briefly as you can.\nQuestion: " + record["input"]
    ids = cut_middle(tokenizer.encode(text + "\nAnswer:"), length - FOR_THE_TEMPLATE)
    if "<|eot_id|>" in tokenizer.added:
        return tokenizer.chat([{"role": "user", "content": tokenizer.decode(ids)}])
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
