"""A tokenizer with a chat template: implements `sdpo_jax.tokens.Tokenizer` with `transformers`.

A prompt is rendered once, and the response is the sequence of sampled ids; neither is ever
tokenized again, so the boundary between them is exact.

A control token is a token that was added to the learned vocabulary, marked as special in the files
(`<|im_end|>`) or not (`<think>`). Added white space and single characters that are not special
count as plain text, and so do tokens of the learned vocabulary that text can spell and that a file
merely names as padding or beginning (`!`). Foreign text (messages, feedback, program output) never
becomes a control token. Text of the model itself (a demonstration, an assistant's turn) may become
control tokens that are not special, as it does in sampling.

A response ends with any token that a file or the template names as an end, because files that were
copied from a base model name only the end of a text, and answers would then never end.
"""

import os
import re
import secrets
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sdpo_jax.errors import UserError
from sdpo_models.checkpoint_files import read_json

Messages = Sequence[Mapping[str, str]]
Thinking = Literal["template", "on", "off"]
"""The template option `enable_thinking`: left to its default, true, or false."""

# Some templates (Llama 3.2's) write today's date unless they get one. Prompts would then change
# daily, and no run could be repeated or resumed exactly. This date is their own default.
_TODAY = {"date_string": "26 Jul 2024"}


