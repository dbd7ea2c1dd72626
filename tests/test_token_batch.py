"""Rows of a batch: the batch that training would see, token by token."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quick
import tiny

from sdpo_jax.commands.heatmap import write_heatmap
from sdpo_jax.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdftConfig, SdpoConfig, SftConfig
from sdpo_jax.reports.token_batch import (
    Shown,
    batch_of,
    response_rows,
    token_batch,
    token_rows,
    token_texts,
    write_rows,
)
from sdpo_jax.reports.token_records import TokenRecord
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.run.checkpoint import Checkpoints, Restored
from sdpo_jax.run.components import RunComponents, make_trainer
from sdpo_jax.run.recipes import default_config
from sdpo_jax.run.run_ref import RunRef
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.training.state import to_saved

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
OBJECTIVES = {
    "sdpo": SdpoConfig(),
    "grpo": GrpoConfig(),
    "sdft": SdftConfig(skip_first_tokens=0),
    "sft": SftConfig(),
}
DEMONSTRATIONS = [
    Demonstration(f"d{i}", ({"role": "user", "content": f"q{i}?"},), "abc"[: 1 + i % 3])
    for i in range(6)
]


class Length:
    """An answer of an even number of characters passes, the others hear why not."""

    train = tuple(Prompt(f"t{i}", ({"role": "user", "content": f"a{i}"},), {}) for i in range(6))
    held_out = ()

    def grade(self, prompt, response):
        del prompt
        passed = len(response) % 2 == 0
        return Outcome(float(passed), passed, "" if passed else f"{response!r} is odd", {})


def make_config(run_dir, name="sdpo", weights="ema"):
    return default_config(
        run_dir=str(run_dir),
        objective=OBJECTIVES[name],
        rollout=RolloutConfig(
            prompts_per_step=2, rollouts_per_prompt=4, max_prompt_tokens=32, max_response_tokens=6
        ),
        teacher=TeacherConfig(
            max_prompt_tokens=160, max_feedback_tokens=32, weights=weights, trust_region=0.3
        ),
        data=DataConfig(rows_per_step=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        train=TrainConfig(micro_batch_tokens=1024, head_chunk_tokens=48),
        evaluation=EvaluationConfig(prompts=0),
    )


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device, cheap compilation, one sampler."""
    with quick.programs(sampler_of=(MODEL, TOKENIZER.stop_ids)):
        yield


def components():
    params = lambda: tiny.make_params(ARCHITECTURE, scale=0.5)  # noqa: E731
    return RunComponents(MODEL, params, TOKENIZER, Length(), DEMONSTRATIONS)


def trainer_of(config):
    return make_trainer(config, components())


def start(trainer):
    """A state whose teacher is not its student, as after some steps."""
    state = trainer.initial_state(tiny.make_params(ARCHITECTURE, scale=0.5))
    if state.teacher is None:
        return state
    return state.replace(teacher=tiny.make_params(ARCHITECTURE, seed=1, scale=0.5))


def rows_of_next_step(trainer, state):
    position = trainer.source.get_state()
    rows = batch_of(
        trainer, Restored(0, state, {"data": position}), components(), run="a run", prompts=9, top=4
    )
    trainer.source.set_state(position)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "trust_region"])
def test_the_batch_is_the_one_that_training_learns_from_next(weights):
    trainer = trainer_of(make_config("unused", weights=weights))
    state = start(trainer)
    head, *rows = rows_of_next_step(trainer, state)
    trained = trainer.step(state, 1)[1]
    assert head["teacher"] == weights
    assert len(rows) == 8
    assert np.mean([row["reward"] for row in rows]) == trained["reward"]
    assert np.mean([len(row["tokens"]) for row in rows]) == trained["response_tokens"]
    taught = [row for row in rows if row["shown"]]
    assert len(taught) / len(rows) == trained["teacher_signal"]
    # The means that the training step itself reports, from its own compiled passes.
    tokens = [token for row in taught for token in row["tokens"]]
    assert len(tokens) == trained["tokens"]
    for key, metric in (("log_p", "log_prob"), ("log_q", "teacher_log_prob")):
        assert np.mean([t[key] for t in tokens]) == pytest.approx(trained[metric], abs=2e-5)


