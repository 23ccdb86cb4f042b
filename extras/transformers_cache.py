"""SentenceKV for the models of Hugging Face's transformers, unchanged: docs/transformers.md.

    use_sentencekv(model)
    cache = SentenceCache(flags_of(tokenizer), budget=1024)
    model.generate(**inputs, past_key_values=cache)     # the same cache again: a follow-up

generate() counts slots: B rows of equal length, in which attention_mask hides the padding. The
SentenceKV stores only what the mask shows, so that every row is as if it were alone.
"""
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from extras.branch import fork, truncate
from extras.zero_copy import best_pool
from sentencekv import SentenceKV, need, sentence_flags

NAME = "sentencekv"     # of the attention function; no mask function has this name: no mask is made

class SentenceCache(Cache):
    """What generate() takes as past_key_values. `kv` is its SentenceKV: memory(), fetched(), ...

    flags: flags_of(tokenizer); settings: see SentenceKV. copy.deepcopy() forks the cache.
    """
    is_linear, is_croppable = [False], False

    def __init__(self, flags, *, host_pool=None, **settings):
        super().__init__(layers=[])
        self.kv, self.host_pool = SentenceKV(flags, **settings), host_pool
        self.decoder = None     # the model that filled the cache
        self.real = None        # (B, slots) bool; False: padding
        self.order = None       # (B, T): the new slots, those with padding last; None: no padding

    def get_seq_length(self, layer_idx=0):
        return 0 if self.real is None else self.real.shape[1]

    def begin(self, ids, mask):
        """ids (B, T), attention mask (B, slots + T), or None if all are real -> positions (B, T)"""
        (B, T), slots = ids.shape, self.get_seq_length()
        mask = ids.new_ones(B, slots + T) if mask is None else mask
        if self.real is None:
            self.real = mask[:, :0].bool()
            self.kv.host_pool = self.host_pool or best_pool(ids.device)
        shape = (len(self.real), slots + T)
        need(mask.shape == shape, f"attention_mask must be {shape} for {slots} cached and {T} new "
             f"tokens, got {tuple(mask.shape)}: pass the whole conversation, or use a new cache")
        shown, real = mask.bool().tensor_split((slots,), dim=1)
        self.hide(shown)
        order = real.logical_not().byte().argsort(dim=1, stable=True)       # (B, T)
        positions = self.kv.begin(ids.masked_fill(~real, -1).gather(1, order))
        self.real = torch.cat((shown, real), dim=1)
        self.order = None if T == 1 or real.all() else order
        return torch.zeros_like(ids).scatter(1, order, positions).masked_fill(~real, 0)

    def hide(self, shown):
        """Forget the ends of rows that attention_mask no longer shows: shown (B, slots) bool."""
        need(not (shown & ~self.real).any(), "attention_mask shows padding that it hid before")
        length = shown.sum(1, keepdim=True)
        need(shown.equal(self.real & (self.real.cumsum(1) <= length)),
             "attention_mask hides cached tokens that are not at the end of their row")
        if not shown.equal(self.real):
            truncate(self.kv, length.flatten().tolist())

    def update(self, k, v, layer, *args, **kwargs):
        need(self.decoder is not None and self.kv.next_layer == layer, "SentenceCache needs "
             "use_sentencekv(model), and a model whose layers attend in order")
        k.sentence_cache = self         # attend() finds it there
        return k, v

    def __deepcopy__(self, memo):
        twin = SentenceCache([])
        vars(twin).update(vars(self), kv=fork(self.kv))
        return twin

    def unsupported(self, *args, **kwargs):
        raise ValueError("SentenceCache does not support beam search, assisted decoding, cropping")

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = unsupported
    activate_past_recording = unsupported

