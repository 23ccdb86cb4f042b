"""Reading a prompt once for many caches: a dense cache that remembers what others need to start from there.

Reading order: group_logits, attention_sums -> Recorder -> start -> Shown (attention recall).
"""
import copy
from collections import defaultdict

import torch
import torch.nn.functional as F

import sentencekv
from model import DenseKV

def group_logits(q, k):
    """A decode step's logits, per query head: q (B, Hq, 1, d), k (B, H, N, d) -> (B, H, G, N) float32."""
    return (q[:, :, 0].unflatten(1, (k.shape[1], -1)) @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5

def attention_sums(q, k, step=128):
    """Attention that each of N keys gets from T queries, the last T of N tokens, summed over queries and group.

    q (B, Hq, T, d), k (B, H, N, d) -> (B, H, N) float32. Slices of queries: nothing has T * N elements.
    """
    (B, Hq, T, d), (H, N) = q.shape, k.shape[1:3]
    total = torch.zeros(B, H, N, device=q.device)
    for i in range(0, T, step):
        t = min(step, T - i)
        seen = N - T + i + t                                                     # keys that the last of them sees
        future = torch.full((t, seen), -torch.inf, device=q.device).triu(seen - t + 1)
        logits = q[:, :, i:i + t].reshape(B, H, -1, d) @ k[:, :, :seen].transpose(2, 3)      # (B, H, G * t, seen)
        logits = logits.float().mul_(d ** -0.5).view(B, H, -1, t, seen).add_(future)
        total[:, :, :seen] += logits.softmax(-1).sum((2, 3))
    return total

class Recorder(DenseKV):
    """The dense cache, and what other caches need to start as if they had read the same prompt: tokens and queries.

    fork() shares the buffers: of all caches that start from one recording, one after the other may generate.
    """

    def __init__(self, sums=False):
        super().__init__()
        self.tokens, self.queries, self.sums, self.with_sums = None, [], [], sums

    def begin(self, tokens):
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)            # (B, N)
        return super().begin(tokens)

    def attend(self, layer, q, k, v):
        if layer == len(self.queries):
            self.queries.append(q[:, :, :0])
            self.sums.append(torch.zeros(*k.shape[:2], 0, device=k.device))
        out = super().attend(layer, q, k, v)
        self.queries[layer] = torch.cat((self.queries[layer], q), dim=2)         # (B, Hq, N, d)
        if self.with_sums:
            before = F.pad(self.sums[layer], (0, q.shape[2]))
            self.sums[layer] = before + attention_sums(q, self.keys[layer][:, :, :self.length])  # (B, H, N)
        return out

    def fork(self):
        new = copy.copy(self)
        new.keys, new.values, new.queries, new.sums = map(list, (self.keys, self.values, self.queries, self.sums))
        return new

def start(cache, recorded):
    """`cache`, new, as if it had read the recorded tokens as one prompt: a DenseKV, a rival of it (baselines.py) or a
    SentenceKV."""
    n = recorded.length
    cache.begin(recorded.tokens)
    if isinstance(cache, DenseKV):
        cache.keys, cache.values = list(recorded.keys), list(recorded.values)
        for layer, q in enumerate(recorded.queries if hasattr(cache, "read") else []):
            cache.read(layer, q, recorded.sums[layer] if recorded.with_sums else None)
        return cache
    exact, sentencekv.attend_causal = sentencekv.attend_causal, lambda q, k, v, *more, **named: torch.zeros_like(q)
    try:                                                                         # nobody needs the prompt's output
        for layer, q in enumerate(recorded.queries):
            cache.attend(layer, q, recorded.keys[layer][:, :, :n], recorded.values[layer][:, :, :n])
    finally:
        sentencekv.attend_causal = exact
    return cache

class Shown(DenseKV):
    """The dense cache, which shows every decode step to other caches that were started from the same recording:
    share[layer, name] lists the attention mass (mean over heads) that each would have attended to, (B,) per step.

    others  {name: a function that makes a new cache}
    """

    def __init__(self, recorded, others):
        super().__init__()
        self.share, self.others = defaultdict(list), {}
        super().begin(recorded.tokens)
        self.keys, self.values = list(recorded.keys), list(recorded.values)
        labelled = recorded.fork()                  # a SentenceKV gets float32, and positions in place of values
        labelled.queries = [q.float() for q in recorded.queries]
        positions = torch.arange(recorded.length, device=recorded.tokens.device)[:, None].float()
        labelled.keys = [k[:, :, :recorded.length].float() for k in recorded.keys]
        labelled.values = [positions.expand(k.shape) for k in labelled.keys]
        for name, new in others.items():
            cache = new()
            self.others[name] = start(cache, recorded if isinstance(cache, DenseKV) else labelled)

    def begin(self, tokens):
        for cache in self.others.values():
            cache.begin(tokens)
        return super().begin(tokens)

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        mass = group_logits(q, self.keys[layer][:, :, :self.length]).softmax(-1).mean(2)     # (B, H, N)
        for name, cache in self.others.items():
            if isinstance(cache, DenseKV):
                cache.attend(layer, q, k, v)
                mask = cache.mask[layer]
            else:
                cache.attend(layer, q.float(), k.float(), torch.full_like(k, self.length - 1, dtype=torch.float32))
                mask = attended(cache)
            self.share[layer, name].append((mass * mask).sum(-1).mean(1))
        return out

def attended(cache):
    """Which tokens a SentenceKV attended to in the layer of the last attend(), (B, H, N); its values are positions."""
    position = cache.layers[0].work[..., 1, 0].long()                            # (B, H, places), one for all layers
    # A place that is not used holds token 0, which is in the sink.
    mask = torch.zeros(*position.shape[:2], cache.length, dtype=torch.bool, device=position.device)
    return mask.scatter(-1, position, True)