def test_a_run_without_a_teacher_is_taught_by_itself_in_context():
    trainer = trainer_of(make_config("unused", "grpo"))
    head, *rows = rows_of_next_step(trainer, start(trainer))
    assert head["teacher"] == "student"
    for first in (0, 4):
        group = rows[first : first + 4]
        mean = np.mean([row["reward"] for row in group])
        for row in group:
            assert row["grpo_advantage"] == pytest.approx(row["reward"] - mean, abs=1e-6)
    # SDPO's is of the token, not of the row.
    taught = [row for row in rows if row["shown"] and len(row["tokens"]) > 1]
    assert taught
    assert all(len({t["advantage"] for t in row["tokens"]}) > 1 for row in taught)


@pytest.mark.slow
def test_an_sdft_teacher_has_read_the_demonstration_of_the_next_step():
    trainer = trainer_of(make_config("unused", "sdft"))
    state = start(trainer)
    head, *rows = rows_of_next_step(trainer, state)
    trained = trainer.step(state, 1)[1]
    assert head["objective"] == "sdft" and len(rows) == 8
    known = {d.id: d.response for d in DEMONSTRATIONS}
    for row in rows:
        assert row["shown"]["demonstration"] == known[row["prompt_id"]]
        assert known[row["prompt_id"]] in row["teacher_prompt"]
        assert not row["graded"] and row["grpo_advantage"] == 0.0
    # The loss leaves out no token here, so that its means are those of the rows.
    tokens = [token for row in rows for token in row["tokens"]]
    assert np.mean([len(row["tokens"]) for row in rows]) == trained["response_tokens"]
    assert len(tokens) == trained["tokens"]
    for key, metric in (("log_p", "log_prob"), ("log_q", "teacher_log_prob")):
        assert np.mean([t[key] for t in tokens]) == pytest.approx(trained[metric], abs=2e-5)


def test_an_sft_run_is_asked_the_first_prompts_of_its_environment():
    trainer = trainer_of(make_config("unused", "sft"))
    head, *rows = rows_of_next_step(trainer, start(trainer))
    assert head["teacher"] == "student" and len(rows) == 8
    assert {row["prompt_id"] for row in rows} <= {prompt.id for prompt in Length.train}
    assert any(row["shown"] for row in rows)


def test_rollouts_drawn_ahead_are_those_of_the_checkpoint():
    """One step off policy, the next batch was drawn before the update that the checkpoint has."""
    config = make_config("unused")
    config = replace(config, rollout=replace(config.rollout, one_step_off_policy=True))
    trainer = trainer_of(config)
    state, _ = trainer.step(start(trainer), 1)
    trainer.source.wait()
    extra = json.loads(json.dumps({"data": trainer.source.get_state()}))
    fresh = trainer_of(config)
    _, *rows = batch_of(fresh, Restored(1, state, extra), components(), run="a", prompts=9, top=4)
    _, *first = batch_of(fresh, Restored(1, state, extra), components(), run="a", prompts=1, top=4)
    assert [row["response"] for row in first] == [row["response"] for row in rows[:4]]
    trained = trainer.step(state, 2)[1]
    assert np.mean([row["reward"] for row in rows]) == trained["reward"]
    tokens = [token for row in rows if row["shown"] for token in row["tokens"]]
    assert np.mean([t["log_p"] for t in tokens]) == pytest.approx(trained["log_prob"], abs=2e-5)


def save(config):
    """Checkpoints after steps 3 and 4, without the training before them."""
    trainer = trainer_of(config)
    extra = {"data": trainer.source.get_state()}
    with Checkpoints(Path(config.run_dir) / "checkpoints") as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, to_saved(start(trainer)), extra)
        checkpoints.finish()


