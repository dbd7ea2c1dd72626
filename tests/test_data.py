"""Demonstrations, the order of the prompts, and rows in fixed shapes."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdpo_jax.config import DataConfig
from sdpo_jax.data.demonstrations import load_demonstrations
from sdpo_jax.data.jsonl import Demonstration, read_demonstrations
from sdpo_jax.data.packing import (
    TOKEN_STEP,
    PackedBatch,
    Pair,
    bucket,
    lay_end_to_end,
    lay_in_rows,
    pad_rows,
    shared_prompts,
    size_bucket,
    spread,
    spread_rows,
)
from sdpo_jax.data.pipeline import prompt_batches
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.model import BLOCK_TOKENS

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


# Rows in fixed shapes


def test_bucket_is_the_smallest_positive_multiple_that_holds():
    assert [bucket(n, 4) for n in (0, 1, 4, 5, 8)] == [4, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="multiple >= 1"):
        bucket(3, 0)


@pytest.mark.parametrize("rows", [[], [[]], [[5], [], [0, 0, 7]], [[1] * 9] * 4])
def test_padded_rows_hold_each_row_and_nothing_else(rows: list[list[int]]):
    tokens, lengths = pad_rows(rows, multiple=4, rows_multiple=3)
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens.shape[0] == len(lengths) == bucket(len(rows), 3)
    assert tokens.shape[1] == bucket(max(map(len, rows), default=0), 4)
    assert [list(tokens[i, : lengths[i]]) for i in range(len(rows))] == rows
    assert tokens.sum() == sum(map(sum, rows))
    assert lengths.sum() == sum(map(len, rows))


@pytest.mark.parametrize("step", [64, TOKEN_STEP])
def test_few_sizes_hold_any_number_and_add_at_most_an_eighth(step: int):
    sizes = [size_bucket(n, step) for n in range(65_537)]
    assert all(size >= max(1, n) for n, size in enumerate(sizes))
    assert all(8 * size <= 9 * n for n, size in enumerate(sizes) if n > 8 * step)
    assert all(size - n < step for n, size in enumerate(sizes) if 0 < n <= 8 * step)
    assert sizes == sorted(sizes)
    # Eight steps, and eight sizes more for each doubling: no more programs are compiled.
    doublings = {64: 7, 512: 4}[step]
    assert 8 * step * 2**doublings == 65_536 and len(set(sizes)) == 8 + 8 * doublings
    assert all(size % step == 0 and size_bucket(size, step) == size for size in set(sizes))


def draw_pairs(groups: int, siblings: int, seed: int = 0) -> list[Pair]:
    """Siblings that do not stand side by side, every token another one."""
    draw, ids = random.Random(seed), iter(range(1, 100_000))
    prompts = [[next(ids) for _ in range(draw.randint(1, 9))] for _ in range(groups)]
    return [
        Pair(prompt, [next(ids) for _ in range(draw.randint(1, 7))])
        for _ in range(siblings)
        for prompt in prompts
    ]


def load(pairs: list[Pair], members: list[int]) -> int:
    """Tokens of a bin, a shared prompt once."""
    chosen = [pairs[i] for i in members]
    prompts = {tuple(prompt) for prompt, _ in chosen}
    return sum(map(len, prompts)) + sum(len(response) for _, response in chosen)


@pytest.mark.parametrize("bins", [1, 2, 3, 8, 50])
def test_each_pair_goes_to_one_bin_and_siblings_stay_together_where_they_fit(bins: int):
    pairs = draw_pairs(groups=9, siblings=4)
    members = spread(pairs, bins=bins)
    assert len(members) == bins and sorted(flatten(members)) == list(range(36))
    assert all(m == sorted(m) for m in members)
    assert spread(pairs, bins=bins) == members  # a function of its arguments: all hosts agree
    share = load(pairs, list(range(36))) / bins
    for group in shared_prompts(pairs):
        homes = [m for m in members if set(m) & set(group)]
        if load(pairs, group) <= share:
            assert len(homes) == 1
    if bins == 50:
        assert max(map(len, members)) == 1


def test_pairs_of_one_prompt_are_one_group_in_the_order_of_occurrence():
    pairs = [Pair([1], [2]), Pair([3], [4]), Pair([1], [5]), Pair([1, 2], [6]), Pair([3], [2])]
    assert shared_prompts(pairs) == [[0, 2], [1, 4], [3]]


def test_a_group_larger_than_a_bins_share_is_cut_and_its_prompt_repeated():
    pairs = [Pair([1] * 4, [2] * 10)] * 6 + [Pair([3], [4])]
    members = spread(pairs, bins=4)
    assert sorted(flatten(members)) == list(range(7))
    assert max(load(pairs, m) for m in members) <= 4 + 2 * 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [2, 4, 8])
def test_bins_are_evenly_full(bins: int, seed: int):
    pairs = draw_pairs(groups=40, siblings=8, seed=seed)
    loads = [load(pairs, m) for m in spread(pairs, bins=bins)]
    largest = max(load(pairs, group) for group in shared_prompts(pairs))
    # None is fuller than the least by more than what was put last; and with many, far less.
    assert max(loads) - min(loads) <= largest
    assert max(loads) <= 1.05 * sum(loads) / bins


def test_whole_rows_go_to_bins_so_that_cutting_adds_none():
    pairs = draw_pairs(groups=30, siblings=2)
    whole = lay_in_rows([pairs], width=16).tokens
    for bins in (1, 3, 7):
        members = spread_rows(pairs, width=16, bins=bins)
        assert sorted(flatten(members)) == list(range(60))
        cut = [lay_in_rows([[pairs[i] for i in m]], width=16).tokens for m in members]
        assert sum(map(len, cut)) <= len(whole)
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert spread_rows(pairs[:2], width=32, bins=3)[1:] == [[], []]  # one row fills one bin


def test_pairs_end_to_end_by_hand():
    bins = [
        [Pair([5, 6], [1, 2, 3]), Pair([7], [4]), Pair([5, 6], [8, 9])],
        [Pair([5, 6], [7, 7])],
    ]
    laid = lay_end_to_end(bins)
    assert laid.tokens.shape == laid.positions.shape == (2, TOKEN_STEP) and laid.segments is None
    # A prompt once, then what continues it without its last token.
    assert laid.tokens[:, :8].tolist() == [[5, 6, 1, 2, 8, 7, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert laid.positions[:, :8].tolist() == [[0, 1, 2, 3, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert not laid.tokens[:, 8:].any() and not laid.positions[:, 8:].any()
    assert laid.table is not None and laid.blocks is not None
    assert laid.blocks.tolist() == [4, 2]
    # First query, how many, prompt and its length, first own token.
    assert laid.table[0, :4].tolist() == [
        [0, 2, 0, 0, 0],
        [2, 2, 0, 2, 2],
        [4, 1, 0, 2, 4],
        [5, 1, 0, 0, 5],
    ]
    assert laid.table[1, :2].tolist() == [[0, 2, 0, 0, 0], [2, 1, 0, 2, 2]]
    assert not laid.table[0, 4:].any() and not laid.table[1, 2:].any()
    # Pair after pair: the prompt's last token predicts the first of each response.
    assert [take.tolist() for take in laid.take] == [[1, 2, 3, 5, 1, 4], [1, 2]]
    arrays: list[Any] = [*laid[:2], *laid[3:5], *laid.take]
    assert {x.dtype for x in arrays} == {np.dtype(np.int32)}


def test_long_sequences_are_cut_into_blocks_that_cover_each_token_once():
    pairs = [Pair([1] * prompt, [2] * response) for prompt, response in SIZES]
    laid = lay_end_to_end([pairs, pairs[:1]])
    assert laid.table is not None and laid.blocks is not None
    for table, count in zip(laid.table, laid.blocks, strict=True):
        first, size, shared, shared_size, own = table[:count].T
        assert ((size > 0) & (size <= BLOCK_TOKENS)).all()
        assert (first[1:] == (first + size)[:-1]).all() and first[0] == 0
        assert ((first - own) % BLOCK_TOKENS == 0).all()
        assert (shared + shared_size <= own).all()
        # A continuation sees a whole prompt: it lies in blocks of its own before.
        assert set(shared_size) <= {0, *(prompt for prompt, _ in SIZES)}
    total = laid.table[0, :, 1].sum()
    assert total == 200 + 1 + 64 + sum(response - 1 for _, response in SIZES)


# Prompts of three lengths; responses that fill blocks exactly, or are one token.
SIZES = [(200, 64), (200, 65), (200, 1), (1, 130), (1, 2), (64, 129)]


def seen_from(laid: PackedBatch, number: int, place: int) -> list[int]:
    """The tokens that a place of a bin attends to, itself last, as table or segments say."""
    tokens = laid.tokens.reshape(len(laid.take), -1)[number]
    if laid.segments is not None:
        segments = laid.segments.reshape(len(laid.take), -1)[number]
        start = place - place % laid.tokens.shape[1]
        row = slice(start, place + 1)
        return tokens[row][segments[row] == segments[place]].tolist()
    assert laid.table is not None and laid.blocks is not None
    table = laid.table[number, : laid.blocks[number]]
    ((_, _, shared, size, own),) = (x for x in table if x[0] <= place < x[0] + x[1])
    return [*tokens[shared : shared + size].tolist(), *tokens[own : place + 1].tolist()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["end to end", "rows"])
def test_each_response_token_is_predicted_from_its_prompt_and_the_response_before_it(
    form: str, seed: int
):
    pairs = [*draw_pairs(groups=5, siblings=4, seed=seed), Pair([1] * 200, [2, 3] * 70)]
    bins = [[pairs[i] for i in members] for members in spread(pairs, bins=3)]
    laid = lay_end_to_end(bins) if form == "end to end" else lay_in_rows(bins, width=340)
    positions = laid.positions.reshape(len(bins), -1)
    for number, (chosen, take) in enumerate(zip(bins, laid.take, strict=True)):
        known = [[*p, *r[:i]] for p, r in chosen for i in range(len(r))]
        assert [seen_from(laid, number, place) for place in take] == known
        assert positions[number][take].tolist() == [len(tokens) - 1 for tokens in known]


def test_a_shared_prompt_stands_once_and_every_other_token_too():
    pairs = draw_pairs(groups=6, siblings=5)
    laid = lay_end_to_end([pairs])
    assert laid.blocks is not None and laid.table is not None
    stands = laid.tokens[0, : laid.table[0, : laid.blocks[0], 1].sum()].tolist()
    prompts = {token for prompt, _ in pairs for token in prompt}
    assert sorted(stands) == sorted(prompts | {t for _, r in pairs for t in r[:-1]})
    assert not laid.tokens[0, len(stands) :].any()


@pytest.mark.parametrize("form", ["end to end", "rows"])
def test_bins_and_responses_may_be_empty(form: str):
    bins = [[Pair([7, 8, 9], []), Pair([7, 8, 9], [1, 2])], []]
    laid = lay_end_to_end(bins) if form == "end to end" else lay_in_rows(bins, width=5)
    # In rows the longer pair stands first.
    assert laid.take[0].tolist() == [2, 3] and laid.take[1].tolist() == []
    assert laid.tokens.shape[0] % 2 == 0
    if laid.blocks is not None:
        assert laid.blocks.tolist() == [2, 0]


def test_packed_rows_hold_every_token_exactly_once():
    draw = random.Random(0)
    sizes = [(draw.randint(1, 9), draw.randint(0, 7)) for _ in range(60)]
    ids = iter(range(1, 10_000))
    pairs = [Pair([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in sizes]
    packed = lay_in_rows([pairs], width=16)
    assert packed.segments is not None and packed.table is None and packed.blocks is None
    assert packed.tokens.shape[1] == 16
    every = [token for prompt, response in pairs for token in (*prompt, *response)]
    assert sorted(packed.tokens[packed.segments > 0]) == every
    assert not packed.tokens[packed.segments == 0].any()
    seen = []
    for row, segments, positions in zip(
        packed.tokens, packed.segments, packed.positions, strict=True
    ):
        assert set(segments) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            seen.append(list(row[segments == segment]))
            assert list(positions[segments == segment]) == list(range(len(seen[-1])))
    assert sorted(seen) == [[*prompt, *response] for prompt, response in pairs]
    assert packed.tokens.shape[0] < 60 / 1.5  # far fewer rows than pairs


def test_packed_rows_by_hand():
    bins = [[Pair([1, 2], [3]), Pair([4], [5, 6]), Pair([7, 8, 9], [])], [Pair([9], [9])]]
    packed = lay_in_rows(bins, width=5)
    assert packed.segments is not None
    # Longest first, each into the first row with room; as many rows in each bin.
    assert packed.tokens.tolist() == [
        [1, 2, 3, 0, 0],
        [4, 5, 6, 0, 0],
        [7, 8, 9, 0, 0],
        [9, 9, 0, 0, 0],
        [0] * 5,
        [0] * 5,
    ]
    assert packed.segments.sum(axis=1).tolist() == [3, 3, 3, 2, 0, 0]
    assert [take.tolist() for take in packed.take] == [[1, 5, 6], [0]]
    wide = lay_in_rows(bins[:1], width=6)
    assert wide.segments is not None
    assert wide.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]
    assert wide.segments.tolist() == [[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert wide.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]]
    # Predicted inside its own segment: the token before it.
    assert wide.take[0].tolist() == [1, 3, 4]


def test_pairs_that_fit_no_row_are_refused():
    with pytest.raises(ValueError, match="expected sequences of at most 3 tokens, got 4"):
        lay_in_rows([[Pair([1], [2]), Pair([1, 2], [3, 4])]], width=3)


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
