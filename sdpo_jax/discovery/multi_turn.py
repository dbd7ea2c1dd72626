"""Multi-turn asking, the baseline without training: the weights stay, the prompt grows.

Two forms (arXiv 2601.20802, section 5 and its appendix on baselines):

* `feedback_only`: the question with the feedback on all earlier attempts, joined by blank lines;
  the attempts themselves are not shown. The paper's better one.
* `conversation`: question, attempt, feedback, attempt, feedback, ... as turns of a chat.

A prompt that is longer than `teacher.max_prompt_tokens` loses its oldest feedback (with its
attempt), for good. The prompt around the feedback is the self-teacher's own (`teacher.context`), so
that training and asking show a model the same words. Texts are pinned in tests/test_multi_turn.py.
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
        """Takes note of a failed attempt; one that could not be graded leaves no trace.

        Without attempts, blank feedback leaves none either: there would be nothing to show.
        """
        if not outcome.graded:
            return
        feedback = outcome.feedback.strip()
        if feedback or self._shows_attempts:
            shown = remove_thinking(attempt) if self._config.remove_thinking else attempt
            self._turns.append((shown, feedback))

    def ids(self) -> list[int]:
        """The next prompt; drops what is oldest until it fits.

        Raises:
          UserError: with nothing but the last feedback, cut short, it is still too long.
        """
        limit = self._config.max_prompt_tokens
        while self._turns:
            ids = self._tokenizer.render(self.messages())
            if len(ids) <= limit:
                return ids
            if len(self._turns) == 1 and not self._shows_attempts:
                return self._tokenizer.render(self._cut())
            self._turns.popleft()
        return self._tokenizer.render(self.prompt.messages)

    def messages(self) -> Messages:
        """The next prompt as chat messages, however long."""
        question: Messages = tuple(self.prompt.messages)
        if not self._turns:
            return question
        if not self._shows_attempts:
            return reprompt(question, self._context())
        messages = list(question)
        for attempt, feedback in self._turns:
            said = (feedback + CLOSING).lstrip()
            messages.append({"role": "assistant", "content": attempt})
            messages.append({"role": "user", "content": said})
        return tuple(messages)

    def _context(self) -> TeacherContext:
        return TeacherContext(None, "\n\n".join(feedback for _, feedback in self._turns))

    def _cut(self) -> Messages:
        """The question with as much of the only feedback as fits."""
        tokenizer, limit = self._tokenizer, self._config.max_prompt_tokens
        return fit_reprompt(
            self.prompt.messages,
            self._context(),
            tokenizer,
            max_prompt_tokens=limit,
            max_feedback_tokens=limit,
        ).messages
