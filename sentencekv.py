"""SentenceKV (arXiv 2504.00970, COLM 2025): a KV cache that is organized by sentence.

All keys and values are stored in CPU memory. The device (the accelerator that runs the model)
stores one small semantic vector per sentence, layer and KV head. Every decode step ranks these
vectors against the query and fetches sentences, best first, until the token budget is full. The
sink (the first tokens of the text) and the recent sentences always rank first.

The paper's unit is the sentence. Here, sentences are cut into pieces of at most `max_sentence`
tokens (default: 6), each with a vector of its own. In the code, "sentence" means such a piece.

B rows (batch), T new tokens, S sentences (with spare room), C slots (of one token each), d head
width, Hq query heads, H KV heads; the G = Hq / H query heads of a group share a KV head.
Differences from the paper follow "Paper:".

    tokens of a forward --> begin(): cut into sentences                       once per forward
    q, k, v of a layer  --> attend(), T > 1: exact causal attention           once per layer
                                      T = 1: rank -> select -> fetch -> attention
                            then store k, v in the host pool and update the vectors

    code          paper       shape                 stored   meaning
    budget        tau         int                            most tokens that a KV head attends to
    keep          r           number                         floor(r * tau) prompt tokens are kept
    window        N           int                            last queries, which judge importance
    vectors       kbar_{s,h}  (B, H, S, w)          device   w = d (rank "mean"), d + 1 ("ball")
    query_mean    qbar        (B, H, G, d)          device   mean query of the current sentence
    pool.kv       K, V        (B, C, H, 2, d)       host     all keys [..., 0, :] and values
    attended      K_t, V_t    (B, H, budget, 2, d)  device   what one decode step attends to
"""
import re
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

def need(condition, message):
    if not condition:
        raise ValueError(message)

# --------------------------------------------------------------------------------- Segmentation

ENDS = "。！？｡।॥؟۔።։။"            # a sentence ends after these
MAY_END = ".!?…"                  # only if white space follows: "3.14" is not split
CLOSERS = "]\"'`*_)}»”’」』）】》〉"   # may follow a stop: brackets, quotes, Markdown
PARAGRAPH = re.compile(r"(\n\s*\n|\u2029)\s*$")     # a blank line
SENTENCE_END = re.compile(            # a stop, closers, and notes such as [2]
    rf"([{ENDS}]|[{MAY_END}](?=.*\s$))([{CLOSERS}]|\s*\[[^][.!?]*\])*\s*$", re.DOTALL)
# A full stop after these ends no sentence: abbreviations, initials ("J. R.", not "I."), numbers
ABBREVIATION = re.compile(r"""(?<![^\s"'`*_([{«“‘])
    ( mr|mrs|ms|dr|ph\.d|prof|st|jr|sr|rev|hon|gen|col|maj|capt|lt|sgt|sen|rep|gov|inc|ltd|co|corp
    | vs|cf|ca|mt|ft|fig|eq|vol|pp|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec
    | (?!(?-i:I)\.\W*$) [^\W\d_] (\.[^\W\d_])* ) \.\W*$ | ^[\W\d_]*$""", re.I | re.X)
# After these, a lower-case word does not start a sentence: "Why?" he asked; so on... and; etc. and
GOES_ON = re.compile(rf"([{MAY_END}][{CLOSERS}]+|…|\.\ ?\.|etc\.)\s*$")
TAIL = 48                         # trailing bytes of the open sentence that the rules see

def starts_sentence(before, after):
    """Does the token text `after` start a new sentence? `before`: the end of the open sentence.

    >>> [starts_sentence("It rains.", " The"), starts_sentence("by Dr.", " Who")]
    [True, False]
    """
    word = after.lstrip()
    text = before + after[:len(after) - len(word)]      # all that precedes the word
    if word == "":
        return False
    if word[0] in CLOSERS and not text[-1:].isspace():
        return False
    if PARAGRAPH.search(text):
        return True
    if word[0] in ENDS + MAY_END + "[" or not SENTENCE_END.search(text):
        return False
    goes_on = word[0].islower() and GOES_ON.search(text)
    return not (goes_on or ABBREVIATION.search(text))

