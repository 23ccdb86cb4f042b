"""The command line: read a long text once, ask about it, see which sentences were fetched.

Without arguments: the embedded tiny model reads a made-up story of about 4,000 tokens with facts
in it, and answers three questions with the dense cache and with SentenceKV.
"""
import os
import sys
import warnings
from pathlib import Path

import torch

from ask.conversation import ChatTurns, Conversation, PlainTurns
from ask.options import cache_settings, check, is_text, is_tiny, parse
from ask.page import write_page
from ask.report import (print_answer, print_cache, print_fetched, print_question, print_setup,
                        progress)
from ask.watch import WatchedKV
from extras.meta import load_meta
from extras.save import load, save
from extras.zero_copy import best_pool
from model import DenseKV, Llama
from sentencekv import SentenceKV, need, sentence_flags
from tokenizer import Tokenizer
from train_tiny import story

# ------------------------------------------------------------------------- model, text, questions

def check_device(name):
    """The device to use; ValueError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from None
    need(device.type in ("cpu", "cuda"), f"--device {name} is not supported, only cpu and cuda")
    return device

def read_text(args):
    """-> the long text, or None if it is in a saved cache, and [(question, expected answer)].

    The expected answer is None where it is not known.
    """
    questions = [(question, None) for question in args.ask]
    if args.load_cache:
        return None, questions
    if args.prompt_file:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")       # drops a BOM
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8 text: {error}") from None
        need(text, f"{args.prompt_file} is empty")
        return text, questions
    text, facts = story(4000, facts=8, seed=args.seed)
    if not questions and not args.chat:
        questions = [facts[1], facts[4], facts[-2]]         # from the start, the middle, the end
    return text, questions

def load_model(args, device):
    """-> the model and its tokenizer."""
    tokenizer = Tokenizer.from_dir(args.model)
    is_meta = (args.model / "params.json").is_file() and not (args.model / "config.json").is_file()
    load_checkpoint = load_meta if is_meta else Llama.from_pretrained
    dtype = args.dtype and getattr(torch, args.dtype)
    model = load_checkpoint(args.model, device, dtype, progress("loading tensor"))
    if is_tiny(args) and device.type == "cpu":
        torch.set_num_threads(1)                            # more threads would only wait
    return model, tokenizer

def choose_turns(args, tokenizer, loaded):
    """How text and questions become tokens. loaded: the ids of a loaded cache, or None."""
    if is_tiny(args):
        return PlainTurns(tokenizer, end=".")               # it was trained without an end of text
    if args.raw:
        return PlainTurns(tokenizer)
    if tokenizer.chat_format is None:
        print("note: the model has no chat template that is supported; continuing with plain text")
        return PlainTurns(tokenizer)
    turns = ChatTurns(tokenizer)
    if loaded is not None and not turns.fits(loaded):
        print("note: this cache was saved without the chat template; continuing with plain text")
        return PlainTurns(tokenizer)
    return turns

def make_conversations(args, model, tokenizer, device, compare):
    """{name: Conversation}: that of SentenceKV, and before it the dense cache's if wanted."""
    if args.load_cache:
        caches = {"SentenceKV": load(args.load_cache, model)}
    else:
        caches = {"dense": DenseKV()} if compare or args.dense else {}
        flags = sentence_flags(tokenizer.token_bytes)
        caches["SentenceKV"] = SentenceKV(
            flags, host_pool=best_pool(device), **cache_settings(args))
    WatchedKV.watch(caches["SentenceKV"])
    return {name: Conversation(model, tokenizer, cache, args) for name, cache in caches.items()}

# ------------------------------------------------------------------------------------------- run

