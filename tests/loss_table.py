"""Values and gradients of every estimator on eight pairs of logits, for the laws of the losses.

`compute_outcome` computes every estimator once per transform and dtype: called plainly, jitted,
mapped row by row, with rows cut over eight devices, and with the vocabulary cut too.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax_versions import HAS_SHARD_MAP, auto_mesh, enable_x64
from jax_versions import quick_jit as jit

from sdpo_jax.losses.credit import candidate_loss, distillation_advantages
from sdpo_jax.losses.distillation import sampled_token_loss, top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, log_softmax

# The table: eight pairs of logits that bfloat16 holds exactly, without ties.

ALPHAS = [0.0, 0.3, 0.5, 1.0]
LADDER = np.array([-2.5, -1.75, -1.125, -0.5, 0.25, 0.875, 1.5, 2.25])
PERMUTATION = np.random.default_rng(2).permutation(8)
PAIR, SWAPPED, SAME, SAME_SHIFTED, PERMUTED, SHIFTED, DISJOINT, FAR = range(8)


def pairs():
    random = np.random.default_rng(1)
    s, t = random.permutation(LADDER), random.permutation(1.5 * LADDER)
    far = np.repeat([8.0, -8.0], 4) + LADDER
    rows = {
        PAIR: (s, t),
        SWAPPED: (t, s),
        SAME: (s, s),
        SAME_SHIFTED: (s, s + 5.0),
        PERMUTED: (s[PERMUTATION], t[PERMUTATION]),
        SHIFTED: (s + 3.0, t - 2.0),
        DISJOINT: (LADDER, LADDER[::-1]),
        FAR: (far, far[::-1]),
    }
    student, teacher = zip(*(rows[i] for i in range(8)), strict=True)
    return np.array(student), np.array(teacher)


def full(alpha):
    def loss(s, t, vocabulary):
        s, t = (log_softmax(x, vocabulary=vocabulary) for x in (s, t))
        return generalized_jsd(s, t, alpha=alpha, vocabulary=vocabulary)

    return loss


def top(k, add_tail, alpha):
    def loss(s, t, vocabulary):
        s, t = (log_softmax(x, vocabulary=vocabulary) for x in (s, t))
        return top_k_loss(s, t, alpha=alpha, k=k, add_tail=add_tail, vocabulary=vocabulary)

    return loss


def sampled_average(s, t, vocabulary):
    """Σ_y sg π(y) · sampled_token_loss(y): the expectation over the sampled token."""
    s, t = (log_softmax(x, vocabulary=vocabulary) for x in (s, t))
    return vocabulary.sum(jax.lax.stop_gradient(jnp.exp(s)) * sampled_token_loss(s, t))


def candidates(s, t, vocabulary):
    s, t = (log_softmax(x, vocabulary=vocabulary) for x in (s, t))
    return candidate_loss(s, distillation_advantages(s, t), vocabulary=vocabulary)


DIVERGENCES = {
    **{f"full {a}": (full(a), {"alpha": a}) for a in ALPHAS},
    **{
        f"top 3 {kind} {a}": (top(3, tail, a), {"alpha": a, "k": 3, "add_tail": tail})
        for kind, tail in [("tail", True), ("renormalised", False)]
        for a in ALPHAS
    },
    "top 1 renormalised": (top(1, False, 0.5), {"alpha": 0.5, "k": 1, "add_tail": False}),
    "top 7 tail": (top(7, True, 0.5), {"alpha": 0.5, "k": 7}),
    "top 8 tail": (top(8, True, 1.0), {"alpha": 1.0, "k": 8}),
}
LOSSES = {
    **{name: loss for name, (loss, _) in DIVERGENCES.items()},
    "sampled": sampled_average,
    "candidates": candidates,
}


class Outcome(NamedTuple):
    values: dict[str, np.ndarray]  # [8]
    gradients: dict[str, np.ndarray]  # [8, V], by the student's logits
    teacher_gradients: dict[str, np.ndarray]
    tolerance: float
    gradient_tolerance: float


def pull(loss, s, t):
    values, back = jax.vjp(loss, s, t)
    return values, *back(jnp.ones_like(values))


def sharded(axes, specs, axis, loss):
    mesh = auto_mesh(tuple(axes.values()), tuple(axes))
    return jax.shard_map(
        partial(loss, vocabulary=Vocabulary(axis)),
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=P("data"),
    )


TRANSFORMS = {
    "plain": lambda pulls: pulls(lambda loss: partial(loss, vocabulary=WHOLE)),
    "jit": lambda pulls: jit(pulls(lambda loss: partial(loss, vocabulary=WHOLE))),
    "vmap": lambda pulls: jit(jax.vmap(pulls(lambda loss: partial(loss, vocabulary=WHOLE)))),
    "rows": lambda pulls: jit(pulls(partial(sharded, {"data": 8}, P("data"), None))),
    "vocabulary": lambda pulls: jit(
        pulls(partial(sharded, {"data": 2, "tensor": 4}, P("data", "tensor"), "tensor"))
    ),
}


@cache
def compute_outcome(transform, dtype):
    def pulls(place):
        return lambda s, t: {name: pull(place(loss), s, t) for name, loss in LOSSES.items()}

    with enable_x64(dtype == "float64"):
        s, t = (jnp.array(x, dtype) for x in pairs())
        table = jax.tree.map(np.float64, TRANSFORMS[transform](pulls)(s, t))
    columns = [{name: row[i] for name, row in table.items()} for i in range(3)]
    # bfloat16 rounds gradients once, when they leave: half of 2^-8.
    # Log-ratios of up to 20 round to 2e-6, and far from it such gaps cancel.
    tolerance = 1e-13 if dtype == "float64" else 5e-6
    return Outcome(*columns, tolerance, 2.0**-8 if dtype == "bfloat16" else tolerance)


CONFORMANCE = [
    *((name, "float32") for name in ("plain", "jit", "vmap")),
    *(("jit", dtype) for dtype in ("bfloat16", "float64")),
    *([("rows", "float32"), ("vocabulary", "float32")] if HAS_SHARD_MAP else []),
    *([("vocabulary", "float64")] if HAS_SHARD_MAP else []),
]