def sentence_flags(token_bytes):
    """The bytes of each token as Segmenter reads them; a special one (None) is a blank line."""
    return [b"\n\n" if raw is None else raw for raw in token_bytes]

class Segmenter:
    """One row of the batch: its tokens, and the sentences that they form. All on the host.

    >>> row = Segmenter([b"Well", b"Hello", b".", b'"', b" He"], sink=1, max_sentence=64)
    >>> row.extend([0, 1, 2, 3, 4, 1])
    [0, 1, 1, 1, 2, 2]
    """

    def __init__(self, flags, sink, max_sentence):
        self.flags = flags      # see sentence_flags()
        self.sink = sink
        self.max_sentence = max_sentence
        self.tokens = []
        self.sentence = []      # the sentence of each token
        self.lengths = [0]      # tokens in each sentence; sentence 0 is the sink
        self.tail = b""         # end of the open sentence, as bytes: a character can span tokens
        self.prompt_end = 0     # where the last prompt ended; later tokens are generated
        self.extend([])         # sets start, first, last, new

    def extend(self, ids):
        """Append the tokens of a forward; return the sentence of each. -1 is padding."""
        self.start = len(self.tokens)               # position of the first new token
        self.first = len(self.lengths) - 1          # the open sentence, the first that can change
        sentence = [self._add(token) for token in ids]
        self.last = len(self.lengths) - 1           # the sentence that is open after these tokens
        self.new = len(self.tokens) - self.start
        if self.new > 0 and len(ids) > 1:           # T > 1: a prompt
            self.prompt_end = len(self.tokens)
        return sentence

    def _add(self, token):
        if token >= 0:
            new = self.flags[token] if token < len(self.flags) else b""         # unknown: no text
            before = self.tail.decode(errors="replace")
            after = new.decode(errors="replace")
            starts = starts_sentence(before, after)
            self.tail = new if starts else (self.tail + new)[-TAIL:]
            full = self.lengths[-1] == self.max_sentence
            position = len(self.tokens)
            if position == self.sink or position > self.sink and (starts or full):
                self.lengths.append(0)
            self.lengths[-1] += 1
            self.tokens.append(token)
            self.sentence.append(len(self.lengths) - 1)
        return len(self.lengths) - 1

# ---------------------------------------------- Prefill: which tokens survive (only with keep=r)

