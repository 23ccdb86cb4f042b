"""SentenceKV for the models of Hugging Face's transformers, unchanged: see docs/transformers.md."""
import torch
from transformers import AttentionInterface, Cache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from extras.branch import fork, truncate
from sentencekv import SentenceKV, need, sentence_flags

class SentenceCache(Cache):
    """generate()'s past_key_values. Stores what attention_mask shows. copy.deepcopy() forks it."""
    is_linear, is_croppable = [False], False
    def __init__(self, flags, **settings):
        super().__init__(layers=[])
        self.kv = SentenceKV(flags, **settings)
        self.decoder = None                                 # the model that filled the cache
        self.real = torch.zeros(0, 0, dtype=torch.bool)     # (B, slots); False: padding
        self.order = None           # (B, T): the new slots, padding last; None: no padding

    def get_seq_length(self, layer_idx=0):
        return self.real.shape[1]

    def begin(self, ids, mask):
        """ids (B, T), attention_mask (B, slots + T) or None: all ones -> positions (B, T)."""
        (B, T), slots = ids.shape, self.get_seq_length()
        mask = ids.new_ones(B, slots + T) if mask is None else mask
        need(mask.shape == (len(self.real) or B, slots + T), f"attention_mask {[*mask.shape]} does "
             f"not fit {slots} cached and {T} new tokens: pass the whole text, or use a new cache")
        shown, real = mask.bool().tensor_split((slots,), dim=1)
        if slots > 0 and not shown.equal(self.real):        # the end of a row is hidden from now on
            length = shown.sum(1, keepdim=True)
            need(shown.equal(self.real & (self.real.cumsum(1) <= length)), "attention_mask may "
                 "only hide the end of a cached row, and may not show padding again")
            truncate(self.kv, length.flatten().tolist())
        order = real.logical_not().byte().argsort(dim=1, stable=True)       # (B, T)
        positions = self.kv.begin(ids.masked_fill(~real, -1).gather(1, order))
        self.real = torch.cat((shown, real), dim=1)
        self.order = None if T == 1 or real.all() else order
        return torch.zeros_like(ids).scatter(1, order, positions).masked_fill(~real, 0)

    def update(self, k, v, layer, *args, **kwargs):
        need(self.kv.rows and layer == self.kv.next_layer, "call use_sentencekv(model) first")
        k.sentence_cache = self                             # attend() finds it there
        return k, v

    def __deepcopy__(self, memo):
        twin = SentenceCache([])
        vars(twin).update(vars(self), kv=fork(self.kv))
        return twin

    def __getstate__(self):             # for pickle: without the model
        return {**vars(self), "decoder": None}

    def unsupported(self, *args, **kwargs):
        raise ValueError("SentenceCache does not support beam search, assisted decoding, cropping")
    crop = reset = reorder_cache = batch_select_indices = activate_past_recording = unsupported

def attend(module, q, k, v, mask, scaling=None, sliding_window=None, **kwargs):
    """The attention function: q (B, Hq, T, d), k, v (B, H, T, d) -> (B, T, Hq, d), None."""
    cache, root = getattr(k, "sentence_cache", None), q.shape[-1] ** 0.5
    need(cache is not None, "pass past_key_values=SentenceCache(...), or undo_sentencekv(model)")
    for name in ("softcap", "s_aux", "head_mask", "position_bias"):
        need(kwargs.get(name) is None, f"SentenceKV does not support attention with {name}")
    need(mask is None and getattr(module, "is_causal", True), "SentenceKV needs causal attention")
    need(not sliding_window or cache.kv.length <= sliding_window, "the sliding window is too short")
    q = q * ((scaling or 1 / root) * root)                  # SentenceKV divides by the root
    if cache.order is None:
        return cache.kv.attend(module.layer_idx, q, k, v).transpose(1, 2), None
    order = cache.order[:, None, :, None]                   # (B, 1, T, 1)
    q, k, v = (x.gather(2, order.expand_as(x)) for x in (q, k, v))
    out = cache.kv.attend(module.layer_idx, q, k, v)        # (B, Hq, T, d), padding last
    return torch.zeros_like(out).scatter(2, order.expand_as(out), out).transpose(1, 2), None

def prepare(decoder, args, kwargs):
    """Give the cache the tokens, which no attention function sees, and the model the positions."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if isinstance(cache, SentenceCache):
        ids, mask = (*args, kwargs.get("input_ids"))[0], kwargs.get("attention_mask")
        need(ids is not None, "SentenceCache needs input_ids: inputs_embeds are unsupported")
        need(cache.decoder in (None, decoder), "this SentenceCache was filled by another model")
        need(not (decoder.training or torch.is_grad_enabled()), "use model.eval() and no_grad()")
        cache.decoder, given = decoder, kwargs.get("position_ids")
        positions = cache.begin(ids, mask)
        repeated = given is not None and given.max() < positions.max()
        need(not repeated, "these tokens are cached: pass the whole text and at least a new token")
        return args, {**kwargs, "position_ids": positions}

def use_sentencekv(model):
    """Let a model of transformers attend with a SentenceCache. Twice does no harm."""
    decoder, config, before = model.base_model, model.config, model.config._attn_implementation
    kinds = {"full_attention", "sliding_attention", *(getattr(config, "layer_types", None) or ())}
    AttentionInterface.register("sentencekv", attend)       # no mask has this name: none is made
    if len(kinds) == 2 and config.get_text_config() is config and not config.is_encoder_decoder:
        model.set_attn_implementation("sentencekv")
    need(config._attn_implementation == "sentencekv", f"{type(model).__name__} is unsupported: "
         "SentenceKV needs a decoder of text that uses AttentionInterface in all layers")
    if not hasattr(decoder, "sentencekv"):
        decoder.sentencekv = decoder.register_forward_pre_hook(prepare, with_kwargs=True), before

def undo_sentencekv(model):
    """Give the model its own attention back."""
    if hasattr(model.base_model, "sentencekv"):
        hook, before = vars(model.base_model).pop("sentencekv")
        hook.remove()
        model.set_attn_implementation(before)

def flags_of(tokenizer):
    """The flags of a tokenizer of transformers, byte-level or SentencePiece. Else ValueError."""
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    names = [name or "" for name in tokenizer.convert_ids_to_tokens(ids)]
    spell = {char: bytes([value]) for value, char in bytes_to_unicode().items()}
    if sum("▁" in name for name in names) > sum("Ġ" in name for name in names):
        spell = {"▁": b" ", **{f"<0x{n:02X}>": bytes([n]) for n in range(256)}}
    raw = [spell.get(name) or b"".join(spell.get(c, c.encode()) for c in name) for name in names]
    for i, token in tokenizer.added_tokens_decoder.items():
        raw[i] = None if token.special else token.content.encode()
    ids = tokenizer("It is so. Yes", add_special_tokens=False)["input_ids"]
    spelled = b"".join(raw[i] or b"" for i in ids).strip() == b"It is so. Yes"
    need(spelled, f"{type(tokenizer).__name__} is neither byte-level nor SentencePiece")
    return sentence_flags(raw)
