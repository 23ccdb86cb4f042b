"""A text and questions about it, as tokens (turns) and in a cache (conversation)."""
import time

import torch

from ask.watch import WatchedKV
from extras.branch import truncate
from model import DenseKV

class PlainTurns:
    """The text, the questions and the answers follow each other as plain text.

    stop_ids: an answer ends with one of these. `end`: text whose tokens end an answer as well.
    """

    def __init__(self, tokenizer, end=""):
        self.tokenizer = tokenizer
        self.stop_ids = tokenizer.stop_ids | set(tokenizer.encode(end))

    def text(self, text):
        """The ids of the text that the questions are about."""
        return self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None)

    def question(self, question, first, last):
        """The ids that ask a question. first: is it the first one after the text?

        last: the id that the answer before ended with; None: there was no answer.
        """
        space = "" if question[:1].isspace() else " "
        return self.tokenizer.encode(space + question)

class ChatTurns:
    """The checkpoint's chat template: the text and the first question are the first user turn."""

    def __init__(self, tokenizer):
        self.tokenizer, self.stop_ids = tokenizer, tokenizer.stop_ids

    def text(self, text):
        return self.tokenizer.chat([{"role": "user", "content": text}], close=False)

    def question(self, question, first, last):
        if first:
            return self.tokenizer.encode("\n\n" + question) + self.tokenizer.chat([], after="user")
        ids = self.tokenizer.chat([{"role": "user", "content": question}], after="assistant")
        return ids[1:] if ids[0] == last else ids           # if the model has closed its turn

    def fits(self, ids):
        """Do the ids begin as a text does, up to the last special token before its content?"""
        special = set(self.tokenizer.added.values())
        start = self.text("")
        n = max((i + 1 for i, id in enumerate(start) if id in special), default=len(start))
        return ids[:n] == start[:n]

class Conversation:
    """A model and one cache that has the text, then questions and answers, in it.

    length        tokens in the cache after the last complete step
    text_length   tokens of the text
    asked_at      position of the last question
    unread        the token that was generated last; it enters the cache with the next question
    milliseconds  of every decode step of the last answer
    """

    def __init__(self, model, tokenizer, cache, args):
        self.model, self.tokenizer, self.cache, self.args = model, tokenizer, cache, args
        self.length = self.text_length = self.asked_at = cache.length
        self.unread, self.milliseconds = [], []

    def tensor(self, ids):
        return torch.tensor([ids], device=self.model.norm.weight.device)

    def prefill(self, ids, progress=None):
        """Put the text into the cache; returns the seconds that it took."""
        start = time.perf_counter()
        self.model.prefill(self.tensor(ids), self.cache, self.args.chunk, progress)
        self.length = self.text_length = self.cache.length
        return time.perf_counter() - start

    def question(self, question, turns):
        """The ids that ask a question at this point of the conversation."""
        first = self.length == self.text_length
        last = self.unread[-1] if self.unread else None
        return turns.question(question, first, last)

    def generate(self, ids, stop_ids):
        """Generate what follows `ids`; yields pieces of text, special tokens left out."""
        ids, args = self.unread + ids, self.args
        self.asked_at = self.length
        if isinstance(self.cache, WatchedKV):
            self.cache.steps = []                           # record this answer alone
        steps = self.model.generate(
            self.tensor(ids), self.cache, args.max_new_tokens, args.temperature, args.top_p,
            args.seed, stop_ids, chunk=args.chunk)
        generated = self._record(steps, len(ids))
        text_ids = (id for id in generated if id not in self.tokenizer.stop_ids)
        return self.tokenizer.stream(text_ids)

    def _record(self, steps, new):
        """Yield the ids of `steps`, note what is in the cache, and take the time of every step."""
        self.milliseconds = []
        recording = getattr(self.cache, "seconds", 0.0)     # of a WatchedKV: does not count
        start = time.perf_counter()
        for step, token in enumerate(steps):
            # A step puts `new` tokens into the cache; its own token follows with the next step.
            self.length, self.unread = self.length + new, token.tolist()
            new = 1
            seconds = time.perf_counter() - start
            recorded = getattr(self.cache, "seconds", 0.0)
            if step > 0:                                    # the first step is the prefill
                self.milliseconds.append(1000 * (seconds - (recorded - recording)))
            yield self.unread[0]
            recording, start = recorded, time.perf_counter()

    def recover(self):
        """After an interrupted answer: keep all complete steps, forget the rest."""
        if isinstance(self.cache, DenseKV):
            self.cache.truncate(self.length)
        else:
            truncate(self.cache, self.length)
