"""Rivals of SentenceKV behind the same two methods, begin and attend, to compare what each rule of attention loses.

They simulate: every K and V stays on the device, and a decode step masks what the rule would not attend to. So they
tell about quality, not about memory or speed. The budget means the same for all of them and for SentenceKV: at a decode
step a KV head attends to at most `budget` tokens, the first `sink`, the last `recent`, and `room` = budget - sink -
recent more that the rule chooses. The query heads of a group share the choice. A prompt (T > 1) attends to everything
that the rule has not evicted before.

B rows, H KV heads, G query heads share one, N tokens in the cache, d width of a head, P blocks; "far" tokens are those
neither in the sink nor recent. Reading order: DenseKV (model.py) -> Rival -> the rules, simplest first -> methods.
"""
import torch
import torch.nn.functional as F

from experiments.lookahead import Lookahead
from experiments.recording import attention_sums, group_logits
from model import DenseKV
from sentencekv import PAPER, SentenceKV, segment

# ----------------------------------------------------------------------------------------- what rivals have in common

class Rival(DenseKV):
    """A dense cache whose decode steps attend to a mask. A rule says in choose() which tokens; read() prepares it."""

    def __init__(self, budget, sink=4, recent=32):
        super().__init__()
        if budget <= sink + recent:
            raise ValueError(f"budget {budget} must exceed sink + recent = {sink + recent}: raise it or lower those")
        self.budget, self.sink, self.recent, self.room = budget, sink, recent, budget - sink - recent
        self.mask = {}                                                           # {layer: (B, H, N) of the last step}

    def attend(self, layer, q, k, v):
        T, before = q.shape[2], self.length - q.shape[2]
        if T == 1 and before:
            self.store(layer, k, v)
            mask = self.mask[layer] = self.choose(layer, q)                      # (B, H, N)
            return self.masked(layer, q, mask[:, :, None])
        out, held = super().attend(layer, q, k, v), self.held(layer)             # held (B, H, before), None: everything
        if held is not None:
            new = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().expand(*held.shape[:2], T, T)
            out = self.masked(layer, q, torch.cat((held[:, :, None].expand(-1, -1, T, -1), new), dim=-1))
        self.read(layer, q)
        return out

    def store(self, layer, k, v):
        """What the dense cache does with one token's k and v (B, H, 1, d), without attending to all of them."""
        for store, new in ((self.keys, k), (self.values, v)):
            if self.length > store[layer].shape[2]:
                store[layer] = torch.cat((store[layer], new.new_zeros(*new.shape[:2], 64, new.shape[3])), dim=2)
            store[layer][:, :, self.length - 1:self.length] = new

    def masked(self, layer, q, mask):
        """Exact attention of q (B, Hq, T, d) to what mask (B, H, T, N) leaves."""
        keys, values = self.keys[layer][:, :, :self.length], self.values[layer][:, :, :self.length]
        H, G = keys.shape[1], q.shape[1] // keys.shape[1]
        folded = q.unflatten(1, (H, G)).flatten(2, 3)                            # (B, H, G * T, d)
        return F.scaled_dot_product_attention(folded, keys, values, mask.repeat(1, 1, G, 1)).view(q.shape)

    def begin(self, tokens):
        positions = super().begin(tokens)
        self.t = torch.arange(self.length, device=tokens.device)
        self.far = (self.t >= self.sink) & (self.t < self.length - self.recent)  # (N,)
        return positions

    def k(self, layer):
        return self.keys[layer][:, :, :self.length]                              # (B, H, N, d)

    def held(self, layer):
        return None

    def read(self, layer, q, sums=None):
        """A prompt with the queries q (B, Hq, T, d) was read; sums: see attention_sums, if they are known already."""

    def choose(self, layer, q):
        """The tokens that a decode step with the query q (B, Hq, 1, d) attends to, at most budget of them."""
        raise NotImplementedError

