"""Metrics of a rollout batch, with early warnings of a run that goes wrong.

The warnings are length percentiles, repetition, text copied from demonstrations, and groups without
an advantage. In reports of collapse these move before accuracy does (CGTR, arXiv 2606.03532;
StableSDPO, arXiv 2607.01763).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.environments.base import Outcome
from sdpo_jax.environments.grading import failed_share
from sdpo_jax.rollouts.episodes import Episode
from sdpo_jax.teacher.context import TeacherContext
from sdpo_jax.tokens import Tokenizer

REPEATED_GRAM, OVERLAP_GRAM = 4, 8


def rollout_metrics(
    rows: Sequence[Episode], max_turns: int, group: int, *, is_graded: bool
) -> dict[str, float]:
    """Reward and success of the final outcomes, lengths of what the model wrote, and its turns."""
    lengths = {
        "response_tokens": float(np.mean([row.sampled_tokens for row in rows])),
        "truncated": float(1.0 - np.mean([row.stopped for row in rows])),
    }
    if not is_graded:
        return lengths
    outcomes = [row.outcome for row in rows]
    metrics = {
        **_means([outcome for outcome in outcomes if outcome.graded]),
        "environment/failed": failed_share(outcomes),
        **lengths,
        **rollout_diagnostics([row.sampled_ids for row in rows], outcomes, group),
        **environment_metrics(outcomes),
    }
    if max_turns == 1:
        return metrics
    first = [row.steps[0].outcome for row in rows]
    return metrics | {
        "turns": float(np.mean([row.turns for row in rows])),
        "success_first_turn": _means([o for o in first if o.graded]).get("success", 0.0),
    }


def _means(graded: Sequence[Outcome]) -> dict[str, float]:
    """Reward and success; nothing to report where nothing could be graded."""
    if not graded:
        return {}
    return {
        "reward": float(np.mean([outcome.reward for outcome in graded])),
        "success": float(np.mean([outcome.passed for outcome in graded])),
    }


def rollout_diagnostics(
    responses: Sequence[Sequence[int]], outcomes: Sequence[Outcome], group: int
) -> dict[str, float]:
    """Of `N` responses, a prompt's side by side.

    Returns:
      `response_tokens_p95`; `repetition`, the mean share of a response's 4-grams that came before
      in it; `groups/no_success`, `one_success`, `all_success`: shares of the groups in which
      something could be graded.
    """
    found = {
        "response_tokens_p95": float(np.percentile([len(ids) for ids in responses], 95)),
        "repetition": float(np.mean([repeated_share(ids) for ids in responses])),
    }
    graded = np.asarray([o.graded for o in outcomes]).reshape(-1, group)
    passed = np.asarray([o.graded and o.passed for o in outcomes]).reshape(-1, group)
    counts, totals = passed.sum(axis=1), graded.sum(axis=1)
    counts, totals = counts[totals > 0], totals[totals > 0]
    if len(totals):
        found |= {
            "groups/no_success": float(np.mean(counts == 0)),
            "groups/one_success": float(np.mean(counts == 1)),
            "groups/all_success": float(np.mean(counts == totals)),
        }
    return found


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the 4-grams of a response that stand in it before; 0 if it has none.

    >>> repeated_share([7, 7, 7, 7, 7])  # of two, the second
    0.5
    """
    grams = _grams(ids, REPEATED_GRAM)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def outcome_signs(outcomes: Sequence[Outcome], distilled: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[N]: 1 of a success, -1 of a failure, 0 where a rollout is not graded or not distilled."""
    signs = [(1 if o.passed else -1) if o.graded else 0 for o in outcomes]
    return np.where(distilled, np.asarray(signs, np.int32), 0).astype(np.int32)


def gap_agreement(
    gaps: Sequence[NDArray[np.float32]], outcome_signs: NDArray[np.int32]
) -> NDArray[np.float64]:
    """The counts of `token_sums`, of gaps that are known on the host, `[|y|]` of each rollout."""
    sums = np.asarray([np.sum(x) for x in gaps])
    passed, failed = outcome_signs > 0, outcome_signs < 0
    counts = (passed & (sums > 0), passed, failed & (sums < 0), failed)
    return np.asarray([np.sum(x) for x in counts], np.float64)


def overlap(response: Sequence[int], shown: Sequence[int]) -> float:
    """Share of the response's 8-grams that stand in the demonstration; 0 where it has none.

    >>> overlap(range(9), range(8))
    0.5
    """
    grams = _grams(response, OVERLAP_GRAM)
    theirs = set(_grams(shown, OVERLAP_GRAM))
    return sum(gram in theirs for gram in grams) / len(grams) if grams else 0.0


def demonstration_overlap(
    response_ids: Sequence[Sequence[int]],
    contexts: Sequence[TeacherContext | None],
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Mean `overlap` of the responses with the demonstrations that their teachers see."""
    encoded: dict[str, list[int]] = {}
    shares: list[float] = []
    for ids, context in zip(response_ids, contexts, strict=True):
        if context is not None and (text := context.demonstration) is not None:
            if text not in encoded:
                encoded[text] = tokenizer.encode(text)
            shares.append(overlap(ids, encoded[text]))
    return {"demonstration_overlap": sum(shares) / len(shares)} if shares else {}


def _grams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]


def environment_metrics(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Means of what the environment reports besides reward, of what it could grade."""
    numbers: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, number in outcome.metrics.items() if outcome.graded else ():
            numbers.setdefault(name, []).append(number)
    return {f"environment/{name}": sum(x) / len(x) for name, x in sorted(numbers.items())}
