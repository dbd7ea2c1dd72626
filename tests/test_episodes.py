"""Episodes: what is sampled, judged and masked, turn by turn, on a tiny model.

The environment judges by a checksum of prompt and answer, so that nothing is hard-coded and every
way in which an episode may go on or end comes up. One device.
"""

import zlib
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from sdpo_jax.environments.base import Outcome, Prompt, Step, not_graded
from sdpo_jax.environments.grading import OpenEpisodes
from sdpo_jax.environments.retries import HEADER, INSTRUCTION, SILENT, with_episodes
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.episodes import Limits, run_episodes
from sdpo_jax.rollouts.generate import Turn, rollout_keys, turn_keys
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.rollouts.turns import ids_between

GROUP, TOKENS = 6, 8


class Tokenizer(tiny.ByteTokenizer):
    """Stops at a fifth of all ids, none of which any text here is written with."""

    stop_ids = (tiny.ByteTokenizer.END, *range(132, 184))


TOKENIZER = Tokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
PROMPTS = [Prompt(n, ({"role": "user", "content": f"{n}?"},), {}) for n in ("p", "the q", "r")]
IDS = [TOKENIZER.render(prompt.messages) for prompt in PROMPTS]


class Checksum:
    """A third passes, some hear nothing, some cannot be judged."""

    train = held_out = tuple(PROMPTS)

    def __init__(self):
        self.asked = []

    def grade(self, prompt, response):
        self.asked.append((prompt.id, response))
        mark = zlib.crc32(f"{prompt.id} {response!r}".encode())
        if mark % 11 == 0:
            return not_graded("the judge slept")
        passed = mark % 3 == 0
        words = "" if passed or mark % 5 == 0 else f"mark {mark % 100}"
        return Outcome(float(passed), passed, words, {})


class Guess:
    """Episodes of its own: three turns at most, each with its number; `grade` must not be asked."""

    train = held_out = tuple(PROMPTS)

    def grade(self, prompt, response):
        raise AssertionError("an environment with episodes was asked for a single turn")

    def reset(self, prompt):
        return Guesses(prompt)


class Guesses:
    def __init__(self, prompt):
        self.prompt, self.turn = prompt, 0

    def step(self, response):
        self.turn += 1
        outcome = Outcome(float(self.turn), self.turn == 3, f"turn {self.turn}", {})
        return Step(None if self.turn == 3 else f"{self.prompt.id}, turn {self.turn}", outcome)


class Spy:
    """A sampler that writes down what it was asked and what it drew."""

    def __init__(self, sampler):
        self.sampler, self.calls = sampler, []

    def __call__(self, *args, **settings):
        rollouts = self.sampler(*args, **settings)
        self.calls.append(([list(ids) for ids in args[1]], settings, rollouts))
        return rollouts


@cache
def sampler(slots=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)
        return Sampler(MODEL, tiny.make_devices(), TOKENIZER.stop_ids, slots)


@cache
def params():
    return tiny.make_params(ARCHITECTURE)


def play(
    environment=None,
    turns=3,
    *,
    prompts=PROMPTS,
    first_prompt=0,
    group=GROUP,
    slots=0,
    observation_tokens=200,
    draw=None,
    goes_on=lambda row: True,
):
    """Episodes, and the sampler's calls; `goes_on(row)` false ends a row after its first turn."""
    draw = draw or Spy(sampler(slots))
    asked = [prompt for prompt in prompts for _ in range(group)]
    episodes = OpenEpisodes(with_episodes(environment or Checksum(), turns), asked)

    def judge(rows, texts, truncated):
        steps = episodes(rows, texts, truncated)
        pairs = zip(steps, rows, strict=True)
        return [s if goes_on(row) else s._replace(observation=None) for s, row in pairs]

    def sample(ids, **settings):
        fixed = {"max_tokens": TOKENS, "temperature": 1.0, "seed": 3, "step": 5}
        return draw(params(), ids, **fixed, **settings)

    limits = Limits(turns, observation_tokens, slots)
    ids = [TOKENIZER.render(prompt.messages) for prompt in prompts]
    rows = run_episodes(
        sample, judge, TOKENIZER, limits, prompts, ids, group=group, first_prompt=first_prompt
    )
    return rows, draw.calls


@pytest.fixture(scope="module")
def played():
    return play()


