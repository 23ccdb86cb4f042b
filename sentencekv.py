"""SentenceKV (arXiv 2504.00970, COLM 2025): a KV cache that is organized by sentence.

All keys and values are stored in CPU memory. The device (the accelerator that runs the model)
stores one small semantic vector per sentence, layer and KV head. Every decode step ranks these
vectors against the query and fetches whole sentences, best first, until the token budget is full.
The sink (the first tokens of the text) and the recent sentences always rank first.

    tokens of a forward --> begin(): cut into sentences                       once per forward
    q, k, v of a layer  --> attend(), T > 1: exact causal attention           once per layer
                                      T = 1: rank -> select -> fetch -> attention
                            then append k, v to the host pool and to the vectors

Sections 1 to 4 are functions, one step of the method each. The class in section 6 calls them.

    code          paper       shape                 stored   meaning
    budget        tau         int                            most tokens attended to per KV head
    keep, window  r, N        numbers                        floor(r * tau) prompt tokens survive
    alpha         alpha_i     (T,)                  device   importance of each prompt token
    vectors       kbar_{s,h}  (B, H, S, w)          device   semantic vectors, w = d or 2d
    query_mean    qbar        (B, H, G, d)          device   mean query of the current sentence
    pool.kv       K, V        (B, C, H, 2, d)       host     all keys [..., 0, :] and values
    attended      K_t, V_t    (B, H, budget, 2, d)  device   what one decode step attends to

B rows (batch), T new tokens, S sentences, C slots, d head width, Hq query heads, H KV heads; the
G = Hq / H query heads of a group share a KV head. Differences from the paper follow "Paper:".
"""
import re
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

def need(condition, message):
    if not condition:
        raise ValueError(message)

# ------------------------------------------------------------------------------ 1. Segmentation

ENDS = "。！？｡।॥؟۔።։။"            # a sentence ends after these
MAY_END = ".!?…"                  # and after these if white space follows: "3.14" stays whole
CLOSERS = "\"'`*_)]}»”’」』）】》〉"   # can follow the stop: quotes, brackets, Markdown
OPENERS = "\"'`*_([{«“‘"          # can precede the last word
NOTE = re.compile(r"\[[^][.!?]*\]")     # such as [2]: part of the sentence before it
ABBREVIATIONS = frozenset(
    "mr mrs ms dr ph.d prof st jr sr rev hon gen col maj capt lt sgt sen rep gov inc ltd co corp "
    "vs cf ca mt ft fig eq vol pp jan feb mar apr jun jul aug sept sep oct nov dec".split())
GOES_ON = ("…", "..", ". .", "etc.")    # these end no sentence before a lower-case word
TAIL = 48                         # bytes of the open sentence that the rules look at

def starts_sentence(before, after):
    """Whether the text `after` starts a sentence; `before` is the end of the open sentence.

    >>> [starts_sentence("It rains.", " The"), starts_sentence("by Dr.", " Who")]
    [True, False]
    """
    word = after.lstrip()
    text = NOTE.sub("", before + after[:len(after) - len(word)])
    end = text.rstrip()
    gap = text[len(end):]                               # white space between stop and word
    core = end.rstrip(CLOSERS)
    if word == "" or (gap == "" and word[0] in CLOSERS):
        return False                                    # belongs to the open sentence
    if gap.count("\n") >= 2 or "\u2029" in gap:
        return True                                     # a paragraph ends
    if core == "" or word[0] in MAY_END + "[":
        return False                                    # no sentence is open; ". . ." or "[2]"
    stop = core[-1]
    if word[0] in ENDS:
        return word.lstrip(ENDS + CLOSERS).strip() != ""    # one token with stop and word: "。他"
    if stop in ENDS:
        return True
    if gap == "" or stop not in MAY_END:
        return False
    if word[0].islower() and (core != end or core.endswith(GOES_ON)):
        return False                                    # "Why?" he asked, "etc. and"
    if not any(map(str.isalpha, core)):
        return False                                    # no words yet: "1. Introduction"
    return stop != "." or not is_abbreviation(core[:-1].split()[-1].lstrip(OPENERS))

def is_abbreviation(word):
    """Whether a full stop after this word ends no sentence: "Dr", "J", "U.S", but not "I"."""
    letters = all(len(part) == 1 and part.isalpha() for part in word.split("."))
    return word.lower() in ABBREVIATIONS or (letters and word != "I")

