"""Demonstrations, and the order of the prompts."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sdpo_jax.config import DataConfig
from sdpo_jax.data.demonstrations import load_demonstrations
from sdpo_jax.data.jsonl import Demonstration, read_demonstrations
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.errors import UserError

GOOD = '{"prompt": "1 + 1?", "response": "2"}'


class Procedural:
    """Makes its items on access."""

    def __init__(self, size: int, word: str = "item"):
        self.size = size
        self.word = word

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        return f"{self.word} {index}"


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def take(batches, count: int) -> list[list]:
    return [next(batches) for _ in range(count)]


def flatten(batches: list[list]) -> list:
    return [item for batch in batches for item in batch]


# Demonstrations


def test_both_forms_of_prompt_are_read_and_noise_is_tolerated(tmp_path: Path):
    chat: dict[str, Any] = {
        "id": 7,
        "prompt": [
            {"role": "system", "content": "Be\u2028brief."},
            {"role": "user", "content": "Hi"},
        ],
        "response": " Hello\n",
        "difficulty": 3,
    }
    text = f"\ufeff{GOOD}\r\n\r\n   \n{json.dumps(chat, ensure_ascii=False)}"
    rows, problems = read_demonstrations(write(tmp_path, text), "stop")
    first = Demonstration("rows.jsonl:1", ({"role": "user", "content": "1 + 1?"},), "2")
    assert rows == [first, Demonstration("7", tuple(chat["prompt"]), " Hello\n")]
    assert problems == []


BAD = [
    ("{", "invalid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1]", "a list, expected an object"),
    ("null", "null, expected an object"),
    ("[" * 100_000, "unreadable JSON: "),
    ("1" * 5000, "unreadable JSON: "),
    ('{"promt": "a", "response": "b"}', '"prompt" is missing; found "promt"'),
    ('{"Prompt": "a", "response": "b"}', '"prompt" is missing; found "Prompt"'),
    ('{"prompt": "a"}', '"response" is missing'),
    ('{"prompt": 3, "response": "b"}', "prompt is a number, expected a string or a list"),
    ('{"prompt": "a", "response": null}', "response is null, expected a string"),
    ('{"prompt": " ", "response": "b"}', "prompt is empty"),
    ('{"prompt": "a", "response": ""}', "response is empty"),
    ('{"prompt": [], "response": "b"}', "prompt is empty"),
    ('{"prompt": ["a"], "response": "b"}', "prompt[0] is a string, expected an object"),
    ('{"prompt": [{"role": "user"}], "response": "b"}', 'prompt[0]: "content" is missing'),
    (
        '{"prompt": [{"role": "human", "content": "a"}], "response": "b"}',
        'prompt[0].role is "human", expected one of system, user, assistant, tool',
    ),
    (
        '{"prompt": [{"role": {}, "content": "a"}], "response": "b"}',
        "prompt[0].role is {}, expected one of system, user, assistant, tool",
    ),
    (
        '{"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}',
        "the last message is from assistant, expected user or tool: the answer follows it",
    ),
    ('{"prompt": "a", "response": "b", "id": true}', "id is a boolean, expected a string"),
    ('{"prompt": "a", "response": "\\ud800"}', "response holds half of a surrogate pair"),
    ('{"prompt": "a", "response": "b", "id": "x"}', 'id "x" is taken by line 1'),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 13 of the line"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_by_file_line_and_reason(row: str | bytes, reason: str, tmp_path: Path):
    raw = row if isinstance(row, bytes) else row.encode()
    path = write(tmp_path, b'{"prompt": "a", "response": "b", "id": "x"}\n\n' + raw + b"\n")
    with pytest.raises(UserError) as caught:
        read_demonstrations(path, "stop")
    assert f"{path}: 1 bad row\n  {path}:3: {reason}" in str(caught.value)
    rows, problems = read_demonstrations(path, "skip")
    assert [row.id for row in rows] == ["x"]
    assert len(problems) == 1 and problems[0].startswith(f"{path}:3: {reason}")


def test_one_error_lists_twenty_bad_rows_and_their_number(tmp_path: Path):
    path = write(tmp_path, f"{GOOD}\n" + "{\n" * 25)
    with pytest.raises(UserError) as caught:
        read_demonstrations(path, "stop")
    message = str(caught.value)
    assert message.startswith(f"{path}: 25 bad rows\n")
    assert message.count("invalid JSON") == 20
    assert "... and 5 more" in message
    assert 'data.on_error = "skip"' in message


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_a_file_without_rows_is_an_error(content: str, tmp_path: Path):
    with pytest.raises(UserError, match="no rows"):
        read_demonstrations(write(tmp_path, content), "skip")


def test_a_file_without_good_rows_is_an_error_even_when_skipping(tmp_path: Path):
    with pytest.raises(UserError, match="no usable row is left"):
        read_demonstrations(write(tmp_path, "{\n"), "skip")


def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_demonstrations(tmp_path / "none.jsonl", "stop")
    with pytest.raises(UserError, match="cannot be read"):
        read_demonstrations(tmp_path, "stop")


# The order of the prompts


def test_each_epoch_is_a_permutation_and_no_two_are_alike():
    flat = flatten(take(prompt_batches(Procedural(10), batch_size=4, seed=0), 10))
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == [f"item {i}" for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_the_seed():
    first, same, other = (
        take(prompt_batches(Procedural(10), batch_size=4, seed=seed), 5) for seed in (3, 3, 4)
    )
    assert first == same != other


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = (prompt_batches(Procedural(10), batch_size=size, seed=0) for size in (3, 6))
    assert flatten(take(small, 8)) == flatten(take(large, 4))


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 8, 13])
def test_resumed_iterator_yields_what_the_uninterrupted_one_does(cut: int):
    source = Procedural(10)  # batches of 4: epochs end after 2.5, 5, 7.5, 10 batches
    whole = take(prompt_batches(source, batch_size=4, seed=1), 16)
    before = prompt_batches(source, batch_size=4, seed=1)
    assert take(before, cut) == whole[:cut]
    state = json.loads(json.dumps(before.get_state()))
    after = prompt_batches(source, batch_size=4, seed=1)
    take(after, 3)  # a state is absolute
    after.set_state(state)
    assert take(after, 16 - cut) == whole[cut:]


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (prompt_batches(Procedural(11), batch_size=4, seed=1), "11 items"),
        (prompt_batches(Procedural(10), batch_size=5, seed=1), "batch 5"),
        (prompt_batches(Procedural(10), batch_size=4, seed=2), "seed 2"),
        (prompt_batches(Procedural(10, "other"), batch_size=4, seed=1), "content"),
    ],
)
def test_a_state_of_another_source_is_refused(other, part: str):
    batches = prompt_batches(Procedural(10), batch_size=4, seed=1)
    with pytest.raises(UserError) as caught:
        batches.set_state(other.get_state())
    assert f"saved: {other.get_state()['fingerprint']}" in str(caught.value)
    assert f"now:   {batches.get_state()['fingerprint']}" in str(caught.value)
    assert part in str(caught.value)
    assert batches.get_state()["position"] == {"next_index": 0}


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(UserError, match="expected position and fingerprint"):
        prompt_batches(["a"], batch_size=1, seed=0).set_state({"next_index": 3})


def test_small_sources_and_large_batches_work():
    assert take(prompt_batches(["a"], batch_size=3, seed=0), 2) == [["a"] * 3] * 2
    assert len(next(prompt_batches(Procedural(3), batch_size=7, seed=2**32 - 1))) == 7


def test_reading_starts_no_threads():
    before = threading.active_count()
    take(prompt_batches(Procedural(10), batch_size=4, seed=0), 10)
    assert threading.active_count() == before


def test_an_empty_source_is_a_user_error():
    with pytest.raises(UserError, match="empty"):
        prompt_batches([], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        prompt_batches(["a"], batch_size=0, seed=0)


# Demonstrations from an environment


class Asking:
    """An environment that cannot answer its own questions."""

    train = (Prompt("a", ({"role": "user", "content": "2 + 2"},), {"answer": "4"}),)
    held_out = ()

    def grade(self, prompt, response):
        passed = response == prompt.data["answer"]
        return Outcome(float(passed), passed, "", {})


class Knowing(Asking):
    """One that can."""

    def reference(self, prompt):
        return prompt.data["answer"]


def test_an_environment_that_knows_its_answers_gives_demonstrations_that_pass():
    environment = Knowing()
    (row,) = load_demonstrations(DataConfig(source="environment"), environment)
    assert (row.id, row.messages) == environment.train[0][:2]
    assert environment.grade(environment.train[0], row.response).passed


def test_an_environment_without_answers_cannot_be_the_source_of_demonstrations():
    environment = Asking()
    with pytest.raises(UserError, match="an environment that knows its answers"):
        load_demonstrations(DataConfig(source="environment"), environment)