def group_mean(q, H):
    """Queries (B, Hq, T, d) -> (B, H, T, d), the mean of each group."""
    return q.unflatten(1, (H, -1)).mean(2)

def take_blocks(scores, block, far, room):
    """Whole blocks in descending score until the room is full; the last one is cut. Only their far tokens count.

    scores (B, H, P); block (B, N) ascending: which block a token is in; far (B, N); room: int or (B, 1, 1) -> (B, H, N)

    >>> block, far = torch.tensor([[0, 0, 0, 1, 1, 2, 2]]), torch.tensor([[False, True, True, True, True, True, False]])
    >>> take_blocks(torch.tensor([[[5., 9., 1.]]]), block, far, 3).int().tolist()
    [[[0, 1, 0, 1, 1, 0, 0]]]
    """
    B, H, P = scores.shape
    length = block.new_zeros(B, P).scatter_add(1, block, far.long())           # far tokens of each
    place = far.cumsum(1) - 1 - (length.cumsum(1) - length).gather(1, block)     # (B, N) of a far token in its block
    length = length[:, None].expand(B, H, P)
    order = scores.argsort(-1, descending=True)
    ordered = length.gather(-1, order)
    take = (room - ordered.cumsum(-1) + ordered).clamp(min=0).minimum(ordered)
    take = torch.zeros_like(take).scatter(-1, order, take)                       # (B, H, P) tokens taken of each
    return far[:, None] & (place[:, None] < take.gather(-1, block[:, None].expand(B, H, -1)))

# ------------------------------------------------------------------------------------- rules that evict after a prompt

class Evicting(Rival):
    """Keeps sink, recent and the best `room` of the others; what is evicted never comes back, not for a follow-up.

    score[layer] (B, H, N): -inf is evicted. A generated token begins with the score 0. A follow-up judges anew what is
    still there, by its queries' attention to everything.
    """

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.score = {}

    def held(self, layer):
        return self.score[layer] > -torch.inf if layer in self.score else None

    def read(self, layer, q, sums=None):
        score, old = self.judge(layer, q, sums), self.score.get(layer)
        if old is not None:
            score = score.masked_fill(F.pad(old, (0, score.shape[-1] - old.shape[-1])) == -torch.inf, -torch.inf)
        self.evict(layer, score)

    def choose(self, layer, q):
        self.evict(layer, F.pad(self.score[layer], (0, 1)))
        return self.held(layer)

    def evict(self, layer, score):
        best = score.masked_fill(~self.far, -torch.inf).topk(min(self.room, self.length)).indices
        keep = (~self.far).expand_as(score).scatter(-1, best, True)
        self.score[layer] = score.masked_fill(~keep, -torch.inf)

    def judge(self, layer, q, sums):
        """Scores (B, H, N) of all tokens after a prompt."""
        raise NotImplementedError

class StreamingLLM(Evicting):
    """The sink and the latest tokens (arXiv 2309.17453)."""

    def judge(self, layer, q, sums):
        return torch.zeros_like(self.k(layer)[..., 0], dtype=torch.float32)

    def evict(self, layer, score):
        super().evict(layer, score.clamp(max=0) + self.t)                   # the later the better

