"""A CUDA device that is pretended, in CPU memory, so that code for GPUs is tested without one.

    from pretended_gpu import pretended_gpu     # a fixture of pytest; its value is a PretendedGPU

While the fixture lasts, tensors made "on CUDA" say that they are there. Their bits are the CPU's,
and everything is done at once: no test can find a race. These rules of a real device hold:

- operations on tensors of both sides are errors; moving a tensor copies it;
- the device sees pinned host memory through __cuda_array_interface__, if `zero_copy`;
- a synchronization is an error while a graph is captured, or in set_sync_debug_mode("error");
- capturing a graph changes no memory, and replaying it uses the tensors that were captured;
- bytes on the device are counted.
"""
import contextlib
import ctypes
import gc
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

from extras import zero_copy

WAITS = ("item", "tolist", "nonzero", "equal", "__int__", "__bool__", "__float__", "__index__")

def tensors_in(*things):
    """All tensors in CPU memory among things, and in lists of them."""
    for x in things:
        if isinstance(x, (list, tuple)):
            yield from tensors_in(*x)
        elif type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu":
            yield x

class PretendedStream:
    """A stream that does everything at once; an event as well."""

    def __init__(self, device=None, enable_timing=False):
        self.timed = enable_timing

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        assert self.timed and end.timed, "events without enable_timing"
        return 1e3 * (end.at - self.at)

    def wait_stream(self, other):
        assert isinstance(other, PretendedStream)

    wait_event = wait_stream

    def record_event(self):
        return PretendedStream()

    def synchronize(self):
        pass

    def __reduce__(self):
        raise TypeError("cannot pickle 'Stream' object")

class PretendedGraph:
    """The calls that were captured, with the tensors that they had and gave."""

    def __init__(self):
        self.calls = []         # (function, arguments, keyword arguments, result)
        self.before = {}        # what storages held before: {address: (storage, copy)}
        self.replays = 0

    def replay(self):
        """Make the calls again, in place."""
        self.replays += 1
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tensors_in(result), tensors_in(again)):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

class PretendedGPU(TorchFunctionMode):
    """The device. Storages carry two marks: `here` (on the device) and `pinned`."""

    def __init__(self, patch):
        super().__init__()
        self.zero_copy = True       # can the device see pinned memory?
        self.strict = False         # is a synchronization an error?
        self.graph = None           # the PretendedGraph that is captured
        self.graphs = []            # all that were captured
        self.bytes = self.peak = 0
        for name, fake in self.fakes().items():
            patch.setattr(torch.cuda, name, fake)
        generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device=None: generator())
        patch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.wait_stream(stream))

    def fakes(self):
        """What replaces the functions of torch.cuda."""
        return dict(
            Stream=PretendedStream,
            Event=PretendedStream,
            CUDAGraph=PretendedGraph,
            graph=self.capture,
            stream=nullcontext,
            current_stream=PretendedStream,
            is_available=lambda: True,
            _sleep=lambda cycles: None,
            synchronize=self.synchronize,
            is_current_stream_capturing=lambda: self.graph is not None,
            get_device_name=lambda device=None: "none",
            set_sync_debug_mode=lambda mode: setattr(self, "strict", mode == "error"),
            memory_stats=lambda device=None: {"requested_bytes.all.current": self.bytes},
            mem_get_info=lambda device=None: (1 << 30, 1 << 30),
            max_memory_allocated=lambda device=None: self.peak,
            reset_peak_memory_stats=lambda device=None: setattr(self, "peak", self.bytes))

    def require(self, condition, message):
        if not condition:
            raise RuntimeError(message)

    def synchronize(self, device=None):
        self.require(self.graph is None, "a synchronization while a graph is captured")

    @contextlib.contextmanager
    def capture(self, graph):
        self.graph = graph
        self.graphs.append(graph)
        try:
            yield
        finally:
            self.graph = None
            for storage, old in graph.before.values():
                storage.copy_(old)

    def count(self, more):
        self.bytes += more
        self.peak = max(self.peak, self.bytes)

    def is_here(self, x):
        return getattr(x.untyped_storage(), "here", False)

    def alias(self, owner, **_):
        """Pinned memory as the device sees it: another storage at the same place."""
        memory = owner.__cuda_array_interface__
        pinned = owner.host.untyped_storage().pinned
        self.require(self.zero_copy and pinned, "the device cannot see this memory")
        raw = (ctypes.c_uint8 * memory["shape"][0]).from_address(memory["data"][0])
        raw.owner = owner
        return torch.frombuffer(raw, dtype=torch.uint8)

    def take_device(self, args, kwargs):
        """Replace a device among the arguments by the CPU; returns its type, or None."""
        found = None
        for held, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                x = held[key]
                if isinstance(x, torch.device) or type(x) is str and x in ("cpu", "cuda"):
                    found = torch.device(x).type
                    held[key] = "cpu" if found == "cuda" else x
        return found

    def check_sides(self, name, sides, moves, kwargs):
        """An error for what a real device could not do. sides: where the tensors are."""
        both = len(sides) == 2
        self.require(not both or name in ("copy_", "__setitem__"),
                     f"{name}() of tensors on CUDA and on the CPU")
        waits = True in sides and name in WAITS
        waits = waits or (moves or both) and not kwargs.get("non_blocking")
        self.require(not waits or not (self.strict or self.graph),
                     f"{name}() waits for the device")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, args, kwargs = function.__name__, list(args), dict(kwargs or {})
        getter = function.__self__.__name__ if name == "__get__" else None
        if getter in ("device", "is_cuda") and self.is_here(args[0]):
            return torch.device("cuda", 0) if getter == "device" else True
        if getter or function is torch.device:
            return function(*args, **kwargs)
        if name in ("cpu", "cuda"):
            function, args = torch.Tensor.to, [args[0], name]
        device = self.take_device(args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        given = list(tensors_in(*args, *kwargs.values()))
        if name == "is_pinned":
            return getattr(given[0].untyped_storage(), "pinned", False)
        # A number in CPU memory goes with tensors of both sides.
        sides = {self.is_here(x) for x in given if x.ndim or self.is_here(x)}
        here = device == "cuda" if device else True in sides
        moves = function is torch.Tensor.to and here != self.is_here(args[0])
        self.check_sides(name, sides, moves, kwargs)
        if moves:
            args[0] = args[0].clone()
        if hasattr(args and args[0], "__cuda_array_interface__"):
            function, kwargs = self.alias, {}
        return self.run(function, args, kwargs, given, here, pinned)

    def run(self, function, args, kwargs, given, here, pinned):
        """Call the function, and mark the storages that it makes."""
        if self.graph:
            for storage in (x.untyped_storage() for x in given):
                self.graph.before.setdefault(storage._cdata, (storage, storage.clone()))
        known = {x.untyped_storage()._cdata for x in given}
        result = function(*args, **kwargs)
        if self.graph:
            self.graph.calls.append((function, args, kwargs, result))
        for storage in (x.untyped_storage() for x in tensors_in(result)):
            if storage._cdata not in known and not hasattr(storage, "here"):
                storage.here, storage.pinned = here, pinned
                size = storage.nbytes() if here and function != self.alias else 0
                self.count(size)
                weakref.finalize(storage, self.count, -size)
        return result

@pytest.fixture
def pretended_gpu(monkeypatch):
    zero_copy.works.cache_clear()
    monkeypatch.setattr(zero_copy.CarefulPool, "can_pin", True)
    with PretendedGPU(monkeypatch) as gpu:
        yield gpu
        gc.collect()            # pools end while there is a device to wait for
    zero_copy.works.cache_clear()
