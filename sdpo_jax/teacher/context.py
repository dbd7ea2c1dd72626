"""What the self-teacher sees: which demonstration, which feedback, and the prompt around them.

Pure Python on strings; no array enters. The student answers the question; the teacher re-scores
the same answer after a prompt that also shows a successful sibling attempt, or the environment's
feedback (SDPO, arXiv 2601.20802, section 2 and table 2). The answer itself is part of the
teacher's prompt only with `teacher.own_attempt`.

Where this differs from the released code:

* A re-prompt that is too long is cut in its parts: first the demonstration's end, then the
  own attempt's and the feedback's, then the question's start. The released code cuts the rendered
  prompt from the right, and so removes the closing line and the assistant header.
* An unclosed `<think>` hides everything after it, and a `</think>` without an opening tag
  (templates that open the block themselves) everything before it. A demonstration that is blank
  after this is no demonstration.
* The sentences around the parts are our own, and short: the smallest models read them too.

Text of demonstrations and feedback is data. Whoever turns messages into token ids must encode
their content without control tokens.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from sdpo_jax.config import TeacherConfig
from sdpo_jax.environments.base import Outcome
from sdpo_jax.errors import UserError
from sdpo_jax.tokens import Tokenizer, end_of, start_of

Messages = tuple[Mapping[str, str], ...]
"""Chat messages, `{"role": ..., "content": ...}`; the last one is the user's."""

DEMONSTRATION_HEADER = "\nCorrect solution:\n\n"
ATTEMPT_HEADER = "\nEarlier attempt:\n\n"
FEEDBACK_HEADER = "\nFeedback on an earlier attempt:\n\n"
CLOSING = "\n\nSolve the question above correctly."
EXAMPLE_CLOSING = "\n\nSolve the question above yourself."

_THINK_BLOCK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_THINK_UNOPENED = re.compile(r"\A.*</think>\s*", re.DOTALL)
_THINK_UNCLOSED = re.compile(r"\s*<think>.*\Z", re.DOTALL)


class TeacherContext(NamedTuple):
    """What a rollout's teacher sees besides the question; `None` where there is nothing to show."""

    demonstration: str | None
    feedback: str | None
    attempt: str | None = None  # the rollout's own text, beside its feedback

    @property
    def kind(self) -> str:
        """By which evaluations report it: `demonstration`, alone or not; else `feedback`."""
        return "feedback" if self.demonstration is None else "demonstration"


class Wording(NamedTuple):
    """The sentences around the parts."""

    demonstration: str  # above a demonstration
    feedback: str  # above feedback
    closing: str  # at the end


ATTEMPTS = Wording(DEMONSTRATION_HEADER, FEEDBACK_HEADER, CLOSING)
"""Of SDPO: a sibling's attempt, feedback on one's own."""

EXAMPLE = Wording(DEMONSTRATION_HEADER, FEEDBACK_HEADER, EXAMPLE_CLOSING)
"""Of SDFT (arXiv 2601.19897): an expert's response, and an own one is asked for, not a copy."""


class FittedReprompt(NamedTuple):
    """A teacher prompt within its token budget, and the part of the context that it still shows.

    `context` is None if nothing of it is left: such a row has no teacher signal.
    """

    messages: Messages
    context: TeacherContext | None


def remove_thinking(text: str) -> str:
    """Cuts `<think>...</think>`, white space after it, and blocks that lack one of the tags."""
    text = _THINK_BLOCK.sub("", text)
    text = _THINK_UNOPENED.sub("", text)
    return _THINK_UNCLOSED.sub("", text)


