"""float64 agreement with `reference`: values within 1e-12, gradients within 1e-9, over a grid.

alpha x support x weights x reduction, from logits and from hidden states in several chunks; then
the losses without an alpha. The worst error is printed (`pytest -s`).
"""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax_versions import from_logits

from sdpo_jax.losses.distillation import sampled_token_loss, top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.likelihood import cross_entropy
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.policy_gradient import policy_gradient_loss
from sdpo_jax.losses.reductions import (
    fixed_length_mean,
    fixed_length_mean_weights,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
    weighted,
)
from sdpo_jax.losses.vocabulary import log_softmax, select_targets
from sdpo_jax.losses.weights import truncated_importance_weights

B, T, V, D = 3, 3, 7, 4
CAP, SMOOTHING, TEMPERATURE = 1.5, 0.1, 1.3
LENGTH = 5
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
VALUE, GRADIENT = 1e-12, 1e-9
# Each case is compiled once and run a few times: what counts is the compiler's time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SUPPORTS = {
    "full": {},
    "top_3_tail": {"k": 3, "add_tail": True},
    "top_3_renormalised": {"k": 3, "add_tail": False},
}
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]
REDUCTIONS = {
    "token_mean": (token_mean, token_mean_weights, reference.token_mean),
    "sequence_mean": (sequence_mean, sequence_mean_weights, reference.sequence_mean),
    "fixed_length_mean": (
        partial(fixed_length_mean, length=LENGTH),
        partial(fixed_length_mean_weights, length=LENGTH),
        partial(reference.fixed_length_mean, length=LENGTH),
    ),
}
WORST: dict[float, float] = {}
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
GRID = [*product(SUPPORTS, ALPHAS), ("sampled", 1.0), ("grpo", 1.0), ("sft", 1.0)]
grid = pytest.mark.parametrize("support, alpha", GRID)


@cache
def numbers():
    """Hidden states of both and what was sampled; logits are products of hidden and head."""
    random = np.random.default_rng(0)
    hidden, teacher_hidden = 1.5 * random.normal(size=(2, B, T, D))
    head, teacher_head = random.normal(size=(2, D, V))
    targets = random.integers(0, V, size=(B, T))
    log_probs = reference.pick(reference.log_softmax(hidden @ head / TEMPERATURE), targets)
    # Ratios on both sides of the cap and of every clip.
    old = log_probs + np.linspace(-1.4, 0.9, B * T).reshape(B, T)
    advantages = np.array([1.0, -1.0, 0.5])[:, None] * np.array([1.0, -0.7, -1.3])
    return hidden, head, teacher_hidden, teacher_head, targets, log_probs, old, advantages


@pytest.fixture(scope="module", autouse=True)
def worst():
    yield
    print(f"worst error of a value {WORST.get(VALUE)}, of a gradient {WORST.get(GRADIENT)}")


def expected_per_token(support, alpha, student, teacher, weights_on):
    """[B, T] of `reference`, from logits."""
    _, _, _, _, targets, _, old, advantages = numbers()
    log_probs = reference.pick(reference.log_softmax(student), targets)
    weights = reference.importance(log_probs, old, CAP) if weights_on else 1.0
    if support == "grpo":
        return weights * reference.surrogate(log_probs, old, advantages)
    if support == "sft":
        return weights * reference.cross_entropy(student, targets, SMOOTHING)
    if support == "sampled":
        return weights * reference.sampled_token(student, teacher, targets)
    return weights * reference.distillation(student, teacher, alpha, **SUPPORTS[support])


def per_token(support, alpha, student, teacher):
    """[B, T] of the library, from logits."""
    _, _, _, _, targets, _, old, advantages = map(jnp.array, numbers())
    student_log_prob, teacher_log_prob = (
        select_targets(log_softmax(x), targets) for x in (student, teacher)
    )
    if support == "grpo":
        return policy_gradient_loss(student_log_prob, old, advantages, **CLIPS)
    if support == "sft":
        return cross_entropy(student, targets, label_smoothing=SMOOTHING)
    if support == "sampled":
        return sampled_token_loss(student_log_prob, teacher_log_prob)
    loss = top_k_loss if "k" in SUPPORTS[support] else generalized_jsd
    return from_logits(loss, student, teacher, alpha=alpha, **SUPPORTS[support])


def means(support, alpha, student, teacher):
    """The library's mean for each reduction, with weights and without."""
    loss, mask = per_token(support, alpha, student, teacher), jnp.array(MASK)
    targets, old = (jnp.array(numbers()[i]) for i in (4, 6))
    log_probs = select_targets(log_softmax(student), targets)
    weights = {True: truncated_importance_weights(log_probs, old, cap=CAP), False: None}
    return {
        (name, on): reduce(weighted(loss, weights[on], mask), mask).mean()
        for (name, (reduce, _, _)), on in product(REDUCTIONS.items(), weights)
    }


