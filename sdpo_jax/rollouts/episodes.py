"""Episodes: the model responds, the environment replies in text, and so on until the episode ends.

    turn 1      `G` responses to each prompt, as without episodes
    between     what the chat template writes around the environment's text (`turns.py`)
    turn 2 ...  the episodes that go on, each as a prompt of its own, with all its ids so far

An episode ends where the environment says so or cannot grade, after `max_turns`, and with a
response that was cut at the token limit: the model cannot continue after an end of turn that it did
not write. An episode that is over costs no further sampling.

Cost: a later turn runs its conversation through the model once more (prefill), where an engine
that kept the keys and values of turn 1 would only run what is new; and each row has a prefix of its
own, which siblings no longer share. At most `slots` conversations are prefilled at a time. In the
update an episode is one sequence, computed once.

A draw depends on (seed, step, prompt, sibling, turn, position) and on the conversation alone, so
not on which other episodes go on.
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.distributed import all_processes
from sdpo_jax.environments.base import Outcome, Prompt, Step, not_graded
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.generate import Turn
from sdpo_jax.rollouts.sampler import HostRollouts, OnDone
from sdpo_jax.rollouts.turns import ids_between
from sdpo_jax.tokens import Tokenizer, start_of

Grader = Callable[[list[int], list[str], list[bool]], list[Step]]
"""`grade(rows, responses, truncated)`: the next step of each of these rows of all `P·G`."""


class Sample(Protocol):
    """A `Sampler` whose weights and settings of the draw are bound."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group: int,
        first_prompt: int,
        prompt_rows: int,
        turn: Turn | None,
        on_done: OnDone,
    ) -> HostRollouts:
        """See `Sampler.__call__`."""
        ...


class Limits(NamedTuple):
    """Limits of episodes."""

    turns: int
    observation_tokens: int
    slots: int
    """Conversations of later turns that are prefilled at a time; 0: all."""


