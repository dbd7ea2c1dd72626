"""Commands on runs: runs that stop and go on, their evaluation, their pages, their weights.

One short run of the embedded model is shared by the whole file; every process takes its compiled
programs from one cache.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import RECIPE, ROOT, SETTINGS, STEPS, bytes_of, refused, sft_argv, train_argv

from sdpo_jax.api import load_components
from sdpo_jax.cli import main
from sdpo_jax.config import ModelConfig
from sdpo_jax.evaluation.report import table
from sdpo_jax.rollouts.phase_timer import is_time
from sdpo_jax.run import run_directory
from sdpo_jax.run.manifest import complete
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.recipes import load_recipe
from sdpo_models.hugging_face import load_architecture, load_params

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "wake me at seven"}]


class Commands:
    """Starts `sdpo` in processes of one device that share a compilation cache."""

    def __init__(self, cache):
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")]),
        }

    def start(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "sdpo_jax.cli", *words],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words, code=0):
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, out + err
        return out, err

    def train_until(self, run_dir, step, number, wait=0.0):
        """Sends a signal `wait` seconds after the row of `step` appears; returns code and text."""
        process = self.start(*train_argv(run_dir))
        while f'"kind": "train", "step": {step},' not in text_of(run_dir / METRICS_FILE):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def text_of(path):
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def sdpo(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def finished(sdpo, tmp_path_factory):
    """A run that nothing interrupted: its folder and what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    out, err = sdpo.run(*train_argv(run_dir))
    assert not err
    return run_dir, out


def rows_of(run_dir):
    """Every row without its times."""
    return [
        {name: value for name, value in row.items() if not is_time(name)}
        for row in read_metrics(run_dir / METRICS_FILE)
    ]


