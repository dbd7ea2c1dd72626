"""Nano programs: the API in the sandbox is today's, its errors speak the words of `tool_calls`."""

import random

import pytest

from sdpo_jax.environments.code import nano_api
from sdpo_jax.environments.kinds.nano_code import NanoCode, api_source, wanted_state
from sdpo_jax.environments.kinds.tool_calls import ToolCalls, complaints, draw_task, write_call
from sdpo_jax.environments.sandbox import open_sandbox
from sdpo_jax.environments.sandbox.protocol import Observation
from sdpo_jax.environments.toy_apis import FAMILIES, TODAY


@pytest.fixture(scope="module")
def environment():
    box = open_sandbox("unsafe-local", slots=2)
    yield NanoCode(train_prompts=24, held_out_prompts=12, sandbox=box)
    box.close()


def alarm(environment):
    return next(p for p in environment.train if p.data["family"] == "alarm")


def drawn(count):
    """Tasks with a call under an API that is drawn argument by argument."""
    chance = random.Random(0)
    for i in range(count):
        task = draw_task(chance, list(FAMILIES)[i % len(FAMILIES)])
        api = {
            (task.family, slot.name): chance.choice(list(slot.forms))
            for slot in FAMILIES[task.family].slots
        }
        yield task, write_call(task, api)


def test_the_api_complains_as_the_calls_environment_does_and_does_what_it_accepts():
    accepted = 0
    for task, call in drawn(3000):
        words = complaints(task, call, TODAY)
        nano_api.done.clear()
        try:
            exec(call, vars(nano_api))
        except TypeError as error:
            # It knows the forms; only the judge knows the request.
            forms = [line for line in words if ": wrong value " not in line]
            assert str(error).split("\n") == forms, call
        else:
            assert (nano_api.done == wanted_state(task)) is (words == []), call
            assert all(": wrong value " in line for line in words), call
            accepted += not words
    assert 100 < accepted < 2900


def test_the_prelude_stands_alone_and_makes_every_tool():
    scope = {}
    exec(compile(api_source(), "api", "exec"), scope)
    assert {spec.tool for spec in FAMILIES.values()} <= scope.keys() and scope["done"] == []
    assert "import" not in api_source()


def test_references_pass(environment):
    prompts = [*environment.train, *environment.held_out]
    answers = [environment.reference(prompt) for prompt in prompts]
    for prompt, outcome in zip(prompts, environment.grade_many(prompts, answers), strict=True):
        assert outcome.passed and outcome.reward == 1.0 and outcome.feedback == "", prompt
        assert outcome.metrics["well_formed"] == 1.0


def test_prompts_are_those_of_the_calls_environment(environment):
    there = ToolCalls(train_prompts=24, held_out_prompts=12)
    assert (environment.train, environment.held_out) == (there.train, there.held_out)


def test_feedback_is_the_real_error_or_names_the_wrong_argument(environment):
    prompt = alarm(environment)
    right = environment.reference(prompt)
    other = next(tool for tool in prompt.data["task"].tools if tool != "set_alarm")
    cases = {
        'set_alarm(time="7:30 pm", day="tuesday")': "time: expected 24-hour HH:MM\n"
        "day: expected three-letter weekday",
        "set_alarm()": "missing argument: time, 24-hour HH:MM\n"
        "missing argument: day, three-letter weekday",
        right.replace(")", ", snooze=1)"): "unexpected argument: snooze",
        "set_alarm(": "'(' was never closed",
        "ring(day=1)": "name 'ring' is not defined",
        'set_alarm(time="00:01", day="xyz")': 'time: wrong value "00:01"\nday: wrong value "xyz"',
        f"{right}\n{right}": "expected one call, got 2",
        "raise KeyError": "KeyError",
        "pass": "nothing was called: expected tool(argument=value, ...)",
        "done.append(1)": "nothing was called: expected tool(argument=value, ...)",
        "import os; os._exit(0)": "the program ended without a result",
    }
    outcomes = environment.grade_many([prompt] * len(cases), list(cases))
    for (source, feedback), outcome in zip(cases.items(), outcomes, strict=True):
        assert outcome.reward == 0.0 and outcome.feedback == feedback, source
    call = next(write_call(t, TODAY) for t, _ in drawn(50) if FAMILIES[t.family].tool == other)
    assert environment.grade(prompt, call).feedback == f"wrong tool for this request: {other}"


def test_tampering_gains_nothing(environment):
    prompt = alarm(environment)
    for source in (
        "class A(list):\n    def __eq__(self, o): return True\ndone = A()",
        "class A(dict):\n    def __eq__(self, o): return True\ndone = [['set_alarm', A()]]",
        "_TOOLS['set_alarm'].clear()\nset_alarm()",
        "done = True",
        "print('[[\"set_alarm\", {}]]')",
        "done[:] = [[[[[]]]]]",
    ):
        outcome = environment.grade(prompt, source)
        assert outcome.reward == 0.0 and outcome.graded and outcome.feedback, source


def test_equal_programs_of_a_batch_run_once_and_are_judged_each_for_its_prompt():
    class Counting:
        tier = "counting"
        ran = 0

        def run(self, programs):
            self.ran += len(programs)
            return [[Observation("infrastructure")] for _ in programs]

        def close(self):
            pass

    box = Counting()
    counted = NanoCode(train_prompts=6, held_out_prompts=0, sandbox=box)
    outcomes = counted.grade_many(counted.train, ["pass", "x", "pass", "pass", "x", "pass"])
    assert box.ran == 2
    assert [outcome.graded for outcome in outcomes] == [False] * 6
