"""SentenceKV (arXiv 2504.00970, COLM 2025) in one file: a KV cache that is kept as sentences.

A language model's KV cache grows with its context. Here the keys and values wait in CPU memory, cut into sentences.
The accelerator holds one small semantic vector per sentence, layer and KV head; at every decode step these rank the
sentences, and a token budget is filled: the first tokens (sink), the last ones (recent), then the best sentences.

    sink         | far: whole sentences, reached by their vectors   | tail: recent window, rounded out to sentences
    always taken | the best are taken until the budget is full      | always taken

Every token takes the same path, whether it came in a prompt or was generated: its K and V go to the host pool at once.
Every step takes the same path, too: one fetch brings all that is attended to, near or far. A sentence that leaves the
recent window moves no data, only its vector is written. So the device holds vectors, and nothing is ever unreachable.

B rows of a batch, T new tokens, d head width, Hq query heads, H key-value heads, G = Hq / H of them share one.
    code               paper     shape                  where
    budget             tau       int                    -       most tokens attended to, per KV head and step
    keep, window       r, N      numbers                -       floor(r * tau) tokens survive; N queries judge which
    importance         alpha_i   (B, T)                 device  attention that a token gets from the window (Sec. 4.1)
    mem.vectors        kbar_s,h  (B, H, S, w)           device  semantic vector of each sentence, w = d or 2d (Eq. 1)
    mem.query_sum      Q_s       (B, Hq, d)             device  sum of the queries of the sentence being generated
    query              qbar      (B, H, w)              device  their mean (Eq. 2), or what the rule makes of them
    pool.kv[l]         K, V      (C, B, H, 2, d)        host    every kept token: [..., 0, :] keys, [..., 1, :] values
    mem.work           -         (budget, B, H, 2, d)   device  what a layer attends to in one step
    first              -         (B, S + 1)             device  sentence s is tokens first[s] to first[s + 1] - 1
    far, tail          -         (B,)                   device  number of far sentences; position where the tail starts
    plan               -         see _plan              device  which slots the next fetch takes, the same in all layers
`mem` is layers[l], what one layer keeps on the device; the rest is kept once for all layers. A token's *position* counts
the text, its *slot* the pool; they differ by what keep=r has dropped. Where we differ from the paper, and why, is said
in place after the word "Paper:".
"""
import functools
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

# ------------------------------------------------------------------------------------------------ 1. segmentation

ALWAYS = tuple("。！？｡।॥؟۔።။។")       # ends a sentence whatever follows
MAYBE = tuple(".!?…")                 # ends one if white space follows, so that 3.14 and example.com stay whole
CLOSERS = "\"'`)]}»”’」』）】》〉"      # may stand between the full stop and the end
HARD, SOFT, EXTENDER, SPACE, START = 1, 2, 4, 8, 16

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

    flags (B, T): of the new tokens; beside those of sentence_flags, START begins a sentence in any case. Carried over
    from the tokens before: ended (B,) is HARD, SOFT or 0, how the last token left its sentence; length (B,) is the
    length of the open sentence. No sentence grows longer than `cap`.
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
    starts = starts | ((flags[:, 1:] & START) > 0)
    # age: tokens since the last start by punctuation. A cut at the cap does not reset it, hence the modulus; the first
    # token of all has age 0, and so starts a sentence as well.
    start = t[:, 1:].masked_fill(~starts, 0).cummax(1).values                    # 0: in an earlier call
    age = torch.where(start > 0, t[:, 1:] - start, t[:, :-1] + length[:, None])
    starts = starts | (age % cap == 0)
    return starts, ended[:, -1], age[:, -1] % cap + 1

# ---------------------------------------------------------------------------- 2. prefill: what survives, and vectors

