"""How commands name a run and one of its checkpoints."""

import json

import pytest

from sdpo_jax.config.resolved import to_toml
from sdpo_jax.errors import UserError
from sdpo_jax.run.manifest import MANIFEST
from sdpo_jax.run.recipes import default_config
from sdpo_jax.run.run_ref import find_run, is_run, run_config


def make_run(folder, saved=(), evaluated=()):
    """A run's folder with steps that are complete as far as their names go."""
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(default_config(seed=7)))
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / MANIFEST).touch()
    rows = [{"kind": "train", "step": 30, "accuracy": 1.0}]
    rows += [{"kind": "eval", "step": step, "accuracy": a} for step, a in evaluated]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_folder_alone_is_its_last_checkpoint(tmp_path):
    run = find_run(str(make_run(tmp_path / "x", [10])))
    assert (run.folder, run.step, run.config.seed) == (tmp_path / "x", None, 7)
    assert run.config.run_dir == str(tmp_path / "x")


def test_a_step_by_its_number(tmp_path):
    make_run(tmp_path / "x", [10, 20])
    assert find_run(f"{tmp_path}/x@10").step == 10
    for which in ("15", "last", "", "-1", "1e1"):
        with pytest.raises(UserError, match=rf"x@{which}: expected @best or @STEP .*: 10, 20"):
            find_run(f"{tmp_path}/x@{which}")


def test_the_best_step_is_the_first_of_the_saved_ones_with_the_highest_accuracy(tmp_path):
    rows = [(0, 0.1), (10, 0.4), (15, 0.9), (20, 0.7), (30, 0.7), (40, None)]
    make_run(tmp_path / "x", [10, 20, 30, 40], rows)
    assert find_run(f"{tmp_path}/x@best").step == 20


def test_no_best_step_without_an_evaluation_of_one_that_is_saved(tmp_path):
    make_run(tmp_path / "x", [30], [(10, 0.4)])
    with pytest.raises(UserError, match=r"x@best: expected an evaluation .*\(30\)"):
        find_run(f"{tmp_path}/x@best")
    make_run(tmp_path / "y")
    (tmp_path / "y" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"y@best: .*\(none yet\)"):
        find_run(f"{tmp_path}/y@best")


def test_a_folder_may_hold_the_sign_in_its_own_name(tmp_path):
    make_run(tmp_path / "x@best", [5, 6])
    assert find_run(f"{tmp_path}/x@best").step is None
    assert find_run(f"{tmp_path}/x@best@5").step == 5


def test_a_folder_of_weights_beside_a_run_is_not_one_of_its_checkpoints(tmp_path):
    make_run(tmp_path / "x", [5], [(5, 0.5)])
    (tmp_path / "x@best").mkdir()
    assert not is_run(f"{tmp_path}/x@best")


def test_the_recipe_of_a_run_is_known_without_its_checkpoints(tmp_path):
    make_run(tmp_path / "x", [5])
    assert run_config(f"{tmp_path}/x@7").seed == 7
    with pytest.raises(UserError, match="y: expected the folder of a run"):
        run_config(f"{tmp_path}/y@7")


def test_what_is_run(tmp_path, monkeypatch):
    make_run(tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    assert is_run("./nano") and is_run("./nano@best")
    assert not is_run("nano") and not is_run("other@best") and not is_run("@best")
    with pytest.raises(UserError, match="other: expected the folder of a run"):
        find_run("other@best")
