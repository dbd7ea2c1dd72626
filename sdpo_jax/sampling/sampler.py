"""Prompts in, graded-ready rollouts out: the host's side of sampling.

Shapes come from a small set of buckets, so that few programs are compiled: prompts are padded to a
multiple of `PROMPT_MULTIPLE` tokens, the number of prompts and the response limit are the caller's.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.data.packing import bucket, pad_rows
from sdpo_jax.devices import Devices
from sdpo_jax.model import Model, Params
from sdpo_jax.sampling.generate import Rollouts, generate, rollout_keys

PROMPT_MULTIPLE = 32


class HostRollouts(NamedTuple):
    """Rollouts as numpy arrays; see `Rollouts`."""

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    lengths: NDArray[np.int32]
    stopped: NDArray[np.bool_]

    def responses(self) -> list[list[int]]:
        """The sampled ids of each row, the stop token included."""
        return [
            row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)
        ]


class Sampler:
    """Compiles prefill and decode once per bucket and runs them."""

    def __init__(self, model: Model, devices: Devices, stop_ids: Sequence[int]):
        self._devices = devices
        self._stop_ids = np.asarray(stop_ids, np.int32)
        self._run = jax.jit(
            partial(_prefill_and_generate, model),
            static_argnames=("group", "max_tokens"),
            out_shardings=devices.rows,
        )

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        group: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        step: int,
        first_prompt: int = 0,
        prompt_rows: int = 1,
    ) -> HostRollouts:
        """Draws `group` rollouts of each prompt; row `n` belongs to prompt `n // group`.

        Args:
          params: of the model.
          prompts: ids of each prompt.
          group: rollouts per prompt, `G`.
          max_tokens: response limit, `T`.
          temperature: 0 is greedy.
          top_p: draw from the likeliest tokens that hold this much probability; 1 from all.
          seed: of the run.
          step: with `seed` and the prompt's index it determines every draw.
          first_prompt: index of `prompts[0]`, for a set of prompts that is decoded in parts.
          prompt_rows: prompts are padded to a multiple of this; padding is not decoded.
        """
        rows = bucket(prompt_rows, self._devices.row_shards)
        tokens, lengths = pad_rows(prompts, multiple=PROMPT_MULTIPLE, rows_multiple=rows)
        put = self._devices.put_rows
        rollouts = self._run(
            params,
            put(tokens),
            put(lengths),
            self._stop_ids,
            np.float32(temperature),
            None if top_p == 1.0 else np.float32(top_p),
            np.uint32(seed),
            np.uint32(step),
            np.uint32(first_prompt),
            group=group,
            max_tokens=max_tokens,
        )
        n = len(prompts) * group
        return HostRollouts(*(array[:n] for array in self._devices.fetch(rollouts)))


def _prefill_and_generate(
    model: Model,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    stop_ids: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    seed: jax.Array,
    step: jax.Array,
    first_prompt: jax.Array,
    *,
    group: int,
    max_tokens: int,
) -> Rollouts:
    prefix = model.prefill(params, tokens, jnp.maximum(lengths, 1))
    keys = rollout_keys(seed, step, first_prompt, tokens.shape[0], group)
    active = jnp.repeat(lengths > 0, group)
    return generate(
        model, params, prefix, keys, active, stop_ids, temperature, top_p, max_tokens=max_tokens
    )
