"""The command line of sentencekv.py: read a long text once, ask about it, see which sentences were fetched to answer.

Without arguments: the embedded tiny model, a story of about 4,000 tokens with facts buried in it, three questions,
each answered with the dense cache and with SentenceKV.
"""
import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from model import DenseKV, Llama, check_settings
from sentencekv import PAPER, RANKS, SentenceKV, sentence_flags
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"

def parse(argv):
    p = argparse.ArgumentParser(prog="sentencekv.py", description=__doc__.split("\n\n")[0].split(": ", 1)[1],
                                epilog="Without arguments: a story, three questions, the embedded tiny model.")
    p.add_argument("--model", metavar="DIR", default=str(TINY),
                   help="a Llama in Hugging Face's or Meta's layout (default: the tiny one)")
    p.add_argument("--prompt-file", metavar="FILE", help="the long text, UTF-8 (default: a made-up story)")
    p.add_argument("--ask", metavar="TEXT", action="append", default=[],
                   help="a question after the text; given several times, each is a follow-up of the one before")
    p.add_argument("--chat", action="store_true",
                   help="then questions from standard input, a line each; a line ? shows what the last one fetched")
    p.add_argument("--save-cache", metavar="FILE", help="keep what was read, for --load-cache")
    p.add_argument("--load-cache", metavar="FILE", help="go on from a saved cache instead of reading a text")
    p.add_argument("--raw", action="store_true", help="no chat template, even if the tokenizer has Llama 3's tokens")
    p.add_argument("--dense", action="store_true", help="answer with the dense cache too, to compare")
    p.add_argument("--paper", action="store_true",
                   help="the paper's settings, also for the story: " + ", ".join(f"{k} {v}" for k, v in PAPER.items()))
    p.add_argument("--budget", type=int, help="most tokens attended to per step and head (default 1024; story: 256)")
    p.add_argument("--keep", type=float, help="keep only this times the budget of the prompt's tokens (default: all)")
    p.add_argument("--sink", type=int, help="first tokens, always attended (default 4)")
    p.add_argument("--recent", type=int, help="last tokens, always attended (default 32)")
    p.add_argument("--window", type=int, help="queries that judge what --keep keeps (default 32)")
    p.add_argument("--pool", type=int, help="width of the max-pool over that judgement (default 1: none)")
    p.add_argument("--rank", choices=RANKS, help="how sentences are ranked (default spread; the paper's is mean)")
    p.add_argument("--chunk", type=int, metavar="N", help="read N tokens at a time: less device memory (default: all)")
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="sample from the likeliest tokens that together have this probability (default 1)")
    p.add_argument("--seed", type=int, default=8, help="of the sampling, and of the story (default 8)")
    p.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    p.add_argument("--show", type=int, default=3, metavar="N", help="fetched sentences to show (default 3)")
    return p.parse_args(argv)

def progress(what):
    """A counting line on stderr, for what takes more than two seconds."""
    start = time.perf_counter()

    def report(done, total):
        if time.perf_counter() - start > 2:
            print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    return report

class Watched(SentenceKV):
    """A SentenceKV that notes for its first row what was fetched, and how much attention it got."""

    def watch(self):
        self.steps, self.wanted, self.attention, self.seconds = 0, Counter(), Counter(), 0.0

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if q.shape[2] == 1:
            start = time.perf_counter()
            self.note(q[0, :, 0], self.layers[layer])
            self.seconds += time.perf_counter() - start
        return out

    def note(self, q, mem):
        """q (Hq, d), and what a layer has fetched for it."""
        near, (sentence, taken) = int(self.plan.near[0]), (t[0] for t in mem.fetched)       # (H, k) each
        seen, keys = mem.valid[0], mem.work[0, :, :, 0]                          # (H, n), (H, n, d): near, fetched, newest
        H, n, d = keys.shape
        logits = (q.view(H, -1, d) @ keys.transpose(1, 2)).float() * d ** -0.5   # (H, G, n)
        weight = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).mean(1)[:, near:]         # (H, n - near)
        self.steps += H
        for h in range(H):
            owner = sentence[h].repeat_interleave(taken[h])                      # sentence of each token
            got = torch.zeros(int(sentence[h].max()) + 1, device=q.device).index_add_(0, owner, weight[h, :len(owner)])
            for s in sentence[h][taken[h] > 0].tolist():
                self.wanted[s] += 1
                self.attention[s] = max(self.attention[s], float(got[s]))

