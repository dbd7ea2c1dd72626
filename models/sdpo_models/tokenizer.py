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
from typing import Any, Literal, cast

from sdpo_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]
Thinking = Literal["template", "on", "off"]
"""What a chat template is told of thinking: nothing (its own default), to think, or not to."""


class ChatTokenizer:
    """Renders chats to ids and turns sampled ids into text."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] = (),
        thinking: Thinking = "template",
        where: str = "tokenizer",
    ):
        """Wraps a `transformers` tokenizer; `stop_ids` default to its end-of-sequence token."""
        if not tokenizer.chat_template:
            raise UserError(
                f"{where}: the tokenizer has no chat template; "
                "add `chat_template` to tokenizer_config.json"
            )
        # A setting that the template never reads would change nothing, and nobody would notice.
        if thinking != "template" and "enable_thinking" not in str(tokenizer.chat_template):
            raise UserError(
                f"{where}: thinking = {thinking!r}, but the chat template reads no "
                "`enable_thinking`; expected 'template'"
            )
        stops = tuple(stop_ids) or (tokenizer.eos_token_id,)
        if None in stops:
            raise UserError(f"{where}: the tokenizer has no eos_token and no stop ids were given")
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = tuple(int(i) for i in stops)
        self._template_options = (
            {} if thinking == "template" else {"enable_thinking": thinking == "on"}
        )
        self._where = where
        # Not the number of tokens: ids may have gaps, and the largest one needs a row too.
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        # Not `all_special_tokens` alone: Llama 3 declares its header tokens in tokenizer.json only.
        control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        control |= set(tokenizer.all_special_tokens)
        longest_first = sorted(control, key=lambda t: (-len(t), t))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, thinking: Thinking = "template"
    ) -> "ChatTokenizer":
        """Loads the tokenizer of a folder in Hugging Face layout; never asks a hub."""
        from transformers import AutoTokenizer

        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: expected tokenizer.json there, found none")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        stop_ids = _generation_stop_ids(folder)
        return cls(tokenizer, stop_ids=stop_ids, thinking=thinking, where=str(folder))

    def check_vocabulary(self, rows: int) -> None:
        """Refuses an embedding with fewer rows than ids: a look-up beyond it gives the last row.

        Raises:
          UserError: a token or a stop id has no row.
        """
        if self.vocabulary > rows:
            raise UserError(
                f"{self._where}: the tokenizer has {self.vocabulary} ids and the embedding "
                f"{rows}; expected no more ids than rows"
            )
        beyond = [i for i in self.stop_ids if not 0 <= i < rows]
        if beyond:
            raise UserError(
                f"{self._where}: generation_config.json ends answers with id {beyond[0]}, which "
                f"can never be sampled: the embedding has {rows} rows"
            )

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
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=True,
            **self._template_options,
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
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    stop = cast("dict[str, Any]", content).get("eos_token_id") if isinstance(content, dict) else {}
    stops = cast("list[Any]", stop) if isinstance(stop, list) else [] if stop is None else [stop]
    if any(type(i) is not int for i in stops):
        raise UserError(f"{path}: eos_token_id is {stop!r}; expected a token id or a list of them")
    return tuple(stops)
