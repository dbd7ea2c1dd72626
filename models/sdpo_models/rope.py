"""Rotary frequencies and their scaling, read from and written to a Hugging Face `config.json`.

Frequencies depend on sizes alone and are computed once, on the host, in float64. The kinds of
scaling are `linear` (positions divided by a factor), `llama3` (Llama 3.1's ramp over wavelengths)
and `yarn` (Peng et al. 2023, arXiv 2309.00071). As in the published checkpoints, YaRN's ramp is
over dimensions, with its ends rounded outwards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdpo_jax.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for longer contexts. Static under jit.

    "Stretched" below means divided by `factor`.
    """

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original_positions: int = 0  # llama3 and yarn: the length before stretching
    low_factor: float = 1.0  # llama3: waves longer than original_positions / low_factor stretch
    high_factor: float = 4.0  # llama3: waves shorter than original_positions / high_factor do not
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this do not stretch
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this stretch fully
    attention_factor: float = 1.0  # yarn: multiplies cosine and sine


_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_factor": "low_freq_factor",
        "high_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
"""Field of `RopeScaling` to key of config.json, per kind."""


def inverse_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray[Any, Any]:
    """`[d / 2]` float32: the angle by which each pair of coordinates rotates per position."""
    plain = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return plain.astype(np.float32)
    stretched = plain / scaling.factor
    kept: Any = 0.0  # the unstretched share of each frequency
    if scaling.kind == "llama3":
        kept = _llama3(plain, scaling)
    elif scaling.kind == "yarn":
        kept = _yarn(plain, scaling, theta)
    return (kept * plain + (1.0 - kept) * stretched).astype(np.float32)


def _llama3(plain: np.ndarray[Any, Any], scaling: RopeScaling) -> Any:
    """The unstretched share: a ramp over rotations per original length, low to high factor."""
    turns = scaling.original_positions * plain / (2 * math.pi)
    return np.clip(
        (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0.0, 1.0
    )


def _yarn(plain: np.ndarray[Any, Any], scaling: RopeScaling, theta: float) -> Any:
    """The unstretched share: a ramp over dimensions, from `beta_fast` to `beta_slow` rotations."""
    d = 2 * len(plain)

    def dimension(turns: float) -> float:
        original = scaling.original_positions / (turns * 2 * math.pi)
        return d * math.log(original) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), d - 1)
    # Equal ends would divide by zero; 0.001 is the width that the published code uses.
    width = high - low if high != low else 0.001
    return 1.0 - np.clip((np.arange(d // 2) - low) / width, 0.0, 1.0)


def read_scaling(rope: Mapping[str, Any], *, max_positions: int, where: str) -> RopeScaling | None:
    """Reads one dictionary of rotary parameters; None means no scaling.

    Raises:
      UserError: a kind or an option that is not implemented, a missing or impossible value.
    """
    given = {key: value for key, value in rope.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)  # some configs carry both spellings
    given.pop("rope_theta", None)
    if kind not in _KEYS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(_KEYS)}"
        )
    if given.get("truncate", True) is True:
        given.pop("truncate", None)
    unknown = sorted(set(given) - set(_KEYS[kind].values()))
    if unknown:
        raise UserError(
            f"{where}: rope option {unknown[0]!r} = {given[unknown[0]]!r} is not supported "
            f"with rope_type {kind!r}; expected only {', '.join(_KEYS[kind].values()) or 'none'}"
        )
    if kind == "default":
        return None
    return _checked(kind, given, max_positions, where)


def _checked(kind: str, given: dict[str, Any], max_positions: int, where: str) -> RopeScaling:
    if kind != "linear":
        given.setdefault("original_max_position_embeddings", max_positions)
    required = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set())
    for key in sorted(required):
        if key not in given:
            raise UserError(f"{where}: rope_type {kind!r} needs {key}, found none")
    fields = {
        name: _number(given[key], key, where) for name, key in _KEYS[kind].items() if key in given
    }
    if kind == "yarn":
        fields.setdefault("attention_factor", 0.1 * math.log(fields["factor"]) + 1.0)
    original = int(fields.pop("original_positions", 0))
    scaling = RopeScaling(kind, original_positions=original, **fields)
    if kind == "llama3" and scaling.low_factor >= scaling.high_factor:
        raise UserError(
            f"{where}: low_freq_factor {scaling.low_factor} is not below high_freq_factor "
            f"{scaling.high_factor}"
        )
    return scaling


def _number(value: Any, key: str, where: str) -> float:
    positive = type(value) in (int, float) and 0.0 < value < math.inf
    if not positive or (key == "factor" and value < 1.0):
        raise UserError(f"{where}: rope option {key} = {value!r}; expected a positive number")
    return float(value)


def write_scaling(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `read_scaling`, with the rotary base added."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    values = {key: getattr(scaling, field) for field, key in _KEYS[scaling.kind].items()}
    return {"rope_type": scaling.kind, "rope_theta": theta, **values}
