"""Sources of rollouts: their positions in the data, and what is left of a batch's first prompts.

The sampler is a script, whose draws depend on seed, step, prompt and sibling as a sampler's do.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny

from sdpo_jax.config import DataConfig, RolloutConfig, TrainConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.rollouts.phase_timer import PhaseTimer, is_time
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sampler import HostRollouts
from sdpo_jax.rollouts.sources import Demonstrations, GradedRollouts, SampledDemonstrations
from sdpo_jax.run.recipes import default_config

TOKENIZER = tiny.ByteTokenizer()
GROUP, SIZE, STEPS, CUT = 3, 2, 5, 2
CONFIG = default_config(
    seed=4,
    rollout=RolloutConfig(
        prompts_per_step=SIZE,
        rollouts_per_prompt=GROUP,
        max_prompt_tokens=32,
        max_response_tokens=6,
    ),
    data=DataConfig(rows_per_step=SIZE, max_tokens=32),
    train=TrainConfig(steps=STEPS),
)
DEMONSTRATIONS = [
    Demonstration(str(i), ({"role": "user", "content": f"q{i}?"},), "abc"[: 1 + i % 3] * 2)
    for i in range(5)
]


class Lengths:
    """Long answers pass."""

    train = tuple(Prompt(d.id, d.messages, {}) for d in DEMONSTRATIONS)
    held_out = ()

    def grade(self, prompt, response):
        passed = len(response) > 3
        return Outcome(float(passed), passed, f"{prompt.id}: {response} is short", {})


class Script:
    """Draws letters."""

    def __call__(self, params, prompts, *, group, first_prompt, seed, step, max_tokens, **rest):
        del params, rest
        rows: list[Any] = []
        for place in range(first_prompt, first_prompt + len(prompts)):
            for sibling in range(group):
                random = np.random.default_rng((seed, step, place, sibling))
                ids = random.integers(101, 127, size=random.integers(1, max_tokens)).tolist()
                rows.append(([*ids, TOKENIZER.END], random.normal(-3, 1, size=max_tokens)))
        tokens = [ids + [0] * (max_tokens - len(ids)) for ids, _ in rows]
        return HostRollouts(
            tokens=np.array(tokens, np.int32),
            log_probs=np.array([x for _, x in rows], np.float32),
            lengths=np.array([len(ids) for ids, _ in rows], np.int32),
            stopped=np.ones(len(rows), np.bool_),
        )


def graded(one_step_off_policy=False):
    rollout = replace(CONFIG.rollout, one_step_off_policy=one_step_off_policy)
    sampler: Any = Script()
    return GradedRollouts(replace(CONFIG, rollout=rollout), Lengths(), TOKENIZER, sampler)


def sampled_demonstrations():
    sampler: Any = Script()
    return SampledDemonstrations(CONFIG, DEMONSTRATIONS, TOKENIZER, sampler)


MAKE = {
    "graded": graded,
    "prefetched": lambda: graded(one_step_off_policy=True),
    "sampled_demonstrations": sampled_demonstrations,
    "demonstrations": lambda: Demonstrations(CONFIG, DEMONSTRATIONS, TOKENIZER),
}


def contents(batch):
    """A batch as values that `==` compares."""
    values = batch._asdict()
    for name in ("log_probs", "response_mask"):
        rows = values[name]
        values[name] = rows and [(x.dtype, x.tolist()) for x in rows]
    return values | {"lengths": batch.lengths.tolist()}


def drawn(source, step, **given):
    """The batch of a step, and its metrics without times."""
    batch, metrics = source(None, step, PhaseTimer(), **given)
    return contents(batch), {k: v for k, v in metrics.items() if not is_time(k)}


@pytest.mark.parametrize("name", MAKE)
def test_a_source_goes_on_at_its_saved_position(name):
    whole = MAKE[name]()
    expected = [drawn(whole, step) for step in range(1, STEPS + 1)]
    assert len({str(batch["prompts"]) for batch, _ in expected}) > 1
    stopped, resumed = MAKE[name](), MAKE[name]()
    for step in range(1, CUT + 1):
        drawn(stopped, step)
    stopped.wait()
    state = json.loads(json.dumps(stopped.get_state()))
    drawn(resumed, 1)  # a state is absolute
    resumed.set_state(state)
    assert json.loads(json.dumps(resumed.get_state())) == state
    assert [drawn(resumed, step) for step in range(CUT + 1, STEPS + 1)] == expected[CUT:]


@pytest.mark.parametrize("name", MAKE)
def test_the_first_prompts_of_a_step_are_those_of_the_whole_step(name):
    whole, part = MAKE[name](), MAKE[name]()
    for step in (1, 2):  # from the second step on what was prefetched is cut
        batch, _ = whole(None, step, PhaseTimer())
        if step == 1:
            part(None, step, PhaseTimer())
    found, _ = drawn(part, 2, first=1)
    assert found == contents(batch.of_first(1))
    assert len(found["prompts"]) == 1 and len(found["texts"]) == batch.group


def test_demonstrations_are_responses_or_come_with_their_questions():
    for name, group in (("demonstrations", 1), ("sampled_demonstrations", GROUP)):
        batch, _ = MAKE[name]()(None, 1, PhaseTimer())
        assert batch.group == group and batch.outcomes == [] and batch.graded.all()
        known = {d.id: d for d in DEMONSTRATIONS}
        for prompt in batch.prompts:
            assert prompt.messages == known[prompt.id].messages
            assert prompt.data == {"demonstration": known[prompt.id].response}
        if name == "demonstrations":
            texts = [prompt.data["demonstration"] for prompt in batch.prompts]
            assert batch.texts == texts
            expected = [[*TOKENIZER.encode(text), TOKENIZER.END] for text in texts]
            assert batch.response_ids == expected


def test_a_demonstration_that_is_too_long_is_named():
    long = [replace_response(d, "x" * 40) for d in DEMONSTRATIONS]
    source = Demonstrations(CONFIG, long, TOKENIZER)
    with pytest.raises(UserError, match=r"demonstration '\d' has \d\d tokens; expected at most"):
        source(None, 1, PhaseTimer())


def replace_response(demonstration, text):
    return demonstration._replace(response=text)


def by_hand(masked):
    lengths = [3, 1, 2, 4, 2, 5]
    return RolloutBatch(
        prompts=[Prompt(str(i), (), {}) for i in range(3)],
        group=2,
        prompt_ids=[[i, 9] for i in range(6)],
        response_ids=[list(range(n)) for n in lengths],
        log_probs=[np.full(n, -float(i), np.float32) for i, n in enumerate(lengths)],
        lengths=np.array(lengths, np.int32),
        texts=[f"text {i}" for i in range(6)],
        outcomes=[Outcome(float(i), i > 2, "", {}) for i in range(6)],
        response_mask=[np.arange(n) != 1 for n in lengths] if masked else None,
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_the_first_prompts_of_a_batch_keep_all_of_their_rollouts(prompts, masked):
    whole = contents(by_hand(masked))
    first = by_hand(masked).of_first(prompts)
    per_prompt, rows = {"prompts"}, 2 * prompts
    assert first.group == 2 and first.longest == max(whole["lengths"][:rows])
    for name, values in contents(first).items():
        if name != "group":
            count = prompts if name in per_prompt else rows
            assert values == (whole[name] and whole[name][:count]), name


def test_the_first_prompts_of_a_batch_that_nothing_grades_have_no_outcomes():
    first = by_hand(masked=False)._replace(outcomes=[], log_probs=[]).of_first(1)
    assert first.outcomes == first.log_probs == [] and first.graded.tolist() == [True, True]
