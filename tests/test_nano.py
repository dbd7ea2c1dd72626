"""The embedded model is what the README says it is: small, honest, able to read its context."""

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from sdpo_jax.api import load_components
from sdpo_jax.config import EvaluationConfig
from sdpo_jax.data.tool_call_corpus import ToolCallCorpus
from sdpo_jax.evaluation.evaluator import Evaluator, Graded, accuracy_metrics
from sdpo_jax.evaluation.measures import values
from sdpo_jax.model import Params
from sdpo_jax.run.components import RunComponents, make_trainer
from sdpo_jax.run.evaluate import make_evaluator
from sdpo_jax.run.recipes import default_config, load_recipe
from sdpo_models.nano import FOLDER
from sdpo_models.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def components() -> RunComponents:
    return load_components(default_config())


@pytest.fixture(scope="module")
def params(components: RunComponents) -> Params:
    return components.params()


@pytest.fixture(scope="module")
def evaluator(components: RunComponents) -> Evaluator:
    config = replace(
        load_recipe("configs/nano.toml"),
        evaluation=EvaluationConfig(prompts=120, samples_per_prompt=4, batch_prompts=120),
        train=replace(default_config().train, steps=1),
    )
    return make_evaluator(make_trainer(config, components), components.environment)


@pytest.fixture(scope="module")
def sampled(evaluator: Evaluator, params: Params) -> Graded:
    return evaluator.attempts(params, 0)


def test_it_has_at_most_4_million_parameters_in_at_most_8_megabytes(params: Params) -> None:
    assert sum(x.size for x in jax.tree.leaves(params)) <= 4_000_000
    assert sum(f.stat().st_size for f in FOLDER.iterdir() if f.is_file()) <= 8_000_000
    assert {f.name for f in FOLDER.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.slow
def test_alone_it_mostly_fails_sampled_and_greedy(
    evaluator: Evaluator, params: Params, sampled: Graded
) -> None:
    alone = accuracy_metrics(sampled, evaluator.prompts)
    assert 0.01 < alone["accuracy"] < 0.2
    greedy = evaluator.attempts(params, 0, samples=1, temperature=0.0)
    assert accuracy_metrics(greedy, evaluator.prompts)["accuracy"] < 0.2


@pytest.mark.slow
def test_on_at_least_one_family_it_succeeds_in_under_3_percent_of_attempts(
    evaluator: Evaluator, sampled: Graded
) -> None:
    alone = accuracy_metrics(sampled, evaluator.prompts)
    families = {k: v for k, v in alone.items() if k.startswith("accuracy/")}
    assert len(families) == 6
    assert min(families.values()) < 0.03


@pytest.mark.slow
def test_it_fails_in_the_call_s_content_not_in_its_form(sampled: Graded) -> None:
    well_formed = [outcome.metrics["well_formed"] for outcome in sampled.outcomes]
    assert np.mean(well_formed) > 0.97
    assert np.mean(sampled.stopped) > 0.97


@pytest.mark.slow
def test_context_helps_a_sibling_s_solution_most_feedback_clearly(
    evaluator: Evaluator, params: Params, sampled: Graded
) -> None:
    alone = accuracy_metrics(sampled, evaluator.prompts)["accuracy"]
    shown = values(evaluator.teacher_measures(params, sampled, 0))
    assert shown["teacher_accuracy/demonstration"] > 0.75
    assert shown["teacher_accuracy/feedback"] > alone + 0.3


def test_the_tokenizer_is_the_one_that_its_script_makes(tmp_path: Any) -> None:
    from sdpo_models.nano.make import ARCHITECTURE, write_tokenizer

    write_tokenizer(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made["model"] == json.loads((FOLDER / "tokenizer.json").read_text())["model"]
    assert ARCHITECTURE.vocabulary == 512


def test_every_row_of_its_corpus_fits_the_pretraining_recipe() -> None:
    tokenizer = ChatTokenizer.from_pretrained(FOLDER)
    limit = load_recipe("configs/nano_pretrain.toml").data.max_tokens
    corpus = ToolCallCorpus()
    for i in range(2000):
        row = corpus[i]
        assert len(tokenizer.render(row.messages)) + len(tokenizer.encode(row.response)) < limit


@pytest.mark.parametrize("recipe", ["nano", "nano_grpo"])
def test_every_prompt_fits_the_recipe(recipe: str, components: RunComponents) -> None:
    limit = load_recipe(f"configs/{recipe}.toml").rollout.max_prompt_tokens
    environment, tokenizer = components.environment, components.tokenizer
    prompts = [*environment.train, *environment.held_out]
    assert max(len(tokenizer.render(prompt.messages)) for prompt in prompts) <= limit