def choose_context(
    outcomes: Sequence[Outcome],
    responses: Sequence[str],
    group_size: int,
    config: TeacherConfig,
    *,
    seed: int = 0,
    remembered: Sequence[Sequence[str]] = (),
) -> list[TeacherContext | None]:
    """Chooses what the teacher of each rollout sees.

    A rollout is a success if its reward reaches the threshold. Demonstrations are successes of the
    same prompt, without the rollout itself if so configured: a lone success then has none. What
    could not be graded has no context and is none.

    Args:
        outcomes: [N], rollout `i` belongs to prompt `i // group_size`.
        responses: [N], decoded without control tokens.
        group_size: rollouts per prompt, `G`.
        config: what may be shown, and which success is taken.
        seed: of the choice `random`, which depends on nothing but seed and row.
        remembered: for each prompt successes of earlier steps, for groups without one; or none.

    Returns:
        [N]; None where there is neither a demonstration nor feedback: no teacher signal.
    """
    _check_groups(len(outcomes), len(responses), group_size)
    shown = [shown_text(response, config) for response in responses]
    contexts: list[TeacherContext | None] = []
    for row, outcome in enumerate(outcomes):
        if not outcome.graded:
            contexts.append(None)
            continue
        start = row - row % group_size
        passed = [i for i in range(start, start + group_size) if is_success(outcomes[i], config)]
        candidates = [
            text
            for sibling in passed
            if not (config.exclude_own_success and sibling == row)
            and (text := shown[sibling]) is not None
        ]
        if not passed and remembered:
            candidates = list(remembered[row // group_size])
        demonstration = _choose_demonstration(candidates, config.demonstration, seed, row)
        wanted = demonstration is None or not config.feedback_only_without_demonstration
        feedback = _text_or_none(outcome.feedback) if config.feedback and wanted else None
        context = _context_or_none(demonstration, feedback)
        if config.own_attempt and context is not None and feedback is not None:
            context = context._replace(attempt=_text_or_none(responses[row]))
        contexts.append(context)
    return contexts


def is_success(outcome: Outcome, config: TeacherConfig) -> bool:
    """Whether a rollout may serve as a demonstration."""
    return outcome.graded and outcome.reward >= config.success_threshold


def reprompt(
    messages: Messages, context: TeacherContext | None, wording: Wording = ATTEMPTS
) -> Messages:
    """The teacher's prompt: question, demonstration, feedback, closing line, in one user message.

    Messages before the last stay as they are. Without a context the prompt is the plain question.
    """
    return messages if context is None else _compose(messages, context, wording)


def fit_reprompt(
    messages: Messages,
    context: TeacherContext | None,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_feedback_tokens: int,
    wording: Wording = ATTEMPTS,
) -> FittedReprompt:
    """Writes the re-prompt and cuts it to its budgets, both in tokens.

    Feedback is first cut to its own cap. If the rendered prompt is still too long, the
    demonstration loses its end, then the rollout's own attempt and the feedback theirs, then the
    question its start; each keeps the longest part that fits, and a part that is gone loses its
    header. The closing line and what the chat template puts after it are never cut.

    Args:
        messages: the question; the last message is the user's.
        context: what to show; None gives the plain question, unchecked: no teacher will read it.
        tokenizer: text to tokens and back.
        max_prompt_tokens: cap of the rendered prompt, template included.
        max_feedback_tokens: cap of the feedback alone.
        wording: the sentences around the parts.

    Raises:
        UserError: even an empty question with the closing line is too long.
    """
    if context is None:
        return FittedReprompt(messages, None)
    cut = context._replace(
        feedback=start_of(context.feedback or "", tokenizer, max_feedback_tokens)
    )
    write = partial(_from_parts, messages, wording)
    fitted = _fit_parts(write, messages[-1]["content"], cut, tokenizer, max_prompt_tokens)
    if fitted is None:
        smallest = len(tokenizer.render(write("", "", "").messages))
        raise UserError(
            f"teacher.max_prompt_tokens = {max_prompt_tokens} is too small: the chat template, the "
            f"system message and the closing line alone take {smallest} tokens. Raise "
            "teacher.max_prompt_tokens or shorten the system message."
        )
    return fitted


def _compose(messages: Messages, context: TeacherContext, wording: Wording) -> Messages:
    """Joins the parts; plain concatenation, so that braces and percent signs mean nothing."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("expected messages that end with one from the user")
    content = messages[-1]["content"]
    if context.demonstration is not None:
        content += wording.demonstration + context.demonstration
    if context.attempt is not None:
        content += ATTEMPT_HEADER + context.attempt
    if context.feedback is not None:
        content += wording.feedback + context.feedback
    return (*messages[:-1], {**messages[-1], "content": content + wording.closing})


def _check_groups(outcomes: int, responses: int, group_size: int) -> None:
    if outcomes != responses or group_size < 1 or outcomes % group_size:
        raise ValueError(
            "expected as many outcomes as responses, a multiple of group_size; "
            f"got {outcomes}, {responses} and group_size={group_size}"
        )


def shown_text(response: str, config: TeacherConfig) -> str | None:
    """The response as a demonstration, None if nothing of it is left."""
    return _text_or_none(remove_thinking(response) if config.remove_thinking else response)


def _text_or_none(text: object) -> str | None:
    """Text with something in it; an environment's blank or non-string feedback is no feedback."""
    return text if isinstance(text, str) and text.strip() else None


def _context_or_none(demonstration: str | None, feedback: str | None) -> TeacherContext | None:
    if demonstration is None and feedback is None:
        return None
    return TeacherContext(demonstration, feedback)


def _choose_demonstration(candidates: list[str], choice: str, seed: int, row: int) -> str | None:
    if choice == "none" or not candidates:
        return None
    if choice == "shortest":
        return min(candidates, key=len)
    if choice == "random":
        # A hash instead of a generator: the same on every host, Python version and resumption.
        digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
        return candidates[int.from_bytes(digest, "big") % len(candidates)]
    return candidates[0]


def _from_parts(
    messages: Messages,
    wording: Wording,
    question: str,
    demonstration: str,
    feedback: str,
    attempt: str = "",
) -> FittedReprompt:
    """The re-prompt of these parts; a blank part is absent, header and all."""
    context = _context_or_none(_text_or_none(demonstration), _text_or_none(feedback))
    if context is not None:
        context = context._replace(attempt=_text_or_none(attempt))
    asked = (*messages[:-1], {**messages[-1], "content": question})
    return FittedReprompt(_compose(asked, context or TeacherContext(None, None), wording), context)


def _fit_parts(
    write: Callable[..., FittedReprompt],
    question: str,
    context: TeacherContext,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> FittedReprompt | None:
    """The longest re-prompt within `max_tokens`, cutting one part after the other."""
    demonstration, feedback, attempt = (text or "" for text in context)

    def start(text: str, tokens: int) -> str:
        return start_of(text, tokenizer, tokens)

    def fits(candidate: FittedReprompt) -> bool:
        return len(tokenizer.render(candidate.messages)) <= max_tokens

    # Each part, and the re-prompt with `n` of its tokens and without the parts before it.
    cuts: tuple[tuple[str, Callable[[int], FittedReprompt]], ...] = (
        (demonstration, lambda n: write(question, start(demonstration, n), feedback, attempt)),
        (attempt, lambda n: write(question, "", feedback, start(attempt, n))),
        (feedback, lambda n: write(question, "", start(feedback, n))),
        (question, lambda n: write(end_of(question, tokenizer, n), "", "")),
    )
    for text, shorter in cuts:
        fitted = _longest_fit(len(tokenizer.encode(text)), shorter, fits)
        if fitted is not None:
            return fitted
    return None


def _longest_fit(
    tokens: int, shorter: Callable[[int], FittedReprompt], fits: Callable[[FittedReprompt], bool]
) -> FittedReprompt | None:
    """Binary search for the most tokens that fit; None if even zero tokens do not fit."""
    whole = shorter(tokens)
    if fits(whole):
        return whole
    best, low, high = shorter(0), 0, tokens - 1  # `low` fits, what is above `high` does not
    if not fits(best):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        candidate = shorter(middle)
        if fits(candidate):
            best, low = candidate, middle
        else:
            high = middle - 1
    return best
