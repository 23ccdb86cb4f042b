"""Facts hidden in real text, as in needles.py, but the answers are generated freely.

    python -m experiments.quality.free_answers novels/*.txt --model DIR --log FILE --n 20

Greedy decoding with the real cache, up to 28 tokens. An answer is right if it contains the value
as a number of its own. Errors can build up here, since every token is the model's.
"""
import re

import torch

from experiments.quality.command import Lab, at_least, existing, options, run
from experiments.quality.figures import share, table
from experiments.quality.needles import questions
from sentencekv import SentenceKV, need, sentence_flags

KEYS = ("text", "seed", "length", "fact", "part", "method")
CACHES = ("SentenceKV", "SentenceKV, paper")
MOST_TOKENS = 28

class Started(SentenceKV):
    """A SentenceKV that takes over a recorded prompt, instead of computing its attention again."""

    def __init__(self, flags, recording, **settings):
        super().__init__(flags, **settings)
        self.loading = True
        self.begin(torch.tensor([recording.tokens]))
        for i, (k, v) in enumerate(zip(recording.keys, recording.values)):
            queries = recording.queries[i]                              # (Hq, N, d)
            q = k.new_zeros(1, len(queries), *k.shape[1:])
            self.attend(i, q, k[None], v[None])
            if self.settings.keep:
                self.layers[i].observed = queries[None, :, -self.settings.window:].clone()
        self.loading = False

    def _prompt(self, layer, q, kv):
        return q if self.loading else super()._prompt(layer, q, kv)

def greedy_answer(lab, cache, token):
    """The text that follows, token by token; `token` is the first one, from the prompt's logits."""
    ids = []
    while token not in lab.tokenizer.stop_ids and len(ids) < MOST_TOKENS:
        ids.append(token)
        token = int(lab.model(torch.tensor([[token]]), cache).argmax())
    return lab.tokenizer.decode(ids)

def contains(text, value):
    """Is this number in the text? "4711" is not in "47112"."""
    return re.search(rf"(?<!\d){value.strip()}(?!\d)", text) is not None

@torch.no_grad()
def measure(lab, path, seed, length):
    """Add the answers of every method to the five questions about one text to the log."""
    flags = sentence_flags(lab.tokenizer.token_bytes)
    for key, (_, _, value), _, asked, logits in questions(lab, path, seed, length):
        first = int(logits.argmax())
        for part, name in lab.missing(*key):
            used = asked.fork()
            if name != "dense":
                method = lab.method(part, name, asked.length)
                used = Started(flags, asked.recording(), **vars(method.settings))
            answer = greedy_answer(lab, used, first)
            lab.log.add({**dict(zip(KEYS, key)), "part": part, "method": name,
                         "right": contains(answer, value), "answer": answer})

def report(lab, documents, facts=5):
    """Print the shares of right answers among those that dense attention gives."""
    keys = [(path.rpartition("/")[2], *rest, fact)
            for path, *rest in documents for fact in range(facts)]
    answered = [key for key in keys if lab.log[(*key, 0, "dense")]["right"]]
    need(answered, f"dense attention answers none of {len(keys)} questions: nothing can be lost")
    rows = {name: [share([lab.log[(*key, part, name)]["right"] for key in answered])
                   for part in lab.parts] for name in lab.methods}
    table("free answers", [f"1/{part} (n = {len(answered)})" for part in lab.parts], rows)
    print(f"dense: {len(answered)} of {len(keys)}")

def main(argv=None):
    parser = options(__doc__, parts=[8, 16, 32])
    parser.add_argument("texts", nargs="+", metavar="FILE", help="UTF-8 text, used in turn")
    parser.add_argument("--length", type=at_least(256), default=2048, help="tokens of the prompt")
    parser.add_argument("--n", type=at_least(1), default=20, help="documents")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the first document")
    args = parser.parse_args(argv)
    existing(args.texts)
    args.methods = args.methods or list(CACHES)
    lab = Lab(args, KEYS)
    for name in lab.methods:
        need(name in CACHES, f"--methods: {name!r} has no cache; there are {', '.join(CACHES)}")
    documents = [(args.texts[i % len(args.texts)], args.seed + i, args.length)
                 for i in range(args.n)]
    for document_of in documents:
        measure(lab, *document_of)
    report(lab, documents)

if __name__ == "__main__":
    raise SystemExit(run(main))
