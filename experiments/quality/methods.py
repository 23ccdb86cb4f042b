"""Which tokens each method attends to in a decode step: SentenceKV, its rivals, and oracles.

The budget means the same for all: at each decode step a KV head attends to at most `budget` tokens,
with the first `sink` and the last `recent` among them, and with the new token itself. The query
heads of a group share the choice. The rivals are reimplemented from their papers.

T new tokens (one decode step each), N tokens of prompt and new tokens, n prompt tokens, P pages,
S sentences, H KV heads, G query heads of each, d head width.
Reading order: Method, Window and the rivals, simplest first, then Sentences.
"""
import torch
import torch.nn.functional as F

from sentencekv import (
    PAPER, RANKS, Segmenter, Settings, importance, need, select, survivors)

class Method:
    """Base class. `budget` is the whole of what a decode step attends to."""

    def __init__(self, budget, sink=4, recent=32):
        need(budget > sink + recent, f"budget {budget} must exceed sink + recent, {sink + recent}")
        self.budget = budget
        self.sink = sink
        self.recent = recent

    def begin(self, recording, new):
        """recording: of the prompt. new: the ids of the T tokens to decode."""
        self.recording = recording
        self.n = len(recording.tokens)
        self.position = torch.arange(self.n, self.n + len(new))             # (T,)

    def choose(self, layer, q, keys):
        """q (T, H, G, d), keys (H, N, d) -> slot, used (T, H, places)."""
        raise NotImplementedError

def attention_weights(q, keys, position):
    """Attention of each query to the keys up to its position, averaged over the group.

    q (T, H, G, d), keys (H, N, d), position (T,) -> (T, H, N)
    """
    logits = torch.einsum("thgd,hnd->thgn", q, keys) * q.shape[3] ** -0.5
    future = torch.arange(keys.shape[1]) > position[:, None]                # (T, N)
    logits = logits.masked_fill(future[:, None, None], float("-inf"))
    return logits.softmax(-1).mean(2)

# --------------------------------------------------------------------------------------- rivals

class Window(Method):
    """The sink, the last `recent` tokens, and the `room` tokens between them that far() chooses."""

    def choose(self, layer, q, keys):
        T, H, _, _ = q.shape
        sink = torch.arange(self.sink).expand(T, -1)
        recent = self.position[:, None] - torch.arange(self.recent)         # with the token itself
        near = torch.cat((sink, recent), dim=1)                             # (T, sink + recent)
        near = near[:, None].expand(T, H, -1)
        room = self.budget - self.sink - self.recent
        slot, used = self.far(layer, q, keys, room)
        slot = torch.cat((near, slot), dim=2)                               # (T, H, budget)
        used = torch.cat((near >= 0, used), dim=2)
        return slot.where(used, 0), used

    def far(self, layer, q, keys, room):
        """-> slot, used (T, H, room): a choice of tokens between the sink and the recent ones."""
        raise NotImplementedError

    def best_tokens(self, scores, room):
        """The `room` tokens of the highest score, at most all N: scores (T, H, N) -> slot, used."""
        N = scores.shape[2]
        token = torch.arange(N)
        latest = self.position[:, None] - self.recent                       # (T, 1)
        near = (token < self.sink) | (token > latest)                       # (T, N)
        scores = scores.masked_fill(near[:, None], -1)
        best = scores.topk(min(room, N))
        return best.indices, best.values >= 0

class StreamingLLM(Window):
    """The latest tokens (arXiv 2309.17453)."""

    def far(self, layer, q, keys, room):
        T, H, _, _ = q.shape
        latest = self.position[:, None, None] - self.recent                 # (T, 1, 1)
        slot = latest - torch.arange(room)                                  # (T, 1, room)
        slot = slot.expand(T, H, room)
        return slot, slot >= self.sink

class SnapKV(Window):
    """What the last 32 queries of the prompt attend to, max-pooled over 7 (arXiv 2404.14469).

    Other tokens of the prompt are never attended to. Generated tokens score lower than those.
    """

    def far(self, layer, q, keys, room):
        queries = self.recording.queries[layer]                             # (Hq, w, d)
        w, H = queries.shape[1], len(keys)
        rows = queries.transpose(0, 1).unflatten(1, (H, -1))                # (w, H, G, d)
        position = torch.arange(self.n - w, self.n)
        weights = attention_weights(rows, keys[:, :self.n], position).sum(0)        # (H, n)
        scores = F.max_pool1d(weights, 7, stride=1, padding=3)
        scores = F.pad(scores, (0, len(self.position)))                     # (H, N)
        return self.best_tokens(scores.expand(len(q), -1, -1), room)

class Quest(Window):
    """Pages of 16 tokens, ranked by an upper bound of q . k in the page (arXiv 2406.10774)."""
    PAGE = 16

    def far(self, layer, q, keys, room):
        missing = -keys.shape[1] % self.PAGE                                # to fill the last page
        largest = torch.cat((keys, -keys), dim=-1)                          # (H, N, 2d)
        largest = F.pad(largest, (0, 0, 0, missing), value=float("-inf"))
        largest = largest.unflatten(1, (-1, self.PAGE)).amax(2)             # (H, P, 2d)
        query = torch.cat((q, -q), dim=-1).relu()                           # (T, H, G, 2d)
        scores = torch.einsum("thgw,hpw->thp", query, largest)

        # Of a page that reaches into the sink or the recent tokens, the rest of it counts.
        first = torch.arange(0, keys.shape[1], self.PAGE)                   # (P,)
        end = first + self.PAGE
        recent = self.position[:, None] + 1 - self.recent                   # (T, 1)
        count = end.minimum(recent) - first.clamp(min=self.sink)            # (T, P)
        k = min(len(first), room)
        slot, used, _, _ = select(scores, count.clamp(min=0), room, k)
        return slot + self.sink, used

