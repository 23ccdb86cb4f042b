"""Exercise 9 of docs/exercises.md: how much is fetched again?

    python -m pytest docs/exercises/ex09_overlap.py
    python docs/exercises/ex09_overlap.py               # the measurement
"""
import pytest
import torch
from helpers import tiny_model, toy_questions

from sentencekv import SentenceKV, sentence_flags

def saved_and_held(steps, streak):
    """What is saved if the device holds the tokens that the last `streak` steps all fetched.

    steps: what fetched() returned after each decode step: (sentence, taken), (L, B, H, k) each.
    Of each sentence, its first `taken` tokens were fetched. Two steps can differ in k.

    Returns two shares of what all steps from number `streak` on (the first is 0) fetched:
    saved    those tokens that were held, because all of the `streak` steps before fetched them
    held     the tokens that were held, whether they were fetched again or not
    """
    raise NotImplementedError

@torch.no_grad()
def measure(n=20, budget=128):
    """Print both shares for the answers to n questions about texts of 2,048 tokens."""
    model, tokenizer = tiny_model()
    flags = sentence_flags(tokenizer.token_bytes)
    shares = {streak: [] for streak in (1, 2, 3)}
    for prompt, answer in toy_questions(tokenizer, n):
        cache = SentenceKV(flags, budget=budget)
        model.prefill(torch.tensor([prompt]), cache)
        steps = []
        for token in answer:
            model(torch.tensor([[token]]), cache)
            steps.append(cache.fetched())
        for streak in shares:
            shares[streak].append(saved_and_held(steps, streak))
    for streak, pairs in shares.items():
        saved, held = torch.tensor(pairs).mean(0).tolist()
        print(f"last {streak} steps: saved {saved:.3f}, held {held:.3f}")

# ------------------------------------------------------------------------------------------ tests

def test_an_example_that_you_can_follow():
    sentence = torch.tensor([[0, 7, 3], [0, 3, 9], [3, 0, 7]]).view(3, 1, 1, 1, 3)
    taken = torch.tensor([[4, 6, 2], [4, 6, 2], [5, 4, 3]]).view(3, 1, 1, 1, 3)
    steps = list(zip(sentence, taken))
    assert saved_and_held(steps[:2], 1) == (6 / 12, 12 / 12)
    assert saved_and_held(steps, 1) == (15 / 24, 24 / 24)
    assert saved_and_held(steps, 2) == (6 / 12, 6 / 12)

@pytest.mark.parametrize("streak", [1, 2, 3])
def test_it_is_the_share_of_the_definition(streak):
    random = torch.Generator().manual_seed(streak)
    steps = []
    for k in (5, 5, 7, 5, 6, 5):
        sentence = torch.rand(2, 2, 3, 8, generator=random).argsort(3)[..., :k]
        steps.append((sentence, torch.randint(0, 4, sentence.shape, generator=random)))
    saved = held = fetched = 0
    for l, b, h in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))):
        sets = [{(s, i) for s, n in zip(sentence[l, b, h].tolist(), taken[l, b, h].tolist())
                 for i in range(n)} for sentence, taken in steps]
        for now in range(streak, 6):
            kept = set.intersection(*sets[now - streak:now])
            saved += len(kept & sets[now])
            held += len(kept)
            fetched += len(sets[now])
    assert saved_and_held(steps, streak) == pytest.approx((saved / fetched, held / fetched))

if __name__ == "__main__":
    measure()
