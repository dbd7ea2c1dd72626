"""The console: exact plain lines, and a table that renders."""

import io
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from sdpo_jax.config import RolloutConfig, TrainConfig
from sdpo_jax.evaluation.metric_table import METRICS, duration, metric_of, text_of
from sdpo_jax.objectives import OBJECTIVES, SftConfig
from sdpo_jax.run.console import Console, batch_arithmetic
from sdpo_jax.run.recipes import default_config
from sdpo_jax.run.reporter import introduce

STEP = {
    "step": 3,
    "reward": 0.4123,
    "response_tokens": 31.52,
    "divergence": 0.02134,
    "teacher_signal": 0.875,
    "seconds_rollout": 1.2,
    "seconds_grade": 0.048,
    "seconds_teacher": 0.31,
    "seconds_train": 0.65,
}


COLUMNS = {name: make(settings()).columns for name, (settings, make) in OBJECTIVES.items()}


def plain(objective="sdpo"):
    stream = io.StringIO()
    return Console(COLUMNS[objective], steps=60, stream=stream), stream


def test_plain_step_is_one_line():
    console, stream = plain()
    console.step(STEP)
    assert stream.getvalue() == (
        "step  3/60  reward 0.412  tokens 31.5  divergence 0.0213  signal 87.5 %  "
        "rollout time 1.20 s  grade time 48 ms  teacher time 310 ms  train time 650 ms\n"
    )


def test_missing_values_print_as_a_dash_and_non_finite_ones_as_they_are():
    console, stream = plain()
    console.step({"step": 12, "reward": None, "divergence": float("nan"), "seconds_train": 2})
    assert stream.getvalue() == (
        "step 12/60  reward -  tokens -  divergence nan  signal -  "
        "rollout time -  grade time -  teacher time -  train time 2.00 s\n"
    )


def test_other_objectives_have_other_columns():
    console, stream = plain("sft")
    row = {"step": 1, "loss": 2.5, "token_accuracy": 0.5}
    console.step(row | {"seconds_train": 0.5})
    console, grpo_stream = plain("grpo")
    console.step({"step": 1, "reward": 1.0})
    assert stream.getvalue() == (
        "step  1/60  loss 2.5000  token accuracy 50.0 %  train time 500 ms\n"
    )
    assert grpo_stream.getvalue() == (
        "step  1/60  reward 1.000  tokens -  loss -  rollout time -  grade time -  train time -\n"
    )


def test_plain_header_evaluation_and_summary():
    console, stream = plain()
    introduce(default_config(run_dir="runs/x"), SimpleNamespace(size=1_234_567), console)
    before = {
        "step": 0,
        "accuracy": 0.25,
        "teacher_accuracy": 0.5,
        "a_ratio": 0.3,
        "pass_at_2": 0.4,
    }
    after = {"step": 60, "accuracy": 0.625, "a_ratio": 0.7, "pass_at_2": 0.9, "seconds": 130.0}
    console.evaluation(before)
    console.note("a note with [brackets] and 100%")
    console.summary(before, after, "runs/x", ["sdpo report runs/x", "sdpo export runs/x"])
    assert stream.getvalue().splitlines() == [
        "training  sdpo on tool_calls, model nano with 1.23 M parameters",
        f"devices   {jax.device_count()} x cpu",
        "run       runs/x",
        "batch     16 prompts x 8 rollouts = 128 generations a step, 60 steps",
        "step  0/60  evaluation  held-out accuracy 25.0 %  teacher accuracy 50.0 %  a ratio 0.3",
        "a note with [brackets] and 100%",
        "",
        "                   before       after",
        "held-out accuracy  25.0 %      62.5 %",
        "teacher accuracy   50.0 %           -",
        "a ratio               0.3         0.7",
        "pass@2             40.0 %      90.0 %",
        "time                    -  2 min 10 s",
        "",
        "run       runs/x",
        "next      sdpo report runs/x",
        "next      sdpo export runs/x",
    ]


def test_batch_arithmetic_counts_generations_and_updates():
    config = default_config(rollout=RolloutConfig(prompts_per_step=4, rollouts_per_prompt=2))
    assert batch_arithmetic(config) == "4 prompts x 2 rollouts = 8 generations a step"
    several = default_config(train=TrainConfig(mini_batches=4))
    assert batch_arithmetic(several).endswith("128 generations a step, 4 optimiser updates")
    assert batch_arithmetic(default_config(objective=SftConfig())) == "64 demonstrations a step"


def test_every_column_has_a_row_in_the_table_of_metrics():
    assert {name for columns in COLUMNS.values() for name in columns} <= set(METRICS)


def test_columns_may_be_metrics_of_ones_own():
    stream = io.StringIO()
    Console(["own_metric", "reward"], steps=9, stream=stream).step({"step": 1, "own_metric": 2 / 3})
    assert stream.getvalue() == "step 1/9  own metric 0.6667  reward -\n"


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("accuracy", "held-out accuracy", "41.2 %"),
        ("accuracy/alarm", "held-out accuracy, alarm", "41.2 %"),
        ("gap_agreement/failure", "gap agreement, failures", "41.2 %"),
        ("maj_at_8", "maj@8", "41.2 %"),
        ("best_at_8", "best at 8", "0.4123"),
        ("of_ones_own/part", "of ones own, part", "0.4123"),
    ],
)
def test_parts_and_numbers_of_samples_share_the_row_of_their_metric(name, label, text):
    assert metric_of(name).label == label
    assert text_of(name, 0.4123) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0851, "85 ms"),
        (0.9999, "1.00 s"),
        (59.99, "59.99 s"),
        (59.999, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7440, "2 h 04 min"),
    ],
)
def test_durations_have_units(seconds, text):
    assert duration(seconds) == text


# The table.


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("objective", sorted(COLUMNS))
def test_live_table_renders_every_objective(objective, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    with Console(COLUMNS[objective], steps=60, stream=stream, live=True) as console:
        console.note("run       [/runs]/x")
        console.evaluation({"step": 0, "accuracy": 0.125})
        for step in range(1, 30):
            console.step(STEP | {"step": step, "reward": 0.5, "loss": 0.5, "divergence": 0.5})
            console.evaluation({"step": step, "accuracy": step / 1000})
        console.note("[bold]not markup[/bold]")
        console.summary({"accuracy": 0.1}, {"accuracy": 0.2}, "runs/x", ["[next]"])
    text = stream.getvalue()
    assert "held-out" in text and "2.9 %" in text
    assert "12.5 %" in text and "[bold]not markup[/bold]" in text and "[next]" in text
    assert "[/runs]/x" in text and "…" not in text
    last_frame = text[text.rindex("[bold]not markup") :]
    shown = [line.split()[0] for line in last_frame.splitlines() if "0.500" in line]
    assert shown[-13:] == ["29"] + [str(step) for step in range(18, 30)]


def test_a_terminal_gets_the_table_unless_it_asks_for_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def output():
        stream = Terminal()
        with Console(COLUMNS["sft"], steps=9, stream=stream) as console:
            console.step({"step": 1})
        return stream.getvalue()

    assert "\x1b[" in output()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert output().startswith("step 1/9  loss -")


def test_the_plain_face_does_not_import_rich():
    code = (
        "import io, sys; from sdpo_jax.run.console import Console\n"
        "Console(['reward'], steps=1, stream=io.StringIO()).step({'step': 1})\n"
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
