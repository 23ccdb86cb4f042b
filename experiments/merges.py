"""Does tiktoken merge as a tokenizer.json says? tokenizer.py asks before it hands such a file's vocabulary to tiktoken.

Why check_merges() is enough: take any text and suppose that both have joined the same until now. Tiktoken joins next a
pair x, y of lowest id. What was joined within these characters was joined in the order in which tiktoken would join
them if they stood alone, so (x, y) is last_pair(x + y), and so are all neighbours that make this token. The file lists
that pair, before all that make higher ids; nothing lower is possible. So it joins the same pair, the leftmost first.
"""
from tokenizer import LONGEST, NO_ID, demand

def check_merges(vocab, merges, ignore_merges):
    """Would tiktoken merge as the file says? It has no list of merges: of all neighbours that make a token, those of
    the lowest id join, and a piece that is a token stays whole. So the file's merges must come in the order of the ids,
    and have of each token the pair that tiktoken joins last. (Other pairs do no harm: they never become neighbours.)
    A token that joining cannot make is only ever a whole piece: it needs ignore_merges."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    known = all(len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys() for pair in pairs)
    wanted = {last_pair(token, vocab) for token in vocab if 1 < len(token) <= LONGEST}
    demand(known and wanted - {None} <= {*pairs} and len({*pairs}) == len(pairs)
           and pairs == sorted(pairs, key=lambda pair: vocab["".join(pair)]) and (ignore_merges or None not in wanted),
           "the merges do not make the tokens in the order of their ids, as tiktoken would")

def last_pair(token, vocab):
    """What tiktoken joins last when it makes the token, "the" -> ("th", "e"); None if it gets stuck before."""
    parts = [*token]
    while len(parts) > 2:
        ids = [vocab.get(a + b, NO_ID) for a, b in zip(parts, parts[1:])]
        i = ids.index(min(ids))
        if ids[i] == NO_ID:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)
