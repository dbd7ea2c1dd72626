"""The table of ablations: every row is a recipe, and one training step of each runs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny

from sdpo_jax.config.resolved import differences
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.objectives import SdpoConfig, make_objective
from sdpo_jax.run.recipes import load_recipe
from sdpo_jax.training import trainer as trainer_module
from sdpo_jax.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "nano.toml"
ROWS = re.findall(r"^\| (.+) \| `(--.+)` \|$", (ROOT / "docs" / "ablations.md").read_text(), re.M)
TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)


def config_of(options):
    return load_recipe(RECIPE, shlex.split(options))


@pytest.mark.parametrize("options", [x for _, x in ROWS], ids=[name for name, _ in ROWS])
def test_every_row_is_a_recipe_and_says_what_it_changes(options):
    changed, plain = config_of(options), load_recipe(RECIPE)
    keys = [w.removeprefix("--").replace("-", "_") for w in options.split() if w[:2] == "--"]
    differs = [line.partition(":")[0] for line in differences(plain, changed)]
    assert set(differs) <= {key.replace(".no_", ".") for key in keys}
    assert isinstance(changed.objective, SdpoConfig)


def test_the_table_is_there_and_names_nothing_twice():
    assert len(ROWS) >= 40 and len({name for name, _ in ROWS}) == len(ROWS)


class Judge:
    """Questions by number; every third answer passes, the others hear why not."""

    train = tuple(Prompt(f"{i}", ({"role": "user", "content": f"{i}?"},), {}) for i in range(32))
    held_out = ()
    graded = 0

    def grade(self, prompt, response):
        del prompt, response
        self.graded += 1
        passed = self.graded % 3 == 0
        return Outcome(float(passed), passed, "" if passed else f"{self.graded} is wrong", {})


@pytest.mark.slow
@pytest.mark.parametrize("options", [x for _, x in ROWS], ids=[name for name, _ in ROWS])
def test_one_step_of_every_row_moves_the_model(options, monkeypatch):
    monkeypatch.setattr(trainer_module, "make_mesh", lambda config: tiny.make_devices().mesh)
    monkeypatch.setattr(jax, "jit", tiny.quick_jit)
    config = config_of(options)
    sizes = replace(config.rollout, max_response_tokens=5)
    config = replace(config, rollout=sizes, train=replace(config.train, micro_batch_tokens=2048))
    objective, model = make_objective(config.objective), tiny.make_model(ARCHITECTURE)
    trainer = Trainer(config, model, TOKENIZER, Judge(), objective=objective)
    start = trainer.initial_state(tiny.make_params(ARCHITECTURE, scale=0.5))
    _, row = trainer.step(start, 1)
    assert row["updates"] == config.train.mini_batches and row["skipped"] == 0
    assert row["grad_norm"] > 0
