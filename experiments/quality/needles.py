"""Facts hidden in real text, and questions about them, with each method.

    python -m experiments.quality.needles novels/*.txt --model DIR --log FILE --n 20

Each prompt is a part of a text in which five facts are stated, one per fifth, and a question about
one of them, in the chat template of the model. An answer is right if each token of the value is the
likeliest one after the tokens before it. Only what dense attention answers can be lost, so shares
are of those. Intervals: Wilson, 95%.
"""
import random

import torch

from experiments.quality.answers import right_answers
from experiments.quality.command import Lab, at_least, existing, options, run
from experiments.quality.figures import share, table
from experiments.quality.recording import Recorder
from experiments.quality.texts import sentences
from sentencekv import need

KEYS = ("text", "seed", "length", "fact", "part", "method")
CITIES = ("Riga", "Oslo", "Lima", "Cairo", "Quito", "Dublin", "Kyoto", "Accra")
NAMES = ("Martha", "Oliver", "Hector", "Ingrid", "Samuel", "Bertha")
BUILDINGS = ("library", "museum", "bakery", "theatre", "orchard", "harbour")
CHARACTERS_PER_TOKEN = 6        # more than any model needs: the text is cut to size afterwards

def draw_facts(rng):
    """Five facts in random order: (question, beginning of the answer, value).

    The fact is stated as the answer is: "The secret code of the library is 4711."
    """
    city, other_city = rng.sample(CITIES, 2)
    name, other_name = rng.sample(NAMES, 2)
    building = rng.choice(BUILDINGS)
    facts = [
        (f"What is the special magic number of {city}?",
         f"The special magic number of {city} is", 5),
        (f"What is the telephone number of {name}?",
         f"The telephone number of {name} is", 5),
        (f"What is the secret code of the {building}?",
         f"The secret code of the {building} is", 4),
        (f"In which year was the old bridge in {other_city} built?",
         f"The old bridge in {other_city} was built in the year", 4),
        (f"What was the weight in pounds of the box that {other_name} carried?",
         f"The weight in pounds of the box that {other_name} carried was", 3)]
    rng.shuffle(facts)
    return [(question, start, f" {rng.randrange(10 ** (digits - 1), 10 ** digits)}")
            for question, start, digits in facts]

def document(path, seed, length, tokenizer):
    """A text of about `length` tokens in which facts are stated -> (text, facts, depths)."""
    rng = random.Random(f"{path.rpartition('/')[2]} {seed} {length}")
    filler = sentences(path, rng, length * CHARACTERS_PER_TOKEN)
    facts = draw_facts(rng)
    depths = [(i + rng.random()) / len(facts) for i in range(len(facts))]
    ends, size = [], 0                      # tokens up to the end of each sentence
    for sentence in filler:
        size += len(tokenizer.encode(" " + sentence))
        ends.append(size)
    room = length - 40 * len(facts)         # what the facts, the question and the template need
    filler = filler[:sum(end <= room for end in ends)]
    need(filler, f"{length} tokens are too few for the facts: raise --lengths")
    for (_, start, value), depth in sorted(zip(facts, depths), key=lambda pair: -pair[1]):
        place = sum(end <= depth * room for end in ends)
        filler.insert(place, f"{start}{value}.")
    return " ".join(filler), facts, depths

def common_prefix(rows):
    """How many ids at the start all rows have in common."""
    columns = enumerate(zip(*rows))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, rows)))

@torch.no_grad()
def questions(lab, path, seed, length):
    """Ask the five questions about one text, except for those that are all in the log.

    Yields the key of a question in the log, its fact and depth, the cache that has read the text
    and the question, and the logits after it (1, V).
    """
    text, facts, depths = document(path, seed, length, lab.tokenizer)
    keys = [(path.rpartition("/")[2], seed, length, i) for i in range(len(facts))]
    if not any(lab.missing(*key) for key in keys):
        return
    prompts = [lab.tokenizer.chat([{"role": "user", "content": f"{text}\n\n{question}"}])
               for question, _, _ in facts]
    shared = common_prefix(prompts)
    cache = Recorder()
    lab.model.prefill(torch.tensor([prompts[0][:shared]]), cache)
    for key, prompt, fact, depth in zip(keys, prompts, facts, depths):
        if lab.missing(*key):
            asked = cache.fork()
            logits = lab.model.prefill(torch.tensor([prompt[shared:]]), asked)
            yield key, fact, depth, asked, logits

def measure(lab, path, seed, length):
    """Add the answers of every method to the five questions about one text to the log."""
    for key, (_, start, value), depth, asked, _ in questions(lab, path, seed, length):
        missing = lab.missing(*key)
        answer = lab.tokenizer.encode(start + value)
        known = len(lab.tokenizer.encode(start))
        compared = [lab.method(part, name, asked.length) for part, name in missing]
        right = right_answers(lab.model, asked.recording(), answer, compared, known)
        for (part, name), ok in zip(missing, right):
            lab.log.add({**dict(zip(KEYS, key)), "part": part, "method": name, "right": ok,
                         "depth": round(depth, 3)})

def report(lab, documents, facts=5):
    """Print the shares of right answers among those that dense attention gives."""
    lengths = sorted({length for _, _, length in documents})
    asked = {length: [(path.rpartition("/")[2], seed, length, fact)
                      for path, seed, n in documents if n == length for fact in range(facts)]
             for length in lengths}
    answered = {length: [key for key in keys if lab.log[(*key, 0, "dense")]["right"]]
                for length, keys in asked.items()}
    columns = [f"{length}, 1/{part} (n = {len(answered[length])})"
               for length in lengths for part in lab.parts]
    rows = {name: [share([lab.log[(*key, part, name)]["right"] for key in answered[length]])
                   for length in lengths for part in lab.parts] for name in lab.methods}
    table("needles", columns, rows)
    for length in lengths:
        print(f"dense, {length}: {len(answered[length])} of {len(asked[length])}")

def main(argv=None):
    parser = options(__doc__, parts=[16, 32])
    parser.add_argument("texts", nargs="+", metavar="FILE", help="UTF-8 text, used in turn")
    parser.add_argument("--lengths", type=at_least(256), nargs="+", default=[2048],
                        help="tokens of the prompt")
    parser.add_argument("--n", type=at_least(1), default=20, help="documents of each length")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the first document")
    args = parser.parse_args(argv)
    existing(args.texts)
    lab = Lab(args, KEYS)
    documents = [(args.texts[i % len(args.texts)], args.seed + i, length)
                 for length in args.lengths for i in range(args.n)]
    for document_of in documents:
        measure(lab, *document_of)
    report(lab, documents)

if __name__ == "__main__":
    raise SystemExit(run(main))
