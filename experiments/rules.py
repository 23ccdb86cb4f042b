"""Rules of retrieval that were tried against each other, all with whole sentences, the same budget and nothing pruned.

    python experiments/rules.py             a few minutes; other seeds than those that quality.py's tables report

Every rule scores each sentence for the query of the current token and the mean query of the sentence being generated.
"2 d" tells how many numbers it keeps per sentence and KV head. The winner became SentenceKV's default.
"""
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import quality
from experiments.baselines import Sentences
from experiments.recording import attention_sums
from model import rotate
from sentencekv import sentence_flags

class Summary:
    """What a rule may know of the sentences' keys: (B, H, 1, S, d) each, made when it is asked for."""

    def __init__(self, cache, layer, inv_freq):
        self.cache, self.k, self.sums = cache, cache.k(layer).float(), cache.sums[layer]
        self.t, self.inv_freq, (self.B, self.H, N, self.d) = cache.t, inv_freq, self.k.shape
        self.ids = cache.ids[:, None, :, None].expand(self.k.shape)              # (B, H, N, d)

    def __getattr__(self, name):
        """mean, high, low, deviation and first, of the rotated keys or (plain_mean, ...) of those before RoPE."""
        of, what = ("plain", name[6:]) if name.startswith("plain_") else ("k", name)
        value = self.reduce(getattr(self, of), what)
        setattr(self, name, value)
        return value

    def reduce(self, k, what):
        if what == "deviation":
            return (self.reduce(k * k, "mean") - self.reduce(k, "mean") ** 2).clamp(min=0).sqrt()
        how = {"mean": "mean", "high": "amax", "low": "amin", "total": "sum"}[what]
        return self.cache.per_sentence(k, how)[:, :, None]

    def weighted(self, w):
        """The mean key with weights w (B, H, N, 1) of the tokens."""
        return self.reduce(self.k * w, "total") / self.reduce(w.expand(self.k.shape), "total").clamp(min=1e-9)

    def own(self, x):
        """Of every token, the x (B, H, 1, S, d) of its sentence: (B, H, N, d)."""
        return x[:, :, 0].gather(2, self.ids)

    @functools.cached_property
    def plain(self):
        return self.turn(self.k, -self.t[None, None])

    def turn(self, x, by):
        """Rotate x (.., n, d) by so many positions (.., n)."""
        angle = by[..., None].float() * self.inv_freq
        return rotate(x, angle.cos(), angle.sin())

    @functools.cached_property
    def middle_mean(self):
        positions = self.t[None, None, :, None].float().expand(self.k.shape)
        return self.turn(self.plain_mean, self.reduce(positions, "mean")[..., 0])

    @functools.cached_property
    def halves(self):
        """Two means: of the first half of the sentence, and of the second."""
        t = self.t[None, None, :, None].float().expand(self.k.shape)
        late = (t > self.own((self.reduce(t, "high") + self.reduce(t, "low")) / 2)).float()[..., :1]
        return self.weighted(1 - late), self.weighted(late)

    @functools.cached_property
    def outlier(self):
        """The key that is farthest from the mean."""
        far = (self.k - self.own(self.mean)).square().sum(-1, keepdim=True)
        top = self.own(self.reduce(far.expand(self.k.shape), "high"))[..., :1]
        return self.weighted((far >= top).float())

    @functools.cached_property
    def weighted_mean(self):
        w = F.pad(self.sums, (0, len(self.t) - self.sums.shape[-1]))[..., None]
        return self.weighted(w + 1e-6)

def dot(q, v):
    """q (B, H, G, d), v (B, H, 1, S, d) -> (B, H, G, S)."""
    return q @ v[:, :, 0].transpose(2, 3)

def bounds(q, s, share=1.0):
    """share 1: Quest's bound; less: the box is shrunk around the mean."""
    high, low = torch.lerp(s.mean, s.high, share), torch.lerp(s.mean, s.low, share)
    return dot(q.relu(), high) - dot((-q).relu(), low)

def spread(q, s, times=1.0):
    return dot(q, s.mean) + times * dot(q.abs(), s.deviation)

def unturned(q, s):
    return s.turn(q, 1 - torch.full_like(s.t[:1], len(s.cache.t))[None, None])

