"""Recipes: what is accepted, what an error says, what survives a round trip."""

import itertools
import math
import re
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
    recipe,
    setting,
)
from sdpo_jax.config.checks import problems
from sdpo_jax.config.resolved import differences, fingerprint, flatten, to_toml
from sdpo_jax.environments.kinds.code import CodeConfig
from sdpo_jax.environments.kinds.tool_calls import ToolCallsConfig
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig
from sdpo_jax.run.recipes import KINDS, default_config, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_committed_recipe_parses_and_round_trips(path: Path, tmp_path: Path):
    config = load_recipe(path)
    assert load_recipe(write(tmp_path, to_toml(config))) == config


# Tables 12 and 13 of arXiv 2601.20802 (v2), and what its scripts add. Of GRPO, the default column.
BOTH = {
    **{"rollout.prompts_per_step": 32, "rollout.rollouts_per_prompt": 8},
    **{"rollout.max_prompt_tokens": 2048, "rollout.max_response_tokens": 8192},
    **{"rollout.temperature": 1.0, "evaluation.temperature": 0.6, "evaluation.top_p": 0.95},
    **{"optimizer.weight_decay": 0.01, "optimizer.clip_norm": 1.0, "optimizer.b2": 0.999},
    **{"optimizer.schedule": "constant", "evaluation.every_steps": 5},
}
SIBLINGS = {
    **{"objective.name": "sdpo", "objective.alpha": 0.5, "objective.top_k": 100},
    **{"objective.importance_cap": 2.0, "teacher.ema_rate": 0.05, "teacher.feedback": False},
    **{"teacher.max_prompt_tokens": 10240, "evaluation.samples_per_prompt": 16},
    **{"optimizer.learning_rate": 1e-5, "optimizer.warmup_steps": 10, "train.mini_batches": 1},
}
FEEDBACK = SIBLINGS | {
    **{"objective.alpha": 1.0, "objective.top_k": 20, "teacher.ema_rate": 0.01},
    **{"teacher.feedback": True, "evaluation.samples_per_prompt": 4},
    **{"optimizer.learning_rate": 1e-6, "optimizer.warmup_steps": 0, "train.mini_batches": 32},
}
GRPO = {
    **{"objective.name": "grpo", "objective.clip_low": 0.2, "objective.clip_high": 0.28},
    **{"optimizer.learning_rate": 1e-6, "train.mini_batches": 4},
    **{"optimizer.warmup_steps": 40, "evaluation.samples_per_prompt": 16},  # 10 steps of 4 updates
}
PAPER = {
    **{"qwen3_8b_sdpo": SIBLINGS, "olmo3_7b_sdpo": SIBLINGS},
    **{"qwen3_8b_sdpo_feedback": FEEDBACK, "qwen25_7b_sdpo": FEEDBACK},
    **{"qwen3_8b_grpo": GRPO, "olmo3_7b_grpo": GRPO},
    "qwen25_7b_grpo": GRPO | {"optimizer.warmup_steps": 0, "evaluation.samples_per_prompt": 4},
}


# Of the sweep of arXiv 2601.19897, and of its released code.
SDFT = {
    **{"objective.name": "sdft", "objective.alpha": 0.0, "objective.skip_first_tokens": 3},
    **{"objective.importance_cap": 2.0, "objective.reduction": "sequence_mean"},
    **{"rollout.rollouts_per_prompt": 1, "rollout.max_prompt_tokens": 2048},
    **{"rollout.max_response_tokens": 2048, "rollout.temperature": 1.0},
    **{"data.rows_per_step": 32, "teacher.weights": "ema", "teacher.ema_rate": 0.01},
    **{"optimizer.learning_rate": 1e-5, "optimizer.warmup_steps": 10},
    **{"optimizer.schedule": "cosine", "optimizer.weight_decay": 0.0},
    **{"optimizer.clip_norm": 1.0, "evaluation.temperature": 0.0},
}


def test_the_recipe_of_sdft_holds_its_papers_settings():
    leaves = flatten(load_recipe(RECIPES[0].with_name("qwen25_7b_sdft.toml")))
    assert {key: leaves[key] for key in SDFT} == SDFT


def test_sft_and_sdft_on_the_embedded_model_differ_in_nothing_but_the_objective():
    sft, sdft = (
        flatten(load_recipe(RECIPES[0].with_name(f"nano_{name}.toml"))) for name in ("sft", "sdft")
    )
    shared = {
        key for key in sft.keys() & sdft.keys() if not key.startswith(("objective", "teacher"))
    }
    other = {key for key in shared if sft[key] != sdft[key]}
    assert other <= {"rollout.rollouts_per_prompt", "data.max_tokens", "optimizer.learning_rate"}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_hold_its_settings(name: str):
    leaves = flatten(load_recipe(RECIPES[0].with_name(f"{name}.toml")))
    assert {key: leaves[key] for key in BOTH | PAPER[name]} == BOTH | PAPER[name]


