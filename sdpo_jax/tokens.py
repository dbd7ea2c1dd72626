"""What the engine asks of a tokenizer. Sampled ids are never tokenised again."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Chats to ids, ids to text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response; the one that was sampled is part of the response."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A chat to ids, with the assistant's header; contents cannot hold control tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, control tokens in it as text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text without control tokens."""
        ...
