"""`sdpo env`: the template passes its own check, and each fault of an environment is found."""

import itertools
import subprocess
import sys
import textwrap

import pytest

from sdpo_jax.cli import main
from sdpo_jax.environments.base import Outcome, Prompt, Step, not_graded
from sdpo_jax.environments.check import ATTACKS, PROGRAMS, check, report
from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_jax.environments.template import Sums


def sdpo(capsys, *words):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def problems(environment, **options):
    return {line.name: line.problem for line in check(environment, **options) if line.problem}


class Faulty(Sums):
    """The template, with one thing wrong."""

    def __init__(self, **changes):
        super().__init__(0)
        for name, change in changes.items():
            setattr(self, name, change)


def wrapped(change):
    """A `grade` that changes the template's outcomes of wrong answers."""
    sound = Sums(0)

    def grade(prompt, response):
        outcome = sound.grade(prompt, response)
        return outcome if outcome.passed else change(prompt, response, outcome)

    return grade


def saying(text):
    return wrapped(lambda prompt, response, outcome: outcome._replace(feedback=text(prompt)))


PASS = Outcome(1.0, True, "", {})
COUNTER = itertools.count()
FAULTS = {
    "no questions": (Faulty(train=[], held_out=[]), "prompts", "at least one in `train`"),
    "one id twice": (
        Faulty(held_out=[p._replace(id="10+10") for p in Sums(0).held_out]),
        "ids",
        "used twice: '10+10'",
    ),
    "one question on both sides": (
        Faulty(
            held_out=[
                Prompt(
                    "other",
                    ({"role": "user", "content": " WHAT is  11 + 12? Answer with the number."},),
                    {"sum": 23},
                )
            ],
            train=[Sums(0)._prompt(11, 12)],
        ),
        "held out apart",
        "also in train: 'other'",
    ),
    "a reference that fails": (
        Faulty(reference=lambda prompt: "0"),
        "right answers pass",
        "fails ('the number is too small'); mend `grade` or `reference`",
    ),
    "an empty answer passes": (
        Faulty(grade=wrapped(lambda p, r, o: o if r else PASS)),
        "wrong answers fail",
        "empty passes for",
    ),
    "any number passes": (
        Faulty(grade=wrapped(lambda p, r, o: PASS if o.metrics["number"] else o)),
        "wrong answers fail",
        "another prompt's answer (all of them) passes",
    ),
    "tags pass": (
        Faulty(grade=wrapped(lambda p, r, o: PASS if "<reward>1" in r else o)),
        "attacks fail",
        "fake tags passes for",
    ),
    "escapes in feedback": (
        Faulty(grade=wrapped(lambda p, r, o: o._replace(feedback=r[:50]))),
        "feedback is clean",
        "sanitize what you quote",
    ),
    "an address in feedback": (
        Faulty(grade=saying(lambda prompt: "<object at 0x7f00deadbeef>")),
        "feedback is clean",
        "0x7f00deadbeef",
    ),
    "endless feedback": (
        Faulty(grade=saying(lambda prompt: "no " * 5000)),
        "feedback is clean",
        "feedback of 15000 characters",
    ),
    "the answer in feedback": (
        Faulty(
            reference=lambda prompt: f"{prompt.data['sum']:05}",
            grade=saying(lambda prompt: f"expected {prompt.data['sum']:05}"),
        ),
        "feedback keeps the answer",
        "the teacher will copy it",
    ),
    "a clock in feedback": (
        Faulty(grade=saying(lambda prompt: f"take {next(COUNTER)}")),
        "repeatable",
        "another outcome the second time",
    ),
    "a service that is down": (
        Faulty(grade=wrapped(lambda p, r, o: not_graded("connection refused"))),
        "all could be judged",
        "not graded: connection refused",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_where_it_is(fault):
    environment, name, expected = FAULTS[fault]
    found = problems(environment)
    assert expected in found.get(name, "nothing"), found


def test_sound_environments_have_no_problem():
    assert problems(Sums(0)) == {}
    assert problems(ToolCalls(train_prompts=40, held_out_prompts=10)) == {}


def test_one_of_few_choices_may_be_right_by_chance():
    class Coin(Sums):
        def __init__(self):
            super().__init__(0)
            self.train, self.held_out = self.train[:30], self.held_out[:10]

        def reference(self, prompt):
            return "odd" if prompt.data["sum"] % 2 else "even"

        def grade(self, prompt, response):
            passed = response.strip() == self.reference(prompt)
            return Outcome(float(passed), passed, "", {})

    assert problems(Coin()) == {}


def test_hostile_programs_are_run_only_where_responses_are_programs():
    asked = []

    class Listening(Sums):
        def grade(self, prompt, response):
            asked.append(response)
            return super().grade(prompt, response)

    assert problems(Listening(0)) == {}
    assert not set(PROGRAMS.values()) & set(asked)
    assert problems(Listening(0), runs_programs=True) == {}
    assert set(PROGRAMS.values()) <= set(asked)
    assert set(ATTACKS.values()) <= set(asked)


def test_the_report_says_ok_or_problem_with_what_to_do_below():
    environment, name, expected = FAULTS["tags pass"]
    lines = report(check(environment)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("problem"))
    assert name in lines[at] and expected in lines[at + 1]
    assert sum(line.startswith("ok ") for line in lines) == len(lines) - 2


# The command


def test_the_template_is_written_and_passes_its_check(tmp_path, capsys):
    path = tmp_path / "my_env.py"
    code, out, _ = sdpo(capsys, "env", "template", str(path))
    assert code == 0 and f"sdpo env check {path}" in out
    assert f'path = "{path}"' in path.read_text()
    code, out, _ = sdpo(capsys, "env", "check", str(path))
    assert code == 0 and "problem" not in out and "700 train, 200 held out" in out
    code, _, err = sdpo(capsys, "env", "template", str(path))
    assert code == 2 and "expected the name of a new file" in err
    assert sdpo(capsys, "env", "template")[1].startswith('"""A template for your own')


def test_a_problem_is_exit_code_two(tmp_path, capsys):
    path = tmp_path / "kind.py"
    text = "from sdpo_jax.environments.template import Sums\nenvironment = Sums(0)\n"
    path.write_text(text + "environment.reference = lambda prompt: '1'\n")
    code, out, err = sdpo(capsys, "env", "check", str(path))
    assert code == 2 and "problem  right answers pass" in out and not err


def test_a_bug_in_grade_is_one_message_with_its_line(tmp_path, capsys):
    path = tmp_path / "bug.py"
    path.write_text(
        textwrap.dedent("""
        from sdpo_jax.environments.template import Sums
        class Bug(Sums):
            def grade(self, prompt, response):
                return int(response) and super().grade(prompt, response)
        environment = Bug(0)
        """)
    )
    code, out, err = sdpo(capsys, "env", "check", str(path))
    assert code == 2 and not out
    assert f"{path}:5" in err and "ValueError: invalid literal" in err and "prompt '" in err


def test_a_recipe_is_checked_with_its_options(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text('[environment]\nkind = "tool_calls"\ntrain_prompts = 20')
    words = ["--environment.held-out-prompts", "7", "--evaluation.prompts", "7"]
    code, out, _ = sdpo(capsys, "env", "check", str(path), *words)
    assert code == 0 and "20 train, 7 held out" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "usage: sdpo env check"),
        (["chek"], "invalid choice: 'chek'"),
        (["check"], "expected a file: `sdpo env check"),
        (["template", "a.py", "b.py"], "b.py: unexpected argument"),
        (["template", "a.txt"], "a.txt: expected the name of a new file, with .py"),
        (["check", "none.py"], "no such file"),
        (["check", "none.py", "--x", "1"], "--x: settings go with a recipe"),
        (["check", "none.toml"], "no such recipe"),
    ],
)
def test_a_wrong_word_says_what_was_expected(words, expected, capsys):
    code, _, err = sdpo(capsys, "env", *words)
    assert code == 2 and expected in err


