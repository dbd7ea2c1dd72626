"""A tokenizer with a chat template, behind the four calls that the engine makes.

The boundary between prompt and response is ours: a prompt is rendered once, the response is
whatever ids were sampled, and nothing is ever tokenised again. Text that stands where a message's
content stands can never become a control token: content that spells one is tokenised apart, with
control tokens split into plain text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]


class ChatTokenizer:
    """Renders chats to ids and turns sampled ids into text."""

    def __init__(self, tokenizer: Any, *, stop_ids: Sequence[int] = (), where: str = "tokenizer"):
        """Wraps a `transformers` tokenizer; `stop_ids` default to its end-of-sequence token."""
        if not tokenizer.chat_template:
            raise UserError(
                f"{where}: the tokenizer has no chat template; "
                "add `chat_template` to tokenizer_config.json"
            )
        stops = tuple(stop_ids) or (tokenizer.eos_token_id,)
        if None in stops:
            raise UserError(f"{where}: the tokenizer has no eos_token and no stop ids were given")
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = tuple(int(i) for i in stops)
        self.vocabulary = len(tokenizer)
        # Not `all_special_tokens` alone: Llama 3 declares its header tokens in tokenizer.json only.
        control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        control |= set(tokenizer.all_special_tokens)
        longest_first = sorted(control, key=lambda t: (-len(t), t))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ChatTokenizer":
        """Loads the tokenizer of a folder in Hugging Face layout; never asks a hub."""
        from transformers import AutoTokenizer

        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: expected tokenizer.json there, found none")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return cls(tokenizer, stop_ids=_generation_stop_ids(folder), where=str(folder))

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; control tokens in it stay text."""
        return list(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, control tokens left out."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, messages: Messages) -> list[int]:
        """A chat to ids, ending with the header of the assistant's turn."""
        if not any(self._control.search(message["content"]) for message in messages):
            return self._encode_template(self._apply(messages))
        return self._render_apart(messages)

    def _apply(self, messages: Messages) -> str:
        return self._tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
        )

    def _encode_template(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _render_apart(self, messages: Messages) -> list[int]:
        """Tokenises template and contents apart, contents with control tokens as plain text."""
        marks = [f"\x00{i}\x00" for i in range(len(messages))]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        rest, ids = self._apply(marked), list[int]()
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise UserError(
                    "the chat template drops or rewrites a message that spells a control token; "
                    f"message: {message['content'][:80]!r}"
                )
            ids += self._encode_template(before) + self.encode(message["content"])
        return ids + self._encode_template(rest)


def _generation_stop_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, which lists every token that ends a turn."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    stop = json.loads(path.read_text()).get("eos_token_id")
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)
