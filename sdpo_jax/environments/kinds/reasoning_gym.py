"""Kind `reasoning_gym`: puzzles and scorers of the package reasoning-gym, with our own feedback.

The answer is the content of the last `<answer>...</answer>`. A number is right or wrong; another
answer is rewarded with the scorer's number from 0 to 1, so a partly right one counts. `passed`
needs 1 and that the whole answer is right (`gym_answers.py`). `metrics` holds `well_formed`: there
is an answer. The package returns only a number; feedback is made here from that number and from the
form of the oracle's answer (an integer, a number, a list), and never contains the oracle's value.

Departures from the package, all measured with version 0.1.25:

* Nine scorers pass the answer to `eval` or to SymPy's parser, which evaluates it: a response could
  run code in the trainer. Their answers are checked here first, and only literals or plain
  arithmetic reach them. A scorer of another version that evaluates is refused (`GUARDS`).
* `game_of_life_halting` passes any answer that is not empty; here only the oracle's answer passes.
* Many scorers give full marks to a constant, or to an answer with something behind it; here such
  an answer scores 0 (`gym_answers.py`).
* Generators that pass a constant on most puzzles are refused (`UNTRUSTED`) unless
  `allow_untrusted`.
* Some scorers raise on an answer that they cannot parse; here it scores 0.
* Generators that depend on the process and not only on the seed are refused (`UNSTEADY`).
"""

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from itertools import zip_longest
from typing import Any, Literal

from sdpo_jax.config import SEED, at_least, setting
from sdpo_jax.environments.answer_forms import cut_off, last_tagged, shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.gym_answers import FORMS, ROUNDED, as_number, is_close, is_whole
from sdpo_jax.environments.rows import check_sides, is_held_out
from sdpo_jax.environments.settings import WorkerConfig
from sdpo_jax.errors import UserError

MAX_CHARACTERS, MAX_POWER = 10_000, 1_000
FORM = "<answer>...</answer>, with the final answer and nothing else inside"
GUARDS: Mapping[str, Literal["literal", "expression", "harmless"]] = {
    **{"binary_matrix": "literal", "n_queens": "literal", "spiral_matrix": "literal"},
    **{"string_insertion": "literal", "countdown": "expression", "puzzle24": "expression"},
    **{"intermediate_integration": "expression", "simple_integration": "expression"},
    "polynomial_multiplication": "expression",
    # These evaluate only text that they generated themselves.
    **{"codeio": "harmless", "number_sorting": "harmless"},
}
"""By generator, the form that an answer must have before the scorer may evaluate it."""
UNSTEADY = frozenset(
    ["isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note"]
)
UNTRUSTED = frozenset({"propositional_logic"})
"""Generators that pass a constant on most puzzles: `P or Q` follows from many premises."""
EXACT = frozenset({"game_of_life_halting"})
"""Generators whose answers are compared with the oracle's instead of being scored."""

Sides = dict[str, list[Prompt]]
"""Prompts of `train` and of `held_out`."""

_INSTALL = "pip install 'reasoning-gym>=0.1.19'"
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
_EXPRESSION = re.compile(r"[A-Za-z0-9_+\-*/(),. ]*")
_FUNCTIONS = frozenset(
    ["Abs", "exp", "log", "sqrt", "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"]
)
_LITERAL = (ast.Expression, ast.UnaryOp, ast.USub, ast.UAdd, ast.Load, ast.List, ast.Tuple)
_MISSES, _MAX_EXPRESSION = 3000, 400


@dataclass(frozen=True)
class ReasoningGymConfig(WorkerConfig):
    """Puzzles that the package reasoning-gym makes and scores."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    generators: tuple[str, ...] = ("basic_arithmetic",)
    """Names of reasoning-gym's generators, which take turns."""
    train_prompts: int = setting(1024, at_least(1))
    held_out_prompts: int = setting(256, at_least(1))
    allow_untrusted: bool = False
    """Whether to take generators on whose puzzles a constant answer often passes."""
    seed: int = setting(0, SEED)