RULES = {  # name: (numbers / d, score (B, H, G, S) by current query q, mean query m, summary s; how a group is joined)
    "spread, half mean query": (2, lambda q, m, s: spread((q + m) / 2, s), "mean"),
    "spread, current query": (2, lambda q, m, s: spread(q, s), "mean"),
    "spread, mean query": (2, lambda q, m, s: spread(m, s), "mean"),
    "spread x 0.5": (2, lambda q, m, s: spread((q + m) / 2, s, 0.5), "mean"),
    "spread x 1.5": (2, lambda q, m, s: spread((q + m) / 2, s, 1.5), "mean"),
    "spread, largest of the group": (2, lambda q, m, s: spread((q + m) / 2, s), "max"),
    "spread, softmax per query head": (2, lambda q, m, s: spread((q + m) / 2, s), "softmax"),
    "mean + 2 sqrt(variance of q . k)": (2, lambda q, m, s: dot(q, s.mean) + 2 * dot(q * q, s.deviation ** 2).sqrt(),
                                         "mean"),
    "bounds": (2, lambda q, m, s: bounds(q, s), "mean"),
    "bounds, half mean query": (2, lambda q, m, s: bounds((q + m) / 2, s), "mean"),
    "bounds, mean query": (2, lambda q, m, s: bounds(m, s), "mean"),
    "bounds, largest of the group": (2, lambda q, m, s: bounds(q, s), "max"),
    "bounds shrunk to a third": (2, lambda q, m, s: bounds(q, s, 0.35), "mean"),
    "bounds without RoPE": (2, lambda q, m, s: dot(unturned(q, s).relu(), s.plain_high)
                            - dot((-unturned(q, s)).relu(), s.plain_low), "mean"),
    "mean, mean query (paper)": (1, lambda q, m, s: dot(m, s.mean), "mean"),
    "mean, current query": (1, lambda q, m, s: dot(q, s.mean), "mean"),
    "mean at the middle position": (1, lambda q, m, s: dot(q, s.middle_mean), "mean"),
    "mean weighted by importance": (1, lambda q, m, s: dot(q, s.weighted_mean), "mean"),
    "better of the halves' means": (2, lambda q, m, s: torch.maximum(*(dot(q, x) for x in s.halves)), "mean"),
    "better of mean and outlier": (2, lambda q, m, s: torch.maximum(dot(q, s.mean), dot(q, s.outlier)), "mean"),
}

class Tried(Sentences):
    """Sentences by one of the RULES."""

    def __init__(self, budget, flags, rule, inv_freq, max_sentence=None):
        super().__init__(budget, flags, max_sentence=max_sentence)
        self.rule, self.inv_freq, self.sums, self.known, self.asked = rule, inv_freq, {}, {}, {}

    def read(self, layer, q, sums=None):
        self.sums[layer], self.asked[layer] = attention_sums(q[:, :, -32:], self.k(layer)), (0, 0)

    def scores(self, layer, q):
        _, score, join = RULES[self.rule]
        total, n = self.asked[layer]                                             # answers here are one sentence each
        self.asked[layer] = total, n = total + q.float(), n + 1
        newest = (self.ids * self.far).amax(1)                                   # (B,) the last far sentence
        if layer not in self.known or bool((newest >= self.known[layer][0]).any()):          # it was not complete then
            self.known[layer] = self.ids[:, -1], Summary(self, layer, self.inv_freq)
        heads = lambda q: q[:, :, 0].float().unflatten(1, (self.k(layer).shape[1], -1))      # (B, H, G, d)
        scores = score(heads(q), heads(total / n), self.known[layer][1])
        if join == "softmax":
            scores = (scores * q.shape[-1] ** -0.5).softmax(-1)
        scores = scores.amax(2) if join == "max" else scores.mean(2)             # (B, H, sentences when it was made)
        return F.pad(scores, (0, int(self.ids.max()) + 1 - scores.shape[2]), value=-torch.inf)

def cut(new, cap, budget):
    """The same with sentences cut at `cap` tokens, or at all that may be fetched."""
    return new(budget, max_sentence=min(cap, budget - 36))

COMMANDS = ["needles --lengths 1024 --parts 32 --n 96 --seeds 140",
            "needles --lengths 4096 --parts 32 --n 48 --prose 1 --seeds 142",
            "needles --lengths 4096 --parts 32 --n 48 --facts 80 --seeds 143",
            "recall --lengths 4096 --parts 32 --n 6 --score 16 --seeds 141"]

@torch.no_grad()
def main():
    torch.set_num_threads(1)
    lab = quality.Lab(quality.parse(["needles"]))
    flags, oracle = sentence_flags(lab.tokenizer.token_bytes), lab.new["oracle, sentences"]
    lab.new = {f"{name} ({floats} d)": functools.partial(Tried, flags=flags, rule=name, inv_freq=lab.model.inv_freq)
               for name, (floats, *_) in RULES.items()}
    first = next(iter(lab.new.values()))
    lab.new |= {f"the first, sentences cut at {cap}": functools.partial(cut, first, cap) for cap in (16, 64)}
    lab.new["oracle, sentences"] = oracle
    for command in COMMANDS:
        print("quality.py", command)
        args = quality.parse(command.split())
        quality.COMMANDS[args.command](lab, args)

if __name__ == "__main__":
    main()
