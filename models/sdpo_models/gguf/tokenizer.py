"""Builds the tokenizer of a GGUF file: byte-level BPE from its fields, without PyTorch.

A GGUF file holds the tokens, the merges, and the name of a pre-tokenizer, which splits text into
words before merging (`tokenizer.ggml.pre`). The pre-tokenizers here are those of the models' own
`tokenizer.json`. One difference from `AutoTokenizer.from_pretrained(gguf_file=...)` of transformers
5.23 is intended: it has no `smollm` and splits as GPT-2 does, so that spaces before a digit get
other ids than in SmolLM2's training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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

    pre_tokenizer: Callable[[], Any]
    nfc: bool = False
    """Whether text is normalized to composed characters (NFC) first."""
    ignore_merges: bool = False
    """Whether a word that is a token stays whole, whatever the merges give."""


def _gpt2() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _at(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_LLAMA3 = PreTokenizer(_at(LLAMA3_PATTERN), ignore_merges=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_digits_then_gpt2),
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

    tokens = _tokens(file)
    named = {
        f"{name}_token": tokens[i] for name, i in special_ids(file).items() if name in _NAMED_TOKENS
    }
    template = file.fields.get("tokenizer.chat_template")
    templates = {"chat_template": template} if isinstance(template, str) else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(file, tokens),
        model_max_length=_context_length(file),
        clean_up_tokenization_spaces=False,
        **templates,
        **named,
    )


_NAMED_TOKENS = ("bos", "eos", "unk", "pad")
_SPECIAL = {
    **{"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"},
    **{"pad": "padding_token_id", "eot": "eot_token_id", "eom": "eom_token_id"},
}


def special_ids(file: GgufFile) -> dict[str, int]:
    """The ids of the special tokens that the file names: bos, eos, unk, pad, eot, eom."""
    count = len(_tokens(file))
    found: dict[str, int] = {}
    for name, field in _SPECIAL.items():
        value = file.fields.get(f"tokenizer.ggml.{field}")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < count:
            raise UserError(
                f"{file.path}: tokenizer.ggml.{field} is {value!r}; "
                f"expected the id of one of {count} tokens"
            )
        found[name] = value
    return found


def stop_ids(file: GgufFile) -> list[int]:
    """Every id that ends an answer; the file's end of sequence comes first.

    A file names one end of sequence, often that of a text and not of a turn. A model that ends its
    turns with another token would then never stop, so control tokens that are known to end turns
    are stop ids, too.
    """
    special = special_ids(file)
    stops = [special[name] for name in ("eos", "eot", "eom") if name in special]
    tokens = _tokens(file)
    types = _types(file)
    control = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    stops += [control[token] for token in END_OF_TURN if token in control]
    if not stops:
        raise UserError(f"{file.path}: no field names the end of a sequence (eos_token_id)")
    return list(dict.fromkeys(stops))


def _tokens(file: GgufFile) -> list[str]:
    """Tokens by id, without the unused rows at the end, which pad the embedding."""
    kind = file.fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' (byte-level BPE); "
            "use the model's folder in Hugging Face layout"
        )
    tokens, types = _strings(file, "tokenizer.ggml.tokens"), _types(file)
    end = len(tokens)
    while end and types[end - 1] == UNUSED:
        end -= 1
    return tokens[:end]


def _types(file: GgufFile) -> list[int]:
    """The type of each token; without types, control tokens in a text would be split."""
    types = file.fields.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(_strings(file, "tokenizer.ggml.tokens")):
        raise UserError(
            f"{file.path}: field tokenizer.ggml.token_type is missing or of another length than "
            "tokenizer.ggml.tokens; use the model's folder in Hugging Face layout"
        )
    return types


def _strings(file: GgufFile, name: str) -> list[str]:
    value = file.fields.get(name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise UserError(f"{file.path}: field {name} is missing; expected a list of strings")
    return value


def _backend(file: GgufFile, tokens: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    split = _pre_tokenizer(file)
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
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, _types(file), strict=False):  # types are longer by the padding
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == CONTROL)
            (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)([added])
    _begin_with_bos(file, backend, tokens)
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


def _begin_with_bos(file: GgufFile, backend: Any, tokens: list[str]) -> None:
    """Makes `add_special_tokens=True` add bos; rendered prompts get bos from the chat template."""
    from tokenizers import processors

    if file.fields.get("tokenizer.ggml.add_bos_token") and "bos" in special_ids(file):
        bos = special_ids(file)["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )


def _context_length(file: GgufFile) -> int:
    value = file.fields.get(f"{file.fields.get('general.architecture')}.context_length")
    return value if type(value) is int else 2048
