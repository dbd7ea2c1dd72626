"""What a benchmark compares is the same thing."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "loss_head.py"


@pytest.fixture(scope="module")
def loss_head():
    spec = importlib.util.spec_from_file_location("loss_head", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_forms_of_the_head_have_one_value_and_gradient(loss_head):
    arrays = loss_head.arrays_like(loss_head.shapes(24, 6, 11, np.float32))
    results = {
        form: jax.value_and_grad(loss_head.loss_of(form, 8), argnums=(0, 1))(*arrays)
        for form in loss_head.FORMS
    }
    naive = results.pop("naive")
    assert float(naive[0]) > 0.0
    for result in results.values():
        for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(naive), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_table_ends_with_the_ratios(loss_head, capsys):
    loss_head.on_cpu(chunk=512, repeats=1, width=4, vocabulary=8)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("chunked, 4k to 32k tokens: temp ")
    assert last[1].startswith("chunked / naive at 4k: temp ")
