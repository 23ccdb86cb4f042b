"""Go on from one cache in several ways (fork), and forget the end of a text (truncate).

A fork shares the keys and values that are stored so far. Each of its host pools is a BranchPool,
which reads them from the pool it was forked from (its base), and stores what comes later itself.
"""
import copy
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from sentencekv import Segmenter, SentenceKV, eager, need

# --------------------------------------------------------------------------------- the pool

class BranchPool:
    """A host pool that continues another one, `base`: row b after its first start[b] slots.

    It has the methods of HostPool, and never changes its base. base.shared[b] is the number of
    slots of row b that branches read; see cut(). kv is its own part alone.
    """

    def __init__(self, base, start, host_pool):
        B, _, H, _, d = base.kv.shape
        self.base = base
        self.start = list(start)
        self.own = host_pool(B, H, d, base.kv.dtype, base.device)
        self.device = base.device
        self.first = torch.tensor(self.start, device=self.device)     # (B,)
        shared = getattr(base, "shared", self.start)
        base.shared = [max(pair) for pair in zip(shared, self.start)]

    @property
    def kv(self):
        return self.own.kv

    @property
    def used(self):
        return [n + more for n, more in zip(self.start, self.own.used)]

    def append(self, b, kv):
        self.own.append(b, kv)

    def fetch(self, slot, out):
        mine = slot >= self.first[:, None, None]                      # (B, H, n)
        self.base.fetch(slot.masked_fill(mine, 0), out)
        own = torch.empty_like(out)                                   # (B, H, n, 2, d)
        self.own.fetch((slot - self.first[:, None, None]).clamp(min=0), own)
        torch.where(mine[..., None, None], own, out, out=out)

    def read(self, b):
        shared = self.base.read(b)[:, :self.start[b]]
        return torch.cat((shared, self.own.read(b)), dim=1)           # (H, n, 2, d)

    def finish_writes(self):
        self.base.finish_writes()
        self.own.finish_writes()

    # For CUDA graphs: see ZeroCopyPool in extras/zero_copy.py.

    def aliases(self):
        found = []
        for pool in (self.base, self.own):
            found += pool.aliases() if hasattr(pool, "aliases") else [None]
        return found

    def write(self, slot, kv):
        self.own.write(slot - self.first, kv)

    def advance(self, new):
        self.own.advance(new)

    def is_full(self):
        return self.own.is_full()

def cut(pool, slots, host_pool):
    """The pool to continue with if only the first slots[b] of row b shall remain."""
    keeps_shared = all(n >= m for n, m in zip(slots, getattr(pool, "shared", slots)))
    if not isinstance(pool, BranchPool):
        if not keeps_shared:                        # branches read what would be overwritten
            return BranchPool(pool, slots, host_pool)
        pool.used = list(slots)
        return pool
    if all(n <= start for n, start in zip(slots, pool.start)):        # nothing of its own remains
        return BranchPool(pool.base, slots, host_pool)
    if not keeps_shared or any(n < start for n, start in zip(slots, pool.start)):
        return BranchPool(pool, slots, host_pool)
    pool.own.used = [n - start for n, start in zip(slots, pool.start)]
    return pool

# ------------------------------------------------------------------------------------- fork

@eager
def fork(cache):
    """A second cache with the same content, which goes on independently of the first.

    They share what the host pools hold; device memory is copied. memory() of a fork counts the
    host memory that it does not share. Raises ValueError for a cache that was interrupted.
    """
    if isinstance(cache, SentenceKV) and not cache.rows:
        return copy.deepcopy(cache)
    check_complete(cache, "fork()")
    twin = copy.copy(cache)
    twin.rows = [copy_row(row) for row in cache.rows]
    twin.attended = torch.zeros_like(cache.attended)
    twin.layers = []
    for layer in cache.layers:
        copied = {name: clone(x) for name, x in vars(layer).items() if name != "pool"}
        pool = BranchPool(layer.pool, layer.pool.used, cache.host_pool)
        twin.layers.append(SimpleNamespace(pool=pool, **copied))
    return twin

def check_complete(cache, what):
    """ValueError unless the cache holds a text, and its last forward was complete."""
    check_kind(cache, what)
    need(cache.layers, f"{what} needs a cache that holds a prompt: this one is empty")
    need(cache.next_layer == len(cache.layers), f"{what} needs a cache whose last forward was "
         "complete: truncate this one, or use a new one")

def check_kind(cache, what):
    need(isinstance(cache, SentenceKV), f"{what} needs a SentenceKV, got {type(cache).__name__}")

def copy_row(row):
    """A copy of a Segmenter that shares its flags."""
    twin = copy.copy(row)
    twin.tokens = list(row.tokens)
    twin.sentence = list(row.sentence)
    twin.lengths = list(row.lengths)
    return twin

def clone(x):
    """A copy of a tensor, or of a list of tensors; anything else itself."""
    if isinstance(x, list):
        return [clone(item) for item in x]
    return x.clone() if torch.is_tensor(x) else x

# --------------------------------------------------------------------------------- truncate

