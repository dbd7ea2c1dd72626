"""The scripts of the claims: their statistics, and the machinery of one in two small steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("runs", CLAIMS / "runs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intervals_of_five_seeds_hold_the_mean_that_often(runs):
    random = np.random.default_rng(0)
    found = [runs.interval(random.normal(3.0, 2.0, size=5).tolist()) for _ in range(2000)]
    held = np.mean([x.low <= 3.0 <= x.high for x in found])
    assert abs(held - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    assert runs.interval([2.0]) == (2.0, 2.0, 2.0)


def test_differences_are_taken_seed_by_seed(runs):
    first, second = [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]
    assert runs.paired(first, second).low > 0.0999
    assert runs.paired(first, second[::-1]).low < 0.0


def test_what_a_level_costs_is_read_at_the_first_evaluation_that_has_it(runs):
    evaluations = [{"step": s, "accuracy": a} for s, a in ((0, 0.1), (2, 0.4), (4, 0.6))]
    steps = [
        {"step": s, "generations": 8 * s, "seconds_rollout": 1.0, "seconds_grade": 0.5}
        for s in range(1, 5)
    ]
    run = runs.Run(evaluations, steps, 9.0)
    assert run.to_reach(0.05) == (0, 0.0)
    assert run.to_reach(0.3) == (16, 1.0)  # step 1 compiles; grading lies inside the rollout
    assert run.to_reach(0.6) == (32, 3.0)
    assert run.to_reach(0.7) is None


@pytest.mark.slow
def test_a_script_trains_its_arms_writes_its_results_and_reads_finished_runs(tmp_path):
    words = [sys.executable, str(CLAIMS / "sample_efficiency.py"), "--quick", "--seeds", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    paths = os.pathsep.join(str(ROOT / name) for name in ("models", ""))
    environment = {**os.environ, "PYTHONPATH": paths}
    text = [
        subprocess.run(words, check=True, capture_output=True, cwd=ROOT, env=environment).stdout
        for _ in range(2)
    ]
    assert text[0] == text[1]
    record = json.loads((tmp_path / "results" / "sample_efficiency.json").read_text())
    assert record["quick"] and record["seeds"] == [1]
    assert list(record["table"]) == ["SDPO", "SDPO siblings only", "GRPO"]
    for measures in record["table"].values():
        assert len(measures["accuracy"]["values"]) == 1
        assert 0.0 <= measures["accuracy"]["mean"] <= 1.0
    assert len(record["verdicts"]) == 5
