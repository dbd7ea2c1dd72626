"""Every complaint about a call word by word; the split; the data; what is missing."""

import json
import random
import re
import sys
from importlib import import_module, util
from types import SimpleNamespace

import pytest

from sdpo_jax.environments.base import Outcome
from sdpo_jax.environments.bfcl_calls import (
    MALFORMED,
    MAX_CHARACTERS,
    Call,
    complaints,
    example,
    parse_call,
    write_call,
)
from sdpo_jax.environments.kinds import bfcl
from sdpo_jax.environments.kinds.bfcl import (
    Bfcl,
    BfclConfig,
    Row,
    load_rows,
    question,
    reference_call,
)
from sdpo_jax.environments.registry import make_environment
from sdpo_jax.environments.rows import is_held_out
from sdpo_jax.errors import UserError

FUNCTION = {
    "name": "trips.plan",
    "description": "Plans a trip.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "Where to."},
            "days": {"type": "integer", "description": "How long."},
            "budget": {"type": "float", "description": "In euros."},
            "stops": {"type": "array", "items": {"type": "string"}},
            "train": {"type": "boolean"},
            "style": {"type": "string", "enum": ["cheap", "grand"]},
            "hotel": {
                "type": "dict",
                "properties": {"stars": {"type": "integer"}, "name": {"type": "string"}},
            },
            "notes": {"type": "string"},
            "rates": {"type": "array", "items": {"type": "float"}},
            "rooms": {"type": "array", "items": {"type": "dict", "properties": {}}},
            "seats": {"type": "dict"},
        },
        "required": ["city", "days"],
    },
}
ACCEPTED = {
    "city": ["New York", "NYC"],
    "days": [3],
    "budget": [100.5, ""],
    "stops": [["Boston", "Salem"], ["Salem", "Boston"], ""],
    "train": [True],
    "style": ["cheap", ""],
    "hotel": [{"stars": [4], "name": ["Plaza", ""]}, ""],
    "rates": [[1.0, 2.5], ""],
    "rooms": [[{"floor": [1, 2]}, {"floor": [3]}], ""],
    "seats": [{"Ann": [["1-A", "1-B"]], "Bob": [["2-A"]]}, ""],
}
ROW = Row("trip", "To New York for three days by train.", FUNCTION, ACCEPTED)
RIGHT = {"city": "NYC", "days": 3, "train": True}


def call(**changes):
    arguments = {k: v for k, v in (RIGHT | changes).items() if v is not None}
    return Call("trips.plan", arguments)


def environment(rows=(ROW,), **settings):
    train = sum(not is_held_out(row.function["name"], 0) for row in rows)
    return Bfcl(rows, train_prompts=train, held_out_prompts=len(rows) - train, **settings)


# Reading a call


@pytest.mark.parametrize(
    "answer",
    [
        'trips.plan(city="NYC", days=3, train=True)',
        "[trips.plan(train=True, days=3, city='NYC')]",
        '{"name": "trips.plan", "arguments": {"city": "NYC", "days": 3, "train": true}}',
        '[{"arguments": {"city": "NYC", "days": 3, "train": true}, "name": "trips.plan"}]',
        '```python\ntrips.plan(city="NYC", days=3, train=True)\n```',
        '<think>wrong(x=1)</think>\n\n  trips.plan(city="NYC",\n  days=3, train=True)  ',
    ],
)
def test_a_call_is_read_in_either_syntax(answer):
    assert parse_call(answer) == call()


def test_values_of_every_kind_are_read():
    python = "f(a=-1, b=2.5, c=[1, (2, 3)], d={'x': None}, e='it''s', g=False)"
    expected = {"a": -1, "b": 2.5, "c": [1, [2, 3]], "d": {"x": None}, "e": "its", "g": False}
    assert parse_call(python) == Call("f", expected)
    assert parse_call(json.dumps({"name": "f", "arguments": expected})) == Call("f", expected)
    assert parse_call(write_call("f", expected)) == Call("f", expected)


