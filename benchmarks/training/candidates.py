"""Ways to set TRL up that `--tune` times, and the best of them. No imports: the parent process reads this too.

A name is `<layout>-<size>[+variant…]`. `padded-N` and `free-N` put N examples into a forward pass, with padding or laid
end to end; `packed-N` packs rows of N tokens. Variants: `sorted` (by length within a step), `eager` (attention),
`compile`, `precompute` (of the reference), `other_precision` (than the machine is said to be fast in), `compact` (no
option of TRL: as it does on a GPU, the vocabulary only where there is loss), `liger` (its kernels, on a GPU),
`recompute` (activations).
"""

# fmt: off
CANDIDATES = {
    "A": ["padded-2+sorted", "padded-4", "padded-4+sorted", "padded-8+sorted", "padded-16", "free-4", "free-16",
          "packed-512", "packed-1024", "padded-4+sorted+eager", "padded-4+sorted+compile",
          "padded-4+sorted+other_precision", "padded-4+sorted+compact"],
    "B": ["padded-1", "padded-2+sorted", "padded-4", "padded-4+sorted", "padded-8", "free-4", "free-8", "packed-1024",
          "packed-2048", "padded-1+other_precision", "padded-1+compact"],
    "C": ["padded-1", "padded-2", "padded-4", "free-4", "packed-1024", "padded-1+other_precision"],
    "dpo": ["padded-1", "padded-2+sorted", "padded-4", "padded-1+precompute", "padded-1+other_precision",
            "padded-1+compact"],
    "llama-2048": ["padded-1+liger", "padded-2+liger", "padded-4+liger", "padded-8+liger", "padded-4+recompute+liger"],
    "llama-8192": ["padded-1+liger", "padded-2+liger", "padded-2+recompute+liger"],
}
# fmt: on
# Timed on two machines of two cores, with and without fast bfloat16 (docs/measurements.md): small forward passes win,
# since on a CPU TRL 1.16 multiplies the vocabulary at every position, padding or not, and holds all the results.
BEST = {"A": "padded-4+sorted", "B": "padded-1", "C": "padded-1", "dpo": "padded-1"}
BEST |= {"llama-2048": "padded-2+liger", "llama-8192": "padded-1+liger"}  # not timed yet: no GPU was at hand
