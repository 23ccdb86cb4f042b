"""A loss that trains the paper's rule of retrieval: the mean query of the sentence being written should find, among the
mean keys of the sentences before it, those that dense attention goes to. Used by `train_tiny.py --align`.

B documents of L tokens in S sentences, H KV heads with G query heads each, d width of a head, n rows: the positions at
which an answer's value is predicted.
"""
import functools

import torch
import torch.nn.functional as F

from experiments.corpus import VALUE
from sentencekv import segment, sentence_flags
from train_tiny import TrainingCache

ROWS, WEIGHT, SHARPNESS, CAP = 32, 0.3, 4.0, 64

class AligningCache(TrainingCache):
    """The training cache, which adds to extra_loss, in every layer, the cross-entropy from the attention mass of each
    sentence to softmax(4 qbar . kbar / sqrt(d)). The sentence being written and the question before it do not count."""

    def __init__(self, tokens, weights, positions, flags):
        super().__init__(positions)
        B, L = tokens.shape
        none = torch.zeros(B, dtype=torch.long)
        self.ids = segment(flags[tokens], none, none, CAP)[0].cumsum(1) - 1      # (B, L) sentence of each token
        chosen = torch.rand(B, L).masked_fill(weights != VALUE, 2).sort(dim=1)
        self.rows, real = chosen.indices[:, :ROWS], chosen.values[:, :ROWS] < 2  # (B, n)
        self.member = F.one_hot(self.ids).mT.float()                             # (B, S, L)
        own = self.ids.gather(1, self.rows)                                      # (B, n) the sentence being written
        t = torch.arange(L)
        so_far = (self.ids[:, None] == own[:, :, None]) & (t <= self.rows[:, :, None])          # (B, n, L)
        self.so_far = so_far / so_far.sum(-1, keepdim=True)
        self.future = t > self.rows[:, :, None]                                  # (B, n, L)
        self.past = torch.arange(self.member.shape[1]) < own[:, :, None] - 1     # (B, n, S)
        self.real = real & self.past.any(-1)

    def attend(self, layer, q, k, v):
        if self.real.any():
            self.extra_loss = self.extra_loss + WEIGHT * self.alignment(q.unflatten(1, (k.shape[1], -1)), k)
        return super().attend(layer, q, k, v)

    def alignment(self, q, k):
        """q (B, H, G, L, d), k (B, H, L, d) -> the loss of one layer."""
        B, H, G, L, d = q.shape
        q, k = q.float(), k.float()
        with torch.no_grad():                                                    # what dense attention does
            at = self.rows[:, None, None, :, None].expand(B, H, G, -1, d)
            logits = q.gather(3, at) @ k[:, :, None].mT * d ** -0.5              # (B, H, G, n, L)
            weights = logits.masked_fill(self.future[:, None, None], -torch.inf).softmax(-1).mean(2)
            mass = weights @ self.member.mT[:, None] * self.past[:, None]        # (B, H, n, S)
        means = self.member @ k.transpose(1, 2).flatten(2) / self.member.sum(-1, keepdim=True).clamp(min=1)
        means = means.unflatten(2, (H, d)).transpose(1, 2)                       # (B, H, S, d)
        query = self.so_far[:, None] @ q.mean(2)                                 # (B, H, n, d)
        scores = (query @ means.mT * SHARPNESS * d ** -0.5).masked_fill(~self.past[:, None], -1e9)
        losses = -(mass * scores.log_softmax(-1).clamp(min=-50)).sum(-1)         # (B, H, n)
        return losses.transpose(1, 2)[self.real].mean()

def aligning(tokenizer):
    """What train() needs: tokens, weights, positions -> AligningCache."""
    return functools.partial(AligningCache, flags=sentence_flags(tokenizer.token_bytes))
