"""The texts that the tiny model learns and is tested on: facts among filler and prose, questions and answers.

     The phone number of Isaac is 5 9 5 9 1 2. In the winter the drum was above the warm letter. [...]
     What is the phone number of Isaac? The phone number of Isaac is 5 9 5 9 1 2.

Everything is made from the words below and from the prose of Python's help pages; the same seed gives the same text.
A fact is a tuple (relation, name, value). A sentence begins with a space and ends with a full stop.
Reading order: words -> fact, question, answer -> passage -> story, needle (to test), lesson, copying (to train).
"""
import ast
import functools
import itertools
import os
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

WORDS = {kind: words.split() for kind, words in {
    "name": """Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia Peter Quinn
        Rachel Samuel Tina Ursula Victor Wendy Xavier Yvonne Zachary Amber Boris Clara Dennis Elena Felix Gloria Hugo
        Ivan Nora Julia Kevin Laura Martin Oscar Paula Robert Sophie Thomas Uma Vera Walter Anton Bella Cyril Diana
        Edgar Fiona George Helen Isaac Jenny Keith Linda Moses Nadia Otto Petra""",
    "kind": """grey old small quiet young tall bright lazy happy clever brown hungry golden wooden dusty cold warm
        strange broken gentle heavy narrow""",
    "animal": "fox cat dog owl horse rabbit wolf bear goat duck mouse sheep raven turtle badger heron",
    "place": """bridge river garden tower market station school kitchen harbour forest castle library mill cellar
        attic barn church meadow lighthouse tavern""",
    "thing": """lamp book clock basket mirror rope candle drum kite hammer ring coin box chair letter map bell ladder
        bottle blanket""",
    "colour": "red blue green yellow purple orange black white pink silver crimson turquoise",
    "fruit": "apple pear mango cherry lemon peach plum grape melon banana fig papaya",
    "town": "Paris London Rome Madrid Berlin Vienna Oslo Dublin Lisbon Prague Cairo Tokyo Lima Delhi Geneva Athens",
    "digit": "0 1 2 3 4 5 6 7 8 9",
    "crowd": "boats birds men",
    "season": "morning evening night summer winter afternoon",
    "near": "near behind under beside inside above",
    "rests": "sleeps waits plays runs hides rests sings walks eats stands",
    "found": "found lost painted bought sold carried repaired dropped hid borrowed"}.items()}
FILLER = """The {kind} {animal} {rests} {near} the {kind} {place}.
{name} {found} a {kind} {thing} in the {place}.
The {colour} {thing} of {name} was {near} the {place}.
In the {season} the {thing} was {near} the {kind} {thing}.
There are {digit} {colour} {crowd} {near} the {place} of {name}.
{name} and {name} met the {animal} {near} the {place} every {season}.""".split("\n")
RELATIONS = {"secret code": ("digit", 4), "phone number": ("digit", 6), "locker number": ("digit", 3),
             "favourite colour": ("colour", 1), "favourite fruit": ("fruit", 1), "home town": ("town", 1),
             "best friend": ("name", 1), "lucky charm": ("thing", 1), "hiding place": ("place", 1),
             "favourite animal": ("animal", 1)}         # a value: which words, and how many of them
TEXTS = " ".join([*FILLER, *RELATIONS, "What is", *map(" ".join, WORDS.values())])
KNOWN = set(re.findall(r"\w+", re.sub(r"{\w+}", "", TEXTS)))          # our tokenizer makes one token of each

def question(relation, name, value=None):
    """The question that a fact answers: " What is the home town of Bob?"."""
    return f" What is the {relation} of {name}?"

def answer(relation, name, value):
    """A fact as a sentence, in two parts: (" The home town of Bob is", " Rome.")."""
    return f" The {relation} of {name} is", f" {value}."

def tell(fact):
    """A fact as it is told, and told again to answer: " The home town of Bob is Rome."."""
    return "".join(answer(*fact))

def draw_facts(rng, n, relations=tuple(RELATIONS), taken=()):
    """At most n facts, no two about the same relation and name: [("home town", "Bob", "Rome"), ...]."""
    pairs = [(r, name) for r in relations for name in WORDS["name"] if (r, name) not in taken]
    return [(r, name, " ".join(rng.choices(WORDS[RELATIONS[r][0]], k=RELATIONS[r][1])))
            for r, name in rng.sample(pairs, min(n, len(pairs)))]

@functools.cache
def prose_sentences():
    """Some 2000 sentences of Python's help pages (they differ a little from one version of Python to the next)."""
    text = re.sub(r"[=\-*_~^\"`|.]{2,}", " ", "\n".join(topics.values()))
    sentences = [" " + re.sub(r"\s+", " ", s).strip() for s in re.split(r"(?<=[.?!])\s+|\n\s*\n", text)]
    return [s for s in sentences if 20 <= len(s) <= 160 and s[-1] in ".?" and "|" not in s]

@functools.cache
def library_prose():
    """Paragraphs of prose from the docstrings of the standard library, one after the other (not in prose_sentences).

    They differ a little from one version of Python to the next.
    """
    folder, paragraphs = Path(os.__file__).parent, {}
    for file in sorted([*folder.glob("*.py"), *folder.glob("[a-hj-su-z]*/*.py")]):            # no idlelib, no tests
        if "site-packages" in file.parts or "pydoc_data" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for part in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(part.split())
                    if len(text) > 100 and text[0].isupper() and text[-1] == "." and ">>>" not in text:
                        paragraphs[text] = None                                  # each once, in this order
    return " ".join(paragraphs)