def assert_agrees(name, got, want, tolerance):
    scale = max(1.0, float(np.max(np.abs(want))))
    error = float(np.max(np.abs(np.asarray(got) - want))) / scale
    WORST[tolerance] = max(WORST.get(tolerance, 0.0), error)
    assert error <= tolerance, f"{name}: off by {error:.1e}, allowed {tolerance:.0e}"


@grid
def test_the_losses_from_logits_are_the_formulas(x64, support, alpha):
    hidden, head, teacher_hidden, teacher_head, *_ = numbers()
    student, teacher = (x / TEMPERATURE for x in (hidden @ head, teacher_hidden @ teacher_head))

    def value(x):
        return means(support, alpha, x, jnp.array(teacher))

    @jit
    def compute(x):
        return value(x), jax.jacrev(value)(x)

    values, gradients = compute(jnp.array(student))
    for name, on in values:

        def expected(x, name=name, on=on):
            loss = expected_per_token(support, alpha, x, teacher, on)
            return REDUCTIONS[name][2](loss, MASK)

        case = f"{name}, weights {on}"
        assert values[name, on].dtype == jnp.float64
        assert_agrees(case, values[name, on], expected(student), VALUE)
        want = reference.gradient(expected, student)
        assert_agrees(case, gradients[name, on], want, GRADIENT)
        assert np.max(np.abs(want)) > 1e-3  # the grid asks for something
    if support in SUPPORTS:  # values of others are no primitives of their gradients
        assert_slope(lambda x: compute(x)[0], gradients, student)


def assert_slope(means, gradients, at):
    """Central differences of the library's own values: 1e-12 of truncation, 1e-10 of rounding."""
    direction, step = np.random.default_rng(1).normal(size=at.shape), 1e-6
    above, below = (means(jnp.array(at + sign * step * direction)) for sign in (1, -1))
    for name in REDUCTIONS:
        slope = (above[name, False] - below[name, False]) / (2 * step)
        along = np.vdot(gradients[name, False], direction)
        np.testing.assert_allclose(slope, along, rtol=1e-7, atol=1e-9)


def head_problem(support, alpha):
    """The objective for the chunked head, its tokens and its constants."""
    _, _, teacher_hidden, teacher_head, targets, _, old, advantages = map(jnp.array, numbers())

    def flat(x):
        return x.reshape(B * T, *x.shape[2:])

    temperature = jnp.array(TEMPERATURE)
    if support == "grpo":
        tokens = GrpoTokenInputs(flat(targets), flat(old), flat(advantages))
        return grpo_per_token(**CLIPS), tokens, GrpoSharedInputs(temperature)
    if support == "sft":
        return sft_per_token(label_smoothing=SMOOTHING), SftTokenInputs(flat(targets)), None
    tokens = SdpoTokenInputs(flat(teacher_hidden), flat(targets), flat(old))
    constants = SdpoSharedInputs(teacher_head, temperature)
    if support == "sampled":
        return sampled_token_sdpo(importance_cap=CAP), tokens, constants
    loss = top_k_loss if "k" in SUPPORTS[support] else generalized_jsd
    divergence = partial(loss, alpha=alpha, **SUPPORTS[support])
    return sdpo_per_token(divergence, importance_cap=CAP), tokens, constants


@grid
def test_the_losses_from_hidden_states_are_the_formulas(x64, support, alpha):
    """Nine tokens in three chunks. Without weights means on-policy: ratios of exactly one."""
    hidden, head, teacher_hidden, teacher_head, _, log_probs, _, _ = numbers()
    teacher = teacher_hidden @ teacher_head / TEMPERATURE
    loss, tokens, constants = head_problem(support, alpha)
    temperature = 1.0 if support == "sft" else TEMPERATURE
    weigh = support not in ("grpo", "sft")  # these have no weight of their own

    @jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def compute(hidden, head, tokens, weights):
        return fused_linear_loss(loss, hidden, head, tokens, weights, chunk=4, constants=constants)[
            0
        ]

    on_policy = jnp.array(log_probs.reshape(-1))
    for name, on in product(REDUCTIONS, (True, False) if weigh else (False,)):
        weights, denominator = REDUCTIONS[name][1](MASK.astype(np.float64))
        moved = tokens if on or not weigh else tokens._replace(old_log_probs=on_policy)
        flat = jnp.array(hidden.reshape(B * T, D))
        scaled = (weights / denominator).reshape(-1)
        got, gradients = compute(flat, jnp.array(head), moved, scaled)

        def expected(hidden, head, name=name, on=on):
            student = hidden.reshape(B, T, D) @ head / temperature
            loss = expected_per_token(support, alpha, student, teacher, on)
            return REDUCTIONS[name][2](loss, MASK)

        case = f"{name}, weights {on}"
        assert_agrees(case, got, expected(hidden, head), VALUE)
        by_hidden = reference.gradient(lambda x: expected(x, head), hidden)
        by_head = reference.gradient(lambda x: expected(hidden, x), head)
        assert_agrees(case, gradients[0], by_hidden.reshape(B * T, D), GRADIENT)
        assert_agrees(case, gradients[1], by_head, GRADIENT)