class Conversation:
    """A model, one cache, and the ids that have gone into it, so that fetched sentences can be shown as text."""

    def __init__(self, model, tokenizer, cache, args):
        self.model, self.tokenizer, self.cache, self.args = model, tokenizer, cache, args
        self.ids, self.unread = [], []                       # in the cache; generated last and not in the cache yet
        if isinstance(cache, Watched):
            cache.watch()

    def take(self, ids):
        """-> (1, T): what was generated last, then `ids`. From now on they count as read."""
        ids, self.unread = self.unread + ids, []
        self.ids += ids
        return torch.tensor([ids], device=self.model.norm.weight.device)

    def read(self, ids, what):
        """Put a text into the cache; -> seconds that it took."""
        start = time.perf_counter()
        self.model.prefill(self.take(ids), self.cache, self.args.chunk, progress(f"{what}: reading, layers"))
        return time.perf_counter() - start

    def answer(self, ids, stop):
        """Yield what follows `ids`, piece by piece; then `ms` has the times of the decode steps, without watching."""
        a, self.ms, watched = self.args, [], isinstance(self.cache, Watched)
        steps = self.model.generate(self.take(ids), self.cache, a.max_new_tokens, a.temperature, a.top_p, a.seed, stop,
                                    chunk=a.chunk)

        def generated():
            if watched:
                self.cache.watch()
            start, watching = time.perf_counter(), 0.0
            for token in steps:
                self.ids += self.unread                      # the step has put the token before into the cache
                self.unread = token.tolist()
                now, watching = watching, self.cache.seconds if watched else 0.0
                self.ms.append(1e3 * (time.perf_counter() - start - (watching - now)))
                yield self.unread[0]
                start = time.perf_counter()
        yield from self.tokenizer.stream(generated())
        self.ms = self.ms[1:] or self.ms                     # the first token is the work of the prompt

    def show_fetched(self, n, truth):
        """Print the n sentences that got the most attention of any head at any step."""
        cache = self.cache
        if n and not cache.attention:
            print("    nothing was fetched")
        if n and cache.attention:
            print("    fetched  attention  (by so many of all layers, heads and steps; the most that one head gave it)")
        for s, attention in cache.attention.most_common(n):
            start, end = cache.first[0, s:s + 2].tolist()
            text = " ".join(self.tokenizer.decode(self.ids[start:end]).split())
            print(f"    {cache.wanted[s] / cache.steps:6.0%} {attention:9.0%}    {text[:90]}"
                  f"{' ...' if len(text) > 90 else ''}{'   <- the fact' if truth and text == truth.strip() else ''}")

def settings(args, story):
    """The keyword settings of SentenceKV: the preset, then what was given on the command line."""
    given = {name: getattr(args, name) for name in ("budget", "keep", "sink", "recent", "window", "pool", "rank")}
    given = {name: value for name, value in given.items() if value is not None}
    return {**({"budget": 256} if story else {}), **(PAPER if args.paper else {}), **given}

def prompts(args, tokenizer):
    """-> ids of the long text (None: it comes from --load-cache), [(question, true answer or None)], turn(question,
    first) -> its ids, and the ids that end an answer."""
    plain, facts = args.raw or "<|eot_id|>" not in tokenizer.added, []
    if args.prompt_file:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.prompt_file} is no UTF-8 text: {e}")
    elif args.load_cache:
        text = ""
    else:
        from train_tiny import story
        text, facts = story(4000, facts=8, seed=args.seed)
        facts = [facts[1], facts[4], facts[-2]]                                  # early, middle, late
    if plain:
        ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None)
        turn = lambda q, first: tokenizer.encode(q if q[:1].isspace() else " " + q)
    else:                                                                        # the questions are turns of a chat
        tail = tokenizer.chat([{"role": "user", "content": ""}])[-len(tokenizer.chat([])):]  # end of turn, next header
        ids = tokenizer.chat([{"role": "user", "content": text}])[:-len(tail)]
        turn = lambda q, first: (tokenizer.encode("\n\n" + q) + tail if first else
                                 tokenizer.chat([{"role": "user", "content": q}])[1:])
    asked = [(q, None) for q in args.ask] or ([] if args.chat else facts)
    tiny = plain and args.model == str(TINY) and (asked or args.chat)
    ends = "." if tiny else ""                                                   # it knows no end of text
    if args.load_cache:
        if not asked and not args.chat:
            raise ValueError("--load-cache needs a question: give --ask or --chat")
        ids = None
    elif not asked and not args.chat and not args.save_cache:                    # nothing asked: go on with the text
        ids, last, asked = ids[:-1], ids[-1:], [("", None)]
        turn = lambda q, first: last
    return ids, asked, turn, tokenizer.stop_ids | set(tokenizer.encode(ends))