class SnapKV(Evicting):
    """What the last `window` queries of the prompt attend to, max-pooled over 7 neighbours (arXiv 2404.14469)."""
    window, pool = 32, 7

    def judge(self, layer, q, sums):
        sums = attention_sums(q[:, :, -self.window:], self.k(layer))
        return F.max_pool1d(sums, self.pool, stride=1, padding=self.pool // 2)

class H2O(Evicting):
    """What got the most attention so far, of all queries (arXiv 2306.14048).

    Kinder than the original: it evicts after the prompt, with the exact sums, not while the prompt is read.
    """

    def judge(self, layer, q, sums):
        sums = attention_sums(q, self.k(layer)) if sums is None else sums
        old = self.score.get(layer)
        return sums if old is None else sums + F.pad(old, (0, sums.shape[-1] - old.shape[-1]))

    def choose(self, layer, q):
        held = super().choose(layer, q)
        logits = group_logits(q, self.k(layer)).masked_fill(~held[:, :, None], -torch.inf)
        self.score[layer] = self.score[layer] + logits.softmax(-1).sum(2)
        return held

# ---------------------------------------------------------------------------------------- rules that fetch fixed blocks

class Blocks(Rival):
    """Blocks of `size` tokens, fetched anew at each step in descending order of scores()."""
    size = 16

    def choose(self, layer, q):
        block = self.t.expand(len(q), -1) // self.size                           # (B, N)
        return take_blocks(self.scores(layer, q), block, self.far.expand_as(block), self.room) | ~self.far

    def cut(self, x, value):
        """x (B, H, N, w) in blocks: (B, H, P, size, w), the last one filled up."""
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.size), value=value).unflatten(2, (-1, self.size))

    def scores(self, layer, q):
        """How promising each block is: (B, H, P)."""
        raise NotImplementedError

