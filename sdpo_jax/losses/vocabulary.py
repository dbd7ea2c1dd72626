"""Logits and log-probabilities over the vocabulary, whole or cut over a mesh axis.

Under `jit` a sharded vocabulary needs nothing: the compiler adds the collectives. Inside a
`shard_map` that cuts the vocabulary, pass `vocabulary=Vocabulary("name of the mesh axis")`; each
device then holds `[..., V / n]` consecutive entries and these functions reduce over the devices.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_floating, check_integer, check_vocabulary, loss_dtype


@dataclass(frozen=True)
class Vocabulary:
    """How the last axis of logits, V, lies on the devices: whole, or cut over a mesh axis.

    A static value: hashable, no arrays. `Vocabulary("tensor")` is for code inside a `shard_map`
    that cuts V over the mesh axis "tensor".

    Source: the class names a layout; it holds for every equation of arXiv 2601.20802.

    >>> Vocabulary().sum(jnp.array([[1.0, 2.0]])).tolist()
    [3.0]
    """

    axis: str | None = None

    def sum(self, x: jax.Array) -> jax.Array:
        """Σ_v x, `[..., V] -> [...]`."""
        total = jnp.sum(x, axis=-1)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """max_v x, detached, `[..., V] -> [...]`."""
        largest = jnp.max(jax.lax.stop_gradient(x), axis=-1)
        return largest if self.axis is None else jax.lax.pmax(largest, self.axis)

    @property
    def shards(self) -> int:
        """How many devices share one vocabulary."""
        # The sum of a Python number is the size of the axis, in every version of jax.
        return 1 if self.axis is None else int(jax.lax.psum(1, self.axis))

    def offset(self, x: jax.Array) -> jax.Array:
        """The id of this device's first entry, of `x: [..., V]`; int32 []."""
        if self.axis is None:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(self.axis) * x.shape[-1]

    def gather(self, x: jax.Array) -> jax.Array:
        """`[..., K] -> [..., shards · K]`, the same on every device."""
        if self.axis is None:
            return x
        own = jnp.arange(self.shards, dtype=jnp.int32) == jax.lax.axis_index(self.axis)
        own = own.reshape((1,) * (x.ndim - 1) + (-1, 1))
        # A sum over devices, not `all_gather`, whose result counts as different on each device.
        spread = jax.lax.psum(jnp.where(own, x[..., None, :], jnp.zeros((), x.dtype)), self.axis)
        return spread.reshape(*x.shape[:-1], -1)


WHOLE = Vocabulary()
"""Every device holds all V entries of its rows, or the compiler sees to the collectives."""


