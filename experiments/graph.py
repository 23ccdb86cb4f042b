"""Decode steps as CUDA graphs: hundreds of small kernels in one launch. model.generate(..., cuda_graph=True) uses it."""
import torch

from model import demand
from sentencekv import SentenceKV

class GraphedStep:
    """One decode step of a model with a SentenceKV on a CUDA device. It is recorded anew when the cache's shapes change.

    A decode step changes the cache's state in place, so that a replay goes on where the last one ended. Only the host's
    own numbers have to be kept up to date beside it.
    """

    def __init__(self, model, cache):
        demand(type(cache) is SentenceKV and cache.refresh == 1, "a CUDA graph needs a SentenceKV with refresh=1")
        self.model, self.cache, self.graph = model, cache, None

    def steady(self):
        """Will the next decode step launch what the last one did? Not if the host has to look, or without zero copy."""
        c = self.cache
        return c.plan is not None and c.length % 64 > 0 and c.pool.in_place

    def __call__(self, tokens):
        """tokens (B, 1) -> float32 logits (B, V), overwritten by the next call."""
        cache = self.cache
        now = (cache.plan, cache.pool)                                           # others, after a step or fork elsewhere
        if not self.steady() or self.graph and any(a is not b for a, b in zip(now, self.at)):
            self.graph = None
            return self.model.compute(tokens, cache)
        if self.graph is None:
            self.graph, self.tokens = torch.cuda.CUDAGraph(), tokens.clone()
            with torch.cuda.graph(self.graph):                                   # records, and runs nothing
                self.logits = self.model.compute(self.tokens, cache)
                cache.pool.wait()                                                # the side stream joins the graph
            self.at = (cache.plan, cache.pool)
        else:
            cache.length += 1
            self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits
