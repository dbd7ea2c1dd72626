"""Recipes and options: what is accepted, and how an error is worded."""

import re
from pathlib import Path

import pytest

from sdpo_jax.config import OptimizerConfig, TeacherConfig, TrainConfig, recipe
from sdpo_jax.config.checks import problems
from sdpo_jax.config.resolved import flatten, to_toml
from sdpo_jax.environments.kinds.tool_calls import ToolCallsConfig
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig
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


@pytest.mark.parametrize(("old", "new"), recipe.RENAMED.items())
def test_a_renamed_key_is_answered_with_its_new_name(old: str, new: str, tmp_path: Path):
    section, _, name = old.partition(".")
    path = write(tmp_path, f"[{section}]\n{name} = false")
    assert complaint(path) == f"{path}: {old}: renamed; write {new}"
    path, option = write(tmp_path, ""), f"--{old}".replace("_", "-")
    flag = f"--{new}".replace("_", "-")
    assert complaint(path, option) == f"{option}: renamed; write {flag}"
    assert complaint(path, option, "true") == f"{option}: renamed; write {flag}"
    negated = option.replace(".", ".no-")
    assert new in KEYS and old not in KEYS
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