def final_state(run_dir, step=STEPS):
    """Parameters, optimiser and teacher after the last step, as they lie on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a sharding; this is one device's
        return ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / str(step) / "state")


def assert_same_run(run_dir, other):
    assert rows_of(run_dir) == rows_of(other)
    ours, theirs = (jax.tree.leaves_with_path(final_state(folder)) for folder in (run_dir, other))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
    ours, theirs = (run_directory.read_summary(folder) for folder in (run_dir, other))
    assert ours is not None and theirs is not None
    for key in ("objective", "complete", "steps", "generations", "before", "after"):
        assert ours[key] == theirs[key], key


def test_a_run_reports_every_step_once_and_its_result(finished):
    run_dir, out = finished
    rows = read_metrics(run_dir / METRICS_FILE)
    order = [(row["kind"], row["step"]) for row in rows]
    trained = [("train", step) for step in range(1, STEPS + 1)]
    expected = [("eval", 0), *trained[:3], ("eval", 3), *trained[3:], ("eval", 6)]
    assert order == expected
    train = [row for row in rows if row["kind"] == "train"]
    keys = """reward success response_tokens truncated teacher_signal shown/demonstration
        shown/feedback generations divergence loss grad_norm tokens updates skipped
        seconds_rollout seconds_grade seconds_teacher seconds_train tokens_per_second_rollout
        tokens_per_second_teacher tokens_per_second_train"""
    for row in train:
        assert not set(keys.split()) - set(row)
    assert [row["generations"] for row in train] == [16 * step for step in range(1, STEPS + 1)]
    # The run is worth comparing: it had both kinds of context, and it moved.
    assert any(row["shown/demonstration"] > 0 for row in train)
    assert any(row["shown/feedback"] > 0 for row in train)
    assert all(row["grad_norm"] > 0 for row in train if row["updates"])
    summary = run_directory.read_summary(run_dir)
    assert summary is not None
    assert summary["complete"] and summary["steps"] == STEPS and summary["generations"] == 96
    assert summary["seconds"] > 0
    at = {row["step"]: row for row in rows if row["kind"] == "eval"}
    for name, step in (("before", 0), ("after", STEPS)):
        assert {"kind": "eval", "step": step, **summary[name]} == at[step]
    assert f"sdpo eval {run_dir}" in out and f"step {STEPS}/{STEPS}" in out


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_step_and_restarted_a_run_repeats_the_uninterrupted_one(
    seed, sdpo, finished, tmp_path
):
    chance = random.Random(seed)
    run_dir, step = tmp_path / "run", chance.randint(1, STEPS - 2)
    code, _, err = sdpo.train_until(run_dir, step, signal.SIGKILL, wait=chance.uniform(0, 0.15))
    assert code == -signal.SIGKILL, err
    assert not (run_dir / run_directory.SUMMARY).exists()
    sdpo.run(*train_argv(run_dir))
    assert_same_run(run_dir, finished[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_finishes_its_step_saves_and_goes_on_exactly(
    number, sdpo, finished, tmp_path
):
    run_dir = tmp_path / "run"
    code, out, err = sdpo.train_until(run_dir, 1, number)  # before the first regular checkpoint
    assert code == 0 and not err
    stopped = re.search(r"stopped +after step (\d+); saved. The same command goes on", out)
    assert stopped is not None, out
    step = int(stopped[1])
    assert rows_of(run_dir)[-1]["step"] == step < STEPS
    assert not (run_dir / run_directory.SUMMARY).exists()
    out, _ = sdpo.run(*train_argv(run_dir))
    assert f"resumed   from step {step}" in out
    assert_same_run(run_dir, finished[0])


def test_a_finished_run_started_again_prints_its_result_and_changes_nothing(
    finished, capsys, monkeypatch
):
    run_dir, first_out = finished
    before = bytes_of(run_dir)
    changed = (run_dir / METRICS_FILE).stat().st_mtime_ns
    # Nothing is loaded, so nothing can be compiled or trained.
    monkeypatch.setattr("sdpo_jax.api.load_components", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as exit_:
        main(train_argv(run_dir))
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "holds this run, finished" in out and f"rm -r {run_dir}" in out
    table = first_out[first_out.index("before") :]
    assert out.endswith(table)
    assert bytes_of(run_dir) == before
    assert (run_dir / METRICS_FILE).stat().st_mtime_ns == changed


def test_a_folder_with_another_recipe_is_refused_with_every_difference(finished, capsys):
    run_dir, _ = finished
    kept = bytes_of(run_dir)
    more = ["--seed", "7", "--teacher.ema-rate", "0.5", "--checkpoint.keep", "9"]
    for words in (train_argv(run_dir, *more), train_argv(run_dir, *more, "--train.steps", "40")):
        message = refused(capsys, *words)
        assert "seed: the run has 0, the recipe has 7" in message
        assert "teacher.ema_rate: the run has 0.05, the recipe has 0.5" in message
        assert "checkpoint.keep" not in message and "train.steps" not in message
        assert str(run_dir) in message and "--run-dir DIR" in message
        assert bytes_of(run_dir) == kept


def test_demonstrations_from_a_file_train_end_to_end(sdpo, tmp_path):
    rows = [
        json.dumps({"prompt": f"wake me at {n}", "response": f"set_alarm({n})"}) for n in range(8)
    ]
    more = "--data.rows-per-step 4 --data.max-tokens 64 --train.steps 3"
    sdpo.run(*sft_argv(tmp_path, rows, *more.split()))
    run_dir = tmp_path / "run"
    rows = read_metrics(run_dir / METRICS_FILE)
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] == "train"] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    for row in rows:
        if row["kind"] == "train":
            assert row["loss"] > 0 and 0 <= row["token_accuracy"] <= 1 and row["updates"] == 1
            assert row["seconds_data"] >= 0
    summary = run_directory.read_summary(run_dir)
    assert summary is not None and summary["complete"] and summary["generations"] == 0
    assert summary["before"] == summary["after"] == {}


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3_8b_sdpo", "qwen3_8b_sdpo_feedback", "qwen3_8b_grpo"),
        *("olmo3_7b_sdpo", "olmo3_7b_grpo", "qwen25_7b_sdpo", "qwen25_7b_grpo"),
    ],
)
def test_the_papers_recipes_run_with_the_embedded_model_in_place_of_theirs(name, sdpo, tmp_path):
    small = """--model.path nano --model.thinking template --environment.kind tool_calls
        --train.steps 1 --rollout.rollouts-per-prompt 2 --rollout.max-prompt-tokens 64
        --rollout.max-response-tokens 24 --teacher.max-prompt-tokens 192
        --evaluation.prompts 4 --evaluation.samples-per-prompt 2 --evaluation.batch-prompts 4
        --mesh.fsdp 1 --mesh.tensor 1"""
    run_dir = tmp_path / "run"
    recipe = str(ROOT / "configs" / f"{name}.toml")
    sdpo.run("train", recipe, "--run-dir", str(run_dir), *small.split())
    (row,) = [r for r in read_metrics(run_dir / METRICS_FILE) if r["kind"] == "train"]
    assert row["updates"] >= 1 and row["skipped"] == 0 and row["grad_norm"] > 0


def test_eval_prints_a_table_and_writes_what_it_prints(sdpo, finished, tmp_path):
    run_dir, _ = finished
    kept = bytes_of(run_dir)
    copy = tmp_path / "copy.json"
    out, _ = sdpo.run("eval", str(run_dir), "--samples", "4", "--json", str(copy))
    text = (run_dir / "eval.json").read_text()
    assert copy.read_text() == text
    made = json.loads(text)
    assert list(made["rows"]) == ["start", f"step {STEPS}"]
    head, columns, *_ = out.splitlines()
    assert head.startswith("avg@4 and greedy, 8 held-out prompts of tool_calls")
    assert columns.split("  ") and "start" in columns and f"step {STEPS} - start" in columns
    assert out.endswith(f"{table(made)}\n")
    for row in made["rows"].values():
        for name in ("accuracy", "accuracy_greedy", "teacher_accuracy", "same_output", "entropy"):
            assert row["metrics"][name]["value"] >= 0
        assert len(row["prompts"]) == 8
        assert all(
            p["samples"] == len(p["passed"]) == len(p["answers"]) == 4 for p in row["prompts"]
        )
        accuracy = row["metrics"]["accuracy"]["value"]
        assert accuracy == sum(p["successes"] for p in row["prompts"]) / 32
        assert row["metrics"]["pass_at_1"]["value"] == pytest.approx(accuracy)
        assert row["metrics"]["pass_at_4"]["value"] >= accuracy
    # All that training reports is there, for as many samples, but what its teacher's state tells.
    reported = set((run_directory.read_summary(run_dir) or {})["after"]) - {"student_teacher_kl"}
    assert reported <= set(made["rows"]["start"]["metrics"])
    assert {path: data for path, data in bytes_of(run_dir, without=["eval.json"]).items()} == kept

    # One of its other checkpoints, beside what the last one gave.
    first = complete(run_dir / "checkpoints")[0]
    sdpo.run("eval", f"{run_dir}@{first}", "--samples", "1")
    asked = json.loads((run_dir / f"eval@{first}.json").read_text())
    assert list(asked["rows"]) == ["start", f"step {first}"]
    assert (run_dir / "eval.json").read_text() == text

    # A recipe with the run's settings has the same start.
    alone = tmp_path / "alone.json"
    settings = ["--run-dir", "runs/none", "--train.steps", str(STEPS), *SETTINGS.split()]
    out, _ = sdpo.run("eval", str(RECIPE), "--json", str(alone), *settings)
    started = json.loads(alone.read_text())
    assert started["rows"] == {"start": made["rows"]["start"]}
    assert started["settings"] == made["settings"] and started["differences"] == {}
    assert out.endswith(f"{table(started)}\n")


def test_heatmap_and_report_write_pages_and_leave_the_run_as_it_was(sdpo, finished):
    run_dir, _ = finished
    kept = bytes_of(run_dir)
    out, _ = sdpo.run("heatmap", str(run_dir), "--prompts", "2", "--top", "3")
    assert f"wrote {run_dir / 'heatmap.html'}" in out and "8 responses" in out
    lines = (run_dir / "token_batch.jsonl").read_text().splitlines()
    head, *rows = [json.loads(line) for line in lines]
    assert (head["step"], head["teacher"], len(rows)) == (STEPS, "ema", 8)
    for row in rows:
        assert "".join(token["text"] for token in row["tokens"]) == row["response"]
        assert all(1 <= len(t["alternatives"]) <= 6 for t in row["tokens"])
    out, _ = sdpo.run("report", str(run_dir))
    assert f"wrote {run_dir / 'report.html'}" in out
    assert 'href="heatmap.html"' in (run_dir / "report.html").read_text()
    new = ["heatmap.html", "token_batch.jsonl", "report.html", "eval.json"]
    new += [path.name for path in run_dir.glob("eval@*.json")]
    assert bytes_of(run_dir, without=new) == {
        path: data for path, data in kept.items() if path.name not in new
    }


def test_convert_writes_a_folder_that_loads_and_never_overwrites_one(
    sdpo, finished, tmp_path, capsys
):
    from transformers import AutoTokenizer

    run_dir, _ = finished
    folder = tmp_path / "weights"
    out, _ = sdpo.run("convert", str(run_dir), str(folder))
    assert str(folder) in out and f"step {STEPS}" in out
    params = load_params(folder, load_architecture(folder))
    trained = jax.tree.map(np.asarray, final_state(run_dir)["params"])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8)  # bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("set_alarm")) == "set_alarm"
    kept = bytes_of(folder)
    assert "new or empty folder" in refused(capsys, "convert", str(run_dir), str(folder))
    assert bytes_of(folder) == kept


def test_a_run_or_one_of_its_checkpoints_is_the_start_of_a_second_stage(finished):
    run_dir, _ = finished
    first, *_, last = complete(run_dir / "checkpoints")
    for path, step in ((str(run_dir), last), (f"{run_dir}@{first}", first)):
        parts = load_components(replace(load_recipe(RECIPE), model=ModelConfig(path=path)))
        trained = final_state(run_dir, step)["params"]
        for a, b in zip(jax.tree.leaves(parts.params()), jax.tree.leaves(trained), strict=True):
            np.testing.assert_array_equal(a, b)
    fresh = load_components(load_recipe(RECIPE))
    assert parts.tokenizer.render(CHAT) == fresh.tokenizer.render(CHAT)


def test_a_run_of_a_pod_is_converted_on_one_device_without_its_environment(
    finished, tmp_path, monkeypatch
):
    run_dir = tmp_path / "pod"
    shutil.copytree(finished[0], run_dir)
    config = run_dir / "config.toml"
    config.write_text(config.read_text().replace("fsdp = 1\ntensor = 1", "fsdp = 32\ntensor = 2"))
    assert load_recipe(config).mesh.fsdp == 32
    monkeypatch.setattr("sdpo_jax.api.make_environment", lambda _: pytest.fail("not needed"))
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(run_dir), str(tmp_path / "out")])
    assert exit_.value.code == 0
    assert load_params(tmp_path / "out", load_architecture(tmp_path / "out"))


def test_convert_adds_adapters_in(sdpo, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    steps = ["--train.steps", "2", "--evaluation.every-steps", "0"]
    sdpo.run(*train_argv(run_dir, *steps, "--lora.rank", "2", "--lora.alpha", "6"))
    sdpo.run("convert", str(run_dir), str(out), "--dtype", "float32")
    converted = load_params(out, load_architecture(out))["layers"]
    start = load_components(load_recipe(RECIPE)).params()["layers"]
    adapters = final_state(run_dir, step=2)["params"]
    for name, matrix in start.items():
        expected = np.asarray(matrix, np.float64)
        if name in adapters:
            down, up = (np.asarray(adapters[name][part], np.float64) for part in ("down", "up"))
            assert np.any(up)
            expected = expected + 6 / 2 * np.einsum("lir,lro->lio", down, up)
        np.testing.assert_allclose(converted[name], expected, atol=1e-6)


def test_convert_writes_the_dtype_that_is_asked_for(finished, tmp_path):
    run_dir, _ = finished
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(run_dir), str(tmp_path / "whole"), "--dtype", "float32"])
    assert exit_.value.code == 0
    params = load_params(tmp_path / "whole", load_architecture(tmp_path / "whole"))
    trained = final_state(run_dir)["params"]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_a_process_too_bad_input_is_code_2_and_nothing_on_standard_output(sdpo, tmp_path):
    out, err = sdpo.run("train", str(tmp_path / "none.toml"), code=2)
    assert not out and err.startswith("sdpo: ") and "Traceback" not in err
