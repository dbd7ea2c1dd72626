"""Every family gives the logits of transformers' PyTorch model, on fixtures made from it."""

from functools import cache

import numpy as np
import parity
import pytest
from make_fixtures import CASES, FOLDER


@cache
def loaded(name):
    return *parity.load(FOLDER / name), dict(np.load(FOLDER / name / "expected.npz"))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name):
    errors = parity.hidden_errors(*loaded(name))
    assert max(errors.values()) <= parity.TOLERANCE, errors


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_give_the_logits_of_transformers(name):
    assert parity.decode_error(*loaded(name)) <= parity.TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "olmo3"])
def test_greedy_decoding_gives_the_tokens_of_transformers(name):
    assert parity.greedy_matches(*loaded(name))


def test_the_fixtures_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2e6
