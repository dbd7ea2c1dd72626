"""Builds the tokenizer of a GGUF file: byte-level BPE from its fields, without PyTorch.

A GGUF file holds the tokens, the merges, and the name of a pre-tokenizer, which splits text into
words before merging (`tokenizer.ggml.pre`). The pre-tokenizers here are those of the models' own
`tokenizer.json`. One difference from `AutoTokenizer.from_pretrained(gguf_file=...)` of transformers
5.23 is intended: it has no `smollm` and splits as GPT-2 does, so that spaces before a digit get
other ids than in SmolLM2's training.
"""

from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sdpo_jax.errors import UserError
from sdpo_models.gguf.file import GgufFile

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""The values of `tokenizer.ggml.token_type` that are used here."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

END_OF_TURN = (
    *("<|im_end|>", "<|endoftext|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>"),
)
"""Control tokens that end an answer if the vocabulary has them, as in llama.cpp."""


class PreTokenizer(NamedTuple):
    """How a family splits text before merging."""

    pre_tokenizer: Any
    nfc: bool = False
    """Whether text is normalized to composed characters (NFC) first."""
    ignore_merges: bool = False
    """Whether a word that is a token stays whole, whatever the merges give."""


def _at(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_LLAMA3 = PreTokenizer(_at(LLAMA3_PATTERN), ignore_merges=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_GPT2),
    "smollm": PreTokenizer(pre_tokenizers.Sequence([_DIGITS, _GPT2])),
    "qwen2": PreTokenizer(_at(QWEN2_PATTERN), nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""`tokenizer.ggml.pre` to pre-tokenizer."""


def build_tokenizer(file: GgufFile) -> Any:
    """Builds a `transformers.PreTrainedTokenizerFast` with special tokens and chat template.

    Raises:
      UserError: another kind of tokenizer, an unknown pre-tokenizer, or inconsistent fields.
    """
    from transformers import PreTrainedTokenizerFast

    (tokens, _), special = _vocabulary(file), special_ids(file)
    template = file.fields.get("tokenizer.chat_template")
    architecture = file.fields.get("general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(file),
        model_max_length=file.fields.get(f"{architecture}.context_length", 2048),
        clean_up_tokenization_spaces=False,
        chat_template=template if isinstance(template, str) else None,
        **{f"{name}_token": tokens[special[name]] for name in _NAMED_TOKENS if name in special},
    )


_NAMED_TOKENS = ("bos", "eos", "unk", "pad")
_SPECIAL = (*_NAMED_TOKENS, "eot", "eom")
_SPELLED_OUT = {"unk": "unknown", "pad": "padding"}
"""Where GGUF's fields do not use transformers' abbreviation."""


def special_ids(file: GgufFile) -> dict[str, int]:
    """The ids of the special tokens that the file names: bos, eos, unk, pad, eot, eom."""
    count = len(_vocabulary(file)[0])
    fields = {n: f"tokenizer.ggml.{_SPELLED_OUT.get(n, n)}_token_id" for n in _SPECIAL}
    found = {name: file.fields[field] for name, field in fields.items() if field in file.fields}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value < count:
            raise UserError(
                f"{file.path}: {fields[name]} is {value!r}; "
                f"expected the id of one of {count} tokens"
            )
    return found


def stop_ids(file: GgufFile) -> list[int]:
    """Every id that ends an answer; the file's end of sequence comes first.

    A file names one end of sequence, often that of a text and not of a turn. A model that ends its
    turns with another token would then never stop, so control tokens that are known to end turns
    are stop ids, too.
    """
    special = special_ids(file)
    stops = [special[name] for name in ("eos", "eot", "eom") if name in special]
    rows = enumerate(zip(*_vocabulary(file), strict=True))
    control = {token: i for i, (token, kind) in rows if kind == CONTROL}
    stops += [control[token] for token in END_OF_TURN if token in control]
    if not stops:
        raise UserError(f"{file.path}: no field names the end of a sequence (eos_token_id)")
    return list(dict.fromkeys(stops))


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types by id, without the unused rows at the end that pad the embedding."""
    kind = file.fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE); "
            "use the model's folder in Hugging Face layout"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.fields.get("tokenizer.ggml.token_type")
    # Without types, control tokens in a text would be split.
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(
            f"{file.path}: field tokenizer.ggml.token_type is missing or of another length than "
            "tokenizer.ggml.tokens; use the model's folder in Hugging Face layout"
        )
    end = len(tokens)
    while end and types[end - 1] == UNUSED:
        end -= 1
    return tokens[:end], types[:end]


def _strings(file: GgufFile, name: str) -> list[str]:
    value = file.fields.get(name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise UserError(f"{file.path}: field {name} is missing; expected a list of strings")
    return value


def _backend(file: GgufFile) -> Tokenizer:
    split, (tokens, types) = _pre_tokenizer(file), _vocabulary(file)
    pairs = (m.partition(" ") for m in _strings(file, "tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in pairs]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise UserError(f"{file.path}: token {twice!r} stands twice in tokenizer.ggml.tokens")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges)
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit ({error})") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = split.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    bos = special_ids(file).get("bos")
    # Makes `add_special_tokens=True` add bos; rendered prompts get bos from the chat template.
    if file.fields.get("tokenizer.ggml.add_bos_token") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return backend


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.fields.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}, which is not known here; expected one "
            f"of {', '.join(PRE_TOKENIZERS)}. Text that is split otherwise gets other ids than "
            "in training; use the model's folder in Hugging Face layout"
        )
    return PRE_TOKENIZERS[name]
