"""Choosing one token ahead: what a step attends to is fetched in the step before, while other layers compute.

    cache = Lookahead(sentence_flags(tokenizer.token_bytes), budget=1024)        the settings are those of SentenceKV

The fetch for token t + 1 ranks the sentences with the query of token t. That is another selection than SentenceKV's,
which is why it is no setting of it. What is fetched waits on the device, so every layer has places of its own.
"""
import torch

from sentencekv import SentenceKV

class Lookahead(SentenceKV):
    ahead = None                                             # the plan of what is fetched for the next token

    def begin(self, tokens, more=0):
        fetched = self.ahead
        position = super().begin(tokens, more)
        self.ahead = None
        if tokens.shape[1] > 1:
            return position                                  # after a prompt, nothing that was fetched is of use
        if fetched is not None:
            self.plan = None
        if self.since == self.refresh:                       # the next token is due for a fetch
            self.ahead = self._plan(self.lengths[:, None].clone())
            self.ahead.queries = self.queries.clone()        # the next token changes them while this fetch may still run
        return position

    def new_layer(self, *sizes):
        super().new_layer(*sizes)
        mem = self.layers[-1]
        mem.work, mem.ready = torch.zeros_like(mem.work), None

    def _decode(self, layer, q, kv):
        mem = self.layers[layer]
        if mem.ready is not None:
            torch.cuda.current_stream(q.device).wait_event(mem.ready)
        out = super()._decode(layer, q, kv)
        if self.ahead is not None:
            with self.pool.aside(q):
                self._fetch(layer, q.view(len(q), kv.shape[2], -1, q.shape[3]), self.ahead)
                mem.ready = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
        return out
