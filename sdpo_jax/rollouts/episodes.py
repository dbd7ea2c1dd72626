"""Episodes: the model answers, the environment answers in text, and so on until it is over.

    turn 1      `G` responses to each prompt, as without episodes
    between     what the chat template writes around the environment's text (`turns.py`)
    turn 2 ...  the episodes that go on, each as a prompt of its own, with all its ids so far

An episode ends where the environment says so or cannot judge, after `max_turns`, and with a
response that was cut at the token limit: an end of turn that the model did not write is nothing
to go on from. One that is over costs no further sampling.

Cost: a later turn runs its conversation through the model once more (prefill), where an engine
that kept the keys and values of turn 1 would only run what is new; and each row has a prefix of its
own, which siblings no longer share. At most `slots` conversations are prefilled at a time. In the
update an episode is one sequence, computed once.

A draw depends on (seed, step, prompt, sibling, turn, position) and on the conversation alone, so
not on which other episodes go on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.distributed import all_processes
from sdpo_jax.environments.base import Outcome, Prompt, Step, not_graded
from sdpo_jax.rollouts.generate import Turn
from sdpo_jax.rollouts.sampler import HostRollouts, OnDone
from sdpo_jax.rollouts.turns import ids_between
from sdpo_jax.tokens import Tokenizer, start_of

Judge = Callable[[list[int], list[str], list[bool]], list[Step]]
"""`judge(rows, responses, truncated)`: the next step of each of these rows of all `P·G`."""


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
    """Of episodes."""

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
        self.own = np.zeros(0, np.bool_)
        """Whether the model wrote it."""
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
    def own_tokens(self) -> int:
        """Tokens that the model wrote."""
        return int(self.own.sum())

    @property
    def own_ids(self) -> list[int]:
        """What the model wrote, without what stands between its turns."""
        return [i for i, own in zip(self.ids, self.own.tolist(), strict=True) if own]

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
        """Appends ids; they are the model's own if they have log-probs."""
        own = log_probs is not None
        self.ids += ids
        self.own = np.append(self.own, np.full(len(ids), own))
        zeros = np.zeros(len(ids), np.float32)
        self.log_probs = np.append(self.log_probs, log_probs if own else zeros)


class Player:
    """Plays the episodes of prompts to their end."""

    def __init__(self, sample: Sample, judge: Judge, tokenizer: Tokenizer, limits: Limits):
        """Binds what the turns need.

        Args:
          sample: draws responses.
          judge: asks the environment; called for rows as they are done, while the device goes on.
          tokenizer: decodes responses and writes what stands between turns.
          limits: of turns and tokens.
        """
        self._sample, self._judge, self._tokenizer = sample, judge, tokenizer
        self._limits = limits

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        *,
        group: int,
        first_prompt: int = 0,
        prompt_rows: int = 1,
    ) -> list[Episode]:
        """`group` episodes of each prompt; row `n` belongs to prompt `n // group`.

        Args:
          prompts: [P].
          prompt_ids: [P], rendered.
          group: `G`.
          first_prompt: see `Sampler.__call__`, as is `prompt_rows`.
          prompt_rows: of the first turn.

        Raises:
          UserError: the environment raised, or the chat template cannot go on (`ids_between`).
        """
        asked = zip(prompts, prompt_ids, strict=True)
        rows = [Episode(prompt, ids) for prompt, ids in asked for _ in range(group)]
        given = {"group": group, "first_prompt": first_prompt, "prompt_rows": prompt_rows}
        first = partial(self._sample, prompt_ids, turn=None, **given)
        self._turn(rows, list(range(len(rows))), first)
        size = min(self._limits.slots or len(rows), len(rows))
        for number in range(1, self._limits.turns):
            members = [i for i, row in enumerate(rows) if row.goes_on]
            self._answer([rows[i] for i in members])
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                prompt_of = [first_prompt + i // group for i in batch]
                turn = Turn(prompt_of, [i % group for i in batch], number)
                self._later(rows, batch, turn, size)
        return rows

    def _later(self, rows: list[Episode], members: list[int], turn: Turn, size: int) -> None:
        """A later turn of these rows, in one of few sizes, each a program, up to `size`."""
        while -(-size // 2) >= len(members) and size > 1:
            size = -(-size // 2)
        ids = [[*rows[i].prompt_ids, *rows[i].ids] for i in members]
        given = {"group": 1, "first_prompt": 0, "prompt_rows": size}
        self._turn(rows, members, partial(self._sample, ids, turn=turn, **given))

    def _turn(
        self, rows: list[Episode], members: list[int], draw: Callable[..., HostRollouts]
    ) -> None:
        """Draws, judges and writes down one turn of the rows `members`."""
        done: dict[int, tuple[str, Step]] = {}

        def tell(which: list[int], rollouts: HostRollouts) -> None:
            texts = [self._tokenizer.decode(rollouts.response(i)) for i in which]
            cut = [not rollouts.stopped[i] for i in which]
            steps = self._judge([members[i] for i in which], texts, cut)
            done.update(zip(which, zip(texts, steps, strict=True), strict=True))

        rollouts = draw(on_done=tell)
        if late := [i for i in range(len(members)) if i not in done]:
            tell(late, rollouts)
        outcomes = agreed([done[i][1].outcome for i in range(len(members))])
        for i, (member, outcome) in enumerate(zip(members, outcomes, strict=True)):
            row, (text, step) = rows[member], done[i]
            row.write(rollouts.response(i), rollouts.log_probs[i, : rollouts.lengths[i]])
            row.response, row.stopped = text, bool(rollouts.stopped[i])
            row.steps.append(step._replace(outcome=outcome))

    def _answer(self, rows: list[Episode]) -> None:
        """Writes what stands between the last turn of each row and its next."""
        tokenizer, limit = self._tokenizer, self._limits.observation_tokens
        known: dict[tuple[Prompt | str, ...], list[int]] = {}
        for row in rows:
            step = row.steps[-1]
            seen = start_of(step.observation or "", tokenizer, limit) + step.instruction
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
