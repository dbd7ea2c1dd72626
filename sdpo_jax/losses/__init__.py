"""The mathematics: pure functions of arrays that need jax alone.

    vocabulary       log-softmax, targets, top-k ids; the vocabulary whole or cut over a mesh axis
    divergences      forward KL, reverse KL, generalised Jensen-Shannon
    support          distributions on k tokens and a bucket for the rest
    distillation     the SDPO loss, from logits: full vocabulary, top-k, sampled token
    credit           SDPO as a policy gradient: advantages per candidate, token or rollout
    token_stats      entropies, divergences and log-probabilities of both, for metrics and weights
    weights          importance, entropy, disagreement, pass rate, routes; masks
    policy_gradient  group advantages and the clipped surrogate of GRPO, and its variants
    likelihood       cross-entropy and the SFT loss
    reductions       (sum, weight), divided once
    fused_linear     any of these from hidden states, without ever holding all logits
    per_token        the losses as the `PerTokenLoss` functions that `fused_linear` takes
    reference_kl     KL penalty to a reference policy, for any per-token loss
    from_hidden      SDPO, GRPO and SFT from hidden states
    arrays           checks of shape and dtype, precision

A loss returns values per token; how tokens are averaged is another function. `docs/equations.md`
maps each equation to its function and its test.
"""
