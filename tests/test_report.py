"""The JSON of `sdpo eval` holds what its numbers were computed from, and the table shows them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.evaluation.estimators import (
    Measure,
    best_at_k,
    estimate,
    majority_at_k,
    paired_difference,
    pass_at_k,
)
from sdpo_jax.evaluation.measures import Graded, teacher_measures
from sdpo_jax.evaluation.report import evaluation, report, table
from sdpo_jax.run.recipes import default_config

PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"{i}?"},), {"family": "ab"[i % 2]})
    for i in range(12)
]
GROUP = 5


def drawn(seed, chance, group=GROUP):
    """Random samples; one of each twelve could not be graded."""
    random, n = np.random.default_rng(seed), len(PROMPTS) * group
    outcomes = [
        not_graded("gone")
        if i % 12 == 5
        else Outcome(0.5 * passed + 0.25 * random.integers(2), bool(passed), "", {})
        for i, passed in enumerate(random.random(n) < chance)
    ]
    return Graded(
        [str(text) for text in random.integers(4, size=n)],
        outcomes,
        random.integers(1, 30, size=n).tolist(),
        (random.random(n) < 0.9).tolist(),
        (-30 * random.random(n)).tolist(),
        random.random(n).tolist(),
    )


def evaluated(seed, chance):
    sampled = drawn(seed, chance)
    answers = [text if text != "0" else None for text in sampled.responses]
    rows = [i for i in range(len(sampled.responses)) if i % 3]
    replies = drawn(seed + 1, 0.7, group=len(rows) // len(PROMPTS))
    replies = Graded(*(column[: len(rows)] for column in replies))
    rows = rows[: len(replies.responses)]
    teacher = teacher_measures(
        sampled, replies, rows, [("feedback", "demonstration")[i % 2] for i in rows], len(PROMPTS)
    )
    return evaluation(PROMPTS, sampled, answers, drawn(seed + 2, chance, group=1), teacher)


@pytest.fixture(scope="module")
def made():
    rows = {"start": evaluated(0, 0.2), "step 6": evaluated(10, 0.6)}
    return report(rows, default_config(seed=4), GROUP)


def measure(rows, value, weight=lambda p: 1.0, share=True):
    """A measure from the prompts of the JSON."""
    numbers = np.asarray([(value(p), weight(p)) for p in rows], np.float64)
    return Measure(numbers[:, 0], numbers[:, 1], share)


def graded_of(prompt, key):
    pairs = zip(prompt[key], prompt["passed"], strict=True)
    return [value for value, passed in pairs if passed is not None]


def recomputed(prompts):
    """Metrics anew, from what the JSON says of each prompt."""
    found = {
        "accuracy": measure(prompts, lambda p: p["successes"], lambda p: p["samples"]),
        "response_tokens": measure(
            prompts, lambda p: sum(graded_of(p, "tokens")), lambda p: p["samples"], share=False
        ),
        "truncated": measure(
            prompts, lambda p: sum(graded_of(p, "truncated")), lambda p: p["samples"]
        ),
        "entropy": measure(
            prompts,
            lambda p: -sum(graded_of(p, "log_probs")),
            lambda p: sum(graded_of(p, "tokens")),
            share=False,
        ),
        "accuracy_greedy": measure(
            prompts, lambda p: bool(p["greedy"]), lambda p: p["greedy"] is not None
        ),
    }
    for name in prompts[0]["teacher"]:
        found[name] = measure(
            prompts, lambda p, n=name: p["teacher"][n][0], lambda p, n=name: p["teacher"][n][1]
        )
    for k in (1, 2, 4, 5):

        def of(estimator, k=k, share=True):
            has = [p["samples"] >= k for p in prompts]
            numbers = [estimator(p, k) if h else 0.0 for p, h in zip(prompts, has, strict=True)]
            return Measure(np.asarray(numbers), np.asarray(has, np.float64), share)

        found[f"pass_at_{k}"] = of(lambda p, k: pass_at_k(p["samples"], p["successes"], k))
        found[f"best_at_{k}"] = of(lambda p, k: best_at_k(graded_of(p, "rewards"), k), share=False)
        if k > 2:
            found[f"maj_at_{k}"] = of(
                lambda p, k: majority_at_k(graded_of(p, "answers"), graded_of(p, "passed"), k)
            )
    return found


def test_every_metric_follows_from_what_the_json_says_of_the_prompts(made):
    made = json.loads(json.dumps(made, allow_nan=False))
    rows = {name: recomputed(row["prompts"]) for name, row in made["rows"].items()}
    seed = made["settings"]["seed"]
    assert seed == 4
    for name, measures in rows.items():
        metrics = made["rows"][name]["metrics"]
        for metric, one in measures.items():
            found = estimate(one, seed=seed)
            assert list(metrics[metric].values()) == pytest.approx(list(found)), metric
    assert set(made["differences"]) == {"step 6"}
    for metric, one in rows["start"].items():
        found = paired_difference(one, rows["step 6"][metric], seed=seed)
        expected = made["differences"]["step 6"][metric]
        assert list(expected.values()) == pytest.approx(list(found)), metric
    rest = set(made["rows"]["start"]["metrics"]) - set(rows["start"])
    assert rest == {
        *("accuracy/a", "accuracy/b", "repetition", "most_common_output"),
        *("response_tokens/p50", "response_tokens/p95", "environment/failed"),
    }


def test_a_value_lies_in_its_interval(made):
    for metrics in [row["metrics"] for row in made["rows"].values()] + [
        made["differences"]["step 6"]
    ]:
        with_interval = [e for e in metrics.values() if e["low"] is not None]
        assert len(with_interval) > 15
        assert all(e["low"] <= e["value"] <= e["high"] for e in with_interval)


def test_the_json_survives_being_written_and_read(made):
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_the_table_shows_every_metric_with_interval_and_difference(made):
    head, *lines = table(made).splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["start", "step 6", "step 6 - start"]
    shown = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines}
    assert set(shown) == set(made["rows"]["start"]["metrics"])
    for name, cells in shown.items():
        columns = [made["rows"]["start"], made["rows"]["step 6"]]
        estimates = [c["metrics"][name] for c in columns] + [made["differences"]["step 6"][name]]
        for cell, found in zip(cells, estimates, strict=True):
            numbers = [float(x) for x in re.findall(r"[-+]?[\d.]+", cell)]
            expected = [x for x in found.values() if x is not None]
            assert numbers == pytest.approx(expected, abs=0.0006)
    names = list(shown)
    assert names[:3] == ["accuracy", "accuracy/a", "accuracy/b"]  # parts below their metric


def test_the_documentation_names_every_key_of_the_json(made):
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    known = set(re.findall(r"`([\w/]+)`", text))
    row = made["rows"]["start"]
    keys = {*made, *made["settings"], *row, *row["prompts"][0], *row["metrics"]["accuracy"]}
    assert sorted(keys - known) == []
    plain = {re.sub(r"_at_\d+", "_at_K", name) for name in row["metrics"]}
    families = {"accuracy/a", "accuracy/b"}
    assert sorted(plain - known - families) == []


def test_one_evaluation_alone_has_no_differences():
    made = report({"start": evaluated(0, 0.2)}, default_config(), GROUP)
    assert made["differences"] == {}
    assert table(made).splitlines()[0].split() == ["start"]
