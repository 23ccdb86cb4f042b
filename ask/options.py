"""The options of the command line, and what can be checked before any long work."""
import argparse
import os
import stat
import tempfile
from pathlib import Path

from sentencekv import PAPER, RANKS, Settings, need

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
CACHE_SETTINGS = ("budget", "keep", "sink", "recent", "window", "max_pool", "rank")

def parse(argv=None):
    """The command line as a namespace of argparse."""
    parser = argparse.ArgumentParser(
        prog="python -m ask",
        description="Read a long text once, ask about it, see which sentences were fetched.",
        epilog="Without arguments: the embedded tiny model, a made-up story, three questions.")
    add_text_options(parser.add_argument_group("model, text and questions").add_argument)
    add_cache_options(parser.add_argument_group("settings of SentenceKV").add_argument)
    add_other_options(parser.add_argument_group("generation and hardware").add_argument)
    return parser.parse_args(argv)

def add_text_options(add):
    add("--model", metavar="DIR", type=Path, default=TINY,
        help="a Llama in Hugging Face's or Meta's layout (default: the embedded tiny model)")
    add("--prompt-file", metavar="FILE", help="the long text, in UTF-8 (default: a made-up story)")
    add("--ask", metavar="TEXT", action="append", default=[],
        help="a question about the text; if repeated, the next ones are follow-up questions")
    add("--chat", action="store_true", help="then take questions from standard input, one per "
        'line; the line "?" shows what was fetched for the last answer')
    add("--raw", action="store_true", help="do not use the checkpoint's chat template")
    add("--save-cache", metavar="FILE", help="save the cache of the text, for --load-cache")
    add("--load-cache", metavar="FILE", help="load a saved cache instead of reading a text")
    add("--dense", action="store_true", help="answer with the dense cache too, to compare")
    add("--page", metavar="FILE", help="write an HTML page that shows what each token fetched")
    add("--show", type=int, default=3, metavar="N", help="fetched sentences to show (default 3)")

def add_cache_options(add):
    default = Settings()
    add("--budget", type=int, help="tokens that a head attends to per step, all included "
        f"(default {default.budget}; story: 256)")
    add("--keep", type=float,
        help="keep this many times the budget of prompt tokens (default: all)")
    add("--sink", type=int, help=f"first tokens, always attended to (default {default.sink})")
    add("--recent", type=int, help=f"last tokens, always attended to (default {default.recent})")
    add("--window", type=int,
        help=f"last queries, which decide what --keep keeps (default {default.window})")
    add("--max-pool", type=int, help="width of the max-pool over that decision (default 1: none)")
    add("--rank", choices=RANKS,
        help=f"rule that ranks sentences (default {default.rank}; paper: {PAPER['rank']})")
    paper = ", ".join(f"{name} {value}" for name, value in PAPER.items())
    add("--paper", action="store_true", help=f"the paper's settings: {paper}")

def add_other_options(add):
    add("--max-new-tokens", type=int, default=128, metavar="N", help="per answer (default 128)")
    add("--temperature", type=float, default=0.0, help="0 means greedy decoding (default 0)")
    add("--top-p", type=float, default=1.0,
        help="sample from the likeliest tokens with this total probability (default 1)")
    add("--seed", type=int, default=8, help="for sampling and for the story (default 8)")
    add("--chunk", type=int, metavar="N",
        help="read N tokens at a time, which takes less device memory (default: all at once)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if available, else cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")

def cache_settings(args):
    """Settings of SentenceKV: the story's or the paper's, then those of the command line."""
    is_story = not args.prompt_file and not args.load_cache
    settings = {"budget": 256} if is_story else {}
    if args.paper:
        settings.update(PAPER)
    for name in CACHE_SETTINGS:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return settings

def check(args):
    """Raise ValueError or OSError for arguments that cannot work, before any long work."""
    need(args.max_new_tokens >= 1, f"--max-new-tokens must be >= 1, got {args.max_new_tokens}")
    need(args.show >= 0, f"--show must be >= 0, got {args.show}")
    need(0 <= args.temperature < 1e12, f"--temperature must be >= 0, got {args.temperature}")
    need(1e-12 < args.top_p <= 1, f"--top-p must be above 0, at most 1, got {args.top_p}")
    need(0 <= args.seed < 2**63, f"--seed must be 0 to 2**63 - 1, got {args.seed}")
    need(args.chunk is None or args.chunk > 2, f"--chunk must be >= 3, got {args.chunk}")
    for question in args.ask:
        need(is_text(question), "--ask must be valid UTF-8 text")
    if args.load_cache:
        check_load(args)
    else:
        Settings(**cache_settings(args))
    check_distinct(args)
    if args.save_cache:
        check_target("--save-cache", args.save_cache)
    if args.page:
        check_target("--page", args.page)
        only_saves = args.save_cache and args.prompt_file and not args.ask and not args.chat
        need(not only_saves, "--page needs an answer: add --ask or --chat")

def check_load(args):
    conflicts = [name for name in CACHE_SETTINGS if getattr(args, name) is not None]
    conflicts += [name for name in ("prompt_file", "dense", "paper") if getattr(args, name)]
    for name in conflicts:
        raise ValueError(f"--{name.replace('_', '-')} cannot be combined with --load-cache: "
                         "the file has the text and the settings")
    need(args.ask or args.chat, "--load-cache needs a question: use --ask or --chat")
    mode = os.stat(args.load_cache).st_mode
    need(stat.S_ISREG(mode), f"--load-cache {args.load_cache} is not a regular file")

def check_distinct(args):
    """ValueError if a file would be written twice, or be written over what is read.

    A loaded cache can be saved over itself: it is the same text.
    """
    reads = [("--prompt-file", args.prompt_file)]
    if args.page:
        reads.append(("--load-cache", args.load_cache))
    writes = [("--save-cache", args.save_cache), ("--page", args.page)]
    seen = {}
    for option, path in reads + writes:
        if path is not None:
            other = seen.setdefault(os.path.realpath(path), option)
            need(other == option, f"{other} and {option} are the same file, {path}")

def check_target(option, path):
    """Raise if a file cannot be written. Links are followed; only plain files are replaced."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    need(folder.is_dir(), f"{option} {path}: the folder {folder} does not exist")
    if target.exists():
        need(stat.S_ISREG(target.stat().st_mode), f"{option} {path} is not a regular file")
        need(os.access(target, os.W_OK), f"{option} {path} is write-protected")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot write to {folder}: {error.strerror}")

def is_tiny(args):
    """Is it the embedded tiny model?"""
    return args.model.resolve() == TINY

def is_text(text):
    """False for what no text contains: NUL, and what Python makes of bytes that are not UTF-8."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
