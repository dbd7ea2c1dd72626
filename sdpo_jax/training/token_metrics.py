"""Token metrics: means, and those that are no means.

    divergence_histogram   [BINS]  number of tokens by the size of their divergence
    divergence_by_token    [V]     summed divergence of all tokens with an id
    gap_agreement          [4]     rollouts whose sum of log q(y_t) - log p(y_t) fits their outcome

They add up over micro-batches and shards of the rows as every metric does; quantiles and largest
entries are read off the sums of an update. In reports of collapse the divergence is concentrated on
a few kinds of tokens before accuracy falls (StableSDPO, arXiv 2607.01763); a teacher whose sign
opposes the outcome unlearns what is right (RLSD).

Only tokens that are distilled count, and rollouts by those of their tokens. Validated against numpy
(tests/test_token_metrics.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HISTOGRAM, BY_TOKEN, AGREEMENT = "divergence_histogram", "divergence_by_token", "gap_agreement"

SAMPLED = ("log_prob", "student_entropy")
"""Metrics of the sampled token, which every loss has."""
PAIRS = ("teacher_entropy", "forward_kl", "reverse_kl", "jsd", "teacher_log_prob", "same_token")
"""Metrics that compare student and teacher."""
SPREAD = (HISTOGRAM, BY_TOKEN)
"""Metrics of a divergence, which is nowhere negative; the sampled token's estimate may be."""

_DISTILLED: tuple[str, ...] = ("divergence", "weight", *PAIRS)
_POLICY_GRADIENT: tuple[str, ...] = ("clipped",)

BINS = 256
LOWEST = -24
"""log2 of the smallest divergence above bin 0; the last bin reaches 2^7.875, 235 nats."""
PER_OCTAVE = 8
"""A bin is 9 % wide, and a quantile, read at its middle, within 4.5 % of the exact one."""
MOST = 20


class Tokens(NamedTuple):
    """The tokens of a micro-batch, for the sums."""

    metrics: Mapping[str, jax.Array]  # by-products of the loss, [M] each
    active: jax.Array  # [M] bool
    targets: jax.Array  # [M] integer
    outcomes: jax.Array | None  # [D, n, c] int32 of M = D n c, see `MicroBatch`
    vocabulary: int

    @property
    def distilled(self) -> jax.Array:
        """[M] bool; a mix has tokens with the policy gradient alone."""
        first = self.metrics.get("first_active")
        return self.active if first is None else self.active & (first > 0)


def _histogram(tokens: Tokens) -> jax.Array:
    """[BINS]: bin 0 has what is below 2^LOWEST, and NaN."""
    divergence = jnp.maximum(tokens.metrics["divergence"], 2.0 ** (LOWEST - 1))
    place = 1.0 + jnp.floor(PER_OCTAVE * (jnp.log2(divergence) - LOWEST))
    place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    return jax.ops.segment_sum(tokens.distilled.astype(jnp.float32), place, BINS)


def _by_token(tokens: Tokens) -> jax.Array:
    """[V]: a scatter of M numbers, whatever V is."""
    divergence = jnp.where(tokens.distilled, tokens.metrics["divergence"], 0.0)
    return jax.ops.segment_sum(divergence, tokens.targets, tokens.vocabulary)


def _agreement(tokens: Tokens) -> jax.Array:
    """[4]: successes with a positive sum, successes, failures with a negative one, failures."""
    if tokens.outcomes is None:
        raise ValueError(f"{AGREEMENT} needs the micro-batch's outcomes, got None")
    outcomes = tokens.outcomes.reshape(len(tokens.outcomes), -1)  # [D, M / D]
    there = tokens.distilled.reshape(outcomes.shape)
    gap = tokens.metrics["teacher_log_prob"] - tokens.metrics["log_prob"]
    # A rollout lies in one shard of one micro-batch; place 0 is padding, whose outcome is 0.
    of_rollouts = jax.vmap(partial(jax.ops.segment_sum, num_segments=outcomes.shape[1] + 1))
    told = jnp.stack([gap.reshape(outcomes.shape), jnp.sign(outcomes).astype(gap.dtype)], axis=-1)
    sums = of_rollouts(jnp.where(there[..., None], told, 0.0), jnp.abs(outcomes))
    gaps, passed, failed = sums[..., 0], sums[..., 1] > 0, sums[..., 1] < 0
    counts = [passed & (gaps > 0), passed, failed & (gaps < 0), failed]
    return jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in counts])


