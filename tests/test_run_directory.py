"""A run's folder: claimed by one recipe, held by one process, never half written."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdpo_jax.config import OptimizerConfig, TrainConfig
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig
from sdpo_jax.run import run_directory
from sdpo_jax.run.recipes import default_config, load_recipe

ROOT = Path(__file__).resolve().parents[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_gets_the_whole_recipe(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    config = default_config(run_dir=str(run_dir), seed=3, objective=GrpoConfig(clip_high=0.3))
    run_directory.claim(run_dir, config)
    assert load_recipe(run_dir / run_directory.CONFIG) == config
    assert list(contents(run_dir)) == [run_directory.CONFIG]


def test_the_same_recipe_claims_its_folder_again_and_may_change_what_does_not_matter(tmp_path):
    run_directory.claim(tmp_path, default_config())
    train = TrainConfig(steps=99, micro_batch_tokens=777)
    config = replace(default_config(), run_dir="elsewhere", train=train)
    run_directory.claim(tmp_path, config)
    assert load_recipe(tmp_path / run_directory.CONFIG) == config


@pytest.mark.parametrize("refuse", [run_directory.claim, run_directory.check])
def test_another_recipe_is_refused_with_both_values_of_every_difference(refuse, tmp_path):
    run_directory.claim(tmp_path, default_config())
    before = contents(tmp_path)
    other = replace(default_config(), seed=5, optimizer=OptimizerConfig(learning_rate=1.0, b1=0.5))
    with pytest.raises(UserError) as error:
        refuse(tmp_path, other)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0] == f"{tmp_path} holds a run of another recipe:"
    assert lines[1:-1] == [
        "seed: the run has 0, the recipe has 5",
        "optimizer.learning_rate: the run has 0.0003, the recipe has 1.0",
        "optimizer.b1: the run has 0.9, the recipe has 0.5",
    ]
    assert "--run-dir DIR" in lines[-1] and f"delete {tmp_path}" in lines[-1]
    assert contents(tmp_path) == before


def test_with_the_cosine_schedule_the_number_of_steps_is_part_of_the_recipe(tmp_path):
    cosine = replace(default_config(), optimizer=OptimizerConfig(schedule="cosine"))
    run_directory.claim(tmp_path, cosine)
    with pytest.raises(UserError, match=r"train\.steps: the run has 60, the recipe has 61"):
        run_directory.claim(tmp_path, replace(cosine, train=TrainConfig(steps=61)))


@pytest.mark.parametrize("refuse", [run_directory.claim, run_directory.check])
def test_a_folder_of_something_else_is_refused_and_left_alone(refuse, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("somebody's")
    with pytest.raises(UserError, match="found other files"):
        refuse(tmp_path, default_config())
    assert contents(tmp_path) == {"metrics.jsonl": b"somebody's"}


def test_a_run_with_a_renamed_key_is_refused_with_the_new_name(tmp_path):
    run_directory.claim(tmp_path, default_config())
    path = tmp_path / run_directory.CONFIG
    path.write_text(path.read_text().replace("one_step_off_policy", "ahead"))
    with pytest.raises(UserError) as error:
        run_directory.check(tmp_path, default_config())
    assert str(error.value) == f"{path}: rollout.ahead: renamed; write rollout.one_step_off_policy"


def test_a_check_changes_nothing(tmp_path):
    run_directory.check(tmp_path / "new", default_config())
    assert not (tmp_path / "new").exists()


def test_a_lock_alone_does_not_make_a_folder_somebody_elses(tmp_path):
    with run_directory.locked(tmp_path):
        run_directory.claim(tmp_path, default_config())
    assert (tmp_path / run_directory.CONFIG).exists()


def test_a_folder_is_held_by_one_and_free_once_it_lets_go(tmp_path):
    for _ in range(2):
        with run_directory.locked(tmp_path), pytest.raises(UserError) as error:
            run_directory.locked(tmp_path).__enter__()
        assert f"{tmp_path} is in use by process {os.getpid()}" in str(error.value)
        assert "Wait for it, or choose another folder" in str(error.value)


def test_a_killed_process_holds_no_folder(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from sdpo_jax.run import run_directory\n"
        "with run_directory.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid}"), run_directory.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    with run_directory.locked(tmp_path):
        assert (tmp_path / run_directory.LOCK).read_text() == f"process {os.getpid()}"


def test_a_summary_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    assert run_directory.read_summary(tmp_path) is None
    first = {"steps": 3, "complete": True}
    run_directory.write_summary(tmp_path, first)
    assert run_directory.read_summary(tmp_path) == first

    def fails(path, target):
        raise OSError("killed here")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="killed here"):
        run_directory.write_summary(tmp_path, {"steps": 4})
    assert run_directory.read_summary(tmp_path) == first


def test_a_run_that_goes_on_is_not_complete(tmp_path):
    run_directory.write_summary(tmp_path, {"complete": True})
    run_directory.reopen(tmp_path)
    assert run_directory.read_summary(tmp_path) is None
    run_directory.reopen(tmp_path)  # and once more does no harm
