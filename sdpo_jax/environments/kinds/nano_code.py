"""Kind `nano_code`: the requests of `tool_calls`, answered by a one-call program run in a sandbox.

The embedded model was pre-trained on calls `tool(argument=value, ...)`. Such a call is a program:
it runs in the sandbox after a small API (`code/nano_api.py`), whose functions check their
arguments, raise errors in words and record what they did. The observed state is then compared with
the request outside of the sandbox. So a run of a few minutes exercises the whole code environment:
sandbox, real errors, observations, grading outside. Tasks, API drift and split are those of
`tool_calls`; only the grader differs.

Choices and their reasons:

* The response is the program itself without a fenced block, which the model never saw.
* The API's messages use the words of `tool_calls` (`time: expected 24-hour HH:MM`), which the model
  knows from pre-training. The teacher sees them as Python raised them, but without the place (a
  call is one line) and the exception's type, which is not in the pre-training text: with
  `TypeError: ` in front, the teacher answers 55 % of the requests after feedback, without it 66 %
  (120 held-out requests, 4 attempts each, the model as it comes).
* A call that runs but does the wrong thing raises no error. Its feedback is made outside from the
  observed state and names the argument, never the expected value.
* A program of several calls may run; its state differs from that of one call, so it fails.
* Equal programs of one batch run once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sdpo_jax.config import SEED, at_least, setting
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.environments.code import nano_api
from sdpo_jax.environments.code.values import same_value, shown
from sdpo_jax.environments.kinds.tool_calls import (
    Task,
    ToolCalls,
    complaints,
    expected_arguments,
    write_call,
)
from sdpo_jax.environments.sandbox.protocol import Evaluate, Limits, Observation, Program, Sandbox
from sdpo_jax.environments.sanitize import sanitize
from sdpo_jax.environments.settings import SandboxConfig, sandbox_of
from sdpo_jax.environments.toy_apis import FAMILIES, TODAY

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=10.0, memory_mb=256)
NOTHING_DONE = "nothing was called: expected tool(argument=value, ...)"
_ENDED = {
    "time_limit": "time limit exceeded",
    "memory_limit": "memory limit exceeded",
    "output_limit": "output limit exceeded",
    "died": "the program ended without a result",
}


@dataclass(frozen=True)
class NanoCodeConfig(SandboxConfig):
    """The requests of `tool_calls`, answered by a small program that runs in a sandbox."""

    kind: Literal["nano_code"] = "nano_code"
    train_prompts: int = setting(2048, at_least(1))
    held_out_prompts: int = setting(256, at_least(1))
    families: tuple[str, ...] = ()
    """Task families to draw from; empty means all."""
    seed: int = setting(0, SEED)


class NanoCode:
    """The environment: requests of `tool_calls`, answered by a program.

    The reward is 1 if the program made exactly the expected call, else 0. Metrics: `well_formed`
    (the program is valid Python), `tests_passed`, `trust_in_box` (always 0), `timed_out`.
    """

    def __init__(
        self,
        *,
        train_prompts: int,
        held_out_prompts: int,
        sandbox: Sandbox,
        families: Sequence[str] = (),
        seed: int = 0,
    ):
        tasks = ToolCalls(
            train_prompts=train_prompts,
            held_out_prompts=held_out_prompts,
            families=families,
            seed=seed,
        )
        self.train, self.held_out = tasks.train, tasks.held_out
        self._sandbox = sandbox
        self._prelude = api_source()

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Runs a response and grades the state that it leaves."""
        return self.grade_many([prompt], [response])[0]

    def grade_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Outcome]:
        """One outcome for each pair, in order; all programs run in one batch."""
        sources = list(dict.fromkeys(responses))
        programs = [
            Program(f"{self._prelude}\n{source}", (Evaluate("done"),), LIMITS) for source in sources
        ]
        seen = {s: o[0] for s, o in zip(sources, self._sandbox.run(programs), strict=True)}
        pairs = zip(prompts, responses, strict=True)
        return [_judge(prompt.data["task"], seen[text]) for prompt, text in pairs]

    def reference(self, prompt: Prompt) -> str:
        """A program that `grade` passes."""
        return write_call(prompt.data["task"], TODAY)


def build(config: NanoCodeConfig) -> NanoCode:
    """Builds the environment from its settings and opens the sandbox."""
    return NanoCode(
        train_prompts=config.train_prompts,
        held_out_prompts=config.held_out_prompts,
        sandbox=sandbox_of(config),
        families=config.families,
        seed=config.seed,
    )


def api_source() -> str:
    """The source of the API, which runs before each program."""
    return Path(nano_api.__file__).read_text(encoding="utf-8")


def wanted_state(task: Task) -> list[Any]:
    """The value of `done` after a correct program."""
    return [[FAMILIES[task.family].tool, expected_arguments(task, TODAY)]]


def _judge(task: Task, seen: Observation) -> Outcome:
    if seen.status == "infrastructure":
        return not_graded(f"sandbox: {seen.error or 'no result'}")
    passed = seen.status == "done" and same_value(seen.value, wanted_state(task))
    metrics = {
        "tests_passed": float(passed),
        "well_formed": float(not seen.error.startswith(("SyntaxError", "IndentationError"))),
        "trust_in_box": 0.0,
        "timed_out": float(seen.status == "time_limit"),
    }
    feedback = "" if passed else _feedback(task, seen)
    feedback = sanitize(feedback, max_lines=6, max_line_characters=120, max_characters=400)
    return Outcome(float(passed), passed, feedback, metrics)


def _feedback(task: Task, seen: Observation) -> str:
    """The message of the exception, how the program ended, or what is wrong with its call."""
    if seen.status == "error":  # without the exception's type and the lines that locate it
        lines = [line for line in seen.error.split("\n") if not line.endswith("(Solution.py)")]
        kind, _, message = "\n".join(lines).partition(": ")
        return message or kind
    if seen.status != "done":
        return _ENDED[seen.status]
    calls: Any = seen.value
    match calls:
        case [[str(tool), dict(arguments)]]:
            named = cast("Mapping[str, Any]", arguments)
            text = ", ".join(f"{n}={shown(v)}" for n, v in named.items())
            return "\n".join(complaints(task, f"{tool}({text})", TODAY))
        case [_, _, *_]:
            return f"expected one call, got {len(calls)}"
        case _:
            return NOTHING_DONE
