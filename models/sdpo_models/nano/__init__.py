"""The embedded model: about a million parameters, pre-trained to write calls of many tool APIs.

`config.json`, `tokenizer.json` and `model.safetensors` in this folder are in Hugging Face layout (a
small `qwen3`). `make.py` makes config and tokenizer; `configs/nano_pretrain.toml` trains the
weights.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""The folder of the embedded model's files."""