def estimate(sentence):
    """Number of our tokenizer's tokens, without a tokenizer: exact for our own sentences, about right for prose."""
    return sum(1 if w in KNOWN else 1 + len(w) // 4 for w in re.findall(r"\w+|[^\w\s]", sentence))

def passage(rng, room, facts, spare=(), density=0.0, prose=0.0, size=estimate):
    """Text of at least `room` tokens (too long by less than its first sentence), and all the facts told in it.

    Every (depth, fact) of `facts` is told at its depth, 0 (start) to 1 (end), after the first sentence. Of the other
    sentences a share `density` tells facts of `spare`; of those left, a share `prose` is prose and the rest filler.
    """
    sentences, told, spare = [], [fact for _, fact in facts], iter(spare)
    fill = lambda kind: rng.choice(WORDS[kind[1]])
    room -= sum(size(tell(fact)) for fact in told)
    while room > 0 or not sentences:
        fact = next(spare, None) if rng.random() < density else None
        if fact:
            told.append(fact)
            sentences.append(tell(fact))
        elif rng.random() < prose:
            sentences.append(rng.choice(prose_sentences()))
        else:
            sentences.append(" " + re.sub(r"{(\w+)}", fill, rng.choice(FILLER)))
        room -= size(sentences[-1])
    sentences.reverse()
    for depth, fact in sorted(facts, reverse=True):
        sentences.insert(1 + round(depth * (len(sentences) - 1)), tell(fact))
    return "".join(sentences), told

def story(tokens, facts=8, seed=0, prose=0.0, density=None):
    """A text of about `tokens` tokens that tells `facts` facts at all depths -> (text, [(question, answer), ...]).

    density: share of the other sentences that tell facts nobody asks about; prose: share of prose in what is left.
    """
    rng = random.Random(seed)
    if not 0 <= facts <= len(RELATIONS) * len(WORDS["name"]):
        raise ValueError(f"facts must be at most {len(RELATIONS) * len(WORDS['name'])}, got {facts}")
    drawn = draw_facts(rng, facts + tokens // 8 * bool(density))
    asked = [((i + rng.random()) / facts, fact) for i, fact in enumerate(drawn[:facts])]
    text, _ = passage(rng, tokens, asked, drawn[facts:], density or 0.0, prose)
    return text, [(question(*fact), tell(fact)) for _, fact in asked]

def needle(rng, length, tokenizer, facts=8, density=None, depth=None, prose=0.0, whole=False):
    """A prompt of exactly `length` tokens, its first sentence cut to fit -> (its ids, ids of the answer).

    The fact asked for is told at `depth` 0..1 (None: anywhere) among facts - 1 others, half of them of its relation,
    or, if a `density` is given, among as many as make that share of the sentences. The prompt ends with "is" and the
    answer is " 4 7 1 9."; if `whole`, it ends with the question and the answer is the whole sentence.
    """
    size = lambda text: len(tokenizer.encode(text))
    (asked,) = draw_facts(rng, 1)
    same = draw_facts(rng, (facts - 1) // 2, asked[:1], [asked[:2]])
    others = draw_facts(rng, 640 if density else facts - 1 - len(same), taken=[f[:2] for f in [asked, *same]])
    told = [(rng.random() if depth is None else depth, asked)]
    told += [(rng.random(), fact) for fact in same + others if not density]
    prefix, value = answer(*asked)
    end, value = (question(*asked), prefix + value) if whole else (question(*asked) + prefix, value)
    room = length - 1 - size(end)                       # without BOS and the question
    if room <= sum(size(tell(fact)) for _, fact in told):
        raise ValueError(f"{length} tokens are too few for these facts")
    text, _ = passage(rng, room, told, same + others, density or 0.0, prose, size)
    return [tokenizer.bos_id, *tokenizer.encode(text)[-room:], *tokenizer.encode(end)], tokenizer.encode(value)

VALUE, PREFIX, OTHER = 1.0, 0.2, 0.05                   # weights in the loss: a value, the answer before it, the rest

def lesson(rng, length, prose):
    """Text for training, without end: a passage of 40 to 85% of `length` tokens, then questions and answers.

    Yields pieces of it with their weights in the loss: (" What is the home town of Bob?", OTHER), ...
    """
    relations = rng.sample(list(RELATIONS), rng.choice((1, 2, len(RELATIONS), len(RELATIONS))))
    first, *spare = draw_facts(rng, 1 + length // 12, relations)
    room = int(length * (1 - rng.uniform(*(0.3, 0.6) if length <= 256 else (0.15, 0.5))))
    text, told = passage(rng, room, [(rng.random(), first)], spare, rng.choice((0.1, 0.25, 0.5, 0.8)), prose)
    yield text, OTHER
    for fact in itertools.cycle(rng.sample(told, len(told))):
        yield from zip((question(*fact), *answer(*fact)), (OTHER, PREFIX, VALUE))

def copying(rng, length):
    """A first exercise, without end: sentences of random words, then the same again and again in random order."""
    words = [" " + word for word in sorted(KNOWN)]
    sentences = [rng.choices(words, k=rng.randint(4, 10)) for _ in range(1 + length // 18)]
    yield "".join("".join(s) + "." for s in sentences), OTHER
    while True:
        for first, *others in rng.sample(sentences, len(sentences)):
            yield first, OTHER                          # which sentence comes next cannot be known
            yield "".join(others) + ".", VALUE
