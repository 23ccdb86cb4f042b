"""An extra loss that trains the paper's rule of retrieval (`train_tiny.py --align`).

The mean query of the sentence being written should find, among the mean keys of the sentences
before it, those that dense attention attends to.

B documents of L tokens in S sentences; H KV heads with G query heads each, d head width;
n positions per document at which an answer's value is predicted.
"""
from functools import partial

import torch
import torch.nn.functional as F

from experiments.training.corpus import VALUE
from sentencekv import Segmenter, sentence_flags

POSITIONS = 32                          # n: positions per document that the loss looks at
WEIGHT = 0.3                            # of this loss, next to the cross-entropy of the text
SHARPNESS = 4.0                         # factor of the scores before their softmax
MAX_SENTENCE = 64

def sentence_numbers(tokens, flags):
    """tokens (B, L) -> (B, L): the number of each token's sentence, from 0."""
    numbers = []
    for row in tokens.tolist():
        segmenter = Segmenter(flags, 0, MAX_SENTENCE)
        numbers.append(segmenter.extend(row))
    numbers = torch.tensor(numbers)
    return numbers - numbers[:, :1]

class AligningCache:
    """Wraps a training cache, and adds the alignment loss of every layer to `extra_loss`.

    For every position, the loss is the cross-entropy from the attention mass of each sentence to
    softmax(SHARPNESS * qbar . kbar / sqrt(d)). The sentence being written and the one before it,
    which is the question, are no candidates.

    cache    the training cache; it computes the attention
    tokens   (B, L) the documents; weights (B, L) of the loss, VALUE where a value is predicted
    flags    sentence_flags of the tokenizer
    """
    length = 0

    def __init__(self, cache, tokens, weights, flags):
        self.cache = cache
        self.extra_loss = 0.0
        B, L = tokens.shape
        sentence = sentence_numbers(tokens, flags)                              # (B, L)
        self.member = F.one_hot(sentence).mT.float()                            # (B, S, L)
        S = self.member.shape[1]

        # Random positions at which a value is predicted, as many as there are up to n.
        order = torch.rand(B, L).masked_fill(weights != VALUE, 2).sort(dim=1)
        self.at = order.indices[:, :POSITIONS]                                  # (B, n)
        is_value = order.values[:, :POSITIONS] < 2                              # (B, n)

        # What each position can see, and its own sentence so far.
        own = sentence.gather(1, self.at)                                       # (B, n)
        self.future = torch.arange(L) > self.at[:, :, None]                     # (B, n, L)
        so_far = (sentence[:, None] == own[:, :, None]) & ~self.future          # (B, n, L)
        self.mean_so_far = so_far / so_far.sum(-1, keepdim=True)                # (B, n, L)
        self.candidate = torch.arange(S) < own[:, :, None] - 1                  # (B, n, S)
        self.counts = is_value & self.candidate.any(-1)                         # (B, n)

    def begin(self, tokens):
        return self.cache.begin(tokens)

    def attend(self, layer, q, k, v):
        if self.counts.any():
            grouped = q.unflatten(1, (k.shape[1], -1))                          # (B, H, G, L, d)
            self.extra_loss = self.extra_loss + WEIGHT * self.alignment(grouped, k)
        return self.cache.attend(layer, q, k, v)

    def alignment(self, q, k):
        """q (B, H, G, L, d), k (B, H, L, d) -> the loss of one layer."""
        H, d = k.shape[1], k.shape[3]
        q, k = q.float(), k.float()
        target = self.attention_mass(q, k)                                      # (B, H, n, S)
        size = self.member.sum(-1, keepdim=True).clamp(min=1)                   # (B, S, 1)
        means = self.member @ k.transpose(1, 2).flatten(2) / size               # (B, S, H * d)
        means = means.unflatten(2, (H, d)).transpose(1, 2)                      # (B, H, S, d)
        query = self.mean_so_far[:, None] @ q.mean(2)                           # (B, H, n, d)
        scores = query @ means.mT * SHARPNESS * d ** -0.5                       # (B, H, n, S)
        scores = scores.masked_fill(~self.candidate[:, None], -1e9)
        log_p = scores.log_softmax(-1).clamp(min=-50)
        losses = -(target * log_p).sum(-1)                                      # (B, H, n)
        return losses.transpose(1, 2)[self.counts].mean()

    @torch.no_grad()
    def attention_mass(self, q, k):
        """Dense attention that each candidate sentence gets, mean over G: (B, H, n, S)."""
        B, H, G, _, d = q.shape
        index = self.at[:, None, None, :, None].expand(B, H, G, -1, d)
        logits = q.gather(3, index) @ k[:, :, None].mT * d ** -0.5              # (B, H, G, n, L)
        logits = logits.masked_fill(self.future[:, None, None], -torch.inf)
        weights = logits.softmax(-1).mean(2)                                    # (B, H, n, L)
        return weights @ self.member.mT[:, None] * self.candidate[:, None]

def aligning(tokenizer):
    """The AligningCache of a tokenizer: a callable that takes cache, tokens and weights."""
    return partial(AligningCache, flags=sentence_flags(tokenizer.token_bytes))
