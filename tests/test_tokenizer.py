"""tokenizer.py: ids, chat prompts and refusals, against golden values of `tokenizers` and Jinja.

Where `tokenizers` is installed, random texts are compared as well.
"""
import base64
import json
import random
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import SandboxedEnvironment

import tokenizer as T
from tokenizer import Tokenizer, check_merges

SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n", "Ġ the", "Ġ Ġ"]


def split(regex, **changes):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
            "invert": False} | changes


def byte_level(use_regex=False, **changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": use_regex} | changes


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


def added_token(content, i, special=True, **flags):
    return {"id": i, "content": content, "special": special, "lstrip": False, "rstrip": False,
            "single_word": False, "normalized": False} | flags


def tokenizer_json(merges=MERGES, pre=None, specials=SPECIALS):
    """A small tokenizer.json: the 256 bytes, one token per merge, then the special tokens."""
    vocab = {c: i for i, c in enumerate(T.BYTE_OF)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": pre or sequence(split(T.LLAMA3), byte_level()),
            "post_processor": None, "decoder": None,
            "added_tokens": [added_token(s, len(vocab) + i) for i, s in enumerate(specials)],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                      "merges": list(merges)}}


def tokenizer_model(extra=(b"th", b"the", b" the")):
    tokens = [bytes([b]) for b in range(256)] + list(extra)
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


def load(folder, root, **files):
    """Write tokenizer.json (a dict) or tokenizer.model (bytes), and other JSON files; load them."""
    if isinstance(root, dict):
        (folder / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    else:
        (folder / "tokenizer.model").write_bytes(root)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_dir(folder)


def pieces(tok, text):
    return [tok.token_bytes[i] for i in tok.encode(text)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tok"), tokenizer_json())


@pytest.fixture(scope="module")
def nfc(tmp_path_factory):
    root = tokenizer_json(specials=CHATML)
    root["normalizer"] = {"type": "NFC"}
    root["added_tokens"] += [added_token("<tool", 300, special=False),
                             added_token("<tool_call>", 301, special=False)]
    return load(tmp_path_factory.mktemp("nfc"), root)


# ------------------------------------------------------------------------------- text and ids

def test_the_lowest_id_merges_first_and_never_across_pieces(tok, tmp_path):
    assert pieces(tok, "the in") == [b"the", b" ", b"in"]
    assert pieces(tok, "x the  the") == [b"x", b" the", b" ", b" the"]
    assert pieces(tok, "the\n\n  ") == [b"the", b"\n", b"\n", b"  "]
    assert tok.encode("") == [] and tok.decode([]) == ""
    low = load(tmp_path, tokenizer_json(["b c", "a b"]))
    assert pieces(low, "abc") == [b"a", b"bc"]                       # not the leftmost pair


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_any_text_comes_back_byte_for_byte(tok, nfc, text):
    assert b"".join(pieces(tok, text)) == text.encode()
    assert tok.decode(tok.encode(text)) == text
    assert nfc.decode(nfc.encode(text)) == unicodedata.normalize("NFC", text) or "<tool" in text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 260), max_size=60))
def test_any_ids_decode_as_their_bytes(tok, ids):
    text = b"".join(tok.token_bytes[i] for i in ids).decode(errors="replace")
    assert tok.decode(ids) == text == "".join(tok.stream(ids))


def test_a_stream_holds_a_character_back_until_its_last_byte(tok):
    parts = [*tok.stream(tok.encode("a中!"))]
    assert [part for part in parts if part] == ["a", "中", "!"]
    assert [*tok.stream(tok.encode("中")[:2])] == ["", "", "\ufffd"]


def test_text_cannot_forge_a_special_token_unless_asked(tok):
    text = "a<|eot_id|>b<|begin_of_text|>"
    eot, bos = tok.added["<|eot_id|>"], tok.bos_id
    assert not {eot, bos} & {*tok.encode(text)} and tok.decode(tok.encode(text)) == text
    assert tok.encode(text, special=True) == [*tok.encode("a"), eot, *tok.encode("b"), bos]
    assert tok.encode("a", bos=True) == [bos, *tok.encode("a")]


def test_a_tokenizer_needs_no_added_tokens_but_bos_needs_one():
    tok = Tokenizer([], {b"F": 0, b"alse": 1, **{bytes([b]): b for b in b"alse"}}, {}, set())
    assert pieces(tok, "False") == [b"F", b"a", b"l", b"s", b"e"]
    with pytest.raises(ValueError, match="no bos"):
        tok.encode("a", bos=True)


def test_added_tokens_that_are_not_special_always_match_the_longest_first(nfc):
    text = "x<tool_call>y<tool z<|im_end|>"
    ids = nfc.encode(text)
    assert ids.count(301) == ids.count(300) == 1 and nfc.added["<|im_end|>"] not in ids
    assert nfc.token_bytes[301] == b"<tool_call>" and nfc.decode(ids) == text


