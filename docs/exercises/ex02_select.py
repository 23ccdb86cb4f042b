"""Exercise 2 of docs/exercises.md: fill the budget, with a loop and without one.

    python -m pytest docs/exercises/ex02_select.py
"""
import ast
import inspect

import torch

import sentencekv

def slots_by_loop(scores, count, places):
    """The slots to fetch for one head, best sentence first, at most `places`.

    scores and count: lists, the score and the number of tokens of each sentence. The sentences lie
    one after the other in the pool.

    >>> slots_by_loop([1.0, 9.0, 5.0], [3, 2, 4], places=5)
    [3, 4, 5, 6, 7]
    """
    raise NotImplementedError

def slots_without_loop(scores, count, places):
    """The same for all rows and heads at once, without a loop: scores (B, H, S), count (B, S).

    Returns slot and filled, (B, H, places) each. Where filled is False, nothing was left for this
    place, and slot is 0.
    """
    raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

def cases(n=60):
    random = torch.Generator().manual_seed(0)
    for _ in range(n):
        B, H, S, places = torch.randint(1, 8, (4,), generator=random).tolist()
        count = torch.randint(0, 6, (B, S), generator=random)
        scores = torch.rand(B, H, S, generator=random)
        yield scores, count, 3 * places, *sentencekv.select(scores, count, 3 * places, S)[:2]

def test_the_loop_takes_whole_sentences_in_descending_score():
    for scores, count, places, slot, filled in cases():
        for b, h in torch.cartesian_prod(torch.arange(len(count)), torch.arange(scores.shape[1])):
            got = slots_by_loop(scores[b, h].tolist(), count[b].tolist(), places)
            assert got == slot[b, h][filled[b, h]].tolist()

def test_without_a_loop_it_is_the_same_for_all_rows_and_heads():
    for *arguments, slot, filled in cases():
        got, got_filled = slots_without_loop(*arguments)
        assert torch.equal(got_filled, filled)
        assert torch.equal(got, slot)
    tree = ast.parse(inspect.getsource(slots_without_loop))
    loops = (ast.For, ast.While, ast.comprehension)
    assert not any(isinstance(node, loops) for node in ast.walk(tree))