class ChatTokenizer:
    """Renders chats to ids, and decodes sampled ids to text."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] = (),
        thinking: Thinking = "template",
        where: str = "tokenizer",
    ):
        """Wraps a `transformers` tokenizer.

        `stop_ids` are those that files name. The tokenizer's own end of sequence and the token with
        which the template ends an assistant's turn are added.

        Raises:
          UserError: no chat template, no stop id, or `thinking` is set and the template ignores it.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"{where}: the tokenizer has no chat template; "
                "add `chat_template` to tokenizer_config.json"
            )
        # A template that does not read the setting would ignore it without notice.
        if thinking != "template" and "enable_thinking" not in str(tokenizer.chat_template):
            raise UserError(
                f"{where}: thinking = {thinking!r}, but the chat template reads no "
                "`enable_thinking`; expected 'template'"
            )
        self._tokenizer = tokenizer
        self._template_options = _TODAY | (
            {} if thinking == "template" else {"enable_thinking": thinking == "on"}
        )
        self._where = where
        # Not the number of tokens: ids may have gaps, and the largest id needs a row, too.
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        # `all_special_tokens` lacks the header tokens of Llama 3, declared in tokenizer.json only.
        added = tokenizer.added_tokens_decoder.items()
        control = {
            i: t.content
            for i, t in added
            if (t.special or len(t.content.strip()) > 1) and not (t.special and self._is_text(i, t))
        }
        special = {i for i, t in added if i in control and t.special}
        self.stop_ids: tuple[int, ...] = self._all_stops(stop_ids, control)
        self._hidden = special.union(self.stop_ids)
        self._control = _any_of(control.values())
        self._special = _any_of(t for i, t in control.items() if i in self._hidden)

    def _is_text(self, token: int, added: Any) -> bool:
        """Whether ordinary text is encoded with a token, perhaps within a word or a line."""
        if re.fullmatch(r"[<\[].+[>\]]", added.content, re.DOTALL):
            return False
        # A tokenizer of SentencePiece writes another token at the beginning of a text.
        return any(
            self._encode_whole(before + added.content, split_special_tokens=True)[-1:] == [token]
            for before in ("", "a", "\n")
        )

    def _all_stops(self, named: Sequence[int], control: Container[int]) -> tuple[int, ...]:
        """Every id that ends a response: those of the files, the tokenizer's, the template's.

        Raises:
          UserError: there is none.
        """
        stops = [*named, self._tokenizer.eos_token_id]
        with suppress(UserError):  # `render` reports a template that fails.
            before, after = self._around_turn()
            header = next((i for i in reversed(before) if i in control), None)
            end = next((i for i in after if self._tokenizer.decode([i]).strip()), -1)
            # After the last turn, some templates begin the next one, whatever they are asked for.
            stops += [end] if end in control and end != header else []
        found = tuple(dict.fromkeys(int(i) for i in stops if i is not None))
        if not found:
            raise UserError(
                f"{self._where}: the tokenizer has no eos_token, the chat template ends no turn, "
                "and no stop ids were given"
            )
        return found

    def _around_turn(self) -> tuple[list[int], list[int]]:
        """What the template writes before and after the content of an assistant's last turn."""
        marker = secrets.token_hex(16)
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
        before, shown, after = self._apply(chat, add_generation_prompt=False).rpartition(marker)
        return self._encode_whole(before), self._encode_whole(after) if shown else []

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, thinking: Thinking = "template"
    ) -> "ChatTokenizer":
        """Loads the tokenizer of a folder in Hugging Face layout, without network access.

        Raises:
          UserError: a file is missing or damaged, or the tokenizer cannot be used.
        """
        # Else the import of transformers prints that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer

        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: expected tokenizer.json there, found none; copy it from the model's "
                "folder, or write it with AutoTokenizer.from_pretrained(MODEL).save_pretrained"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # `tokenizers` raises nothing narrower
            for name in ("tokenizer.json", "tokenizer_config.json"):
                _read_object(folder / name)  # raises if this file is damaged
            raise UserError(
                f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); "
                "copy or download tokenizer.json and tokenizer_config.json again"
            ) from error
        return cls(tokenizer, stop_ids=_stop_ids(folder), thinking=thinking, where=str(folder))

    @cached_property
    def end_id(self) -> int:
        """The stop id that the template writes after an assistant's turn.

        The first id of `eos_token_id` may be the end of a text, which a chat model never writes. If
        the template writes no stop id there, this is the tokenizer's own end of sequence if that is
        a stop id, else the first stop id.
        """
        written = self._around_turn()[1]
        candidates = [*written, self._tokenizer.eos_token_id]
        return next((i for i in candidates if i in self.stop_ids), self.stop_ids[0])

    def check_vocabulary(self, rows: int) -> None:
        """Refuses an embedding with fewer rows than ids: an index out of range reads the last row.

        Raises:
          UserError: a token or a stop id has no row.
        """
        if self.vocabulary > rows:
            raise UserError(
                f"{self._where}: tokenizer.json has {self.vocabulary} ids, "
                f"model.embed_tokens.weight has {rows} rows (vocab_size in config.json); use the "
                "tokenizer that came with these weights, or resize the embedding"
            )
        beyond = [i for i in self.stop_ids if not 0 <= i < rows]
        if beyond:
            raise UserError(
                f"{self._where}: eos_token_id ends answers with id {beyond[0]}, which can never "
                f"be sampled: the embedding has {rows} rows; correct it in generation_config.json "
                "and in config.json"
            )

    def encode(self, text: str) -> list[int]:
        """Encodes foreign text; control tokens that it spells stay text."""
        return self._encode_split(text, self._control)

    def encode_response(self, text: str) -> list[int]:
        """Encodes a response as the model writes it: `<think>` is a token, `<|im_end|>` is text."""
        return self._encode_split(text, self._special)

    def _encode_split(self, text: str, tokens: re.Pattern[str]) -> list[int]:
        """Encodes text in pieces, split after the first character of each match of `tokens`."""
        pieces, start = list[str](), 0
        # Search on from the split, not from the match's end: matches may overlap.
        while match := tokens.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces.append(text[start:])
        # A special token of one character cannot be split above; this option splits it.
        return [i for piece in pieces for i in self._encode_whole(piece, split_special_tokens=True)]

    def _encode_whole(self, text: str, **options: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, **options))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text without special tokens and stop ids."""
        shown = [i for i in ids if i not in self._hidden]
        return self._tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def render(self, messages: Messages) -> list[int]:
        """Renders a chat to ids, ending with the header of the assistant's turn.

        Raises:
          UserError: the template is invalid, refuses the chat, or drops or rewrites a control
            token that a message spells.
        """
        # The template gets a marker for each control token and all other text unchanged, so that it
        # can trim it. Markers are random: a message that spelled one would forge a control token.
        marker, spelled = secrets.token_hex(16), list[str]()

        def mark(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"{marker}{len(spelled) - 1:06}"

        # Assistants' turns are the model's own text, and templates may look for `</think>` in them.
        tokens = {"assistant": self._special}
        marked = [
            {**m, "content": tokens.get(m["role"], self._control).sub(mark, m["content"])}
            for m in messages
        ]
        text = self._apply(marked, add_generation_prompt=True)
        pieces = re.split(rf"{marker}(\d{{6}})", text)  # template, mark, template, ..., template
        dropped = set(range(len(spelled))) - {int(i) for i in pieces[1::2]}
        if dropped:
            raise UserError(
                f"{self._where}: the chat template drops or rewrites the control token "
                f"{spelled[min(dropped)]!r} that a message spells; remove it from the message, or "
                "change the template"
            )
        ids = list[int]()
        for i, piece in enumerate(pieces):
            ids += self.encode(spelled[int(piece)]) if i % 2 else self._encode_whole(piece)
        return ids

    def _apply(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_options,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"{self._where}: the chat template cannot render a chat of {roles} "
                f"({type(error).__name__}: {error}); correct chat_template.jinja there, or "
                "chat_template in tokenizer_config.json where that is absent"
            ) from error


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(tokens), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def _stop_ids(folder: Path) -> list[int]:
    """Every `eos_token_id` of generation_config.json and of config.json."""
    found = list[int]()
    for name in ("generation_config.json", "config.json"):
        stop = _read_object(folder / name).get("eos_token_id")
        stops: list[Any] = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if any(type(i) is not int for i in stops):
            raise UserError(
                f"{folder / name}: eos_token_id is {stop!r}; expected a token id or a list of them"
            )
        found += stops
    return found


def folder_stop_ids(folder: Path) -> list[int]:
    """The stop ids of a model's folder: as in training, or without a chat those that files name."""
    if not (folder / "tokenizer.json").is_file():
        return list(dict.fromkeys(_stop_ids(folder)))
    try:
        return list(ChatTokenizer.from_pretrained(folder).stop_ids)
    except UserError:
        return list(dict.fromkeys(_stop_ids(folder)))