def test_nfc_is_applied_only_where_the_file_asks(tok, nfc, tmp_path):
    assert nfc.decode(nfc.encode("e\u0301")) == "\u00e9"
    assert tok.decode(tok.encode("e\u0301")) == "e\u0301"
    root = tokenizer_json()
    for normalizers, text in ([], "e\u0301"), ([{"type": "NFC"}], "\u00e9"):
        root["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        other = load(tmp_path, root)
        assert other.decode(other.encode("e\u0301")) == text


def test_token_bytes_covers_the_vocabulary_and_hides_special_and_unused_ids(tmp_path):
    root = tokenizer_json()
    root["added_tokens"].append(added_token("<|far|>", 270))
    tok = load(tmp_path, root)
    assert tok.n_vocab == len(tok.token_bytes) == 271 and tok.token_bytes[257] == b"the"
    assert tok.token_bytes[261:] == [None] * 10
    assert {*tok.token_bytes[:256]} == {bytes([b]) for b in range(256)}


def test_unused_ids_of_the_model_decode_and_ids_beyond_are_named(tok, tmp_path):
    padded = load(tmp_path, tokenizer_json(), config={"vocab_size": 300})
    assert padded.n_vocab == 300 and padded.token_bytes == tok.token_bytes + [None] * 34
    assert padded.decode([*padded.encode("a"), 299, *padded.encode("b")]) == "a\ufffdb"
    for size in 9, None:
        assert load(tmp_path, tokenizer_json(), config={"vocab_size": size}).n_vocab == tok.n_vocab
    for size in T.MAX_ID + 1, "300":
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(tmp_path, tokenizer_json(), config={"vocab_size": size})
    for tokenizer, bad in (tok, -1), (tok, tok.n_vocab), (tok, 10**12), (padded, 300):
        with pytest.raises(ValueError, match=f"{bad} is not in the vocabulary"):
            tokenizer.decode([bad])


def test_a_vocabulary_may_lack_bytes_and_the_text_that_needs_them_is_refused(tmp_path):
    root = tokenizer_json()
    for character, b in T.BYTE_OF.items():
        if b in b"\x04\xe4":
            del root["model"]["vocab"][character]
    tok = load(tmp_path, root)
    assert pieces(tok, "the é") == [b"the", b" ", b"\xc3", b"\xa9"]
    for text in ("the\x04", "中", "<|eot_id|>\x04"):
        with pytest.raises(ValueError, match="lacks bytes.*x") as error:
            tok.encode(text)
        assert "\n" not in str(error.value)


def test_lone_surrogates_are_refused(tok, nfc):
    for text in ("a\ud800", "\udfff", "x" * 9 + "\ud83d y"):
        for tokenizer in (tok, nfc):
            with pytest.raises(ValueError, match="surrogate"):
                tokenizer.encode(text)


@pytest.mark.parametrize("unit", [" ", "a", "\t ", "中"])
def test_a_very_long_run_takes_linear_time(tok, unit):
    text, start = "x" + unit * 200_000 + "y", time.process_time()
    assert tok.decode(tok.encode(text)) == text
    assert time.process_time() - start < 5


# ------------------------------------------------------- splitting as the tokenizers library does

QWEN = T.LLAMA3.replace("{1,3}", "")
FAMILIES = {
    "gpt2": byte_level(True),
    "llama3": sequence(split(T.LLAMA3), byte_level()),
    "qwen": sequence(split(QWEN), byte_level()),
    "smollm2": sequence(digits(True), byte_level(True)),
    "digit runs": sequence(digits(False), byte_level(True)),
    "deepseek": sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
                         split("[一-龥ࠀ-一가-퟿]+"), digits(True), byte_level()),
    "deepseek 3": sequence(split(r"\p{N}{1,3}"), split("[一-龥]+"),
                           split(r"[!-/][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                                 r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                           byte_level()),
    "gaps": sequence(split("b1|(?<=a)b|x*?"), byte_level()),      # unmatched text: a piece
    "lines": sequence(split("[12&&2]|^a|^x|!$"), byte_level()),
    "no split": byte_level(),
}
# Pairs that a wrong cut would join, in the order in which BPE would.
JOINING = ["1 2", "3 4", "12 3", "12 34", "Ġ 1", "a b", "b 1", "ab 1", "Ġ a", "Ġ Ġ", "Ċ Ċ",
           "Ġ Ċ", "! !", "! Ċ", "Ġ !", "' s", "' S", "s x", "S x", "ä ¸", "ä¸ Ń",
           "ä¸Ń ä¸Ń", "ä¸Ń 1", "a ä¸Ń", "Â ²", "2 Â²", "a '"]
TEXT = "ab12 1234 a'sx a'Sx !!\n\n  \n ab中中1中a²2² \r\n b1!\nxa中 \u30001  "

# Made with tokenizers 0.23; b"|" stands between the tokens.
GOLDEN = {
    "gpt2":
        b"ab|12| |1234| a|'s|x| a|'|Sx| |!!|\n\n|  |\n| |ab|\xe4\xb8\xad\xe4\xb8\xad|"
        b"1|\xe4\xb8\xad|a|\xc2\xb2|2\xc2\xb2| |\r|\n| |b|1|!|\n|x|a\xe4\xb8\xad| |"
        b"\xe3|\x80|\x80|1|  ",
    "llama3":
        b"ab|12| |123|4| a|'s|x| a|'S|x| |!!|\n\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2\xc2\xb2| |\r|\n| |b|1|"
        b"!\n|x|a\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "qwen":
        b"ab|1|2| |1|2|3|4| a|'s|x| a|'S|x| |!!|\n\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2|\xc2\xb2| |\r|\n| |b|"
        b"1|!\n|x|a\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "smollm2":
        b"ab|1|2| |1|2|3|4| a|'s|x| a|'|Sx| |!!|\n\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2|\xc2\xb2| |\r|\n| |b|"
        b"1|!|\n|x|a\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "digit runs":
        b"ab|12| |1234| a|'s|x| a|'|Sx| |!!|\n\n|  |\n| |ab|\xe4\xb8\xad\xe4\xb8\xad|"
        b"1|\xe4\xb8\xad|a|\xc2\xb2|2\xc2\xb2| |\r|\n| |b|1|!|\n|x|a\xe4\xb8\xad| |"
        b"\xe3|\x80|\x80|1|  ",
    "deepseek":
        b"ab|1|2| |1|2|3|4| a|'|sx| a|'|Sx| |!!|\n|\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2|\xc2\xb2| |\r|\n| |b|"
        b"1|!|\n|x|a|\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "deepseek 3":
        b"ab|12| |123|4| a|'s|x| a|'S|x| |!!|\n\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2\xc2\xb2| |\r|\n| |b|1|"
        b"!\n|x|a|\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "gaps":
        b"a|b1|2| |1|2|3|4| |a|'|s|x| |a|'|S|x| |!|!|\n|\n| | |\n| |a|b|\xe4\xb8\xad|"
        b"\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2|\xc2\xb2| |\r|\n| |b1|!|\n|x|a|"
        b"\xe4\xb8\xad| |\xe3|\x80|\x80|1| | ",
    "lines":
        b"a|b1|2| 1|2|34| a|'s|x| a|'S|x| !|!|\n\n|  |\n| |ab|"
        b"\xe4\xb8\xad\xe4\xb8\xad|1|\xe4\xb8\xad|a|\xc2\xb2|2|\xc2\xb2| |\r|\n| |b1|"
        b"!|\n|x|a\xe4\xb8\xad| |\xe3|\x80|\x80|1|  ",
    "no split":
        b"ab|12| |1234| a|'s|x| a|'S|x| |!!|\n\n|  |\n| |ab|\xe4\xb8\xad\xe4\xb8\xad|"
        b"1|\xe4\xb8\xad|a|\xc2\xb2|2\xc2\xb2| |\r|\n| |b1|!\n|x|a\xe4\xb8\xad| |"
        b"\xe3|\x80|\x80|1|  ",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """-> name, tokenizer, its file"""
    folder = tmp_path_factory.mktemp("family")
    tok = load(folder, tokenizer_json(JOINING, FAMILIES[request.param], ["<|end|>"]))
    return request.param, tok, folder / "tokenizer.json"


def test_ids_are_those_of_the_tokenizers_library(family):
    name, tok, _ = family
    assert b"|".join(pieces(tok, TEXT)) == GOLDEN[name]


def test_gpt_2_says_nothing_of_its_split(tmp_path):
    bare = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    root = tokenizer_json(JOINING, bare, [])
    del root["model"]["type"]
    assert b"|".join(pieces(load(tmp_path, root), TEXT)) == GOLDEN["gpt2"]


def test_random_texts_have_the_ids_of_the_tokenizers_library(family):
    library = pytest.importorskip("tokenizers", reason="compares with the tokenizers library")
    name, tok, file = family
    theirs = library.Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True                              # nothing in a text is special
    rng = random.Random(name)
    parts = [*TEXT, "12", "ab", "'S", "'ſ", "中", "\r\n", "  ", "e\u0301", "½", "🙂", "<|end|>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 30)))
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


# ------------------------------------------------------------------------- the checkpoint's files

def test_the_tokenizer_file_is_found_in_the_directory_below_it_or_by_its_path(tmp_path):
    (tmp_path / "original").mkdir()
    below = tmp_path / "original" / "tokenizer.model"
    below.write_bytes(tokenizer_model())
    for path in tmp_path, str(below):
        assert Tokenizer.from_dir(path).n_vocab == 259 + 256
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model(()))
    assert Tokenizer.from_dir(tmp_path).n_vocab == 256 + 256
    assert load(tmp_path, tokenizer_json()).n_vocab == 261 + 5       # tokenizer.json comes first
    assert Tokenizer.from_dir(tmp_path / "tokenizer.json").n_vocab == 261 + 5


def test_missing_files_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*tokenizer\.model") as error:
            Tokenizer.from_dir(folder)
        assert str(folder) in str(error.value)


def test_a_model_file_numbers_the_special_tokens_as_llama_3_does(tmp_path):
    tok = load(tmp_path, tokenizer_model())
    n = 259
    order = {"begin_of_text": 0, "end_of_text": 1, "reserved_special_token_0": 2,
             "reserved_special_token_1": 3, "finetune_right_pad_id": 4,
             "reserved_special_token_2": 5, "start_header_id": 6, "end_header_id": 7, "eom_id": 8,
             "eot_id": 9, "python_tag": 10,
             "reserved_special_token_3": 11, "reserved_special_token_247": 255}
    assert {name: tok.added[f"<|{name}|>"] - n for name in order} == order and len(tok.added) == 256
    assert tok.n_vocab == n + 256 and tok.bos_id == n and tok.stop_ids == {n + 1, n + 8, n + 9}
    assert tok.encode("the the") == [257, 258]
    assert not {*tok.encode("<|eot_id|><|reserved_special_token_9|>")} & {*tok.added.values()}
    full = load(tmp_path, tokenizer_model([b"%06d" % i for i in range(127744)]))
    assert full.added["<|begin_of_text|>"] == 128000                 # a file of the largest size


def test_a_model_file_and_a_json_file_of_one_vocabulary_agree(tmp_path):
    extra = [b"th", b"he", b"the", b" the", b"aa", b"  "]
    model = load(tmp_path, tokenizer_model(extra))
    to_char = {b: c for c, b in T.BYTE_OF.items()}
    tokens = ["".join(to_char[b] for b in t) for t in [*(bytes([b]) for b in range(256)), *extra]]
    root = tokenizer_json()
    root["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    pairs = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))
             if t[:i] in tokens and t[i:] in tokens]
    root["model"] |= {"merges": pairs, "ignore_merges": True}
    root["added_tokens"] = [added_token(s, i) for s, i in model.added.items()]
    both = load(tmp_path, root)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("thea \n中'1", k=rng.randrange(30)))
        assert both.encode(text) == model.encode(text)
    assert both.token_bytes == model.token_bytes
    swapped = [["th", "e"] if pair == ["t", "he"] else pair for pair in pairs]
    missing = [pair for pair in pairs if pair != ["th", "e"]]
    for bad in [*pairs, ["t", "he"]], swapped, missing:              # two have a pair twice
        root["model"]["merges"] = bad
        with pytest.raises(ValueError, match="merges"):
            load(tmp_path, root)


def ids_of(tok):
    return tok.bos_id, tok.stop_ids


def test_bos_and_stop_ids_come_from_the_checkpoint(tmp_path):
    root = tokenizer_json(specials=["<s>", "</s>", "<a>", "<b>", "<c>"])
    s, end, a, b, c = range(261, 266)
    assert ids_of(load(tmp_path, root)) == (s, {end})                # only names to go by
    config = {"bos_token_id": a, "eos_token_id": b}
    assert ids_of(load(tmp_path, root, config=config)) == (a, {b})
    assert ids_of(load(tmp_path, root, generation_config={"eos_token_id": [c, b]})) == (a, {b, c})
    named = {"bos_token": "<b>", "eos_token": {"content": "<a>"}}
    assert ids_of(load(tmp_path, root, tokenizer_config=named)) == (b, {a, b, c})
    assert ids_of(load(tmp_path, root, tokenizer_config={"bos_token": None})) == (None, {b, c})
    assert ids_of(load(tmp_path, root, tokenizer_config={"bos_token": "<?>"})) == (a, {b, c})
    both = {"bos_token_id": [c, a], "eos_token_id": None}
    assert ids_of(load(tmp_path, root, config=both, tokenizer_config={})) == (c, {b, c})
    assert ids_of(Tokenizer.from_dir(tmp_path / "tokenizer.json")) == (c, {b, c})


@pytest.mark.parametrize("name", T.BOS_NAMES)
def test_bos_has_usual_names(tmp_path, name):
    tok = load(tmp_path, tokenizer_json(specials=["<|other|>", name]))
    assert tok.bos_id == tok.added[name] and tok.encode("", bos=True) == [tok.bos_id]


BAD_SETTINGS = {
    "config": [[1], 3, {"eos_token_id": "2"}, {"bos_token_id": -1}, {"eos_token_id": [1, 0.5]},
               {"eos_token_id": {}}, {"bos_token_id": 9999}],
    "generation_config": [[1], {"bos_token_id": [None]}, {"eos_token_id": 9999}],
    "tokenizer_config": [[1], {"bos_token": {}}, {"chat_template": [{"name": "default"}]}],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_give_one_line_that_names_the_directory(tmp_path, name):
    for content in BAD_SETTINGS[name]:
        with pytest.raises(ValueError) as error:
            load(tmp_path, tokenizer_json(), **{name: content})
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value), content
    for data in (b"", b"{", b"\xff\xfe{", b"[" * 200_000):
        (tmp_path / f"{name}.json").write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}\.json: \w+"):
            Tokenizer.from_dir(tmp_path)


# ------------------------------------------------------------------------------- chat templates

LLAMA3 = ("{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
          "{{ (bos_token if loop.first else '') + text }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
          "{% endif %}")
LLAMA31 = r"""{{- bos_token }}
{%- set date_string = "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
"""
LLAMA32 = LLAMA31.replace('2024" %}', """2024" %}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}""")
PLAIN = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
         "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
DEFAULT = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
           "{{ '" + BRIEF + "' }}{% endif %}" + PLAIN.partition("%}")[2])