@pytest.mark.parametrize(
    ("answer", "feedback"),
    [
        ("", MALFORMED),
        ("I would call trips.plan with three days.", MALFORMED),
        ("trips.plan(", MALFORMED),
        ("trips.plan", MALFORMED),
        ("(lambda: 1)(x=1)", MALFORMED),
        ("f(**{'a': 1})", MALFORMED),
        ("{'name': 'f'}", MALFORMED),
        ('{"name": "f"}', MALFORMED),
        ('{"name": "f", "arguments": [1]}', MALFORMED),
        ('{"name": 1, "arguments": {}}', MALFORMED),
        ("3", MALFORMED),
        ("[" * 900, MALFORMED),
        ("f(a=" + "[" * 900 + ")", MALFORMED),
        ("f(a=1\x00)", MALFORMED),
        ("f(x=1)\n\nThis call plans the trip.", MALFORMED),
        ("f(a=1) " + " " * MAX_CHARACTERS + "#", "malformed call: longer than 2000 characters"),
        ("f(a=" + "[" * 80 + "]" * 80 + ")", "malformed call: nested deeper than 16 levels"),
        (
            '{"name": "f", "arguments": {"a": ' + "[" * 900 + "]" * 900 + "}}",
            "malformed call: nested deeper than 16 levels",
        ),
        ("[f(a=1), f(a=2)]", "expected one call, got 2"),
        ("[]", "expected one call, got 0"),
        ("f(1, b=2)", "positional argument: write every argument as name=value"),
        ("f(a=1, a=2)", "repeated argument: a"),
        ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "repeated argument: a"),
        ('{"name": "f", "arguments": {"a": NaN}}', "malformed call: NaN is not a value"),
        ("f(a=open('x').read())", "a: expected a literal value"),
        ("f(a=true)", "a: expected a literal value"),
        ("f(a=b'x')", "a: expected a literal value"),
        ("f(a={1: 2})", "a: expected a literal value"),
        ("f(a={[]: 2})", "a: expected a literal value"),
        ("f(a=1 + 2)", "a: expected a literal value"),
    ],
)
def test_what_is_no_call_says_why(answer, feedback, recwarn):
    assert parse_call(answer) == feedback
    outcome = environment().grade(environment().train[0], answer)
    assert outcome == Outcome(0.0, False, feedback, {"well_formed": 0.0})
    assert not recwarn


def test_nothing_in_an_answer_is_evaluated(tmp_path):
    path = tmp_path / "made"
    for answer in (f"f(a=open({str(path)!r}, 'w'))", f"__import__('os').mkdir({str(path)!r})"):
        assert isinstance(parse_call(answer), str)
    assert not path.exists()


# Judging it


