"""Host pools for CUDA whose memory kernels read and write in place (zero copy).

    cache = SentenceKV(flags, host_pool=best_pool(device))

HostPool in sentencekv.py fetches in two steps: the CPU waits for the slots, gathers the tokens
into a pinned buffer, and the device copies the buffer. ZeroCopyPool makes pinned host memory
visible as a CUDA tensor. Kernels gather over PCIe: a fetch takes no CPU work and no
synchronization, and a CUDA graph can contain it (extras/cuda_graph.py).
"""
import functools
import math
import warnings
from types import SimpleNamespace

import torch

from sentencekv import HostPool

def device_alias(host, device):
    """A CUDA tensor over the memory of the pinned tensor `host`. RuntimeError if impossible."""
    interface = dict(shape=(host.nbytes,), typestr="|u1", data=(host.data_ptr(), False), version=3)
    # PyTorch keeps the owner, and with it the host tensor, as long as the alias exists.
    owner = SimpleNamespace(__cuda_array_interface__=interface, host=host)
    alias = torch.as_tensor(owner, device=device)
    if alias.data_ptr() != host.data_ptr():
        raise RuntimeError("the pinned memory was copied, not mapped")
    return alias.view(host.dtype).view(host.shape)

@functools.cache
def works(device):
    """Can kernels on this device use pinned host memory in place? Tried once per device."""
    try:
        host = torch.zeros(1024, dtype=torch.int64, device="cpu", pin_memory=True)
        alias = device_alias(host, device)
        host += 7                                   # the device must see what the CPU writes now
        return bool((alias == 7).all())
    except (RuntimeError, TypeError, ValueError):
        return False

def best_pool(device):
    """The class of host pools for a device (torch.device or its name); see SentenceKV."""
    device = torch.device(device)
    if device.type == "cuda" and works(device):
        return ZeroCopyPool
    return CarefulPool

class CarefulPool(HostPool):
    """A HostPool that copes with scarce memory.

    If memory cannot be pinned, this pool and all later ones use pageable memory, after one
    warning. Raises MemoryError if there is no memory at all.
    """
    can_pin = True

    def allocate(self, shape, dtype):
        if self.stream is not None and CarefulPool.can_pin:
            try:
                return super().allocate(shape, dtype)
            except RuntimeError:
                CarefulPool.can_pin = False
                warnings.warn("host memory cannot be pinned: fetching will be slower")
        try:
            return torch.empty(shape, dtype=dtype, device="cpu")
        except RuntimeError as error:
            size = math.prod(shape) * dtype.itemsize / 1e9
            raise MemoryError(f"no host memory for {size:.1f} GB of keys and values of one layer: "
                              "lower keep, or shorten the prompt") from error

    def __reduce_ex__(self, protocol):
        """Support copy.deepcopy and pickle on the CPU."""
        if self.stream is not None:
            raise TypeError("a cache on CUDA cannot be copied or pickled: use fork() of "
                            "extras/branch.py, or save() of extras/save.py")
        return super().__reduce_ex__(protocol)

class ZeroCopyPool(CarefulPool):
    """A host pool in pinned memory that kernels use in place; staged where it is not pinned."""

    def __init__(self, *arguments):
        self.source = None      # the tensor that `alias` shows
        self.alias = None       # self.kv as the device sees it, (B, C, H, 2, d)
        super().__init__(*arguments)

    def aliases(self):
        """What kernels read and write: [CUDA tensor], or [None] if self.kv is not pinned."""
        if self.source is not self.kv:
            pinned = self.stream is not None and self.kv.is_pinned()
            self.alias = device_alias(self.kv, self.device) if pinned else None
            self.source = self.kv
        return [self.alias]

    def fetch(self, slot, out):
        """See HostPool. The CPU does not wait."""
        kv, = self.aliases()
        if kv is None:
            return super().fetch(slot, out)
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        B, C, H, _, d = kv.shape
        row = torch.arange(B, device=slot.device)[:, None, None] * C
        head = torch.arange(H, device=slot.device)[:, None]
        index = (row + slot) * H + head                               # into (B * C * H, 2 * d)
        source, target = kv.view(-1, 2 * d), out.view(-1, 2 * d)
        torch.index_select(source, 0, index.flatten(), out=target)

    def write(self, slot, kv):
        """Store kv (B, H, 2, d), one token per row, in slot (B,), both on the device.

        A CUDA graph can contain this. It changes nothing on the host, see advance(), and needs a
        pool that is not full.
        """
        pool, = self.aliases()
        B, C, *_ = pool.shape
        index = torch.arange(B, device=slot.device) * C + slot        # into (B * C, H * 2 * d)
        pool.view(B * C, -1).index_copy_(0, index, kv.reshape(B, -1))

    def advance(self, new):
        """Note on the host that row b has new[b] more tokens."""
        self.used = [n + more for n, more in zip(self.used, new)]

    def is_full(self):
        """Is there no slot left for one more token in every row?"""
        return max(self.used) == self.kv.shape[1]

    def finish_writes(self):
        """Wait for everything on the device, kernels that use the alias included."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def __del__(self):
        # PyTorch does not know which kernels use an alias: none may when the memory is freed.
        stream = getattr(self, "stream", None)
        if stream is not None and not torch.cuda.is_current_stream_capturing():
            self.finish_writes()
