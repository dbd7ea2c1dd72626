"""A Hugging Face tokenizer with a word for each id, questions in it, and a reward by checksum.

A sampled response takes as many tokens in a teacher's prompt as it did when it was sampled. The
stop token is also what pads; drivers keep it from being sampled.
"""

# pyright: basic, reportMissingImports=false

import random
import zlib
from typing import Any

from settings import Setting
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

CONTROL = ("<end>", "<user>", "<assistant>", "<foreign>")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HEADERS = 3
"""Control tokens that the template adds to one message."""


def word(i: int) -> str:
    return CONTROL[i] if i < len(CONTROL) else f"[{i:05x}]"


def make_tokenizer(s: Setting) -> Any:
    words = Tokenizer(WordLevel({word(i): i for i in range(s.vocabulary)}, unk_token="<foreign>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<end>",
        eos_token="<end>",
        unk_token="<foreign>",
        padding_side="left",
    )
    made.chat_template = CHAT
    return made


def questions(s: Setting) -> list[list[dict[str, str]]]:
    """As many chats as a step has prompts."""
    draw = random.Random(0)
    ids = range(len(CONTROL), s.vocabulary)
    texts = [
        " ".join(map(word, draw.choices(ids, k=s.prompt_tokens - HEADERS)))
        for _ in range(s.prompts)
    ]
    return [[{"role": "user", "content": text}] for text in texts]


def feedback(s: Setting) -> str:
    """As long as what else a teacher's prompt holds besides the question."""
    return " ".join(["word"] * (s.teacher_prompt_tokens - s.prompt_tokens))


def passes(response: str) -> bool:
    """About half of all texts."""
    return zlib.crc32(response.encode()) % 2 == 0