def segments(row):
    """(own, ids) of each stretch of a response."""
    cuts = np.flatnonzero(np.diff(row.response_mask)) + 1
    owns = [part[0] for part in np.split(row.response_mask, cuts)]
    return list(zip(owns, [p.tolist() for p in np.split(np.array(row.ids), cuts)], strict=True))


def contents(row):
    return row.ids, row.response_mask.tolist(), row.steps, row.response, row.stopped


def assert_same(rows, others):
    assert [contents(a) for a in rows] == [contents(b) for b in others]
    for a, b in zip(rows, others, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_every_way_to_go_on_and_to_end_comes_up(played):
    rows, _ = played
    ends = [r.steps[-1] for r in rows]
    assert {r.turns for r in rows} == {1, 2, 3}
    assert {r.stopped for r in rows} == {True, False}
    assert {True, False} == {s.outcome.passed for s in ends if s.outcome.graded}
    assert any(not s.outcome.graded for s in ends)
    assert any(SILENT in text for r in rows for text in r.observations)


def test_an_episode_is_what_was_sampled_and_what_the_template_writes_between(played):
    """No own token is masked, no foreign one is trained, nothing sampled is tokenised again."""
    rows, calls = played
    expected = [([], []) for _ in rows]
    unfinished = list(range(len(rows)))
    for number, (prompts, settings, rollouts) in enumerate(calls):
        group = settings["group"]
        for place, n in enumerate(unfinished):
            ids, own = expected[n]
            assert prompts[place // group] == [*rows[n].prompt_ids, *ids]
            drawn = rollouts.response(place)
            expected[n] = ids + drawn, own + [True] * len(drawn)
        unfinished = [n for n in unfinished if rows[n].turns > number + 1]
        for n in unfinished:
            ids, own = expected[n]
            seen = rows[n].observations[: number + 1]
            between = ids_between(TOKENIZER, rows[n].prompt.messages, seen)
            expected[n] = ids + between, own + [False] * len(between)
    assert [(r.ids, r.response_mask.tolist()) for r in rows] == expected
    assert all(r.response_mask[0] and r.response_mask[-1] for r in rows)


def test_log_probs_are_those_of_one_forward_over_the_whole_episode_and_0_elsewhere(played):
    rows, _ = played
    weights = params()
    for row in [max(rows, key=lambda r: r.turns), *rows[:3]]:
        whole = [*row.prompt_ids, *row.ids]
        logits = tiny.reference_logits(ARCHITECTURE, weights, whole)
        predicted = tiny.log_softmax(logits[len(row.prompt_ids) - 1 : -1])
        chosen = predicted[np.arange(len(row.ids)), row.ids]
        sampled = row.response_mask
        np.testing.assert_allclose(row.log_probs[sampled], chosen[sampled], atol=2e-4)
        assert (row.log_probs[~sampled] == 0).all()


def test_a_failed_attempt_is_told_its_own_feedback_and_nothing_else_goes_on(played):
    rows, _ = played
    for row in rows:
        for step, seen in zip(row.steps[:-1], row.observations, strict=True):
            assert not step.outcome.passed and step.outcome.graded
            assert seen == HEADER + (step.outcome.feedback or SILENT) + INSTRUCTION
        last = row.steps[-1].outcome
        over = last.passed or not last.graded or not row.stopped or row.turns == 3
        assert over


def test_an_episode_that_is_over_costs_no_further_sampling(played):
    rows, calls = played
    for number, (prompts, _, _) in enumerate(calls[1:], start=2):
        assert len(prompts) == sum(r.turns >= number for r in rows)
    rows, calls = play(goes_on=lambda row: False)
    assert len(calls) == 1 and {r.turns for r in rows} == {1}


@pytest.mark.slow
def test_draws_do_not_depend_on_which_other_episodes_go_on(played):
    rows, _ = played
    longest = max(range(len(rows)), key=lambda n: rows[n].turns)
    alone, _ = play(goes_on=lambda row: row == longest)
    assert_same([alone[longest]], [rows[longest]])
    assert alone[longest].turns == 3


@pytest.mark.slow
def test_draws_do_not_depend_on_batch_or_slots(played):
    second, calls = play(prompts=PROMPTS[1:2], first_prompt=1, slots=4)
    assert_same(second, played[0][GROUP : 2 * GROUP])
    assert all(len(prompts) <= 4 for prompts, _, _ in calls[1:])


def test_every_turn_of_every_rollout_has_a_key_of_its_own():
    seed, step = np.uint32(3), np.uint32(5)
    prompts = np.arange(12, dtype=np.uint32) // 4
    siblings = np.arange(12, dtype=np.uint32) % 4
    first = rollout_keys(seed, step, np.uint32(0), 3, 4)
    later = [turn_keys(seed, step, Turn(prompts, siblings, np.uint32(t))) for t in (1, 2)]
    # The first turn's draws are keys, too: one for each position.
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    at = fold(first, np.arange(40, dtype=np.uint32)).reshape(-1)
    keys = np.concatenate([jax.random.key_data(k) for k in (first, *later, at)])
    assert len({tuple(k) for k in keys.tolist()}) == len(keys)


def test_with_one_turn_rollouts_are_the_samplers_and_outcomes_the_graders():
    rows, (call,) = play(turns=1)
    direct = sampler()(
        params(), IDS, group=GROUP, max_tokens=TOKENS, temperature=1.0, seed=3, step=5
    )
    assert [r.ids for r in rows] == direct.responses()
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row.log_probs, direct.log_probs[n, : len(row.ids)])
        assert row.response_mask.all()
        text = TOKENIZER.decode(row.ids)
        assert row.outcome == Checksum().grade(PROMPTS[n // GROUP], text)
    assert call[1]["turn"] is None


def test_the_feedback_of_an_episode_is_that_of_its_last_failed_turn(played):
    rows, _ = played
    late = [r for r in rows if r.turns > 1 and r.outcome.passed]
    assert late
    for row in late:
        said = [s.outcome.feedback for s in row.steps if s.outcome.feedback]
        assert row.outcome.feedback == (said[-1] if said else "")
        assert row.outcome.reward == row.steps[-1].outcome.reward


def test_what_cannot_be_judged_ends_its_episode_and_counts_as_such(played):
    rows, _ = played
    failed = [r for r in rows if not all(s.outcome.graded for s in r.steps)]
    assert failed
    for row in failed:
        assert all(s.outcome.graded for s in row.steps[:-1])
        assert row.outcome == not_graded("the judge slept")


def test_an_environment_that_grades_batches_does_so_turn_by_turn(played):
    class Batches(Checksum):
        def grade_many(self, prompts, responses):
            calls.append(len(prompts))
            pairs = zip(prompts, responses, strict=True)
            return [Checksum.grade(self, *pair) for pair in pairs]

        def grade(self, prompt, response):
            raise AssertionError("graded one row at a time")

    calls = []
    rows, drawn = play(Batches())
    assert_same(rows, played[0])
    assert sum(calls) == sum(r.turns for r in rows) and len(calls) < len(rows)
    assert len(drawn) == 3


def test_an_environments_own_episodes_are_played_to_their_end():
    rows, _ = play(Guess(), turns=5)
    whole = [r for r in rows if r.stopped]
    assert whole and {r.turns for r in whole} == {3}
    for row in rows:
        name = row.prompt.id
        assert row.observations == [f"{name}, turn {t}" for t in range(1, row.turns)]
        assert row.outcome.reward == row.turns


def test_an_environment_may_step_several_episodes_at_a_time():
    class Many(Guess):
        def step_many(self, episodes, responses, truncated):
            assert len(episodes) == len(responses) == len(truncated)
            calls.append(len(episodes))
            return [e.step(r) for e, r in zip(episodes, responses, strict=True)]

    calls = []
    assert_same(play(Many())[0], play(Guess())[0])
    assert calls[0] > 1


def test_an_observation_is_cut_in_tokens_but_not_its_instruction():
    rows, _ = play(observation_tokens=9)
    seen = [text for r in rows for text in r.observations]
    assert set(seen) == {HEADER[:9] + INSTRUCTION}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Step("go on", "great"), "step of the environment returned 'great' for prompt 'p'"),
        ("go on", "step of the environment returned 'go on' for prompt 'p'; expected Step"),
        (Step(3, Outcome(0.0, False, "", {})), r"returned Step\(observation=3.*expected Step"),
        (KeyError("lost"), "step of the environment failed for prompt 'p' at .*test_episodes.py"),
    ],
)
def test_an_episode_that_breaks_its_promise_stops_the_run_with_one_message(answer, message):
    class Broken(Guess):
        def reset(self, prompt) -> Any:
            return self

        def step(self, response):
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(UserError, match=message):
        OpenEpisodes(Broken(), PROMPTS[:1])([0], ["x"], [False])
