"""How the divergence is spread, and whether it takes sides, against numpy: alone, in an update."""

import jax
import jax.numpy as jnp
import numpy as np
import one_update
import pytest
import tiny
from one_update import ALPHA, ARCHITECTURE, GROUP, SIGNAL, TEMPERATURE, TOKENIZER

from sdpo_jax.environments.base import Outcome, not_graded
from sdpo_jax.objectives import GrpoConfig, SdftConfig, SdpoConfig, make_objective
from sdpo_jax.rollouts.diagnostics import gap_agreement, outcome_signs
from sdpo_jax.training.token_metrics import (
    AGREEMENT,
    BINS,
    BY_TOKEN,
    HISTOGRAM,
    LOWEST,
    MOST,
    PER_OCTAVE,
    Tokens,
    add_up,
    condense,
    quantile,
    read,
    zeros,
)

NAMES = ("divergence", HISTOGRAM, BY_TOKEN, AGREEMENT)
M, VOCABULARY = 480, 61
WIDTH = 2.0 ** (0.5 / PER_OCTAVE) * (1 + 1e-6)
"""Of half a bin, by ratio."""


def tokens(mixed=False):
    """Two shards of rollouts of six tokens each; a third of the tokens is not active."""
    random = np.random.default_rng(0)
    numbers = np.tile(np.repeat(np.arange(1, M // 12 + 1), 6), 2)
    signs = np.repeat(random.integers(-1, 2, M // 6), 6)
    metrics = {
        "divergence": np.exp(random.normal(-5, 2, M)),
        "log_prob": random.normal(-2, 1, M),
        "teacher_log_prob": random.normal(-2, 1, M),
    }
    if mixed:
        metrics["first_active"] = random.integers(0, 2, M)
    return Tokens(
        {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()},
        jnp.asarray(random.integers(0, 3, M) > 0),
        jnp.asarray(random.integers(0, VOCABULARY, M), jnp.int32),
        jnp.asarray((numbers * signs).reshape(2, 5, -1), jnp.int32),
        VOCABULARY,
    )


def exact(given):
    """Quantile, share and agreement, one token and one rollout at a time."""
    metrics = {name: np.asarray(x, np.float64) for name, x in given.metrics.items()}
    there = np.asarray(given.active) & (metrics.get("first_active", np.ones(M)) > 0)
    divergence, targets = metrics["divergence"][there], np.asarray(given.targets)[there]
    of_ids = sorted((divergence[targets == i].sum() for i in range(VOCABULARY)), reverse=True)
    ended = {1: [], -1: []}
    for rollout in np.arange(M).reshape(-1, 6):
        sign = int(np.sign(np.asarray(given.outcomes).reshape(-1)[rollout[0]]))
        kept = rollout[there[rollout]]
        if sign and len(kept):
            gap = np.sum((metrics["teacher_log_prob"] - metrics["log_prob"])[kept])
            ended[sign].append(gap * sign > 0)
    return (
        np.percentile(divergence, 99, method="inverted_cdf"),
        sum(of_ids[:MOST]) / divergence.sum(),
        np.mean(ended[1]),
        np.mean(ended[-1]),
    )


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
def test_spread_and_agreement_are_those_of_numpy(mixed):
    given = tokens(mixed)
    sums = jax.jit(lambda metrics: condense(add_up(NAMES, given._replace(metrics=metrics))))
    found = jax.device_get(sums(given.metrics))
    if mixed:  # the loss has 0 there
        first = np.asarray(given.metrics["first_active"])
        known = np.asarray(given.active) * first * np.asarray(given.metrics["divergence"])
        found["divergence"] = np.sum(known)
    assert {name: np.shape(x) for name, x in found.items()} == {
        **{"divergence": (), BY_TOKEN: ()},
        **{HISTOGRAM: (BINS,), AGREEMENT: (4,)},
    }
    p99, share, success, failure = exact(given)
    got = read(found)
    assert p99 / WIDTH <= got["divergence_p99"] <= p99 * WIDTH
    assert 0.1 < share < 0.99
    assert got["divergence_top20_tokens"] == pytest.approx(share, rel=1e-5)
    assert got["gap_agreement/success"] == pytest.approx(success)
    assert got["gap_agreement/failure"] == pytest.approx(failure)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_quantile_is_within_half_a_bin_over_the_whole_range(share):
    values = np.float32(2.0 ** np.random.default_rng(1).uniform(LOWEST, LOWEST + 31.8, 3000))
    for few in (values, values[values < 1e-3]):
        count = len(few)
        given = Tokens({"divergence": jnp.asarray(few)}, jnp.ones(count, bool), few, None, 1)
        histogram = np.asarray(add_up([HISTOGRAM], given)[HISTOGRAM])
        assert histogram.sum() == count
        want = np.percentile(few, 100 * share, method="inverted_cdf")
        assert want / WIDTH <= quantile(histogram, share) <= want * WIDTH


def test_what_is_outside_the_bins_is_counted_at_their_ends():
    values = jnp.array([0.0, 1e-12, jnp.nan, 1e4, jnp.inf])
    given = Tokens({"divergence": values}, jnp.ones(5, bool), values, None, 1)
    histogram = np.asarray(add_up([HISTOGRAM], given)[HISTOGRAM])
    assert histogram[0] == 3 and histogram[-1] == 2 and histogram.sum() == 5
    assert quantile(histogram, 0.5) == 0.0


@pytest.mark.slow
def test_sums_of_parts_add_up_to_those_of_the_whole():
    """Cut between rollouts, as micro-batches are; also from zeros."""
    whole, parts = tokens(), []
    for cut in (slice(0, 1), slice(1, 2)):
        rows = slice(cut.start * M // 2, cut.stop * M // 2)
        metrics = {name: x[rows] for name, x in whole.metrics.items()}
        outcomes = None if whole.outcomes is None else whole.outcomes[cut]
        part = Tokens(metrics, whole.active[rows], whole.targets[rows], outcomes, VOCABULARY)
        parts.append(add_up(NAMES, part))
    total = jax.tree.map(lambda *x: sum(x), zeros(NAMES, VOCABULARY), *parts)
    for name, x in add_up(NAMES, whole).items():
        np.testing.assert_allclose(total[name], x, rtol=1e-6, err_msg=name)


def test_nothing_is_reported_of_no_tokens_and_no_rollouts():
    nothing = jax.device_get(condense(zeros(NAMES, VOCABULARY)))
    assert read(nothing) == {} and read({"divergence": 0.0}) == {}


def test_outcomes_that_are_asked_for_must_be_there():
    with pytest.raises(ValueError, match="needs the micro-batch's outcomes"):
        add_up([AGREEMENT], tokens()._replace(outcomes=None))


def test_gaps_on_the_host_are_counted_like_those_on_the_device():
    gaps = [np.float32([1, -3]), np.float32([2]), np.float32([-1]), np.float32([5])]
    judged = np.array([1, 1, -1, 0], np.int32)
    np.testing.assert_array_equal(gap_agreement(gaps, judged), [1, 2, 1, 1])


def test_an_outcome_has_a_sign_only_where_it_is_graded_and_distilled():
    outcomes = [
        Outcome(1.0, True, "", {}),
        Outcome(0.0, False, "", {}),
        not_graded("down"),
        Outcome(1.0, True, "", {}),
    ]
    distilled = np.array([True, True, True, False])
    assert outcome_signs(outcomes, distilled).tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize("name", ["sdpo", "grpo", "sft"])
@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared", "rows"])
def test_the_targets_of_an_update_are_the_sampled_tokens_of_its_rollouts(name, share_prompts):
    run = one_update.programs(name, micro_batch_tokens=1, share_prompts=share_prompts)
    update, data = one_update.the_update(name, run), one_update.rollouts()
    rows = SIGNAL if name == "sdpo" else range(GROUP)  # the first group has an advantage
    assert len(update.micro_batches) > 1 or not share_prompts
    targets = [np.asarray(m.targets)[np.asarray(m.weights) > 0] for m in update.micro_batches]
    ends = [np.flatnonzero(x == TOKENIZER.END) + 1 for x in targets]  # of every response here
    found = [y for x, at in zip(targets, ends, strict=True) for y in np.split(x, at)[:-1]]
    responses = [data.response_ids[i] for i in rows]
    if name == "sft":
        texts = [d.response for d in one_update.demonstrations()]
        responses = [[*TOKENIZER.encode_response(text), TOKENIZER.END] for text in texts]
    assert sorted(x.tolist() for x in found) == sorted(responses)


def test_objectives_report_what_their_teacher_allows():
    spread = {HISTOGRAM, BY_TOKEN}
    of_pairs = {*spread, AGREEMENT, "same_token"}

    def reported(settings):
        return of_pairs & set(make_objective(settings).metrics)

    assert reported(SdpoConfig()) == of_pairs
    assert reported(SdpoConfig(grpo_weight=0.5)) == of_pairs
    assert reported(SdpoConfig(alpha=1.0, credit="token")) == of_pairs - spread
    assert reported(SdftConfig()) == of_pairs - {AGREEMENT}
    assert reported(SdpoConfig(credit="sequence")) == set()
    assert reported(GrpoConfig()) == set()


def per_token():
    """Of each distilled rollout: ids, divergences, log q - log p, and whether the best agree.

    In float64 numpy, from the decoder's formulas.
    """
    run, data = one_update.programs("sdpo"), one_update.rollouts()
    prompts = one_update.teacher_prompts(run)

    def log_probs(params, prompt, response):
        logits = tiny.reference_logits(ARCHITECTURE, params, [*prompt, *response])
        return tiny.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE)

    for i in SIGNAL:
        ids = np.asarray(data.response_ids[i])
        p = log_probs(one_update.student(), data.prompt_ids[i], ids)
        q = log_probs(one_update.teacher_weights(), prompts[i], ids)
        mixture = np.log((1 - ALPHA) * np.exp(p) + ALPHA * np.exp(q))
        divergence = (1 - ALPHA) * np.exp(p) * (p - mixture) + ALPHA * np.exp(q) * (q - mixture)
        gap = (q - p)[np.arange(len(ids)), ids]
        yield ids, divergence.sum(axis=-1), gap, p.argmax(axis=-1) == q.argmax(axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"micro_batch_tokens": 1}], ids=["whole", "cut"])
def test_an_update_reports_what_numpy_finds_in_its_rollouts(form):
    run = one_update.programs("sdpo", **form)
    _, metrics = one_update.apply(run, one_update.the_update("sdpo", run))
    sums = jax.device_get(metrics.sums)
    ids, divergence, gaps, same = (list(x) for x in zip(*per_token(), strict=True))
    flat = np.concatenate(divergence)
    got = read(sums)
    assert float(sums["same_token"]) == sum(x.sum() for x in same)
    p99 = np.percentile(flat, 99, method="inverted_cdf")
    assert p99 / WIDTH <= got["divergence_p99"] <= p99 * WIDTH
    by_id = np.zeros(TOKENIZER.vocabulary)
    np.add.at(by_id, np.concatenate(ids), flat)
    share = np.sort(by_id)[-MOST:].sum() / flat.sum()
    assert got["divergence_top20_tokens"] == pytest.approx(share, rel=1e-4)
    # All that have a teacher failed: the success of the first group is its only one.
    assert SIGNAL[0] > 0 and GROUP > 1
    falls = [np.sum(x) < 0 for x in gaps]
    assert "gap_agreement/success" not in got
    assert got["gap_agreement/failure"] == pytest.approx(np.mean(falls))