def importance(q, k, position, pool=1):
    """alpha (Sec. 4.1): the attention that each prompt token receives from the last N queries, summed over all heads.

    q (B, Hq, N, d) are the queries of the prompt's last N tokens, position (B, N) where those stand, k (B, H, T, d) all
    its keys -> (B, T) float32. pool > 1: a max-pool of that width over the tokens first. Paper: no pooling; the
    authors' code pools, with width 7.
    """
    B, Hq, N, d = q.shape
    H, T = k.shape[1:3]
    q = q.reshape(B, H, Hq // H * N, d)                                          # G * N queries per KV head
    future = torch.arange(T, device=q.device) > position[:, :, None]             # (B, N, T)
    future = future.repeat(1, Hq // H, 1)                                        # (B, G * N, T)
    alpha = torch.zeros(B, T, device=q.device)
    for h in range(H):                                                           # one head at a time: (B, G * N, T)
        logits = (q[:, h] @ k[:, h].transpose(1, 2)).float() * d ** -0.5
        alpha += logits.masked_fill(future, float("-inf")).softmax(-1).sum(1)
    return F.max_pool1d(alpha[:, None], pool, stride=1, padding=pool // 2)[:, 0]

def survivors(alpha, count, sink, tail, length):
    """The `count` tokens that keep=r leaves, in order: alpha (B, T), tail and length (B,) -> (B, count) indices.

    The first `sink` and those from `tail` on are always attended to, so they come first; then the highest alpha. A row
    of fewer than `count` tokens keeps all of its own, in front.
    Prompt-wide, not per sentence: a long dull sentence keeps few tokens (paper, A.7).
    """
    t = torch.arange(alpha.shape[1], device=alpha.device)
    alpha = alpha.masked_fill((t < sink) | (t >= tail[:, None]), float("inf")).masked_fill(t >= length[:, None], -1)
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
    """k (N, B, H, d), row b's token i in sentence ids[i, b] of S -> (S, B, H, d); how: "mean" or "amax"."""
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

def enough_sentences(length, width):
    """So many sentences hold `width` tokens whichever they are, as the shortest do: length (B, S) -> int.

    >>> enough_sentences(torch.tensor([[3, 2, 4, 7]]), 6)
    3
    """
    shortest = length.masked_fill(length == 0, width).sort(dim=1).values         # (B, S)
    return int((shortest.cumsum(1) < width).sum(1).max()) + 1

def select(scores, start, length, near, width, k):
    """Whole sentences in descending score until the budget is full; the last one is cut (Algorithm 1).

    scores (B, H, S); sentence s holds the length[b, s] tokens from start[b, s] on; a length of 0: no candidate. There
    are `width` places, the first near[b] of them are taken; the best k sentences must fill the rest.
    No loop and no ragged tensor: laid end to end, a place belongs to the last sentence that has begun there.
    Returns token (B, H, width), valid (B, H, width), sentence (B, H, k), taken (B, H, k): tokens taken of each.

    >>> scores, start, length = torch.tensor([[[1., 9., 5.]]]), torch.tensor([[0, 3, 5]]), torch.tensor([[3, 2, 4]])
    >>> token, valid, sentence, taken = select(scores, start, length, torch.tensor([1]), 6, 3)
    >>> token[0, 0, 1:].tolist(), sentence.tolist(), taken.tolist()
    ([3, 4, 5, 6, 7], [[[1, 2, 0]]], [[[2, 3, 0]]])
    """
    (B, H, S), device = scores.shape, scores.device
    start, length = start[:, None].expand(B, H, S), length[:, None].expand(B, H, S)
    sentence = scores.masked_fill(length == 0, float("-inf")).topk(k, dim=-1).indices       # (B, H, k)
    near = near[:, None, None].expand(B, H, 1)
    stop = (length.gather(2, sentence).cumsum(-1) + near).clamp(max=width)       # (B, H, k) places begin .. stop - 1
    begin = torch.cat((near, stop[..., :-1]), dim=-1)
    begun = torch.zeros(B, H, width + 1, dtype=torch.long, device=device).scatter_add_(2, begin, torch.ones_like(begin))
    owner = (begun.cumsum(-1)[..., :-1] - 1).clamp(min=0)                        # (B, H, width)
    j = torch.arange(width, device=device)
    return (start.gather(2, sentence) - begin).gather(2, owner) + j, j < stop[..., -1:], sentence, stop - begin

def attend_causal(q, k, v, before, step=512):
    """Exact attention of T new tokens to themselves and all before them, in slices: nothing ever has T * N elements.

    q (B, Hq, T, d), k and v (B, H, N, d) -> (B, Hq, T, d); the new tokens of row b follow on its `before[b]` old ones.
    """
    (B, Hq, T, d), (H, N), out = q.shape, k.shape[1:3], []
    for i in range(0, T, step):
        t = min(step, T - i)
        x = q[:, :, i:i + t]                                                     # (B, Hq, t, d)
        if len(set(before)) == 1:
            seen = before[0] + i + t                                             # keys that the last of them sees
            x = F.scaled_dot_product_attention(x, k[:, :, :seen], v[:, :, :seen], causal_lower_right(t, seen),
                                               enable_gqa=True)
        else:                                                                    # few kernels take GQA and a mask
            last = torch.tensor(before, device=q.device)[:, None] + i + torch.arange(t, device=q.device)    # (B, t)
            mask = (torch.arange(N, device=q.device) <= last[:, :, None])[:, None]           # (B, 1, t, N)
            folded = x.reshape(B, H, Hq // H * t, d)                             # a group's query heads as more queries
            mask = mask.repeat(1, 1, Hq // H, 1)                                 # (B, 1, G * t, N)
            x = F.scaled_dot_product_attention(folded, k, v, mask).view(B, Hq, t, d)
        out.append(x)
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

@functools.cache
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
    """K and V of every kept token in CPU memory, per layer kv[l] (C, B, H, 2, d): slot after slot, room for C.

    On CUDA the memory is pinned (PyTorch rounds pinned blocks up to a power of two), and kernels read and write it in
    place (zero copy: no work for the CPU, no sync), writes on a side stream while the next layer computes. Where that
    cannot be, the CPU gathers into a staging buffer.
    """

    def __init__(self, device):
        self.device, self.kv, self.seen, self.staging = device, {}, {}, None     # seen[l]: kv[l] as the device sees it
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pinned = self.stream is not None
        self.in_place = not self.pinned or zero_copy_works(device)

    def reserve(self, layer, n, like):
        """Room for n slots, with an eighth to spare so that generating rarely copies. like (t, B, H, 2, d)."""
        old = self.kv.get(layer)
        if old is None or n > len(old):
            new = self.allocate((n + n // 8, *like.shape[1:]), like.dtype)
            if old is not None:
                self.finish()                                                    # no kernel uses the old one any more
                new[:len(old)] = old
            self.kv[layer] = new
            self.seen[layer] = device_alias(new, self.device) if self.pinned and self.in_place else new

    def allocate(self, shape, dtype):
        """Zeros in host memory, pinned if that can be. MemoryError names the setting to change."""
        try:
            return torch.zeros(shape, dtype=dtype, pin_memory=self.pinned, device="cpu")
        except RuntimeError as e:
            if not self.pinned:
                raise MemoryError(f"no host memory for {shape[0]} tokens of a layer: keep fewer (keep=...)") from e
            warnings.warn("host memory could not be pinned: fetching through pageable memory, which is slower")
            self.pinned = self.in_place = False
            return self.allocate(shape, dtype)

    def write(self, layer, slot, kv):
        """Tokens kv (t, B, H, 2, d) from the device to slots (t, B)."""
        t, B = slot.shape
        rows = (slot * B + torch.arange(B, device=slot.device)).flatten()        # the pool: (C * B, H * 2 * d)
        kv = kv.reshape(t * B, -1)
        if not self.in_place:
            self.kv[layer].view(-1, kv.shape[1]).index_copy_(0, rows.cpu(), kv.cpu())
        else:
            with self.aside(kv, rows):
                self.seen[layer].view(-1, kv.shape[1]).index_copy_(0, rows, kv)

    def read(self, layer, n):
        """The first n slots of a layer, on the device: (n, B, H, 2, d)."""
        self.wait()
        return self.kv[layer][:n].to(self.device, non_blocking=True)

    def fetch(self, layer, slot, out):
        """out[i, b, h] = what is in slot[i, b, h] of row b and head h. slot (n, B, H), out (n, B, H, 2, d): device."""
        self.wait()
        _, B, H = slot.shape
        rows = (slot * (B * H) + torch.arange(B * H, device=slot.device).view(B, H)).flatten()
        out = out.view(len(rows), -1)                                            # the pool seen as (C * B * H, 2 * d)
        if self.in_place:
            torch.index_select(self.seen[layer].view(-1, out.shape[1]), 0, rows, out=out)
            return
        if self.staging is None or self.staging.shape < out.shape:
            self.staging = self.allocate(out.shape, out.dtype)
        rows = rows.cpu()              # waits for the device, so the last copy from the staging buffer is over as well
        staging = self.staging[:len(rows)]
        torch.index_select(self.kv[layer].view(-1, out.shape[1]), 0, rows, out=staging)
        out.copy_(staging, non_blocking=True)

    def cut(self, slots):
        """The pool to go on with when what is in slots (B,) and after is forgotten."""
        return self

    def release(self, layer):
        """Give a layer's memory back."""
        self.finish()
        self.kv.pop(layer, None), self.seen.pop(layer, None)

    def wait(self):
        """What comes next on the device comes after all writes so far."""
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            if torch.cuda.is_current_stream_capturing():
                self.stream.wait_stream(here)                                    # to be part of the CUDA graph
            here.wait_stream(self.stream)

    def aside(self, *tensors):
        """A context in which the device works on the side stream, on what it has computed so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for t in tensors:
            t.record_stream(self.stream)                                         # not to be reused too early
        return torch.cuda.stream(self.stream)

    def finish(self):
        """The device has done all it was told to. Before memory is let go: PyTorch cannot know which kernels use an
        alias of it."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def __del__(self):
        if getattr(self, "stream", None) is not None and not torch.cuda.is_current_stream_capturing():
            self.finish()

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
    refresh  n: choose and fetch anew at every n-th token only; what comes in between is attended to as it comes.
    lookahead  choose and fetch for the next token with this one's query, on CUDA while other layers compute.

    A prompt (T > 1) attends exactly to everything kept; a single token is a decode step. What cannot work: ValueError.
    """

    def __init__(self, flags, *, budget=1024, keep=None, sink=4, recent=32, window=32, pool=1, rank="spread",
                 max_sentence=None, refresh=1, lookahead=False):
        for name, value, least in (("budget", budget, 1), ("sink", sink, 0), ("recent", recent, 1),
                                   ("window", window, 1), ("pool", pool, 1), ("max_sentence", max_sentence, 1),
                                   ("refresh", refresh, 1)):
            need(type(value) is int and value >= least or name == "max_sentence" and value is None,
                 f"{name} must be a whole number of at least {least}, got {value!r}")
        room = budget - sink - recent - refresh + 1
        max_sentence = min(64, -(-room // 3)) if max_sentence is None else max_sentence
        more = " + refresh - 1" if refresh > 1 else ""
        need(room > 0, f"budget {budget} must exceed sink + recent{more} = {budget - room}: raise it or lower those")
        need(max_sentence <= room, f"max_sentence {max_sentence} must fit into the rest of the budget = {room}")
        need(type(lookahead) is bool, f"lookahead must be True or False, got {lookahead!r}")
        need(keep is None or type(keep) in (int, float) and 1 <= keep < float("inf"),
             f"keep must be None (keep all) or a number of at least 1, got {keep!r}")
        need(pool % 2 == 1, f"pool must be odd, got {pool}")
        need(rank in RANKS, f"rank must be one of {', '.join(RANKS)}, got {rank!r}")
        need(isinstance(flags, torch.Tensor) and flags.dtype == torch.uint8 and flags.ndim == 1 and len(flags) > 0,
             "flags must be the (vocabulary,) uint8 tensor that sentence_flags(token_bytes) returns")
        self.settings = dict(budget=budget, keep=keep, sink=sink, recent=recent, window=window, pool=pool, rank=rank,
                             max_sentence=max_sentence, refresh=refresh, lookahead=lookahead)
        self.flags = torch.cat((flags, flags.new_tensor([0, EXTENDER])))         # [V]: unknown, a word; [-1]: padding
        self.budget, self.sink, self.recent, self.max_sentence = budget, sink, recent, max_sentence
        self.keep, self.window, self.pool_width, self.rank = keep, window, pool, RANKS[rank]
        self.refresh, self.lookahead, self.width = refresh, lookahead, budget - refresh     # places filled by a fetch
        self.length, self.layers, self.pool, self.first, self.work = 0, [], None, None, None

    def begin(self, tokens, more=0):
        """Take note of the tokens (B, T) that come next, for all layers at once; return their positions (B, T).

        Prompts of different length are filled up with -1 on the right. more: so many tokens of this prompt follow in
        further calls; vectors are made, and keep=r judges, when it is complete.
        """
        B, T = tokens.shape
        if self.length == 0:
            self._start(B, tokens.device)
        need(B == len(self.lengths), f"this cache holds {len(self.lengths)} rows, got tokens for {B}: use a new cache")
        self.new = new = (tokens >= 0).sum(1) if T > 1 else 1                    # (B,) real tokens
        self.slot = self.lengths - self.dropped                                  # (B,) the first of them goes there
        self.before = self.slot.tolist() if T > 1 else None
        need(T > 1 or not self.more, "the last piece of a prompt must have more than one token")
        self.unasked += 1
        ask = T > 1 or self.unasked == 64
        if ask:
            self._look()
        self.prune = False
        if self.unjudged and not more:
            self._judge((self.lengths + new).tolist())
        self.more = more
        spare = 64 * (ask or self.plan is None) + more                           # enough until it asks again
        self.reach = (max(self.before) if T > 1 else self.slots) + T + spare     # so many slots have to be there
        text = tokens.T.long().view(T, B, 1, 1, 1)
        self.text.reserve(0, self.length + T + spare, text)
        self.text.write(0, self.lengths + torch.arange(T, device=tokens.device)[:, None], text)
        positions = self._note(tokens, new, ask)
        self.slots = int((self.lengths - self.dropped).max()) if T > 1 else self.slots + 1
        return positions

    def _judge(self, lengths):
        """The first prompt is complete: will keep=r drop any of it?"""
        need(min(lengths) >= self.window, f"the observation window of {self.window} tokens is longer than the prompt "
             f"of {min(lengths)}: lower window, or use keep=None")
        survive = int(self.keep * self.budget)
        self.prune, self.unjudged = max(lengths) > survive, False
        if self.prune:
            self.prompt = torch.tensor(lengths, device=self.lengths.device)      # (B,) what was pruned
            self.dropped = (self.prompt - survive).clamp(min=0)

    def _note(self, tokens, new, ask):
        """Cut the next tokens (B, T) into sentences, the first new (B,) of each row; return their positions (B, T)."""
        (B, T), t = tokens.shape, torch.arange(tokens.shape[1], device=tokens.device)
        position = self.lengths[:, None] + t                                     # (B, T)
        flags = self.flags[tokens.clamp(max=len(self.flags) - 2)] * (position >= self.sink)
        flags = flags | (position == self.sink) * START                          # the sink is no text to be cut
        length = self.lengths - self.first.gather(1, self.current.clamp(min=0)[:, None])[:, 0]      # (B,) it is open
        starts, ended, _ = segment(flags, self.ended, length, self.max_sentence)
        self.ended.copy_(ended)
        real = t < (new[:, None] if T > 1 else 1)                                # (B, T)
        starts &= real & (position >= self.sink)
        ids = self.current[:, None] + starts.cumsum(1)                           # (B, T) sentence of each; sink: -1
        self.current.copy_(ids[:, -1])
        # A token starts one sentence at most. So the host asks the device for their number with a prompt, and else only
        # once in 64 steps, and makes room for as many more: the one sync of a decode step.
        if ask:
            self.unasked = 0
            self.pool.wait()                                                     # no fetch uses what is replaced now
            more = max(int(self.current.max()) + 65 - self.first.shape[1], 0)
            unborn = self.first[:, -1:].expand(-1, more)                         # sentences start after the last token
            self.first = torch.cat((self.first, unborn), dim=1)
            for mem in self.layers:
                mem.vectors = F.pad(mem.vectors, (0, 0, 0, more))
        count = torch.zeros_like(self.first).scatter_add_(1, ids + 1, real.long().expand(B, T))
        self.first += count.cumsum(1)                                            # tokens before each sentence
        self.lengths += new
        self.length = int(self.lengths.max()) if T > 1 else self.length + 1
        self.queries.copy_(torch.where(starts[:, -1], 1, self.queries + 1) if T == 1 else self.queries * 0)
        self._divide(ask, T == 1)
        return position

    def _divide(self, ask, decode):
        """Where the tail starts now, and if a token is to be decoded: what is fetched for it, the same in all layers.

        far (B,): number of sentences wholly before the recent window, so also the index of the one that the tail starts
        with. The places of `work` hold the sink, the tail, the best sentences, and then the tokens since the fetch.
        """
        oldest = (self.lengths - self.recent).clamp(min=0)[:, None]              # (B, 1)
        far = (torch.searchsorted(self.first, oldest, right=True) - 1).clamp(min=0)          # (B, 1)
        tail, end = self.first.gather(1, torch.cat((far, far + 1), dim=1)).split(1, dim=1)   # (B, 1) of that sentence
        self.far, self.tail = far[:, 0], tail[:, 0]
        if ask:                                                                  # how many to rank until it asks again
            enough = self.budget if self.prompt is not None else enough_sentences(self.first.diff(), self.budget) + 64
            self.ranked = min(self.first.shape[1] - 1, self.budget, enough)
        if not decode:
            self.plan, self.fetch_next = None, False                             # what was fetched is of no use now
            return
        if self.fetch_next:                                                      # with the token before
            self.plan, self.since = self.next_plan, 0
        self.fetch_now = self.plan is None or self.since == self.refresh
        if self.fetch_now:
            self.plan, self.since = self._plan(far, tail, self.lengths[:, None] - 1), 0
        plan, t = self.plan, tail + torch.arange(self.max_sentence, device=far.device)       # (B, max_sentence)
        # The tail's first sentence: where its tokens t are, and which of them are there.
        self.oldest_place = torch.where(t < plan.base, t - plan.tail + self.sink, t - plan.base + self.width)
        self.oldest_place = self.oldest_place.clamp(max=self.budget - 1).T       # (max_sentence, B)
        self.oldest_ids = 1 - (t < end).long().T                                 # 0: there, 1: not
        self.since += 1
        self.fetch_next = self.lookahead and self.since == self.refresh
        if self.fetch_next:
            self.next_plan = self._plan(far, tail, self.lengths[:, None].clone())

    def _plan(self, far, tail, base):
        """A fetch from the pool's first `base` tokens: near (B,) of them are always taken, from slots slot (B, width);
        the rest are candidates: (B, S) start and count of each sentence, 0 if it is near. All arguments (B, 1)."""
        j = torch.arange(self.width, device=far.device)
        slot = torch.where(j < self.sink, j, tail - self.dropped[:, None] + j - self.sink)
        near, start = torch.minimum(base, base - tail + self.sink), self._slots()
        not_far = torch.arange(self.first.shape[1] - 1, device=far.device) >= far            # (B, S)
        return SimpleNamespace(base=base, tail=tail, slot=slot, near=near[:, 0], is_near=j < near, not_far=not_far,
                               start=start, count=start.diff().masked_fill(not_far, 0))

    def _start(self, B, device):
        """The state before the first token."""
        self.flags, self.pool, self.text = self.flags.to(device), HostPool(device), HostPool(device)     # text: tokens
        self.lengths, self.dropped = torch.zeros(2, B, dtype=torch.long, device=device).unbind()         # (B,) tokens
        self.unjudged, self.prompt, self.slots = self.keep is not None, None, 0  # slots: of the row that has most
        self.more = 0
        self._rewind()

    def _rewind(self):
        """No token seen yet, as far as sentences are concerned. A decode step changes these in place (CUDA graphs)."""
        zeros, S = torch.zeros_like, self.first.shape[1] if self.layers else 1
        self.lengths = zeros(self.lengths)
        self.current, self.ended = self.lengths - 1, zeros(self.lengths)         # (B,) open sentence; see segment
        self.queries = zeros(self.lengths)                                       # (B,) number of queries in query_sum
        self.first = self.lengths[:, None].repeat(1, S)                          # (B, S + 1)
        self.plan, self.since, self.fetch_next = None, 0, False                  # tokens since the last fetch
        self.unasked = 63                                                        # steps since the host asked; see _note
        self.broken = torch.full((), -1, device=self.lengths.device)             # where NaN came in

    def attend(self, layer, q, k, v):
        """Store the new tokens' k and v (B, H, T, d); the attention output of q (B, Hq, T, d) is (B, Hq, T, d)."""
        (B, Hq, T, d), H = q.shape, k.shape[1]
        if layer == len(self.layers):
            vectors = k.new_zeros(B, H, self.first.shape[1] - 1, self.rank[0] * d)
            self.new_layer(vectors, query_sum=torch.zeros(B, Hq, d, device=k.device))        # float32
        kv = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4).contiguous()      # (T, B, H, 2, d) as in the pool
        self._watch(layer, q, kv)
        return self._decode(layer, q, kv) if T == 1 else self._prompt(layer, q, kv)

    def new_layer(self, vectors, query_sum):
        """What one layer keeps on the device."""
        nothing = dict.fromkeys(("kept_before", "asked", "fetched", "work", "valid", "ready"))
        self.layers.append(SimpleNamespace(vectors=vectors, query_sum=query_sum, **nothing))

    def _watch(self, layer, *tensors):
        """Note the first layer and token where NaN or inf came in; the CPU says so at once, CUDA when the host asks."""
        fine = torch.stack([extreme for x in tensors for extreme in x.aminmax()]).isfinite().all()
        self.broken.copy_(torch.where(fine | (self.broken >= 0), self.broken, self.lengths.max() * 4096 + layer))
        if not fine.is_cuda:
            self._look()

    def _look(self):
        """ValueError if NaN or inf has come in; the one look at what the device has noted."""
        token, layer = divmod(int(self.broken), 4096)
        need(token < 0, f"NaN or inf in q, k or v of layer {layer} at or before token {token}: this cache is of no use "
             "from there on; check the weights, or take a wider dtype, then truncate() it or use a new one")

    def _slots(self, kept_before=None):
        """(B, S + 1) slot of each sentence's first token.

        A sentence of a pruned prompt starts after the survivors before it, a later one at its position less all that
        was dropped: each is the larger number of the two.
        """
        start = self.first - self.dropped[:, None]
        if kept_before is not None:
            start = torch.maximum(F.pad(kept_before, (0, start.shape[1] - kept_before.shape[1])), start)
        return start

    def _prompt(self, layer, q, kv):
        """T > 1 tokens: exact attention to everything kept, then sort them into the buffers."""
        mem, (B, _, T, _), S = self.layers[layer], q.shape, self.first.shape[1] - 1
        row = torch.arange(B, device=q.device)
        slot = self.slot + torch.arange(T, device=q.device)[:, None]             # (T, B)
        new = kv
        if any(self.before):                                                     # what is kept, then the new
            kv = torch.cat((self.pool.read(layer, max(self.before)), torch.zeros_like(kv)))
            kv[slot, row] = new
        keys, values = kv.permute(3, 1, 2, 0, 4)                                 # (B, H, N, d) each, views
        out = attend_causal(q, keys, values, self.before)
        mem.asked = self._last_queries(q, mem.asked) if self.unjudged or self.prune else None
        if self.prune:
            window = self.lengths[:, None] + torch.arange(-self.window, 0, device=q.device)      # (B, window) positions
            alpha = importance(mem.asked, keys, window, self.pool_width)
            kept = survivors(alpha, self.slots, self.sink, self.tail, self.lengths)      # (B, slots)
            mem.kept_before, mem.asked = torch.searchsorted(kept, self.first), None      # survivors before sentence s
            new = kv = kv[kept.T, row]                                           # (slots, B, H, 2, d)
            slot = torch.arange(self.slots, device=q.device)[:, None].expand(-1, B)
            self.pool.release(layer)
        self.pool.reserve(layer, self.slots + 64 if self.prune else self.reach, kv)
        self.pool.write(layer, slot, new)
        if self.more:
            return out
        start = self._slots(mem.kept_before)
        slot = torch.arange(len(kv), device=q.device).expand(B, -1).contiguous()
        ids = torch.searchsorted(start, slot, right=True)                        # (B, N) sentence + 1; padding: S + 1
        mem.vectors = self.rank[1](kv[..., 0, :], ids.T, S + 2)[1:-1].permute(1, 2, 0, 3).contiguous()    # (B, H, S, w)
        return out

    def _last_queries(self, q, before):
        """(B, Hq, window, d) of each row's last tokens, of which some may be `before` those of q (B, Hq, T, d)."""
        at = (self.new[:, None] + torch.arange(-self.window, 0, device=q.device))[:, None, :, None]
        at = at.expand(*q.shape[:2], -1, q.shape[3])
        asked = q.gather(2, at.clamp(min=0))
        if before is None:
            return asked
        return torch.where(at < 0, before.gather(2, (at + self.window).clamp(max=self.window - 1)), asked)

    def _decode(self, layer, q, kv):
        """One token: fetch what it should see, attend to that and to itself. No loop, and with zero copy no sync."""
        (B, Hq, _, d), H, mem = q.shape, kv.shape[2], self.layers[layer]
        row = torch.arange(B, device=q.device)
        if mem.ready is not None:
            torch.cuda.current_stream(q.device).wait_event(mem.ready)            # it was fetched with the token before
        # The first query of a sentence, or after a prompt, starts the sum anew.
        # Paper: Sec. 4.2 forms the mean query when a sentence is complete, but Algorithm 1 at every token, as here.
        mem.query_sum.masked_fill_(self.queries[:, None, None] == 1, 0).add_(q[:, :, 0])
        q = q.view(B, H, Hq // H, d)                                             # a group's query heads: G queries
        if mem.work is None:                                                     # one for all layers, if it may be
            shared = self.work if self.refresh == 1 and not self.lookahead else None
            mem.work = self.work = kv.new_zeros(self.budget, B, H, 2, d) if shared is None else shared
        self.pool.reserve(layer, self.reach, kv)
        if self.fetch_now:
            self._fetch(layer, q, self.plan)
        self.pool.write(layer, self.slot[None], kv)                              # overlaps with the rest of the layer
        place = self.width + self.since - 1
        mem.work[place] = kv[0]
        keys, values = mem.work[:place + 1].permute(3, 1, 2, 0, 4)               # (B, H, n, d) each
        mask = F.pad(mem.valid, (0, self.since), value=True)[:, :, None]         # (B, H, 1, n)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(B, Hq, 1, d)          # Eq. 3

        # The tail's first sentence gets its vector now, before it leaves.
        oldest = mem.work[self.oldest_place, row][..., 0, :]                     # (max_sentence, B, H, d)
        mem.vectors[row, :, self.far] = self.rank[1](oldest, self.oldest_ids, 2)[0]              # (B, H, w)
        if self.fetch_next:
            with self.pool.aside(q):
                self._fetch(layer, q, self.next_plan)
                mem.ready = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
        return out

    def _fetch(self, layer, q, plan):
        """Rank the sentences for q (B, H, G, d), and fill the layer's places with what is near and with the best."""
        mem, (B, H, _, _) = self.layers[layer], q.shape
        query = self.rank[2](q, mem.query_sum.view(q.shape), self.queries)       # (B, H, w)
        scores = (query[:, :, None] @ mem.vectors.transpose(2, 3))[:, :, 0]      # (B, H, S)
        start, count = plan.start, plan.count
        if mem.kept_before is not None:                                          # in every layer, others have survived
            start = self._slots(mem.kept_before)
            count = start.diff().masked_fill(plan.not_far, 0)
        slot, valid, *mem.fetched = select(scores, start[:, :-1], count, plan.near, self.width, self.ranked)
        slot = torch.where(plan.is_near[:, None], plan.slot[:, None], slot.masked_fill(~valid, 0))  # unused: any slot
        self.pool.fetch(layer, slot.permute(2, 0, 1), mem.work[:self.width])
        mem.valid = valid

    def steady(self):
        """Will the next decode step launch what this one did? Then a CUDA graph may do it: advance() and a replay."""
        need(self.refresh == 1 and not self.lookahead, "a CUDA graph needs refresh=1 and lookahead=False")
        return self.plan is not None and self.unasked < 63 and self.pool.in_place and self.text.in_place

    def advance(self):
        """The host's part of a decode step."""
        self.length, self.slots, self.unasked = self.length + 1, self.slots + 1, self.unasked + 1

    def join(self):
        """What comes next on the device comes after all that runs beside it."""
        self.pool.wait()
        self.text.wait()

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens (one number, or one per row): as if those had been one prompt.

        The mean query starts anew. ValueError for none, for more than there are, or for a part of a pruned prompt.
        """
        self.whole("truncate()")
        have = self.lengths.tolist()
        wanted = [lengths] * len(have) if type(lengths) is int else list(lengths)
        least = [1] * len(have) if self.prompt is None else self.prompt.tolist()
        need(len(wanted) == len(have) and all(type(n) is int and a <= n <= b for a, n, b in zip(least, wanted, have)),
             f"truncate() takes lengths from {least} (what keep=r has pruned is gone) to {have}, got {lengths}")
        lengths = self.lengths = torch.tensor(wanted, device=self.lengths.device)
        self.length = max(wanted)
        self.text, self.pool = self.text.cut(lengths), self.pool.cut(lengths - self.dropped)
        self._replay(self.tokens(), lengths)

    def whole(self, what):
        """ValueError while a prompt is read in pieces: `what` needs all of it."""
        need(self.length and not self.more, f"{what} needs a cache that has read a whole prompt")

    def _replay(self, tokens, lengths):
        """The state after these tokens (B, T), whose keys and values are in the pool."""
        self._rewind()
        self._note(F.pad(tokens, (0, 1), value=-1), lengths, ask=True)           # one at least is padding: a prompt
        self.slots = int((self.lengths - self.dropped).max())

    def tokens(self):
        """All tokens (B, length) that went in, -1 after the end of a shorter row."""
        tokens = self.text.read(0, self.length).view(self.length, -1).T
        return tokens.masked_fill(torch.arange(self.length, device=tokens.device) >= self.lengths[:, None], -1)

    def fork(self):
        """A second cache that goes on from here by itself; it shares the host pool, what is on the device is copied."""
        from experiments.living import fork
        return fork(self)

    def save(self, path):
        """Write all of it to one file; a kill at any moment leaves the file as it was, or the new one."""
        from experiments.living import save
        save(self, path)

    @classmethod
    def load(cls, path, model):
        """The cache that was saved, for the same model; its pool stays in the file until it is used (memory-mapped)."""
        from experiments.living import load
        return load(cls, path, model)

    def fetched(self):
        """What the last decode step fetched: sentence and taken, (layers, B, H, k) each, the best sentence first.

        taken is the number of tokens fetched of it, from its start; sentence s of row b is tokens first[b, s] to
        first[b, s + 1] - 1 of the text, as long as keep=r has dropped none of it.
        """
        need(self.layers and self.layers[0].fetched, "nothing was fetched yet: this tells about the last decode step")
        self.pool.wait()
        return [torch.stack(x) for x in zip(*(mem.fetched for mem in self.layers))]

    def memory(self):
        """Bytes of all buffers that exist: {"device": ..., "host": ...}; a fork counts what it shares as well."""
        size = lambda *tensors: sum(t.nbytes for t in tensors if t is not None)
        layers = [size(mem.vectors, mem.query_sum, mem.kept_before, mem.asked) for mem in self.layers]
        works = {id(mem.work): mem.work for mem in self.layers}                  # one for all, or one each
        pools = [size(pool.staging, *pool.kv.values()) for pool in (self.pool, self.text) if pool]
        return {"device": size(self.flags, self.first, *works.values()) + sum(layers), "host": sum(pools)}

def main():
    from experiments.ask import main  # the command line lives beside the method; see --help
    return main()

if __name__ == "__main__":
    raise SystemExit(main())