@pytest.mark.parametrize(
    ("given", "feedback"),
    [
        (call(), []),
        (call(city="new york"), []),
        (call(city="New-York."), []),
        (call(budget=100.5, stops=["salem", "BOSTON"], style="Cheap"), []),
        (call(hotel={"stars": 4}), []),
        (call(hotel={"stars": 4, "name": "plaza"}), []),
        (call(hotel={"stars": 4.0}), []),
        (call(stops=[]), []),
        (call(budget=100.5, rates=[1.0, 2.5]), []),
        (call(rooms=[{"floor": 2}, {"floor": 3}]), []),
        (call(seats={"Ann": ["1-A", "1-B"], "Bob": ["2-A"]}), []),
        (Call("plan", RIGHT), ["unknown function: plan"]),
        (call(city=None), ["missing argument: city (string)"]),
        (call(train=None), ["missing argument: train (boolean)"]),
        (
            call(city=None, days=None),
            ["missing argument: city (string)", "missing argument: days (integer)"],
        ),
        (call(size=1), ["unknown argument: size"]),
        (call(notes="x"), ["argument not wanted here: notes"]),
        (call(days="3"), ["days: expected integer, got string"]),
        (call(days=3.0), ["days: expected integer, got float"]),
        (call(days=True), ["days: expected integer, got boolean"]),
        (call(train=1), ["train: expected boolean, got integer"]),
        (call(city=["NYC"]), ["city: expected string, got array"]),
        (call(budget={"amount": 1}), ["budget: expected float, got dict"]),
        (Call("trips.plan", {**RIGHT, "days": None}), ["days: expected integer, got null"]),
        (call(stops=["Boston", 7]), ["stops[1]: expected string, got integer"]),
        (call(hotel={"stars": "4"}), ["hotel.stars: expected integer, got string"]),
        (call(city="Boston"), ['city: wrong value "Boston"']),
        (call(days=4), ["days: wrong value 4"]),
        (call(budget=99), ["budget: wrong value 99"]),
        (call(stops=["Boston"]), ['stops: wrong value ["Boston"]']),
        (call(train=False), ["train: wrong value false"]),
        (call(style="grand"), ['style: wrong value "grand"']),
        (call(style="huge"), ['style: "huge" is none of the documented choices']),
        (call(hotel={"name": "Plaza"}), ["hotel: missing key stars"]),
        (call(hotel={"stars": 4, "pool": True}), ["hotel: unknown key pool"]),
        (call(rates=[1, 2]), ["rates[0]: expected float, got integer"]),
        (call(rates=[1.0]), ["rates: wrong value [1.0]"]),
        (call(rooms=[{"floor": 2}]), ['rooms: wrong value [{"floor": 2}]']),
        (call(rooms=[1, 2]), ["rooms[0]: expected dict, got integer"]),
        (call(seats={}), ["seats: a key is missing"]),
        (
            call(seats={"Ann": ["1A", "1B"]}),
            ['seats.Ann: wrong value ["1A", "1B"]', "seats: a key is missing"],
        ),
        (
            call(hotel={"stars": 5, "name": "Ritz"}),
            ["hotel.stars: wrong value 5", 'hotel.name: wrong value "Ritz"'],
        ),
        (call(city="x" * 99), [f'city: wrong value "{"x" * 47}...']),
        (
            call(days="three", train=None, city="Rome", extra=0),
            [
                'city: wrong value "Rome"',
                "days: expected integer, got string",
                "missing argument: train (boolean)",
                "unknown argument: extra",
            ],
        ),
    ],
)
def test_every_complaint_word_by_word(given, feedback):
    assert complaints(given, FUNCTION, ACCEPTED) == feedback
    outcome = environment().grade(environment().train[0], write_call(*given))
    expected = (float(not feedback), not feedback, "\n".join(feedback), {"well_formed": 1.0})
    assert outcome == Outcome(*expected)


def test_accepted_values_of_another_type_than_documented_decide():
    function = {**FUNCTION, "parameters": {"properties": {"venue": {"type": "string"}}}}
    for accepted, value, right in (([True], True, True), ([True], "yes", False), ([""], "", True)):
        found = complaints(Call("trips.plan", {"venue": value}), function, {"venue": accepted})
        assert (found == []) == right


def test_feedback_shows_accepted_values_only_if_told_to():
    wrong = 'trips.plan(city="Rome", days=4, hotel={"stars": 5})'
    shy, frank = environment(), environment(reveal_expected=True)
    feedback = shy.grade(shy.train[0], wrong).feedback
    for value in ("New York", "NYC", "3", "True", "4.0", "Plaza"):
        assert value not in feedback
    assert frank.grade(frank.train[0], wrong).feedback.splitlines() == [
        "city: wrong value \"Rome\"; expected 'New York'",
        "days: wrong value 4; expected 3",
        "missing argument: train (boolean); expected True",
        "hotel.stars: wrong value 5; expected {'stars': 4, 'name': 'Plaza'}",
    ]


def test_feedback_can_be_encoded_whatever_the_answer_spells():
    for answer in (
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "trips.plan", "arguments": {"\\ud800": "\\udfff", "city": "\\ud800"}}',
        'trips.plan(city="\\ud800", hotel={"\\ud800": 1, "stars": "\\ud800"})',
    ):
        environment().grade(environment().train[0], answer).feedback.encode()


# Prompts


def rows(count=40):
    return [
        Row(f"row_{i}", "word " * (1 + i * 7 % count), {**FUNCTION, "name": f"f{i // 2}"}, ACCEPTED)
        for i in range(count)
    ]


def test_a_prompt_holds_documentation_request_and_form_and_nothing_of_the_answer():
    text = question(ROW)
    assert json.dumps(FUNCTION) in text and ROW.request in text and "name(argument=value" in text
    assert "NYC" not in text