def importance(q, k, max_pool=1):
    """alpha_i (Sec. 4.1): attention to token i, summed over the last N queries and all heads.

    q (Hq, N, d), k (H, T, d), T > N -> (T,) float32. Paper: no pooling. The authors' code takes
    the maximum over `max_pool` = 7 neighbors, except for the last N tokens.
    """
    Hq, N, d = q.shape
    H, T, _ = k.shape
    q = q.reshape(H, -1, d) * d ** -0.5                               # (H, G * N, d)
    logits = (q @ k.transpose(1, 2)).float()                          # (H, G * N, T)
    logits = logits.view(Hq, N, T)
    future = torch.ones(N, T, dtype=torch.bool, device=q.device).triu(T - N + 1)
    weights = logits.masked_fill(future, float("-inf")).softmax(-1)
    alpha = weights.sum((0, 1))                                       # (T,)
    before = alpha[None, :-N]
    before = F.max_pool1d(before, max_pool, stride=1, padding=max_pool // 2)
    return torch.cat((before[0], alpha[-N:]))

def survivors(alpha, n):
    """Indices of the n most important tokens of the prompt (Sec. 4.1), ascending: (T,) -> (n,)."""
    order = alpha.argsort(descending=True, stable=True)               # ties: the earlier token
    return order[:n].sort().values

# -------------------------------------------------------------- Semantic vectors and their rank

# A rule: the semantic vector of a sentence, and how it is scored. Never instantiated.
#   features  what a key contributes, (..., d) -> (..., w); contributions are summed per sentence
#   vector    that sum, over n keys -> semantic vector, (..., w)
#   score     q, query_mean (B, H, G, d), vectors (B, H, S, w), candidates (B, S) -> (B, H, S);
#             the caller ignores the scores of all but the candidates

class Mean:
    """The paper: mean query (Eq. 2) . mean key (Eq. 1). Can miss a single key that stands out."""

    def features(k):
        return k
    def vector(total, n):
        return total / n
    def score(q, query_mean, vectors, candidates):
        query = query_mean.mean(2, keepdim=True)                      # (B, H, 1, d)
        query = query * q.shape[-1] ** -0.5
        query = query.to(vectors.dtype)
        scores = query @ vectors.transpose(2, 3)                      # (B, H, 1, S)
        return scores.squeeze(2)

class Ball:
    """Not in the paper. Keys as a ball: mean key m and radius R, the rms distance from the mean.

    Let x be halfway between query and mean query. A sentence gets two logits: at the center of its
    ball, x . m, which tells what it is about; and at the edge, x . m + |x| R, an estimate of its
    best key. Each becomes a softmax over the sentences. The score is the sum of both, and of all
    query heads of the group.
    """

    def features(k):
        square = (k * k).sum(-1, keepdim=True)
        return torch.cat((k, square), dim=-1)                         # w = d + 1
    def vector(total, n):
        mean, square = (total / n).tensor_split((-1,), dim=-1)
        variance = square - (mean * mean).sum(-1, keepdim=True)
        radius = variance.clamp(min=0).sqrt()
        return torch.cat((mean, radius), dim=-1)
    def score(q, query_mean, vectors, candidates):
        x = (q + query_mean) / 2                                      # (B, H, G, d)
        x = x * q.shape[-1] ** -0.5
        center = F.pad(x, (0, 1))                                     # (x, 0) . (m, R)
        length = x.norm(dim=-1, keepdim=True)
        edge = torch.cat((x, length), dim=-1)                         # (x, |x|) . (m, R)
        views = torch.cat((center, edge), dim=2)                      # (B, H, 2 * G, w)
        views = views.to(vectors.dtype)
        logits = (views @ vectors.transpose(2, 3)).float()            # (B, H, 2 * G, S)
        others = ~candidates[:, None, None]
        weights = logits.masked_fill(others, float("-inf")).softmax(-1)
        return weights.sum(2)

RANKS = {"mean": Mean, "ball": Ball}
# The paper's settings and, where it gives none, those of its authors' code
PAPER = dict(
    rank="mean", keep=2, budget=1024, sink=32,
    recent=32, window=32, max_pool=7, max_sentence=64)

# --------------------------------------------------------------------- Selection and attention

def enough_sentences(lengths, budget):
    """The smallest n such that any n sentences hold `budget` tokens, or all: [4, 9, 2], 6 -> 2."""
    for n, total in enumerate(accumulate(sorted(lengths)), start=1):
        if total >= budget:
            break
    return n

def select(scores, count, places, top):
    """Take whole sentences in descending score until all places are filled (Algorithm 1).

    The last one is cut. scores (B, H, S); count (B, S): tokens of each sentence, which the pool
    holds in order, without gaps; places: how many tokens fit; top: the best sentences considered.
    Returns slot (B, H, places): the slot in the pool to fetch for each place
            filled (B, H, places): False: there was nothing left for this place
            sentence, taken (B, H, top): the best sentences, and the tokens taken of each

    >>> scores, count = torch.tensor([[[1., 9., 5.]]]), torch.tensor([[3, 2, 4]])
    >>> slot, filled, sentence, taken = select(scores, count, places=5, top=3)
    >>> slot.tolist(), sentence.tolist(), taken.tolist()
    ([[[3, 4, 5, 6, 7]]], [[[1, 2, 0]]], [[[2, 3, 0]]])
    """
    B, H, S = scores.shape
    offset = (count.cumsum(1) - count)[:, None].expand(B, H, S)       # first slot of a sentence
    count = count[:, None].expand(B, H, S)
    scores = scores.masked_fill(count == 0, float("-inf"))
    sentence = scores.topk(top, dim=2).indices                        # (B, H, top)
    # Lay the best sentences end to end: each occupies places start to stop - 1.
    stop = count.gather(2, sentence).cumsum(2).clamp(max=places)      # (B, H, top)
    start = F.pad(stop, (1, 0))[:, :, :-1]
    place = torch.arange(places, device=scores.device)
    place = place.repeat(B, H, 1)                                     # (B, H, places)
    filled = place < stop[:, :, -1:]
    owner = torch.searchsorted(stop, place, right=True)               # which of the best fills it
    shift = offset.gather(2, sentence) - start                        # from place to slot
    slot = place + shift.gather(2, owner.clamp(max=top - 1))
    return slot.where(filled, 0), filled, sentence, stop - start

def grouped_attention(q, k, v, mask=None):
    """softmax(q K^T / sqrt(d)) V (Eq. 3) for one query per head, without expanding K and V.

    q (B, Hq, 1, d); k, v (B, H, M, d); mask (B, H, 1, M): keys to attend to -> (B, Hq, 1, d).
    """
    B, H, M, d = k.shape
    grouped = q.reshape(B, H, -1, d)                                  # (B, H, G, d)
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)

