"""Exercise 8 of docs/exercises.md: Quest's pages against sentences.

    python -m pytest docs/exercises/ex08_pages.py
    python docs/exercises/ex08_pages.py                 # the comparison
"""
import torch
from helpers import tiny_model, toy_questions

from experiments.quality.answers import right_answers
from experiments.quality.figures import share
from experiments.quality.methods import Quest, Sentences, Window
from experiments.quality.recording import Recording, record
from sentencekv import sentence_flags

class Pages(Window):
    """Pages of PAGE tokens, ranked by an upper bound of q . k in the page, summed over the group.

    Each dimension contributes at most max(q_i * largest_i, q_i * smallest_i), where largest and
    smallest are over the keys of the page (arXiv 2406.10774).
    """
    PAGE = 16

    def far(self, layer, q, keys, room):
        """The tokens of the best pages that are neither sink nor recent.

        q (T, H, G, d), keys (H, N, d) -> slot, used (T, H, room). The last page is cut. See Window
        and its subclasses in experiments/quality/methods.py; do not look at Quest.
        """
        raise NotImplementedError

def compare(n=100, budgets=(64, 128)):
    """Print the share of right answers to n questions about texts of 2,048 tokens."""
    model, tokenizer = tiny_model()
    flags = sentence_flags(tokenizer.token_bytes)
    right = []
    for prompt, answer in toy_questions(tokenizer, n):
        methods = [None]
        for budget in budgets:
            methods += [Sentences(flags, budget=budget), Pages(budget, recent=8)]
        right.append(right_answers(model, record(model, prompt), answer, methods))
    names = [f"{kind}, budget {budget}" for budget in budgets for kind in ("sentences", "pages")]
    for name, answers in zip(["dense", *names], zip(*right)):
        print(f"{name:22} {share(answers)}")

# ------------------------------------------------------------------------------------------ tests

def choices(method, page, N, T=5):
    """The tokens that a method chooses, for T decode steps and two heads."""
    random = torch.Generator().manual_seed(N)
    keys = torch.randn(2, N, 8, generator=random)
    q = torch.randn(T, 2, 3, 8, generator=random)
    method.PAGE = page
    method.begin(Recording(list(range(N - T)), [], [], []), list(range(T)))
    slot, used = method.choose(0, q, keys)
    return [sorted(slot[t, h][used[t, h]].tolist()) for t in range(T) for h in range(2)]

def test_the_tokens_are_those_of_quest():
    for page, budget, N in ((16, 80, 150), (16, 150, 200), (5, 60, 153), (1, 60, 90), (16, 99, 90)):
        assert choices(Pages(budget), page, N) == choices(Quest(budget), page, N)

if __name__ == "__main__":
    compare()
