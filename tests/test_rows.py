"""Reading rows: problems by place, ids, sides. The demonstrations' messages are in test_data.py."""

from typing import Any, NamedTuple

import pytest

from sdpo_jax.environments.base import Prompt
from sdpo_jax.environments.rows import (
    BadRow,
    Rows,
    chat,
    check_sides,
    get,
    is_held_out,
    read_rows,
    row_id,
)
from sdpo_jax.errors import UserError


class Item(NamedTuple):
    id: str
    value: int


def parse(row: dict[str, Any], place: str) -> Item:
    value = get(row, "value")
    if value < 0:
        raise BadRow(f"value is {value}, expected 0 or more")
    return Item(row_id(row, place), value)


def read(path, on_error="stop"):
    return read_rows(path, parse, on_error, form='{"value": 1}', content="items")


def test_noise_is_tolerated_and_a_row_without_id_is_named_by_its_place(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"value": 1}\r\n\r\n  \n{"id": 7, "value": 2, "more": []}')
    assert read(path) == Rows([Item("f.jsonl:1", 1), Item("7", 2)], [])


def test_one_error_lists_every_bad_row_and_skipping_keeps_the_good_ones(tmp_path):
    path = tmp_path / "f.jsonl"
    lines = [
        '{"id": "a", "value": 1}',
        "{",
        '{"Value": 1}',
        '{"value": -1}',
        '{"id": "a", "value": 2}',
    ]
    path.write_text("\n".join(lines))
    problems = [
        f"{path}:2: invalid JSON: Expecting property name enclosed in double quotes at column 2",
        f'{path}:3: "value" is missing; found "Value"',
        f"{path}:4: value is -1, expected 0 or more",
        f'{path}:5: id "a" is taken by line 1',
    ]
    assert read(path, "skip") == Rows([Item("a", 1)], problems)
    with pytest.raises(UserError) as caught:
        read(path)
    listed = "\n".join(f"  {problem}" for problem in problems)
    remedy = 'mend them, or set on_error = "skip" to leave them out'
    assert str(caught.value) == f"{path}: 4 bad rows\n{listed}\n{remedy}"


def test_a_missing_or_empty_file_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="no such file, expected JSONL with items"):
        read(tmp_path / "f.jsonl")
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(
        UserError, match='no rows, expected {"value": 1} a line'.replace("{", "\\{")
    ):
        read(tmp_path / "f.jsonl")


def test_a_prompt_is_text_or_messages():
    assert chat("Hi", "prompt") == ({"role": "user", "content": "Hi"},)
    with pytest.raises(BadRow, match=r"prompt\[0\]\.role is \"x\", expected one of system, user"):
        chat([{"role": "x", "content": "Hi"}], "prompt")


def test_a_quarter_is_held_out_and_the_seed_decides_which():
    sides = [[is_held_out(f"row {i}", seed) for i in range(4000)] for seed in (0, 0, 1)]
    assert sides[0] == sides[1] != sides[2]
    assert 900 < sum(sides[0]) < 1100


def test_a_prompt_on_both_sides_is_refused_by_id_and_by_its_words():
    def prompt(name, words):
        return Prompt(name, ({"role": "user", "content": words},), {})

    check_sides([prompt("a", "x")], [prompt("b", "y")])
    with pytest.raises(UserError, match="held-out id of 'a' stands among the train rows"):
        check_sides([prompt("a", "x")], [prompt("a", "y")])
    with pytest.raises(UserError, match="held-out prompt of 'b' stands among the train rows"):
        check_sides([prompt("a", "x")], [prompt("b", "x")])