def run(args):
    """Do what the arguments ask for; return the exit status."""
    check(args)
    device = check_device(args.device)
    text, questions = read_text(args)
    model, tokenizer = load_model(args, device)
    compare = any(expected for _, expected in questions)
    talks = make_conversations(args, model, tokenizer, device, compare)
    ours = talks["SentenceKV"]
    loaded = ours.cache.rows[0].tokens if text is None else None
    has_task = questions or args.chat or args.save_cache
    turns = choose_turns(args, tokenizer, loaded) if has_task else PlainTurns(tokenizer)
    ids = turns.text(text) if loaded is None else loaded
    for question, _ in questions:
        turns.question(question, True, None)                # an error now is better than later
    print_setup(model, len(ids), text or plain_text(tokenizer, ids[:99]))
    if not has_task:
        continue_text(talks, ids, turns)
        save_page(args.page, talks)
        return 0

    for name, talk in talks.items():
        how = "loaded"
        if loaded is None:
            how = f"prefill {talk.prefill(ids, progress(f'{name}: prefill, layer')):.2f} s"
        print_cache(name, how, talk.cache)
    status = save_cache(args.save_cache, ours) if args.save_cache else 0
    for i, (question, expected) in enumerate(questions):
        print_question(question, expected)
        ask(talks, turns, question, go_on=args.chat)
        if args.show and not args.chat:
            print_fetched(ours, args.show, expected, legend=i == 0)
    try:
        if args.chat:
            chat(talks, turns, max(args.show, 1))
    finally:                                                # whatever ends the conversation
        save_page(args.page, talks)
    return status

def ask(talks, turns, question, go_on=False):
    """Print the answers of all conversations.

    go_on: Ctrl-C ends the answer, not the conversation; what was read before stays.
    """
    prompts = [talk.question(question, turns) for talk in talks.values()]
    for (name, talk), ids in zip(talks.items(), prompts):
        try:
            print_answer(name, talk, talk.generate(ids, turns.stop_ids, question))
        except KeyboardInterrupt:
            if not go_on:
                raise
            talk.recover()
            print("   [interrupted]", flush=True)

def chat(talks, turns, show):
    """Answer questions from standard input, one per line."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        print("\nOne question per line; ? shows what was fetched for the last answer; Ctrl-C "
              "stops an answer; Ctrl-D ends.")
    while line := read_line("> " if interactive else ""):
        question = line.lstrip("\ufeff").strip()
        if question == "?":
            print_fetched(talks["SentenceKV"], show, legend=True)
            continue
        try:
            need(is_text(question), "it is not valid UTF-8")
            turns.question(question, True, None)
        except ValueError as error:
            print(f"note: this line was skipped: {first_line(error)}", flush=True)
            continue
        if question:
            if not interactive:
                print_question(question)
            ask(talks, turns, question, go_on=True)

def read_line(prompt):
    """A line of standard input; "" at its end."""
    print(prompt, end="", flush=True)
    return "" if sys.stdin is None else sys.stdin.readline()

def continue_text(talks, ids, turns):
    """Print what the model generates after the text."""
    for name, talk in talks.items():
        if len(ids) > 1:
            talk.prefill(ids[:-1], progress(f"{name}: prefill, layer"))
        print_answer(name, talk, talk.generate(ids[-1:], turns.stop_ids))

def plain_text(tokenizer, ids):
    """The text of ids, special tokens left out."""
    special = set(tokenizer.added.values())
    return tokenizer.decode([id for id in ids if id not in special])

def save_cache(path, talk):
    """Save a cache; a failure is printed, so that the questions are answered all the same."""
    try:
        save(talk.cache, path, talk.model)
    except OSError as error:
        print(f"error: the cache was not saved: {first_line(error)}", file=sys.stderr)
        return 2
    print(f"saved to {path}", flush=True)
    return 0

def save_page(path, talks):
    """Write the page of what was fetched, if one is wanted."""
    if path is None:
        return
    if not any(answer.ids for answer in talks["SentenceKV"].answers):
        print(f"note: {path} was not written: nothing was answered", flush=True)
        return
    size = write_page(path, talks["SentenceKV"], talks.get("dense"))
    print(f"\n{path}: a page of {size / 1e6:.2f} MB, open it in a browser", flush=True)

def first_line(error):
    """The message of an exception on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, torch.OutOfMemoryError):
        return "no device memory for so many tokens at once: set a smaller --chunk"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]

def prepare_streams():
    """Characters that cannot be shown or read must not end the program."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace"),
                           (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)

def flush_output():
    """Flush; drop what cannot be written, which Python would complain about at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def print_warning(message, *_, **__):
    print(f"warning: {message}", file=sys.stderr)

def main(argv=None):
    """Run the command line; return its exit status.

    0: done. 2: bad input, after one line that names it. 130: interrupted. 141: broken pipe.
    """
    args = parse(argv)
    prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            status = run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    finally:
        flush_output()
