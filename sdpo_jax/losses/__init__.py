"""The mathematics: pure functions of arrays that need jax alone.

    divergences      forward KL, reverse KL, generalised Jensen-Shannon
    distillation     the SDPO loss, from logits
    policy_gradient  group advantages and the clipped surrogate of GRPO
    likelihood       cross-entropy and the SFT loss
    reductions       (sum, weight), divided once
    chunked_head     any of these without ever holding all logits
    objectives       the per-token losses that the chunked head takes
    arrays           shape checks and precision

A loss returns values per token; how tokens are averaged is another function. `docs/equations.md`
maps each equation to its function and its test.
"""
