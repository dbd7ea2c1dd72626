"""The interface of a tokenizer with a chat template. Sampled ids are never tokenized again."""

from collections.abc import Mapping, Sequence
from typing import Protocol

_BROKEN_CHARACTER = "\ufffd"  # what an incomplete multi-byte character decodes to


class Tokenizer(Protocol):
    """Renders chats to ids, encodes text and decodes ids."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response; the sampled stop id is part of the response."""
        ...

    @property
    def end_id(self) -> int:
        """The stop id that ends an assistant's turn; it is appended to demonstrations."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of ids: the largest id plus one."""
        ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Renders a chat to ids, ending with the header of the assistant's turn.

        Control tokens that a content spells stay text, except in assistants' turns, which are
        encoded like responses.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Encodes foreign text; control tokens that it spells stay text."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Encodes a response as the model writes it: `<think>` is a token, stop tokens are text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text without special tokens."""
        ...


def start_of(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The longest prefix of `text` in whole characters that has at most `tokens` tokens."""
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    return text[: len(tokenizer.decode(ids[:tokens]).rstrip(_BROKEN_CHARACTER))]


def end_of(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The longest suffix of `text` in whole characters that has at most `tokens` tokens."""
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    kept = tokenizer.decode(ids[len(ids) - tokens :]).lstrip(_BROKEN_CHARACTER)
    return text[len(text) - len(kept) :]