class OracleTokens(Window):
    """The tokens that do get the most attention: an upper limit for rules that choose tokens."""

    def far(self, layer, q, keys, room):
        return self.best_tokens(attention_weights(q, keys, self.position), room)

# ------------------------------------------------------------------------------------ sentences

class Sentences(Method):
    """SentenceKV, from the functions of sentencekv.py. settings: those of SentenceKV."""

    def __init__(self, flags, **settings):
        self.settings = s = Settings(**settings)
        super().__init__(s.budget, s.sink, s.recent)
        self.flags = flags
        self.rule = RANKS[s.rank]

    def begin(self, recording, new):
        super().begin(recording, new)
        row = Segmenter(self.flags, self.settings.sink, self.settings.max_sentence)
        numbers = row.extend(recording.tokens + new)
        self.sentence = torch.tensor(numbers)                               # (N,)
        self.near = self.near_at(self.position)                             # (T, S)
        self.kept = {}                                                      # per layer, see keep()

        # The mean query restarts at the first new token and with every sentence.
        self.start = []
        for t, position in enumerate(self.position.tolist()):
            starts = t == 0 or numbers[position] != numbers[position - 1]
            self.start.append(t if starts else self.start[-1])

    def near_at(self, position):
        """The sink and the sentences that reach into the last `recent` tokens at each position.

        (T,) -> (T, S) bool
        """
        oldest = position + 1 - self.recent
        oldest = self.sentence[oldest.clamp(min=0)]                         # (T,)
        near = torch.arange(self.sentence[-1] + 1) >= oldest[:, None]
        near[:, 0] = True
        return near

    def keep(self, layer, keys):
        """The tokens that remain to choose from, in text order: all unless keep=r."""
        s, n = self.settings, self.n
        count = n if s.keep is None else int(s.keep * s.budget)
        if layer not in self.kept:
            kept = torch.arange(keys.shape[1])
            if count < n:
                queries = self.recording.queries[layer][:, -s.window:]             # (Hq, window, d)
                alpha = importance(queries, keys[:, :n], s.max_pool)
                near = self.near_at(self.position[:1] - 1).squeeze(0)       # (S,)
                alpha = alpha.masked_fill(near[self.sentence[:n]], float("inf"))
                kept = torch.cat((survivors(alpha, count), kept[n:]))
            self.kept[layer] = kept
        return self.kept[layer]

    def choose(self, layer, q, keys):
        T, H, _, _ = q.shape
        S = self.near.shape[1]
        kept = self.keep(layer, keys)                                       # (M,)
        sentence = self.sentence[kept]
        prompt = torch.bincount(sentence[kept < self.n], minlength=S)       # (S,)
        generated = F.one_hot(self.sentence[self.n:], S)                    # (T, S)
        before = generated.cumsum(0) - generated
        count = prompt + before                                             # (T, S)
        candidates = ~self.near & (count > 0)                               # (T, S)
        scores = self.scores(q, keys[:, kept], sentence, candidates)
        scores = scores.masked_fill(self.near[:, None], float("inf"))       # (T, H, S)
        places = self.budget - 1
        slot, used, _, _ = select(scores, count, places, min(S, self.budget))
        new = self.position[:, None, None].expand(T, H, 1)
        slot = torch.cat((kept[slot], new), dim=2)                          # (T, H, budget)
        used = F.pad(used, (0, 1), value=True)
        return slot, used

    def scores(self, q, keys, sentence, candidates):
        """The rule's scores (T, H, S) of all sentences; only those of candidates are used."""
        S = candidates.shape[1]
        features = self.rule.features(keys)                                 # (H, M, w)
        total = features.new_zeros(len(keys), S, features.shape[2])
        total.index_add_(1, sentence, features)                             # (H, S, w)
        size = torch.bincount(sentence, minlength=S).clamp(min=1)
        vectors = self.rule.vector(total, size[:, None])
        return self.rule.score(q, self.query_mean(q), vectors[None], candidates)

    def query_mean(self, q):
        """The mean of the queries since the current sentence started (Eq. 2): (T, H, G, d)."""
        means = [q[start:t + 1].mean(0) for t, start in enumerate(self.start)]
        return torch.stack(means)

class OracleSentences(Sentences):
    """The sentences that do get the most attention: an upper limit for rules that rank them."""

    def scores(self, q, keys, sentence, candidates):
        weights = attention_weights(q, keys, self.position)                 # (T, H, N)
        scores = weights.new_zeros(*weights.shape[:2], candidates.shape[1])
        return scores.index_add_(2, sentence, weights)

def methods(flags):
    """Every method by name: {name: function of a budget that makes a new method}."""

    def whole(budget, kind=Sentences, **settings):
        """Sentences of up to 64 tokens, but no longer than a third of what there is to fetch."""
        recent = settings.get("recent", Settings.recent)
        third = -(-(budget - Settings.sink - recent) // 3)
        return kind(flags, budget=budget, max_sentence=min(64, third), **settings)

    def paper(budget):
        settings = {name: PAPER[name] for name in ("rank", "keep", "recent", "window", "max_pool")}
        return whole(budget, **settings)
    return {
        "SentenceKV": lambda budget: Sentences(flags, budget=budget),
        "SentenceKV, mean": lambda budget: Sentences(flags, budget=budget, rank="mean"),
        "SentenceKV, paper": paper,
        "Quest": Quest,
        "SnapKV": SnapKV,
        "StreamingLLM": StreamingLLM,
        "oracle, pieces": lambda budget: OracleSentences(flags, budget=budget),
        "oracle, sentences": lambda budget: whole(budget, OracleSentences),
        "oracle, tokens": OracleTokens}
