"""Prompts in a shuffled order that never ends and resumes exactly.

The order is a pure function of (seed, position): a Grain map dataset, read without threads. A saved
state carries a fingerprint of the source, because Grain alone takes up a state of another source or
seed and goes on with other prompts.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, cast

import grain  # pyright: ignore[reportMissingTypeStubs]

from sdpo_jax.errors import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_HASHED_ITEMS = 1024
_HASHED_ORDER = 64
_EPOCHS = 2**32  # as good as endless; Grain's own "for ever" overflows with a source of one item


class Source(Protocol[T_co]):
    """Random access: a list, a range, or anything that makes its items when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class PromptBatches(Generic[T]):
    """An endless iterator over lists of items, with a JSON-serialisable state."""

    def __init__(self, source: Source[T], *, batch_size: int, seed: int):
        """See `prompt_batches`."""
        batches = _shuffled(source, seed).repeat(_EPOCHS).batch(batch_size, batch_fn=list)
        # Without threads and read-ahead the position is exactly what has been handed out.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._fingerprint = source_fingerprint(source, batch_size=batch_size, seed=seed)

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns `{"position": ..., "fingerprint": ...}`, to be saved with the run."""
        return {"position": dict(self._iterator.get_state()), "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved position; refuses the state of another source, seed or batch size."""
        if set(state) != {"position", "fingerprint"}:
            text = f"data state with {sorted(state)}, expected position and fingerprint"
            raise UserError(f"{text}; the checkpoint was written by another version")
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the saved position belongs to other data; resuming would skip or repeat prompts\n"
                f"  saved: {state['fingerprint']}\n"
                f"  now:   {self._fingerprint}\n"
                "restore the data, seed and batch size, or start in a new run directory"
            )
        self._iterator.set_state(dict(state["position"]))


def prompt_batches(source: Source[T], *, batch_size: int, seed: int) -> PromptBatches[T]:
    """Iterates over a source in batches, shuffled anew in each epoch, for ever.

    Epochs follow each other without a gap: each item comes once per epoch, and where `batch_size`
    does not divide the length a batch holds the end of one epoch and the beginning of the next.

    Args:
        source: anything with a length and items by number, perhaps made on access. Their `repr`
            must be the same in every process (no addresses, no sets), for the fingerprint.
        batch_size: items per batch.
        seed: of the order, from 0 to 2**32 - 1.
    """
    if len(source) < 1:
        raise UserError("the data source is empty, expected at least one item")
    if batch_size < 1 or not 0 <= seed < 2**32:
        text = "expected batch_size >= 1 and a seed from 0 to 2**32 - 1"
        raise ValueError(f"batch_size {batch_size}, seed {seed}: {text}")
    return PromptBatches(source, batch_size=batch_size, seed=seed)


def source_fingerprint(source: Source[Any], *, batch_size: int, seed: int) -> str:
    """Describes data and order, readable enough to see what differs between two.

    The content hash covers up to 1024 items, evenly spread, first and last among them; the order
    hash covers the first shuffled positions, so that another shuffling algorithm shows as well.
    """
    size = len(source)
    count = min(size, _HASHED_ITEMS)
    spread = [i * (size - 1) // max(1, count - 1) for i in range(count)]
    shuffled = _shuffled(range(size), seed)
    order = [int(shuffled[i]) for i in range(min(size, _HASHED_ORDER))]
    parts = (
        f"{size} items",
        f"batch {batch_size}",
        f"seed {seed}",
        f"order {_short_hash([order])}",
    )
    return ", ".join([*parts, f"content {_short_hash(source[i] for i in spread)}"])


def _shuffled(source: Source[T], seed: int) -> Any:
    return grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle()


def _short_hash(items: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for item in items:
        digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()
