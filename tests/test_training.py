"""The training of the tiny model: texts, vocabulary, batches, losses, and what it has learned."""
import itertools
import random
import re
from pathlib import Path

import pytest
import regex
import torch

import train_tiny
from experiments.shapes import SHAPES, random_llama
from experiments.training import corpus
from experiments.training.align import MAX_SENTENCE, POSITIONS, AligningCache, aligning
from experiments.training.align import sentence_numbers
from experiments.training.batches import SPAN, batch, document
from experiments.training.corpus import OTHER, PREFIX, VALUE, needle, story
from experiments.training.vocabulary import BOS, SPLIT, VOCAB, train_bpe, write_tokenizer
from model import Config, DenseKV, Llama
from sentencekv import SentenceKV, sentence_flags
from tokenizer import Tokenizer
from train_tiny import TrainingCache

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
torch.set_num_threads(1)                # the tensors are tiny: more threads only wait

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(TINY)

@pytest.fixture(scope="module")
def vocab():
    return train_bpe()

@pytest.fixture(scope="module")
def model():
    return Llama.from_pretrained(TINY)

# ----------------------------------------------------------------------------------------- texts

@pytest.mark.parametrize("prose, density", [(0.0, None), (0.5, 0.25), (1.0, None)])
def test_a_story_states_its_facts_once_each_in_order_at_all_depths(prose, density):
    text, facts = story(1500, facts=6, seed=3, prose=prose, density=density)
    places = [text.index(answer) for _, answer in facts]
    assert len(facts) == 6 and places == sorted(places)
    for i, (place, (question, answer)) in enumerate(zip(places, facts)):
        assert abs(place / len(text) - (i + 0.5) / 6) < 0.2
        subject = question.removeprefix(" What is the ").removesuffix("?")
        assert answer.startswith(f" The {subject} is ") and text.count(f" The {subject} is ") == 1
    subjects = [" ".join(match) for match in re.findall(r" The ([a-z ]+) of (\w+) is ", text)]
    assert len(set(subjects)) == len(subjects) and (len(subjects) > 12) == bool(density)
    assert abs(corpus.estimate(text) - 1500) < 60
    assert any(s in text for s in corpus.prose_sentences()) == (prose > 0)
    assert story(1500, facts=6, seed=3, prose=prose, density=density)[0] == text
    assert story(1500, facts=6, seed=4, prose=prose, density=density)[0] != text

def test_a_story_cannot_have_more_facts_than_there_are():
    most = len(corpus.RELATIONS) * len(corpus.WORDS["name"])
    assert len(story(100, facts=most)[1]) == most
    for facts in (-1, most + 1):
        with pytest.raises(ValueError, match=f"facts must be from 0 to {most}, got {facts}"):
            story(100, facts=facts)

def test_facts_are_drawn_once_each_and_never_those_taken():
    names = corpus.WORDS["name"]
    facts = corpus.draw_facts(random.Random(0), 999, ["home town"], taken=[("home town", "Bob")])
    assert sorted(name for _, name, _ in facts) == sorted(set(names) - {"Bob"})
    assert {relation for relation, _, _ in facts} == {"home town"}
    assert {value for _, _, value in facts} <= set(corpus.WORDS["town"])
    assert len(corpus.draw_facts(random.Random(0), 5)) == 5

@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("density, whole", [(None, False), (None, True), (0.3, True)])
def test_a_needle_has_its_length_and_its_answer_in_the_text_at_its_depth(
        tokenizer, density, whole, depth):
    ids, answer = needle(random.Random(depth), 500, tokenizer, depth=depth, density=density,
                         whole=whole)
    text, answer = tokenizer.decode(ids), tokenizer.decode(answer)
    assert len(ids) == 500 and text.startswith(BOS) and text.count(" What is") == 1
    body, end = text.split(" What is the ")
    subject = end.split("?")[0]
    sentence = f" The {subject} is" + answer.removeprefix(f" The {subject} is")
    assert end == f"{subject}?" + ("" if whole else f" The {subject} is")
    assert body.count(sentence) == 1 and abs(body.index(sentence) / len(body) - depth) < 0.15
    facts = re.findall(r"The (\w+ \w+) of (\w+) is", body)
    same = sum(relation == subject.split(" of ")[0] for relation, _ in facts)
    assert density or len(facts) == 8 and same >= 4                 # half have this relation
    assert not density or len(facts) > 8