def sentence_flags(token_bytes):
    """The text of each token, for Segmenter: list of bytes (None: special) -> list of bytes.

    A special token counts as a blank line, so it ends a sentence.
    """
    return [b"\n\n" if raw is None else raw for raw in token_bytes]

class Segmenter:
    """Cuts one row of tokens into sentences, one token at a time, on the host.

    >>> row = Segmenter([b"<bos>", b"Hello", b".", b'"', b" He"], sink=1, max_sentence=64)
    >>> [row.add(token) for token in (0, 1, 2, 3, 4, 1)]
    [0, 1, 1, 1, 2, 2]
    """

    def __init__(self, flags, sink, max_sentence):
        self.flags = flags
        self.sink = sink
        self.max_sentence = max_sentence
        self.tokens = []        # all tokens of the row
        self.lengths = [0]      # tokens in each sentence; sentence 0 is the sink
        self.tail = b""         # the end of the open sentence; a character can lie in two tokens

    def add(self, token):
        """Append a token, unless it is padding (-1); return the number of its sentence."""
        if token >= 0:
            position = len(self.tokens)
            self.tokens.append(token)
            new = self.flags[token] if token < len(self.flags) else b""
            texts = [raw.decode(errors="replace") for raw in (self.tail, new)]
            starts = starts_sentence(*texts)
            self.tail = new if starts else (self.tail + new)[-TAIL:]
            if position >= self.sink:
                if starts or position == self.sink or self.lengths[-1] == self.max_sentence:
                    self.lengths.append(0)
            self.lengths[-1] += 1
        return len(self.lengths) - 1

    def sentence_of_last(self, n):
        """The sentence that the last n tokens begin in."""
        for number in reversed(range(len(self.lengths))):
            n -= self.lengths[number]
            if n <= 0:
                break
        return number

# ------------------------------------------- 2. Prefill: which tokens survive (only with keep=r)