def log_softmax(logits: jax.Array, *, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Return z - log Σ_v e^z over the last axis, in float32 or wider; [..., V] to [..., V].

    Source: section 1 of arXiv 2601.20802: policies are softmaxes of logits.

    >>> log_softmax(jnp.zeros(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    check_vocabulary(logits=logits)
    logits = logits.astype(loss_dtype(logits))
    shifted = logits - vocabulary.max(logits)[..., None]
    total = vocabulary.sum(jnp.exp(shifted))
    return shifted - jnp.log(total)[..., None]


def scale_logits(logits: jax.Array, *, temperature: float | jax.Array) -> jax.Array:
    """Return z / temperature: the logits of the distribution that the sampler draws from.

    Args:
        logits: [..., V], the head's products.
        temperature: that of the sampler, positive; may be traced.

    Returns:
        [..., V] in float32 or wider.

    Source: the SDPO code (arXiv 2601.20802).

    >>> scale_logits(jnp.array([3.0, 1.0]), temperature=2.0).tolist()
    [1.5, 0.5]
    """
    check_floating(logits=logits)
    logits = logits.astype(loss_dtype(logits))
    return logits / jnp.asarray(temperature, logits.dtype)


def trust_region_logits(
    reference_logits: jax.Array, live_logits: jax.Array, coefficient: float | jax.Array
) -> jax.Array:
    """(1 - c) · reference + c · live: the logits of q ∝ q_ref^(1-c) · q_live^c.

    The teacher held near the initial model; both read the teacher's prompt. With c = -a and a
    wrong sibling's context in place of the live model it is the contrastive target
    q_c^(1+a) · q_w^(-a) (RLCSD, arXiv 2606.11709).

    Args:
        reference_logits: [..., V], unnormalised, of the frozen initial model.
        live_logits: [..., V], unnormalised, of the current student.
        coefficient: c, may be traced; 0 is the reference, 1 the student.

    Returns:
        [..., V] in float32 or wider, unnormalised.

    Source: equation 10 of arXiv 2601.20802; 0.01 in the paper.

    >>> trust_region_logits(jnp.array([0.0, 4.0]), jnp.array([4.0, 0.0]), 0.25).tolist()
    [1.0, 3.0]
    """
    check_vocabulary(reference_logits=reference_logits, live_logits=live_logits)
    dtype = loss_dtype(reference_logits, live_logits)
    c = jnp.asarray(coefficient, dtype)
    # Whatever a factor of 0 meets stays out, -inf too: c = 0 and c = 1 are exact.
    reference = jnp.where(c == 1.0, 0.0, (1.0 - c) * reference_logits.astype(dtype))
    mixed = reference + jnp.where(c == 0.0, 0.0, c * live_logits.astype(dtype))
    # Impossible stays impossible: a negative factor would meet inf - inf.
    return jnp.where(jnp.isneginf(reference_logits) & (c != 1.0), -jnp.inf, mixed)


def select_targets(
    log_probs: jax.Array, targets: jax.Array, *, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """Return `log_probs[..., targets]`; [..., V] and integer [...] to [...].

    A comparison with a counter instead of a gather: it fuses into the softmax, and it stays local
    where the vocabulary is sharded. A target outside the vocabulary gives 0, so padding may hold
    any id.

    Source: log π_θ(y_t | x, y_<t) of arXiv 2601.20802, equation 2.

    >>> select_targets(jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([1, 0])).tolist()
    [-2.0, -3.0]
    """
    check_targets(log_probs, targets)
    targets = targets.astype(jnp.int32)  # uint8 would count to 255 and start again
    counter = jax.lax.broadcasted_iota(jnp.int32, log_probs.shape, log_probs.ndim - 1)
    counter = counter + vocabulary.offset(log_probs)
    zero = jnp.zeros((), log_probs.dtype)
    return vocabulary.sum(jnp.where(counter == targets[..., None], log_probs, zero))


def check_targets(log_probs: jax.Array, targets: jax.Array) -> None:
    """Raise unless `targets` are integers of the shape of `log_probs` without its last axis.

    >>> check_targets(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
    """
    check_integer(targets=targets)
    if log_probs.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of log_probs without its last axis, got targets "
            f"{list(targets.shape)} and log_probs {list(log_probs.shape)}"
        )


def top_k_indices(logits: jax.Array, *, k: int, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Ids of the k largest entries, largest first; of equal ones the smaller id. int32 [..., k].

    Logits and their log-probabilities have one order, so either may come. They are compared in the
    dtype that they come in: bfloat16 has many ties, and all of them go by id.

    Source: `distillation_topk` of the SDPO code (arXiv 2601.20802).

    >>> top_k_indices(jnp.array([1.0, 3.0, 3.0, 2.0]), k=2).tolist()
    [1, 2]
    """
    check_vocabulary(logits=logits)
    size = logits.shape[-1]
    whole = size * vocabulary.shards
    if not 1 <= k <= whole:
        raise ValueError(f"k must lie in [1, {whole}] (the vocabulary), got {k}")
    logits = jax.lax.stop_gradient(logits)
    # -0.0 and 0.0 are equal, which `top_k` does not know.
    logits = jnp.where(logits == 0, jnp.zeros((), logits.dtype), logits)
    values, ids = jax.lax.top_k(logits, min(k, size))
    if vocabulary.axis is None:
        return ids
    ids = ids + vocabulary.offset(logits)
    values, ids = vocabulary.gather(values), vocabulary.gather(ids)
    # Shards lie in the order of their ids, so ties still go to the smaller id.
    best = jax.lax.top_k(values, k)[1]
    return jnp.take_along_axis(ids, best, axis=-1)


def take_entries(x: jax.Array, indices: jax.Array, *, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Return `x[..., indices]`, [..., V] and integer [..., K] to [..., K].

    >>> take_entries(jnp.array([[5.0, 6.0, 7.0]]), jnp.array([[2, 0]])).tolist()
    [[7.0, 5.0]]
    """
    check_integer(indices=indices)
    if x.ndim != indices.ndim or x.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"indices must have the shape of the logits but for the last axis, got indices "
            f"{list(indices.shape)} and logits {list(x.shape)}"
        )
    if vocabulary.axis is None:
        return jnp.take_along_axis(x, indices, axis=-1)
    local = indices.astype(jnp.int32) - vocabulary.offset(x)
    mine = (local >= 0) & (local < x.shape[-1])
    found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
    return jax.lax.psum(jnp.where(mine, found, jnp.zeros((), x.dtype)), vocabulary.axis)
