"""Where sentences end: examples, each cut into words and into single characters."""
import re

import pytest

from sentencekv import Segmenter, sentence_flags

EXAMPLES = [        # "|": a sentence ends here
    "It rained.| Then it stopped!| Why?| Nobody knows…| 300 people asked",
    "Pi is 3.14, see notes.md or x.org/?q=1.| Next",
    "Mr. Bean met Dr. Who (vs. Prof. Plum) in Sept. 2004.| Next",
    "J. R. Smith (b. 1950) of the U.S. Senate, e.g. \"M. Hill\".| You and I.| At 5.| Plan B?| We",
    "A code (i.e. The key), i.e. \"The key\".| So did I.| You (i.e. I.) know part i. The end",
    "She likes tea etc. and so on... or … no . . . hm.| oh!| how are you?| fine",
    "\"Why?\" he asked.| \"Go!\" she said.| “Stop.”| «Now.»| (Yes!)| 'It ends.'| \"So",
    "**Bold.**| Next is `code.`| More.| _So?_| # Title",
    "It is so.[2]| And so. [3] [4]| Last. [He left.]| End [note 5].|\n\n[He left.]| Done",
    "1. Open the box.| 2.3. Close it.| (4.) Done",
    "He waited . . .| Then he left . . . again",
    "A title\n\n|One\nline \n \n|\"Two\"\r\n\r\n|[3] three\u2029|4\n\n|?",
    "他来了。[2]|「好。」|他说？|（走！）|再见",
    "یہ ایک ہے۔| وہ دو ہے؟| ہاں",
    "Նա եկավ։| նա գնաց։| Այո",
    "मैं आया।| वह गया॥| अच्छा",
]

def cut(tokens, **settings):
    """List of bytes (None: special) -> list of sentences, each a list of tokens."""
    row = Segmenter(sentence_flags(tokens), **{"sink": 0, "max_sentence": 999, **settings})
    numbers = row.extend(range(len(tokens)))
    assert row.tokens == list(range(len(tokens)))
    assert row.lengths == [numbers.count(s) for s in range(len(row.lengths))]
    return [[token for token, s in zip(tokens, numbers) if s == n] for n in sorted(set(numbers))]

def texts(sentences):
    return [b"".join(sentence).decode().strip() for sentence in sentences]

WORDS, CHARACTERS = r"\s?\w+|\s?[^\w\s]|\s", r"(?s:.)"

@pytest.mark.parametrize("pattern", [WORDS, CHARACTERS], ids=["words", "characters"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_sentences_end_where_a_reader_ends_them(example, pattern):
    expected = example.split("|")
    tokens = [piece.encode() for piece in re.findall(pattern, "".join(expected))]
    assert texts(cut(tokens)) == [sentence.strip() for sentence in expected]

@pytest.mark.parametrize("stop", "。！？｡।॥؟۔።։။")
def test_characters_can_be_split_over_tokens(stop):
    tokens = [bytes([byte]) for byte in f"अ{stop}é अ{stop} é".encode()]
    assert texts(cut(tokens)) == [f"अ{stop}", f"é अ{stop}", "é"]

@pytest.mark.parametrize("tokens, expected", [
    ("Hi|.\n\n| You", ["Hi|.\n\n", " You"]),            # white space stays with the sentence before
    ("Hi|.\"|  | You", ["Hi|.\"|  ", " You"]),
    ("Hi|.|\n| |\n|\"|You", ["Hi|.|\n| |\n", "\"|You"]),
    ("好|。”\r\n|他", ["好|。”\r\n", "他"]),
])
def test_tokens_with_several_characters(tokens, expected):
    sentences = cut([token.encode() for token in tokens.split("|")])
    assert [b"|".join(sentence).decode() for sentence in sentences] == expected

def test_a_special_token_ends_a_sentence():
    tokens = [b"Hi", None, None, b"you", b" and", None, b"."]
    assert cut(tokens) == [tokens[:3], tokens[3:6], tokens[6:]]

def test_the_sink_and_long_sentences():
    tokens = [b"A", b".", b" B", b".", b" C", b" d", b" e", b" f", b"g.", b" H"]
    assert cut(tokens, sink=4, max_sentence=3) == [tokens[:4], tokens[4:7], tokens[7:9], tokens[9:]]

def test_padding_and_unknown_tokens():
    row = Segmenter(sentence_flags([b"Hi", b".", b" You"]), sink=0, max_sentence=9)
    assert row.extend([0, 1, -1, 7, 2, -1]) == [1, 1, 1, 1, 2, 2]
    assert row.tokens == [0, 1, 7, 2] and row.lengths == [0, 3, 1]
