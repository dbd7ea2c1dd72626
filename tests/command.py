"""The command line as a user runs it: a short run of the embedded model, and refusals."""

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from sdpo_jax.cli import main

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "nano.toml"
STEPS = 6
# Few and short, but with every kind of signal. Evaluation has the shapes of training: one program.
SETTINGS = """--rollout.prompts-per-step 4 --rollout.rollouts-per-prompt 4
    --rollout.max-prompt-tokens 64 --rollout.max-response-tokens 24
    --environment.train-prompts 48 --environment.held-out-prompts 8
    --teacher.max-prompt-tokens 128 --optimizer.warmup-steps 1 --optimizer.learning-rate 3e-3
    --train.micro-batch-tokens 1024 --evaluation.prompts 8 --evaluation.batch-prompts 4
    --evaluation.samples-per-prompt 4 --evaluation.every-steps 3 --checkpoint.every-steps 2"""


def need(*packages):
    """Skips where a package is missing."""
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def sdpo(*words):
    """Its output. One device: on the eight of the tests, weights would be in memory eight times."""
    paths = [str(ROOT), str(ROOT / "models"), os.environ.get("PYTHONPATH", "")]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_jax.cli", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_argv(run_dir, *more):
    place = ["--run-dir", str(run_dir), "--train.steps", str(STEPS)]
    return ["train", str(RECIPE), *place, *SETTINGS.split(), *more]


def refused(capsys, *words):
    """The one message of a command that ends with code 2 and without a traceback."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2, out + err
    assert "Traceback" not in out + err
    assert err.startswith("sdpo: ") and err.count("sdpo: ") == 1
    return err


def write(path, text):
    path.write_text(text)
    return str(path)


def sft_argv(tmp_path, lines, *more):
    data = write(tmp_path / "rows.jsonl", "\n".join(lines) + "\n")
    recipe = write(tmp_path / "sft.toml", 'objective.name = "sft"')
    words = ["train", recipe, "--run-dir", str(tmp_path / "run"), "--data.source", data]
    return [*words, "--evaluation.prompts", "0", *more]


def bytes_of(folder, *, without=()):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in without
    }