RAW = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
       "{% endfor %}{{ '<|im_start|>assistant\\n' }}")
ZEPHYR = ("{% for m in messages %}\n{% if m['role'] == 'user' %}\n"
          "{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'system' %}\n"
          "{{ '<|system|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'assistant' %}\n"
          "{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
          "{% endfor %}")
NEMO = """{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {{- "[INST]" + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""
TALK = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "the  in"},
        {"role": "user", "content": "12?"}]
SYSTEM = [{"role": "system", "content": " A\n"}]
TURNS3 = ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
          "<|end_header_id|>\n\nthe  in<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n12?"
          "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
HEAD3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
TURNS = ("<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\nthe  in<|im_end|>\n"
         "<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n")
GIVEN = "<|im_start|>system\n A\n<|im_end|>\n"
TURNSZ = ("<|user|>\n Hi\n<|end|>\n<|assistant|>\nthe  in<|end|>\n<|user|>\n12?<|end|>\n"
          "<|assistant|>\n")
# name: template, end of a turn, what Jinja renders for TALK, and for SYSTEM + TALK
KNOWN = {
    "llama 3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>" + TURNS3, HEAD3 + "A<|eot_id|>" + TURNS3),
    "llama 3.1": (LLAMA31, "<|eot_id|>", f"{HEAD3}{DATE}<|eot_id|>{TURNS3}",
                  f"{HEAD3}{DATE}A<|eot_id|>{TURNS3}"),
    "chatml": (PLAIN, "<|im_end|>", TURNS, GIVEN + TURNS),
    "default": (DEFAULT, "<|im_end|>", BRIEF + TURNS, GIVEN + TURNS),
    "raw": (RAW, "<|im_end|>", "<|begin_of_text|>" + TURNS, "<|begin_of_text|>" + GIVEN + TURNS),
    "indented": (RAW.replace("{% endfor", "    {% endfor"), "<|im_end|>",
                 "<|begin_of_text|>" + TURNS, "<|begin_of_text|>" + GIVEN + TURNS),
    "stripped": (RAW.replace("messages %}", "messages -%}\n\n"), "<|im_end|>",
                 "<|begin_of_text|>" + TURNS, "<|begin_of_text|>" + GIVEN + TURNS),
    "literal bos": (RAW.replace("{{ bos_token }}", "<|begin_of_text|>"), "<|im_end|>",
                    "<|begin_of_text|>" + TURNS, "<|begin_of_text|>" + GIVEN + TURNS),
    "trim": (PLAIN.replace("content']", "content'] | trim"), "<|im_end|>",
             TURNS.replace(" Hi\n", "Hi"),
             GIVEN.replace(" A\n", "A") + TURNS.replace(" Hi\n", "Hi")),
    "zephyr": (ZEPHYR, "<|end|>", TURNSZ, "<|system|>\n A\n<|end|>\n" + TURNSZ),
    "mistral": (NEMO, "<|end|>",
                "<|begin_of_text|>[INST] Hi\n[/INST]the  in<|end|>[INST]12?[/INST]", None),
}
# Templates that differ from those above in one place, and those of other families.
VARIANTS = {
    "another format": PLAIN.replace("<|im_", "<|turn_"),
    "spaces in [INST]": NEMO.replace("[INST]", "[INST] "),
    "no eos after the user": ZEPHYR.replace("eos_token", "'\n'", 1),
    "no start of the answer": PLAIN.replace("'<|im_start|>assistant\n'", "'<|im_start|>'"),
    "text before the turn": PLAIN.replace("{{ '<|im_start|>' +", "{{ 'A<|im_start|>' +"),
    "text after the default": DEFAULT.replace("brief.<|im_end|>\n", "brief.<|im_end|>\nA"),
    "newline left out": RAW.replace("{% endfor %}", "{%- endfor %}"),
    "bos before every turn": PLAIN.replace("{{ '<|im_start|>'", "{{ bos_token + '<|im_start|>'"),
    "half trimmed": PLAIN.replace("content']", "content'].lstrip()"),
    "one role trimmed": PLAIN.replace("message['content']", "(message['content'] | trim "
                                      "if message['role'] == 'user' else message['content'])"),
    "a system message added": "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': "
                              "'system', 'content': 'A'}] + messages %}{% endif %}" + PLAIN,
}
FAILING = {
    "all messages twice": PLAIN + PLAIN,
    "no date of llama 3.1": LLAMA31.replace('{%- set date_string = "26 Jul 2024" %}', ""),
    "no template": None,
    "empty": "",
    "not the default": [{"name": "tool_use", "template": PLAIN}],
    "no Jinja": "{% for m in messages %}{{ m.content }}",
    "an unknown tag": PLAIN + "{% generation %}",
    "an unknown function": PLAIN + "{{ launch() }}",
    "no content": PLAIN.replace("message['content']", "'A'"),
    "content twice": PLAIN.replace("message['content']", "message['content'] + message['content']"),
    "content in capitals": PLAIN.replace("message['content']", "message['content'].upper()"),
    "the last message alone": PLAIN.replace("in messages", "in messages[-1:]"),
    "it refuses": PLAIN + "{{ raise_exception('no') }}",
    "a way out of the sandbox": PLAIN + "{{ ''.__class__.__mro__[1].__subclasses__()[0].x() }}",
    "a write": PLAIN + "{{ messages.append(messages[0]) }}",
}
CHAT_TOKENS = [*SPECIALS, *CHATML, "[INST]", "[/INST]", "<|end|>"]


def chat_tokenizer(folder, template, specials=CHAT_TOKENS):
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end|>"}
    return load(folder, tokenizer_json(specials=specials),
                tokenizer_config=names | {"chat_template": template})


@pytest.mark.parametrize("name", KNOWN)
def test_chat_makes_the_ids_of_the_text_that_jinja_renders(tmp_path, name):
    template, end, talk, with_system = KNOWN[name]
    tok = chat_tokenizer(tmp_path, template)
    assert tok.chat_format == template
    assert tok.chat(TALK) == tok.encode(talk, special=True)
    if with_system is None:
        with pytest.raises(ValueError, match="the chat template changes a message"):
            tok.chat(SYSTEM + TALK)
    else:
        assert tok.chat(SYSTEM + TALK) == tok.encode(with_system, special=True)
    with pytest.raises(ValueError, match="unknown role"):
        tok.chat([{"role": "<|eot_id|>", "content": "x"}])
    assert tok.stop_ids == {tok.added["<|end|>"], tok.added[end]}


@pytest.mark.parametrize("name", [*KNOWN, *VARIANTS])
def test_random_conversations_are_rendered_as_jinja_does(tmp_path, name):
    template = VARIANTS.get(name) or KNOWN[name][0]
    tok = chat_tokenizer(tmp_path, template)
    jinja = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    rng = random.Random(name)
    for _ in range(60):
        roles = ["user", "assistant"] * rng.randrange(3) + ["user"]
        roles = ["system"] * ("INST" not in template and rng.random() < 0.5) + roles
        contents = ["".join(rng.choices(" \n1athein{}", k=rng.randrange(9))) for _ in roles]
        talk = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        text = jinja.render(messages=talk, add_generation_prompt=True, eos_token="<|end|>",
                            bos_token="<|begin_of_text|>")
        assert tok.chat(talk) == tok.encode(text, special=True), talk


def test_a_template_that_changes_some_contents_refuses_these_alone(tmp_path):
    cut = PLAIN.replace("message['content']", "message['content'].split('</think>')[-1]")
    skip = PLAIN.replace("in messages", "in messages if message['content']")
    for template, good, bad in (cut, "the", "x</think>the"), (skip, "the", ""):
        tok = chat_tokenizer(tmp_path, template)
        assert tok.chat([{"role": "user", "content": good}])
        with pytest.raises(ValueError, match="the chat template changes a message"):
            tok.chat([{"role": "user", "content": bad}])


@pytest.mark.parametrize("name", KNOWN)
def test_a_conversation_goes_on_with_the_ids_of_the_whole(tmp_path, name):
    tok = chat_tokenizer(tmp_path, KNOWN[name][0])
    for history in TALK[:1], TALK:
        answer = {"role": "assistant", "content": "the <|eot_id|> in"}
        question = {"role": "user", "content": "in\n the?"}
        first = tok.chat(history) + tok.encode(answer["content"])
        whole = tok.chat([*history, answer, question])
        assert first + tok.chat([question], after="assistant") == whole
        assert tok.chat([*history, answer], close=False) == first
        open_turn = tok.chat([*history, answer, question], close=False)
        assert open_turn + tok.chat([], after="user") == whole
        assert open_turn == whole[:len(open_turn)] and tok.decode(open_turn).endswith("the?")


def test_a_conversation_without_messages_asks_for_an_answer(tmp_path):
    start = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    tok = chat_tokenizer(tmp_path, LLAMA3)
    assert tok.decode(tok.chat([])) == start
    assert tok.decode(tok.chat([], after="assistant")) == "<|eot_id|>" + start
    assert tok.chat([], after="user", close=False) == []
    with pytest.raises(ValueError, match="the chat template: UndefinedError"):
        chat_tokenizer(tmp_path, LLAMA31).chat([])


def test_content_cannot_end_its_turn(tmp_path):
    for template, marker in (LLAMA3, "<|eot_id|>"), (DEFAULT, "<|im_end|>"), (NEMO, "[/INST]"):
        tok = chat_tokenizer(tmp_path, template)
        plain = tok.chat([{"role": "user", "content": "x"}])
        forged = tok.chat([{"role": "user", "content": f"x{marker}"}])
        assert forged.count(tok.added[marker]) == plain.count(tok.added[marker])
        assert len(forged) > len(plain)


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_refused_by_chat_alone(tmp_path, name):
    tok = chat_tokenizer(tmp_path, FAILING[name])
    assert tok.chat_format is None and tok.encode("the") == [257]
    with pytest.raises(ValueError, match="no chat template, or one that does not work"):
        tok.chat(TALK)


def test_llama_3_2_dates_its_prompt_today(tmp_path):
    tok = chat_tokenizer(tmp_path, LLAMA32)
    days = [time.strftime("%d %b %Y", time.localtime(time.time() - s)) for s in (0, 600)]
    prompt = tok.decode(tok.chat(SYSTEM))
    assert any(f"2023\nToday Date: {day}\n\nA<|eot_id|>" in prompt for day in days)


def test_where_a_template_comes_from(tmp_path):
    tok = load(tmp_path, tokenizer_model())                          # Meta's directory
    llama3 = KNOWN["llama 3"]
    assert tok.chat(TALK) == tok.encode(llama3[2], special=True)
    stops = ("end_of_text", "eot_id", "eom_id")
    assert tok.stop_ids == {tok.added[f"<|{name}|>"] for name in stops}
    assert load(tmp_path, tokenizer_json()).chat_format is None      # not Meta's file
    (tmp_path / "tokenizer.json").unlink()
    assert load(tmp_path, tokenizer_model(), tokenizer_config={"x": 1}).chat_format is None
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA31}]
    tok = chat_tokenizer(tmp_path, named)
    assert tok.chat(TALK) == tok.encode(KNOWN["llama 3.1"][2], special=True)
    (tmp_path / "chat_template.jinja").write_text(DEFAULT)           # it comes first
    tok = chat_tokenizer(tmp_path, named)
    assert tok.chat(TALK) == tok.encode(KNOWN["default"][2], special=True)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="Unicode"):
        Tokenizer.from_dir(tmp_path)


# ------------------------------------------------------------------------------- damaged files

BAD_MODELS = {
    "a SentencePiece protobuf": (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>",
                                 "SentencePiece"),
    "an empty file": (b"", "no tokens"),
    "bad base64": (b"!!!! 0\n" + tokenizer_model(), "base64"),
    "bad padding": (tokenizer_model() + b"QQ 259\n", "adding"),
    "a rank that is no number": (tokenizer_model() + b"QUE= x\n", "base64"),
    "a gap in the ranks": (tokenizer_model() + b"QUE= 300\n", "ranks"),
    "a rank twice": (tokenizer_model() + b"QUE= 258\n", "ranks"),
    "a token twice": (tokenizer_model() + b"IQ== 259\n", "ranks"),
    "a stray word": (tokenizer_model() + b"stray\n", "base64"),
    "a negative rank": (tokenizer_model() + b"QUE= -1\n", "base64"),
    "more than 128000 tokens": (tokenizer_model([b"%06d" % i for i in range(127745)]), "Llama 3"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_bad_model_file_gives_one_line_that_names_it(tmp_path, what):
    data, says = BAD_MODELS[what]
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path, data)
    assert str(tmp_path / "tokenizer.model") in str(error.value) and "\n" not in str(error.value)


REMOVE = object()


def change(*path, to):
    """A function that changes one entry of a nested dict; to=REMOVE deletes it."""
    def apply(root):
        for key in path[:-1]:
            root = root[key]
        if to is REMOVE:
            del root[path[-1]]
        else:
            root[path[-1]] = to
    return apply


def pre(*steps):
    return change("pre_tokenizer", to=sequence(*steps))


ADDED = ("added_tokens", 0)
BAD_JSONS = {
    "Unigram": (change("model", "type", to="Unigram"), "Unigram"),
    "WordPiece": (change("model", "type", to="WordPiece"), "WordPiece"),
    "byte_fallback": (change("model", "byte_fallback", to=True), "byte_fallback"),
    "dropout": (change("model", "dropout", to=0.1), "dropout"),
    "word suffix": (change("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix"),
    "subword prefix": (change("model", "continuing_subword_prefix", to="##"), "subword_prefix"),
    "SentencePiece spaces": (change("model", "vocab", "▁", to=999), "SentencePiece"),
    "NFKC": (change("normalizer", to={"type": "NFKC"}), "NFKC"),
    "two normalizers": (change("normalizer", to={"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Lowercase"}]}), "Lowercase"),
    "no pre_tokenizer": (change("pre_tokenizer", to=None), "pre_tokenizer"),
    "an empty sequence": (pre(), "pre_tokenizer"),
    "a sequence in a sequence": (pre(sequence(split("a")), byte_level()), "Sequence"),
    "unknown pre_tokenizer": (change("pre_tokenizer", to={"type": "Whitespace"}), "Whitespace"),
    "unknown step": (pre({"type": "Punctuation"}, byte_level()), "Punctuation"),
    "split without bytes": (pre(split("a")), "Split"),
    "bytes before a split": (pre(byte_level(), split("a")), "ByteLevel"),
    "bytes twice": (pre(byte_level(), byte_level()), "ByteLevel"),
    "prefix space": (pre(byte_level(add_prefix_space=True)), "add_prefix_space"),
    "Removed": (pre(split("a", behavior="Removed"), byte_level()), "Removed"),
    "inverted split": (pre(split("a", invert=True), byte_level()), "invert"),
    "string split": (pre(split("a", pattern={"String": " "}), byte_level()), "String"),
    "digits without a flag": (pre({"type": "Digits"}, byte_level()), "Digits"),
    "bad regex": (pre(split("("), byte_level()), "missing )"),
    "unknown class in regex": (pre(split(r"\p{Nope}"), byte_level()), "unknown property"),
    "deep regex": (pre(split("(" * 9999 + ")" * 9999), byte_level()), "recursion"),
    "an escape that engines disagree on": (pre(split(r"\w+"), byte_level()), r"\\w"),
    "a flag that engines disagree on": (pre(split("(?m:.)"), byte_level()), "(?m"),
    "a set difference": (pre(split("[a--b]"), byte_level()), "a--b"),
    "a symmetric difference": (pre(split("[a~~b]"), byte_level()), "a~~b"),
    "a set union": (pre(split("[a||b]"), byte_level()), "a||b"),
    "no merges": (change("model", "merges", to=REMOVE), "merges"),
    "no vocab": (change("model", "vocab", to=REMOVE), "vocab"),
    "no model": (change("model", to=REMOVE), "model"),
    "no added_tokens": (change("added_tokens", to=REMOVE), "added_tokens"),
    "model is a list": (change("model", to=[]), "TypeError"),
    "vocab is a list": (change("model", "vocab", to=[1]), "TypeError"),
    "merges is a number": (change("model", "merges", to=3), "TypeError"),
    "merge of three": (change("model", "merges", 0, to="a b c"), "merges"),
    "merge of numbers": (change("model", "merges", 0, to=[1, 2]), "str"),
    "merge of no token": (change("model", "merges", 1, to="q z"), "merges"),
    "one more merge of no token": (change("model", "merges", slice(5, 5), to=["q z"]), "merges"),
    "one more merge of halves": (change("model", "merges", slice(2, 2), to=["t he"]), "merges"),
    "one more merge of three": (change("model", "merges", slice(2, 2), to=["t h e"]), "merges"),
    "merge that is missing": (change("model", "merges", 1, to=REMOVE), "merges"),
    "merges in another order": (change("model", "merges", slice(0, 3), to=["i n", "t h", "th e"]),
                                "merges"),
    "merge that BPE never makes": (change("model", "merges", 1, to="t he"), "merges"),
    "merge of a missing byte": (change("model", "vocab", "Ġ", to=REMOVE), "merges"),
    "id twice": (change("model", "vocab", "in", to=0), ""),
    "special id taken": (change(*ADDED, "id", to=5), "same id"),
    "special name in the vocab": (change("model", "vocab", SPECIALS[0], to=999), "two ids"),
    "special name twice": (change("added_tokens", 1, "content", to=SPECIALS[0]), "two ids"),
    "surrogate special": (change(*ADDED, "content", to="\ud800"), "surrogate"),
    "special name is a number": (change(*ADDED, "content", to=7), "int"),
    "lstrip": (change(*ADDED, "lstrip", to=True), "lstrip"),
    "rstrip": (change(*ADDED, "rstrip", to=True), "rstrip"),
    "single_word": (change(*ADDED, "single_word", to=True), "single_word"),
    "negative id": (change(*ADDED, "id", to=-1), "ids must be"),
    "fractional id": (change(*ADDED, "id", to=0.5), "ids must be"),
    "boolean id": (change("model", "vocab", "Ġthe", to=True), ""),
    "huge id": (change(*ADDED, "id", to=2**40), "ids must be"),
    "text id": (change("model", "vocab", "th", to="256"), "str"),
    "long token": (change("model", "vocab", "a" * 9999, to=999), "too long"),
}


@pytest.mark.parametrize("what", BAD_JSONS)
def test_a_bad_json_file_gives_one_line_that_names_it(tmp_path, what):
    apply, says = BAD_JSONS[what]
    root = tokenizer_json()
    apply(root)
    with pytest.raises(ValueError) as error:
        load(tmp_path, root)
    message = str(error.value)
    assert str(tmp_path / "tokenizer.json") in message and says in message and "\n" not in message


def test_normalized_added_tokens_are_refused_under_nfc_only(tmp_path):
    root = tokenizer_json()
    root["added_tokens"][0]["normalized"] = True
    load(tmp_path, root)
    root["normalizer"] = {"type": "NFC"}
    with pytest.raises(ValueError, match="normalized"):
        load(tmp_path, root)


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"\xff\xfe{", b'{"model": 1e999}',
                                  b"[" * 200_000])
def test_what_is_no_json_gives_one_line_that_names_it(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json: \w+") as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)


def damage(data, rng):
    """Flip, drop or insert bytes, cut the file, repeat a part, or swap digits."""
    data = bytearray(data)
    inserts = (b"0", b'"', b",", b"}", b"\\ud800", b"null", b"\n", b"-1", b"1e9", b"\xff")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(max(len(data), 1)), rng.randrange(6)
        if not data:
            break
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at:at + rng.choice((1, 9, 200))]
        elif kind == 2:
            data[at:at] = rng.choice(inserts)
        elif kind == 3:
            data = data[:max(1, at)]
        elif kind == 4:
            data[at:at] = data[at:at + 30]
        else:
            numbers = [i for i, b in enumerate(data) if 48 <= b < 58] or [0]
            data[rng.choice(numbers)] = 48 + rng.randrange(10)
    return bytes(data)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_damaged_file_gives_a_value_error_or_a_working_tokenizer(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    config = {"bos_token": "<|eot_id|>", "eos_token": {"content": SPECIALS[1]},
              "chat_template": LLAMA31}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / name).write_bytes(tokenizer_model())
    good, rng, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for _ in range(200):
        (tmp_path / name).write_bytes(damage(good, rng))
        try:
            tok = Tokenizer.from_dir(tmp_path)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            continue
        for text in ("the in\n\n x中é <|eot_id|>", "a  b 123"):
            try:
                assert tok.decode(tok.encode(text)) == text
            except ValueError as error:
                assert "lacks bytes" in str(error)
    assert 30 < refused < 200


# ------------------------------------------------------- tiktoken merges as a tokenizer.json says

def test_a_token_that_its_merges_cannot_make_needs_ignore_merges(tmp_path):
    root = tokenizer_json(["b c"], sequence(split(r"\S+|\s+"), byte_level()), [])
    root["model"]["vocab"]["abcd"] = 257                             # nothing joins into abcd
    root["model"]["ignore_merges"] = True
    tok = load(tmp_path, root)
    assert tok.encode("abcd") == [257] and pieces(tok, "xabcd") == [b"x", b"a", b"bc", b"d"]
    root["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="merges"):
        load(tmp_path, root)


def plain_bpe(piece, vocab, merges, ignore_merges):
    """What a tokenizer.json says of a piece: join the first of the listed merges that is possible,
    leftmost, again and again; with ignore_merges a piece that is a token stays whole."""
    parts = [piece] if ignore_merges and piece in vocab else [*piece]
    while possible := [pair for pair in merges if pair in zip(parts, parts[1:])]:
        i = [*zip(parts, parts[1:])].index(possible[0])
        parts[i:i + 2] = ["".join(possible[0])]
    return [vocab[part] for part in parts]


def random_merges(rng):
    """-> letters, tokens, vocab, merges: joined from others, mostly in order, some left out."""
    letters, tokens = "abc"[:rng.randrange(1, 4)], []
    for _ in range(rng.randrange(1, 8)):
        parts = [*letters, *tokens] if rng.random() < 0.8 else [rng.choice(letters) * 2]
        tokens.append(rng.choice(parts) + rng.choice(parts))
    tokens = [*dict.fromkeys(tokens)]
    vocab = {c: i for i, c in enumerate([*T.BYTE_OF, *tokens])}
    merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t))
              if {t[:i], t[i:]} <= vocab.keys()]
    if rng.random() < 0.5:                                           # the pairs of a token shuffled
        merges = sorted(rng.sample(merges, len(merges)), key=lambda pair: vocab["".join(pair)])
    if rng.random() < 0.2:
        rng.shuffle(merges)
    return letters, tokens, vocab, [pair for pair in merges if rng.random() < 0.9]


def test_accepted_merges_are_followed_to_the_letter():
    rng, accepted, refused = random.Random(0), 0, 0
    for _ in range(400):
        letters, tokens, vocab, merges = random_merges(rng)
        ignore_merges = rng.random() < 0.5
        try:
            check_merges(vocab, merges, ignore_merges)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        ranks = {bytes(map(T.BYTE_OF.get, t)): i for t, i in vocab.items()}
        tok = Tokenizer([r"\S+"], ranks, {}, set())
        words = ["".join(rng.choices(letters, k=rng.randrange(1, 12))) for _ in range(20)]
        for text in [*tokens, *words]:
            expected = plain_bpe(text, vocab, merges, ignore_merges)
            assert tok.encode(text) == expected, (text, tokens, merges)
    assert accepted > 100 and refused > 100
