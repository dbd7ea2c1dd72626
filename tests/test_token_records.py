"""Records of tokens against log-softmaxes of whole logits, in numpy from the decoder's formulas."""

import numpy as np
import pytest
import quick
import tiny

from sdpo_jax.reports.token_records import Responses, token_records
from sdpo_jax.training.batch import BatchLayout

TOP = 3
TEMPERATURE = 0.7
STUDENT, TEACHER = tiny.make_params(seed=0), tiny.make_params(seed=1)
RANDOM = np.random.default_rng(0)
PROMPTS = [tiny.random_ids(RANDOM, length) for length in (5, 5, 9, 9, 2)]
PROMPTS[1], PROMPTS[3] = PROMPTS[0], PROMPTS[2]  # siblings
ROWS = Responses(
    prompts=PROMPTS,
    teacher_prompts=[
        tiny.random_ids(RANDOM, 11),
        None,
        tiny.random_ids(RANDOM, 17),
        tiny.random_ids(RANDOM, 4),
        None,
    ],
    responses=[tiny.random_ids(RANDOM, length) for length in (7, 3, 1, 12, 6)],
)


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device and cheap compilation."""
    with quick.programs():
        yield


def records_of(coefficient=None, share_prompts=True, shards=1):
    return token_records(
        tiny.make_model(),
        STUDENT,
        TEACHER,
        ROWS,
        layout=BatchLayout(
            share_prompts, micro_batch_tokens=32, head_chunk_tokens=4, shards=shards
        ),
        devices=tiny.make_devices(data=shards),
        temperature=TEMPERATURE,
        top=TOP,
        coefficient=coefficient,
    )


def logits_at_response(params, prompt, response):
    """[T, V] that predict the response's tokens."""
    logits = tiny.reference_logits(tiny.ARCHITECTURE, params, [*prompt, *response])
    return logits[len(prompt) - 1 : -1]


def log_probs(logits):
    return tiny.log_softmax(logits / TEMPERATURE)


def likeliest(log_probs):
    return np.argsort(-log_probs, axis=-1)[:, :TOP]


def check(record, log_p, log_q, response):
    """The record holds what whole distributions say; `log_q` is None where there is no teacher."""
    columns = [np.asarray(response)[:, None], likeliest(log_p)]
    columns += [] if log_q is None else [likeliest(log_q)]
    np.testing.assert_array_equal(record.ids, np.concatenate(columns, axis=1))
    close = {"rtol": 2e-4, "atol": 2e-4}  # float32 against float64, through two layers
    np.testing.assert_allclose(record.log_p, np.take_along_axis(log_p, record.ids, axis=1), **close)
    if log_q is None:
        assert record.log_q is None
        return
    expected = np.take_along_axis(log_q, record.ids, axis=1)
    np.testing.assert_allclose(record.log_q, expected, **close)


@pytest.mark.parametrize(("share_prompts", "shards"), [(True, 1), (False, 2)])
def test_every_token_has_its_log_probs_and_the_likeliest_others(share_prompts, shards):
    records = records_of(share_prompts=share_prompts, shards=shards)
    assert len(records) == len(ROWS.responses)
    for record, prompt, reprompt, response in zip(records, *ROWS, strict=True):
        log_p = log_probs(logits_at_response(STUDENT, prompt, response))
        log_q = None
        if reprompt is not None:
            log_q = log_probs(logits_at_response(TEACHER, reprompt, response))
        check(record, log_p, log_q, response)


def test_a_trust_region_teacher_mixes_the_logits_of_both_after_the_reprompt():
    records = records_of(coefficient=0.3)
    row = 3
    prompt, reprompt, response = (part[row] for part in ROWS)
    log_p = log_probs(logits_at_response(STUDENT, prompt, response))
    frozen, live = (logits_at_response(x, reprompt, response) for x in (TEACHER, STUDENT))
    check(records[row], log_p, log_probs(0.7 * frozen + 0.3 * live), response)


def test_a_teacher_that_is_the_student_with_the_same_prompt_has_no_advantage():
    rows = ROWS._replace(teacher_prompts=ROWS.prompts)
    records = token_records(
        tiny.make_model(),
        STUDENT,
        STUDENT,
        rows,
        layout=BatchLayout(True, micro_batch_tokens=4096, head_chunk_tokens=64, shards=1),
        devices=tiny.make_devices(),
        temperature=1.0,
        top=TOP,
    )
    for record in records:
        assert record.log_q is not None
        np.testing.assert_array_equal(record.log_q[:, 0], record.log_p[:, 0])
