"""Synthetic texts to train and test the tiny model on: facts among filler sentences and prose.

     The phone number of Isaac is 5 9 5 9 1 2. In the winter the drum was above the warm letter. ...
     What is the phone number of Isaac? The phone number of Isaac is 5 9 5 9 1 2.

The texts consist of the words below and of prose from Python's help pages. The same seed gives
the same text. A fact is a tuple (relation, name, value). Every sentence begins with a space and
ends with a full stop or a question mark.

Reading order: words, then one fact (question, answer, tell), passage, the texts to test on
(story, needle), the texts to train on (lesson, copying).
"""
import ast
import functools
import itertools
import os
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

WORDS = {
    "name": """Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia
        Peter Quinn Rachel Samuel Tina Ursula Victor Wendy Xavier Yvonne Zachary Amber Boris Clara
        Dennis Elena Felix Gloria Hugo Ivan Nora Julia Kevin Laura Martin Oscar Paula Robert Sophie
        Thomas Uma Vera Walter Anton Bella Cyril Diana Edgar Fiona George Helen Isaac Jenny Keith
        Linda Moses Nadia Otto Petra""",
    "kind": """grey old small quiet young tall bright lazy happy clever brown hungry golden wooden
        dusty cold warm strange broken gentle heavy narrow""",
    "animal": """fox cat dog owl horse rabbit wolf bear goat duck mouse sheep raven turtle badger
        heron""",
    "place": """bridge river garden tower market station school kitchen harbour forest castle
        library mill cellar attic barn church meadow lighthouse tavern""",
    "thing": """lamp book clock basket mirror rope candle drum kite hammer ring coin box chair
        letter map bell ladder bottle blanket""",
    "colour": "red blue green yellow purple orange black white pink silver crimson turquoise",
    "fruit": "apple pear mango cherry lemon peach plum grape melon banana fig papaya",
    "town": """Paris London Rome Madrid Berlin Vienna Oslo Dublin Lisbon Prague Cairo Tokyo Lima
        Delhi Geneva Athens""",
    "digit": "0 1 2 3 4 5 6 7 8 9",
    "crowd": "boats birds men",
    "season": "morning evening night summer winter afternoon",
    "near": "near behind under beside inside above",
    "rests": "sleeps waits plays runs hides rests sings walks eats stands",
    "found": "found lost painted bought sold carried repaired dropped hid borrowed",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
FILLER = [
    "The {kind} {animal} {rests} {near} the {kind} {place}.",
    "{name} {found} a {kind} {thing} in the {place}.",
    "The {colour} {thing} of {name} was {near} the {place}.",
    "In the {season} the {thing} was {near} the {kind} {thing}.",
    "There are {digit} {colour} {crowd} {near} the {place} of {name}.",
    "{name} and {name} met the {animal} {near} the {place} every {season}.",
]
RELATIONS = {                           # a value: the kind of its words, and how many it has
    "secret code": ("digit", 4),
    "phone number": ("digit", 6),
    "locker number": ("digit", 3),
    "favourite colour": ("colour", 1),
    "favourite fruit": ("fruit", 1),
    "home town": ("town", 1),
    "best friend": ("name", 1),
    "lucky charm": ("thing", 1),
    "hiding place": ("place", 1),
    "favourite animal": ("animal", 1),
}
ALL_TEXT = " ".join([*FILLER, *RELATIONS, "What is", *map(" ".join, WORDS.values())])
KNOWN = set(re.findall(r"\w+", re.sub(r"{\w+}", "", ALL_TEXT)))    # one token each, see vocabulary

# ----------------------------------------------------------------------------------------- facts

def question(relation, name, value=None):
    """The question that a fact answers: " What is the home town of Bob?"."""
    return f" What is the {relation} of {name}?"

def answer(relation, name, value):
    """A fact as a sentence, in two parts: (" The home town of Bob is", " Rome.")."""
    return f" The {relation} of {name} is", f" {value}."

def tell(fact):
    """A fact as a sentence: " The home town of Bob is Rome."."""
    return "".join(answer(*fact))

def draw_facts(rng, n, relations=tuple(RELATIONS), taken=()):
    """At most n facts, no two of the same relation and name: [("home town", "Bob", "Rome"), ...].

    taken: (relation, name) pairs to leave out.
    """
    pairs = [(relation, name) for relation in relations for name in WORDS["name"]
             if (relation, name) not in taken]
    facts = []
    for relation, name in rng.sample(pairs, min(n, len(pairs))):
        kind, count = RELATIONS[relation]
        value = " ".join(rng.choices(WORDS[kind], k=count))
        facts.append((relation, name, value))
    return facts

# ----------------------------------------------------------------------------------------- prose

@functools.cache
def prose_sentences():
    """About 2,000 sentences of Python's help pages. They vary slightly with Python's version."""
    text = re.sub(r"[=\-*_~^\"`|.]{2,}", " ", "\n".join(topics.values()))
    sentences = []
    for sentence in re.split(r"(?<=[.?!])\s+|\n\s*\n", text):
        sentence = " " + re.sub(r"\s+", " ", sentence).strip()
        if 20 <= len(sentence) <= 160 and sentence[-1] in ".?" and "|" not in sentence:
            sentences.append(sentence)
    return sentences

def docstrings(file):
    """All docstrings of a Python file, in the order of ast.walk."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""

@functools.cache
def library_prose():
    """Paragraphs of prose from the docstrings of the standard library, as one text.

    It shares no text with prose_sentences(), and varies slightly with Python's version.
    """
    folder = Path(os.__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("[a-hj-su-z]*/*.py")])   # no idlelib, test
    paragraphs = {}                                     # a dict drops duplicates, keeps the order
    for file in files:
        if "site-packages" in file.parts or "pydoc_data" in file.parts:
            continue
        for docstring in docstrings(file):
            for paragraph in docstring.split("\n\n"):
                text = " ".join(paragraph.split())
                is_sentence = len(text) > 100 and text[0].isupper() and text[-1] == "."
                if is_sentence and ">>>" not in text:
                    paragraphs[text] = None
    return " ".join(paragraphs)

# -------------------------------------------------------------------------------------- passages

def estimate(sentence):
    """Number of tokens, without a tokenizer: exact for sentences made here, rough for prose."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    return sum(1 if word in KNOWN else 1 + len(word) // 4 for word in words)

def filler_sentence(rng):
    """A random sentence that states no fact: " The old fox sleeps near the cold river."."""
    def fill(gap):
        return rng.choice(WORDS[gap[1]])
    return " " + re.sub(r"{(\w+)}", fill, rng.choice(FILLER))

def passage(rng, room, facts, spare=(), density=0.0, prose=0.0, size=estimate):
    """A text that states facts -> (text, all facts that it states).

    room     its length in tokens; the text is longer by less than its first sentence
    facts    (depth, fact) pairs: each is placed at its depth, 0 (start) to 1 (end), but after the
             first sentence
    spare    further facts; they make up a share `density` of the other sentences
    prose    share of prose in what is left; the rest is filler
    size     function: sentence -> number of its tokens
    """
    stated = [fact for _, fact in facts]
    room -= sum(size(tell(fact)) for fact in stated)
    spare = iter(spare)
    sentences = []
    while room > 0 or not sentences:
        fact = next(spare, None) if rng.random() < density else None
        if fact:
            stated.append(fact)
            sentences.append(tell(fact))
        elif rng.random() < prose:
            sentences.append(rng.choice(prose_sentences()))
        else:
            sentences.append(filler_sentence(rng))
        room -= size(sentences[-1])
    sentences.reverse()                                 # the last one, which is cut, comes first
    for depth, fact in sorted(facts, reverse=True):
        sentences.insert(1 + round(depth * (len(sentences) - 1)), tell(fact))
    return "".join(sentences), stated

# ----------------------------------------------------------------------------- texts to test on

def story(tokens, facts=8, seed=0, prose=0.0, density=None):
    """A text of about `tokens` tokens, with facts at all depths, and questions about them.

    Returns the text and [(question, answer), ...], in the order of the text.


    facts    number of facts with a question; ValueError if there are not that many
    prose    share of prose among the sentences that state no fact
    density  share of the other sentences that state facts without a question
    """
    rng = random.Random(seed)
    most = len(RELATIONS) * len(WORDS["name"])
    if not 0 <= facts <= most:
        raise ValueError(f"facts must be from 0 to {most}, got {facts}")
    drawn = draw_facts(rng, facts + tokens // 8 * bool(density))
    asked = [((i + rng.random()) / facts, fact) for i, fact in enumerate(drawn[:facts])]
    text, _ = passage(rng, tokens, asked, drawn[facts:], density or 0.0, prose)
    return text, [(question(*fact), tell(fact)) for _, fact in asked]

def needle(rng, length, tokenizer, facts=8, density=None, depth=None, prose=0.0, whole=False):
    """A prompt of exactly `length` tokens and its answer -> (ids of the prompt, ids of the answer).

    The first sentence of the text is cut to fit. The prompt asks for one fact.

    facts    number of facts in the text; half of the others have the relation that is asked for
    density  instead of a number: the share of sentences that state facts
    depth    where the fact is, 0 (start) to 1 (end); None: anywhere
    whole    False: the prompt ends with "... is" and the answer is " 4 7 1 9."
             True: the prompt ends with the question and the answer is a whole sentence

    Raises ValueError if the facts do not fit into `length` tokens.
    """
    def size(text):
        return len(tokenizer.encode(text))

    (asked,) = draw_facts(rng, 1)
    same = draw_facts(rng, (facts - 1) // 2, asked[:1], [asked[:2]])
    taken = [fact[:2] for fact in [asked, *same]]
    others = draw_facts(rng, 640 if density else facts - 1 - len(same), taken=taken)
    placed = [(rng.random() if depth is None else depth, asked)]
    if not density:
        placed += [(rng.random(), fact) for fact in same + others]
    prefix, value = answer(*asked)
    if whole:
        end, value = question(*asked), prefix + value
    else:
        end = question(*asked) + prefix
    room = length - 1 - size(end)                       # without BOS and the question
    if room <= sum(size(tell(fact)) for _, fact in placed):
        raise ValueError(f"{length} tokens are too few for these facts")
    text, _ = passage(rng, room, placed, same + others, density or 0.0, prose, size)
    ids = tokenizer.encode(text)[-room:]
    return [tokenizer.bos_id, *ids, *tokenizer.encode(end)], tokenizer.encode(value)

# ---------------------------------------------------------------------------- texts to train on

# Weights in the loss: the value in an answer, the answer before the value, everything else.
VALUE, PREFIX, OTHER = 1.0, 0.2, 0.05

def lesson(rng, length, prose):
    """A passage of 40 to 85% of `length` tokens, then questions and answers, without end.

    Yields (piece of text, its weight in the loss): (" What is the home town of Bob?", OTHER), ...
    """
    relations = rng.sample(list(RELATIONS), rng.choice((1, 2, len(RELATIONS), len(RELATIONS))))
    first, *spare = draw_facts(rng, 1 + length // 12, relations)
    least, most = (0.3, 0.6) if length <= 256 else (0.15, 0.5)
    room = int(length * (1 - rng.uniform(least, most)))
    placed = [(rng.random(), first)]
    text, stated = passage(rng, room, placed, spare, rng.choice((0.1, 0.25, 0.5, 0.8)), prose)
    yield text, OTHER
    for fact in itertools.cycle(rng.sample(stated, len(stated))):
        prefix, value = answer(*fact)
        yield question(*fact), OTHER
        yield prefix, PREFIX
        yield value, VALUE

def copying(rng, length):
    """A first exercise: sentences of random words, then the same again in random order, for ever.

    Yields (piece of text, its weight in the loss). The first word of a repeated sentence weighs
    little, since nothing says which sentence comes next.
    """
    words = [" " + word for word in sorted(KNOWN)]
    sentences = [rng.choices(words, k=rng.randint(4, 10)) for _ in range(1 + length // 18)]
    yield "".join("".join(sentence) + "." for sentence in sentences), OTHER
    while True:
        for first, *others in rng.sample(sentences, len(sentences)):
            yield first, OTHER
            yield "".join(others) + ".", VALUE
