"""Exercise 1 of docs/exercises.md: cut a text into sentences.

    python -m pytest docs/exercises/ex01_sentences.py
"""
import re

import pytest

from sentencekv import Segmenter, sentence_flags

def sentence_numbers(tokens, sink, max_sentence):
    """The number of the sentence that each token (str) belongs to.

    Sentence 0 is the sink, the first `sink` tokens; the next token starts sentence 1. After that, a
    token that is not only white space starts a new sentence
    - if a blank line precedes it,
    - or if the text before it ends with . ! or ?, perhaps closing quotes, and then white space; but
      not after the abbreviations Mr. and Dr.,
    - or if the open sentence has max_sentence tokens.

    >>> sentence_numbers(["<s>", "Oh", "!", " It", " rains"], sink=1, max_sentence=9)
    [0, 1, 1, 2, 2]
    """
    raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

TEXTS = [                       # "|": a sentence ends here
    "It rained.| Then it stopped!| Why?| Nobody knows.| 300 people asked",
    "Pi is 3.14, see notes.md in x.org.| Mr. Bean met Dr. Who.| Next",
    "“Stop.”| \"No!\"| Then they left.  | Again",
    "A title\n\n|One\nline.\n \n|Two"]

@pytest.mark.parametrize("text", TEXTS)
def test_sentences_end_where_a_reader_and_the_cache_end_them(text):
    tokens, got = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text.replace("|", "")), {}
    for token, number in zip(tokens, sentence_numbers(tokens, 0, 99), strict=True):
        got[number] = got.get(number, "") + token
    assert [x.strip() for x in got.values()] == [x.strip() for x in text.split("|")]
    for sink, longest in ((0, 1), (0, 99), (1, 3), (4, 1), (4, 3), (4, 99)):
        row = Segmenter(sentence_flags([x.encode() for x in tokens]), sink, longest)
        assert sentence_numbers(tokens, sink, longest) == row.extend(range(len(tokens)))