def attend(module, q, k, v, mask, scaling=None, sliding_window=None, **kwargs):
    """The attention function: q (B, Hq, T, d), k, v (B, H, T, d) -> (B, T, Hq, d), None."""
    cache, d = getattr(k, "sentence_cache", None), q.shape[-1]
    need(cache is not None, "pass past_key_values=SentenceCache(...), or undo_sentencekv(model)")
    names = ("softcap", "s_aux", "head_mask", "position_bias")
    extra = [name for name in names if kwargs.get(name) is not None]
    need(not extra and mask is None and getattr(module, "is_causal", True),
         f"SentenceKV supports plain causal attention, without {extra or 'another mask'}")
    need(not sliding_window or cache.kv.length <= sliding_window,
         f"the context is longer than the sliding window of {sliding_window} tokens")
    if scaling is not None and abs(scaling * d ** 0.5 - 1) > 1e-6:
        q = q * (scaling * d ** 0.5)                            # SentenceKV divides by sqrt(d)
    if cache.order is None:
        return cache.kv.attend(module.layer_idx, q, k, v).transpose(1, 2), None
    order = cache.order[:, None, :, None]                       # (B, 1, T, 1)
    right_padded = [x.gather(2, order.expand_as(x)) for x in (q, k, v)]
    out = cache.kv.attend(module.layer_idx, *right_padded)      # (B, Hq, T, d)
    return torch.zeros_like(out).scatter(2, order.expand_as(out), out).transpose(1, 2), None

def before_forward(decoder, args, kwargs):
    """Give the cache the tokens, which no attention function sees, and the model the positions."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if not isinstance(cache, SentenceCache):
        return
    ids, mask = (*args, kwargs.get("input_ids"))[0], kwargs.get("attention_mask")
    need(decoder.config._attn_implementation == NAME, "the attention function was changed: call "
         "undo_sentencekv(model), then use_sentencekv(model)")
    need(ids is not None, "SentenceCache needs input_ids: inputs_embeds are unsupported")
    need(mask is None or mask.ndim == 2, "SentenceCache needs an attention_mask (batch, tokens)")
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters())
    need(not learns and not decoder.training,
         "SentenceCache gives no gradients: use model.eval() and torch.no_grad()")
    need(cache.decoder in (None, decoder), "this SentenceCache was filled by another model")
    cache.decoder = decoder
    kwargs["position_ids"] = cache.begin(ids, mask)
    return args, kwargs

def use_sentencekv(model):
    """Prepare a model of transformers, a decoder of text, for SentenceCache. Twice does no harm."""
    decoder, config = model.base_model, model.config
    if hasattr(decoder, "sentencekv"):
        return
    kinds = {*(getattr(config, "layer_types", None) or ())}
    fits = config.get_text_config(decoder=True) is config and not config.is_encoder_decoder
    previous = config._attn_implementation
    AttentionInterface.register(NAME, attend)
    if fits and kinds <= {"full_attention", "sliding_attention"}:
        model.set_attn_implementation(NAME)
    need(config._attn_implementation == NAME, f"{type(model).__name__} is unsupported: SentenceKV "
         "needs a decoder of text that uses transformers' AttentionInterface in all layers")
    hook = decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
    decoder.sentencekv = (hook, previous)

def undo_sentencekv(model):
    """Give the model back its own attention function."""
    decoder = model.base_model
    if hasattr(decoder, "sentencekv"):
        hook, previous = decoder.sentencekv
        hook.remove()
        model.set_attn_implementation(previous)
        del decoder.sentencekv

def flags_of(tokenizer):
    """The flags of a tokenizer of transformers, byte-level or SentencePiece, for SentenceCache."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = tokenizer.added_tokens_decoder                      # {id: AddedToken}
    special = {*tokenizer.all_special_ids, *(i for i in added if added[i].special)}
    byte = {char: value for value, char in bytes_to_unicode().items()}
    spaces = [sum(space in name for name in names if name) for space in "Ġ▁"]

    def raw(i, name):
        if name is None or i in special:
            return None
        if i in added or (spaces[0] > spaces[1] and not byte.keys() >= {*name}):
            return name.encode()
        if spaces[0] > spaces[1]:
            return bytes(byte[char] for char in name)
        if name.startswith("<0x") and len(name) == 6:
            return bytes.fromhex(name[3:5])
        return name.replace("▁", " ").encode()

    flags = sentence_flags([raw(i, name) for i, name in enumerate(names)])
    text = "It is so. Yes"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    need(b"".join(flags[i] for i in ids).decode(errors="replace").strip() == text,
         f"{type(tokenizer).__name__} is neither a byte-level nor a SentencePiece tokenizer")
    return flags
