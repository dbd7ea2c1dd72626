"""Sampling on the host's side: prompts in, rollouts out, by repeated calls of the decode loop.

Few programs are compiled: prompts are padded to sizes from `size_bucket`, caches grow through
`cache_sizes`, and the slots are reduced to a quarter or a sixteenth when no rollout waits for one.
Between two calls of the compiled loop the host sees which rollouts are done, and can grade them
while the device continues. Shards of the mesh do not wait for each other inside the loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from sdpo_jax.data.packing import bucket, pad_rows, size_bucket
from sdpo_jax.devices import ROWS, Devices
from sdpo_jax.model import Model, Params, Prefix
from sdpo_jax.rollouts.generate import (
    Job,
    Plan,
    Slots,
    Turn,
    advance,
    begin,
    resize,
    rollout_keys,
    turn_keys,
)
from sdpo_jax.rollouts.token_sampling import Filters

SMALLEST_CACHE = 64


def _specs(rows: Any, cached: Any, whole: Any) -> tuple[Any, Any]:
    """Partition specs (or shardings) for `Job` and `Slots`.

    Args:
      rows: of arrays whose first axis is rows.
      cached: of keys and values, `[L, rows, ...]`.
      whole: of what every shard has.
    """
    prefix = Prefix(keys=cached, values=cached, lengths=rows, last_hidden=rows)
    job = Job(prefix=prefix, keys=rows, wanted=rows, stop_ids=whole, filters=whole)
    slots = Slots(
        rollout=rows,
        step=rows,
        hidden=rows,
        cache=cached,
        written=rows,
        started=rows,
        decoded=rows,
        rollouts=rows,  # the spec of a tuple is that of each of its arrays
    )
    return job, slots


JOB, SLOTS = _specs(ROWS, P(None, *ROWS), P())
"""Partition specs of `Job` and `Slots`."""


def cache_sizes(max_tokens: int) -> list[int]:
    """Sizes of the cache, smallest first: `max_tokens`, halved up to three times.

    >>> cache_sizes(8192), cache_sizes(200), cache_sizes(48)
    ([1024, 2048, 4096, 8192], [100, 200], [48])
    """
    sizes = [max_tokens]
    while len(sizes) < 4 and sizes[0] >= 2 * SMALLEST_CACHE:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


class HostRollouts(NamedTuple):
    """Rollouts as numpy arrays; see `Rollouts`."""

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    lengths: NDArray[np.int32]
    stopped: NDArray[np.bool_]
    decoded: int = 0
    """Iterations of the decode loop on the busiest shard."""

    def response(self, row: int) -> list[int]:
        """The sampled ids of a row, including the stop token."""
        return self.tokens[row, : self.lengths[row]].tolist()

    def responses(self) -> list[list[int]]:
        """The sampled ids of each row."""
        return [self.response(row) for row in range(len(self.tokens))]


OnDone = Callable[[list[int], HostRollouts], None]
"""`on_done(rows, rollouts)`: called when `rows` of `rollouts` are done, once for each row."""


class Sampler:
    """Samples rollouts; compiles prefill and the decode loop once per bucket of sizes."""

    def __init__(self, model: Model, devices: Devices, stop_ids: Sequence[int], slots: int = 0):
        """`slots`: number of rollouts that are decoded at a time; 0 decodes all at once."""
        self._model, self._devices, self._slots = model, devices, slots
        self._stop_ids = np.asarray(stop_ids, np.int32)
        job, state = self._shardings()
        self._begin = devices.jit(
            self._prefill_and_begin,
            static_argnames=("group", "slots", "cache_size", "max_tokens"),
            out_shardings=(job, state),
        )
        self._advance = devices.jit(
            self._advance_shards, static_argnames="plan", donate_argnums=2, out_shardings=state
        )
        self._resize = devices.jit(
            self._resize_shards, static_argnames="cache_size", out_shardings=state
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
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int,
        step: int,
        first_prompt: int | Sequence[int] = 0,
        prompt_rows: int = 1,
        turn: Turn | None = None,
        on_done: OnDone | None = None,
    ) -> HostRollouts:
        """Samples `group` rollouts of each prompt; row `n` belongs to prompt `n // group`.

        Args:
          params: the model's parameters.
          prompts: the token ids of each prompt.
          group: rollouts per prompt, `G`.
          max_tokens: maximum length of a response, `T`.
          temperature: 0 is greedy decoding.
          top_p: sample from the likeliest tokens with this total probability; 1 disables it.
          top_k: sample from this many of the likeliest tokens; 0 disables it.
          min_p: sample from tokens with at least this share of the top token's probability.
          seed: of the run.
          step: training step; seed, step and prompt index determine every sampled token.
          first_prompt: index of `prompts[0]`, for a set of prompts that is sampled in several
            calls; or the index of each prompt, if the caller reorders or selects prompts.
          prompt_rows: the number of prompts is padded to a multiple of this; padding is not
            decoded.
          turn: for turns after the first, whose prompts are conversations; `group` is then 1. None
            is the first turn.
          on_done: called with rows that are done, while the device continues.
        """
        rows = bucket(prompt_rows, self._devices.row_shards)
        width = size_bucket(max(map(len, prompts)))
        tokens, lengths = pad_rows(prompts, multiple=width, rows_multiple=rows)
        capacity = len(lengths) * group
        slots = min(bucket(self._slots or capacity, self._devices.row_shards), capacity)
        put, sizes = self._devices.put_rows, cache_sizes(max_tokens)
        job, state = self._begin(
            params,
            put(tokens),
            put(lengths),
            self._stop_ids,
            Filters(
                np.float32(temperature),  # pyright: ignore[reportArgumentType]
                None if top_p == 1.0 else np.float32(top_p),  # pyright: ignore[reportArgumentType]
                None if top_k == 0 else np.int32(top_k),  # pyright: ignore[reportArgumentType]
                None if min_p == 0.0 else np.float32(min_p),  # pyright: ignore[reportArgumentType]
            ),
            np.uint32(seed),
            np.uint32(step),
            _indices(first_prompt, len(lengths)),
            None if turn is None else _padded(turn, len(lengths)),
            group=group,
            slots=slots,
            cache_size=sizes[0],
            max_tokens=max_tokens,
        )
        n = len(prompts) * group
        finished = None if on_done is None else _FinishedRows(on_done, n)
        plan = Plan(max_tokens, grouped=slots == capacity, refill=slots < capacity)
        state = self._decode(params, job, state, plan, finished)
        out = self._host(state, n)
        if finished is not None:
            finished.report(out, np.ones(capacity, np.bool_))
        return out

    def _decode(
        self, params: Params, job: Job, state: Slots, plan: Plan, finished: "_FinishedRows | None"
    ) -> Slots:
        """Calls the compiled loop until all rollouts are done; resizes cache and slots between."""
        sizes, shards = cache_sizes(plan.max_tokens), self._devices.row_shards
        count = self._devices.fetch(job.wanted)
        while True:
            state = self._advance(params, job, state, plan=plan)
            if finished is not None:
                finished.report_held()
            view = self._devices.fetch((state.rollout, state.step, state.started))
            rollout, step = (x.reshape(shards, -1) for x in view[:2])
            live = rollout < len(job.keys) // shards
            if not live.any():
                return state
            if finished is not None:
                done = _done(rollout, view[2], job.keys.size)
                finished.hold(self._host(state, finished.count), done)
            cache_size = state.cache.keys.shape[3]
            if (live & (step >= cache_size)).any():
                cache_size = sizes[sizes.index(cache_size) + 1]
            keep = None if (view[2] < count).any() else _slots_to_keep(live)
            if keep is not None or cache_size > state.cache.keys.shape[3]:
                plan = plan._replace(grouped=plan.grouped and keep is None)
                keep = None if keep is None else self._devices.put_rows(keep)
                state = self._resize(state, keep, cache_size=cache_size)

    def _host(self, state: Slots, count: int) -> HostRollouts:
        *rollouts, decoded = self._devices.fetch((*state.rollouts, state.decoded))
        return HostRollouts(*(array[:count] for array in rollouts), decoded=int(decoded.max()))

    def _prefill_and_begin(
        self,
        params: Params,
        tokens: jax.Array,
        lengths: jax.Array,
        stop_ids: jax.Array,
        filters: Filters,
        seed: jax.Array,
        step: jax.Array,
        first_prompt: jax.Array,
        turn: Turn | None = None,
        *,
        group: int,
        slots: int,
        cache_size: int,
        max_tokens: int,
    ) -> tuple[Job, Slots]:
        shards = self._devices.row_shards
        prefix = self._model.prefill(params, tokens, jnp.maximum(lengths, 1))
        if turn is None:
            keys = rollout_keys(seed, step, first_prompt, len(lengths), group)
        else:
            keys = turn_keys(seed, step, turn)
        real = (lengths > 0).astype(jnp.int32).reshape(shards, -1)
        job = Job(prefix, keys, jnp.sum(real, axis=-1) * group, stop_ids, filters)
        start = self._on_shards(
            lambda job: begin(self._model, job, slots // shards, cache_size, max_tokens), JOB
        )
        return job, start(job)

    def _advance_shards(self, params: Params, job: Job, slots: Slots, *, plan: Plan) -> Slots:
        run = self._on_shards(
            lambda params, job, slots: advance(self._model, params, job, slots, plan),
            P(),
            JOB,
            SLOTS,
        )
        return run(params, job, slots)

    def _resize_shards(self, slots: Slots, keep: jax.Array | None, *, cache_size: int) -> Slots:
        return self._on_shards(partial(resize, cache_size=cache_size), SLOTS, ROWS)(slots, keep)

    @staticmethod
    def _on_shards(function: Any, *specs: Any) -> Any:
        """Maps over the shards of the rows; XLA partitions heads."""
        return jax.shard_map(
            function,
            in_specs=specs,
            out_specs=SLOTS,
            axis_names={"data", "fsdp"},
            check_vma=False,  # the loops' carries start from constants, equal on all shards
        )

    def _shardings(self) -> tuple[Any, Any]:
        """Shardings of the programs' outputs: rows over `data` and `fsdp`, heads over `tensor`."""
        mesh, rows = self._devices.mesh, self._devices.rows
        heads = jax.eval_shape(lambda: self._model.suffix_cache(1, 1)).keys.shape[2]
        tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        cached = NamedSharding(mesh, P(None, *ROWS, tensor))
        return _specs(rows, cached, self._devices.replicated)


