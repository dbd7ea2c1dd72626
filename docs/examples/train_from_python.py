"""Trains the embedded model from Python, on an environment of one's own.

    python docs/examples/train_from_python.py [STEPS]      # 10 steps take a minute on two CPU cores

The environment asks for a sum, to be written as a tool call. Its feedback on a wrong answer is what
the self-teacher sees.
"""

import random
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import sdpo_jax
from sdpo_jax.api import Callbacks
from sdpo_jax.environments.base import Outcome, Prompt

RECIPE = Path(__file__).parents[2] / "configs" / "nano.toml"


class Sums:
    """Prompts to train on, prompts to evaluate on, and a grader."""

    def __init__(self, seed=0):
        pairs = random.Random(seed).sample([(a, b) for a in range(10) for b in range(10)], 80)
        prompts = [
            Prompt(f"{a}+{b}", ({"role": "user", "content": f"add {a} and {b}"},), {"pair": (a, b)})
            for a, b in pairs
        ]
        self.train, self.held_out = prompts[:64], prompts[64:]

    def grade(self, prompt, response):
        """Half a point for any call of `add`, all of it for the right arguments."""
        (a, b), call = prompt.data["pair"], re.fullmatch(r"add\(a=(\d), b=(\d)\)", response)
        if call is None:
            return Outcome(0.0, False, "Expected one call, such as add(a=1, b=2).", {})
        passed = (int(call[1]), int(call[2])) == (a, b)
        return Outcome(1.0 if passed else 0.5, passed, f"The numbers are {a} and {b}.", {})


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run = sdpo_jax.load(
            RECIPE,
            environment=Sums(),
            callbacks=Callbacks(on_save=lambda step, path: print(f"step {step:2}  saved")),
            **{
                "run_dir": folder,
                "train.steps": int(sys.argv[1]) if sys.argv[1:] else 10,
                "evaluation.prompts": 16,
            },
        )
        for row in run.steps():
            print(f"step {row.step:2}  reward {row.metrics['reward']:.2f}", flush=True)
        print(f"held-out accuracy {run.evaluate().metrics['accuracy']:.2f}")