@eager
def truncate(cache, lengths):
    """Forget all but the first `lengths` tokens of each row: an int, or one int per row.

    The cache is as if those had been one prompt: the mean query starts anew. It also repairs a
    cache whose last forward was interrupted, down to the tokens that all layers hold. If truncate()
    is interrupted itself, the last sentence may be lost. Raises ValueError for lengths that are
    impossible, or below a prompt that keep=r has pruned.
    """
    check_kind(cache, "truncate()")
    need(cache.layers, "truncate() needs a cache that holds a prompt: use a new cache")
    held = [len(row.tokens) for row in cache.rows]
    wanted = list(lengths) if isinstance(lengths, (list, tuple)) else [lengths] * len(held)
    complete = cache.next_layer == len(cache.layers)
    if any(layer.observed is not None for layer in cache.layers):
        need(complete and wanted == held, "keep=r has not pruned this prompt yet, and the queries "
             "that would judge a shorter one are gone: use a new cache")
        return
    lost = [lost_tokens(cache, layer) for layer in cache.layers]
    check_lengths(cache, wanted, lost)

    cache.next_layer = None                         # an interruption from here on is noticed
    rows = [cut_row(row, n) for row, n in zip(cache.rows, wanted)]
    last = [len(row.lengths) - 1 for row in rows]
    first = last
    if not complete:                                # the vectors of later ones may be wrong,
        first = [min(n, row.first) for n, row in zip(last, cache.rows)]
        if cache.settings.keep:                     # and all if keep=r was pruning
            first = [0] * len(rows)
    for row, n in zip(cache.rows, last):
        row.first = min(n, row.first)               # for the next call, should this one not end
    for layer, missing in zip(cache.layers, lost):
        rebuild(cache, layer, rows, missing, first)
    cache.rows = rows
    cache.length = max(wanted)
    cache.top = min(cache.settings.budget, cache.room)             # always enough
    cache.next_layer = len(cache.layers)

def lost_tokens(cache, layer):
    """How many tokens keep=r has dropped of each sentence of each row: a list per row.

    Only sentences that were complete before the last forward can have lost any.
    """
    lost = []
    for row, count in zip(cache.rows, layer.count.tolist()):
        complete = min(row.first, len(row.lengths) - 1)
        kept = count[:complete] + row.lengths[complete:]
        if cache.settings.keep is None:
            kept = row.lengths
        lost.append([n - m for n, m in zip(row.lengths, kept)])
    return lost

def check_lengths(cache, wanted, lost):
    """ValueError unless all layers have stored the first wanted[b] tokens of every row b.

    lost[l]: what lost_tokens() returns for layer l. What comes before a loss cannot be the end.
    """
    held = [len(row.tokens) for row in cache.rows]
    least = [1] * len(held)
    possible = len({tuple(map(sum, missing)) for missing in lost}) == 1
    for layer, missing in zip(cache.layers, lost):
        for b, row in enumerate(cache.rows):
            stored = layer.pool.used[b] + sum(missing[b])
            possible = possible and stored <= len(row.tokens)         # else it was just pruning
            held[b] = min(held[b], stored)
            losses = [end for end, n in zip(accumulate(row.lengths), missing[b]) if n]
            least[b] = max([least[b], *(end + 1 for end in losses)])
    possible = possible and all(low <= high for low, high in zip(least, held))
    need(possible, "the layers of this cache do not hold the same text: use a new cache")
    fits = len(wanted) == len(held) and all(
        type(n) is int and low <= n <= high for low, n, high in zip(least, wanted, held))
    after = " (keep=r has pruned what is before)" if max(least) > 1 else ""
    need(fits, f"truncate() takes lengths from {least}{after} to {held}, got {wanted}")

def cut_row(row, n):
    """A Segmenter after the first n tokens of this one."""
    new = Segmenter(row.flags, row.sink, row.max_sentence)
    new.extend(row.tokens[:n])
    new.prompt_end = n
    new.extend([])
    return new

def rebuild(cache, layer, rows, lost, first):
    """Cut a layer to the text in rows; lost: what lost_tokens() returned for this layer.

    The sentences from first[b] on are taken out of the pool and appended again, which makes their
    vectors anew.
    """
    counts = [[n - m for n, m in zip(row.lengths, missing)]
              for row, missing in zip(rows, lost)]
    before = [sum(count[:n]) for count, n in zip(counts, first)]      # slots that stay
    after = [sum(count) for count in counts]
    kv = fetch_slots(layer.pool, before, after)                       # (B, H, n, 2, d)
    layer.pool = cut(layer.pool, before, cache.host_pool)
    room = cache.room
    layer.vectors = F.pad(layer.vectors, (0, 0, 0, room - layer.vectors.shape[2]))
    kept = [count[:n] + [0] * (room - n) for count, n in zip(counts, first)]
    device = layer.count.device
    layer.count = torch.tensor(kept, device=device)                   # (B, S)
    layer.open.zero_()
    layer.query_mean.zero_()
    layer.fetched = None
    for b, count in enumerate(counts):
        again = torch.tensor(count[first[b]:], device=device)
        last = len(count) - 1
        sentence = torch.arange(first[b], last + 1, device=device).repeat_interleave(again)
        new = kv[b, :, :len(sentence)]                                # (H, n, 2, d)
        cache._store(layer, b, new, sentence, first[b], last)

def fetch_slots(pool, before, after):
    """The tokens in slots before[b] to after[b] - 1 of row b: (B, H, n, 2, d), on the device."""
    B, _, H, _, d = pool.kv.shape
    n = max(end - start for start, end in zip(before, after))
    start, end = torch.tensor([before, after], device=pool.device).view(2, B, 1, 1)
    slot = torch.minimum(start + torch.arange(n, device=pool.device), end - 1)
    out = torch.empty(B, H, n, 2, d, dtype=pool.kv.dtype, device=pool.device)
    pool.fetch(slot.expand(B, H, n), out)
    return out
