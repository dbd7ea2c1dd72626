"""A sandbox for programs that a model wrote; it returns observations, never verdicts."""

from sdpo_jax.environments.sandbox.open import Tier, open_sandbox
from sdpo_jax.environments.sandbox.protocol import (
    Call,
    Check,
    Evaluate,
    Limits,
    Observation,
    Program,
    Report,
    Run,
    Sandbox,
)

__all__ = [
    "Call",
    "Check",
    "Evaluate",
    "Limits",
    "Observation",
    "Program",
    "Report",
    "Run",
    "Sandbox",
    "Tier",
    "open_sandbox",
]
