"""Answers that a model gives with each method, for commands that ask questions."""
import torch

from experiments.quality.simulator import Batch, Simulator

@torch.no_grad()
def right_answers(model, recording, answer, methods, value=0):
    """Whether greedy decoding gives an answer, by method: a list of bools.

    answer: ids, the first of which is already known from the prompt's own logits. All of its ids
    are decoded in turn; answer[value:] must be the likeliest ids after those before them.
    methods: list of Method; None is dense attention.
    """
    value = max(1, value)
    if len(answer) == value:            # nothing is left to decode
        return [True] * len(methods)
    simulators = [Simulator(recording, method) for method in methods]
    given = torch.tensor([answer[:-1]] * len(methods))                      # (methods, T)
    logits = model(given, Batch(simulators), all_logits=True)
    best = logits[:, value - 1:].argmax(-1)                                 # (methods, values)
    right = best == torch.tensor(answer[value:])
    return right.all(dim=1).tolist()
