"""Any environment as one with episodes: a failed attempt is answered by its own feedback.

The next turn's user message holds the feedback between the sentences that the teacher's re-prompt
puts around it, so that a model that can use feedback as its own teacher can use it here, too. An
attempt that passes ends its episode. Being asked again says that an attempt has failed, also where
the environment's feedback is silent on purpose.

SDPO (arXiv 2601.20802, section 5) compares with such conversations at test time only. Validated by
`tests/test_episodes.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sdpo_jax.environments.base import Environment, HasEpisodes, Outcome, Prompt, Step
from sdpo_jax.environments.grading import Grader

HEADER = "Feedback on an earlier attempt:\n\n"
SILENT = "The answer is not correct."
"""Stands in where the environment has no feedback."""
INSTRUCTION = "\n\nSolve the question above correctly."


class Attempts(NamedTuple):
    """The episode of one prompt; what went before does not change how an attempt is judged."""

    retries: "Retries"
    prompt: Prompt

    def step(self, response: str) -> Step:
        """Judges the next attempt."""
        return self.retries.step_many([self], [response], [False])[0]


class Retries:
    """Lets a model try again, in the same conversation."""

    def __init__(self, environment: Environment):
        """Wraps any environment; it grades turn by turn with all that it offers (`Grader`)."""
        self._grade = Grader(environment)

    def reset(self, prompt: Prompt) -> Attempts:
        """The first attempt."""
        return Attempts(self, prompt)

    def step_many(
        self, episodes: Sequence[Attempts], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        """Grades all attempts of a turn at a time."""
        outcomes = self._grade([episode.prompt for episode in episodes], responses, truncated)
        return [answered(outcome) for outcome in outcomes]


def answered(outcome: Outcome) -> Step:
    """The step of an attempt: a failed one is told why."""
    if outcome.passed or not outcome.graded:
        return Step(None, outcome)
    return Step(HEADER + (outcome.feedback.strip() or SILENT), outcome, INSTRUCTION)


def with_episodes(environment: Environment, max_turns: int) -> HasEpisodes:
    """The environment's own episodes where it has them, or attempts, of which one may be all."""
    if max_turns > 1 and isinstance(environment, HasEpisodes):
        return environment
    return Retries(environment)
