"""Values of a config: what is wrong, what survives a round trip, what a resumed run may change."""

import itertools
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest

from sdpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Problem,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
    at_least,
    between,
    setting,
)
from sdpo_jax.config.checks import problems
from sdpo_jax.config.resolved import differences, fingerprint, to_toml
from sdpo_jax.environments.kinds.code import CodeConfig
from sdpo_jax.environments.kinds.tool_calls import ToolCallsConfig
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig
from sdpo_jax.run.recipes import KINDS, default_config, load_recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


UNSOUND = [
    (
        default_config(rollout=RolloutConfig(rollouts_per_prompt=1)),
        "rollout.rollouts_per_prompt: 1, exp",
    ),
    (
        default_config(objective=GrpoConfig(), rollout=RolloutConfig(rollouts_per_prompt=1)),
        "rollout.rollouts_per_prompt: 1, expected at least 2 with grpo",
    ),
    (
        default_config(teacher=TeacherConfig(demonstration="none", feedback=False)),
        'teacher.demonstration: "none", expected "first", "shortest" or "random", or teacher.feed',
    ),
    (
        default_config(teacher=TeacherConfig(max_prompt_tokens=64)),
        "teacher.max_prompt_tokens: 64, expected",
    ),
    (
        default_config(teacher=TeacherConfig(ema_rate=1.5)),
        "teacher.ema_rate: 1.5, expected from 0 to 1",
    ),
    (
        default_config(objective=SdpoConfig(alpha=-0.1)),
        "objective.alpha: -0.1, expected from 0 to 1",
    ),
    (
        default_config(objective=SdpoConfig(importance_cap=0.0)),
        "objective.importance_cap: 0.0, expected",
    ),
    (
        default_config(objective=SdpoConfig(alpha=float("nan"))),
        "objective.alpha: nan, expected from 0",
    ),
    (
        default_config(rollout=RolloutConfig(temperature=0.0)),
        "rollout.temperature: 0.0, expected above 0",
    ),
    (
        default_config(rollout=RolloutConfig(prompts_per_step=0)),
        "rollout.prompts_per_step: 0, expected at",
    ),
    (
        default_config(evaluation=EvaluationConfig(temperature=-1.0)),
        "evaluation.temperature: -1.0, expected",
    ),
    (
        default_config(evaluation=EvaluationConfig(prompts=257)),
        "evaluation.prompts: 257, expected at most e",
    ),
    (
        default_config(environment=ToolCallsConfig(train_prompts=8)),
        "rollout.prompts_per_step: 16, expecte",
    ),
    (
        default_config(train=TrainConfig(mini_batches=3)),
        "train.mini_batches: 3, expected a divisor of roll",
    ),
    (
        default_config(objective=SftConfig(), train=TrainConfig(mini_batches=3)),
        "train.mini_batches: 3, expected a divisor of data.rows_per_step (64)",
    ),
    (
        default_config(optimizer=OptimizerConfig(learning_rate=0.0)),
        "optimizer.learning_rate: 0.0, expected",
    ),
    (
        default_config(optimizer=OptimizerConfig(schedule="cosine", warmup_steps=60)),
        "optimizer.warmup_steps: 60, expected below the run's 60 updates",
    ),
    (default_config(mesh=MeshConfig(data=0)), "mesh.data: 0, expected at least 1, or -1"),
    (default_config(mesh=MeshConfig(tensor=-1)), "mesh.tensor: -1, expected at least 1"),
    (default_config(seed=-1), "seed: -1, expected from 0 to 4294967295"),
]


@pytest.mark.parametrize(("config", "expected"), UNSOUND)
def test_a_value_out_of_range_is_told_with_its_expectation(config: Config, expected: str):
    (line,) = problems(config)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "config",
    [
        default_config(evaluation=EvaluationConfig(temperature=0.0, every_steps=0)),
        default_config(objective=SdpoConfig(alpha=0.0, importance_cap=float("inf"))),
        default_config(objective=SdpoConfig(alpha=1.0), mesh=MeshConfig(2, 2, 2)),
        default_config(
            rollout=RolloutConfig(rollouts_per_prompt=1),
            teacher=TeacherConfig(demonstration="none"),
        ),
        default_config(
            objective=SftConfig(),
            rollout=RolloutConfig(rollouts_per_prompt=1),
            teacher=TeacherConfig(demonstration="none", feedback=False),
        ),
        default_config(train=TrainConfig(steps=2), optimizer=OptimizerConfig(warmup_steps=5)),
    ],
)
def test_the_ends_of_the_ranges_are_sound(config: Config):
    assert problems(config) == []


def every_setting():
    for section, part in get_type_hints(Config).items():
        kinds = {"objective": KINDS.objectives, "environment": KINDS.environments}
        for cls in kinds[section].values() if section in kinds else [part]:
            hints = get_type_hints(cls) if is_dataclass(cls) else {}
            for field in fields(cls) if hints else []:
                yield f"{section}.{field.name}", hints[field.name], field
    for field in fields(Config):
        if field.name in ("seed", "run_dir"):
            yield field.name, get_type_hints(Config)[field.name], field


def test_every_number_has_a_range_that_its_default_is_in():
    for key, kind, field in every_setting():
        permitted = field.metadata.get("range")
        assert (permitted is not None) == (kind in (int, float)), key
        if permitted is not None:
            assert permitted.holds(field.default) and not permitted.holds(math.nan), key