def test_a_needle_that_does_not_fit_says_so(tokenizer):
    with pytest.raises(ValueError, match="60 tokens are too few for these facts"):
        needle(random.Random(0), 60, tokenizer)

def test_a_lesson_asks_for_facts_of_its_passage_and_weighs_the_values():
    pieces = corpus.lesson(random.Random(1), 400, 0.3)
    text, weight = next(pieces)
    assert weight == OTHER and 0.4 * 400 < corpus.estimate(text) < 0.9 * 400
    for _ in range(20):
        (question, a), (prefix, b), (value, c) = itertools.islice(pieces, 3)
        assert (a, b, c) == (OTHER, PREFIX, VALUE) and prefix + value in text
        assert prefix == question.replace(" What is the", " The").replace("?", " is")

def test_copying_repeats_the_first_sentences_and_weighs_all_but_their_first_word():
    pieces = corpus.copying(random.Random(1), 100)
    text, weight = next(pieces)
    sentences = sorted(text.split(".")[:-1])
    assert weight == OTHER and len(sentences) == 1 + 100 // 18
    for _ in range(3):                                              # every round has all of them
        again = []
        for _ in sentences:
            (first, a), (rest, b) = itertools.islice(pieces, 2)
            assert (a, b) == (OTHER, VALUE) and len(first.split()) == 1
            again.append((first + rest).removesuffix("."))
        assert sorted(again) == sentences

def test_library_prose_is_the_prose_of_the_standard_librarys_docstrings(tmp_path, monkeypatch):
    first, second, third = (f"{word} " + "words of prose " * 8 + "end." for word in ("A", "B", "C"))
    sources = {
        "b.py": f'"""Short.\n\n{first}\n\nno capital {second}"""\nclass C:\n    """{third}"""\n',
        "a.py": f'def f():\n    """{second}\n\n>>> {third}\n\n{first}"""\n',
        "idlelib/c.py": '"""D' + "never " * 30 + '."""',
        "json/d.py": '"""' + third.replace("words", "\n words") + '"""',
        "site-packages/e.py": '"""D' + "never " * 30 + '."""'}
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(corpus.os, "__file__", str(tmp_path / "os.py"))
    assert corpus.library_prose.__wrapped__() == f"{second} {first} {third}"    # each once

# ------------------------------------------------------------------------- vocabulary and batches

def test_the_vocabulary_has_1024_ids_and_one_for_every_known_word(tmp_path, vocab):
    assert sorted(vocab.values()) == [*range(VOCAB - 1)]            # BOS is the last
    write_tokenizer(tmp_path / "tokenizer.json", vocab)
    tokenizer = Tokenizer.from_dir(tmp_path)                        # it checks the merges
    assert tokenizer.n_vocab == VOCAB and tokenizer.added == {BOS: VOCAB - 1}
    for word in corpus.KNOWN:
        assert tokenizer.encode(f" {word}") == [vocab[f" {word}".encode()]]
    assert regex.findall(SPLIT, " 1234 5") == [" 1", "2", "3", "4", " 5"]
    text = story(200, prose=0.5)[0] + "é 中\n\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prose = "".join(corpus.prose_sentences())
    assert len(tokenizer.encode(prose)) < 0.5 * len(prose)          # the merges compress