def test_no_function_is_on_both_sides_and_the_seed_decides_which():
    sides = []
    for seed in (0, 0, 1):
        held_out = [row for row in rows() if is_held_out(row.function["name"], seed)]
        made = Bfcl(
            rows(), train_prompts=40 - len(held_out), held_out_prompts=len(held_out), seed=seed
        )
        train = {p.data["row"].function["name"] for p in made.train}
        other = {p.data["row"].function["name"] for p in made.held_out}
        assert not train & other and len(train | other) == 20 and train and other
        sides.append(([p.id for p in made.train], [p.id for p in made.held_out]))
    assert sides[0] == sides[1] != sides[2]


def test_the_shortest_prompts_are_taken_and_long_ones_can_be_left_out():
    made = Bfcl(rows(), train_prompts=5, held_out_prompts=2)
    lengths = [len(p.messages[0]["content"]) for p in made.train]
    every = [len(question(row)) for row in rows() if not is_held_out(row.function["name"], 0)]
    assert lengths == sorted(every)[:5]
    limit = sorted(every)[9]
    with pytest.raises(UserError, match=rf"train_prompts: 11, expected at most 10 .* = {limit};.*"):
        Bfcl(rows(), train_prompts=11, held_out_prompts=1, max_prompt_characters=limit)


# Data


def write_data(folder, questions, answers):
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    (folder / bfcl.QUESTIONS).write_text("\n".join(questions) + "\n")
    (folder / "possible_answer" / bfcl.QUESTIONS).write_text("\n".join(answers) + "\n")


def lines(row=ROW):
    asked = {"id": row.id, "question": [[{"role": "user", "content": row.request}]]}
    answer = {"id": row.id, "ground_truth": [{row.function["name"]: row.accepted}]}
    return json.dumps({**asked, "function": [row.function]}), json.dumps(answer)


def test_rows_are_read_as_the_package_writes_them(tmp_path):
    asked, answer = lines()
    write_data(tmp_path, [asked], [answer])
    assert load_rows(tmp_path) == [ROW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda asked, answer: (["{"], [answer]), r"simple_python\.json, line 1: expected a JSON"),
        (lambda asked, answer: ([asked, "[]"], [answer]), "line 2: expected a JSON object"),
        (lambda asked, answer: ([asked], ['{"id": "other", "ground_truth": []}']), "row 'trip' is"),
        (lambda asked, answer: ([asked], [answer.replace("days", "nights")]), "names .'nights'"),
    ],
)
def test_other_data_than_expected_is_refused_with_its_place(change, message, tmp_path):
    write_data(tmp_path, *change(*lines()))
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path)


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps 'bfcl-eval>="):
        make_environment(BfclConfig())
    with pytest.raises(UserError, match=r"cannot be read .*another version of bfcl-eval"):
        load_rows(tmp_path)


def test_a_recipe_names_the_environment(monkeypatch, tmp_path):
    write_data(tmp_path, *([line] for line in lines()))
    monkeypatch.setattr(bfcl, "data_folder", lambda: tmp_path)
    config = BfclConfig(train_prompts=1, held_out_prompts=0)
    assert [p.id for p in make_environment(config).train] == ["trip"]


def test_every_setting_of_a_recipe_reaches_the_environment(monkeypatch, tmp_path):
    questions, answers = zip(*map(lines, rows()), strict=True)
    write_data(tmp_path, questions, answers)
    monkeypatch.setattr(bfcl, "data_folder", lambda: tmp_path)
    limit = sorted(len(question(row)) for row in rows())[30]
    made = {"train_prompts": 7, "held_out_prompts": 3, "seed": 5, "max_prompt_characters": limit}
    for reveal, hint in ((True, "; expected 3"), (False, "")):
        there = make_environment(BfclConfig(reveal_expected=reveal, **made))
        here = Bfcl(rows(), **made)
        assert (there.train, there.held_out) == (here.train, here.held_out)
        assert there.train != Bfcl(rows(), **made | {"seed": 0}).train
        wrong = write_call(there.train[0].data["row"].function["name"], RIGHT | {"days": 4})
        feedback = there.grade(there.train[0], wrong).feedback
        assert feedback == f"days: wrong value 4{hint}"
    with pytest.raises(UserError, match=rf"train_prompts: 40, .*max_prompt_characters = {limit};"):
        make_environment(BfclConfig(**made | {"train_prompts": 40}))


# The real rows


