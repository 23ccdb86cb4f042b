"""Decode steps as CUDA graphs: hundreds of small kernels in one launch. For model.generate(..., cuda_graph=True)."""
import torch

from model import demand
from sentencekv import SentenceKV

def state(cache):
    """What a decode step reads of the steps before, changed in place: a graph works as long as all of it stays where it
    is. The number of sentences that are ranked is a part of the graph, too."""
    layers = [x for mem in cache.layers for x in (mem.vectors, mem.open, mem.query_sum, mem.work, mem.start)]
    return [cache.lengths, cache.dropped, cache.current, cache.ended, cache.queries, cache.first, cache.text,
            cache.broken, *layers, cache.pool, *cache.pool.kv.values(), cache.ranked]

STEP, LAYER = ("slot", "size", "starts", "added", "far", "tail", "plan"), ("valid", "fetched")   # what a step tells

class GraphedStep:
    """One decode step of a model with a SentenceKV on a CUDA device, recorded anew when something has moved."""

    def __init__(self, model, cache):
        demand(type(cache) is SentenceKV and cache.refresh == 1, "a CUDA graph needs a SentenceKV with refresh=1")
        self.model, self.cache, self.graph, self.state = model, cache, None, []

    def steady(self):
        """Can a graph do the next decode step? Not if the host has to look, or if the CPU has to fetch."""
        return self.cache.plan is not None and self.cache.length % 64 > 0 and self.cache.pool.in_place

    def moved(self):
        now = state(self.cache)
        return len(now) != len(self.state) or any(a is not b for a, b in zip(now, self.state))

    def tellers(self):
        """Who tells about a step, and the names of what."""
        return [(self.cache, STEP), *((mem, LAYER) for mem in self.cache.layers)]

    def __call__(self, tokens):
        """tokens (B, 1) -> float32 logits (B, V), overwritten by the next call."""
        cache = self.cache
        if not self.steady() or self.moved():                                    # a step as ever, which may make room
            logits = self.model.compute(tokens, cache)
            if self.moved():
                self.graph, self.state = None, state(cache)
            return logits
        if self.graph is None:
            self.graph, self.tokens = torch.cuda.CUDAGraph(), tokens.clone()
            with torch.cuda.graph(self.graph):                                   # records, and runs nothing
                self.logits = self.model.compute(self.tokens, cache)
                cache.pool.wait()                                                # the side stream joins the graph
            self.told = [{name: vars(x)[name] for name in names} for x, names in self.tellers()]
        else:
            cache.length += 1                                                    # the host's part of a step
            for (x, _), told in zip(self.tellers(), self.told):
                vars(x).update(told)
            self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits
