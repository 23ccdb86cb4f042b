"""Dense caches to compare with, for decode steps. They start full of given keys and values.

Two ways to compute attention over all tokens (folded, matmul), and two places for the keys and
values: on the device (Dense), or in host memory (Offloaded).
"""
import torch
import torch.nn.functional as F

from sentencekv import need

SPARE = 2048        # tokens that a dense cache has room for, besides those that it starts with

def folded(q, k, v):
    """Attention of one token; the query heads of a group are folded into the query axis.

    q (1, Hq, 1, d); k, v (1, H, N, d) -> (1, Hq, 1, d).
    """
    grouped = q.view(1, k.shape[1], -1, q.shape[3])                   # (1, H, G, d)
    return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)

def matmul(q, k, v):
    """Attention of one token as two products with a float32 softmax; shapes as in folded().

    On a CPU, a batched product copies keys and values that are a slice of a larger buffer, as
    those of a growing cache are. There it is computed head by head.
    """
    H, d = k.shape[1], q.shape[3]
    grouped = q.view(H, -1, d) * d ** -0.5                            # (H, G, d)
    heads = zip(grouped, k[0], v[0])
    if q.is_cuda or k.is_contiguous():
        heads = [(grouped, k[0], v[0])]
    out = []
    for query, keys, values in heads:
        weights = torch.softmax(query @ keys.mT, dim=-1, dtype=torch.float32)
        out.append(weights.to(values.dtype) @ values)
    return torch.stack(out).reshape(q.shape)

class Dense:
    """A dense cache on the device, for decode steps of one row.

    attention: folded or matmul. keys, values: a list of buffers, one per layer, (1, H, C, d) with
    C >= length + the number of steps; several layers may use the same buffer.
    """

    def __init__(self, attention, keys, values, length):
        self.attention = attention
        self.keys = keys
        self.values = values
        self.length = length
        self.next_layer = 0

    @staticmethod
    def buffers(x, layers, limit):
        """Copies of x (1, H, n, d) with room to grow, one per layer.

        If they take more than `limit` bytes together, layers share them.
        """
        distinct = max(1, min(layers, limit // x.nbytes))
        copies = [F.pad(x, (0, 0, 0, SPARE)) for _ in range(distinct)]
        return [copies[layer % distinct] for layer in range(layers)]

    def begin(self, tokens):
        """Note one token (1, 1); returns its position (1, 1)."""
        need(tokens.shape == (1, 1), "this cache is for decode steps of one row")
        self.length += 1
        self.next_layer = 0
        return torch.full((1, 1), self.length - 1, device=tokens.device)

    def attend(self, layer, q, k, v):
        n = self.length
        keys = self.keys[layer][:, :, :n]                             # (1, H, n, d)
        values = self.values[layer][:, :, :n]
        keys[:, :, -1:] = k
        values[:, :, -1:] = v
        self.next_layer = layer + 1
        return self.attention(q, keys, values)

    def memory(self):
        """Bytes of the buffers, as if no layers shared them: {"device": ..., "host": ...}."""
        return {"device": sum(x.nbytes for x in self.keys + self.values), "host": 0}

def packed(k, v):
    """k, v (1, H, n, d) -> (n, 1, H, 2, d)."""
    return torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4)

class Offloaded(Dense):
    """A dense cache in pinned host memory, for CUDA, two layers or more, and decode steps.

    While one layer computes, a side stream copies the next layer into the other one of two device
    buffers, as the offloaded cache of Hugging Face transformers does.

    host: one per layer, (C, 1, H, 2, d); buffers: two of that shape, on the device.
    """

    def __init__(self, attention, k, v, layers, limit):
        super().__init__(attention, None, None, length=k.shape[2])
        kv = packed(k, v)                                             # (n, 1, H, 2, d)
        shape = (len(kv) + SPARE, *kv.shape[1:])
        distinct = max(1, min(layers, limit // (2 * kv.nbytes)))
        blocks = []
        for _ in range(distinct):
            block = torch.zeros(shape, dtype=k.dtype, pin_memory=k.is_cuda)
            block[:len(kv)] = kv.cpu()
            blocks.append(block)
        self.host = [blocks[layer % distinct] for layer in range(layers)]
        buffer = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self.buffers = [buffer, buffer.clone()]
        self.stream = torch.cuda.Stream(k.device)
        self.free = [torch.cuda.Event(), torch.cuda.Event()]          # is a buffer still in use?
        self.place = 0                                                # the buffer of this layer
        self.started = False
        torch.cuda.synchronize(k.device)

    def prefetch(self, layer, n, place):
        """Copy the first n tokens of a layer into a buffer, as soon as the buffer is free."""
        self.stream.wait_event(self.free[place])
        with torch.cuda.stream(self.stream):
            self.buffers[place][:n].copy_(self.host[layer][:n], non_blocking=True)

    def attend(self, layer, q, k, v):
        n, here = self.length, self.place
        if not self.started:
            self.prefetch(layer, n - 1, here)
            self.started = True
        torch.cuda.current_stream().wait_stream(self.stream)          # this layer has arrived
        if layer + 1 < len(self.host):
            self.prefetch(layer + 1, n - 1, 1 - here)
        else:
            self.prefetch(0, n, 1 - here)                             # for the next token
        new = packed(k, v)                                            # (1, 1, H, 2, d)
        stored = self.buffers[here][:n]                               # (n, 1, H, 2, d)
        stored[-1:] = new
        self.host[layer][n - 1:n].copy_(new, non_blocking=True)
        keys, values = stored.permute(3, 1, 2, 0, 4)                  # (1, H, n, d) each
        out = self.attention(q, keys, values)
        self.free[here].record()
        self.place = 1 - here
        self.next_layer = layer + 1
        return out

    def memory(self):
        """Bytes of the buffers, as if no layers shared them: {"device": ..., "host": ...}."""
        device = sum(x.nbytes for x in self.buffers)
        return {"device": device, "host": sum(x.nbytes for x in self.host)}
