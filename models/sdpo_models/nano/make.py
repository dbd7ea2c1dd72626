"""Makes config and tokenizer of the embedded model; configs/nano_pretrain.toml makes the weights.

    python -m sdpo_models.nano.make [FOLDER]

The tokenizer is a byte-level BPE of 512 entries, trained on the pre-training text. Digits are
separate tokens. Training is deterministic: the same corpus rows give the same merges.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from sdpo_jax.data.tool_call_corpus import ToolCallCorpus
from sdpo_models.architecture import Architecture, to_hugging_face
from sdpo_models.checkpoint_files import write_json
from sdpo_models.nano import FOLDER

VOCABULARY = 512
CORPUS_ROWS = 20_000
CONTROL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ARCHITECTURE = Architecture(
    family="qwen3",
    vocabulary=VOCABULARY,
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=32,
    mlp_width=384,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    tied_head=True,
    query_key_norm=True,
)


def corpus_text(rows: int) -> Iterator[str]:
    """The training text of the tokenizer: questions, contexts and calls."""
    corpus = ToolCallCorpus(rows)
    for i in range(rows):
        demonstration = corpus[i]
        for message in demonstration.messages:
            yield message["content"]
        yield demonstration.response


def write_tokenizer(folder: Path) -> None:
    """Trains the BPE and writes tokenizer.json and the two JSON files that go with it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_text(CORPUS_ROWS), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 2048,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": 0})


def main() -> None:
    """Writes into the folder named on the command line, by default the package's own."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_json(folder / "config.json", to_hugging_face(ARCHITECTURE, end_token=0))


if __name__ == "__main__":
    main()