def test_documents_are_a_text_with_weights_by_token(tokenizer):
    for copies in (0.0, 1.0):
        ids, weights = document(random.Random(2), 300, copies, 0.0, tokenizer)
        assert len(ids) == len(weights) == 301 and ids[0] == VOCAB - 1
        assert ("What is" in tokenizer.decode(ids)) == (copies == 0)
        assert set(weights) == {0.0, OTHER, VALUE} | ({PREFIX} if copies == 0 else set())
    ids, weights = document(random.Random(2), 300, 0.0, 0.0, tokenizer)
    values = [tokenizer.decode([id]) for id, weight in zip(ids, weights) if weight == VALUE]
    assert "." in values and " is" not in values                    # only what follows " is"
    texts = [tokenizer.decode(document(random.Random(seed), 300, 0.0, 1.0, tokenizer)[0])
             for seed in range(20)]
    with_prose = sum(any(s in text for s in corpus.prose_sentences()) for text in texts)
    assert 5 <= with_prose <= 15                                    # half of the documents

def test_positions_jump_where_a_sentence_begins_and_stay_within_the_span(tokenizer):
    x, w, positions = batch(random.Random(1), 16, 256, 0.2, 0.2, tokenizer)
    assert x.shape == (16, 257) and w.shape == positions.shape == (16, 256)
    assert bool((positions[:, 0] == 0).all()) and int(positions.max()) < SPAN
    gaps = positions.diff(dim=1)
    assert bool((gaps >= 1).all())
    jumps = (gaps > 1).nonzero().tolist()
    jumped = {b for b, _ in jumps}
    assert 3 <= len(jumped) <= 13 and int(positions.max()) > 2 * 256
    assert {tokenizer.decode([int(x[b, t])]) for b, t in jumps} <= {".", "?"}
    again = batch(random.Random(1), 16, 256, 0.2, 0.2, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip((x, w, positions), again))

# ------------------------------------------------------------------------------ models and losses

@pytest.mark.parametrize("shape, count, factor", [
    ("llama-3.1-8b", 8_030_261_248, 8.0),
    ("llama-3.2-1b", 1_235_814_400, 32.0),
    ("llama-3.2-3b", 3_212_749_824, 32.0)])
def test_named_shapes_have_the_published_parameter_counts(shape, count, factor):
    with torch.device("meta"):
        model = Llama(Config(**SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) == count
    assert SHAPES[shape]["rope_scaling"]["factor"] == factor

def test_random_weights_are_those_of_their_seed():
    first, same, other = (random_llama("tiny", seed=seed) for seed in (1, 1, 2))
    weight = first.embed_tokens.weight
    assert torch.equal(weight, same.embed_tokens.weight)
    assert not torch.equal(weight, other.embed_tokens.weight)
    assert weight.std() == pytest.approx(128 ** -0.5, rel=0.01)
    assert bool((first.norm.weight == 1).all())
    half = random_llama("tiny", num_hidden_layers=1, dtype=torch.float16)
    assert half.norm.weight.dtype == torch.float16 and len(half.layers) == 1
    with pytest.raises(ValueError, match="unknown shape 'huge'; known: llama-3.1-8b, "):
        random_llama("huge")

def test_the_training_cache_computes_exact_attention_and_its_gradient():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 4, generator=rng, dtype=torch.float64).requires_grad_()
               for heads in (4, 2, 2))
    future = torch.ones(300, 300, dtype=torch.bool).triu(1)
    weights = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(future, -torch.inf).softmax(-1)
    plain = weights @ v.repeat_interleave(2, 1)
    out = TrainingCache(None).attend(0, q, k, v)
    torch.testing.assert_close(out, plain)
    factor = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    gradients = torch.autograd.grad((out * factor).sum(), (q, k, v))
    expected = torch.autograd.grad((plain * factor).sum(), (q, k, v))
    torch.testing.assert_close(gradients, expected)

TOY_FLAGS = sentence_flags([b"One", b" Two", b"."])
ONE, TWO, STOP = range(3)

def toy_tokens(B, L, rng):
    """Random tokens (B, L) of the toy vocabulary, no full stop at the start or after another."""
    tokens = torch.multinomial(torch.tensor([2.0, 6, 2]), B * L, True, generator=rng).view(B, L)
    before = torch.cat((torch.full((B, 1), STOP), tokens[:, :-1]), dim=1)
    return tokens.masked_fill((tokens == STOP) & (before == STOP), TWO)