ROUND_TRIPS = [
    default_config(),
    default_config(
        run_dir='C:\\runs\\"ä"\t\x7f\u2028 #',
        seed=7,
        objective=GrpoConfig(clip_low=1e-7),
        environment=ToolCallsConfig(families=("a", 'b"', "")),
        optimizer=OptimizerConfig(learning_rate=1e22, clip_norm=float("inf")),
        teacher=TeacherConfig(feedback=False),
    ),
    default_config(objective=SftConfig(reduction="sequence_mean"), model=ModelConfig(path="")),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_resolved_config_round_trips(config: Config, tmp_path: Path):
    text = to_toml(config)
    assert load_recipe(write(tmp_path, text)) == config
    assert text.startswith("# Every setting of a run, written by sdpo-jax ")
    assert to_toml(load_recipe(write(tmp_path, text))) == text


@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """An objective from outside the package."""

    name: Literal["toy"] = "toy"
    strength: float = setting(0.5, between(0, 1))
    alpha: float = 2.0
    """Without a range, and beside the settings of the same name with one."""
    steepness: int = setting(3, at_least(1), may_change=True)

    @property
    def depends_on_steps(self) -> bool:
        return self.strength > 0.9

    def check(self, config: Config):
        if config.rollout.rollouts_per_prompt % 2:
            yield Problem("rollout.rollouts_per_prompt", "an even number with toy")


def test_an_objective_from_outside_is_read_checked_and_written(tmp_path: Path):
    path = write(tmp_path, '[objective]\nname = "toy"\nstrength = 0.25')
    toys = {"objectives": [ToyConfig]}
    config = load_recipe(path, ["--objective.steepness", "5"], **toys)
    assert config == default_config(objective=ToyConfig(strength=0.25, steepness=5))
    assert load_recipe(write(tmp_path, to_toml(config)), **toys) == config
    with pytest.raises(UserError) as caught:
        words = ["--objective.strength=2", "--objective.steepness=0"]
        load_recipe(path, [*words, "--rollout.rollouts-per-prompt=3"], **toys)
    assert str(caught.value).splitlines()[1:] == [
        "  --objective.strength: 2.0, expected from 0 to 1",
        "  --objective.steepness: 0, expected at least 1",
        "  --rollout.rollouts-per-prompt: 3, expected an even number with toy",
    ]
    with pytest.raises(UserError, match=r"did you mean objective\.strength"):
        load_recipe(write(tmp_path, '[objective]\nname = "toy"\nstrenth = 1'), **toys)
    with pytest.raises(UserError, match='expected one of "sdpo", "grpo", "sft", "sdft"'):
        load_recipe(write(tmp_path, to_toml(config)))


def test_an_objective_from_outside_says_what_a_resumed_run_may_change():
    def toy(steps=60, **settings):
        return default_config(objective=ToyConfig(**settings), train=TrainConfig(steps=steps))

    assert differences(toy(), toy(steepness=9, steps=61)) == []
    assert fingerprint(toy()) == fingerprint(toy(steepness=9, steps=61))
    assert len(differences(toy(strength=1.0), toy(strength=0.95, steps=61))) == 2


RESUMABLE = [
    default_config(),
    default_config(run_dir="elsewhere"),
    default_config(train=TrainConfig(steps=600, micro_batch_tokens=1024, head_chunk_tokens=64)),
    default_config(checkpoint=CheckpointConfig(every_steps=3, keep=9, keep_best=False)),
    default_config(mesh=MeshConfig(data=1, fsdp=4)),
    default_config(optimizer=OptimizerConfig(max_skipped_updates=9)),
    default_config(model=ModelConfig(remat="full"), evaluation=EvaluationConfig(batch_prompts=8)),
]
NOT_RESUMABLE = [
    default_config(seed=1),
    default_config(objective=GrpoConfig()),
    default_config(objective=SdpoConfig(alpha=1.0)),
    default_config(teacher=TeacherConfig(refresh_steps=3)),
    default_config(model=ModelConfig(random_init=True)),
    default_config(evaluation=EvaluationConfig(samples_per_prompt=4)),
    default_config(train=TrainConfig(mini_batches=2)),
    default_config(data=DataConfig(source="x.jsonl")),
    default_config(environment=CodeConfig()),
    default_config(environment=CodeConfig(mounts=("/opt/site-packages",))),
    default_config(optimizer=OptimizerConfig(schedule="cosine")),
    default_config(optimizer=OptimizerConfig(schedule="cosine"), train=TrainConfig(steps=61)),
]


@pytest.mark.parametrize("config", RESUMABLE)
def test_what_a_resumed_run_may_change_leaves_the_fingerprint(config: Config):
    assert fingerprint(config) == fingerprint(default_config())
    assert differences(default_config(), config) == []


def test_what_changes_the_result_changes_the_fingerprint():
    for one, other in itertools.combinations([default_config(), *NOT_RESUMABLE], 2):
        assert fingerprint(one) != fingerprint(other)
        assert differences(one, other) != []


def test_differences_name_both_values():
    old, new = default_config(objective=SftConfig()), default_config(seed=2, objective=GrpoConfig())
    assert differences(old, new) == [
        "seed: the run has 0, the recipe has 2",
        'objective.name: the run has "sft", the recipe has "grpo"',
        "objective.clip_low: the run has nothing, the recipe has 0.2",
        "objective.clip_high: the run has nothing, the recipe has 0.28",
        "objective.dual_clip: the run has nothing, the recipe has 3.0",
        "objective.reference_kl: the run has nothing, the recipe has 0.0",
    ]
    assert differences(new, old)[2:3] == [
        "objective.clip_low: the run has 0.2, the recipe has nothing"
    ]
