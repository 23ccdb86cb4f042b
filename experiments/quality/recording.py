"""Computes a prompt once, so that every method can start from it.

Reading order: Recorder records what a prompt leaves in each layer; Recording is one such state.
"""
from dataclasses import dataclass

import torch

from model import DenseKV

@dataclass
class Recording:
    """The state of one row of text after a prompt of N tokens."""
    tokens: list        # N ids
    keys: list          # per layer (H, N, d), rotated
    values: list        # per layer (H, N, d)
    queries: list       # per layer (Hq, window, d): the last queries of the prompt, rotated

class Recorder(DenseKV):
    """The dense cache for one row, which also keeps the tokens and the last `window` queries."""

    def __init__(self, window=32):
        super().__init__()
        self.window = window
        self.tokens = []
        self.queries = []

    def begin(self, tokens):
        positions = super().begin(tokens)
        self.tokens = self.tokens + tokens[0].tolist()
        return positions

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if layer == len(self.queries):
            self.queries.append(q[0, :, :0])
        queries = torch.cat((self.queries[layer], q[0]), dim=1)
        self.queries[layer] = queries[:, -self.window:]
        return out

    def recording(self):
        """What has been computed so far. It shares the memory of this cache."""
        n = self.length
        return Recording(
            tokens=self.tokens,
            keys=[keys[0, :, :n] for keys in self.keys],
            values=[values[0, :, :n] for values in self.values],
            queries=self.queries)

    def fork(self):
        """A copy that can continue with other tokens. Neither changes what the other has."""
        new = Recorder(self.window)
        new.tokens = self.tokens
        new.queries = list(self.queries)
        new.keys = [keys[:, :, :self.length] for keys in self.keys]
        new.values = [values[:, :, :self.length] for values in self.values]
        new.lengths = list(self.lengths)
        new.next_layer = self.next_layer
        return new

@torch.no_grad()
def record(model, ids):
    """A recording of a prompt."""
    cache = Recorder()
    model.prefill(torch.tensor([ids]), cache)
    return cache.recording()