def causal_attention(q, k, v, chunk=512):
    """Exact attention of T new tokens to all tokens before them and, causally, to each other.

    q (B, Hq, T, d), k, v (B, H, M, d): the queries belong to the last T of the M tokens. Returns
    (B, Hq, T, d). Processes `chunk` queries at a time, to avoid a (T, M) matrix.
    """
    if q.shape[2] == 1:
        return grouped_attention(q, k, v)                             # faster
    out, visible = [], k.shape[2] - q.shape[2]
    for part in q.split(chunk, dim=2):
        visible += part.shape[2]                                      # keys its last query sees
        mask = causal_lower_right(part.shape[2], visible)
        keys, values = k[:, :, :visible], v[:, :, :visible]
        out.append(F.scaled_dot_product_attention(part, keys, values, mask, enable_gqa=True))
    return torch.cat(out, dim=2)

# --------------------------------------------------------------------------------- The host pool

class HostPool:
    """Keys and values of one layer in CPU memory, in text order.

    On CUDA the memory is pinned. Writes run on a side stream while the next layer computes. To
    fetch, the CPU gathers into a pinned buffer, which is then copied to the device.
    """

    def __init__(self, B, H, d, dtype, device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.kv = self.allocate((B, 16, H, 2, d), dtype)              # (B, C, H, 2, d)
        self.kv.zero_()         # an empty place fetches slot 0: no NaN
        self.used = [0] * B                                           # slots that each row uses

    def allocate(self, shape, dtype):
        pinned = self.stream is not None
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)

    def append(self, b, kv):
        """Append n tokens to row b; kv (H, n, 2, d) is on the device."""
        kv = kv.transpose(0, 1).contiguous()                          # (n, H, 2, d)
        start = self.used[b]
        end = start + len(kv)
        if end > self.kv.shape[1]:                                    # grow by an eighth
            self.finish_writes()
            B, C, *shape = self.kv.shape
            larger = self.allocate((B, end + end // 8 + 16, *shape), kv.dtype)
            larger[:, :C] = self.kv
            self.kv = larger
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            kv.record_stream(self.stream)                             # keep its memory until copied
        with torch.cuda.stream(self.stream):                          # None: does nothing
            self.kv[b, start:end].copy_(kv, non_blocking=True)
        self.used[b] = end

    def fetch(self, slot, out):
        """Copy slot (B, H, n) of every row and head into out (B, H, n, 2, d), on the device."""
        self.finish_writes()
        B, C, H, _, d = self.kv.shape
        row = torch.arange(B, device="cpu")[:, None, None] * C
        head = torch.arange(H, device="cpu")[:, None]
        index = (row + slot.cpu()) * H + head                         # into (B * C * H, 2 * d)
        # On CUDA, a new pinned buffer. PyTorch reuses it only after it has been copied.
        buffer = out if self.stream is None else self.allocate(out.shape, out.dtype)
        source = self.kv.view(-1, 2 * d)
        target = buffer.view(-1, 2 * d)
        torch.index_select(source, 0, index.flatten(), out=target)
        if buffer is not out:
            out.copy_(buffer, non_blocking=True)

    def read(self, b):
        """All tokens of row b, on the device: (H, n, 2, d)."""
        self.finish_writes()
        kv = self.kv[b, :self.used[b]].to(self.device)                # (n, H, 2, d)
        return kv.transpose(0, 1)

    def finish_writes(self):
        """Block until all appended tokens have arrived in CPU memory."""
        if self.stream is not None:
            self.stream.synchronize()

# ------------------------------------------------------------------------------------- The cache

@dataclass
class Settings:
    """Settings of SentenceKV. Raises ValueError for invalid or inconsistent values."""
    budget: int = 1024          # most tokens that a KV head attends to in a decode step
    keep: float = None          # r: floor(r * budget) tokens of the prompt survive; None: all
    sink: int = 4               # first tokens, always attended to
    recent: int = 8             # last tokens; every sentence that they touch is attended to
    window: int = 32            # last queries of the prompt, which judge importance (keep=r)
    max_pool: int = 1           # width of the max-pool over importance; 1: none (keep=r)
    rank: str = "ball"          # a key of RANKS. Paper: "mean"
    max_sentence: int = None    # longer ones are cut into pieces; None: 6, less if budget is small

    def __post_init__(self):
        for name in ("budget", "sink", "recent", "window", "max_pool"):
            value, least = getattr(self, name), int(name != "sink")
            need(type(value) is int and least <= value <= 2 ** 20,
                 f"{name} must be an int from {least} to {2 ** 20}, got {value!r:.60}")
        rest = self.budget - self.sink - self.recent
        need(rest > 0, f"budget {self.budget} must exceed sink + recent = {self.budget - rest}")
        if self.max_sentence is None:
            self.max_sentence = min(6, (rest + 2) // 3)               # about 3 fit into the rest
        need(type(self.max_sentence) is int and 0 < self.max_sentence <= rest,
             f"max_sentence must be an int from 1 to {rest} (budget - sink - recent), "
             f"got {self.max_sentence!r}")
        if self.keep is not None:
            need(type(self.keep) in (int, float) and 1 <= self.keep < 1e9,
                 f"keep must be None or a number of at least 1, got {self.keep!r}")
            need(self.window <= int(self.keep * self.budget), "window must be <= keep * budget")
        need(self.max_pool % 2 == 1, f"max_pool must be odd, got {self.max_pool}")
        need(self.rank in [*RANKS], f"rank must be one of {', '.join(RANKS)}, got {self.rank!r}")

SPARE = 64      # sentences that can begin before the layers have to grow

def eager(function):
    """Decorator: no gradients, no torch.compile, and tensors that can be updated later."""
    function = torch.inference_mode(False)(torch.no_grad()(function))
    return torch.compiler.disable(function)

class SentenceKV:
    """The cache, for a model that calls begin(tokens) per forward and attend() in every layer.

    flags: sentence_flags(token_bytes). Settings: see Settings. host_pool: HostPool, or a class like
    it. T > 1 tokens are a prompt, a chunk of it, or a follow-up: they attend to all that is stored.
    T = 1 is a decode step. keep=r drops tokens once, at the first decode step.
    """

    def __init__(self, flags, *, host_pool=HostPool, **settings):
        self.settings = Settings(**settings)
        self.rule = RANKS[self.settings.rank]
        self.host_pool = host_pool
        self.flags = list(flags)
        need(all(type(raw) is bytes for raw in self.flags), "flags must be sentence_flags(...)")
        self.rows = []          # one Segmenter per row of the batch: token ids and sentence lengths
        self.length = 0         # tokens in the longest row
        self.top = 0            # how many of the best sentences select() considers
        self.room = 0           # S: the layers have room for this many sentences
        self.step = None        # what all layers need in one forward: begin() makes it
        self.layers = []        # what each layer stores, see _new_layer
        self.attended = None    # (B, H, budget, 2, d), overwritten by every layer
        self.next_layer = 0     # None while begin() or attend() runs, and if one was interrupted

    @eager
    def begin(self, tokens):
        """Register the next tokens (B, T), int64; return their positions (B, T).

        -1 is padding, after the last token of a row. After the first forward, a row may be padding
        alone. Raises ValueError on bad input, and then changes nothing.
        """
        self._check_tokens(tokens)
        B, T = tokens.shape
        s, device = self.settings, tokens.device
        if not self.rows:
            self.rows = [Segmenter(self.flags, s.sink, s.max_sentence) for _ in range(B)]
        self.next_layer = None      # stays None if begin() is interrupted: the next one raises
        sentence = [row.extend(ids) for row, ids in zip(self.rows, tokens.tolist())]
        self.length = max(len(row.tokens) for row in self.rows)
        most = max(len(row.lengths) for row in self.rows)
        if most > self.room:
            self._grow(most + SPARE)
        # query_mean (Eq. 2): the mean over the decode steps of the open sentence since the last
        # prompt. The n-th query has the share 1 / n, so the first one restarts the mean.
        queries = [min(row.lengths[-1], len(row.tokens) - row.prompt_end) for row in self.rows]
        share = [row.new / max(1, n) for row, n in zip(self.rows, queries)]
        # Near sentences are always attended to: sentence 0 (the sink), and the recent ones.
        oldest = [[row.sentence[-s.recent:][0]] for row in self.rows]
        number = torch.arange(self.room, device=device)
        near = number >= torch.tensor(oldest, device=device)
        near[:, 0] = True
        self.step = SimpleNamespace(
            sentence=torch.tensor(sentence, device=device),           # (B, T) of each new token
            near=near,                                                # (B, S)
            share=torch.tensor(share, dtype=torch.float32, device=device))     # (B,) of the query
        self.next_layer = 0
        start = torch.tensor([[row.start] for row in self.rows], device=device)
        return start + torch.arange(T, device=device)

    def _grow(self, room):
        """Make room for more sentences in every layer, and see how many can fill the budget."""
        for layer in self.layers:
            missing = room - layer.vectors.shape[2]
            layer.count = F.pad(layer.count, (0, missing))
            layer.vectors = F.pad(layer.vectors, (0, 0, 0, missing))
        budget = self.settings.budget
        # Any `top` sentences fill the budget. Before the next call, all that have room may begin.
        enough = [enough_sentences(row.lengths, budget) + room - len(row.lengths)
                  for row in self.rows]
        if self.settings.keep:
            enough = [budget]                       # keep=r may leave one token of each
        self.top = min(room, budget, max(enough))
        self.room = room

    @eager
    def attend(self, index, q, k, v):
        """Store k, v (B, H, T, d); return the output of attention for q, (B, Hq, T, d).

        T > 1: attention to all stored keys. T = 1: to a selection within the budget. Layers call
        attend() in order, index 0, 1, ...; q and k are rotated by the positions of begin(). The
        output has no gradients. Raises ValueError for tensors or calls that do not fit.
        """
        self._check_layer(index, q, k, v)
        self.next_layer = None
        if index == len(self.layers):
            self.layers.append(self._new_layer(q, k))
        layer = self.layers[index]
        kv = torch.stack((k, v), dim=3)                               # (B, H, T, 2, d)
        attention = self._decode if q.shape[2] == 1 else self._prompt
        out = attention(layer, q, kv)
        for b, row in enumerate(self.rows):
            new = kv[b, :, :row.new]                                  # (H, n, 2, d)
            sentence = self.step.sentence[b, :row.new]
            self._store(layer, b, new, sentence, row.first, row.last)
        self.next_layer = index + 1
        return out

    def _new_layer(self, q, k):
        """The state of a layer, on the device except for the pool."""
        B, Hq, _, d = q.shape
        H, s = k.shape[1], self.settings
        features = self.rule.features(k[:, :, 0].float())             # for its shape, (B, H, w)
        if self.attended is None:
            self.attended = k.new_zeros(B, H, s.budget, 2, d)
        return SimpleNamespace(
            pool=self.host_pool(B, H, d, k.dtype, k.device),
            count=torch.zeros(B, self.room, dtype=torch.long, device=k.device),     # of tokens
            vectors=k.new_zeros(B, H, self.room, features.shape[-1]),
            open=torch.zeros_like(features),                # features of the open sentence
            query_mean=q.new_zeros(B, H, Hq // H, d, dtype=torch.float32),
            observed=q.new_zeros(B, Hq, s.window, d) if s.keep else None,   # last N queries
            fetched=None)                                   # (2, B, H, top), see fetched()

    def _decode(self, layer, q, kv):
        """T = 1: rank the sentences, fetch the best, attend to them and to the token itself."""
        if layer.observed is not None:
            self._prune(layer)
            layer.observed = None
        query = q.view(layer.query_mean.shape).float()                # (B, H, G, d)
        # Paper: Sec. 4.2 averages the complete sentence; Algorithm 1, as here, the queries so far.
        share = self.step.share.view(-1, 1, 1, 1)
        layer.query_mean.lerp_(query, share)
        near = self.step.near
        candidates = (layer.count > 0) & ~near
        scores = self.rule.score(query, layer.query_mean, layer.vectors, candidates)
        scores = scores.masked_fill(near[:, None], float("inf"))      # (B, H, S)
        places = self.settings.budget - 1                             # the last: the token itself
        slot, filled, sentence, taken = select(scores, layer.count, places, self.top)
        layer.fetched = torch.stack((sentence, taken))
        slot = F.pad(slot, (0, 1))                                    # (B, H, budget)
        layer.pool.fetch(slot, out=self.attended)
        self.attended[:, :, -1] = kv[:, :, 0]
        mask = F.pad(filled, (0, 1), value=True)                      # (B, H, budget)
        keys, values = self.attended.unbind(3)                        # (B, H, budget, d)
        return grouped_attention(q, keys, values, mask[:, :, None])

    def _prompt(self, layer, q, kv):
        """T > 1: exact attention, row by row, since rows can have different lengths."""
        out = torch.zeros_like(q)
        for b, row in enumerate(self.rows):
            queries = q[b, :, :row.new]                               # (Hq, n, d)
            if row.new > 0:
                stored = layer.pool.read(b)                           # (H, M - n, 2, d)
                both = torch.cat((stored, kv[b, :, :row.new]), dim=1)
                keys, values = both[None].unbind(3)                   # (1, H, M, d)
                result = causal_attention(queries[None], keys, values)
                out[b, :, :row.new] = result[0]
            if layer.observed is not None:
                queries = torch.cat((layer.observed[b], queries), dim=1)
                layer.observed[b] = queries[:, -self.settings.window:]
        return out

    def _store(self, layer, b, kv, sentence, first, last):
        """Store row b's tokens kv (H, n, 2, d), and update the vectors of their sentences.

        sentence (n,): the sentence of each token, from first to last. layer.open[b] holds the sum
        of features of sentence `first` so far.
        """
        if len(sentence) == 0:
            return
        layer.pool.append(b, kv)
        layer.count[b].scatter_add_(0, sentence, torch.ones_like(sentence))
        features = self.rule.features(kv[:, :, 0].float())            # (H, n, w)
        total = layer.open.new_zeros(len(kv), last + 1 - first, features.shape[2])
        total[:, 0] = layer.open[b]
        total.index_add_(1, sentence - first, features)
        layer.open[b] = total[:, -1]
        changed = slice(first, last + 1)
        count = layer.count[b, changed, None].clamp(min=1)
        layer.vectors[b, :, changed] = self.rule.vector(total, count)

    def _prune(self, layer):
        """keep=r: store only the floor(r * budget) most important tokens of each row."""
        s, pool, count = self.settings, layer.pool, layer.count
        n = int(s.keep * s.budget)
        B, _, H, _, d = pool.kv.shape
        layer.pool = self.host_pool(B, H, d, pool.kv.dtype, count.device)
        layer.count = torch.zeros_like(count)
        layer.open.zero_()
        for b, row in enumerate(self.rows):
            kv = pool.read(b)                                         # (H, T, 2, d)
            number = torch.arange(self.room, device=kv.device)
            sentence = number.repeat_interleave(count[b])             # (T,), that of each token
            if len(sentence) > n:
                alpha = importance(layer.observed[b], kv[:, :, 0], s.max_pool)
                near = (sentence == 0) | (sentence >= sentence[-s.recent:][0])
                kept = survivors(alpha.masked_fill(near, float("inf")), n)
                kv, sentence = kv[:, kept], sentence[kept]
            self._store(layer, b, kv, sentence, 0, row.first)         # row.last: the new token's

    def _check_tokens(self, tokens):
        need(torch.is_tensor(tokens), f"tokens must be a tensor, got {type(tokens).__name__}")
        need(tokens.dtype in (torch.int64, torch.int32) and tokens.ndim == 2 and tokens.numel() > 0,
             f"tokens must be int64 (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
        need(self.next_layer == len(self.layers) and bool(self.rows) == bool(self.layers),
             "the last forward was interrupted: use a new cache, or truncate() of extras/branch.py")
        B, real = len(self.rows), tokens >= 0
        need(B in (0, len(tokens)), f"this cache holds {B} rows, got tokens for {len(tokens)}")
        need(B > 0 or real[:, 0].all(), "every row needs a token in the first forward")
        need(tokens.min() >= -1 and not (real[:, 1:] > real[:, :-1]).any(),
             "-1 is padding: it must follow all tokens of a row, and no id may be below -1")

    def _check_layer(self, index, q, k, v):
        need(self.step and index == self.next_layer,
             f"expected attend() for layer {self.next_layer}, got layer {index}: call begin() once "
             "per forward, then attend() once in every layer, in order")
        first_forward = not any(row.start for row in self.rows)
        need(first_forward or index < len(self.layers),
             f"layer {index} is new: the first forward was interrupted before it: use a new cache")
        B, T = self.step.sentence.shape
        like = k if self.attended is None else self.attended
        H, d = like.shape[1], like.shape[-1]
        fits = k.shape == v.shape == (B, H, T, d) and k.dtype == like.dtype
        fits = fits and q.shape == (B, q.shape[1], T, d) and q.shape[1] % H == 0
        need(fits, f"q must be (B, Hq, T, d), k and v (B, H, T, d) for {B} x {T} tokens, with the "
             f"H, d and dtype of before; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]} of {k.dtype}")

    def fetched(self):
        """What the last decode step fetched: (sentence, taken), (layers, B, H, top) each.

        sentence: numbers in descending score, sink and recent ones first; taken: tokens fetched of
        each. Sentence s of row b has rows[b].lengths[s] tokens of the text rows[b].tokens.
        """
        need(self.layers and self.layers[-1].fetched is not None, "no decode step so far")
        return torch.stack([layer.fetched for layer in self.layers], dim=1).unbind(0)

    def memory(self):
        """Bytes of all tensors, on the device and in host memory."""
        parts = [vars(part) for part in (self, self.step, *self.layers) if part]
        tensors = [x for part in parts for x in part.values() if torch.is_tensor(x)]
        host = sum(layer.pool.kv.nbytes for layer in self.layers)
        return {"device": sum(x.nbytes for x in tensors), "host": host}
