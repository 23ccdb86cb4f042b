"""SentenceKV (arXiv 2504.00970, COLM 2025) in one file: a KV cache that is kept as sentences.

A language model's KV cache grows with its context. Here the keys and values wait in CPU memory, cut into sentences.
The accelerator holds one small semantic vector per sentence, layer and KV head; at every decode step these rank the
sentences, the best ones up to a token budget are fetched, and attention goes to those, the first and the last tokens.

    sink                 | host pool                                  | recent window, rounded out to whole sentences
    first tokens, device | every kept token, CPU; vectors on device   | device: a ring of the last tokens

Every token takes the same path, whether it came in a prompt or was generated: its K and V go to the host pool at once,
and stay in the device's ring as well until their sentence has left the recent window. From then on the sentence is
reached by its vector. So nothing is ever unreachable, and closing a sentence moves no data.

B rows of a batch, T new tokens, d head width, Hq query heads, H key-value heads, G = Hq / H of them share one.
    code               paper     shape                  where
    budget             tau       int                    -       most tokens attended to, per KV head and step
    keep, window       r, N      numbers                -       floor(r * tau) tokens survive; N queries judge which
    importance         alpha_i   (B, T)                 device  attention that a token gets from the window (Sec. 4.1)
    layer.vectors      kbar_s,h  (B, H, S, w)           device  semantic vector of each sentence, w = d or 2d (Eq. 1)
    layer.query_sum    Q_s       (B, Hq, d)             device  sum of the queries of the sentence being generated
    query              qbar      (B, H, w)              device  their mean (Eq. 2), or what the rule makes of them
    pool.kv[l]         K, V      (C, B, H, 2, d)        host    every kept token: [..., 0, :] keys, [..., 1, :] values
    layer.near         -         (sink + R, B, H, 2, d) device  the sink, and a ring of the last R tokens
    first              -         (B, S + 1)             device  sentence s is tokens first[s] to first[s + 1] - 1
A token's *position* counts the text, its *slot* the pool; they differ by what keep=r has dropped. Where we differ from
the paper, and why, is said in place after the word "Paper:".
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

# ------------------------------------------------------------------------------------------------ 1. segmentation

ALWAYS = tuple("。！？｡।॥؟۔።။។")       # ends a sentence whatever follows
MAYBE = tuple(".!?…")                 # ends one if white space follows, so that 3.14 and example.com stay whole
CLOSERS = "\"'`)]}»”’」』）】》〉"      # may stand between the full stop and the end
HARD, SOFT, EXTENDER, SPACE = 1, 2, 4, 8

def sentence_flags(token_bytes):
    """What each token of a vocabulary means for sentence ends: list of bytes (None: special token) -> (V,) uint8.

    HARD ends a sentence, SOFT does if white space follows; an EXTENDER (closing quotes, white space) belongs to the
    sentence that has just ended; SPACE begins with white space, or is an extender that has some. Made once per
    tokenizer, from its own bytes.

    >>> sentence_flags([b"end.", b".\\n\\n", b'."', b")", b" The", None]).tolist()
    [2, 1, 2, 4, 8, 1]
    """
    flags = []
    for raw in token_bytes:
        text = "" if raw is None else raw.decode("utf-8", errors="replace")
        bare = text.rstrip()
        core = bare.rstrip(CLOSERS)
        space = text[:1].isspace()
        paragraph = "\n\n" in text or "\n\r\n" in text or "\u2029" in text
        maybe = core.endswith(MAYBE)
        hard = raw is None or paragraph or core.endswith(ALWAYS) or maybe and bare != text
        extender = text and (not bare or not core and not space)                 # only white space, or only closers
        space = space or extender and bare != text
        flags.append(HARD * hard + SOFT * (maybe and not hard) + EXTENDER * bool(extender) + SPACE * bool(space))
    return torch.tensor(flags, dtype=torch.uint8)

def segment(flags, ended, length, cap):
    """Which of T new tokens start a sentence. Bulk and streaming are this one function, with T large or T = 1.

    flags (B, T): of the new tokens. Carried over from the tokens before: ended (B,) is HARD, SOFT or 0, how the last
    token left its sentence; length (B,) is the length of the open sentence. No sentence grows longer than `cap`.
    Returns starts (B, T) bool and the new (ended, length).

    >>> hello, stop, quote, says, two = 0, SOFT, EXTENDER, SPACE, SPACE         # hello . " says two
    >>> segment(torch.tensor([[hello, stop, quote, says, two]]), torch.tensor([0]), torch.tensor([0]), 64)[0].int()
    tensor([[1, 0, 0, 1, 0]], dtype=torch.int32)
    """
    B, T = flags.shape
    flags = torch.cat((ended[:, None].to(flags.dtype), flags), dim=1)            # the carried state as a token before
    t = torch.arange(T + 1, device=flags.device).expand(B, T + 1)
    extender, space = (flags & EXTENDER) > 0, (flags & SPACE) > 0
    anchor = t.masked_fill(extender, 0).cummax(1).values                         # last token that is no extender
    last_hard = t.masked_fill((flags & HARD) == 0, -1).cummax(1).values
    last_space = t.masked_fill(~(extender & space), -1).cummax(1).values         # white space after the full stop
    soft = (flags.gather(1, anchor) & SOFT) > 0
    hard = (last_hard >= anchor) | (soft & (last_space > anchor))
    ended = hard * HARD + (soft & ~hard) * SOFT                                  # (B, T + 1) state after each token
    starts = ~extender[:, 1:] & ((ended[:, :-1] == HARD) | ((ended[:, :-1] == SOFT) & space[:, 1:]))
    # age: tokens since the last start by punctuation. A cut at the cap does not reset it, hence the modulus; the first
    # token of all has age 0, and so starts a sentence as well.
    start = t[:, 1:].masked_fill(~starts, 0).cummax(1).values                    # 0: in an earlier call
    age = torch.where(start > 0, t[:, 1:] - start, t[:, :-1] + length[:, None])
    starts = starts | (age % cap == 0)
    return starts, ended[:, -1], age[:, -1] % cap + 1

# ---------------------------------------------------------------------------- 2. prefill: what survives, and vectors

def importance(q, k, pool=1):
    """alpha (Sec. 4.1): the attention that each prompt token receives from the last N queries, summed over all heads.

    q (B, Hq, N, d) are the queries of the prompt's last N tokens, k (B, H, T, d) all its keys -> (B, T) float32.
    pool > 1: a max-pool of that width over the tokens first. Paper: no pooling; the authors' code pools, with width 7.
    """
    B, Hq, N, d = q.shape
    H, T = k.shape[1:3]
    q = q.reshape(B, H, Hq // H * N, d)                                          # G * N queries per KV head
    future = torch.ones(N, T, dtype=torch.bool, device=q.device).triu(T - N + 1).repeat(Hq // H, 1)     # (G * N, T)
    alpha = torch.zeros(B, T, device=q.device)
    for h in range(H):                                                           # one head at a time: (B, G * N, T)
        logits = (q[:, h] @ k[:, h].transpose(1, 2)).float() * d ** -0.5
        alpha += logits.masked_fill(future, float("-inf")).softmax(-1).sum(1)
    return F.max_pool1d(alpha[:, None], pool, stride=1, padding=pool // 2)[:, 0]

def survivors(alpha, count, sink, tail):
    """The `count` tokens that keep=r leaves, in order: alpha (B, T), tail (B,) -> (B, count) indices.

    The first `sink` and those from `tail` on stay on the device, so they come first; then the highest alpha.
    Prompt-wide, not per sentence: a long dull sentence keeps few tokens (paper, A.7).
    """
    t = torch.arange(alpha.shape[1], device=alpha.device)
    alpha = alpha.masked_fill((t < sink) | (t >= tail[:, None]), float("inf"))
    return alpha.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values    # ties: the earlier

def mean_keys(k, ids, S):
    """Eq. 1: the mean key of each sentence. k (N, B, H, d), ids (N, B) in 0..S-1 -> (S, B, H, d)."""
    return reduce_keys(k.float(), ids, S, "mean").to(k.dtype)

def key_bounds(k, ids, S):
    """The largest k and the largest -k of each sentence, element by element: -> (S, B, H, 2d). Bounds as in Quest."""
    return reduce_keys(torch.cat((k, -k), dim=-1), ids, S, "amax")

def key_spread(k, ids, S):
    """The mean key of each sentence and the standard deviation around it, element by element: -> (S, B, H, 2d)."""
    mean, square = (reduce_keys(x, ids, S, "mean") for x in (k.float(), k.float() ** 2))
    return torch.cat((mean, (square - mean * mean).clamp(min=0).sqrt()), dim=-1).to(k.dtype)

def reduce_keys(k, ids, S, how):
    N, B, H, d = k.shape
    rows = (ids * B + torch.arange(B, device=k.device)).reshape(N * B, 1).expand(N * B, H * d)
    out = k.new_zeros(S * B, H * d).scatter_reduce_(0, rows, k.reshape(N * B, H * d), how, include_self=False)
    return out.view(S, B, H, d)

# ------------------------------------------------------------------------------------- 3. decode: rank and select

def with_size(q):
    """Queries (B, H, G, d) and the absolute values of their elements, the mean of each group: -> (B, H, 2d)."""
    return torch.cat((q, q.abs()), dim=-1).mean(2)

# A rule: the width of its vectors as a multiple of d; keys of sentences -> their vectors; and (query q (B, H, G, d),
# sum of this sentence's queries (B, H, G, d), their number (B,)) -> what the vectors are multiplied with, (B, H, w).
# The G query heads of a group share one ranking: their mean is taken. "bounds": no key of a sentence has a larger
# product with q than relu(q) . max k + relu(-q) . max -k (as in Quest). "spread": how large a product can be expected,
# q . mean k + |q| . deviation of k, with q halfway between the current query and qbar. Paper: "mean", qbar . kbar; but
# a mean is blind to a key that stands out.
RANKS = {
    "mean": (1, mean_keys, lambda q, total, n: (total.mean(2) / n[:, None, None]).to(q.dtype)),
    "bounds": (2, key_bounds, lambda q, total, n: torch.cat((q, -q), dim=-1).relu().mean(2)),
    "spread": (2, key_spread, lambda q, total, n: with_size((q + total / n[:, None, None, None]) / 2).to(q.dtype)),
}
PAPER = dict(rank="mean", keep=2, budget=1024, sink=32, recent=32, window=32, pool=7)   # settings of paper and code

def enough_sentences(first, width):
    """So many sentences hold `width` tokens whichever they are, as the shortest do: first (B, S + 1) -> int.

    >>> enough_sentences(torch.tensor([[0, 3, 5, 9, 16]]), 6)                               # lengths 3, 2, 4, 7
    3
    """
    length = first.diff(dim=1)
    shortest = length.masked_fill(length == 0, width).sort(dim=1).values                    # (B, S)
    return int((shortest.cumsum(1) < width).sum(1).max()) + 1

def select(scores, first, end, room, width, k):
    """Whole sentences in descending score until the room is full; the last one is cut (Algorithm 1).

    scores (B, H, S); sentence s holds tokens first[s] .. first[s + 1] - 1, first (B, S + 1); only sentences before
    end (B,) are candidates; room (B,) tokens at most, and never more than `width`; the best k sentences must fill it.
    No loop and no ragged tensor: laid end to end, place j of the width belongs to the sentence whose cumulative length
    first exceeds j.
    Returns token (B, H, width), valid (B, H, width), sentence (B, H, k), taken (B, H, k): tokens taken of each.

    >>> scores, first = torch.tensor([[[1., 9., 5.]]]), torch.tensor([[0, 3, 5, 9]])       # lengths 3, 2, 4
    >>> token, valid, sentence, taken = select(scores, first, torch.tensor([3]), torch.tensor([4]), 5, 3)
    >>> token[valid].tolist(), sentence.tolist(), taken.tolist()
    ([3, 4, 5, 6], [[[1, 2, 0]]], [[[2, 2, 0]]])
    """
    B, H, S = scores.shape
    far = torch.arange(S, device=first.device) < end[:, None]
    length = first.diff(dim=1).masked_fill(~far, 0)[:, None]                     # (B, 1, S)
    sentence = scores.masked_fill(length == 0, float("-inf")).topk(k, dim=-1).indices       # (B, H, k)
    stop = length.expand(B, H, S).gather(2, sentence).cumsum(-1).clamp(max=room[:, None, None])
    begin = F.pad(stop[..., :-1], (1, 0))                                        # (B, H, k) places begin .. stop - 1
    j = torch.arange(width, device=first.device).expand(B, H, width).contiguous()
    owner = torch.searchsorted(stop, j, right=True).clamp(max=stop.shape[-1] - 1)           # (B, H, width)
    start = first[:, None].expand(B, H, S + 1).gather(2, sentence)               # (B, H, k) its first token
    return (start - begin).gather(2, owner) + j, j < stop[..., -1:], sentence, stop - begin

def attend_causal(q, k, v, step=512):
    """Exact attention of a prompt's T tokens to the N >= T tokens in the cache, of which they are the last.

    q (B, Hq, T, d), k and v (B, H, N, d) -> (B, Hq, T, d). In slices of queries: nothing ever has T * N elements.
    """
    T, N, out = q.shape[2], k.shape[2], []
    for i in range(0, T, step):
        t = min(step, T - i)
        seen = N - T + i + t                                                     # keys that the last of them sees
        mask = causal_lower_right(t, seen)
        out.append(F.scaled_dot_product_attention(q[:, :, i:i + t], k[:, :, :seen], v[:, :, :seen], mask,
                                                  enable_gqa=True))
    return torch.cat(out, dim=2)

# ----------------------------------------------------------------------------------------------- 4. the host pool

def device_alias(host, device):
    """A CUDA tensor over the memory of a pinned CPU tensor: kernels that use it read over PCIe. RuntimeError if not."""
    memory = dict(shape=(host.nbytes,), typestr="|u1", data=(host.data_ptr(), False), version=3)
    owner = SimpleNamespace(__cuda_array_interface__=memory, host=host)          # lives as long as the alias
    alias = torch.as_tensor(owner, device=device)
    if alias.data_ptr() != host.data_ptr():
        raise RuntimeError("the pinned memory was copied instead of mapped")
    return alias.view(host.dtype).view(host.shape)

def zero_copy_works(device):
    """Try it: what the CPU writes after the alias was made must be what the GPU reads."""
    try:
        host = torch.zeros(1024, dtype=torch.int64, pin_memory=True, device="cpu")
        alias = device_alias(host, device)
        host += 7
        return bool((alias == 7).all())
    except (RuntimeError, TypeError, ValueError):
        return False

class HostPool:
    """K and V of every kept token in CPU memory, per layer kv[l] (C, B, H, 2, d): token after token, room for C.

    On CUDA the memory is pinned (PyTorch rounds pinned blocks up to a power of two), and written on a side stream while
    the next layer computes. Fetches read it in place (zero copy: no work for the CPU, no sync). Where that cannot be,
    the CPU gathers into a staging buffer.
    """

    def __init__(self, device):
        self.device, self.kv, self.seen, self.staging = device, [], [], None     # seen[l]: kv[l] as the device sees it
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_place = device.type == "cpu" or self.stream is not None and zero_copy_works(device)

    def reserve(self, layer, n, like):
        """Room for n tokens, with an eighth to spare so that generating rarely copies. like (t, B, H, 2, d)."""
        if layer == len(self.kv):
            self.kv.append(torch.zeros(0, *like.shape[1:], dtype=like.dtype, device="cpu"))
            self.seen.append(None)
        if n > len(self.kv[layer]):
            pinned = self.stream is not None
            if pinned:
                torch.cuda.synchronize(self.device)                              # no kernel uses the old one any more
            shape = (n + max(64, n // 8), *like.shape[1:])
            new = torch.zeros(shape, dtype=like.dtype, pin_memory=pinned, device="cpu")
            new[:len(self.kv[layer])] = self.kv[layer]
            self.kv[layer] = new
            self.seen[layer] = device_alias(new, self.device) if pinned and self.in_place else new

    def write(self, layer, slot, kv):
        """Tokens kv (t, B, H, 2, d) from the device to slots slot .. slot + t - 1."""
        target = self.kv[layer][slot:slot + len(kv)]
        if self.stream is None:
            target.copy_(kv)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))          # kv must have been computed,
        with torch.cuda.stream(self.stream):
            target.copy_(kv, non_blocking=True)
        kv.record_stream(self.stream)                                            # and not be reused too early

    def read(self, layer, n):
        """The first n tokens of a layer, on the device: (n, B, H, 2, d)."""
        self.wait()
        return self.kv[layer][:n].to(self.device, non_blocking=True)

    def fetch(self, layer, rows, out):
        """out[i] = row rows[i] of the layer's pool, seen as (C * B * H, 2 * d). rows (n,), out (n, 2 * d): device."""
        self.wait()
        if self.in_place:
            torch.index_select(self.seen[layer].view(-1, out.shape[1]), 0, rows, out=out)
            return
        if self.staging is None:
            self.staging = torch.zeros(out.shape, dtype=out.dtype, pin_memory=self.stream is not None, device="cpu")
        rows = rows.cpu()              # waits for the device, so the last copy from the staging buffer is over as well
        torch.index_select(self.kv[layer].view(-1, out.shape[1]), 0, rows, out=self.staging)
        out.copy_(self.staging, non_blocking=True)

    def wait(self):
        """What comes next on the device comes after all writes so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

# --------------------------------------------------------------------------------------------------- 5. the cache

def need(condition, message):
    if not condition:
        raise ValueError(message)

class SentenceKV:
    """The cache, for a model that calls begin(tokens) once per forward and attend(layer, q, k, v) in every layer.

    flags    (V,) uint8 from sentence_flags: which tokens end sentences.
    budget   most tokens that a KV head attends to at a decode step: sink + fetched + recent, nothing beside.
    keep     r: after the first prompt the floor(r * budget) most important tokens survive (the paper).
             None: all survive, so that a later question can be about anything.
    sink     first tokens, always attended.
    recent   last tokens, always attended, with the rest of the sentence that the oldest of them is in.
    window   queries at the prompt's end that judge importance, and
    pool     the width of the max-pool over it (odd; 1: none); both only used with keep=r.
    rank     "spread", "bounds" or the paper's "mean": see RANKS.
    max_sentence  longer sentences are cut here; default 64, or a third of budget - sink - recent if that is less: the
             window, rounded out to whole sentences, must not eat up what is left for fetching.

    A prompt (T > 1) attends exactly to everything kept; a single token is a decode step. What cannot work: ValueError.
    """

    def __init__(self, flags, *, budget=1024, keep=None, sink=4, recent=32, window=32, pool=1, rank="spread",
                 max_sentence=None):
        for name, value, least in (("budget", budget, 1), ("sink", sink, 0), ("recent", recent, 1),
                                   ("window", window, 1), ("pool", pool, 1), ("max_sentence", max_sentence, 1)):
            need(type(value) is int and value >= least or name == "max_sentence" and value is None,
                 f"{name} must be a whole number of at least {least}, got {value!r}")
        room = budget - sink - recent
        max_sentence = min(64, -(-room // 3)) if max_sentence is None else max_sentence
        need(room > 0, f"budget {budget} must exceed sink + recent = {sink + recent}: raise it or lower those")
        need(max_sentence <= room, f"max_sentence {max_sentence} must fit into budget - sink - recent = {room}")
        need(keep is None or type(keep) in (int, float) and 1 <= keep < float("inf"),
             f"keep must be None (keep all) or a number of at least 1, got {keep!r}")
        need(pool % 2 == 1, f"pool must be odd, got {pool}")
        need(rank in RANKS, f"rank must be one of {', '.join(RANKS)}, got {rank!r}")
        need(isinstance(flags, torch.Tensor) and flags.dtype == torch.uint8 and flags.ndim == 1 and len(flags) > 0,
             "flags must be the (vocabulary,) uint8 tensor that sentence_flags(token_bytes) returns")
        self.flags = F.pad(flags, (0, 1))                                        # ids beyond the table: plain words
        self.budget, self.sink, self.recent, self.fetch_slots = budget, sink, recent, room
        self.keep, self.window, self.pool_width, self.rank = keep, window, pool, RANKS[rank]
        self.max_sentence, self.ring = max_sentence, recent + max_sentence - 1   # R: the longest that a tail can be
        self.length, self.layers, self.pool, self.first, self.work = 0, [], None, None, None

    def begin(self, tokens):
        """Take note of the tokens (B, T) that come next, for all layers at once; return their positions (B, T)."""
        B, T = tokens.shape
        if self.length == 0:
            self._start(B, T, tokens.device)
        need(B == len(self.current), f"this cache holds {len(self.current)} rows, got tokens for {B}: use a new cache")
        before, self.length, self.slot = self.length, self.length + T, self.length - self.dropped
        survive = T if self.keep is None or before else min(T, int(self.keep * self.budget))
        self.prune, self.dropped = survive < T, self.dropped + T - survive

        sink = min(max(self.sink - before, 0), T)                                # new tokens that belong to the sink
        starts = torch.zeros(B, T, dtype=torch.bool, device=tokens.device)
        if sink < T:
            flags = self.flags[tokens[:, sink:].clamp(max=len(self.flags) - 1)]
            starts[:, sink:], self.ended, self.open = segment(flags, self.ended, self.open, self.max_sentence)
        ids = self.current[:, None] + starts.cumsum(1)                           # (B, T) sentence of each; sink: -1
        self.current = ids[:, -1]
        # The host knows how many sentences there can be at most. When so many would not fit, it asks the device for the
        # true number, and while decoding makes room for 63 more: the one sync of a step, in one of 64 steps at most.
        self.bound += 1
        ask = T > 1 or self.bound >= self.first.shape[1]
        if ask:
            self.bound = int(self.current.max()) + 1
            self._make_room(max(self.bound, 1) + (63 if T == 1 else 0))
        count = torch.zeros_like(self.first).scatter_add_(1, ids + 1, torch.ones_like(ids))
        self.first += count.cumsum(1)                                            # tokens before each sentence
        if ask:                                                                  # how many to rank until it asks again
            enough = self.fetch_slots if self.dropped else enough_sentences(self.first, self.fetch_slots) + 64
            self.ranked = min(self.first.shape[1] - 1, self.fetch_slots, enough)
        self.queries = torch.where(starts[:, -1], 1, self.queries + 1) if T == 1 else torch.zeros_like(self.current)

        self._divide(B, tokens.device)
        return torch.arange(before, self.length, device=tokens.device).expand(B, T)

    def _divide(self, B, device):
        """What is near and what is far. far: number of sentences wholly before the recent window, so also the index of
        the one that the tail starts with. Position p lives in entry p % R of the ring."""
        oldest = torch.full((B, 1), max(self.length - self.recent, 0), device=device)
        self.far = (torch.searchsorted(self.first, oldest, right=True) - 1).clamp(min=0)[:, 0]       # (B,)
        self.tail, end = self.first.gather(1, torch.stack((self.far, self.far + 1), 1)).unbind(1)    # (B,) of it
        last, entry = self.length - 1, torch.arange(self.ring, device=device)
        position = last - (last - entry) % self.ring                             # (R,) latest of each entry; < 0: none
        sink = torch.arange(self.sink, device=device) < self.length
        self.near_mask = torch.cat((sink.expand(B, -1), position >= self.tail[:, None]), dim=1)     # (B, sink + R)
        outside = (position < self.tail[:, None]) | (position >= end[:, None])   # (B, R) of the oldest sentence there
        self.oldest_ids = outside.long().T                                       # (R, B) 0: in it, 1: not
        self.room = self.budget - self.sink - (self.length - self.tail)          # (B,) tokens that may be fetched

    def _start(self, B, T, device):
        """The state before the first token."""
        need(self.keep is None or T >= self.window, f"the observation window of {self.window} tokens is longer than "
             f"the prompt of {T}: lower window, or use keep=None")
        self.flags, self.pool = self.flags.to(device), HostPool(device)
        self.current = torch.full((B,), -1, device=device)                       # (B,) index of the open sentence
        self.ended, self.open = torch.zeros(2, B, dtype=torch.long, device=device)   # (B,) see segment
        self.queries = torch.zeros(B, dtype=torch.long, device=device)           # (B,) number of queries in query_sum
        self.first = torch.zeros(B, 1, dtype=torch.long, device=device)          # (B, S + 1)
        self.dropped, self.bound = 0, 0                                          # bound: most sentences there can be

    def _make_room(self, S):
        """Room for the vectors of S sentences."""
        more = S - self.first.shape[1] + 1
        if more > 0:
            self.first = torch.cat((self.first, self.first[:, -1:].expand(-1, more)), dim=1)    # unborn: at the end
            for mem in self.layers:
                mem.vectors = F.pad(mem.vectors, (0, 0, 0, more))

    def attend(self, layer, q, k, v):
        """Store the new tokens' k and v (B, H, T, d); the attention output of q (B, Hq, T, d) is (B, Hq, T, d)."""
        (B, Hq, T, d), H = q.shape, k.shape[1]
        if layer == len(self.layers):
            mem = SimpleNamespace(kept_before=None, fetched=None)                # what one layer keeps on the device
            mem.near = k.new_zeros(self.sink + self.ring, B, H, 2, d)
            mem.vectors = k.new_zeros(B, H, self.first.shape[1] - 1, self.rank[0] * d)
            mem.query_sum = torch.zeros(B, Hq, d, device=k.device)               # float32
            self.layers.append(mem)
        kv = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4).contiguous()      # (T, B, H, 2, d) as in the pool
        self.pool.reserve(layer, self.length - self.dropped, kv)
        return self._decode(layer, q, kv) if T == 1 else self._prompt(layer, q, kv)

    def _first_slot(self, layer):
        """(B, S + 1) slot of each sentence's first token. A sentence of a pruned prompt starts after the survivors
        before it, a later one at its position less all that was dropped: each is the larger number of the two."""
        kept, later = self.layers[layer].kept_before, self.first - self.dropped
        return later if kept is None else torch.maximum(F.pad(kept, (0, later.shape[1] - kept.shape[1])), later)

    def _prompt(self, layer, q, kv):
        """T > 1 tokens: exact attention to everything kept, then sort them into the buffers."""
        mem, B, S = self.layers[layer], q.shape[0], self.first.shape[1] - 1
        new, kv = kv, torch.cat((self.pool.read(layer, self.slot), kv)) if self.slot else kv    # (N, B, H, 2, d)
        keys, values = kv.permute(3, 1, 2, 0, 4)                                 # (B, H, N, d) each, views
        out = attend_causal(q, keys, values)
        if self.prune:
            alpha = importance(q[:, :, -self.window:], keys, self.pool_width)
            kept = survivors(alpha, self.length - self.dropped, self.sink, self.tail)    # (B, count)
            mem.kept_before = torch.searchsorted(kept, self.first)               # survivors before each sentence
            new = kv = kv[kept.T, torch.arange(B, device=q.device)]              # (count, B, H, 2, d)
        self.pool.write(layer, self.slot, new)
        sink, ring = kv[:self.sink], kv[-self.ring:]
        mem.near[:len(sink)] = sink
        entry = torch.arange(self.length - len(ring), self.length, device=q.device) % self.ring
        mem.near[self.sink + entry] = ring                                       # only the tail of it is attended to
        slot = torch.arange(len(kv), device=q.device).expand(B, -1).contiguous()
        ids = torch.searchsorted(self._first_slot(layer), slot, right=True)      # (B, N) sentence + 1; sink: 0
        mem.vectors = self.rank[1](kv[..., 0, :], ids.T, S + 1)[1:].permute(1, 2, 0, 3).contiguous()  # (B, H, S, w)
        return out

    def _decode(self, layer, q, kv):
        """One token: rank, fetch, attend to sink + fetched + tail. No loop, and with zero copy no sync."""
        (B, Hq, _, d), H, mem = q.shape, kv.shape[2], self.layers[layer]
        row, head = torch.arange(B, device=q.device), torch.arange(H, device=q.device)
        _, vectors_of, query_of = self.rank
        mem.near[self.sink + (self.length - 1) % self.ring] = kv[0]
        if self.length <= self.sink:
            mem.near[self.length - 1] = kv[0]
        # The oldest sentence of the tail gets its vector before it leaves: all its tokens are in the ring.
        mem.vectors[row, :, self.far] = vectors_of(mem.near[self.sink:, :, :, 0], self.oldest_ids, 2)[0]  # (B, H, w)

        # The first query of a sentence, or after a prompt, starts the sum anew.
        # Paper: Sec. 4.2 forms the mean query when a sentence is complete, but Algorithm 1 at every token, as here.
        mem.query_sum = mem.query_sum.masked_fill(self.queries[:, None, None] == 1, 0) + q[:, :, 0].float()
        q = q.view(B, H, Hq // H, d)                                             # a group's query heads: G queries
        query = query_of(q, mem.query_sum.view(q.shape), self.queries)           # (B, H, w)
        scores = (query[:, :, None] @ mem.vectors.transpose(2, 3))[:, :, 0]      # (B, H, S)
        token, valid, *mem.fetched = select(scores, self._first_slot(layer), self.far, self.room, self.fetch_slots,
                                             self.ranked)

        if self.work is None:
            self.work = kv.new_zeros(len(mem.near) + self.fetch_slots, B, H, 2, d)  # what is attended to, of one layer
        rows = token * (B * H) + row[:, None, None] * H + head[:, None]          # (B, H, slots) in the pool
        rows = rows.masked_fill(~valid, 0).permute(2, 0, 1).flatten()            # unused: any row, it is masked
        self.work[:len(mem.near)] = mem.near
        self.pool.fetch(layer, rows, self.work[len(mem.near):].view(-1, 2 * d))
        self.pool.write(layer, self.slot, kv)                                    # overlaps with the rest of the layer
        keys, values = self.work.permute(3, 1, 2, 0, 4)                          # (B, H, sink + R + slots, d) each
        mask = torch.cat((self.near_mask[:, None].expand(B, H, -1), valid), dim=-1)[:, :, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(B, Hq, 1, d)         # Eq. 3

    def fetched(self):
        """What the last decode step fetched: sentence and taken, (layers, B, H, k) each, the best sentence first.

        taken is the number of tokens fetched of it, from its start; sentence s of row b is tokens first[b, s] to
        first[b, s + 1] - 1 of the text, as long as keep=r has dropped none of it.
        """
        need(self.layers and self.layers[0].fetched, "nothing was fetched yet: this tells about the last decode step")
        return [torch.stack(x) for x in zip(*(mem.fetched for mem in self.layers))]

    def memory(self):
        """Bytes of all buffers that exist: {"device": ..., "host": ...}."""
        size = lambda *tensors: sum(t.nbytes for t in tensors if t is not None)
        layers = [size(mem.near, mem.vectors, mem.query_sum, mem.kept_before) for mem in self.layers]
        return {"device": size(self.flags, self.first, self.work) + sum(layers),
                "host": size(*self.pool.kv, self.pool.staging) if self.pool else 0}

def main():
    from experiments.ask import main  # the command line lives beside the method; see --help
    return main()

if __name__ == "__main__":
    raise SystemExit(main())