class ReasoningGym:
    """The environment: puzzles of several generators in turn, determined by the seed.

    A hash holds one question in four out, whatever the numbers of prompts, so no question is on
    both sides.
    """

    needs_worker = True

    def __init__(
        self, generators: Sequence[str], train_prompts: int, held_out_prompts: int, seed: int = 0
    ):
        """Makes the prompts.

        Args:
          generators: names of reasoning-gym's generators, with their default settings.
          train_prompts: number of prompts to train on.
          held_out_prompts: number of prompts to evaluate on.
          seed: determines the puzzles and the split.

        Raises:
          UserError: the package is missing, a generator is unknown or not safe to use, or the
            generators do not make as many different questions.
        """
        # Some generators make all their puzzles at once, so ask for no more than may be needed.
        size = 8 * (train_prompts + held_out_prompts) + 100
        self._datasets = {name: _dataset(name, seed, size) for name in generators}
        if not self._datasets:
            raise UserError("environment.generators: none given, expected at least one")
        wanted = {"train": train_prompts, "held_out": held_out_prompts}
        sides = _draw(self._datasets, wanted, seed)
        self.train, self.held_out = sides["train"], sides["held_out"]
        check_sides(self.train, self.held_out)

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Scores an answer; feedback describes the expected form, or the score if partly right."""
        given = last_tagged(without_thinking(response))
        if not given:
            start = "No answer found" if given is None else "The answer is empty"
            return Outcome(0.0, False, f"{start}. End with {FORM}.", {"well_formed": 0.0})
        family, entry = prompt.data["family"], prompt.data["entry"]
        oracle, refused = entry["answer"], None
        if isinstance(oracle, str) and given == oracle.strip():
            given = oracle  # Leading white space matters to some scorers.
        else:
            refused = _refused(given, family)
        score = 0.0 if refused else self._score(family, entry, given)
        passed = score >= 1.0
        feedback = "" if passed else refused or self._complaint(family, entry, given, score)
        return Outcome(score, passed, feedback, {"well_formed": 1.0})

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades like `grade`; on a failure, the feedback is that the response was cut."""
        return cut_off(self.grade(prompt, response), FORM)

    def reference(self, prompt: Prompt) -> str:
        """The oracle's answer in its tags.

        Raises:
          UserError: the generator has no oracle.
        """
        answer = prompt.data["entry"]["answer"]
        if not isinstance(answer, str):
            raise UserError(
                f"reasoning-gym's {prompt.data['family']} has no answers to its puzzles; leave it "
                "out of environment.generators for a warm-up on references"
            )
        return f"<answer>{answer}</answer>"

    def _score(self, family: str, entry: Mapping[str, Any], given: str) -> float:
        oracle = entry["answer"]
        if family in EXACT or given == oracle:
            return float(given == oracle)
        # Digits of another base are not a number.
        expected = as_number(oracle) if family != "base_conversion" else None
        found = as_number(given, ratio=family == "coin_flip")
        if expected is not None and not (family in ROUNDED and is_close(found, expected)):
            return float(found == expected)
        try:
            score = float(self._datasets[family].score_answer(given, entry))
            if score >= 1.0:
                return float(is_whole(family, entry, given))
        except Exception:  # Scorers raise on an answer that they cannot parse.
            return 0.0
        return max(0.0, score) if score == score and expected is None else 0.0

    def _complaint(self, family: str, entry: Mapping[str, Any], given: str, score: float) -> str:
        expected, found = form_of(entry["answer"]), form_of(given)
        if expected is not None and found != expected and (expected, found) != _WHOLE_AS_NUMBER:
            got = found or "something else"
            return f"Expected {expected} as the answer, got {got}: {shown(given)}"
        if score > self._score(family, entry, "?"):
            return f"The answer {shown(given)} is partly right: it scores {score:.2f} of 1."
        return f"The answer {shown(given)} is wrong."


def build(config: ReasoningGymConfig) -> ReasoningGym:
    """Builds the environment from its settings.

    Raises:
      UserError: a generator is in `UNTRUSTED` and the recipe does not insist.
    """
    if not config.allow_untrusted and (names := UNTRUSTED.intersection(config.generators)):
        raise UserError(
            f"environment.generators: {min(names)!r} passes one constant answer on most puzzles; "
            "leave it out or set environment.allow_untrusted"
        )
    return ReasoningGym(
        config.generators, config.train_prompts, config.held_out_prompts, config.seed
    )


_WHOLE_AS_NUMBER = ("a number", "a whole number")


