import random

import pytest

from sdpo_jax.data.tool_call_corpus import ToolCallCorpus
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.kinds.tool_calls import (
    Task,
    ToolCalls,
    complaints,
    draw_task,
    parse_call,
    question,
    write_call,
)
from sdpo_jax.environments.toy_apis import FAMILIES, TODAY
from sdpo_jax.errors import UserError

ALARM = Task(
    family="alarm",
    values={"time": (7, 30, "pm"), "day": "tuesday"},
    request="wake me on tuesday at 7:30 pm",
    tools=("send_money", "set_alarm", "set_light"),
)
LIGHT = Task(
    family="light",
    values={"room": "kitchen", "level": 70, "seconds": 5},
    request="dim the kitchen to 70 percent in 5 seconds",
    tools=("set_light", "set_alarm", "send_money"),
)
MUSIC = Task(
    family="music",
    values={"genre": "jazz", "length": 30, "volume": 4},
    request="play jazz for 30 minutes at volume 4",
    tools=("play_music", "set_alarm", "send_money"),
)


@pytest.mark.parametrize(
    ("task", "response", "feedback"),
    [
        (ALARM, 'set_alarm(time="19:30", day="tue")', []),
        (ALARM, 'set_alarm(day="tue", time="19:30")', []),
        (ALARM, 'set_alarm(time="7:30 pm", day="tue")', ["time: expected 24-hour HH:MM"]),
        (
            ALARM,
            'set_alarm(time="1930", day="tuesday")',
            ["time: expected 24-hour HH:MM", "day: expected three-letter weekday"],
        ),
        (ALARM, 'set_alarm(time="18:30", day="tue")', ['time: wrong value "18:30"']),
        (ALARM, 'set_alarm(day="tue")', ["missing argument: time, 24-hour HH:MM"]),
        (ALARM, 'set_alarm(time="19:30", day="tue", snooze=1)', ["unexpected argument: snooze"]),
        (ALARM, 'set_alarm(time="19:30", time="19:30")', None),
        (ALARM, "set_alarm(", ["malformed call: expected tool(argument=value, ...)"]),
        (ALARM, "", ["malformed call: expected tool(argument=value, ...)"]),
        (ALARM, "ring(day=1)", ["unknown tool: ring"]),
        (ALARM, "send_money(amount=3)", ["wrong tool for this request: send_money"]),
        (LIGHT, 'set_light(room="kitchen", level=0.7, seconds=5)', []),
        (
            LIGHT,
            'set_light(room="kitchen", level=70, seconds=5)',
            ["level: expected fraction of 1"],
        ),
        (
            LIGHT,
            'set_light(room="kitchen", level=0.7)',
            ["missing argument: seconds, whole seconds"],
        ),
        (
            LIGHT,
            'set_light(room="kitchen", level=0.7, seconds=5.0)',
            ["seconds: expected whole seconds"],
        ),
        (LIGHT, 'set_light(room="kitchen", level=0.7, seconds=True)', None),
        (MUSIC, 'play_music(genre="jazz", length=1800)', []),
        (MUSIC, 'play_music(genre="jazz", length=1800, volume=4)', ["unexpected argument: volume"]),
    ],
)
def test_feedback_names_what_is_wrong(
    task: Task, response: str, feedback: list[str] | None
) -> None:
    found = complaints(task, response, TODAY)
    if feedback is None:
        assert len(found) == 1
        assert found[0].startswith(("malformed call", "repeated argument"))
    else:
        assert found == feedback


@pytest.mark.parametrize(
    "response",
    [
        "__import__('os').system('true')",
        'set_alarm(**{"time": "19:30"})',
        'set_alarm("19:30", "tue")',
        "set_alarm(time=(1, 2))",
        'set_alarm(time=f"{1}")',
        "[x for x in ()]",
        "(" * 300,
        "a." * 150 + "b",
        "1" * 10_000,
        "set_alarm(time=\x00)",
    ],
)
def test_nothing_but_a_call_with_literals_is_read(response: str) -> None:
    assert isinstance(parse_call(response), str)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_is_accepted_by_its_own_api_and_named_by_the_others(family: str) -> None:
    rng = random.Random(0)
    for slot in FAMILIES[family].slots:
        for form in slot.forms:
            for other in slot.forms:
                task = draw_task(rng, family)
                base = {(family, s.name): next(iter(s.forms)) for s in FAMILIES[family].slots}
                given = write_call(task, {**base, (family, slot.name): form})
                found = complaints(task, given, {**base, (family, slot.name): other})
                assert (found == []) == (form == other), (given, other)
                assert all(slot.name in complaint for complaint in found)


def test_feedback_never_holds_the_expected_value() -> None:
    environment = ToolCalls(train_prompts=300, held_out_prompts=1)
    for prompt in environment.train:
        task: Task = prompt.data["task"]
        for slot in FAMILIES[task.family].slots:
            expected = slot.forms[TODAY[task.family, slot.name]].write
            if expected is None:
                continue
            wrong = write_call(task, TODAY).replace(slot.name, "other")
            feedback = environment.grade(prompt, wrong).feedback
            assert repr(expected(task.values[slot.name])).strip("'") not in feedback.split()


def test_the_right_call_is_rewarded_and_any_other_is_not() -> None:
    environment = ToolCalls(train_prompts=60, held_out_prompts=60)
    for prompt in [*environment.train, *environment.held_out]:
        right = write_call(prompt.data["task"], TODAY)
        assert environment.grade(prompt, right) == Outcome(1.0, True, "", {"well_formed": 1.0})
        outcome = environment.grade(prompt, right[:-1])
        assert (outcome.reward, outcome.passed) == (0.0, False)
        assert outcome.feedback