def importance(q, k, pool=1):
    """alpha_i (Sec. 4.1): attention that token i receives from the last N queries, all heads.

    q (Hq, N, d), k (H, T, d), T > N -> (T,) float32. Paper: no pooling. The authors' code takes
    the maximum over `pool` = 7 neighbors, except for the last N tokens.
    """
    (Hq, N, d), (H, T, _) = q.shape, k.shape
    q = q.reshape(H, -1, d) * d ** -0.5                               # (H, G * N, d)
    logits = (q @ k.transpose(1, 2)).float().view(Hq, N, T)
    future = torch.ones_like(logits[0], dtype=torch.bool).triu(T - N + 1)
    alpha = logits.masked_fill(future, float("-inf")).softmax(-1).sum((0, 1))
    before = F.max_pool1d(alpha[None, :-N], pool, stride=1, padding=pool // 2)
    return torch.cat((before[0], alpha[-N:]))

def survivors(alpha, n):
    """Prompt-wide (Sec. 4.1), the n most important tokens in text order: (T,) -> (n,)."""
    order = alpha.sort(descending=True, stable=True).indices          # the earlier wins a tie
    return order[:n].sort().values

# ----------------------------------------------------------- 3. Semantic vectors and their rank

# A rule says what the semantic vector of a sentence is, and how it is scored:
#   features  what a key contributes, (..., d) -> (..., w); contributions are summed per sentence
#   vector    that sum, over n keys -> semantic vector, (..., w)
#   score     q, query_mean (B, H, G, d), vectors (B, H, S, w), candidates (B, S) -> (B, H, S)

class Mean:
    """The paper: mean query (Eq. 2) . mean key (Eq. 1). Misses a key unlike its neighbors."""

    def features(k):
        return k
    def vector(total, n):
        return total / n
    def score(q, query_mean, vectors, candidates):
        query = query_mean.mean(2, keepdim=True) * q.shape[-1] ** -0.5          # (B, H, 1, d)
        return (query.to(vectors.dtype) @ vectors.transpose(2, 3)).squeeze(2)

class Ball:
    """The keys of a sentence as a ball: mean key m and radius r, the rms distance from the mean.

    With x halfway between query and mean query, each sentence is seen in two ways: its center,
    x . m, finds what the sentence is about; its edge, x . m + |x| r, finds a key that stands out.
    A softmax over the sentences, per query head, makes the two comparable.
    """

    def features(k):
        return torch.cat((k, (k * k).sum(-1, keepdim=True)), dim=-1)            # w = d + 1
    def vector(total, n):
        mean, square = (total / n).tensor_split((-1,), dim=-1)
        variance = square - (mean * mean).sum(-1, keepdim=True)
        return torch.cat((mean, variance.clamp(min=0).sqrt()), dim=-1)
    def score(q, query_mean, vectors, candidates):
        x = (q + query_mean) / 2 * q.shape[-1] ** -0.5                # (B, H, G, d)
        length = x.norm(dim=-1, keepdim=True)
        center = torch.cat((x, torch.zeros_like(length)), dim=-1)     # . (m, r) = x . m
        edge = torch.cat((x, length), dim=-1)                         # . (m, r) = x . m + |x| r
        views = torch.cat((center, edge), dim=2).to(vectors.dtype)    # (B, H, 2 * G, w)
        logits = views @ vectors.transpose(2, 3)                      # (B, H, 2 * G, S)
        logits = logits.masked_fill(~candidates[:, None, None], float("-inf"))
        return logits.softmax(-1, dtype=torch.float32).sum(2)

RANKS = {"mean": Mean, "ball": Ball}
PAPER = dict(rank="mean", keep=2, budget=1024, sink=32, recent=32, window=32, pool=7,
             max_sentence=64)

# ------------------------------------------------------------------ 4. Selection and attention

def enough_sentences(lengths, budget):
    """This many sentences fill the budget, whichever they are: [4, 9, 2, 3], 6 -> 3."""
    for n, total in enumerate(accumulate(sorted(lengths)), start=1):
        if total >= budget:
            break
    return n

def select(scores, count, places, k):
    """Take whole sentences in descending score until all places are filled (Algorithm 1).

    The last one is cut. scores (B, H, S); count (B, S): tokens of each sentence, which lie one
    after the other in the pool; only the k best sentences are considered. Returns slot and used,
    (B, H, places): where each place is fetched from, and if it is used; sentence and taken,
    (B, H, k): the best sentences, and how many tokens are taken of each.

    >>> scores, count = torch.tensor([[[1., 9., 5.]]]), torch.tensor([[3, 2, 4]])
    >>> slot, used, sentence, taken = select(scores, count, places=5, k=3)
    >>> slot.tolist(), sentence.tolist(), taken.tolist()
    ([[[3, 4, 5, 6, 7]]], [[[1, 2, 0]]], [[[2, 3, 0]]])
    """
    start = (count.cumsum(1) - count)[:, None].expand_as(scores)
    count = count[:, None].expand_as(scores)
    scores = scores.masked_fill(count == 0, float("-inf"))
    sentence = scores.topk(k, dim=2).indices                          # (B, H, k)
    # Lay these end to end. The sentence at place j is number "how many of them end before j".
    end = count.gather(2, sentence).cumsum(2).clamp(max=places)       # (B, H, k)
    begin = F.pad(end, (1, 0))[:, :, :-1]
    ends = F.pad(torch.zeros_like(end[:, :, :1]), (0, places))        # (B, H, places + 1)
    ends.scatter_add_(2, end, torch.ones_like(end))
    owner = ends.cumsum(2)[:, :, :-1].clamp(max=k - 1)                # (B, H, places)
    place = torch.arange(places, device=scores.device)
    used = place < end[:, :, -1:]
    shift = start.gather(2, sentence) - begin                         # from place to slot
    slot = place + shift.gather(2, owner)
    return slot.where(used, 0), used, sentence, end - begin

def grouped_attention(q, k, v, mask=None):
    """softmax(q K^T / sqrt(d)) V (Eq. 3) for one query per head; K and V are never repeated.

    q (B, Hq, 1, d); k, v (B, H, N, d); mask (B, H, 1, N): keys to attend to -> (B, Hq, 1, d).
    """
    B, H, N, d = k.shape
    grouped = q.reshape(B, H, -1, d)                                  # (B, H, G, d)
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)

