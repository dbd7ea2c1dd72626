"""Worker processes: same outcomes as here, and what a grader that hangs, dies or raises costs."""

import os
import signal
import sys
import textwrap

import pytest
from processes import wait_until

from sdpo_jax.environments import workers
from sdpo_jax.environments.base import HasEpisodes
from sdpo_jax.environments.grading import Grader, OpenEpisodes, answers_of
from sdpo_jax.environments.kinds.file import FileConfig
from sdpo_jax.environments.registry import build, make_environment
from sdpo_jax.errors import UserError

SOURCE = """
    import os, signal, sys, time
    from sdpo_jax.environments.base import Outcome, Prompt

    def prompt(name):
        return Prompt(name, ({"role": "user", "content": name},), {"not JSON": object})

    class Odd:
        def __init__(self, seed):
            self.train = [prompt(f"t{i}") for i in range(4)]
            self.held_out = [prompt("h0")]

        def grade(self, prompt, response):
            print("noise on standard output")
            if response == "hang":
                while True:
                    pass
            if response == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if response == "swell":
                kept = []
                while True:
                    kept.append(bytearray(8 << 20))
            if response == "swell in vain":
                try:
                    bytearray(1 << 34)
                except MemoryError:
                    return Outcome(0.5, False, "too long", {})
            if response == "raise":
                raise KeyError("lost")
            if response == "variables":
                return Outcome(0.0, False, " ".join(sorted(os.environ)), {})
            if response == "alarm":  # works in a main thread alone
                signal.signal(signal.SIGALRM, lambda *_: None)
            if response == "process":
                return Outcome(float(os.getpid()), False, "", {})
            passed = response == prompt.id
            return Outcome(passed / 3, passed, f"{prompt.id} {response}", {"length": len(response)})

        def grade_truncated(self, prompt, response):
            return Outcome(0.0, False, f"cut: {response}", {})

        def reference(self, prompt):
            return prompt.id

        def answer(self, prompt, response):
            return response.strip() or None

    def make_environment(seed):
        return Odd(seed)
"""


def settings(folder, source=SOURCE, **changes):
    path = folder / "odd.py"
    path.write_text(textwrap.dedent(source))
    return FileConfig(path=str(path), **{"workers": 1, "deadline_seconds": 120.0} | changes)


