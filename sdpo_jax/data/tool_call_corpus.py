"""The embedded model's pre-training text: tool calls under many APIs, alone and with context.

Each row draws a task and an API and asks for the call that this API accepts. Three kinds of prompt
teach three things: the bare request (how common each form is), the request with a correct solution
(copy it), the request with feedback on a wrong attempt (read which form is wanted). Feedback is
made by the environment's own grader from an attempt under another API, and contexts by the
teacher's own re-prompt.

With `preamble`, a response without a context begins with lines of talk (about two on average), and
a response after a context is the call alone; solutions that are shown may begin with talk, too.
Such a model can drop the talk without losing anything, as its teacher does.

What keeps the model honest: with feedback, an argument is attempted wrongly half of the time
*whatever* its form, so silence about an argument carries no news and the model falls back on how
common each form is. No held-out task appears.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.kinds.tool_calls import (
    Task,
    complaints,
    draw_task,
    is_held_out,
    question,
    write_call,
)
from sdpo_jax.environments.toy_apis import FAMILIES, Api, Form
from sdpo_jax.teacher.context import TeacherContext, reprompt

BARE, SOLUTION, FEEDBACK, BOTH = 0.35, 0.2, 0.4, 0.05
"""Shares of the kinds of prompt."""


TALK = (
    "let me see.",
    "one moment.",
    "first the tool.",
    "now the time and the day.",
    "i will look at the tools.",
    "this is a request.",
)
MORE_TALK, MOST_TALK = 0.7, 5
"""How often one more line follows, and how many there are at most."""


class Attempt(NamedTuple):
    """A call under one API and the API that the environment really has."""

    text: str
    api: Api


class ToolCallCorpus(Sequence[Demonstration]):
    """A random-access sequence of demonstrations; row `i` is a pure function of `(seed, i)`."""

    def __init__(self, size: int = 1_000_000, *, seed: int = 0, preamble: bool = False):
        self._size, self._seed, self._preamble = size, seed, preamble

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Demonstration:  # pyright: ignore[reportIncompatibleMethodOverride]
        rng = random.Random(f"tool_call_corpus:{self._seed}:{index}")
        task = _draw_seen_task(rng)
        messages = ({"role": "user", "content": question(task)},)
        kind = rng.choices(
            ("bare", "solution", "feedback", "both"), (BARE, SOLUTION, FEEDBACK, BOTH)
        )
        context, api = _context(rng, task, kind[0])
        talk = _talk(rng) if self._preamble else ""
        response = write_call(task, api)
        if context is None:
            return Demonstration(str(index), messages, talk + response)
        if context.demonstration is not None:
            context = context._replace(demonstration=talk + context.demonstration)
        return Demonstration(str(index), reprompt(messages, context), response)


def _talk(rng: random.Random) -> str:
    """Lines that a call can do without."""
    lines: list[str] = []
    while len(lines) < MOST_TALK and rng.random() < MORE_TALK:
        lines.append(rng.choice(TALK) + "\n")
    return "".join(lines)


def _draw_seen_task(rng: random.Random) -> Task:
    while True:
        task = draw_task(rng, rng.choice(tuple(FAMILIES)))
        if not is_held_out(task):
            return task


def _context(rng: random.Random, task: Task, kind: str) -> tuple[TeacherContext | None, Api]:
    if kind == "bare":
        return None, _common_api(rng, task)
    if kind == "solution":
        api = _uniform_api(rng, task)
        return TeacherContext(demonstration=write_call(task, api), feedback=None), api
    attempt = _attempt(rng, task)
    feedback = "\n".join(complaints(task, attempt.text, attempt.api)) or None
    shown = write_call(task, attempt.api) if kind == "both" else None
    if feedback is None and shown is None:
        return None, attempt.api
    return TeacherContext(demonstration=shown, feedback=feedback), attempt.api


def _common_form(rng: random.Random, forms: dict[str, Form]) -> str:
    return rng.choices(tuple(forms), [form.share for form in forms.values()])[0]


def _common_api(rng: random.Random, task: Task) -> Api:
    slots = FAMILIES[task.family].slots
    return {(task.family, s.name): _common_form(rng, dict(s.forms)) for s in slots}


def _uniform_api(rng: random.Random, task: Task) -> Api:
    slots = FAMILIES[task.family].slots
    return {(task.family, s.name): rng.choice(tuple(s.forms)) for s in slots}


def _attempt(rng: random.Random, task: Task) -> Attempt:
    """A wrong attempt; now and then a broken or foreign call, which says nothing about any form."""
    damage = rng.random()
    if damage < 0.08:
        api = _common_api(rng, task)
        return Attempt(_damage(rng, task, write_call(task, api), broken=damage < 0.04), api)
    wrong: dict[tuple[str, str], str] = {}
    right: dict[tuple[str, str], str] = {}
    for slot in FAMILIES[task.family].slots:
        key = (task.family, slot.name)
        if len(slot.forms) > 1 and rng.random() < 0.5:
            right[key], wrong[key] = rng.sample(tuple(slot.forms), 2)
        else:
            right[key] = wrong[key] = _common_form(rng, dict(slot.forms))
    return Attempt(write_call(task, wrong), right)


def _damage(rng: random.Random, task: Task, call: str, *, broken: bool) -> str:
    if broken:
        return call[: rng.randrange(1, len(call))]
    tool = FAMILIES[task.family].tool
    return call.replace(tool, rng.choice([other for other in task.tools if other != tool]))
