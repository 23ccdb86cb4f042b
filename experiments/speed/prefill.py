"""The time of a prompt: what SentenceKV adds to the prefill of a model with the dense cache.

    python -m experiments.speed.prefill             4K and 8K tokens, Llama-3.2-1B's shape

The model has random weights and only two layers, because all layers are alike. All
variants take turns; figures are medians with the quartiles in brackets. The overhead is computed
round by round.
"""
from experiments.speed import command
from experiments.speed.clock import Variant, interleaved, summary
from experiments.speed.filled import made_up_flags, made_up_tokens, random_model, variants
from experiments.speed.parts import parts_of
from experiments.svg import short
from extras.zero_copy import best_pool
from model import DenseKV
from sentencekv import SentenceKV

LAYERS = 2

def prompts(model, n, options):
    """{name: Variant} that computes a prompt of n tokens."""
    V, device = model.config.vocab_size, model.embed_tokens.weight.device
    tokens = made_up_tokens(n, vocabulary=V).to(device)
    flags, pool = made_up_flags(V), best_pool(device)
    found = {"dense": Variant(lambda: model.prefill(tokens, DenseKV()))}

    def add(name, settings):
        new_cache = lambda: SentenceKV(flags, host_pool=pool, **settings)
        found[name] = Variant(lambda: model.prefill(tokens, new_cache()))

    for name, settings in variants(options.budget, options.variants).items():
        add(name, settings)
    return found

def measure(options, report):
    model = random_model(options.shape, options.device, num_hidden_layers=LAYERS)
    for n in options.lengths:
        print(f"\nprefill of {short(n)} tokens, {options.shape} with {LAYERS} layers", flush=True)
        found = prompts(model, n, options)
        times, _ = interleaved(found, options.rounds, options.device, warm=1)
        for name, t in times.items():
            over = summary([100 * (a / b - 1) for a, b in zip(t, times["dense"])])
            note = f"{over['ms']:+6.1f}% ({over['low']:+.1f} to {over['high']:+.1f}) over dense"
            report.add(n, name, t, note, overhead_percent=over["ms"])
        for name in found if options.parts else []:
            report.parts(n, name, *parts_of(found[name].step, options.device, steps=1))

def main(argv=None):
    """The command; argv: its arguments. Returns the exit status."""
    return command.run(measure, argv, __doc__, shape="llama-3.2-1b", lengths="4K,8K", rounds=5,
                       quick=dict(shape="tiny", lengths="1K", rounds=2))

if __name__ == "__main__":
    raise SystemExit(main())
