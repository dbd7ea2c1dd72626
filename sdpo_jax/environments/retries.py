"""Multi-turn retries for any environment: each failed attempt is answered with its own feedback.

The next user message wraps the feedback in the same sentences as the teacher's re-prompt, so that
a model that can use feedback as its own teacher can use it here, too. An attempt that passes ends
its episode. A retry reveals that the attempt failed, even if the environment gives no feedback on
purpose.

SDPO (arXiv 2601.20802, section 5) compares with such conversations at test time only. Validated by
`tests/test_episodes.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sdpo_jax.environments.base import Environment, HasEpisodes, Outcome, Prompt, Step
from sdpo_jax.environments.grading import Grader

HEADER = "Feedback on an earlier attempt:\n\n"
SILENT = "The answer is not correct."
"""Used where the environment gives no feedback."""
INSTRUCTION = "\n\nSolve the question above correctly."


class Attempts(NamedTuple):
    """The episode of one prompt; earlier attempts do not change how an attempt is graded."""

    retries: "Retries"
    prompt: Prompt

    def step(self, response: str) -> Step:
        """Grades the next attempt."""
        return self.retries.step_many([self], [response], [False])[0]


class Retries:
    """An environment of episodes in which the model retries within the same conversation."""

    def __init__(self, environment: Environment):
        """Wraps any environment; every turn is graded by `Grader`."""
        self._grade = Grader(environment)

    def reset(self, prompt: Prompt) -> Attempts:
        """Starts an episode."""
        return Attempts(self, prompt)

    def step_many(
        self, episodes: Sequence[Attempts], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        """Grades all attempts of a turn in one batch."""
        outcomes = self._grade([episode.prompt for episode in episodes], responses, truncated)
        return [answered(outcome) for outcome in outcomes]


def answered(outcome: Outcome) -> Step:
    """The step that follows an outcome: a failed attempt gets its feedback and goes on."""
    if outcome.passed or not outcome.graded:
        return Step(None, outcome)
    return Step(HEADER + (outcome.feedback.strip() or SILENT), outcome, INSTRUCTION)


def with_episodes(environment: Environment, max_turns: int) -> HasEpisodes:
    """The environment itself if it has episodes and several turns are allowed, else `Retries`."""
    if max_turns > 1 and isinstance(environment, HasEpisodes):
        return environment
    return Retries(environment)