needs_data = pytest.mark.skipif(
    util.find_spec("bfcl_eval") is None, reason="needs pip install --no-deps bfcl-eval"
)


@needs_data
def test_every_real_row_accepts_its_reference_in_both_syntaxes_and_nothing_less():
    rows = load_rows()
    assert len(rows) == 400
    made = environment(rows)
    assert (len(made.train), len(made.held_out)) == (311, 89)
    for prompt in [*made.train, *made.held_out]:
        answer = reference_call(prompt.data["row"])
        call = parse_call(answer)
        assert isinstance(call, Call)
        as_json = json.dumps({"name": call.name, "arguments": call.arguments})
        for right in (answer, as_json):
            assert made.grade(prompt, right) == Outcome(1.0, True, "", {"well_formed": 1.0})
        for name in call.arguments:
            less = {k: v for k, v in call.arguments.items() if k != name}
            outcome = made.grade(prompt, write_call(call.name, less))
            assert outcome.feedback.startswith(f"missing argument: {name} (")


def changed(value, chance):
    """A value as it was, or with something changed in it, at any depth."""
    if chance.random() < 0.15:
        return chance.choice(
            ["", "x", 0, 1, 2.5, True, None, [], {}, [""], [[]], {"x": 1}, [value]]
        )
    if isinstance(value, list):
        items = [changed(item, chance) for item in value]
        return chance.choice([items, items, items, items[1:], items[::-1], items + items[:1]])
    if isinstance(value, dict):
        pairs = {key: changed(item, chance) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if chance.random() < 0.9}
    if chance.random() < 0.5 or value is None:
        return value
    if isinstance(value, str):
        return chance.choice([value.upper(), f"-{value}. ", f"{value}s", value[1:], [value]])
    return chance.choice([float(value), int(value), value + 1, str(value), bool(value)])


def changed_calls(row, count):
    """Calls of a row's function with accepted arguments, changed at random."""
    chance = random.Random(row.id)
    for _ in range(count):
        chosen = {k: example(chance.choice(values)) for k, values in row.accepted.items()}
        kept = {k: v for k, v in chosen.items() if chance.random() < 0.97}
        yield {k: changed(v, chance) if chance.random() < 0.5 else v for k, v in kept.items()}


@needs_data
def test_verdicts_are_those_of_the_leaderboards_own_checker(monkeypatch):
    # The table of models imports every model's client; only whether names keep their dots matters.
    models = SimpleNamespace(MODEL_CONFIG_MAPPING={"m": SimpleNamespace(underscore_to_dot=False)})
    monkeypatch.setitem(sys.modules, "bfcl_eval.constants.model_config", models)
    checker = import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")

    def theirs(row, arguments):
        call, answer = {row.function["name"]: arguments}, {row.function["name"]: row.accepted}
        try:
            return checker.simple_function_checker(
                row.function, call, answer, checker.Language.PYTHON, "m"
            )["valid"]
        except AttributeError:  # a dict was expected, and its keys were asked for
            return False

    verdicts = [0, 0]
    for row in load_rows():
        for arguments in changed_calls(row, 50):
            call = Call(row.function["name"], arguments)
            ours = not complaints(call, row.function, row.accepted)
            assert ours == theirs(row, arguments), (row.id, arguments)
            verdicts[ours] += 1
    assert min(verdicts) > 5000


OWN_WORDS = """
missing argument not wanted here unknown expected got wrong value is none of the documented choices
key a string integer float boolean array dict tuple any null true false
"""


@needs_data
def test_no_word_of_feedback_comes_from_the_accepted_values():
    def words(text):
        return set(re.findall(r"\w+", text))

    for row in load_rows():
        documented = words(json.dumps(row.function, ensure_ascii=False)) | words(OWN_WORDS)
        empty = [{name: {} for name in row.accepted}]
        for arguments in [{}, *empty, *changed_calls(row, 50)]:
            call = Call(row.function["name"], arguments)
            given = words(json.dumps(arguments, ensure_ascii=False))
            for text in complaints(call, row.function, row.accepted):
                # Long values are cut, perhaps inside a word; [0] is a place in an array.
                shown = re.sub(r"\w*\.\.\.|\[\d+\]", "", text)
                assert words(shown) <= documented | given, (row.id, arguments, text)