def causal_attention(q, k, v, step=512):
    """Exact attention of T new tokens to all tokens before them and, causally, to each other.

    q (B, Hq, T, d), k, v (B, H, N, d): the queries belong to the last T of the N tokens.
    Returns (B, Hq, T, d). In parts of `step` queries: no (T, N) matrix is ever stored.
    """
    if q.shape[2] == 1:
        return grouped_attention(q, k, v)
    out, n = [], k.shape[2] - q.shape[2]
    for part in q.split(step, dim=2):
        n += part.shape[2]                                            # keys its last query sees
        mask = causal_lower_right(part.shape[2], n)
        out.append(F.scaled_dot_product_attention(
            part, k[:, :, :n], v[:, :, :n], mask, enable_gqa=True))
    return torch.cat(out, dim=2)

# ------------------------------------------------------------------------------ 5. The host pool

class HostPool:
    """Keys and values of one layer in CPU memory, token after token.

    On CUDA the memory is pinned. Writes run on a side stream while the next layer computes. To
    fetch, the CPU gathers into a pinned buffer, and the device copies from that.
    """

    def __init__(self, B, H, d, dtype, device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kv = self.allocate((B, 16, H, 2, d), dtype)              # (B, C, H, 2, d)
        self.used = [0] * B                                           # slots that each row uses

    def allocate(self, shape, dtype):
        pinned = self.stream is not None
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)

    def append(self, b, kv):
        """Store tokens kv (H, n, 2, d), on the device, behind those of row b."""
        kv = kv.transpose(0, 1).contiguous()                          # (n, H, 2, d)
        start, end = self.used[b], self.used[b] + len(kv)
        if end > self.kv.shape[1]:                                    # more room, and some spare
            B, C, *shape = self.kv.shape
            larger = self.allocate((B, end + end // 8 + 16, *shape), kv.dtype)
            self.finish_writes()
            larger[:, :C] = self.kv
            self.kv = larger
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            kv.record_stream(self.stream)                             # its memory is in use
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            self.kv[b, start:end].copy_(kv, non_blocking=True)
        self.used[b] = end

    def fetch(self, slot, out):
        """out (B, H, n, 2, d), on the device = what each row and head has in slot (B, H, n)."""
        self.finish_writes()
        B, C, H, _, d = self.kv.shape
        row = torch.arange(B)[:, None, None] * C
        index = (row + slot.cpu()) * H + torch.arange(H)[:, None]     # into (B * C * H, 2 * d)
        buffer = out
        if self.stream is not None:             # PyTorch reuses it only after the copy has ended
            buffer = self.allocate(out.shape, out.dtype)
        source, target = self.kv.view(-1, 2 * d), buffer.view(-1, 2 * d)
        torch.index_select(source, 0, index.flatten(), out=target)
        if self.stream is not None:
            out.copy_(buffer, non_blocking=True)

    def read(self, b):
        """All tokens of row b, on the device: (H, n, 2, d)."""
        self.finish_writes()
        return self.kv[b, :self.used[b]].to(self.device).transpose(0, 1)

    def finish_writes(self):
        """Wait until the CPU can read what was appended."""
        if self.stream is not None:
            self.stream.synchronize()

# ---------------------------------------------------------------------------------- 6. The cache

@dataclass
class Settings:
    """Settings of SentenceKV. Raises ValueError for values that cannot work."""
    budget: int = 1024          # most tokens that a KV head attends to in a decode step
    keep: float = None          # r: floor(r * budget) tokens of the prompt survive; None: all
    sink: int = 4               # first tokens, always attended to
    recent: int = 8             # last tokens, always attended to, with the rest of their sentence
    window: int = 32            # last queries of the prompt, which judge importance (keep=r)
    pool: int = 1               # width of the max-pool over importance; 1: none (keep=r)
    rank: str = "ball"          # a key of RANKS. Paper: "mean"
    max_sentence: int = None    # longer ones are cut into pieces; None: 6, less if budget is small

    def __post_init__(self):
        room = self.budget - self.sink - self.recent
        need(room > 0, f"budget {self.budget} must exceed sink + recent = {self.budget - room}")
        if self.max_sentence is None:
            self.max_sentence = min(6, -(-room // 3))
        for name in ("budget", "sink", "recent", "window", "pool", "max_sentence"):
            value = getattr(self, name)
            need(type(value) is int and value >= (name != "sink"),
                 f"{name} must be an int of at least {int(name != 'sink')}, got {value!r}")
        need(self.max_sentence <= room, f"max_sentence {self.max_sentence} must be at most {room}: "
             "what sink and recent leave of the budget")
        need(self.keep is None or type(self.keep) in (int, float) and 1 <= self.keep < 1e9,
             f"keep must be None or a number of at least 1, got {self.keep!r}")
        need(self.keep is None or self.window <= self.keep * self.budget,
             "window must be at most keep * budget")
        need(self.pool % 2 == 1, f"pool must be odd, got {self.pool}")
        need(self.rank in RANKS, f"rank must be one of {', '.join(RANKS)}, got {self.rank!r}")

class SentenceKV:
    """The cache, for a model that calls begin(tokens) per forward and attend() in every layer.

    flags: sentence_flags(token_bytes). Settings: see Settings. host_pool: the class of the pools.
    T > 1 tokens are a prompt, a piece of it, or a follow-up: attention is exact. T = 1 is a decode
    step. keep=r drops tokens at the first decode step, when the prompt is complete.
    """

    def __init__(self, flags, *, host_pool=HostPool, **settings):
        self.settings = Settings(**settings)
        self.rule = RANKS[self.settings.rank]
        self.flags, self.host_pool = list(flags), host_pool
        self.rows = []          # one Segmenter per row of the batch: the text, on the host
        self.length = 0         # tokens in the longest row
        self.queries = []       # for each row, how many queries query_mean is the mean of
        self.ranked = 0         # this many sentences fill the budget, whichever they are
        self.room = 0           # S: the layers have room for this many sentences
        self.step = None        # what all layers need in one forward, see _prepare
        self.layers = []        # what each layer stores, see _new_layer
        self.attended = None    # (B, H, budget, 2, d), overwritten by every layer
        self.next_layer = 0     # None: a forward was interrupted

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, tokens):
        """Note the next tokens (B, T), int64; return their positions (B, T).

        -1 is padding: it follows the last token of a shorter row, or, with T = 1, stands for a
        row that idles in this step. Raises ValueError, and changes nothing, for impossible calls.
        """
        self._check_tokens(tokens)
        if not self.rows:
            s = self.settings
            self.rows = [Segmenter(self.flags, s.sink, s.max_sentence) for _ in tokens]
            self.queries = [0] * len(tokens)
        self.next_layer = None      # an interruption from here on is noticed by the next begin()
        before = [[len(row.tokens)] for row in self.rows]
        first = [len(row.lengths) - 1 for row in self.rows]
        sentence = [[row.add(i) for i in ids] for row, ids in zip(self.rows, tokens.tolist())]
        new = [len(row.tokens) - n for row, [n] in zip(self.rows, before)]
        self._prepare(new, first, torch.tensor(sentence, device=tokens.device))
        self.next_layer = 0
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.tensor(before, device=tokens.device) + position

    def _prepare(self, new, first, sentence):
        """Make what all layers need in this forward; sentence (B, T) is that of each token."""
        s, (B, T), device = self.settings, sentence.shape, sentence.device
        self.length = max(len(row.tokens) for row in self.rows)
        last = [len(row.lengths) - 1 for row in self.rows]
        if last != first or self.ranked == 0:
            enough = max(enough_sentences(row.lengths, s.budget) for row in self.rows)
            self.ranked = s.budget if s.keep else enough
        if max(last) >= self.room:
            self.room = max(last) + 65
        # The mean query (Eq. 2) restarts with every sentence and after every prompt.
        for b, row in enumerate(self.rows):
            self.queries[b] = min(self.queries[b] + new[b], row.lengths[-1]) if T == 1 else 0
        weight = [n / max(1, m) for n, m in zip(new, self.queries)]
        # Always attended to: sentence 0 (the sink), and the recent sentences.
        oldest = [[row.sentence_of_last(s.recent)] for row in self.rows]
        near = torch.arange(self.room, device=device) >= torch.tensor(oldest, device=device)
        near[:, 0] = True
        self.step = SimpleNamespace(
            new=new,                    # B ints: how many tokens each row brings
            first=first,                # B ints: the sentence that was open, the first to change
            last=last,                  # B ints: the sentence that is open now, the last to change
            sentence=sentence,          # (B, T)
            near=near,                  # (B, S) True: always attended to
            weight=torch.tensor(weight, dtype=torch.float32, device=device).view(B, 1, 1, 1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def attend(self, index, q, k, v):
        """Attention of q (B, Hq, T, d) to all that is stored and to the new k, v (B, H, T, d).

        Stores k and v. Layers call it in order, index 0, 1, ...; q and k are rotated by the
        positions that begin() returned. Returns (B, Hq, T, d) without gradients.
        """
        self._check_layer(index, q, k, v)
        self.next_layer = None
        if index == len(self.layers):
            self.layers.append(self._new_layer(q, k))
        layer, step = self.layers[index], self.step
        missing = self.room - layer.count.shape[1]
        if missing > 0:
            layer.count = F.pad(layer.count, (0, missing))
            layer.vectors = F.pad(layer.vectors, (0, 0, 0, missing))
        kv = torch.stack((k, v), dim=3)                               # (B, H, T, 2, d)
        attention = self._decode if q.shape[2] == 1 else self._prompt
        out = attention(layer, q, kv)
        for b, n in enumerate(step.new):
            sentence = step.sentence[b, :n]
            self._append(layer, b, kv[b, :, :n], sentence, step.first[b], step.last[b])
        self.next_layer = index + 1
        return out

    def _new_layer(self, q, k):
        """What a layer stores: everything on the device but the pool."""
        (B, Hq, _, d), H, s = q.shape, k.shape[1], self.settings
        features = self.rule.features(k[:, :, 0].float())             # (B, H, w)
        if self.attended is None:
            self.attended = k.new_zeros(B, H, s.budget, 2, d)
        return SimpleNamespace(
            pool=self.host_pool(B, H, d, k.dtype, k.device),
            count=torch.zeros(B, self.room, dtype=torch.long, device=k.device),     # tokens of each
            vectors=k.new_zeros(B, H, self.room, features.shape[-1]),
            open=torch.zeros_like(features),                # sum over the open sentence, float32
            query_mean=q.new_zeros(B, H, Hq // H, d, dtype=torch.float32),
            observed=q.new_zeros(B, Hq, s.window, d) if s.keep else None,   # last N queries
            fetched=None)                                   # see fetched()

    def _decode(self, layer, q, kv):
        """T = 1: rank the sentences, fetch the best, attend to them and to the token itself."""
        if layer.observed is not None:
            self._prune(layer)
        query = q.view(layer.query_mean.shape).float()                # (B, H, G, d)
        # Paper: Sec. 4.2 takes the mean over a complete sentence; Algorithm 1, as here, so far.
        layer.query_mean.lerp_(query, self.step.weight)
        near = self.step.near
        candidates = (layer.count > 0) & ~near
        scores = self.rule.score(query, layer.query_mean, layer.vectors, candidates)
        scores = scores.masked_fill(near[:, None], float("inf"))      # (B, H, S)
        k, places = min(self.ranked, self.room), self.settings.budget - 1
        slot, used, *layer.fetched = select(scores, layer.count, places, k)
        layer.pool.fetch(F.pad(slot, (0, 1)), out=self.attended)
        self.attended[:, :, -1] = kv[:, :, 0]                         # the last place: the token
        mask = F.pad(used, (0, 1), value=True)[:, :, None]            # (B, H, 1, budget)
        keys, values = self.attended.unbind(3)                        # (B, H, budget, d)
        return grouped_attention(q, keys, values, mask)

    def _prompt(self, layer, q, kv):
        """T > 1: exact attention, row by row, since rows can have different lengths."""
        out = torch.zeros_like(q)
        for b, n in enumerate(self.step.new):
            if n > 0:
                stored = layer.pool.read(b)                           # (H, N - n, 2, d)
                keys, values = torch.cat((stored, kv[b, :, :n]), dim=1)[None].unbind(3)
                out[b:b + 1, :, :n] = causal_attention(q[b:b + 1, :, :n], keys, values)
            if layer.observed is not None:
                queries = torch.cat((layer.observed[b], q[b, :, :n]), dim=1)
                layer.observed[b] = queries[:, -self.settings.window:]
        return out

    def _append(self, layer, b, kv, sentence, first, last):
        """Store row b's tokens kv (H, n, 2, d), and add their keys to their sentences' vectors.

        sentence (n,): the sentence of each, from first to last. The first one was open already.
        """
        if len(sentence) == 0:
            return
        layer.pool.append(b, kv)
        layer.count[b].scatter_add_(0, sentence, torch.ones_like(sentence))
        features = self.rule.features(kv[:, :, 0].float())            # (H, n, w)
        total = features.new_zeros(len(kv), last + 1 - first, features.shape[2])
        total[:, 0] = layer.open[b]
        total.index_add_(1, sentence - first, features)               # (H, last + 1 - first, w)
        layer.open[b] = total[:, -1]
        n = layer.count[b, first:last + 1, None].clamp(min=1)
        layer.vectors[b, :, first:last + 1] = self.rule.vector(total, n)

    def _prune(self, layer):
        """keep=r: store only the floor(r * budget) most important tokens of each row."""
        s, pool, count, observed = self.settings, layer.pool, layer.count, layer.observed
        n, layer.observed = int(s.keep * s.budget), None
        if max(pool.used) <= n:
            return
        B, _, H, _, d = pool.kv.shape
        layer.pool = self.host_pool(B, H, d, pool.kv.dtype, count.device)
        layer.count = torch.zeros_like(count)
        layer.open.zero_()
        for b, length in enumerate(pool.used):
            kv = pool.read(b)                                         # (H, T, 2, d)
            sentence = torch.arange(self.room, device=kv.device).repeat_interleave(count[b])
            if length > n:
                alpha = importance(observed[b], kv[:, :, 0], s.pool)
                near = (sentence == 0) | (sentence >= sentence[-min(s.recent, length)])
                kept = survivors(alpha.masked_fill(near, float("inf")), n)
                kv, sentence = kv[:, kept], sentence[kept]
            self._append(layer, b, kv, sentence, 0, self.step.first[b])

    def _check_tokens(self, tokens):
        need(tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32) and tokens.numel() > 0,
             f"tokens must be int64 (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
        need(self.next_layer == len(self.layers) and bool(self.rows) == bool(self.layers),
             "the last forward was interrupted: truncate this cache, or use a new one")
        B, real = len(self.rows), tokens >= 0
        need(B in (0, len(tokens)), f"this cache holds {B} rows, got tokens for {len(tokens)}")
        need(B > 0 or real[:, 0].all(), "every row needs a token in the first forward")
        need(tokens.min() >= -1 and not (real[:, 1:] > real[:, :-1]).any(),
             "-1 is padding: it may only follow the tokens of a row")

    def _check_layer(self, index, q, k, v):
        need(index == self.next_layer, f"attend() of layer {self.next_layer} is next, got {index}: "
             "call begin() once per forward, then attend() in every layer in order")
        need(index < len(self.layers) or self.length == max(self.step.new),
             f"an earlier forward was interrupted before layer {index}: use a new cache")
        (B, T), (_, H, _, d) = self.step.sentence.shape, k.shape
        fits = q.shape == (B, q.shape[1], T, d) and k.shape == v.shape == (B, H, T, d)
        if index < len(self.layers):
            kv = self.layers[index].pool.kv
            fits = fits and (H, d, k.dtype) == (kv.shape[2], kv.shape[4], kv.dtype)
        need(fits and q.shape[1] % H == 0, f"q must be (B, Hq, T, d), k and v (B, H, T, d) for {B} "
             f"x {T} tokens, with the H, d and dtype of before; got {[*q.shape]}, {[*k.shape]}, "
             f"{[*v.shape]} of {k.dtype}")

    def fetched(self):
        """What the last decode step fetched: [sentence, taken], (layers, B, H, k) each.

        Best sentence first, the sink and the recent ones before all others; taken: how many of its
        tokens. Sentence s of row b has rows[b].lengths[s] tokens of the text rows[b].tokens.
        """
        need(self.layers and self.layers[-1].fetched, "no decode step has fetched anything yet")
        return [torch.stack(x) for x in zip(*(layer.fetched for layer in self.layers))]

    def memory(self):
        """Bytes of all tensors: {"device": ..., "host": ...}."""
        parts = [self, self.step, *self.layers] if self.step else []
        tensors = [x for part in parts for x in vars(part).values() if torch.is_tensor(x)]
        return {"device": sum(x.nbytes for x in tensors),
                "host": sum(layer.pool.kv.nbytes for layer in self.layers)}
