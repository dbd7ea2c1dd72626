"""Multi-turn prompting, a baseline without training: the weights stay, the prompt grows.

Two forms (arXiv 2601.20802, section 5 and its appendix on baselines):

* `feedback_only`: the question with the feedback on all earlier attempts, separated by blank lines;
  the attempts are not shown. The better one in the paper.
* `conversation`: question, attempt, feedback, attempt, feedback, ... as turns of a chat.

Where a prompt is longer than `teacher.max_prompt_tokens`, the oldest feedback (with its attempt) is
dropped from it and from all later ones. The text around the feedback is the self-teacher's
(`teacher.context`), so that training and prompting show the same words. Texts are pinned in
tests/test_multi_turn.py.
"""

from collections import deque

from sdpo_jax.config import TeacherConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.teacher.context import (
    CLOSING,
    Messages,
    TeacherContext,
    fit_reprompt,
    remove_thinking,
    reprompt,
)
from sdpo_jax.tokens import Tokenizer


class Chain:
    """One conversation about one question."""

    def __init__(
        self, prompt: Prompt, config: TeacherConfig, tokenizer: Tokenizer, *, shows_attempts: bool
    ):
        self.prompt, self._config, self._tokenizer = prompt, config, tokenizer
        self._shows_attempts = shows_attempts
        self._turns: deque[tuple[str, str]] = deque()  # attempt, feedback

    def add(self, attempt: str, outcome: Outcome) -> None:
        """Adds a failed attempt; ignores one that could not be graded.

        Where attempts are not shown, one without feedback is ignored, too.
        """
        if not outcome.graded:
            return
        feedback = outcome.feedback.strip()
        if feedback or self._shows_attempts:
            shown = remove_thinking(attempt) if self._config.remove_thinking else attempt
            self._turns.append((shown, feedback))

    def ids(self) -> list[int]:
        """Token ids of the next prompt; drops the oldest turns until it fits.

        Raises:
          UserError: it is too long even with the last feedback alone, truncated.
        """
        limit = self._config.max_prompt_tokens
        while self._turns:
            ids = self._tokenizer.render(self.messages())
            if len(ids) <= limit:
                return ids
            if len(self._turns) == 1 and not self._shows_attempts:
                return self._tokenizer.render(self._truncated())
            self._turns.popleft()
        return self._tokenizer.render(self.prompt.messages)

    def messages(self) -> Messages:
        """The next prompt as chat messages, of any length."""
        question: Messages = tuple(self.prompt.messages)
        if not self._turns:
            return question
        if not self._shows_attempts:
            return reprompt(question, self._context())
        messages = list(question)
        for attempt, feedback in self._turns:
            reply = (feedback + CLOSING).lstrip()
            messages.append({"role": "assistant", "content": attempt})
            messages.append({"role": "user", "content": reply})
        return tuple(messages)

    def _context(self) -> TeacherContext:
        return TeacherContext(None, "\n\n".join(feedback for _, feedback in self._turns))

    def _truncated(self) -> Messages:
        """The question with as much of the only feedback as fits the limit."""
        tokenizer, limit = self._tokenizer, self._config.max_prompt_tokens
        return fit_reprompt(
            self.prompt.messages,
            self._context(),
            tokenizer,
            max_prompt_tokens=limit,
            max_feedback_tokens=limit,
        ).messages
