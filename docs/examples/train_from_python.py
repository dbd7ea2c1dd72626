"""Trains the embedded model from Python, on an environment of one's own.

    python docs/examples/train_from_python.py [STEPS]      # 10 steps take a minute on two CPU cores

The environment asks for alarms and wants time and day in one of the forms that the model knows. Its
feedback on a wrong call is what the self-teacher sees.
"""

import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import sdpo_jax
from sdpo_jax.api import Callbacks
from sdpo_jax.environments.base import Outcome, Prompt

RECIPE = Path(__file__).parents[2] / "configs" / "nano.toml"
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


class Alarms:
    """Prompts to train on, prompts to evaluate on, and a grader."""

    def __init__(self, seed=0):
        times = [(day, hour, half) for day in DAYS for hour in range(1, 12) for half in (0, 30)]
        random.Random(seed).shuffle(times)
        prompts = [self._prompt(*time) for time in times]
        self.train, self.held_out = prompts[:128], prompts[128:]

    def _prompt(self, day, hour, minute):
        text = f"tools: set_light, set_alarm, send_money\nwake me on {day} at {hour}:{minute:02} am"
        expected = f'set_alarm(time="{hour:02}:{minute:02}", day="{day[:3]}")'
        return Prompt(text, ({"role": "user", "content": text},), {"expected": expected})

    def grade(self, prompt, response):
        """Reward, whether it passes, and feedback: data for the teacher, not a verdict."""
        passed = response.strip() == prompt.data["expected"]
        return Outcome(float(passed), passed, f"expected {prompt.data['expected']}", {})


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run = sdpo_jax.load(
            RECIPE,
            environment=Alarms(),
            callbacks=Callbacks(on_save=lambda step, path: print(f"step {step:2}  saved")),
            **{
                "run_dir": folder,
                "train.steps": int(sys.argv[1]) if sys.argv[1:] else 10,
                "evaluation.prompts": 26,
            },
        )
        for row in run.steps():
            print(f"step {row.step:2}  reward {row.metrics['reward']:.2f}", flush=True)
        print(f"held-out accuracy {run.evaluate().metrics['accuracy']:.2f}")
