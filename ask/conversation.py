"""A text and questions about it, as tokens (turns) and in a cache (conversation)."""
import time
from dataclasses import dataclass, field

import torch

from ask.watch import WatchedKV
from extras.branch import fork, truncate
from extras.check_memory import check_memory
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

@dataclass
class Answer:
    """An answer of a Conversation.

    ids[j] was predicted from the token at position start - 1 + j, and takes position start + j as
    soon as it enters the cache. A step of position start - 1 + j has fetched for ids[j].
    """
    question: str                               # "": the text was continued
    asked_at: int                               # position of the question
    start: int                                  # position of the first token after the question
    ids: list = field(default_factory=list)
    steps: list = field(default_factory=list)   # of a WatchedKV: its decode steps

class Conversation:
    """A model and one cache that has the text, then questions and answers, in it.

    length        tokens in the cache after the last complete step
    text_length   tokens of the text
    answers       list of Answer; all of them if the arguments ask for a page, else the last one
    unread        the token that was generated last; it enters the cache with the next question
    milliseconds  of every decode step of the last answer
    """

    def __init__(self, model, tokenizer, cache, args):
        self.model, self.tokenizer, self.cache, self.args = model, tokenizer, cache, args
        self.length = self.text_length = cache.length
        self.answers, self.unread, self.milliseconds = [], [], []
        self.backup = None                                  # a cache to go back to, see recover()

    def tensor(self, ids):
        return torch.tensor([ids], device=self.model.norm.weight.device)

    def prefill(self, ids, progress=None):
        """Put the text into the cache; returns the seconds that it took."""
        start, tokens = time.perf_counter(), self.tensor(ids)
        check_memory(self.model, tokens, self.cache)
        self.model.prefill(tokens, self.cache, self.args.chunk, progress)
        self.length = self.text_length = self.cache.length
        return time.perf_counter() - start

    def question(self, question, turns):
        """The ids that ask a question at this point of the conversation."""
        first = self.length == self.text_length
        last = self.unread[-1] if self.unread else None
        return turns.question(question, first, last)

    def generate(self, ids, stop_ids, question=""):
        """Generate what follows `ids`; yields pieces of text, special tokens left out."""
        asked_at = self.length + len(self.unread)
        ids, args = self.unread + ids, self.args
        answer = Answer(question, asked_at, self.length + len(ids))
        self.answers = [*self.answers, answer] if args.page else [answer]
        self.backup = None
        if isinstance(self.cache, WatchedKV):
            self.cache.steps = answer.steps                 # record this answer alone
            if not self.cache.can_truncate():
                self.backup = fork(self.cache), self.length, self.unread
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
            self.answers[-1].ids.append(self.unread[0])
            yield self.unread[0]
            recording, start = recorded, time.perf_counter()

    def recover(self):
        """After an interrupted answer: keep all complete steps, forget the rest.

        With keep=r, a cache that has not pruned its prompt yet cannot be truncated: then the
        question is forgotten as well.
        """
        if isinstance(self.cache, DenseKV):
            self.cache.truncate(self.length)
        elif self.backup is None or self.cache.can_truncate():
            truncate(self.cache, self.length)
        else:
            self.cache, self.length, self.unread = self.backup
        if self.answers:
            steps = self.answers[-1].steps
            steps[:] = [step for step in steps if step.position < self.length]
            if self.length <= self.answers[-1].asked_at:
                self.answers.pop()
