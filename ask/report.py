"""What the command line prints."""
import statistics
import sys
import time

from ask.watch import most_attended

LEGEND = """\
    (attention: the most that one KV head gave the sentence, for one token of the answer;
     heads: how many of all KV heads fetched some of it, mean over the answer's tokens)"""

def progress(what):
    """A function (done, total) that counts on a terminal, for work of more than two seconds."""
    start = time.perf_counter()
    on_terminal = sys.stderr is not None and sys.stderr.isatty()

    def report(done, total):
        if on_terminal and time.perf_counter() - start > 2:
            end = "\n" if done == total else ""
            print(f"\r{what} {done} of {total}", end=end, file=sys.stderr, flush=True)
    return report

def megabytes(n):
    return f"{n / 1e6:.2f} MB"

def short(text, width):
    """The text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 4] + " ..."

def print_setup(model, tokens, text):
    """What the questions are asked of: the model, and a text of so many tokens."""
    parameters = sum(p.numel() for p in model.parameters())
    weight = model.norm.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    print(f"model       a Llama of {parameters:,} parameters, {dtype}, on {weight.device}")
    print(f"text        {tokens:,} tokens: {short(text[:999], 66)}\n", flush=True)

def print_cache(name, how, cache):
    """One line about a cache: how it was filled, what it takes."""
    size = cache.memory()
    settings = getattr(cache, "settings", None)
    budget = f"; budget {settings.budget} tokens" if settings else ""
    print(f"{name:10}  {how}; KV cache: {megabytes(size['device'])} on the device, "
          f"{megabytes(size['host'])} in host memory{budget}", flush=True)

def print_question(question, expected=None):
    print(f"\n{question.strip()}", flush=True)
    if expected:
        print(f"  expected    {expected.strip()}")

def print_answer(name, talk, pieces):
    """Print the pieces of an answer as they come, then the time per token."""
    print(f"  {name:10}  ", end="", flush=True)
    started = False
    for piece in pieces:
        piece = piece if started else piece.lstrip()
        started = started or piece != ""
        print(piece.replace("\n", "\n" + 14 * " "), end="", flush=True)
    times = talk.milliseconds
    print(f"   [{statistics.median(times):.1f} ms/token]" if times else "", flush=True)

def print_fetched(talk, n, expected=None, legend=False):
    """Print the n fetched sentences before the question that got the most attention.

    talk: a Conversation with a WatchedKV. legend: explain the columns.
    """
    end = talk.answers[-1].asked_at if talk.answers else None
    best = most_attended(talk.cache, end)[:n]
    if not best:
        print("    no sentence was fetched", flush=True)
        return
    lines = ["    fetched for this answer, most attended first:",
             "    attention  heads  sentence"]
    for fetched in best:
        text = talk.tokenizer.decode(fetched.ids)
        is_answer = expected is not None and text.strip() == expected.strip()
        mark = "   <- the answer" if is_answer else ""
        lines.append(f"    {fetched.attention:9.0%}  {fetched.share:5.0%}  {short(text, 75)}{mark}")
    print("\n".join(lines + [LEGEND] * legend), flush=True)