def started(config) -> workers.InWorkers:
    made = make_environment(config)
    assert isinstance(made, workers.InWorkers)
    return made


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One environment with two workers for the whole file."""
    made = started(settings(tmp_path_factory.mktemp("odd"), workers=2))
    yield made
    made.close()


def grade(environment, *responses, truncated=None):
    return Grader(environment)([environment.train[0]] * len(responses), responses, truncated)


def test_workers_say_what_the_environment_says_here_in_the_same_order(odd, tmp_path):
    here = build(settings(tmp_path))
    prompts = [p for p in (*here.train, *here.held_out) for _ in range(20)]
    texts = [
        (p.id, "", "é \ud800 \x00\n", "x" * 100_000, "alarm")[i % 5] for i, p in enumerate(prompts)
    ]
    cut = [i % 7 == 0 for i in range(len(texts))]
    assert Grader(odd)(prompts, texts, cut) == Grader(here)(prompts, texts, cut)
    assert odd.reference(odd.held_out[0]) == "h0"
    assert answers_of(odd, odd.train[:1], [" a", " "]) == ["a", None]


def test_a_worker_asks_the_batch_form_for_cut_responses_where_there_is_one(tmp_path):
    batch = SOURCE.replace(
        "        def grade_truncated(self, prompt, response):\n"
        '            return Outcome(0.0, False, f"cut: {response}", {})',
        "        def grade_truncated_many(self, prompts, responses):\n"
        '            return [Outcome(0.0, False, f"cut: {r}", {}) for r in responses]',
    )
    assert batch != SOURCE
    made = started(settings(tmp_path, batch))
    outcomes = grade(made, "a", "t0", "b", truncated=[True, False, True])
    made.close()
    assert [o.feedback for o in outcomes] == ["cut: a", "t0 t0", "cut: b"]
    assert outcomes[1].passed


def test_no_token_of_the_trainer_reaches_a_worker(tmp_path, monkeypatch):
    tokens = {"HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "ANY_NEW_SECRET"}
    for name in tokens:
        monkeypatch.setenv(name, "x")
    made = started(settings(tmp_path))
    (outcome,) = grade(made, "variables")
    made.close()
    names = set(outcome.feedback.split())
    assert "PYTHONPATH" in names and names.isdisjoint(tokens)


@pytest.fixture
def patient(monkeypatch):
    """The deadline holds for answers that hang alone; the list of answers that were started.

    A worker on a busy machine may need longer than the deadline for the others.
    """
    start, tried = workers._Worker.start, []

    def start_patiently(self, job, seconds):
        tried.append(job.request["response"])
        start(self, job, seconds if tried[-1] == "hang" else 60.0)

    monkeypatch.setattr(workers._Worker, "start", start_patiently)
    monkeypatch.setattr(workers, "RETRIES", 1)
    return tried


def test_an_environment_may_blame_the_answer_for_the_first_missed_deadline(tmp_path, patient):
    blames = SOURCE.replace(
        "class Odd:", 'class Odd:\n        late = Outcome(0.0, False, "late", {})'
    )
    made = started(settings(tmp_path, blames, deadline_seconds=0.5))
    hung, right, died = grade(made, "hang", "t0", "die")
    made.close()
    assert (hung.graded, hung.passed, hung.feedback) == (True, False, "late")
    assert right.passed and died.graded and died.feedback == "late"
    assert patient.count("hang") == 1 and patient.count("die") == 2


def test_an_answer_that_hangs_or_kills_is_not_graded_and_costs_no_other(tmp_path, patient):
    made = started(settings(tmp_path, deadline_seconds=0.5))
    hung, right, died, wrong = grade(made, "hang", "t0", "die", "no")
    made.close()
    assert not hung.graded and "within 0.5 s, 2 times" in hung.feedback
    assert not died.graded and "its worker died" in died.feedback
    assert right.graded and right.passed and wrong.graded and not wrong.passed
    assert hung.reward == 0.0 and not hung.passed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a worker's memory so")
def test_a_grader_that_allocates_without_end_loses_its_worker_and_no_other_answer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "RETRIES", 1)
    monkeypatch.setattr(workers, "MEMORY_MB", 256)
    made = started(settings(tmp_path))
    first = grade(made, "process")[0].reward
    swollen, right, refused = grade(made, "swell", "t0", "swell in vain")
    after = grade(made, "process")[0].reward
    made.close()
    assert not swollen.graded and swollen.reward == 0.0
    assert "its worker died" in swollen.feedback and "memory" in swollen.feedback
    assert right.passed
    assert (
        refused.graded and refused.feedback == "too long"
    )  # what the grader copes with is its own
    assert after != first


def test_a_worker_that_was_killed_from_outside_is_replaced(odd):
    def processes():
        outcomes = grade(odd, *["process"] * 40)
        assert all(o.graded for o in outcomes)
        return {int(o.reward) for o in outcomes}

    assert wait_until(lambda: len(processes()) == 2, 60)  # One of them may still be starting.
    first = processes()
    assert first == processes() and len(first) == 2
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    assert first.isdisjoint(processes())


def test_an_exception_in_a_worker_stops_with_its_own_traceback_and_place(odd):
    with pytest.raises(UserError) as caught:
        grade(odd, "t0", "raise", "t0")
    message = str(caught.value)
    assert "prompt 't0'" in message and "odd.py:" in message and "KeyError: 'lost'" in message
    assert "grading.py" not in message and "workers.py" not in message
    assert grade(odd, "t0", "no")[0].passed  # and the next call is not answered with its rest


def test_closing_ends_the_processes(tmp_path):
    made = started(settings(tmp_path))
    pid = int(grade(made, "process")[0].reward)
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_prompts_that_change_from_process_to_process_are_refused(tmp_path):
    changing = SOURCE.replace('f"t{i}"', 'f"t{i}-{os.getpid()}"')
    made = started(settings(tmp_path, changing))
    with pytest.raises(UserError, match="other prompts in a worker than here; expected the same"):
        grade(made, "t0")
    made.close()


def test_two_prompts_of_one_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="two prompts of the environment have the id 't0'"):
        make_environment(settings(tmp_path, SOURCE.replace('"h0"', '"t0"')))


def test_what_fails_in_the_worker_alone_is_told_once(tmp_path):
    once = SOURCE.replace(
        "return Odd(seed)",
        "if 'PYTEST_CURRENT_TEST' in os.environ: return Odd(seed)\n        raise OSError('gone')",
    )
    made = started(settings(tmp_path, once))
    with pytest.raises(UserError, match=r"in a worker: .*odd\.py(.|\n)*OSError: gone"):
        grade(made, "t0")
    made.close()


def test_workers_that_die_while_they_start_end_the_run(tmp_path):
    source = SOURCE.replace(
        "return Odd(seed)",
        "if 'PYTEST_CURRENT_TEST' in os.environ: return Odd(seed)\n        os._exit(3)",
    )
    made = started(settings(tmp_path, source))
    with pytest.raises(UserError, match=r"workers cannot start: .* 3 times in a row"):
        grade(made, "t0")
    made.close()


TALKS = """
    import os, signal
    from sdpo_jax.environments.base import Outcome, Prompt, Step

    class Countdown:
        def __init__(self, prompt):
            self.prompt, self.heard = prompt, []

        def step(self, response):
            if response == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            self.heard.append(response)
            outcome = Outcome(float(len(self.heard)), False, self.prompt.id, {})
            over = response == "stop"
            return Step(None if over else " ".join(self.heard), outcome, "more?")

    class Talks:
        train = [Prompt(f"t{i}", ({"role": "user", "content": f"{i}"},), {}) for i in range(2)]
        held_out = []

        def grade(self, prompt, response):
            return Outcome(0.0, False, "", {})

        def reset(self, prompt):
            return Countdown(prompt)

    environment = Talks()
"""


def test_episodes_in_workers_are_those_here_and_a_lost_worker_ends_one(tmp_path):
    config = settings(tmp_path, TALKS, workers=2)
    here, there = build(config), started(config)
    try:
        played = []
        for environment in (here, there):
            episodes = OpenEpisodes(environment, environment.train)
            first = episodes([0, 1], ["a", "b"], [False, False])
            second = episodes([1, 0], ["c", "stop"], [False, False])
            played.append((first, second))
        assert played[0] == played[1]
        assert [step.observation for step in played[0][1]] == ["b c", None]
        (lost,) = OpenEpisodes(there, there.train[:1])([0], ["die"], [False])
        assert lost.observation is None and not lost.outcome.graded
    finally:
        there.close()


def test_an_environment_without_episodes_has_none_in_workers(odd):
    assert not isinstance(odd, HasEpisodes)