class Quest(Blocks):
    """Pages of 16 by an upper bound of what their keys can give to the query, from each page's largest k and -k element
    by element (arXiv 2406.10774)."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.bounds = {}                                                         # {layer: (B, H, P, 2d)}

    def bounds_from(self, layer, token):
        k = self.k(layer)[:, :, token:]
        return self.cut(torch.cat((k, -k), dim=-1), -torch.inf).amax(3)

    def read(self, layer, q, sums=None):
        self.bounds[layer] = self.bounds_from(layer, 0)

    def scores(self, layer, q):
        last = (self.length - 1) // self.size                                    # the page of the new token
        self.bounds[layer] = torch.cat((self.bounds[layer][:, :, :last], self.bounds_from(layer, last * self.size)), 2)
        q = q[:, :, 0].unflatten(1, (self.bounds[layer].shape[1], -1))           # (B, H, G, d)
        return (self.bounds[layer] @ torch.cat((q, -q), dim=-1).relu().mean(2)[..., None])[..., 0]

class InfLLM(Blocks):
    """Blocks of 32 by four representative keys each: those that the `recent` queries after them liked best (arXiv
    2402.04617). Unlike the original it keeps the positions of far tokens, and its blocks are not of 128."""
    size, representatives = 32, 4

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.liked = {}                                                          # {layer: (B, H, N)}

    def read(self, layer, q, sums=None):
        """Every token of the last `recent` and the new ones gets its product with the new queries that follow it."""
        k, T, n = self.k(layer), q.shape[2], self.length
        a = max(0, n - T - self.recent)
        total = F.pad(group_mean(q, k.shape[1]).float(), (0, 0, n - T - a, 0)).cumsum(2)     # (B, H, N - a, d)
        later = (self.t[:n - a] + self.recent).clamp(max=n - a - 1)
        liked = F.pad(self.liked.get(layer, k.new_zeros(*k.shape[:2], 0).float()), (0, T))
        liked[..., a:] += (k[:, :, a:].float() * (total[:, :, later] - total)).sum(-1)
        self.liked[layer] = liked

    def scores(self, layer, q):
        self.read(layer, q)
        k = self.k(layer)
        best = self.cut(self.liked[layer][..., None], -torch.inf)[..., 0].topk(self.representatives).indices
        products = k @ group_mean(q, k.shape[1]).transpose(2, 3)                 # (B, H, N, 1)
        return self.cut(products, 0.0)[..., 0].gather(3, best).sum(3)            # (B, H, P)

# ------------------------------------------------------------------------------------------ sentences, and the oracles

class OracleTokens(Rival):
    """The far tokens that really get the most attention (averaged over the group): no rule of tokens covers more."""

    def choose(self, layer, q):
        weights = group_logits(q, self.k(layer)).softmax(-1).mean(2)             # (B, H, N)
        best = weights.masked_fill(~self.far, -1).topk(min(self.room, self.length)).indices
        return (~self.far).expand_as(weights).scatter(-1, best, True)

class Sentences(Rival):
    """Whole sentences, segmented as SentenceKV does it, with the same recent window rounded out to a sentence's start;
    scores() is the rule. ids (B, N): the sentence of each token, 0 for the sink as well."""

    def __init__(self, budget, flags, sink=4, recent=32, max_sentence=None):
        super().__init__(budget, sink, recent)
        self.flags, self.cap, self.ids = F.pad(flags, (0, 1)), max_sentence or min(64, -(-self.room // 3)), None

    def begin(self, tokens):
        B, before = len(tokens), self.length
        positions = super().begin(tokens)
        if self.ids is None:
            self.flags, self.ids, self.count = self.flags.to(tokens.device), tokens[:, :0], tokens[:, 0] * 0 - 1
            self.ended, self.open = torch.zeros(2, B, dtype=torch.long, device=tokens.device)
        starts, sink = torch.zeros_like(tokens, dtype=torch.bool), max(self.sink - before, 0)
        if sink < tokens.shape[1]:
            flags = self.flags[tokens[:, sink:].clamp(max=len(self.flags) - 1)]
            starts[:, sink:], self.ended, self.open = segment(flags, self.ended, self.open, self.cap)
        ids = self.count[:, None] + starts.cumsum(1)
        self.ids, self.count = torch.cat((self.ids, ids.clamp(min=0)), dim=1), ids[:, -1]
        oldest = self.ids[:, max(self.length - self.recent, 0), None]            # (B, 1) sentence where recent begins
        self.far = (self.ids < oldest) & (self.t >= self.sink)                   # (B, N)
        return positions

    def choose(self, layer, q):
        room = self.budget - (~self.far).sum(1)[:, None, None]            # (B, 1, 1)
        mask = take_blocks(self.scores(layer, q), self.ids, self.far, room)
        return mask | ~self.far[:, None]

    def per_sentence(self, x, how="sum"):
        """x (B, H, N, w) reduced over the tokens of each sentence: (B, H, S, w)."""
        (B, H, _, w), S = x.shape, int(self.ids.max()) + 1
        ids = self.ids.masked_fill(self.t < self.sink, S)[:, None, :, None].expand(x.shape)
        return x.new_zeros(B, H, S + 1, w).scatter_reduce(2, ids, x, how, include_self=False)[:, :, :S]

    def scores(self, layer, q):
        """How promising each sentence is: (B, H, S)."""
        raise NotImplementedError

class OracleSentences(Sentences):
    """The sentences that really get the most attention."""

    def scores(self, layer, q):
        return self.per_sentence(group_logits(q, self.k(layer)).softmax(-1).mean(2)[..., None])[..., 0]

# ---------------------------------------------------------------------------------------------------- all by name

def methods(flags):
    """{name: function of a budget that makes a new cache}; sink 4 and recent 32 for all."""
    paper = {name: value for name, value in PAPER.items() if name not in ("budget", "sink", "recent")}
    ours = lambda kind=SentenceKV, **more: lambda budget: kind(flags, budget=budget, sink=4, recent=32, **more)
    return {
        "dense": lambda budget: DenseKV(),
        "SentenceKV": ours(), "SentenceKV, bounds": ours(rank="bounds"), "SentenceKV, mean": ours(rank="mean"),
        "SentenceKV, paper": ours(**paper), "SentenceKV, paper, keep 3": ours(**{**paper, "keep": 3}),
        "SentenceKV, refresh 2": ours(refresh=2), "SentenceKV, refresh 8": ours(refresh=8),
        "SentenceKV, lookahead": ours(Lookahead),
        "Quest": Quest, "InfLLM": InfLLM, "SnapKV": SnapKV, "H2O": H2O, "StreamingLLM": StreamingLLM,
        "oracle, tokens": OracleTokens, "oracle, sentences": lambda budget: OracleSentences(budget, flags),
    }
