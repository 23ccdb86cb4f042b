"""The adapter for Hugging Face's transformers: generate() with a SentenceCache."""
import copy
import pickle
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import tokenizers  # noqa: E402

from extras.transformers_cache import (  # noqa: E402
    SentenceCache, flags_of, undo_sentencekv, use_sentencekv)
from model import Config, Llama  # noqa: E402
from sentencekv import SentenceKV  # noqa: E402
from train_tiny import story  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
V, PAD, EOS = 96, 0, 2
FLAGS = [[b" a", b".", b" The", b"x"][i % 4] for i in range(V)]
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS)
FAMILIES = {                        # what the configuration has besides SHAPE
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "SmolLM3": {"no_rope_layers": [1, 0]}, "Granite": {"attention_multiplier": 0.2}, "Olmo2": {},
    "Phi3": {}, "Gemma": {"head_dim": 8}, "Cohere": {}, "Glm": {"head_dim": 8}, "Starcoder2": {},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 128, "query_pre_attn_scalar": 16},
    "Mixtral": {"num_local_experts": 4}, "GPTNeoX": {}, "GPT2": {}, "Phi": {},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}}

def tiny(family="Llama", **settings):
    """A model with few random weights, large enough for attention to matter."""
    config = getattr(transformers, family + "Config")(**{**SHAPE, **settings})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model

@pytest.fixture(scope="module")
def llama():
    model = tiny()
    use_sentencekv(model)
    return model

def text(n, seed=0):
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed))

