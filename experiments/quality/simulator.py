"""Decodes many known tokens in one forward, each with the selection of its own decode step.

The T tokens are independent once their queries are known, so the simulator treats them as the rows
of a batch that share one pool of keys and values. A token at position p selects from the tokens
before p, and attends to the selection and to itself, as in a decode step of SentenceKV. The logits
equal those of T decode steps up to rounding, and cost a tenth of the time.
"""
import torch

from sentencekv import causal_attention, grouped_attention, need

class Simulator:
    """A cache for one forward of known tokens (1, T), after a recording of a prompt.

    method: an object with two functions (see methods.py). None: dense attention.

        begin(prompt, new)            ids of the prompt and of the T new tokens
        choose(layer, q, keys)        q (T, H, G, d), keys (H, N, d) of prompt and new tokens ->
                                      slot, used (T, H, places): where to find the tokens to attend
                                      to, and which places are used
    """
    SLICE = 32      # tokens that are attended from at a time: bounds the memory of their keys

    def __init__(self, recording, method=None):
        self.recording = recording
        self.method = method
        self.length = len(recording.tokens)
        self.next_layer = 0

    def begin(self, tokens):
        need(self.length == len(self.recording.tokens), "a simulator serves one forward")
        T, before = tokens.shape[1], self.length
        self.length += T
        if self.method is not None:
            self.method.begin(self.recording, tokens[0].tolist())
        return torch.arange(before, before + T)[None]

    def attend(self, layer, q, k, v):
        keys = torch.cat((self.recording.keys[layer], k[0]), dim=1)         # (H, N, d)
        values = torch.cat((self.recording.values[layer], v[0]), dim=1)     # (H, N, d)
        if self.method is None:
            return causal_attention(q, keys[None], values[None])
        rows = q[0].transpose(0, 1)                                         # (T, Hq, d)
        grouped = rows.unflatten(1, (len(keys), -1))                        # (T, H, G, d)
        slot, used = self.method.choose(layer, grouped, keys)
        slices = (x.split(self.SLICE) for x in (rows, slot, used))
        out = [self.attend_to(keys, values, *parts) for parts in zip(*slices)]
        return torch.cat(out).transpose(0, 1)[None]                         # (1, Hq, T, d)

    def attend_to(self, keys, values, rows, slot, used):
        """Attention of rows (t, Hq, d) to the used slots (t, H, places) -> (t, Hq, d)."""
        head = torch.arange(len(keys))[:, None]
        fetched_keys = keys[head, slot]                                     # (t, H, places, d)
        fetched_values = values[head, slot]
        query = rows[:, :, None]                                            # (t, Hq, 1, d)
        mask = used[:, :, None]                                             # (t, H, 1, places)
        return grouped_attention(query, fetched_keys, fetched_values, mask).squeeze(2)

class Batch:
    """Several simulators as the rows of one forward: the same tokens, another method in each row.

    Recordings with an equal number of tokens can differ from row to row.
    """

    def __init__(self, simulators):
        self.simulators = simulators
        self.length = simulators[0].length
        self.next_layer = 0

    def begin(self, tokens):
        rows = zip(self.simulators, tokens.split(1))
        return torch.cat([simulator.begin(row) for simulator, row in rows])

    def attend(self, layer, q, k, v):
        rows = zip(self.simulators, q.split(1), k.split(1), v.split(1))
        return torch.cat([simulator.attend(layer, *row) for simulator, *row in rows])
