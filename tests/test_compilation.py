"""A repeated run compiles nothing, and settings of JAX take precedence over the default cache."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sdpo_jax.compilation import Compilation, CompileCounter, persistent_cache
from sdpo_jax.rollouts.phase_timer import is_time
from sdpo_jax.run.console import Console
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.run_directory import SUMMARY

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """--train.steps 2 --rollout.prompts-per-step 4 --rollout.rollouts-per-prompt 4
    --rollout.max-prompt-tokens 64 --rollout.max-response-tokens 24
    --environment.train-prompts 48 --environment.held-out-prompts 8
    --teacher.max-prompt-tokens 128 --evaluation.prompts 4
    --evaluation.batch-prompts 4 --evaluation.samples-per-prompt 4 --evaluation.every-steps 2
    --checkpoint.every-steps 1"""
PROGRAM = [sys.executable, "-m", "sdpo_jax.cli", "train"]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FOLDER = "jax_compilation_cache_dir"
SECONDS = "jax_persistent_cache_min_compile_time_secs"
BYTES = "jax_persistent_cache_min_entry_size_bytes"
OURS = (FOLDER, SECONDS, BYTES)


def settings():
    return {name: getattr(jax.config, name) for name in OURS}


@pytest.fixture(autouse=True)
def no_settings_of_jax(monkeypatch):
    """Without the folder of conftest.py, and without the environment's."""
    for name in [*OURS, "jax_enable_compilation_cache"]:
        monkeypatch.delenv(name.upper(), raising=False)
    folder = settings()[FOLDER]
    jax.config.update(FOLDER, None)
    compilation_cache.reset_cache()
    before = settings()
    yield
    assert settings() == before
    jax.config.update(FOLDER, folder)
    compilation_cache.reset_cache()


def refuse(text):
    pytest.fail(text)


# A run