def form_of(answer: Any) -> str | None:
    """The form of an answer that feedback can name; None for any other form."""
    if not isinstance(answer, str):
        return None
    answer = answer.strip()
    if re.fullmatch(r"[-+]?\d{1,400}", answer):
        return "a whole number"
    if re.fullmatch(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?", answer):
        return "a number"
    if answer.startswith("[") and answer.endswith("]"):
        return "a list in square brackets"
    return None


def _dataset(name: str, seed: int, size: int) -> Any:
    if util.find_spec("reasoning_gym") is None:
        raise UserError(
            f'environment.kind = "reasoning_gym" needs the package reasoning-gym: {_INSTALL}'
        )
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS or name == "composite":
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        what, names = ("near it", near) if near else ("known", sorted(DATASETS))
        raise UserError(f"environment.generators: unknown {name!r}; {what}: {', '.join(names)}")
    if name in UNSTEADY:
        raise UserError(
            f"environment.generators: {name!r} makes other puzzles in every process, expected one "
            "that a seed decides; leave it out"
        )
    made = DATASETS[name][0]
    if name not in GUARDS and _EVALUATES.search(inspect.getsource(made)):
        raise UserError(
            f"environment.generators: {name!r} evaluates text in a way that was not reviewed, "
            "expected a scorer that cannot run an answer as code; leave it out"
        )
    while True:
        try:
            return create_dataset(name, seed=seed, size=size)
        except ValueError:  # Some refuse sizes that they could not fill.
            if size < 100:
                raise
            size //= 4


def _draw(datasets: Mapping[str, Any], wanted: Mapping[str, int], seed: int) -> Sides:
    """Makes the wanted number of prompts of each side, with distinct questions."""
    found: dict[str, list[list[Prompt]]] = {side: [] for side in wanted}
    for number, (name, dataset) in enumerate(datasets.items()):
        missing = {side: len(range(number, count, len(datasets))) for side, count in wanted.items()}
        for side, prompts in _prompts(name, dataset, missing, seed).items():
            found[side].append(prompts)
    turns = {side: zip_longest(*parts) for side, parts in found.items()}
    return {side: [p for turn in turns[side] for p in turn if p] for side in wanted}


def _prompts(name: str, dataset: Any, missing: dict[str, int], seed: int) -> Sides:
    found: Sides = {side: [] for side in missing}
    seen: set[str] = set()
    misses = index = 0
    size = len(dataset)
    while any(len(found[side]) < count for side, count in missing.items()):
        if misses > _MISSES or index == size:
            made = {side: len(prompts) for side, prompts in found.items()}
            raise UserError(
                f"environment.train_prompts, environment.held_out_prompts: {name!r} makes about "
                f"{made['train']} and {made['held_out']} different questions, expected "
                f"{missing['train']} and {missing['held_out']}; lower them or add generators"
            )
        entry = dataset[index]
        index += 1
        question: str = entry["question"]
        side = "held_out" if is_held_out(question, seed) else "train"
        if question in seen or len(found[side]) >= missing[side]:
            misses += 1
            continue
        misses = 0
        seen.add(question)
        content = f"{question}\n\nThink step by step, then end with {FORM}."
        messages: tuple[Mapping[str, str], ...] = ({"role": "user", "content": content},)
        name_of_prompt = f"{name}-{side}-{len(found[side])}"
        found[side].append(Prompt(name_of_prompt, messages, {"family": name, "entry": entry}))
    return found


def _refused(answer: str, family: str) -> str | None:
    """The feedback on an answer that its scorer must not see; None if it may."""
    if len(answer) > MAX_CHARACTERS:
        return f"The answer is longer than {MAX_CHARACTERS} characters."
    if family in FORMS and not re.fullmatch(FORMS[family], answer, re.IGNORECASE):
        return f"Expected an answer in the form of the question alone, got: {shown(answer)}"
    guard = GUARDS.get(family)
    if guard == "literal" and not is_literal(answer):
        return f"Expected text or a list of literals as the answer, got code: {shown(answer)}"
    if guard == "expression" and not is_expression(answer):
        return (
            "Expected an expression of numbers, variables of one letter, + - * / ** and "
            f"parentheses as the answer, got something else: {shown(answer)}"
        )
    return None


def _parsed(answer: str) -> ast.Expression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `1if` in an answer would print warnings.
        return ast.parse(answer.strip(), mode="eval")


def is_literal(answer: str) -> bool:
    """Whether `eval` of a text is harmless: not Python, a name, or made of literals."""
    try:
        tree = _parsed(answer)
    except (SyntaxError, ValueError):
        return True
    except (MemoryError, RecursionError):
        return False
    return all(isinstance(node, (*_LITERAL, ast.Name, ast.Constant)) for node in ast.walk(tree))


def is_expression(answer: str) -> bool:
    """Whether a text is short arithmetic with small powers, safe for SymPy's evaluating parser."""
    if len(answer) > _MAX_EXPRESSION or not _EXPRESSION.fullmatch(answer):
        return False
    try:
        tree = _parsed(answer)
        return _is_arithmetic(tree.body) and _power(tree.body) <= MAX_POWER
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _is_arithmetic(node: ast.expr) -> bool:
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow(), right):
            return _is_arithmetic(left) and _is_arithmetic(right)
        case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
            return _is_arithmetic(operand)
        case ast.Call(ast.Name(name), [argument], []):
            return name in _FUNCTIONS and _is_arithmetic(argument)
        case ast.Name(name):
            return len(name) == 1
        case ast.Constant(value):
            return isinstance(value, int | float) and abs(value) < 1e18
        case _:
            return False


def _power(node: ast.AST) -> float:
    """An upper bound on the product of nested exponents; a power tower exceeds `MAX_POWER`."""
    inside = max(map(_power, ast.iter_child_nodes(node)), default=1.0)
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)):
        return inside
    numbers = [n.value for n in ast.walk(node.right) if isinstance(n, ast.Constant)]
    if _power(node.right) > 1.0 and numbers and not _has_variable(node.right):
        return MAX_POWER + 1.0
    sizes = [abs(n) for n in numbers if isinstance(n, int | float)]
    return inside * max([1.0, *sizes])


def _has_variable(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and len(n.id) == 1 for n in ast.walk(node))
