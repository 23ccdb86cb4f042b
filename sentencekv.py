"""SentenceKV (arXiv 2504.00970, COLM 2025) in one file: a KV cache that is kept as sentences.

A language model's KV cache grows with its context. Here the keys and values wait in CPU memory, cut into sentences.
The accelerator holds one small semantic vector per sentence, layer and KV head; at every decode step these rank the
sentences, and a token budget is filled: the first tokens (sink), the last ones (recent), then the best sentences.

    sink         | far: whole sentences, reached by their vectors   | tail: recent window, rounded out to sentences
    always taken | the best are taken until the budget is full      | always taken

Whether it came in a prompt or was generated, a token's K and V go to the host pool at once, and into the vector of its
sentence. At a decode step one fetch brings all that is attended to, near or far. So a sentence that leaves the recent
window moves no data, the device holds vectors and token ids, and nothing that is kept is ever unreachable.

A step: begin() notes which sentence the token belongs to, where the tail starts, and which slots are always fetched
(once for all layers); then attend() in each layer ranks the sentences (RANKS), takes the best (select), fetches
(HostPool), attends, stores the token's K and V, and makes the vector of its sentence anew. That is _decode and _fetch.
For a first reading: RANKS and select, then the class from begin() to _fetch(); what is above them as it comes up.

B rows of a batch, T new tokens, d head width, Hq query heads, H key-value heads, G = Hq / H of them share one.
    code               paper     shape                  where
    budget             tau       int                    -       most tokens attended to, per KV head and step
    keep, window       r, N      numbers                -       floor(r * tau) tokens survive; N queries judge which
    importance         alpha_i   (B, T)                 device  attention that a token gets from the window (Sec. 4.1)
    mem.vectors        kbar_s,h  (B, H, S, w)           device  semantic vector of each sentence, w = d or 2d (Eq. 1)
    mem.query_sum      Q_s       (B, Hq, d)             device  sum of the queries of the sentence being generated
    query              qbar      (B, H, w)              device  mean over G of their mean (Eq. 2), or as the rule says
    pool.kv[l]         K, V      (C, B, H, 2, d)        host    every kept token: [..., 0, :] keys, [..., 1, :] values
    mem.work           -         (B, H, budget, 2, d)   device  what is attended to in one step; refresh=1: once
    lengths, dropped   -         (B,)                   device  tokens so far; how many of them keep=r has dropped
    first              -         (B, S + 1)             device  sentence s is tokens first[s] to first[s + 1] - 1
    far, tail          -         (B, 1)                 device  number of far sentences; position where the tail starts
    plan               -         see _plan              device  what a fetch takes in any case, the same in all layers
`mem` is layers[l], what one layer keeps on the device (new_layer); the rest is kept once for all layers. A token's
*position* counts the text, its *slot* the pool; they differ by what keep=r has dropped. Where we differ from the paper,
and why, is said in place after the word "Paper:".
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
SOFT, HARD, EXTENDER, SPACE, START = 1, 2, 4, 8, 16    # what a token can be, see sentence_flags; START: sink ends

def sentence_flags(token_bytes):
    """What each token of a vocabulary means for sentence ends: list of bytes (None: special token) -> (V,) uint8.

    HARD ends a sentence, SOFT does if white space follows; an EXTENDER (closing quotes, white space) belongs to the
    sentence that has just ended; SPACE begins with white space, or is an extender that has some. Made once per
    tokenizer, from its own bytes.

    >>> sentence_flags([b"end.", b".\\n\\n", b'."', b")", b" The", None]).tolist()
    [1, 2, 1, 4, 8, 2]
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

def continue_sentence(flag, ended, length, cap):
    """One token further -> (does it start a sentence?, ended, length). All Python ints, or all tensors (B,).

    ended: how the token before left its sentence: 0 open, SOFT closed if white space follows, HARD closed; length:
    tokens in the sentence so far.
    """
    space, word = (flag & SPACE) > 0, (flag & EXTENDER) == 0
    over = (ended == HARD) | (ended == SOFT) & space             # white space after the full stop
    start = over & word | ((flag & START) > 0) | (length % cap == 0)
    closed = over | ((flag & HARD) > 0)                          # an extender may close it, but never opens it
    ended = word * (flag & (SOFT | HARD)) + (word == 0) * (closed * HARD + (closed == 0) * ended)
    return start, ended, (start == 0) * length + 1