def questions(asked, chat, show):
    """Yield (question, true answer or None): those given, then the lines of standard input; a line "?" calls show."""
    yield from asked
    if chat and sys.stdin.isatty():
        print("\nAsk, a line each; ? shows what was fetched for the last answer; Ctrl-D ends.")
    for line in sys.stdin if chat else ():
        if line.strip() == "?":
            show()
        elif line.strip():
            yield line.strip(), None

def conversations(args, model, tokenizer, dense):
    """{name: Conversation}: SentenceKV's, new or loaded, and before it the dense cache's if that is wanted."""
    given = settings(args, not args.prompt_file and not args.load_cache)
    if args.load_cache:
        for name, value in {"prompt-file": args.prompt_file, "dense": args.dense, "paper": args.paper, **given}.items():
            if value:
                raise ValueError(f"--{name} does not go with --load-cache: text and settings are in the file")
        cache = Watched.load(args.load_cache, model)
    else:
        cache = Watched(sentence_flags(tokenizer.token_bytes), **given)
    caches = {"dense": DenseKV(), "SentenceKV": cache} if dense or args.dense else {"SentenceKV": cache}
    talks = {name: Conversation(model, tokenizer, cache, args) for name, cache in caches.items()}
    if args.load_cache:
        talks["SentenceKV"].ids = cache.tokens()[0].tolist()
    return talks

def run(args):
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.show < 0:
        raise ValueError(f"--show must be at least 0, got {args.show}")
    check_settings(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.chunk)     # now, not after reading
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device} cannot be used: {str(e).splitlines()[0]}")
    tokenizer = Tokenizer.from_dir(args.model)
    model = Llama.from_pretrained(args.model, device=device, dtype=args.dtype and getattr(torch, args.dtype),
                                  progress=progress("loading, tensor"))
    if device == "cpu" and args.model == str(TINY):
        torch.set_num_threads(1)                             # in a model this small threads only wait for each other
    if args.save_cache and not Path(args.save_cache).resolve().parent.is_dir():     # now, not after hours of reading
        raise ValueError(f"--save-cache {args.save_cache}: there is no such folder")
    if args.save_cache and Path(args.save_cache).is_dir():
        raise ValueError(f"--save-cache {args.save_cache} is a folder: give the name of a file")
    ids, asked, turn, stop = prompts(args, tokenizer)
    talks = conversations(args, model, tokenizer, dense=any(truth for _, truth in asked))
    ours = talks["SentenceKV"]
    text = ids or ours.ids
    print(f"{len(text)} tokens of text, a Llama of {sum(p.numel() for p in model.parameters()):,} parameters in "
          f"{model.norm.weight.dtype} on {device}, budget {ours.cache.budget}\n"
          f"{' '.join(tokenizer.decode(text[:60]).split())[:110]} ...\n")
    for name, talk in talks.items():
        how = f"read in {talk.read(ids, name):.2f} s" if ids else "loaded"
        bytes_ = talk.cache.memory()
        print(f"{name:10}  {how}, KV cache: {bytes_['device'] / 1e6:6.2f} MB on the device, "
              f"{bytes_['host'] / 1e6:6.2f} MB in host memory")
    if args.save_cache:
        ours.cache.save(args.save_cache)
        print(f"saved to {args.save_cache}")
    first = True
    for question, truth in questions(asked, args.chat, lambda: ours.show_fetched(max(args.show, 1), None)):
        answer(talks, question, truth, turn(question, first), stop)
        first = False
        if not args.chat:
            ours.show_fetched(args.show, truth)

def answer(talks, question, truth, ids, stop):
    """Print what each cache answers to a question."""
    print(f"\n{question.strip()}" + (f"\n    {'truth':10}  {truth.strip()}" if truth else ""))
    for name, talk in talks.items():
        print(f"    {name:10} ", end="", flush=True)
        for piece in talk.answer(ids, stop):
            print(piece.replace("\n", "\n    "), end="", flush=True)
        bytes_ = talk.cache.memory()
        print(f"   [{statistics.median(talk.ms):.1f} ms/token, device {bytes_['device'] / 1e6:.2f} MB, "
              f"host {bytes_['host'] / 1e6:.2f} MB]", flush=True)

def main(argv=None):
    """Returns the exit status: 0; 2, after one line that says why, for settings or files that cannot work; 130 after
    Ctrl-C."""
    args = parse(argv)
    try:
        run(args)
    except BrokenPipeError:                                  # the reader of our output has gone (| head)
        sys.stderr.close()
        return 141
    except (ValueError, OSError, MemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
