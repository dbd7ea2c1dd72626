"""An environment in one file: change it until it asks what you want a model to learn.

    sdpo env check THIS_FILE          is it sound?
    sdpo train RECIPE                 with, in the recipe:

    [environment]
    kind = "file"
    path = "THIS_FILE"

An environment has `train` and `held_out`, lists of `Prompt`, and `grade(prompt, response)`. The
words in `feedback` are what SDPO learns from: the model, shown them, is the teacher of itself.
"""

import random

from sdpo_jax.environments.base import Outcome, Prompt


class Sums:
    """Adds two numbers."""

    def __init__(self, seed: int):
        # Each question on one side only, or held-out accuracy would measure memory.
        pairs = [(a, b) for a in range(10, 40) for b in range(10, 40)]
        # A seeded generator: the trainer and its workers must make the same prompts.
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
        """Judges one response. It may hold anything, so nothing in here may raise.

        Say what is wrong, not what is right: the teacher would copy the answer. Where you cannot
        judge at all (a service is down), return `not_graded("why")` from the same module.
        """
        text = response.strip()
        # Short and plain digits: `int` alone would take "1_0" and refuse 5,000 digits by raising.
        if not (text.isascii() and text.isdigit() and len(text) <= 9):
            return Outcome(0.0, False, "expected a whole number and nothing else", {"number": 0.0})
        if int(text) == prompt.data["sum"]:
            return Outcome(reward=1.0, passed=True, feedback="", metrics={"number": 1.0})
        size = "small" if int(text) < prompt.data["sum"] else "large"
        return Outcome(0.0, False, f"the number is too {size}", {"number": 1.0})

    # Optional: an answer that `grade` passes. `sdpo env check` tries it, and a warm-up by SFT
    # (`data.source = "environment"`) learns from it.
    def reference(self, prompt: Prompt) -> str:
        """An answer that `grade` passes."""
        return str(prompt.data["sum"])


def make_environment(seed: int) -> Sums:
    """Called with `environment.seed`."""
    return Sums(seed)
