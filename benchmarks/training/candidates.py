"""Ways to set TRL up that `--tune` times, and the best of them. No imports: the parent process reads this too.

A name is `<layout>-<size>[+variant…]`. `padded-N` and `free-N` put N examples into a forward pass, with padding or laid
end to end; `packed-N` packs rows of N tokens. Variants: `sorted` (by length within a step), `eager` (attention),
`compile`, `precompute` (of the reference), `other_precision` (than the machine is said to be fast in), `compact` (no
option of TRL: as it does on a GPU, the vocabulary only where there is loss).
"""

# fmt: off
CANDIDATES = {
    "A": ["padded-4", "padded-4+sorted", "padded-8", "padded-16", "free-8", "free-16", "packed-1024", "packed-512",
          "padded-16+eager", "free-16+compile", "free-16+other_precision", "free-16+compact"],
    "B": ["padded-2+sorted", "padded-4", "padded-4+sorted", "padded-8", "free-4", "free-8", "packed-1024",
          "packed-2048", "free-8+other_precision", "free-8+compact"],
    "C": ["padded-1", "padded-2", "padded-4", "free-4", "packed-1024", "padded-1+other_precision"],
    "dpo": ["padded-1", "padded-2", "padded-4", "padded-4+precompute", "padded-2+precompute",
            "padded-4+other_precision", "padded-4+compact"],
}
# fmt: on
BEST = {"A": "free-16", "B": "free-8", "C": "padded-4", "dpo": "padded-4"}