def left_padded(rows):
    """Rows of tokens -> ids and attention_mask, (B, longest row) each."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1, padding_side="left")
    return ids.clamp(min=PAD), (ids >= 0).long()

def say(model, rows, cache=None, n=8, **options):
    """The n tokens that generate() adds to each row: (B, n)."""
    ids, mask = left_padded(rows)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": n, **options}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return out[:, ids.shape[1]:]

def cached(cache):
    return [row.tokens for row in cache.kv.rows]

ROWS = [text(40), text(25, 1), text(7, 2)]

# ----------------------------------------------------------------------- what it has to equal

@pytest.mark.parametrize("family", FAMILIES)
def test_covering_budget_is_ordinary_generate_in_every_family(family):
    model = tiny(family, **FAMILIES[family])
    expected = say(model, ROWS)
    assert len(expected.unique()) > 2
    use_sentencekv(model)
    use_sentencekv(model)                                       # twice does no harm
    cache = SentenceCache(FLAGS, budget=128)
    assert say(model, ROWS, cache).equal(expected)
    said = [row.tolist() + new.tolist()[:-1] for row, new in zip(ROWS, expected)]
    assert cached(cache) == said                                # no padding is stored
    with pytest.raises(ValueError, match=r"pass past_key_values=SentenceCache"):
        say(model, ROWS)
    undo_sentencekv(model)
    undo_sentencekv(model)
    assert say(model, ROWS).equal(expected)

@pytest.mark.parametrize("settings", [{}, {"keep": 1.5, "window": 8}, {"rank": "mean"}])
def test_small_budget_is_our_own_llama(llama, settings):
    names = {**SHAPE, "rms_norm_eps": llama.config.rms_norm_eps}
    ours = Llama(Config(**{k: v for k, v in names.items() if k in Config.__annotations__}))
    ours.load_state_dict({name.removeprefix("model."): p for name, p in
                          llama.state_dict().items()})
    settings = dict(budget=24, sink=2, recent=4, **settings)
    rows = [text(60), text(60, 1)]
    kv, cache = SentenceKV(FLAGS, **settings), SentenceCache(FLAGS, **settings)
    expected = torch.stack(list(ours.generate(torch.stack(rows), kv, max_new_tokens=12)), dim=1)
    with torch.no_grad():
        got = say(llama, rows, cache, 12)
    assert got.equal(expected)
    assert not say(llama, rows, SentenceCache(FLAGS, budget=128), 12).equal(expected)
    for mine, theirs in zip(cache.kv.fetched(), kv.fetched()):
        assert mine.equal(theirs)
    assert cached(cache) == [row.tokens for row in kv.rows]

def test_every_row_of_a_padded_batch_is_the_row_alone(llama):
    settings = dict(budget=20, sink=2, recent=4)
    cache = SentenceCache(FLAGS, **settings)
    first = say(llama, ROWS, cache)
    rows = [torch.cat((row, new, text(5 + 4 * b, 9))) for b, (row, new) in
            enumerate(zip(ROWS, first))]
    # The second call passes all slots: left padding, the text, and again padding before the rest.
    ids, mask = left_padded(ROWS)
    more, more_mask = left_padded([row[len(old) + 8:] for row, old in zip(rows, ROWS)])
    ids, mask = torch.cat((ids, first, more), 1), torch.cat((mask, first >= 0, more_mask), 1)
    options = dict(do_sample=False, eos_token_id=None, max_new_tokens=8)
    out = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for b, row in enumerate(ROWS):
        alone = SentenceCache(FLAGS, **settings)
        assert say(llama, [row], alone).equal(first[b:b + 1])
        assert say(llama, [rows[b]], alone).equal(out[b:b + 1, -8:])
        assert cached(alone) == cached(cache)[b:b + 1]

def test_follow_ups_in_any_number_of_parts_are_one_long_prompt(llama):
    row = text(50)
    expected = say(llama, [row], SentenceCache(FLAGS, budget=20, sink=2, recent=4))
    parts = SentenceCache(FLAGS, budget=20, sink=2, recent=4)
    for n in (20, 33):                                          # prompts without a decode step
        say(llama, [row[:n]], parts, 1)
    fork = copy.deepcopy(parts)
    say(llama, [torch.cat((row[:33], text(9, 5)))], parts)      # the fork does not notice
    assert say(llama, [row], fork).equal(expected)
    covering = SentenceCache(FLAGS, budget=128)
    first = say(llama, [row], covering)[0]
    longer = torch.cat((row, first, text(6, 4)))
    assert say(llama, [longer], covering).equal(say(llama, [longer], SentenceCache(FLAGS)))

def test_prompts_in_chunks_samples_and_streams(llama):
    options = dict(prefill_chunk_size=16)
    for rows in ([text(41)], [text(41), text(30, 3)]):
        whole = say(llama, rows, SentenceCache(FLAGS, budget=128))
        assert say(llama, rows, SentenceCache(FLAGS, budget=128), **options).equal(whole)
    drawn = []
    for cache in (SentenceCache(FLAGS, budget=128), SentenceCache(FLAGS, budget=14)):
        torch.manual_seed(0)
        drawn.append(say(llama, [text(41)], cache, 20, do_sample=True, top_k=0))
    undo_sentencekv(llama)
    torch.manual_seed(0)
    ordinary = say(llama, [text(41)], None, 20, do_sample=True, top_k=0)
    use_sentencekv(llama)
    assert drawn[0].equal(ordinary) and not drawn[1].equal(ordinary)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []
        def put(self, value):
            self.tokens += value.flatten().tolist()
        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    new = say(llama, [text(41)], SentenceCache(FLAGS), streamer=streamer)
    assert streamer.tokens == [*text(41).tolist(), *new[0].tolist(), "end"]

def test_a_pipeline_answers_from_one_cache_and_goes_on_with_it():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    ask = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text, facts = story(600, seed=5)
    use_sentencekv(model)
    cache = SentenceCache(flags_of(tokenizer), budget=64)
    for question, answer in facts[:2]:
        text += question
        said = ask(text, max_new_tokens=len(tokenizer(answer)["input_ids"]), do_sample=False,
                   past_key_values=cache)[0]["generated_text"]
        assert said == text + answer
        assert cached(cache)[0] == tokenizer(said)["input_ids"][:-1]
        text = said

def test_a_pickled_cache_goes_on_and_contains_no_model(llama):
    cache = SentenceCache(FLAGS, budget=32)
    assert copy.deepcopy(cache).get_seq_length() == 0
    said = say(llama, [text(30)], cache)
    loaded = pickle.loads(pickle.dumps(cache))
    assert cache.decoder is llama.model and loaded.decoder is None
    more = [torch.cat((text(30), said[0], text(5, 9)))]
    assert say(llama, more, loaded).equal(say(llama, more, cache))

def test_a_forward_of_ones_own_has_the_positions_of_the_cache():
    model = tiny("GPT2")                # with learned positions: a shift is no matter to rotary ones
    use_sentencekv(model)
    ids, mask = left_padded(ROWS)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=SentenceCache(FLAGS, budget=128))
        for b, row in enumerate(ROWS):
            alone = model(row[None], past_key_values=SentenceCache(FLAGS, budget=128))
            assert torch.allclose(out.logits[b, -1], alone.logits[0, -1], atol=1e-4)

def test_several_samples_of_one_prompt_fill_one_cache(llama):
    cache = SentenceCache(FLAGS, budget=128)
    torch.manual_seed(0)
    said = say(llama, [text(30)], cache, do_sample=True, num_return_sequences=3)
    assert said.shape == (3, 8) and len(set(map(tuple, said.tolist()))) == 3
    assert cached(cache) == [[*text(30).tolist(), *row[:-1]] for row in said.tolist()]

def test_padding_after_the_end_of_a_row_is_forgotten_when_the_mask_hides_it(llama):
    cache = SentenceCache(FLAGS, budget=128)
    free = say(llama, ROWS, SentenceCache(FLAGS, budget=128))
    eos = int(free[1, 2])                                       # row 1 finishes early
    said = say(llama, ROWS, cache, eos_token_id=eos, pad_token_id=PAD)
    real = torch.ones_like(said)
    for b, row in enumerate(said.tolist()):
        if eos in row:
            real[b, row.index(eos) + 1:] = 0
    assert said.shape[1] == 8 and (real[1] == 0).sum() >= 5
    assert said[1, 3:].eq(PAD).all() and len(cache.kv.rows[1].tokens) == 25 + 7
    ids, mask = left_padded(ROWS)
    more, more_mask = left_padded([text(6, 7), text(4, 8), text(5, 9)])
    ids, mask = torch.cat((ids, said, more), 1), torch.cat((mask, real, more_mask), 1)
    options = dict(do_sample=False, eos_token_id=None, max_new_tokens=5)
    out = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for b in range(3):
        conversation = ids[b][mask[b] > 0]
        fresh = say(llama, [conversation], SentenceCache(FLAGS, budget=128), 5)
        assert out[b:b + 1, -5:].equal(fresh)
        assert cached(cache)[b] == [*conversation.tolist(), *out[b, -5:-1].tolist()]

def test_a_step_in_which_the_mask_hides_a_row_is_idle(llama):
    cache = SentenceCache(FLAGS, budget=128)
    say(llama, ROWS[:2], cache, 1)
    before, slots = cached(cache), cache.get_seq_length()
    mask = torch.cat((left_padded(ROWS[:2])[1], torch.tensor([[1], [0]])), dim=1)
    with torch.no_grad():
        llama(torch.tensor([[5], [PAD]]), attention_mask=mask, past_key_values=cache)
    assert cached(cache) == [[*ROWS[0].tolist(), 5], ROWS[1].tolist()]
    assert cache.get_seq_length() == slots + 1 and before[1] == cached(cache)[1]

# ----------------------------------------------------------------------------- what it refuses

def test_unsupported_generation_is_refused_in_one_line(llama):
    def refuse(match, rows, cache, **options):
        with pytest.raises(ValueError, match=match) as error:
            say(llama, rows, cache, **options)
        assert "\n" not in str(error.value)

    refuse("beam search", ROWS[:1], SentenceCache(FLAGS), num_beams=2)
    refuse("assisted decoding", ROWS[:1], SentenceCache(FLAGS), prompt_lookup_num_tokens=3)
    used = SentenceCache(FLAGS, budget=128)
    say(llama, ROWS[:1], used)
    refuse("does not fit 47 cached", [text(50), text(49)], used)
    with torch.no_grad(), pytest.raises(ValueError, match="these tokens are cached"):
        llama(ROWS[0][None], position_ids=torch.arange(40)[None], past_key_values=used)
    other = SentenceCache(FLAGS, budget=128)
    say(llama, [text(5)], other, 1)
    ids, mask = left_padded([text(9)])
    for hidden, match in ((0, "only hide the end"), (slice(0, 5), "lengths from")):
        hiding = mask.clone()
        hiding[0, hidden] = 0
        with pytest.raises(ValueError, match=match):
            llama.generate(ids, attention_mask=hiding, past_key_values=other)
    padded = SentenceCache(FLAGS, budget=128)
    say(llama, ROWS[1:], padded, 1)
    ids = torch.cat((left_padded(ROWS[1:])[0], torch.full((2, 3), 7)), dim=1)
    with pytest.raises(ValueError, match="may not show padding again"):
        llama.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=padded)

def test_a_forward_that_cannot_be_right_is_refused(llama):
    ids = text(6)[None]
    with torch.no_grad():
        with pytest.raises(ValueError, match="inputs_embeds"):
            llama(inputs_embeds=torch.zeros(1, 3, 32), past_key_values=SentenceCache(FLAGS))
        with pytest.raises(ValueError, match="does not fit 0 cached and 6 new"):
            llama(ids, attention_mask=torch.ones(1, 1, 6, 6), past_key_values=SentenceCache(FLAGS))
        other, cache = tiny(), SentenceCache(FLAGS)
        with pytest.raises(ValueError, match=r"call use_sentencekv\(model\)"):
            other(ids, past_key_values=cache)
        use_sentencekv(other)
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="another model"):
            llama(ids, past_key_values=cache)
        undo_sentencekv(other)
        with pytest.raises(ValueError, match=r"call use_sentencekv\(model\)"):
            other(ids, past_key_values=cache)
        use_sentencekv(other)
        other.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"call use_sentencekv\(model\)"):
            other(ids, past_key_values=cache)
        llama.train()
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            llama(ids, past_key_values=SentenceCache(FLAGS))
        llama.eval()
    with pytest.raises(ValueError, match=r"no_grad\(\)"):
        llama(ids, past_key_values=SentenceCache(FLAGS))

def test_an_interrupted_forward_is_refused_by_the_next(llama):
    def stop(*args):
        raise KeyboardInterrupt

    cache = SentenceCache(FLAGS)
    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        say(llama, ROWS[:1], cache)
    hook.remove()
    with pytest.raises(ValueError, match="interrupted"):
        say(llama, [text(50)], cache)

@pytest.mark.parametrize("family, settings, match", [
    ("Gemma2", {"head_dim": 8}, "softcap"),
    ("GptOss", {"head_dim": 8, "num_local_experts": 4, "rope_scaling": None}, "s_aux"),
    ("Mistral", {"sliding_window": 42}, "sliding window"),
    ("Bloom", {}, "BloomForCausalLM is unsupported"),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM is unsupported")])
def test_models_whose_attention_differs_are_refused(family, settings, match):
    model = tiny(family, **settings)
    with pytest.raises(ValueError, match=match):
        use_sentencekv(model)
        say(model, ROWS[:1], SentenceCache(FLAGS))

def test_a_sliding_window_that_is_never_exceeded_is_supported():
    model = tiny("Mistral", sliding_window=47)
    expected = say(model, ROWS[:1])
    use_sentencekv(model)
    assert say(model, ROWS[:1], SentenceCache(FLAGS)).equal(expected)

# ------------------------------------------------------------------------------------ flags_of

def tokenizer(model, prepare, special=("<s>",), added=("<think>é",)):
    """A tokenizer of transformers from a model of tokenizers."""
    core = tokenizers.Tokenizer(model)
    prepare(core)
    core.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    core.add_tokens([tokenizers.AddedToken(token, special=False) for token in added])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)

def byte_level(core):
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

def sentencepiece(core):
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])

def test_flags_of_a_tokenizer_are_the_bytes_of_its_tokens():
    sample = "<s>It is so. <think>é Ça 好。Yes"
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*letters, "is", "Ġis"])}
    bpe = tokenizers.models.BPE(vocabulary, [("i", "s"), ("Ġ", "is")])
    made = tokenizer(bpe, byte_level)
    spelled = [flags_of(made)[i] for i in made(sample)["input_ids"]]
    assert b"".join(spelled).decode() == sample.replace("<s>", "\n\n")
    assert spelled[0] == b"\n\n" and b" is" in spelled and "<think>é".encode() in spelled
    assert b"\xe5" in spelled                                   # 好 lies in three tokens

    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *"▁ItisoYe.Ça", "▁is"]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    bpe = tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    made = tokenizer(bpe, sentencepiece, special=("<unk>", "<s>"))
    spelled = [flags_of(made)[i] for i in made("It is so. 好。Yes")["input_ids"]]
    assert b"".join(spelled).decode() == " It is so. 好。Yes"
    assert flags_of(made)[vocabulary["▁is"]] == b" is" and b"\xe5" in spelled
    assert len(flags_of(made)) == len(made)

def test_tokenizers_that_lose_text_are_refused():
    words = {name: i for i, name in enumerate(["[UNK]", "It", "is", "so", ".", "Yes"])}
    pieces = tokenizers.models.WordPiece(words, unk_token="[UNK]")
    with pytest.raises(ValueError, match="neither byte-level nor SentencePiece"):
        flags_of(tokenizer(pieces, lambda core: setattr(
            core, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace())))
