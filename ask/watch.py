"""Records what every decode step of a SentenceKV attends to, and what dense attention would."""
import time
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from model import DenseKV
from sentencekv import RANKS, Segmenter, SentenceKV

@dataclass
class Step:
    """One decode step of the first row. Every list has one entry per layer.

    An entry is a tensor (H, k): for each of H KV heads, the sentences that were taken (or pieces
    of long ones), best first. Where a head took fewer than k, taken is 0 and sentence any number.
    position: that of the token whose query the step is.
    """
    position: int = 0
    sentence: list = field(default_factory=list)    # number of the sentence
    taken: list = field(default_factory=list)       # tokens of it that were fetched
    near: list = field(default_factory=list)        # True: sink or recent, always taken
    attention: list = field(default_factory=list)   # share of the attention that it got, 0 to 1
    score: list = field(default_factory=list)       # what it was ranked by; infinite: near

class WatchedKV(SentenceKV):
    """A SentenceKV that records its decode steps in `steps`.

    steps     list of Step; set it to [] to start a new record
    seconds   time that recording took, all steps together
    """

    @classmethod
    def watch(cls, cache):
        """Turn a SentenceKV, new or loaded, into a watched one; returns it."""
        cache.__class__ = cls
        cache.steps, cache.seconds = [], 0.0
        return cache

    def can_truncate(self):
        """False if keep=r has not pruned the prompt in every layer: see extras/branch.py."""
        return all(layer.observed is None for layer in self.layers)

    def begin(self, tokens):
        positions = super().begin(tokens)
        if tokens.shape[1] == 1:
            self.steps.append(Step(position=len(self.rows[0].tokens) - 1))
        return positions

    @torch.no_grad()
    def attend(self, index, q, k, v):
        out = super().attend(index, q, k, v)
        if q.shape[2] == 1:
            start = time.perf_counter()
            self._record(self.steps[-1], index, q[0, :, 0])
            self.seconds += time.perf_counter() - start
        return out

    def _record(self, step, index, q):
        """q (Hq, d): the query of the first row. The layer has just filled self.attended."""
        sentence, taken = (x[0] for x in self.layers[index].fetched)            # (H, k) each
        keys = self.attended[0, :, :, 0]                                        # (H, budget, d)
        H, budget, d = keys.shape
        place = torch.arange(budget, device=q.device)
        used = place < taken.sum(-1, keepdim=True)                              # (H, budget)
        used[:, -1] = True                                                      # the token itself
        logits = q.view(H, -1, d) @ keys.mT * d ** -0.5                         # (H, G, budget)
        logits = logits.float().masked_fill(~used[:, None], float("-inf"))
        weights = logits.softmax(-1).mean(1)                                    # (H, budget)

        # The sentences lie end to end in `attended`: differences of the cumulated weights.
        cumulated = F.pad(weights.cumsum(-1), (1, 0))                           # (H, budget + 1)
        end = taken.cumsum(-1)                                                  # (H, k)
        attention = cumulated.gather(1, end) - cumulated.gather(1, end - taken)
        n = int((taken > 0).sum(-1).max())          # drop unused entries
        sentence, taken, attention = sentence[:, :n], taken[:, :n], attention[:, :n]
        score = self._scores(index, q).gather(1, sentence)                      # (H, n)
        step.sentence.append(sentence.cpu())
        step.taken.append(taken.cpu())
        step.near.append(score.isposinf().cpu())
        step.attention.append(attention.cpu())
        step.score.append(score.cpu())

    def _scores(self, index, q):
        """What the sentences of the first row were ranked by, (H, S), given its query q (Hq, d).

        The token has been appended since, but only to the newest sentence, which is near.
        """
        layer, rule = self.layers[index], RANKS[self.settings.rank]
        count, vectors, query_mean = layer.count[:1], layer.vectors[:1], layer.query_mean[:1]
        near = self._near(count.shape[1]).to(q.device)                          # (S,)
        query = q.view(query_mean.shape).float()                                # (1, H, G, d)
        scores = rule.score(query, query_mean, vectors, (count > 0) & ~near)    # (1, H, S)
        return scores[0].float().masked_fill(near, float("inf"))

    def _near(self, S):
        """(S,): which of the first row's sentences are always attended to, sink and recent ones."""
        lengths = self.rows[0].lengths
        oldest, tokens = len(lengths) - 1, lengths[-1]
        while tokens < self.settings.recent and oldest > 0:
            oldest -= 1
            tokens += lengths[oldest]
        near = torch.arange(S, device="cpu") >= oldest
        near[0] = True
        return near