def test_train_held_out_and_pretraining_text_are_disjoint() -> None:
    environment = ToolCalls(train_prompts=2048, held_out_prompts=256)

    def values(prompts: list[Prompt]) -> set[str]:
        return {
            repr((p.data["task"].family, sorted(p.data["task"].values.items()))) for p in prompts
        }

    train, held_out = values(environment.train), values(environment.held_out)
    assert not train & held_out
    assert len({p.messages[0]["content"] for p in environment.train}) == 2048
    corpus = ToolCallCorpus(3000)
    asked = {
        corpus[i].messages[0]["content"].split("\nCorrect")[0].split("\n")[1] for i in range(3000)
    }
    assert not asked & {p.data["task"].request for p in environment.held_out}


def test_prompts_are_a_function_of_the_seed() -> None:
    first = ToolCalls(train_prompts=50, held_out_prompts=50, seed=3)
    again = ToolCalls(train_prompts=50, held_out_prompts=50, seed=3)
    other = ToolCalls(train_prompts=50, held_out_prompts=50, seed=4)
    assert first.train == again.train
    assert first.train != other.train


def test_a_prompt_says_nothing_of_todays_api() -> None:
    assert (
        question(ALARM) == "tools: send_money, set_alarm, set_light\nwake me on tuesday at 7:30 pm"
    )


def test_families_are_chosen_by_name_and_a_wrong_name_lists_the_right_ones() -> None:
    environment = ToolCalls(train_prompts=20, held_out_prompts=20, families=("alarm", "table"))
    assert {p.data["family"] for p in environment.train} == {"alarm", "table"}
    with pytest.raises(UserError, match=r"unknown 'alrm'; expected some of alarm, weather"):
        ToolCalls(train_prompts=1, held_out_prompts=1, families=("alrm",))


@pytest.mark.slow  # it draws them all
def test_more_prompts_than_a_family_has_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"environment\.train_prompts: expected at most about"):
        ToolCalls(train_prompts=100_000, held_out_prompts=1, families=("weather",))


def test_shares_of_every_argument_sum_to_one_and_today_is_a_form() -> None:
    for name, family in FAMILIES.items():
        for slot in family.slots:
            assert sum(form.share for form in slot.forms.values()) == pytest.approx(1.0)
            assert TODAY[name, slot.name] in slot.forms


def test_the_corpus_is_random_access_and_its_contexts_agree_with_its_answers() -> None:
    corpus = ToolCallCorpus(500, seed=1)
    kinds = {"bare": 0, "solution": 0, "feedback": 0}
    for i in (*range(499, -1, -1),):
        row = corpus[i]
        assert row == corpus[i]
        text = row.messages[-1]["content"]
        if "Correct solution:" in text:
            kinds["solution"] += 1
            assert row.response in text
        elif "Feedback" in text:
            kinds["feedback"] += 1
            assert row.response not in text
        else:
            kinds["bare"] += 1
    assert min(kinds.values()) > 80


def test_the_reference_of_every_prompt_is_accepted():
    made = ToolCalls(train_prompts=120, held_out_prompts=60)
    for prompt in [*made.train, *made.held_out]:
        assert made.grade(prompt, made.reference(prompt)).passed


def test_held_out_prompts_may_come_from_other_families():
    made = ToolCalls(
        train_prompts=20,
        held_out_prompts=30,
        families=("alarm",),
        held_out_families=("alarm", "music"),
    )
    assert {p.data["family"] for p in made.train} == {"alarm"}
    assert [p.data["family"] for p in made.held_out] == ["alarm", "music"] * 15
    alone = ToolCalls(train_prompts=20, held_out_prompts=0, families=("alarm",))
    assert made.train == alone.train
    with pytest.raises(UserError, match=r"environment\.held_out_families: unknown 'musik'"):
        ToolCalls(train_prompts=1, held_out_prompts=1, held_out_families=("musik",))


def test_with_a_preamble_allowed_the_last_line_is_graded_and_otherwise_the_whole():
    call, words = 'set_alarm(time="19:30", day="tue")', "let me see.\none moment.\n"
    prompt = Prompt("alarm", ({"role": "user", "content": question(ALARM)},), {"task": ALARM})
    free, strict = (
        ToolCalls(train_prompts=1, held_out_prompts=1, allow_preamble=allowed)
        for allowed in (True, False)
    )
    for response, passes in [(words + call, True), (call, True), (f"{call}\nso.", False)]:
        assert free.grade(prompt, response).passed == passes
        assert strict.grade(prompt, response).passed == (response == call)
    assert free.answer(prompt, words + call) == free.answer(prompt, call) is not None
    assert strict.answer(prompt, words + call) is None


def test_the_preambles_of_the_corpus_stand_before_calls_alone_and_before_solutions():
    plain, talking = ToolCallCorpus(), ToolCallCorpus(preamble=True)
    talked = 0
    for index in range(400):
        before, after = plain[index], talking[index]
        *lines, call = after.response.split("\n")
        assert call == before.response
        if len(before.messages[-1]["content"].split("\n")) > 2:  # a context
            assert not lines
        else:
            assert after.messages == before.messages
            talked += bool(lines)
    bare = sum(len(plain[i].messages[-1]["content"].split("\n")) == 2 for i in range(400))
    assert abs(talked / bare - 0.7) < 4 * (0.7 * 0.3 / bare) ** 0.5
