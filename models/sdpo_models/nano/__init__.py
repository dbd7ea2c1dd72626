"""The embedded model: about a million parameters that learned to write tool calls under many APIs.

`config.json`, `tokenizer.json` and `model.safetensors` in this folder are in Hugging Face layout (a
small `qwen3`). How they are made: `make.py` for config and tokenizer, `configs/nano_pretrain.toml`
for the weights.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the embedded model's files lie."""