def plain_sentences(tokens):
    """The number of each token's sentence: one starts with a space after a full stop."""
    numbers, number, length = [], 0, 0
    for i, token in enumerate(tokens):
        if i and (tokens[i - 1] == STOP and token == TWO or length == MAX_SENTENCE):
            number, length = number + 1, 0
        numbers.append(number)
        length += 1
    return numbers

def test_the_alignment_loss_is_the_cross_entropy_from_attention_to_the_papers_scores():
    rng = torch.Generator().manual_seed(0)
    B, L, H, G, d = 2, 60, 2, 2, 4
    tokens = toy_tokens(B, L, rng)
    at = [5, 30, 41, 59]
    weights = torch.full((B, L), OTHER)
    weights[:, at] = VALUE
    q, k = (torch.randn(B, heads, L, d, generator=rng, dtype=torch.float64) for heads in (H * G, H))
    losses = []
    for b, h, t in itertools.product(range(B), range(H), at):
        sentence = plain_sentences(tokens[b].tolist())
        if sentence[t] < 2:
            continue
        group = q[b, h * G:h * G + G]                               # (G, L, d)
        past = k[b, h, :t + 1]
        attention = [torch.softmax(past @ one[t] / 2, 0) for one in group]
        attention = torch.stack(attention).mean(0)
        members = [[i for i in range(L) if sentence[i] == s]
                   for s in range(sentence[t] - 1)]                 # not the one before it
        own = [i for i in range(t + 1) if sentence[i] == sentence[t]]
        query = group[:, own].mean((0, 1))
        scores = [4 * query @ k[b, h, indices].mean(0) / 2 for indices in members]
        scores = torch.stack(scores).log_softmax(0)
        losses.append(-sum(attention[i].sum() * score for i, score in zip(members, scores)))
    assert len(losses) > 8
    expected = float(sum(losses) / len(losses))

    cache = AligningCache(TrainingCache(None), tokens, weights, TOY_FLAGS)
    found = cache.alignment(q.unflatten(1, (H, G)), k)
    assert float(found) == pytest.approx(expected, abs=1e-4)
    out = cache.attend(0, q, k, k)
    assert float(cache.extra_loss) == pytest.approx(0.3 * expected, abs=1e-4)
    assert torch.equal(out, TrainingCache(None).attend(0, q, k, k))

def test_the_alignment_loss_takes_a_limited_number_of_positions_and_none_without_values():
    tokens, weights = torch.ones(1, 200, dtype=torch.long), torch.full((1, 200), OTHER)
    tokens[:, 9:99:10] = STOP                                       # the rest is cut at 64
    cache = AligningCache(TrainingCache(None), tokens, weights, TOY_FLAGS)
    q = torch.randn(1, 2, 200, 4)
    cache.attend(0, q, q, q)
    assert cache.extra_loss == 0
    cache = AligningCache(TrainingCache(None), tokens, weights.fill_(VALUE), TOY_FLAGS)
    assert cache.at.shape == (1, POSITIONS) and len(set(cache.at[0].tolist())) == POSITIONS
    assert sentence_numbers(tokens, TOY_FLAGS)[0].tolist() == plain_sentences(tokens[0].tolist())

@torch.enable_grad()
def test_training_against_the_alignment_loss_lowers_it(tokenizer):
    model = Llama.from_pretrained(TINY, dtype=torch.float32).requires_grad_(True)
    tokens, weights, positions = batch(random.Random(1), 2, 256, 0, 0.0, tokenizer)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    align = aligning(tokenizer)
    for _ in range(6):
        torch.manual_seed(0)                                        # the same positions every time
        cache = align(TrainingCache(positions), tokens[:, :-1], weights)
        model(tokens[:, :-1], cache)
        losses.append(float(cache.extra_loss.detach()))
        optimizer.zero_grad()
        cache.extra_loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