def test_the_command_writes_rows_and_page_and_leaves_the_run_alone(tmp_path, capsys):
    config = make_config(tmp_path)
    save(config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_heatmap(RunRef(tmp_path, config, 3), components(), prompts=1, top=2, tokens=64)
    lines = [json.loads(x) for x in (tmp_path / "token_batch.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 3
    assert [x["kind"] for x in lines] == ["batch"] + ["response"] * 4
    assert {x["prompt_id"] for x in lines[1:]} == {lines[1]["prompt_id"]}
    assert (tmp_path / "heatmap.html").read_text().startswith("<!doctype html>")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "4 responses" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint yet"):
        token_batch(RunRef(tmp_path, make_config(tmp_path), None), components(), prompts=1, top=1)


# Texts


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u2713 \U0001f600!", "\u4f60\u597d\n", ""])
def test_texts_of_tokens_join_to_the_response(text):
    ids = [*TOKENIZER.encode(text), TOKENIZER.END]
    texts = token_texts(ids, TOKENIZER)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert texts[-1] == ""


def test_a_character_in_pieces_is_told_with_its_last_piece():
    assert token_texts(TOKENIZER.encode("a\u2713b"), TOKENIZER) == ["a", "", "", "\u2713", "b"]


def test_bytes_that_are_no_character_do_not_hide_what_follows():
    ids = [4 + 0xFF, *TOKENIZER.encode("abcdef"), 4 + 0xE2]
    assert "".join(token_texts(ids, TOKENIZER)) == TOKENIZER.decode(ids)
    assert token_texts(ids, TOKENIZER)[-1] == "\ufffd"


def test_a_tokenizer_that_drops_a_leading_space_keeps_it_inside_a_response():
    class Words:
        def decode(self, ids):
            return "".join([" one", " two", " three"][i] for i in ids).lstrip()

    assert token_texts([0, 1, 2], Words()) == ["one", " two", " three"]


# Rows


def record(sampled, columns, log_p, log_q):
    ids = [[s, *c] for s, c in zip(sampled, columns, strict=True)]
    as_float = lambda x: None if x is None else np.asarray(x, np.float32)  # noqa: E731
    return TokenRecord(np.asarray(ids, np.int32), as_float(log_p), as_float(log_q))


def test_a_candidate_of_both_stands_once_and_the_likeliest_first():
    a, b, c = TOKENIZER.encode("abc")
    one = record([c], [[a, b, b, c]], [[-3, -0.2, -2, -2, -3]], [[-0.5, -4, -0.7, -0.7, -0.5]])
    (row,) = token_rows(one, TOKENIZER, lambda token: TOKENIZER.decode([token]))
    assert [x["text"] for x in row["alternatives"]] == ["a", "c", "b"]
    assert row["advantage"] == pytest.approx(2.5)
    assert (row["id"], row["text"]) == (c, "c")


def test_what_was_not_graded_or_not_taught_has_no_context_and_no_advantage():
    prompt = Prompt("p", ({"role": "user", "content": "?"},), {})
    outcomes = [Outcome(1.0, True, "", {}), Outcome(0.0, False, "bad", {}), not_graded("down")]
    ids = [TOKENIZER.encode(x) for x in ("y", "n", "m")]
    batch = RolloutBatch(
        [prompt], 3, [[9]] * 3, ids, [np.zeros(1)] * 3, np.ones(3), ["y", "n", "m"], outcomes
    )
    shown = Shown([None, TeacherContext("y", None), None], [None, TOKENIZER.encode("?y"), None])
    records = [
        record(x, [[x[0]]], [[-1, -1]], [[-2, -2]] if i == 1 else None) for i, x in enumerate(ids)
    ]
    rows = response_rows(batch, shown, records, TOKENIZER)
    assert [row["shown"] for row in rows] == [
        None,
        {"demonstration": "y", "feedback": None, "attempt": None},
        None,
    ]
    assert [row["teacher_prompt"] for row in rows] == [None, "?y", None]
    assert [row["tokens"][0]["advantage"] for row in rows] == [None, -1.0, None]
    assert [row["grpo_advantage"] for row in rows] == [0.5, -0.5, 0.0]
    assert [row["graded"] for row in rows] == [True, True, False]


def test_rows_are_lines_of_json_whatever_they_say(tmp_path):
    rows = [{"text": "a\nb\u2028\ud800"}, {"text": "\x00"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