_SUMS = {HISTOGRAM: _histogram, BY_TOKEN: _by_token, AGREEMENT: _agreement}


def is_mean(name: str) -> bool:
    """Whether a metric is one number of each token."""
    return name not in _SUMS


def zeros(names: Sequence[str], vocabulary: int) -> dict[str, jax.Array]:
    """The sums of an update before its first micro-batch."""
    sizes = {HISTOGRAM: (BINS,), BY_TOKEN: (vocabulary,), AGREEMENT: (4,)}
    return {name: jnp.zeros(sizes.get(name, ()), jnp.float32) for name in names}


def add_up(names: Sequence[str], tokens: Tokens) -> dict[str, jax.Array]:
    """The sums of a micro-batch; of a mean over all active tokens."""
    active, metrics = tokens.active, tokens.metrics
    return {
        name: jnp.sum(jnp.where(active, metrics[name], 0.0))
        if is_mean(name)
        else _SUMS[name](tokens)
        for name in names
    }


def condense(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of an update, on the device: in the place of `[V]` the sum of its largest entries, `[]`."""
    if BY_TOKEN not in sums:
        return dict(sums)
    by_token = sums[BY_TOKEN]
    most = jax.lax.top_k(by_token, min(MOST, len(by_token)))[0]
    return {**sums, BY_TOKEN: jnp.sum(most)}


def read(sums: Mapping[str, Any]) -> dict[str, float]:
    """What a step reports of condensed sums, which may be those of several updates, added.

    Returns:
      `divergence_p99`; `divergence_top20_tokens`, the share of each update's largest, weighed by
      their divergence; `gap_agreement/success`, `gap_agreement/failure`. None of what has no tokens
      or no rollouts.
    """
    found: dict[str, float] = {}
    if HISTOGRAM in sums and np.sum(sums[HISTOGRAM]) > 0:
        found["divergence_p99"] = quantile(np.asarray(sums[HISTOGRAM]), 0.99)
    if BY_TOKEN in sums and sums["divergence"] > 0:
        found["divergence_top20_tokens"] = float(sums[BY_TOKEN] / sums["divergence"])
    return found | agreement_shares(sums[AGREEMENT] if AGREEMENT in sums else np.zeros(4))


def quantile(histogram: Any, share: float) -> float:
    """The middle of the bin that holds it, by ratio; 0 for the lowest bin.

    >>> counts = np.zeros(BINS)
    >>> counts[1 + PER_OCTAVE * -LOWEST] = 1.0
    >>> print(f"{quantile(counts, 0.99):.3f}")
    1.044
    """
    reached = np.cumsum(histogram)
    place = int(np.searchsorted(reached, share * reached[-1]))
    return 2.0 ** (LOWEST + (place - 0.5) / PER_OCTAVE) if place else 0.0


def agreement_shares(counts: Any) -> dict[str, float]:
    """Of the four counts of `gap_agreement`; a share of no rollouts is left out."""
    agreeing, all_of = np.asarray(counts, np.float64).reshape(2, 2).T
    names = ("gap_agreement/success", "gap_agreement/failure")
    return {n: float(a / b) for n, a, b in zip(names, agreeing, all_of, strict=True) if b > 0}


def means(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Means of metrics over the tokens at which each is defined.

    In a mix of two losses, metrics of the distillation are means over the distilled tokens, those
    of the policy gradient over its own; `distilled` and `policy_gradient` are the shares of tokens.
    """
    if "first_active" not in sums:
        return {name: total / tokens for name, total in sums.items()}
    counts: dict[str, float] = dict.fromkeys(_DISTILLED, max(1.0, sums["first_active"]))
    counts |= dict.fromkeys(_POLICY_GRADIENT, max(1.0, sums["second_active"]))
    row = {name: total / counts.get(name, tokens) for name, total in sums.items()}
    row["distilled"], row["policy_gradient"] = row.pop("first_active"), row.pop("second_active")
    return row