def train(home, run_dir):
    """Trains the embedded model in a process of its own; its summary and what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    process = subprocess.run(
        [
            *PROGRAM,
            str(ROOT / "configs" / "nano.toml"),
            "--run-dir",
            str(run_dir),
            *SETTINGS.split(),
        ],
        env=kept
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "XDG_CACHE_HOME": str(home)}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0 and not process.stderr, process.stdout + process.stderr
    return json.loads((run_dir / SUMMARY).read_text()), process.stdout


def rows_of(run_dir):
    return [
        {name: value for name, value in row.items() if not is_time(name)}
        for row in read_metrics(run_dir / METRICS_FILE)
    ]


def lines_of(out):
    """The steps that a run says something about, with the programs they built."""
    words = [line.split() for line in out.splitlines() if line.startswith("compiled ")]
    return {int(line[2].rstrip(":")): int(line[3]) for line in words}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_repeated_elsewhere_compiles_nothing_and_measures_the_same(tmp_path):
    home = tmp_path / "home"
    first, out = train(home, tmp_path / "first")
    built = lines_of(out)
    assert next(iter(built)) == 1 and all(built.values())
    assert first["compilation"]["programs_compiled"] == sum(built.values()) > 0
    assert first["compilation"]["programs_loaded"] == 0 < first["compilation"]["seconds"]
    kept = sorted(path.name for path in (home / "sdpo-jax" / "compilation").iterdir())
    second, out = train(home, tmp_path / "second")
    assert lines_of(out) == {1: 0}
    assert second["compilation"]["programs_compiled"] == 0
    assert second["compilation"]["programs_loaded"] == first["compilation"]["programs_compiled"]
    assert sorted(path.name for path in (home / "sdpo-jax" / "compilation").iterdir()) == kept
    assert rows_of(tmp_path / "first") == rows_of(tmp_path / "second")
    assert not any("programs" in name for row in rows_of(tmp_path / "first") for name in row)
    # The run was one with everything: an evaluation before and after, a checkpoint, and it moved.
    assert [row["step"] for row in rows_of(tmp_path / "first") if row["kind"] == "eval"] == [0, 2]
    assert (tmp_path / "first" / "checkpoints" / "2").is_dir()
    assert any(row.get("grad_norm", 0) > 0 for row in rows_of(tmp_path / "first"))


# Counting


def fresh(scale):
    """One program, in a function that JAX has not seen."""
    return jax.jit(lambda x: x * x + scale)(np.float32(2.0)).block_until_ready()


def test_programs_are_built_once_and_then_read_and_each_counter_sees_them_from_its_opening(
    tmp_path,
):
    with persistent_cache(lambda: tmp_path, refuse), CompileCounter() as outer:
        fresh(3.25)
        assert (tmp_path / "compilation").is_dir() and outer.total()[:2] == (1, 0)
        with CompileCounter() as inner:
            fresh(3.25)
        fresh(4.25)
    assert inner.total()[:2] == (0, 1)
    assert outer.total()[:2] == (2, 1) and outer.total().seconds > inner.total().seconds > 0
    fresh(5.25)
    assert outer.total()[:2] == (2, 1)


def test_a_mark_parts_what_came_before_it_from_what_came_after():
    with CompileCounter() as counter:
        fresh(1.5)
        first = counter.since_mark()
        assert counter.since_mark() == Compilation(0, 0, 0.0)
        fresh(2.5)
        fresh(3.5)
        second = counter.since_mark()
    assert (first.programs_compiled, second.programs_compiled) == (1, 2)
    assert counter.total().seconds == pytest.approx(first.seconds + second.seconds)


def test_a_counter_closes_though_somebody_has_removed_its_listeners():
    with CompileCounter() as counter:
        counter.__exit__(None, None, None)
    fresh(6.5)
    assert counter.total() == Compilation(0, 0, 0.0)


def test_a_line_says_what_a_step_compiled():
    stream = io.StringIO()
    console = Console(["reward"], steps=60, stream=stream)
    console.compilation(1, *Compilation(0, 14, 0.736))
    console.compilation(7, *Compilation(1, 2, 6.2))
    assert stream.getvalue() == (
        "compiled  step 1: 0 programs built, 14 read from the cache, 736 ms\n"
        "compiled  step 7: 1 program built, 2 read from the cache, 6.20 s\n"
    )


# The folder


def test_a_half_written_entry_is_a_warning_and_built_anew(tmp_path):
    with persistent_cache(lambda: tmp_path, refuse), CompileCounter() as counter:
        fresh(7.25)
        (entry,) = (tmp_path / "compilation").iterdir()
        entry.write_bytes(entry.read_bytes()[:-9])
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            assert float(fresh(7.25)) == 11.25
    assert counter.total()[:2] == (2, 0)


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def no_home(tmp_path):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("home", [a_file, no_home])
def test_a_folder_that_cannot_be_written_is_one_note_and_no_error(home, tmp_path):
    notes = []
    with persistent_cache(lambda: home(tmp_path), notes.append), CompileCounter() as counter:
        assert settings()[FOLDER] is None
        fresh(8.25)
        fresh(8.25)
    (note,) = notes
    assert note.startswith("cache     compiled programs are not kept: ")
    assert "JAX_COMPILATION_CACHE_DIR" in note and counter.total()[:2] == (2, 0)


@pytest.mark.parametrize("theirs", ["theirs", ""])
def test_a_folder_that_jax_was_given_is_kept_and_none_is_none(theirs, tmp_path):
    folder = str(tmp_path / theirs) if theirs else ""
    jax.config.update(FOLDER, folder)
    try:
        with persistent_cache(lambda: tmp_path / "ours", refuse):
            fresh(9.25)
            assert settings()[FOLDER] == folder
    finally:
        jax.config.update(FOLDER, None)
    assert [path.name for path in tmp_path.iterdir()] == ([theirs] if theirs else [])


def test_a_cache_that_is_switched_off_stays_off(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with persistent_cache(lambda: tmp_path, refuse):
            fresh(10.25)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not list(tmp_path.iterdir())


def test_a_threshold_in_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS.upper(), "9")
    before = settings()[SECONDS]  # JAX read the environment when it was imported
    with persistent_cache(lambda: tmp_path, refuse):
        assert settings()[SECONDS] == before and settings()[BYTES] == -1
