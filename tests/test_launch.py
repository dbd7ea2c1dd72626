"""The launch scripts: they parse, say what they would run, and stop together."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = {"TPU_NAME": "pod", "ZONE": "z-a", "PROJECT": "p"}


def run(script, *words, **variables):
    clean = {k: v for k, v in os.environ.items() if k not in TPU and not k.startswith("SDPO_")}
    return subprocess.run(
        ["bash", LAUNCH / script, *words],
        env=clean | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def commands(done):
    """The words of each command that a dry run printed."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_is_executable_and_stops_at_errors(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_words_a_script_prints_its_usage(script):
    done = run(script.name)
    assert done.returncode == 2
    assert f"usage: launch/{script.name}" in done.stderr


def test_local_processes_differ_in_their_id_alone():
    done = run(
        "local_processes.sh", "r.toml", "--run-dir", "a b", PROCESSES="3", PORT="5", DRY_RUN="1"
    )
    same = ["JAX_PLATFORMS=cpu", "SDPO_COORDINATOR=127.0.0.1:5", "SDPO_NUM_PROCESSES=3"]
    tail = ["sdpo", "train", "r.toml", "--run-dir", "a b"]
    assert commands(done) == [[*same, f"SDPO_PROCESS_ID={i}", *tail] for i in range(3)]


@pytest.mark.parametrize("processes", ["0", "two", "-1"])
def test_a_bad_number_of_processes_is_named(processes):
    done = run("local_processes.sh", "r.toml", PROCESSES=processes)
    assert done.returncode == 2
    assert f"PROCESSES={processes}: expected a whole number" in done.stderr


def fake_sdpo(folder, body):
    script = folder / "sdpo"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_local_processes_get_the_words_and_their_place(tmp_path):
    sdpo = fake_sdpo(tmp_path, 'echo "$SDPO_PROCESS_ID/$SDPO_NUM_PROCESSES $*"')
    done = run("local_processes.sh", "r.toml", "--seed", "1", SDPO=sdpo)
    assert done.returncode == 0, done.stderr
    expected = [f"[{i}] {i}/2 train r.toml --seed 1" for i in range(2)]
    assert sorted(done.stdout.splitlines()) == expected


def test_a_process_that_fails_takes_its_siblings_with_it(tmp_path):
    body = f'[ "$SDPO_PROCESS_ID" = 0 ] || exit 7\necho $$ > {tmp_path}/pid\nexec sleep 3000'
    done = run("local_processes.sh", "r.toml", PROCESSES="3", SDPO=fake_sdpo(tmp_path, body))
    assert done.returncode == 7
    assert "ended with code 7; stopping the others" in done.stderr


@pytest.mark.parametrize("missing", TPU)
def test_a_tpu_command_without_a_variable_names_it(missing):
    given = {name: value for name, value in TPU.items() if name != missing}
    done = run("tpu_vm.sh", "install", DRY_RUN="1", **given)
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr


def test_install_copies_the_checkout_to_every_worker_and_installs_it():
    archive, copy, install = commands(run("tpu_vm.sh", "install", DRY_RUN="1", **TPU))
    assert archive[:2] == ["git", "archive"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert {"pod:sdpo-jax.tar.gz", "--worker=all", "--zone=z-a", "--project=p"} <= set(copy)
    assert install[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "pip install -q -e '.[train,tpu]'" in install[-1]


def test_run_gives_every_worker_the_same_command_with_its_words_intact():
    words = ["configs/nano.toml", "--run-dir", "/mnt/a b"]
    (command,) = commands(run("tpu_vm.sh", "run", *words, DRY_RUN="1", **TPU))
    assert "--worker=all" in command
    remote = shlex.split(command[-1].removeprefix("--command="))
    assert remote == [
        "cd",
        "sdpo-jax",
        "&&",
        "SDPO_COORDINATOR=auto",
        ".venv/bin/sdpo",
        "train",
        *words,
    ]


def test_fetch_copies_the_run_from_the_first_worker():
    (command,) = commands(run("tpu_vm.sh", "fetch", "/mnt/run", "here", DRY_RUN="1", **TPU))
    assert {"--recurse", "pod:/mnt/run", "here", "--worker=0"} <= set(command)