def test_an_empty_recipe_is_the_default_config(tmp_path: Path):
    assert load_recipe(write(tmp_path, "")) == default_config()
    assert problems(default_config()) == []


def test_values_land_where_they_are_named(tmp_path: Path):
    text = """\ufeffseed = 3
    [objective]
    name = "grpo"
    clip_low = 0.1
    [optimizer]
    learning_rate = 1
    [environment]
    families = ["a", "b"]
    [teacher]
    feedback = false
    """
    config = load_recipe(write(tmp_path, text))
    assert config.seed == 3
    assert config.objective == GrpoConfig(clip_low=0.1)
    assert type(config.optimizer.learning_rate) is float
    assert config.environment == ToolCallsConfig(families=("a", "b"))
    assert config.teacher.feedback is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nstps = 4", "train.stps: unknown key; did you mean train.steps?"),
        ("[trian]\nsteps = 4", "trian: unknown key; did you mean train?"),
        ("sede = 4", "sede: unknown key; did you mean seed?"),
        (
            "[train]\nlearning_rate = 1.0",
            "train.learning_rate: unknown key; did you mean optimizer.learning_rate?",
        ),
        ("[mesh]\nqqq = 4", "mesh.qqq: unknown key; known here: mesh.data, mesh.fsdp, mesh.tensor"),
        ("[objective]\nalhpa = 1.0", "objective.alhpa: unknown key; did you mean objective.alpha?"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(text: str, expected: str, tmp_path: Path):
    path = write(tmp_path, text)
    assert complaint(path) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[train]\nsteps = "4"', 'train.steps: "4" (a string), expected an integer'),
        ("[train]\nsteps = true", "train.steps: true (a boolean), expected an integer"),
        ("[train]\nsteps = 4.0", "train.steps: 4.0 (a number), expected an integer"),
        ("[objective]\nalpha = false", "objective.alpha: false (a boolean), expected a number"),
        ("[teacher]\nfeedback = 1", "teacher.feedback: 1 (an integer), expected a boolean"),
        ('environment.families = "a"', 'environment.families: "a" (a string), expected a list of '),
        (
            "environment.families = [1]",
            "environment.families: [1] (a list), expected a list of str",
        ),
        (
            '[model]\nremat = "ful"',
            'model.remat: "ful" (a string), expected one of "none", "dots", "full", "offload"; ',
        ),
        ("train = 4", "train: 4 (an integer), expected a table [train]"),
        ("[seed]\nx = 1", "seed: a table, expected an integer"),
        ("seed = 2024-01-01", "seed: 2024-01-01 (a date), expected an integer"),
    ],
)
def test_a_wrong_type_shows_value_type_and_expectation(text: str, expected: str, tmp_path: Path):
    path = write(tmp_path, text)
    assert complaint(path).startswith(f"{path}: {expected}")


def test_an_unknown_objective_lists_the_choices(tmp_path: Path):
    path = write(tmp_path, '[objective]\nname = "spdo"\nclip_low = 0.1')
    expected = 'one of "sdpo", "grpo", "sft", "sdft"; did you mean "sdpo"?'
    assert complaint(path) == f'{path}: objective.name: "spdo" (a string), expected {expected}'
    for value in ("[1]", "{}", "true"):
        assert "expected one of" in complaint(write(tmp_path, f"[objective]\nname = {value}"))


def test_a_setting_of_another_objective_is_said_to_be_one(tmp_path: Path):
    path = write(tmp_path, '[objective]\nname = "grpo"\nalpha = 0.5')
    expected = "objective.alpha: a setting of sdpo and sdft, but the objective is grpo"
    assert complaint(path) == f"{path}: {expected}"
    assert "set objective.name" in complaint(write(tmp_path, "[objective]\ndual_clip = 2.0"))


def test_every_problem_is_listed_in_one_error(tmp_path: Path):
    text = """
    sede = 1
    [train]
    stps = 4
    steps = "4"
    mini_batches = 3
    [objective]
    clip_low = 0.1
    alpha = 2
    [rollout]
    temperature = 0
    """
    message = complaint(write(tmp_path, text), "--mesh.fspd", "2", "--mesh.fsdp=x", "stray")
    assert message.startswith("10 problems:\n")
    for key in ("sede", "train.stps", "train.steps", "train.mini_batches", "objective.clip_low"):
        assert f"x.toml: {key}: " in message
    for key in ("objective.alpha", "rollout.temperature", "--mesh.fspd", "--mesh.fsdp", "stray"):
        assert f"{key}: " in message


def test_a_problem_is_not_followed_by_its_consequences(tmp_path: Path):
    path = write(tmp_path, '[rollout]\nprompts_per_step = "6"\n[train]\nmini_batches = 5')
    assert complaint(path).count("\n") == 0


