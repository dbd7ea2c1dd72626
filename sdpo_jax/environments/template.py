"""A template for your own environment in one file; replace the task by yours.

    sdpo env check THIS_FILE          checks it
    sdpo train RECIPE                 trains on it, with these lines in the recipe:

    [environment]
    kind = "file"
    path = "THIS_FILE"

An environment has `train` and `held_out`, lists of `Prompt`, and `grade(prompt, response)`. SDPO
learns from the words in `feedback`: the model that is shown them serves as its own teacher.
"""

import random

from sdpo_jax.environments.base import Outcome, Prompt


class Sums:
    """Asks for the sum of two numbers."""

    def __init__(self, seed: int):
        # Each question stands on one side only; otherwise held-out accuracy would measure memory.
        pairs = [(a, b) for a in range(10, 40) for b in range(10, 40)]
        # Seeded, because the trainer and its workers must make the same prompts.
        random.Random(seed).shuffle(pairs)
        self.train = [self._prompt(a, b) for a, b in pairs[:700]]
        self.held_out = [self._prompt(a, b) for a, b in pairs[700:]]

    def _prompt(self, a: int, b: int) -> Prompt:
        return Prompt(
            id=f"{a}+{b}",  # unique
            messages=({"role": "user", "content": f"What is {a} + {b}? Answer with the number."},),
            data={"sum": a + b},  # for `grade`; the model never sees it
        )

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Grades one response. A response may hold any text, and this method must never raise.

        Describe what is wrong and do not give the answer away: the teacher would copy it. If the
        response cannot be graded at all (a service is down), return `not_graded("why")`, which is
        in the module of `Outcome`.
        """
        text = response.strip()
        # Short and plain digits only: `int` accepts "1_0" and raises on 5,000 digits.
        if not (text.isascii() and text.isdigit() and len(text) <= 9):
            return Outcome(0.0, False, "expected a whole number and nothing else", {"number": 0.0})
        if int(text) == prompt.data["sum"]:
            return Outcome(reward=1.0, passed=True, feedback="", metrics={"number": 1.0})
        size = "small" if int(text) < prompt.data["sum"] else "large"
        return Outcome(0.0, False, f"the number is too {size}", {"number": 1.0})

    # Optional. `sdpo env check` tries it, and a warm-up by SFT (`data.source = "environment"`)
    # trains on it.
    def reference(self, prompt: Prompt) -> str:
        """Returns an answer that `grade` passes."""
        return str(prompt.data["sum"])


def make_environment(seed: int) -> Sums:
    """Makes the environment; `seed` is the recipe's `environment.seed`."""
    return Sums(seed)