def segment(flags, ended, length, cap):
    """Which of T new tokens start a sentence. One rule: a prompt is cut on the host, a single token on its device.

    flags (B, T): of the new tokens; beside those of sentence_flags, START begins a sentence in any case. ended and
    length (B,) are carried over from the tokens before, see continue_sentence. No sentence grows longer than `cap`.
    Returns starts (B, T) bool and the new (ended, length).

    >>> hello, stop, quote, says, two = 0, SOFT, EXTENDER, SPACE, SPACE         # hello . " says two
    >>> segment(torch.tensor([[hello, stop, quote, says, two]]), torch.tensor([0]), torch.tensor([0]), 64)[0].int()
    tensor([[1, 0, 0, 1, 0]], dtype=torch.int32)
    """
    if flags.shape[1] == 1:
        start, ended, length = continue_sentence(flags[:, 0], ended, length, cap)
        return start[:, None], ended, length
    starts, states = [], []
    for row, e, n in zip(flags.tolist(), ended.tolist(), length.tolist()):
        starts.append([])
        for flag in row:
            start, e, n = continue_sentence(flag, e, n, cap)
            starts[-1].append(start)
        states.append((e, n))
    return torch.tensor(starts, device=flags.device), *torch.tensor(states, device=flags.device).unbind(1)

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
        logits = (q[:, h] * d ** -0.5 @ k[:, h].transpose(1, 2)).float()         # scaled first: float16 is small
        alpha += logits.masked_fill(future, float("-inf")).softmax(-1).sum(1)
    return F.max_pool1d(alpha[:, None], pool, stride=1, padding=pool // 2)[:, 0]

def survivors(alpha, count, sink, tail, length):
    """The `count` tokens that keep=r leaves, in order: alpha (B, T), tail (B, 1), length (B,) -> (B, count).

    The first `sink` and those from `tail` on are always attended to, so they come first; then the highest alpha. A row
    of fewer than `count` tokens keeps all of its own, in front.
    Prompt-wide, not per sentence: a long dull sentence keeps few tokens (paper, A.7).
    """
    t = torch.arange(alpha.shape[1], device=alpha.device)
    alpha = alpha.masked_fill((t < sink) | (t >= tail), float("inf")).masked_fill(t >= length[:, None], -1)
    return alpha.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values    # ties: the earlier

def reduce_keys(x, ids, S, how):
    """x (N, B, w), row b's token i in sentence ids[i, b] of S -> (S, B, w); how: "sum" or "amax"."""
    index = ids[:, :, None].expand(x.shape)
    return x.new_zeros(S, *x.shape[1:]).scatter_reduce_(0, index, x, how, include_self=False)

# ------------------------------------------------------------------------------------- 3. decode: rank and select

def mean_and_deviation(total, n):
    """(mean, standard deviation) of n keys, element by element, from the sum of their [k, k * k]: (..., 2d)."""
    mean, square = (total / n).chunk(2, dim=-1)
    return torch.cat((mean, (square - mean * mean).clamp(min=0).sqrt()), dim=-1)

def halfway(q, total, n):
    """The query halfway between q and the mean query, with the absolute values of its elements: (B, H, G, 2d)."""
    q = (q + total / n) / 2
    return torch.cat((q, q.abs()), dim=-1)

# A rule says what each key k (..., d) of a sentence brings in, (..., w), and how that is joined, all at once or one by
# one; the vector made of what n keys have brought; and what it is multiplied with, made of q and of the sum of the
# sentence's n queries, (B, H, G, d) each. The G query heads of a group share one ranking: the mean of theirs.
# Paper: "mean", qbar . kbar; but a mean is blind to a key that stands out. "bounds": no key of a sentence has a larger
# product with q than relu(q) . max k + relu(-q) . max -k (as in Quest). "spread": how large a product can be expected,
# q . mean k + |q| . deviation of k.
RANKS = {
    "mean": SimpleNamespace(width=1, brings=lambda k: k, join=torch.add, how="sum", vector=lambda total, n: total / n,
                            query=lambda q, total, n: total / n),
    "bounds": SimpleNamespace(width=2, brings=lambda k: torch.cat((k, -k), dim=-1), join=torch.maximum, how="amax",
                              vector=lambda most, n: most,
                              query=lambda q, total, n: torch.cat((q, -q), dim=-1).relu()),
    "spread": SimpleNamespace(width=2, brings=lambda k: torch.cat((k, k * k), dim=-1), join=torch.add, how="sum",
                              vector=mean_and_deviation, query=halfway),
}
PAPER = dict(rank="mean", keep=2, budget=1024, sink=32, recent=32, window=32, pool=7)   # settings of paper and code

def select(scores, start, count, near, width, k):
    """Whole sentences in descending score until the budget is full; the last one is cut (Algorithm 1).

    scores (B, H, S); sentence s has count (B, S) tokens, from slot start (B, S) on; a count of 0: no candidate. There
    are `width` places, the first near (B,) of them are taken; the best k sentences fill the rest, or what they can.
    No loop and no ragged tensor: laid end to end, a place belongs to the last sentence that has begun there.
    Returns slot (B, H, width), valid (B, H, width), sentence (B, H, k), taken (B, H, k): tokens taken of each.

    >>> scores, start, count = torch.tensor([[[1., 9., 5.]]]), torch.tensor([[0, 3, 5]]), torch.tensor([[3, 2, 4]])
    >>> slot, valid, sentence, taken = select(scores, start, count, torch.tensor([1]), 6, 3)
    >>> slot[0, 0, 1:].tolist(), sentence.tolist(), taken.tolist()
    ([3, 4, 5, 6, 7], [[[1, 2, 0]]], [[[2, 3, 0]]])
    """
    (B, H, S), device = scores.shape, scores.device
    start, count = start[:, None].expand(B, H, S), count[:, None].expand(B, H, S)
    sentence = scores.masked_fill(count == 0, float("-inf")).topk(k, dim=-1).indices        # (B, H, k)
    near = near[:, None, None].expand(B, H, 1)
    stop = (count.gather(2, sentence).cumsum(-1) + near).clamp(max=width)       # (B, H, k) places begin .. stop - 1
    begin = torch.cat((near, stop[..., :-1]), dim=-1)
    begun = torch.zeros(B, H, width + 1, dtype=torch.long, device=device).scatter_add_(2, begin, torch.ones_like(begin))
    owner = (begun.cumsum(-1)[..., :-1] - 1).clamp(min=0)                        # (B, H, width)
    j = torch.arange(width, device=device)
    return (start.gather(2, sentence) - begin).gather(2, owner) + j, j < stop[..., -1:], sentence, stop - begin

def attend_causal(q, k, v, before, step=512):
    """Exact attention of T new tokens to themselves and all before them, in slices: nothing ever has T * N elements.

    q (B, Hq, T, d), k and v (B, H, N, d) -> (B, Hq, T, d); the new tokens of row b follow on its `before[b]` old ones.
    """
    if len(set(before)) > 1:                                                     # row by row
        return torch.cat([attend_causal(*(x[b:b + 1] for x in (q, k, v)), [n], step) for b, n in enumerate(before)])
    T, out = q.shape[2], []
    for i in range(0, T, step):
        t = min(step, T - i)
        seen = before[0] + i + t                                                 # keys that the last of the t sees
        out.append(F.scaled_dot_product_attention(q[:, :, i:i + t], k[:, :, :seen], v[:, :, :seen],
                                                  causal_lower_right(t, seen), enable_gqa=True))
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
    cannot be, the CPU gathers into a pinned buffer, which PyTorch hands out again when its copy is over.
    """

    def __init__(self, device):
        self.device, self.kv, self.seen = device, {}, {}                         # seen[l]: kv[l] as the device sees it
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
        rows = (slot * B + torch.arange(B, device=slot.device)).flatten()        # the pool seen as (C * B, H * 2 * d)
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
        """out[b, h, i] = what row b and head h have in slot[b, h, i]. slot (B, H, n), out (B, H, n, 2, d): device."""
        self.wait()
        B, H, n = slot.shape
        rows = (slot * (B * H) + torch.arange(B * H, device=slot.device).view(B, H, 1)).flatten()
        out = out.view(B * H * n, -1)                                            # the pool seen as (C * B * H, 2 * d)
        if self.in_place:
            torch.index_select(self.seen[layer].view(-1, out.shape[1]), 0, rows, out=out)
        else:
            staging = torch.empty(out.shape, dtype=out.dtype, pin_memory=self.pinned, device="cpu")
            torch.index_select(self.kv[layer].view(-1, out.shape[1]), 0, rows.cpu(), out=staging)
            out.copy_(staging, non_blocking=True)

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
        """The device has done all it was told to. Before memory is let go: PyTorch does not know what uses an alias."""
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
    max_sentence  longer sentences are cut here; default 64, or a third of what sink and recent leave if that is less:
             the window, rounded out to whole sentences, must not eat up what is left for fetching.
    refresh  n: choose and fetch anew at every n-th token only; what comes in between is attended to as it comes.

    A prompt (T > 1) attends exactly to everything kept; a single token is a decode step, to which every row brings one.
    What cannot work: ValueError.
    """

    def __init__(self, flags, *, budget=1024, keep=None, sink=4, recent=32, window=32, pool=1, rank="spread",
                 max_sentence=None, refresh=1):
        for name, value, least in (("budget", budget, 1), ("sink", sink, 0), ("recent", recent, 1),
                                   ("window", window, 1), ("pool", pool, 1), ("max_sentence", max_sentence, 1),
                                   ("refresh", refresh, 1)):
            need(type(value) is int and value >= least or name == "max_sentence" and value is None,
                 f"{name} must be a whole number of at least {least}, got {value!r}")
        room = budget - sink - recent - refresh + 1
        max_sentence = min(64, -(-room // 3)) if max_sentence is None else max_sentence
        also = " + refresh - 1" if refresh > 1 else ""
        need(room > 0, f"budget {budget} must exceed sink + recent{also} = {budget - room}: raise it or lower those")
        need(max_sentence <= room, f"max_sentence {max_sentence} must fit into the rest of the budget = {room}")
        need(keep is None or type(keep) in (int, float) and 1 <= keep < float("inf"),
             f"keep must be None (keep all) or a number of at least 1, got {keep!r}")
        need(pool % 2 == 1, f"pool must be odd, got {pool}")
        need(rank in RANKS, f"rank must be one of {', '.join(RANKS)}, got {rank!r}")
        need(isinstance(flags, torch.Tensor) and flags.dtype == torch.uint8 and flags.ndim == 1 and len(flags) > 0,
             "flags must be the (vocabulary,) uint8 tensor that sentence_flags(token_bytes) returns")
        self.settings = dict(budget=budget, keep=keep, sink=sink, recent=recent, window=window, pool=pool, rank=rank,
                             max_sentence=max_sentence, refresh=refresh)
        self.flags = torch.cat((flags, flags.new_tensor([0, EXTENDER])))         # [V]: unknown, a word; [-1]: padding
        self.budget, self.sink, self.recent, self.max_sentence = budget, sink, recent, max_sentence
        self.keep, self.window, self.pool_width, self.rule = keep, window, pool, RANKS[rank]
        self.survive = None if keep is None else int(keep * budget)
        self.refresh, self.width = refresh, budget - refresh                     # places filled by a fetch
        self.length, self.layers = 0, []
        self.pool = self.first = self.plan = self.shape = None
        self.turn = None                                                         # the layer that attends next

    def begin(self, tokens, more=0):
        """Take note of the tokens (B, T) that come next, for all layers at once; return their positions (B, T).

        Prompts of different length are filled up with -1 on the right. more: so many tokens of this prompt follow in
        further calls; vectors are made, and keep=r judges, when it is complete.
        """
        need(tokens.ndim == 2 and 0 not in tokens.shape and tokens.dtype in (torch.int64, torch.int32),
             f"tokens must be int64 of shape (batch, at least 1), got {tokens.dtype} {tuple(tokens.shape)}")
        need(type(more) is int and more >= 0, f"more must be the number of tokens that follow, got {more!r}")
        B, T = self.shape = tuple(tokens.shape)
        if self.length == 0:
            self._start(B, tokens.device)
        need(B == len(self.lengths), f"this cache holds {len(self.lengths)} rows, got tokens for {B}: use a new cache")
        need(T > 1 or not (more or self.more), "every piece of a prompt must have more than one token")
        # The host looks at the device's numbers with a prompt, and else once in 64 tokens, which is the one sync of a
        # decode step; then it makes room for 64 more.
        look = T > 1 or self.length % 64 == 0
        self.slot = self.lengths - self.dropped                                  # (B,) where the first new token goes
        self.prune = False
        if look:
            self._look()
            self.before = self.slot.tolist()                                     # slots in use, per row
        need(self.turn is None or self.turn == len(self.layers) > 0, f"begin() came when {self.turn} of "
             f"{len(self.layers)} layers had attended: every forward needs all of them")
        new = (tokens >= 0).sum(1) if T > 1 else torch.ones_like(self.lengths)   # (B,) real tokens
        need(T == 1 or torch.equal(tokens >= 0, torch.arange(T, device=tokens.device) < new[:, None]),
             "-1 is padding: it may only follow after the tokens of a row")
        if self.unjudged and not more:                                           # the first prompt is complete
            lengths = self.lengths + new
            self.prune = int(lengths.max()) > self.survive
            need(not self.prune or int(lengths.min()) >= self.window, f"the observation window of {self.window} tokens "
                 f"is longer than the prompt of {int(lengths.min())}: lower window, or use keep=None")
            self.unjudged = False
            if self.prune:
                self.prompt, self.dropped = lengths, (lengths - self.survive).clamp(min=0)
        self.more, self.turn = more, 0
        if look:
            self.reach = (self.survive if self.prune else max(self.before) + T) + 64 + more      # slots that must exist
        return self._note(tokens, new, look)

    def _note(self, tokens, new, look):
        """Cut the next tokens (B, T) into sentences, the first new (B,) of each row; return their positions (B, T)."""
        (B, T), t = tokens.shape, torch.arange(tokens.shape[1], device=tokens.device)
        position = self.lengths[:, None] + t                                     # (B, T)
        # Which of them start a sentence?
        flags = self.flags[tokens.clamp(max=len(self.flags) - 2)] * (position >= self.sink)
        flags = flags | (position == self.sink) * START                          # the sink is no text to be cut
        size = self.lengths - self.first.gather(1, self.current.clamp(min=0)[:, None])[:, 0]
        starts, ended, self.size = segment(flags, self.ended, size, self.max_sentence)       # size: of the open one
        real = t < new[:, None]                                                  # (B, T)
        starts &= real & (position >= self.sink)
        ids = self.current[:, None] + starts.cumsum(1)                           # (B, T) sentence of each; sink: -1
        self.ended.copy_(ended)
        self.current.copy_(ids[:, -1])
        self.starts = starts[:, -1]                                              # (B,) does the last token start one?
        self.queries.copy_(torch.where(self.starts, 1, self.queries + 1) * (T == 1))
        if look:
            self._make_room(T)
        # The table of sentences.
        self.text.scatter_(1, position, tokens.int())
        self.lengths += new
        self.length = self.length + 1 if T == 1 else int(self.lengths.max())
        s = torch.arange(self.first.shape[1], device=ids.device).repeat(B, 1)    # (B, S + 1)
        self.added = torch.searchsorted(ids.masked_fill(~real, s.shape[1]), s)   # (B, S + 1) new tokens before each
        self.first += self.added
        if look:  # rank so many that they fill the budget whichever they are: as the shortest do, and those born next
            size, most = self.first.diff().sort(1).values, min(self.first.shape[1] - 1, self.budget)         # 0: unborn
            enough = int(((size.cumsum(1) < self.budget) & (size > 0)).sum(1).max()) + 65
            enough = most if self.prompt is not None else min(enough, most)      # pruned ones may be as short as can be
            if T > 1 or self.ranked < enough:                                    # seldom another number: CUDA graphs
                self.ranked = min(enough + 64, most)
        # far: sentences wholly before the recent window, so also the index of the one that the tail starts with.
        oldest = (self.lengths - self.recent).clamp(min=0)[:, None]              # (B, 1)
        self.far = (torch.searchsorted(self.first, oldest, right=True) - 1).clamp(min=0)     # (B, 1)
        self.tail = self.first.gather(1, self.far)                               # (B, 1) position
        self.since = self.refresh if T > 1 else self.since % self.refresh + 1    # tokens since a fetch, with this one
        self.plan = self._plan(self.lengths[:, None] - 1) if T == 1 and self.since == 1 else None
        return position

    def _make_room(self, T):
        """For T tokens and 64 more, each of which starts one sentence at most; when generating, seldom and for many."""
        self.pool.wait()                                                         # no fetch uses what is replaced now
        if self.text.shape[1] < self.length + T + 64:
            self.text = F.pad(self.text, (0, self.length // 8 + T + 1024), value=-1)
        extra = int(self.current.max()) + 65 - self.first.shape[1]
        if extra > 0:
            extra += (64 + self.first.shape[1] // 16) * (T == 1)
            grown = lambda x: torch.cat((x, x[:, -1:].expand(-1, extra)), dim=1) # the unborn start after the last token
            self.first = grown(self.first)
            for mem in self.layers:
                mem.vectors = F.pad(mem.vectors, (0, 0, 0, extra))
                mem.start = None if mem.start is None else grown(mem.start)

    def _plan(self, base):
        """A fetch of tokens before position base (B, 1): near (B,) of them are always taken, those marked in is_near
        (B, width), from slot (B, width); the sentences marked in is_far (B, S) are ranked for the other places."""
        j = torch.arange(self.width, device=base.device)
        slot = torch.where(j < self.sink, j, self.tail - self.dropped[:, None] + j - self.sink)
        near = torch.minimum(base, base - self.tail + self.sink)                 # (B, 1)
        is_far = torch.arange(self.first.shape[1] - 1, device=base.device) < self.far
        return SimpleNamespace(slot=slot, near=near[:, 0], is_near=j < near, is_far=is_far, queries=self.queries)

    @torch.no_grad()
    def attend(self, layer, q, k, v):
        """Store the new tokens' k and v (B, H, T, d); the attention output of q (B, Hq, T, d) is (B, Hq, T, d).

        q and k are rotated by the positions that begin() has returned; no head of k and v is repeated.
        """
        (B, Hq, T, d), H = q.shape, k.shape[1]
        need((B, T) == self.shape, f"q {tuple(q.shape)} is not (B, Hq, T, d) for the tokens {self.shape} of begin()")
        need(layer == self.turn, f"every layer attends once, in order: {self.turn} is next, got {layer}")
        self.turn += 1
        if layer == len(self.layers):
            self.new_layer(H, Hq, d, k.dtype)
        work = self.layers[layer].work                                           # (B, H, budget, 2, d)
        need(k.shape == v.shape == (B, H, T, d) and (H, d, k.dtype) == (work.shape[1], work.shape[4], work.dtype),
             f"this cache holds {work.dtype}, {work.shape[1]} KV heads of {work.shape[4]}, got k {tuple(k.shape)} of "
             f"{k.dtype} and v {tuple(v.shape)}")
        if self.layers[layer].start is not None:
            self.layers[layer].start += self.added
        kv = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4).contiguous()      # (T, B, H, 2, d) as in the pool
        self._watch(layer, q, kv)
        return self._decode(layer, q, kv) if T == 1 else self._prompt(layer, q, kv)

    def _decode(self, layer, q, kv):
        """One token: fetch what it should see, attend to that and to itself. No loop, no sync but at looks."""
        (B, Hq, _, d), H, mem = q.shape, kv.shape[2], self.layers[layer]
        # The first query of a sentence, or after a prompt, starts the sum anew.
        # Paper: Sec. 4.2 forms the mean query when a sentence is complete, but Algorithm 1 at every token, as here.
        mem.query_sum.masked_fill_((self.queries == 1)[:, None, None], 0).add_(q[:, :, 0])
        q = q.view(B, H, Hq // H, d)                                             # a group's query heads: G queries
        self.pool.reserve(layer, self.reach, kv)
        if self.plan is not None:
            self._fetch(layer, q, self.plan)
        self.pool.write(layer, self.slot[None], kv)                              # overlaps with the rest of the layer
        place = self.width + self.since - 1
        mem.work[:, :, place], mem.valid[:, :, place] = kv[0], True
        keys, values = mem.work.unbind(3)                                        # (B, H, budget, d) each, views
        out = F.scaled_dot_product_attention(q, keys, values, mem.valid[:, :, None])         # Eq. 3, (B, H, G, d)

        # What the new key brings joins the open sentence; in the sink, where none is, that is overwritten by the first.
        new, row = self.rule.brings(kv[0, :, :, 0].float()), torch.arange(B, device=q.device)
        mem.open.copy_(torch.where(self.starts[:, None, None], new, self.rule.join(mem.open, new)))          # (B, H, w)
        vector = self.rule.vector(mem.open, self.size[:, None, None]).to(kv.dtype)
        mem.vectors[row, :, self.current.clamp(min=0)] = vector
        return out.reshape(B, Hq, 1, d)

    def _fetch(self, layer, q, plan):
        """Rank the sentences for q (B, H, G, d), and fill the layer's places with what is near and with the best."""
        mem, d = self.layers[layer], q.shape[3]
        query = self.rule.query(q, mem.query_sum.view(q.shape), plan.queries[:, None, None, None]).mean(2)
        scores = ((query * d ** -0.5).to(q.dtype)[:, :, None] @ mem.vectors.transpose(2, 3))[:, :, 0]      # (B, H, S)
        start = self.first if mem.start is None else mem.start                   # (B, S + 1)
        slot, valid, *mem.fetched = select(scores, start[:, :-1], start.diff() * plan.is_far, plan.near, self.width,
                                           self.ranked)
        slot = torch.where(plan.is_near[:, None], plan.slot[:, None], slot.masked_fill(~valid, 0))
        self.pool.fetch(layer, F.pad(slot, (0, self.refresh)), mem.work)         # places not used: any slot
        mem.valid = F.pad(valid, (0, self.refresh))

    def _prompt(self, layer, q, kv):
        """T > 1 tokens: exact attention to everything kept, then sort them into the pool."""
        mem, (B, Hq, T, d) = self.layers[layer], q.shape
        row, t = torch.arange(B, device=q.device), torch.arange(T, device=q.device)[:, None]
        new, slot = kv, self.slot + t                                            # (T, B)
        if any(self.before):                                                     # what is kept, then the new
            kv = torch.cat((self.pool.read(layer, max(self.before)), torch.zeros_like(kv)))
            kv[slot, row] = new
        keys, values = kv.permute(3, 1, 2, 0, 4)                                 # (B, H, N, d) each, views
        out = attend_causal(q, keys, values, self.before)
        if mem.asked is not None:                                                # the last queries, of all pieces
            at = (self.lengths - self.slot)[:, None] + torch.arange(self.window, device=q.device)        # (B, window)
            mem.asked = torch.cat((mem.asked, q), dim=2).gather(2, at[:, None, :, None].expand(-1, Hq, -1, d))
        if self.prune:
            window = self.lengths[:, None] + torch.arange(-self.window, 0, device=q.device)      # (B, window) positions
            alpha = importance(mem.asked, keys, window, self.pool_width)
            kept = survivors(alpha, self.survive, self.sink, self.tail, self.lengths)            # (B, survive)
            mem.start = torch.searchsorted(kept, self.first)                     # survivors before each sentence
            new = kv = kv[kept.T, row]                                           # (survive, B, H, 2, d)
            slot = torch.arange(self.survive, device=q.device)[:, None].expand(-1, B)
            self.pool.finish()                                                   # pieces before, not pruned yet, go
            self.pool.kv.pop(layer, None)
            self.pool.seen.pop(layer, None)
        self.pool.reserve(layer, self.reach, kv)
        self.pool.write(layer, slot, new)
        if not self.more:
            mem.asked = None
            self._summarize(mem, kv[..., 0, :])
        return out

    def _summarize(self, mem, k):
        """The vectors of all sentences, from the keys k (n, B, H, d) of all slots, n of them."""
        start = self.first if mem.start is None else mem.start                   # (B, S + 1)
        slot = torch.arange(len(k), device=k.device).repeat(len(start), 1)       # (B, n)
        ids = torch.searchsorted(start, slot, right=True).T                      # sentence + 1; sink: 0, padding: S + 1
        total = [reduce_keys(self.rule.brings(x.float()), ids, start.shape[1] + 1, self.rule.how) for x in k.unbind(2)]
        total = torch.stack(total, dim=2)[1:-1]                                  # (S, B, H, w), head by head
        vectors = self.rule.vector(total, start.diff().clamp(min=1).T[:, :, None, None])     # (S, B, H, w)
        mem.vectors = vectors.to(k.dtype).permute(1, 2, 0, 3).contiguous()       # (B, H, S, w)
        mem.open.copy_(total[self.current.clamp(min=0), torch.arange(len(start), device=k.device)])

    def _start(self, B, device):
        """The state before the first token."""
        self.flags, self.pool = self.flags.to(device), HostPool(device)
        self.lengths, self.dropped = torch.zeros(2, B, dtype=torch.long, device=device).unbind()         # (B,) tokens
        self.unjudged, self.prompt, self.more = self.keep is not None, None, 0
        self._rewind()

    def _rewind(self):
        """No token seen yet, as far as sentences are concerned. A decode step changes these in place (CUDA graphs)."""
        zeros, S = torch.zeros_like, self.first.shape[1] if self.layers else 1
        self.lengths = zeros(self.lengths)
        self.current, self.ended = self.lengths - 1, zeros(self.lengths)         # (B,) open sentence; see segment
        self.queries = zeros(self.lengths)                                       # (B,) number of queries in query_sum
        self.first = self.lengths[:, None].repeat(1, S)                          # (B, S + 1)
        self.text = self.first.new_zeros(len(self.first), 0, dtype=torch.int32)  # (B, room) tokens, -1: none
        self.plan, self.since, self.ranked = None, self.refresh, 0
        self.broken = torch.full((), -1, device=self.lengths.device)             # where NaN came in

    def new_layer(self, H, Hq, d, dtype):
        """All that one layer keeps on the device. What is fetched has one place for all layers, if it may be."""
        (B, S), w = self.first[:, 1:].shape, self.rule.width * d
        zeros = functools.partial(torch.zeros, device=self.first.device)
        work = self.layers[0].work if self.layers and self.refresh == 1 else zeros(B, H, self.budget, 2, d, dtype=dtype)
        self.layers.append(SimpleNamespace(
            vectors=zeros(B, H, S, w, dtype=dtype),
            open=zeros(B, H, w),                   # float32: what the keys of the open sentence have brought so far
            query_sum=zeros(B, Hq, d),             # float32
            work=work, valid=None,                 # valid (B, H, budget): which places are used
            start=None,                            # (B, S + 1), after keep=r: slot of each sentence's first token
            asked=zeros(B, Hq, self.window, d, dtype=dtype) if self.unjudged or self.prune else None,        # queries
            fetched=None))                         # what select() has taken

    def _watch(self, layer, *tensors):
        """Note the first layer and token where NaN or inf came in; the CPU says so now, CUDA when the host looks."""
        fine = torch.stack([extreme for x in tensors for extreme in x.aminmax()]).isfinite().all()
        self.broken.copy_(torch.where(fine | (self.broken >= 0), self.broken, self.lengths.max() * 4096 + layer))
        if not fine.is_cuda:
            self._look()

    def _look(self):
        """ValueError if NaN or inf has come in; the one look at what the device has noted."""
        token, layer = divmod(int(self.broken), 4096)
        need(token < 0, f"NaN or inf in q, k or v of layer {layer} within the first {token} tokens: this cache is of "
             "no use from there on; check the weights, or take a wider dtype, then truncate() it or use a new one")

    def tokens(self):
        """All tokens (B, length) that went in, -1 after the end of a shorter row."""
        return self.text[:, :self.length].long()

    def fetched(self):
        """What the last decode step fetched: sentence and taken, (layers, B, H, k) each, the best sentence first.

        taken is the number of tokens fetched of it, from its start (0: there was no room left); sentence s of row b is
        tokens first[b, s] to first[b, s + 1] - 1 of the text, as long as keep=r has dropped none of it.
        """
        need(self.layers and self.layers[0].fetched, "nothing was fetched yet: this tells about the last decode step")
        self.pool.wait()
        return [torch.stack(x) for x in zip(*(mem.fetched for mem in self.layers))]

    def memory(self):
        """Bytes of all that grows with text, layers or budget: {"device": ..., "host": ...}; a fork counts what it
        shares as well."""
        tensors = lambda mem: [x for x in vars(mem).values() if isinstance(x, torch.Tensor)]
        device = {id(x): x.nbytes for mem in self.layers for x in tensors(mem)}  # work may be one for all layers
        shared = [self.flags] + ([self.first, self.text] if self.pool else [])
        return {"device": sum(x.nbytes for x in shared) + sum(device.values()),
                "host": sum(x.nbytes for x in self.pool.kv.values()) if self.pool else 0}

    # What a cache can do beside this is in experiments/living.py: go on from here twice, forget, be saved and loaded.

    def fork(self):
        """A second cache that goes on from here by itself; it shares the host pool, what is on the device is copied."""
        from experiments.living import fork
        return fork(self)

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens, one number or one per row: as if those had been one prompt."""
        from experiments.living import truncate
        truncate(self, lengths)

    def save(self, path):
        """Write all of it to one file; a kill at any moment leaves the file as it was, or the new one."""
        from experiments.living import save
        save(self, path)

    @classmethod
    def load(cls, path, model):
        """The cache that was saved, for the same model; its pool stays in the file until it is used (memory-mapped)."""
        from experiments.living import load
        return load(cls, path, model)

def main():
    from experiments.ask import main  # the command line lives beside the method; see --help
    return main()

if __name__ == "__main__":
    raise SystemExit(main())