class Episode:
    """One row: what followed its prompt, and what the environment said, turn by turn."""

    def __init__(self, prompt: Prompt, prompt_ids: list[int]):
        """Nothing sampled yet."""
        self.prompt, self.prompt_ids = prompt, prompt_ids
        self.ids: list[int] = []
        self.response_mask = np.zeros(0, np.bool_)
        """Which of the ids the model wrote."""
        self.log_probs = np.zeros(0, np.float32)
        """Of the sampling distribution; 0 where the model did not write."""
        self.steps: list[Step] = []
        self.observations: list[str] = []
        """As the model saw them."""
        self.response, self.stopped = "", True  # text of the last turn, and whether it was whole

    @property
    def turns(self) -> int:
        """Turns of the model."""
        return len(self.steps)

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the model wrote."""
        return int(self.response_mask.sum())

    @property
    def sampled_ids(self) -> list[int]:
        """The tokens that the model wrote, without those between its turns."""
        return [i for i, sampled in zip(self.ids, self.response_mask, strict=True) if sampled]

    @property
    def outcome(self) -> Outcome:
        """Of the last turn, with the feedback of the last turn that was told something.

        An episode that fails and then passes still has feedback that a teacher can be shown.
        """
        final = self.steps[-1].outcome
        if not final.graded or final.feedback.strip():
            return final
        said = [s.outcome.feedback for s in self.steps if s.outcome.feedback.strip()]
        return final._replace(feedback=said[-1]) if said else final

    @property
    def goes_on(self) -> bool:
        """Whether the model may have another turn."""
        step = self.steps[-1]
        return step.observation is not None and step.outcome.graded and self.stopped

    def write(self, ids: Sequence[int], log_probs: NDArray[np.float32] | None) -> None:
        """Appends ids; those with log-probs are the ones that the model wrote."""
        sampled = log_probs is not None
        self.ids += ids
        self.response_mask = np.append(self.response_mask, np.full(len(ids), sampled))
        zeros = np.zeros(len(ids), np.float32)
        self.log_probs = np.append(self.log_probs, log_probs if sampled else zeros)


def run_episodes(
    sample: Sample,
    grade: Grader,
    tokenizer: Tokenizer,
    limits: Limits,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    *,
    group: int,
    first_prompt: int = 0,
    prompt_rows: int = 1,
) -> list[Episode]:
    """Runs `group` episodes of each prompt to their end; row `n` belongs to prompt `n // group`.

    Args:
      sample: draws responses.
      grade: calls the environment, for rows as they finish, while the device goes on.
      tokenizer: decodes responses and writes what stands between turns.
      limits: of turns and tokens.
      prompts: [P].
      prompt_ids: [P], rendered.
      group: `G`.
      first_prompt: see `Sampler.__call__`, as is `prompt_rows`.
      prompt_rows: of the first turn.

    Raises:
      UserError: the environment raised, or the chat template cannot go on (`ids_between`).
    """
    pairs = zip(prompts, prompt_ids, strict=True)
    rows = [Episode(prompt, ids) for prompt, ids in pairs for _ in range(group)]
    given = {"group": group, "first_prompt": first_prompt, "prompt_rows": prompt_rows}
    first = partial(sample, prompt_ids, turn=None, **given)
    _run_turn(rows, list(range(len(rows))), first, grade, tokenizer)
    size = min(limits.slots or len(rows), len(rows))
    for number in range(1, limits.turns):
        members = [i for i, row in enumerate(rows) if row.goes_on]
        _reply([rows[i] for i in members], tokenizer, limits.observation_tokens)
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            prompt_of = [first_prompt + i // group for i in batch]
            turn = Turn(prompt_of, [i % group for i in batch], number)
            later = _later_turn(sample, rows, batch, turn, size)
            _run_turn(rows, batch, later, grade, tokenizer)
    return rows


def _later_turn(
    sample: Sample, rows: list[Episode], members: list[int], turn: Turn, size: int
) -> Callable[..., HostRollouts]:
    """Draws a later turn of these rows, in one of few sizes up to `size`, each a program."""
    while -(-size // 2) >= len(members) and size > 1:
        size = -(-size // 2)
    ids = [[*rows[i].prompt_ids, *rows[i].ids] for i in members]
    return partial(sample, ids, turn=turn, group=1, first_prompt=0, prompt_rows=size)


def _run_turn(
    rows: list[Episode],
    members: list[int],
    draw: Callable[..., HostRollouts],
    grade: Grader,
    tokenizer: Tokenizer,
) -> None:
    """Draws, grades and records one turn of the rows `members`."""
    done: dict[int, tuple[str, Step]] = {}

    def grade_finished(which: list[int], rollouts: HostRollouts) -> None:
        texts = [tokenizer.decode(rollouts.response(i)) for i in which]
        cut = [not rollouts.stopped[i] for i in which]
        steps = grade([members[i] for i in which], texts, cut)
        done.update(zip(which, zip(texts, steps, strict=True), strict=True))

    rollouts = draw(on_done=grade_finished)
    if late := [i for i in range(len(members)) if i not in done]:
        grade_finished(late, rollouts)
    outcomes = agreed([done[i][1].outcome for i in range(len(members))])
    for i, (member, outcome) in enumerate(zip(members, outcomes, strict=True)):
        row, (text, step) = rows[member], done[i]
        row.write(rollouts.response(i), rollouts.log_probs[i, : rollouts.lengths[i]])
        row.response, row.stopped = text, bool(rollouts.stopped[i])
        row.steps.append(step._replace(outcome=outcome))


def _reply(rows: list[Episode], tokenizer: Tokenizer, max_tokens: int) -> None:
    """Writes what stands between the last turn of each row and its next."""
    known: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        step = row.steps[-1]
        seen = start_of(step.observation or "", tokenizer, max_tokens) + step.instruction
        row.observations.append(seen)
        key = (row.prompt.id, *row.observations)
        if key not in known:
            known[key] = ids_between(tokenizer, row.prompt.messages, row.observations)
        row.write(known[key], None)


def agreed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What one process of a run could not grade counts as not graded in all of them.

    Every process grades all rollouts. A failure that only one of them sees would give them other
    rows to compute, and they would wait for each other for ever.
    """
    everywhere = all_processes(np.asarray([outcome.graded for outcome in outcomes], np.bool_))
    elsewhere = not_graded("another process of the run could not grade it")
    return [
        elsewhere if outcome.graded and not ok else outcome
        for outcome, ok in zip(outcomes, everywhere, strict=True)
    ]


def episodes_to_state(prompts: Sequence[Prompt], rows: Sequence[Episode]) -> dict[str, Any]:
    """Sampled single turns, JSON-serialisable, at most 8 bytes a token."""
    return {
        "prompts": [prompt.id for prompt in prompts],
        "lengths": [len(row.ids) for row in rows],
        "stopped": [row.stopped for row in rows],
        "ids": _compress(np.concatenate([np.asarray(row.ids, "<i4") for row in rows])),
        "log_probs": _compress(np.concatenate([row.log_probs for row in rows]).astype("<f4")),
    }


def episodes_from_state(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    group: int,
    state: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> list[Episode]:
    """Undoes `episodes_to_state`; the episodes are not graded.

    Raises:
      UserError: the state belongs to other prompts.
    """
    if [prompt.id for prompt in prompts] != state["prompts"]:
        raise UserError(
            "the checkpoint holds rollouts of other prompts than those that come next: "
            f"{state['prompts'][:3]}, ... and {[p.id for p in prompts[:3]]}, ...; restore the "
            "environment's prompts and the seed, or start in a new run directory"
        )
    pairs = zip(prompts, prompt_ids, strict=True)
    rows = [Episode(prompt, ids) for prompt, ids in pairs for _ in range(group)]
    ends = np.cumsum(state["lengths"])[:-1]
    ids = np.split(_decompress(state["ids"], "<i4"), ends)
    log_probs = np.split(_decompress(state["log_probs"], "<f4").astype(np.float32), ends)
    for row, sampled, log_prob, stopped in zip(rows, ids, log_probs, state["stopped"], strict=True):
        row.write(sampled.tolist(), log_prob)
        row.response, row.stopped = tokenizer.decode(sampled.tolist()), stopped
    return rows


def _compress(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _decompress(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