def _padded(turn: Turn, rows: int) -> Turn:
    """Pads a turn to `rows` rows."""
    pad = (0, rows - len(turn.prompts))
    prompts, siblings = (np.pad(np.asarray(x, np.uint32), pad) for x in turn[:2])
    return Turn(prompts, siblings, np.uint32(turn.number))


def _indices(first_prompt: int | Sequence[int], rows: int) -> Any:
    """The index of the first prompt, or `[P]` of each; padding may have any index."""
    if isinstance(first_prompt, int):
        return np.uint32(first_prompt)
    indices = np.zeros(rows, np.uint32)
    indices[: len(first_prompt)] = first_prompt
    return indices


def _done(rollout: NDArray[np.int32], started: NDArray[np.int32], rows: int) -> NDArray[np.bool_]:
    """`[N]` bool: rollouts that have started and hold no slot.

    Args:
      rollout: `[shards, B]`, the slots' rollouts, numbered within their shard; others are idle.
      started: `[shards]`.
      rows: `N`.
    """
    shards, per_shard = len(started), rows // len(started)
    done = np.arange(per_shard)[None] < started[:, None]
    for line, held in zip(done, rollout, strict=True):
        line[held[held < per_shard]] = False
    return done.reshape(shards * per_shard)


class _FinishedRows:
    """Reports finished rows to the callback once, after launching the next device call."""

    def __init__(self, on_done: OnDone, count: int):
        self._on_done, self.count = on_done, count
        self._reported = np.zeros(count, np.bool_)
        self._held: tuple[HostRollouts, NDArray[np.bool_]] | None = None

    def hold(self, rollouts: HostRollouts, done: NDArray[np.bool_]) -> None:
        """Keeps the rows that are done for `report_held`."""
        self._held = rollouts, done

    def report_held(self) -> None:
        """Reports the rows that `hold` kept."""
        if self._held is not None:
            self.report(*self._held)
            self._held = None

    def report(self, rollouts: HostRollouts, done: NDArray[np.bool_]) -> None:
        """Calls `on_done` with those rows of `done` that were not reported before."""
        rows = np.flatnonzero(done[: self.count] & ~self._reported)
        self._reported[rows] = True
        if len(rows):
            self._on_done(rows.tolist(), rollouts)


def _slots_to_keep(live: NDArray[np.bool_]) -> NDArray[np.int32] | None:
    """`[shards · B']`: the live slots of each shard first; None if a quarter is not enough."""
    shards, slots = live.shape
    most = int(live.sum(axis=-1).max())
    size = next((s for s in (slots // 16, slots // 4) if s >= max(most, 1)), None)
    if size is None:
        return None
    keep = np.full((shards, size), -1, np.int32)
    for row, alive in zip(keep, live, strict=True):
        indices = np.flatnonzero(alive)
        row[: len(indices)] = indices
    return keep.reshape(-1)