def test_the_check_of_a_file_starts_no_device(tmp_path):
    path = tmp_path / "my_env.py"
    path.write_text("from sdpo_jax.environments.template import Sums\nenvironment = Sums(0)\n")
    script = (
        "import sys\nfrom sdpo_jax.cli import main\n"
        f"try:\n    main(['env', 'check', {str(path)!r}])\nexcept SystemExit as e:\n"
        "    assert e.code == 0\n"
        "from jax._src import xla_bridge\nassert not xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


class Talking(Sums):
    """The template with episodes of its own, whose first turn `say` writes."""

    def __init__(self, say):
        super().__init__(0)
        self.say = say

    def reset(self, prompt):
        return Talk(self, prompt)


class Talk:
    def __init__(self, environment, prompt):
        self.environment, self.prompt = environment, prompt

    def step(self, response):
        return Step(self.environment.say(), self.environment.grade(self.prompt, response))


def test_episodes_of_an_environment_are_tried_and_must_repeat_themselves():
    (line,) = [x for x in check(Talking(lambda: "try again")) if x.name == "episodes"]
    assert line.found == "32 of 32 go on after a wrong answer" and not line.problem
    changing = problems(Talking(lambda: f"try {next(COUNTER)}"))
    assert list(changing) == ["episodes"] and "another answer" in changing["episodes"]
    assert not [x for x in check(Sums(0)) if x.name == "episodes"]


# Blind answers


class Choices:
    """Four options each, the right ones in turn; `accepts` decides what passes."""

    def __init__(self, accepts, right="ABCD"):
        text = "What is {}?\n\nA: w\nB: x\nC: y\nD: z"
        made = [
            Prompt(str(i), ({"role": "user", "content": text.format(i)},), right[i % len(right)])
            for i in range(24)
        ]
        self.train, self.held_out, self._accepts = made[:16], made[16:], accepts

    def grade(self, prompt, response):
        passed = bool(self._accepts(prompt.data, response))
        return Outcome(float(passed), passed, "", {})


class Known(Choices):
    def reference(self, prompt):
        return prompt.data


def blind(environment):
    names = ("constant answer", "list answer")
    lines = [line for line in check(environment) if line.name in names]
    return {(line.name, line.found): line.problem for line in lines}


@pytest.mark.parametrize("kind", [Choices, Known])
def test_a_letter_is_right_by_chance_and_is_named_without_a_problem(kind):
    found = blind(kind(lambda right, text: text == right))
    assert found == {
        ("constant answer", f"'{letter}' passes 6 of 24 prompts (25%)"): "" for letter in "ABCD"
    }


@pytest.mark.parametrize(
    ("accepts", "name", "answer", "said"),
    [
        (lambda right, text: right in text[-2:] or text == "nan", "constant", "nan", "chance"),
        (lambda right, text: right in text, "list", "all options of the prompt", "chance"),
        (lambda right, text: text == right or not text, "constant", "", "chance"),
        (lambda right, text: text == right or "[]" in text, "constant", "[]", "chance"),
    ],
)
def test_an_answer_that_always_passes_is_a_problem(accepts, name, answer, said):
    for kind in (Choices, Known):
        (problem,) = [
            problem
            for (line, found), problem in blind(kind(accepts)).items()
            if line == f"{name} answer" and found.startswith(repr(answer))
        ]
        assert (said if kind is Choices else "different answers") in problem


def test_a_right_answer_that_seldom_changes_is_a_problem():
    found = blind(Known(lambda right, text: text == right, right="AAAAAAAB"))
    assert ["chance" in problem for problem in found.values()] == [True, False]


def test_a_partial_reward_of_a_constant_is_named():
    class Partly(Choices):
        def grade(self, prompt, response):
            return Outcome(0.1 * (response == "0"), False, "", {})

    assert blind(Partly(None)) == {
        ("constant answer", "'0' passes no prompt, but its mean reward is 0.1"): ""
    }


def test_a_program_that_ignores_its_input_is_found():
    class Loose(Sums):
        def grade(self, prompt, response):
            passed = response.endswith("print(0)\n```")
            return Outcome(float(passed), passed, "", {})

    found = [x for x in check(Loose(0), runs_programs=True) if x.name == "program answer"]
    assert "'return 0' passes 6 of 6" in found[0].found and "different" in found[0].problem
