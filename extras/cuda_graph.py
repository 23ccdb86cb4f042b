"""Decode steps as CUDA graphs: one launch instead of hundreds of small kernels.

    model.generate(tokens, cache, n, step=GraphedStep(model, cache))

begin() runs on the host in every step, and what it computes is copied into tensors that stay
where they are. The graph contains the layers. It needs host pools that kernels use in place: see
best_pool() in extras/zero_copy.py. Without them, every step runs without a graph.
"""
from types import SimpleNamespace

import torch

from sentencekv import SentenceKV, need

class GraphedStep:
    """A decode step of a model with a SentenceKV on a CUDA device.

    Call it with tokens (B, 1) -> float32 logits (B, V), which the next call overwrites. It captures
    a graph when memory has moved since the last one, and runs a step without a graph where the
    cache has to make room, or where keep=r prunes.
    """

    def __init__(self, model, cache):
        need(type(cache) is SentenceKV, f"a CUDA graph needs a SentenceKV, got {type(cache)}")
        device = model.embed_tokens.weight.device
        need(device.type == "cuda", f"a CUDA graph needs a CUDA device, the model is on {device}")
        self.model = model
        self.cache = cache
        self.top = 0         # cache.top in the graph
        self.inputs = None      # tensors that change with every step, see copy_inputs()
        self.graph = None
        self.logits = None      # (B, V), what the graph computes
        self.fetched = []       # what fetched() returns, per layer
        self.captured = []      # the tensors that the graph uses
        self.step = None        # cache.step, if the last forward was one of the graph

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, tokens):
        cache = self.cache
        if not self.ready():
            return self.model(tokens, cache)
        self.model.check_tokens(tokens)
        if cache.step is not self.step:             # others may have written to the pools
            for layer in cache.layers:
                layer.pool.finish_writes()
        positions = cache.begin(tokens)
        try:
            return self.replay(tokens, positions)
        except BaseException:
            cache.next_layer = None
            raise

    def ready(self):
        """Can a graph run the next step, unless there is no room for a new sentence?"""
        layers = self.cache.layers
        return len(layers) == len(self.model.layers) and all(
            layer.observed is None and layer.fetched is not None and has_place(layer.pool)
            for layer in layers)

    def replay(self, tokens, positions):
        """The layers of one step, after begin()."""
        cache, step = self.cache, self.cache.step
        self.copy_inputs(tokens, positions)
        if cache.top != self.top:
            self.top = cache.top
            self.captured = []
        tensors = self.tensors()
        if len(tensors) != len(self.captured) or any(
                new is not old for new, old in zip(tensors, self.captured)):
            self.capture(tensors)
        self.graph.replay()
        for layer, fetched in zip(cache.layers, self.fetched):
            layer.pool.advance([row.new for row in cache.rows])
            layer.fetched = fetched
        cache.next_layer = len(cache.layers)
        self.step = step
        return self.logits

    def copy_inputs(self, tokens, positions):
        """Copy what begin() computed into the tensors that the graph reads."""
        step = self.cache.step
        rows = self.cache.rows
        values = [self.cache.layers[0].pool.used, [row.new for row in rows],
                  [row.first != row.last for row in rows]]
        slot, new, starts = torch.tensor(values, device=tokens.device)
        inputs = dict(
            tokens=tokens,              # (B, 1)
            positions=positions,        # (B, 1)
            slot=slot,                  # (B,) where the token goes
            new=new,                    # (B,) 1, or 0 for a row that idles
            starts=starts,              # (B,) 1 if the token starts a sentence
            sentence=step.sentence,     # (B, 1) the sentence of the token
            near=step.near,             # (B, S)
            share=step.share)           # (B,)
        old = self.inputs
        if old is None or old.near.shape != step.near.shape:
            self.inputs = SimpleNamespace(**{name: x.clone() for name, x in inputs.items()})
            self.captured = []
        else:
            for name, x in inputs.items():
                getattr(old, name).copy_(x)
        step.near, step.share = self.inputs.near, self.inputs.share

    def tensors(self):
        """All that the graph uses of the cache."""
        found = [self.cache.attended]
        for layer in self.cache.layers:
            found += [layer.count, layer.vectors, layer.open, layer.query_mean]
            found += layer.pool.aliases()
        return found

    def capture(self, tensors):
        """Record the layers of a step; nothing runs yet."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            inputs = self.inputs
            self.logits = self.model.compute(inputs.tokens, inputs.positions, self)
        self.fetched = [layer.fetched for layer in self.cache.layers]
        self.captured = tensors

    def attend(self, index, q, k, v):
        """SentenceKV.attend() for T = 1, without Python numbers that change with every step."""
        layer = self.cache.layers[index]
        kv = torch.stack((k, v), dim=3)                               # (B, H, 1, 2, d)
        out = self.cache._decode(layer, q, kv)
        self.append(layer, kv[:, :, 0])
        return out

    def append(self, layer, kv):
        """Store one token per row, kv (B, H, 2, d); rows that idle keep what they have."""
        rule, inputs = self.cache.rule, self.inputs
        new, starts = (x[:, None, None] > 0 for x in (inputs.new, inputs.starts))
        layer.pool.write(inputs.slot, kv)
        layer.count.scatter_add_(1, inputs.sentence, inputs.new[:, None])
        features = rule.features(kv[:, :, 0].float())                 # (B, H, w)
        layer.open.masked_fill_(starts, 0).add_(features.masked_fill(~new, 0))
        n = layer.count.gather(1, inputs.sentence).clamp(min=1)       # (B, 1)
        vector = rule.vector(layer.open, n[:, None])                  # (B, H, w)
        index = inputs.sentence[:, None, :, None].expand(*vector.shape[:2], 1, vector.shape[2])
        layer.vectors.scatter_(2, index, vector[:, :, None].to(layer.vectors.dtype))

def has_place(pool):
    """Can kernels read this pool, and write one more token per row to it, in place?"""
    aliases = pool.aliases() if hasattr(pool, "aliases") else [None]
    return all(alias is not None for alias in aliases) and not pool.is_full()
