"""The command line as a user runs it, for tests of whole runs."""

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