def test_options_replace_the_values_of_the_recipe(tmp_path: Path):
    path = write(tmp_path, "[train]\nsteps = 4\n[teacher]\nexclude_own_success = false")
    words = "--train.steps 9 --train.steps 40 --optimizer.learning-rate=1e-3 --objective.alpha 1"
    words += " --optimizer.warmup_steps 2 --teacher.no-feedback --teacher.exclude-own-success"
    words += " --environment.families a b --mesh.data -1 --run-dir=--odd --teacher.remove-thinking"
    config = load_recipe(path, [*words.split(), "False"])
    expected = default_config(
        run_dir="--odd",
        objective=SdpoConfig(alpha=1.0),
        train=TrainConfig(steps=40),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        environment=ToolCallsConfig(families=("a", "b")),
        teacher=TeacherConfig(feedback=False, remove_thinking=False),
    )
    assert config == expected


def test_an_option_may_choose_the_objective_or_empty_a_list(tmp_path: Path):
    path = write(tmp_path, 'environment.families = ["a"]')
    for words in (["--environment.families"], ["--environment.families="]):
        config = load_recipe(path, ["--objective.name", "grpo", *words])
        assert config.objective == GrpoConfig()
        assert config.environment == ToolCallsConfig()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train.stps 4", "--train.stps: unknown option; did you mean --train.steps?"),
        (
            "--train.learning-rate 4",
            "--train.learning-rate: unknown option; did you mean --optimizer.learning-rate?",
        ),
        ("--train.steps", "--train.steps: no value, expected an integer"),
        ("--train.steps --seed 1", "--train.steps: no value, expected an integer"),
        ("--train.steps x", '--train.steps: "x" (a string), expected an integer'),
        ("--train.steps 0", "--train.steps: 0, expected at least 1"),
        ("--teacher.feedback=maybe", '--teacher.feedback: "maybe" (a string), expected a boolean'),
        ("--teacher.no-weights", "--teacher.no-weights: unknown option; did you mean --teacher.w"),
        ("--objective.clip-low 0.1", "--objective.clip-low: a setting of grpo, but the objective"),
        ("train.steps=4", "train.steps=4: unexpected argument; --train.steps VALUE"),
        ("stray", "stray: unexpected argument; options look like --train.steps 40"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_typed(words: str, expected: str, tmp_path: Path):
    assert complaint(write(tmp_path, ""), *words.split()).startswith(expected)


KEYS = recipe._schema(KINDS).types
RENAMED = [(old, new) for old, new in recipe.RENAMED.items() if old not in KEYS]


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_a_renamed_key_is_answered_with_its_new_name(old: str, new: str, tmp_path: Path):
    section, _, name = old.partition(".")
    path = write(tmp_path, f"[{section}]\n{name} = false")
    assert complaint(path) == f"{path}: {old}: renamed; write {new}"
    path, option = write(tmp_path, ""), f"--{old}".replace("_", "-")
    flag = f"--{new}".replace("_", "-")
    assert complaint(path, option) == f"{option}: renamed; write {flag}"
    assert complaint(path, option, "true") == f"{option}: renamed; write {flag}"
    negated = option.replace(".", ".no-")
    assert new in KEYS
    assert complaint(path, negated) == f"{negated}: renamed; write {flag.replace('.', '.no-')}"


def test_an_option_mends_the_recipe(tmp_path: Path):
    path = write(tmp_path, "[train]\nsteps = 0")
    assert load_recipe(path, ["--train.steps", "1"]).train.steps == 1


def test_help_lists_every_option_and_each_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path, "[train]\nsteps = 4321")
    with pytest.raises(SystemExit) as caught:
        load_recipe(path, ["--help", "--mesh.fsdp", "77"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "4321" in text and "77" in text
    assert "Global gradient norm above which" in text
    shown = set(re.findall(r"--([a-z][a-z0-9.-]+)", text)) - {"help"}
    for key in flatten(default_config()):
        assert key.replace("_", "-") in shown
    for flag in shown:
        _, lines = recipe._apply_overrides({}, [f"--{flag}"], KEYS)
        assert not any("unknown option" in line for line in lines)


def test_a_missing_recipe_lists_those_that_exist(tmp_path: Path):
    write(tmp_path, "")
    message = complaint(tmp_path / "y.toml")
    assert "no such recipe" in message
    assert str(tmp_path / "x.toml") in message
    assert "a folder, expected a TOML file" in complaint(tmp_path)
    assert str(tmp_path / "x.toml") in complaint(tmp_path)


def test_a_broken_file_says_where(tmp_path: Path):
    assert "line 2" in complaint(write(tmp_path, "seed = 1\nsteps = \n"))
    path = tmp_path / "latin.toml"
    path.write_bytes("run_dir = 'ä'".encode("latin-1"))
    assert complaint(path) == f"{path}: not UTF-8 at byte 12; save the file as UTF-8"


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
