"""A run of several processes: what the environment says, and that it changes no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sdpo_jax import distributed
from sdpo_jax.distributed import Cluster, cluster_of, initialize_from_environment
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.phase_timer import is_time

ROOT = Path(__file__).parent.parent
EXPLICIT = {"SDPO_COORDINATOR": "10.0.0.2:8476", "SDPO_NUM_PROCESSES": "4", "SDPO_PROCESS_ID": "3"}
NAMES = [*EXPLICIT, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (EXPLICIT, Cluster("10.0.0.2:8476", 4, 3)),
        (EXPLICIT | {"SDPO_COORDINATOR": "[::1]:8476"}, Cluster("[::1]:8476", 4, 3)),
        ({"SDPO_COORDINATOR": "auto"}, Cluster()),
        ({"SDPO_COORDINATOR": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Cluster()),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, Cluster()),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "localhost"}, Cluster()),
        ({"MEGASCALE_NUM_SLICES": "1"}, None),
    ],
)
def test_the_environment_says_where_a_process_stands(environment, expected):
    assert cluster_of(environment) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SDPO_COORDINATOR": "10.0.0.2"}, "SDPO_COORDINATOR=10.0.0.2: expected host:port"),
        ({"SDPO_COORDINATOR": "host:http"}, "SDPO_COORDINATOR=host:http: expected host:port"),
        ({"SDPO_COORDINATOR": "host:70000"}, "SDPO_COORDINATOR=host:70000: expected host:port"),
        ({"SDPO_COORDINATOR": ":8476"}, "SDPO_COORDINATOR=:8476: expected host:port"),
        (
            {"SDPO_NUM_PROCESSES": "0"},
            "SDPO_NUM_PROCESSES=0: expected a whole number of at least 1",
        ),
        ({"SDPO_NUM_PROCESSES": "two"}, "SDPO_NUM_PROCESSES=two: expected a whole number"),
        ({"SDPO_PROCESS_ID": "-1"}, "SDPO_PROCESS_ID=-1: expected a whole number of at least 0"),
        ({"SDPO_PROCESS_ID": "4"}, "SDPO_PROCESS_ID=4: expected 0 to 3"),
        ({"SDPO_PROCESS_ID": None}, "SDPO_PROCESS_ID is not set: expected a whole number"),
        ({"SDPO_COORDINATOR": None}, "SDPO_NUM_PROCESSES=4: .* SDPO_COORDINATOR is not set"),
        ({"SDPO_COORDINATOR": "auto"}, "SDPO_NUM_PROCESSES=4: .* asks the cluster"),
    ],
)
def test_a_bad_value_names_its_variable(change, words):
    changed = {name: value for name, value in (EXPLICIT | change).items() if value is not None}
    with pytest.raises(UserError, match=words.replace("|", "\\|")):
        cluster_of(changed)


def test_a_bad_number_of_slices_names_its_variable():
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES=many"):
        cluster_of({"MEGASCALE_NUM_SLICES": "many"})


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with."""
    calls = []
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    monkeypatch.setattr(jax.config, "update", lambda *a: None)
    return calls


def test_one_process_joins_nothing(joined):
    initialize_from_environment()
    assert joined == []


def test_several_processes_join_where_the_environment_says(joined, monkeypatch):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    initialize_from_environment()
    assert joined == [("10.0.0.2:8476", 4, 3)]


def test_a_cluster_that_is_not_there_is_a_user_error(joined, monkeypatch):
    def fail(*arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SDPO_COORDINATOR", "auto")
    with pytest.raises(UserError, match="cannot join the run at the cluster: coordinator_address"):
        initialize_from_environment()


def test_leaving_alone_is_an_ordinary_exit():
    with pytest.raises(SystemExit) as exit_:
        distributed.leave(2)
    assert exit_.value.code == 2


SIZES = {
    "rollout.prompts-per-step": 4,
    "rollout.rollouts-per-prompt": 2,
    "train.steps": 2,
    "train.micro-batch-tokens": 512,
    "environment.train-prompts": 16,
    "environment.held-out-prompts": 8,
    "evaluation.prompts": 8,
    "evaluation.batch-prompts": 8,
    "model.random-init": "true",
}


def train(run_dir, *options, processes):
    """Trains the nano recipe, cut down, from this checkout."""
    sdpo = Path(sys.executable).with_name("sdpo")
    alone, several = [sdpo, "train"], ["bash", ROOT / "launch" / "local_processes.sh"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'models'}",
        "PROCESSES": str(processes),
        "SDPO": str(sdpo),
    }
    command = alone if processes == 1 else several
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    return subprocess.run(
        [*command, ROOT / "configs" / "nano.toml", "--run-dir", run_dir, *sizes, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def metrics(run_dir):
    """Rows without the times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_as_one_does_and_an_error_in_one_ends_both(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, processes in ((one, 1), (two, 2)):
        done = train(run_dir, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
    expected, found = metrics(one), metrics(two)
    for rows in (expected, found):
        assert [row.pop("kind") for row in rows] == ["eval", "train", "train", "eval"]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        # Sums over rows are taken in another order; everything else is the same.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == ["2"]

    other = train(two, "--optimizer.learning-rate", "0.5", "--train.steps", "3", processes=2)
    assert other.returncode == 2, other.stdout + other.stderr
    assert "[0] sdpo: " in other.stderr
    assert "the run has 0.0003, the recipe has 0.5" in other.stderr


DISAGREE = f"""#!{sys.executable}
from types import SimpleNamespace
import jax
from sdpo_jax.distributed import initialize_from_environment
from sdpo_jax.run import saver
from sdpo_jax.run.callbacks import Callbacks
from sdpo_jax.run.recipes import default_config

initialize_from_environment()
saved = []
trainer = SimpleNamespace(
    config=default_config(run_dir="nowhere"),
    source=SimpleNamespace(get_state=dict),
    host_state=dict,
)
checkpoints = SimpleNamespace(
    steps=list,
    save=lambda step, *_, also: saved.append((step, also)),
    poll=lambda: None,
    finish=lambda: None,
)
saver.to_saved = lambda state: state
progress = saver.Progress(0, SimpleNamespace(base=None), {{}}, None, 0.0)
save = saver.Saver(trainer, checkpoints, progress, Callbacks(), began=0.0)
grades = [(0.5, 0.9, 0.3), (0.5, 0.1, 0.9)][jax.process_index()]
for progress.step, accuracy in enumerate(grades, start=1):
    save.evaluated(progress.step, {{"accuracy": accuracy}})
    save(now=False)
print("saved", saved, flush=True)
"""


@pytest.mark.slow
def test_where_grades_differ_all_processes_save_what_the_first_finds_best(tmp_path):
    script = tmp_path / "disagree"
    script.write_text(DISAGREE)
    script.chmod(0o755)
    path = f"{ROOT}{os.pathsep}{ROOT / 'models'}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        ["bash", ROOT / "launch" / "local_processes.sh", "unread"],
        env=environment | {"PROCESSES": "2", "SDPO": str(script)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("saved [(1, 1), (2, 2)]") == 2, done.stdout