class MeasuredKV(DenseKV):
    """A DenseKV that measures how much attention each sentence of the first row gets.

    owner     (N,) the sentence of each token of the text
    wanted    (W,) positions of the queries to measure
    mass      per layer (H, W, S): the share of a KV head, averaged over its query heads
    """

    @classmethod
    def measure(cls, cache, owner, wanted):
        """Turn a DenseKV into one that measures its next forward; returns it."""
        cache.__class__ = cls
        cache.owner, cache.wanted, cache.mass = owner, wanted, []
        return cache

    @torch.no_grad()
    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        here = (self.wanted >= self.before[0]) & (self.wanted < self.length)
        wanted = self.wanted[here].to(q.device)                                 # (W,)
        keys = self.keys[layer][0, :, :self.length]                             # (H, N, d)
        H, N, d = keys.shape
        queries = q[0, :, wanted - self.before[0]]                              # (Hq, W, d)
        queries = queries.reshape(H, -1, d)                                     # (H, G * W, d)
        logits = (queries @ keys.mT * d ** -0.5).float()                        # (H, G * W, N)
        logits = logits.view(H, -1, len(wanted), N)                             # (H, G, W, N)
        future = torch.arange(N, device=q.device) > wanted[:, None]             # (W, N)
        weights = logits.masked_fill(future, float("-inf")).softmax(-1).mean(1)     # (H, W, N)
        S = int(self.owner.max()) + 1
        mass = weights.new_zeros(H, len(wanted), S)
        mass.index_add_(2, self.owner[:N].to(q.device), weights)
        if layer == len(self.mass):
            self.mass.append(mass.cpu())
        else:                                       # a further chunk of the text
            self.mass[layer] = torch.cat((self.mass[layer], mass.cpu()), dim=1)
        return out

@dataclass
class Fetched:
    """What was fetched of one sentence of the text, in all steps."""
    ids: list               # the tokens of the sentence
    attention: float        # the largest share that one KV head gave it in one step
    share: float            # of all fetches (one per layer, KV head and step), those that took it

def whole_sentences(cache):
    """The sentences of the first row's text. SentenceKV cuts long ones into pieces.

    Returns owner (S,): the sentence that each piece belongs to; and the ids of each sentence.
    """
    row = cache.rows[0]
    uncut = Segmenter(cache.flags, cache.settings.sink, max_sentence=len(row.tokens) + 1)
    numbers = uncut.extend(row.tokens)
    ids = [[] for _ in uncut.lengths]
    for token, number in zip(row.tokens, numbers):
        ids[number].append(token)
    starts = [0, *accumulate(row.lengths)][:-1]
    return torch.tensor([numbers[start] for start in starts], device="cpu"), ids

def most_attended(cache, end=None):
    """The sentences that a WatchedKV fetched in its recorded steps: a list of Fetched.

    The sink and the recent sentences are left out, and those that start at position `end` or later,
    such as the question itself. The largest attention comes first.
    """
    owner, ids = whole_sentences(cache)
    W, fetches = len(ids), 0
    count, largest = torch.zeros(2, W, device="cpu")
    for step in cache.steps:
        for sentence, taken, near, attention in zip(
                step.sentence, step.taken, step.near, step.attention):
            H = len(sentence)
            fetches += H
            chosen = ((taken > 0) & ~near).float()                              # (H, k)
            whole = owner[sentence.clamp(max=len(owner) - 1)]                   # (H, k)
            pieces, total = torch.zeros(2, H, W, device="cpu")
            pieces.scatter_add_(1, whole, chosen)
            total.scatter_add_(1, whole, chosen * attention)
            count += (pieces > 0).sum(0)
            largest = largest.maximum(total.amax(0))
    order = largest.argsort(descending=True, stable=True).tolist()
    start = [0, *accumulate(len(sentence) for sentence in ids)]
    return [Fetched(ids[s], float(largest[s]), float(count[s]) / fetches)
            for s in order if count[s] > 0 and (end is None or start[s] < end)]
