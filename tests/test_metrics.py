"""The metrics log: one row per step, whatever happened in between."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.errors import UserError
from sdpo_jax.run.metrics import METRICS_FILE, MetricsLog, read_metrics, truncate_to


def write_steps(run_dir, start, steps):
    with MetricsLog(run_dir, start) as log:
        for step in steps:
            log.write("train", step, {"reward": step / 10})


def test_a_row_is_a_line_of_json_with_kind_and_step_first(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write("train", 3, {"reward": 0.5, "note": "warm-up"})
        log.write("eval", 10, {"accuracy": 0.25})
        text = (tmp_path / METRICS_FILE).read_text()  # before the log is closed
    assert text == (
        '{"kind": "train", "step": 3, "reward": 0.5, "note": "warm-up"}\n'
        '{"kind": "eval", "step": 10, "accuracy": 0.25}\n'
    )


def test_numbers_of_every_kind_are_numbers_and_non_finite_ones_null(tmp_path):
    values = {
        "int": 2,
        "float32": np.float32(0.5),
        "bfloat16": jnp.asarray(0.25, jnp.bfloat16),
        "array": jnp.arange(3),
        "nan": float("nan"),
        "infinite": jnp.asarray(jnp.inf),
        "list": [1.0, float("-inf")],
        "truth": np.bool_(True),
        "nothing": None,
    }
    with MetricsLog(tmp_path, 0) as log:
        log.write("train", 1, values)
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    assert row == {
        "kind": "train",
        "step": 1,
        "int": 2,
        "float32": 0.5,
        "bfloat16": 0.25,
        "array": [0, 1, 2],
        "nan": None,
        "infinite": None,
        "list": [1.0, None],
        "truth": True,
        "nothing": None,
    }


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    write_steps(tmp_path, 5, range(6, 10))
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, 10))


def test_a_run_from_step_0_starts_an_empty_log(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write("eval", 0, {"accuracy": 0.1})
    with MetricsLog(tmp_path, 0):
        assert read_metrics(tmp_path / METRICS_FILE) == []


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    path = tmp_path / METRICS_FILE
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    write_steps(tmp_path, 2, [3])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"kind": "train"}'])
def test_any_other_bad_line_is_named(tmp_path, line):
    path = tmp_path / METRICS_FILE
    path.write_text(f'{{"kind": "train", "step": 1}}\n{line}\n{{"kind": "train", "step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_truncate_keeps_rows_byte_for_byte(tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3])
    path = tmp_path / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True)
    truncate_to(path, 2)
    assert path.read_text() == "".join(lines[:2])
    truncate_to(tmp_path / "absent.jsonl", 2)
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_tensorboard_has_the_scalars(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write("train", 1, {"reward": 0.5, "note": "text", "nan": float("nan")})
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"train/reward" in content
    assert b"train/note" not in content and b"train/nan" not in content
    assert json.loads((tmp_path / METRICS_FILE).read_text())["note"] == "text"
