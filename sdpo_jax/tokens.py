"""What the engine asks of a tokenizer. Sampled ids are never tokenized again."""

from collections.abc import Mapping, Sequence
from typing import Protocol

_BROKEN_CHARACTER = "\ufffd"  # what half of a multi-byte character decodes to


class Tokenizer(Protocol):
    """Chats to ids, ids to text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response; the one that was sampled is part of the response."""
        ...

    @property
    def end_id(self) -> int:
        """The one of them that ends an assistant's turn, which demonstrations teach."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A chat to ids, with the assistant's header.

        Contents cannot hold control tokens; assistants' turns are encoded as responses are.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Foreign text to ids, control tokens in it as text."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """A response as the model writes it: `<think>` is a token, what ends a turn is text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text without control tokens."""
        ...


def start_of(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The longest start of `text` in at most `tokens` tokens, in whole characters of `text`."""
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    return text[: len(tokenizer.decode(ids[:tokens]).rstrip(_BROKEN_CHARACTER))]


def end_of(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The longest end of `text` in at most `tokens` tokens, in whole characters of `text`."""
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    kept = tokenizer.decode(ids[len(ids) - tokens :]).lstrip(_BROKEN_CHARACTER)
    return text[len(text) - len(kept) :]