# ------------------------------------------------------------------------- training and its result

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
@pytest.mark.parametrize("options", [[], ["--align"]])
def test_training_writes_a_checkpoint_that_loads_and_lowers_the_loss(
        tmp_path, monkeypatch, capsys, vocab, options):
    monkeypatch.setattr(train_tiny, "train_bpe", lambda: vocab)     # 2 s faster
    monkeypatch.setattr(train_tiny, "QUICK", [(39, 8, 32, 1.0, 0), (1, 1, 200, 0, 0)])
    evaluated, aligned = [], []
    monkeypatch.setattr(train_tiny, "aligning",
                        lambda tokenizer: aligned.append(1) or aligning(tokenizer))
    monkeypatch.setattr(train_tiny, "evaluate", lambda model, tokenizer, length, n, density:
                        evaluated.append((length, n, density)) or 0.5)
    out = tmp_path / "new"
    train_tiny.main(["--out", str(out), "--seed", "1", *options])
    assert len(aligned) == len(options)
    printed, log = capsys.readouterr()
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", log)]
    assert len(losses) == 2 and losses[1] < losses[0] and "step 40/40" in log
    assert [line.split()[-2] for line in printed.splitlines()] == ["50.0%"] * 6
    assert evaluated[0] == (256, 24, 0.0) and evaluated[-1][0] == 8192
    model = Llama.from_pretrained(out)
    start = train_tiny.new_model(1)
    assert model.config == start.config and model.norm.weight.dtype == torch.bfloat16
    for (name, p), q in zip(model.named_parameters(), start.parameters()):
        assert 0 < (p - q).abs().mean() < 3 * q.abs().mean() + 0.1, name    # trained, not replaced
    with pytest.raises(SystemExit, match="already holds a checkpoint: choose another --out"):
        train_tiny.main(["--out", str(out)])

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_the_alignment_loss_takes_part_in_training(tmp_path, tokenizer):
    weights = []
    for align in (None, aligning(tokenizer)):
        train_tiny.train(tmp_path, [(2, 2, 128, 0, 0)], 1, tokenizer, align)
        weights.append((tmp_path / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]

def test_evaluation_counts_answers_that_are_exact(model, tokenizer):
    assert train_tiny.evaluate(model, tokenizer, 300, n=12) >= 0.9
    assert train_tiny.evaluate(random_llama("tiny"), tokenizer, 300, n=12) == 0

def exact_match(model, tokenizer, length, n, new_cache):
    """Share of n questions about one of 8 facts, at depths from start to end, answered exactly."""
    rng, right = random.Random(1), 0
    for i in range(n):
        prompt, answer = needle(rng, length, tokenizer, depth=(i + 0.5) / n, whole=True)
        steps = model.generate(torch.tensor([prompt]), new_cache(), len(answer))
        right += [int(token) for token in steps] == answer
    return right / n

@pytest.mark.parametrize("length, n", [(512, 12), (2048, 6), (8192, 1)])
def test_the_tiny_model_answers_at_every_depth_and_so_does_sentencekv_at_a_16th(
        model, tokenizer, length, n):
    flags = sentence_flags(tokenizer.token_bytes)
    budget = max(128, length // 16)
    dense = exact_match(model, tokenizer, length, n, DenseKV)
    ours = exact_match(model, tokenizer, length, n, lambda: SentenceKV(flags, budget=budget))
    assert dense >= 0.9 and ours >= 0.9, (dense, ours)

def test_follow_up_questions_are_answered_from_one_prefill(model, tokenizer):
    flags, right = sentence_flags(tokenizer.token_bytes), 0
    for seed in range(2):
        text, facts = story(2000, facts=8, seed=seed)
        cache, last = SentenceKV(flags, budget=160), []
        model.prefill(torch.tensor([tokenizer.encode(text, bos=True)]), cache)
        for question, answer in facts[::-2]:
            expected = tokenizer.encode(answer)
            prompt = torch.tensor([last + tokenizer.encode(question)])
            out = [int(token) for token in model.generate(prompt, cache, len(expected))]
            right += out == expected
            last = out[-1:]                     # it is not in the cache yet
    assert right >= 7, f"{right} of 8"
