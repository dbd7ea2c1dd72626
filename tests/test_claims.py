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


def load(name):
    """A script as a module; its own imports are beside it."""
    sys.path.insert(0, str(CLAIMS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(CLAIMS))


def record(name, number, holds, **more):
    cell = {"values": [0.5], "mean": 0.5, "low": 0.25, "high": 0.75}
    because = "siblings only - GRPO 0.25 [0.125, 0.5]; shares -1e-3 [-1, 2]"
    verdict = {"number": number, "claim": "it is so", "holds": holds, "because": because}
    return {
        "name": name,
        "command": f"python {name}.py",
        "about": "Title.\n\n    a command\n\nWhat it is about.",
        "seeds": [1, 2],
        "quick": False,
        "seconds": 120,
        "versions": {"jax": "0", "python": "3"},
        "table": {"arm": {"accuracy": cell}},
        "verdicts": [verdict],
        **more,
    }


def test_the_table_has_a_row_of_four_columns_for_each_claim():
    table = load("table")
    text = table.readme_table([record("one", 2, True), record("two_three", 7, True)])
    _, _, *rows = text.splitlines()
    assert len(rows) == len(table.CLAIMS) == 11
    assert all(row.count("|") == 5 for row in rows)
    assert rows[1].endswith("| **holds** | +25 points over GRPO | [one](docs/claims.md#one) |")
    assert rows[0].endswith("| not measured yet |  |  |")
    assert "[two three](docs/claims.md#two-three)" in rows[6]
    mixed = table.readme_table([record("one", 7, True), record("two", 7, False)])
    assert "| in part |" in mixed.splitlines()[2 + 6]
    refuted = table.readme_table([record("one", 7, False)])
    assert "| does not hold |" in refuted.splitlines()[2 + 6]


def test_a_number_is_found_by_the_words_before_it_and_its_doubt_stands_beside_it():
    table = load("table")
    text = "a - b -0.2 [-0.213, -0.188]; ratio: 1.31 [-1e-05, 1.34]; c 5 of 7"
    found = table.Found({"arm": {"x": {"mean": 0.5}}}, text)
    assert found.said("a - b") == (-0.2, -0.213, -0.188)
    assert found.said("ratio") == (1.31, -1e-5, 1.34)
    assert found.differences() == [-0.2, 1.31]
    assert found.cell("arm", "x") == 0.5
    with pytest.raises(SystemExit, match="expected an interval after 'c'"):
        found.said("c")
    doubtful = record("one", 2, True)
    doubtful["verdicts"][0]["because"] = "siblings only - GRPO -0.01 [-0.1, 0.1]"
    text = table.readme_table([doubtful])
    assert "\u22121.0 points over GRPO (interval includes 0)" in text


def test_a_slower_step_reads_as_slower():
    table = load("table")
    for ratio, words in ((1.31, "1.31 x GRPO's step time (slower)"), (0.9, "(faster)")):
        one = record("step_time", 11, True)
        one["table"] = {"setting C": {"ratio": {"mean": ratio}}}
        assert words in table.readme_table([one])


def test_every_claim_of_the_readme_has_a_verdict_a_number_and_a_link():
    table = load("table")
    records = table.read_results(ROOT / "docs" / "claims", CLAIMS)
    for row in table.readme_table(records).splitlines()[2:]:
        claim, verdict, number, link = row.strip("| ").split(" | ")
        assert verdict in ("**holds**", "in part", "does not hold") and link.startswith("[")
        assert any(letter.isdigit() for letter in number), claim


def test_the_page_shows_every_record_with_its_tables_and_no_picture_that_is_not_there(tmp_path):
    table = load("table")
    more = {"tables": {"More": record("x", 1, True)["table"]}, "rates": {"arm": {"1e-3": 0.5}}}
    (tmp_path / "a.svg").write_text("<svg/>")
    text = table.page([record("one_two", 2, False, pictures=["a.svg"], **more)], tmp_path)
    for part in (
        "## one two",
        "What it is about.",
        "| arm | 0.5 [0.25, 0.75] |",
        "**Does not hold** (claim 2): it is so. siblings only - GRPO 0.25 [0.125, 0.5]",
        "* **Best-of-k**: ",
        "More:",
        "1e-3: 0.500",
        "(claims/a.svg)",
    ):
        assert part in text
    with pytest.raises(SystemExit, match="missing"):
        table.page([record("one", 1, False, pictures=["b.svg"])], tmp_path)


def test_results_of_quick_runs_are_no_results(tmp_path):
    table = load("table")
    (tmp_path / "one.json").write_text(json.dumps(record("one", 2, True)))
    (tmp_path / "two.json").write_text(json.dumps(record("two", 1, True)))
    assert [r["name"] for r in table.read_results(tmp_path)] == ["two", "one"]
    (tmp_path / "two.json").write_text(json.dumps(record("two", 1, True, quick=True)))
    with pytest.raises(SystemExit, match=r"two\.json"):
        table.read_results(tmp_path)


def test_readme_and_page_are_what_the_results_say():
    words = [sys.executable, str(CLAIMS / "table.py"), "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def made_up(steps):
    """A run of the given training metrics."""
    rows = [{"step": i, "generations": i, **row} for i, row in enumerate(steps, start=1)]
    return load("runs").Run([{"accuracy": 0.9}, {"accuracy": 0.3}], rows, 1.0)


def test_falls_and_alarms_are_found_where_they_were_made():
    script = load("regularisation")
    calm = {"reward": 0.9, "student_entropy": 0.01, "repetition": 0.0, "truncated": 0.0}
    steady = made_up([calm] * 100)
    assert script.fall(steady) is None
    assert script.alarm(steady, "student_entropy", 0.01) is None
    # Entropy trebles from step 51 on; reward drops to 0.3 from step 71 on: after 4 of 10 such steps
    # its mean is 0.24 lower.
    moved, fallen = calm | {"student_entropy": 0.03}, {"student_entropy": 0.03, "reward": 0.3}
    run = made_up([calm] * 50 + [moved] * 20 + [calm | fallen] * 30)
    assert script.fall(run) == 74
    assert script.alarm(run, "student_entropy", 0.019) == 55
    assert script.alarm(run, "student_entropy", 0.04) is None
    assert script.collapsed(run) == 1.0
    # Before it has learned, a run is no measure: an early peak of one that holds is not looked at.
    early = made_up([calm | {"student_entropy": 0.5}] * 10 + [calm] * 90)
    table = script.diagnostics(
        {arm: [early, steady] for arm in script.HOLD}
        | {"EMA 0.05 (default)": [run, steady], "rate falls": [run], "live": [], "EMA 0.5": []}
    )
    row = table["student's entropy"]
    assert row["default: rings before"]["values"] == [1.0, 1.0]
    assert row["default: steps before"]["values"] == [23.0, 23.0]
    assert row["quick: rings before"]["values"] == [0.0]
    assert table["repetition"]["default: rings before"]["values"] == [0.0, 0.0]


def test_a_finished_run_of_other_options_is_refused(runs, tmp_path):
    (tmp_path / "arm_1.asked.json").write_text(json.dumps(["recipe.toml", "--seed", "1"]))
    with pytest.raises(SystemExit, match="other options"):
        runs.run_to_end("recipe.toml", tmp_path / "arm_1", ["--seed", "2"])


SCRIPTS = {
    "sample_efficiency": ["SDPO", "SDPO siblings only", "GRPO"],
    "credit_and_context": 10,
    "regularisation": 9,
    "sizes": 4,
    "length": ["SDPO", "GRPO"],
    "continual": ["SFT", "SDFT", "SFT, another hand", "SDFT, another hand"],
    "discovery": ["SDPO", "best-of-k", "asking in turns"],
    "step_time": ["setting A", "setting C"],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_in_short_writes_its_results_and_reads_finished_runs(name, tmp_path):
    words = [sys.executable, str(CLAIMS / f"{name}.py"), "--quick", "--seeds", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    paths = os.pathsep.join(str(ROOT / name) for name in ("models", ""))
    environment = {**os.environ, "PYTHONPATH": paths}
    text = [
        subprocess.run(words, check=True, capture_output=True, cwd=ROOT, env=environment).stdout
        for _ in range(1 if name == "step_time" else 2)
    ]
    assert text[0] == text[-1]
    record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert record["quick"] and record["seeds"] == [1]
    arms = SCRIPTS[name]
    assert list(record["table"]) == arms or len(record["table"]) == arms
    for measures in record["table"].values():
        for cell in measures.values():
            assert cell["low"] <= cell["mean"] <= cell["high"]
    assert all(verdict["number"] in load("table").CLAIMS for verdict in record["verdicts"])
    for picture in record.get("pictures", ()):
        assert (tmp_path / "results" / picture).read_text().startswith("<svg")
