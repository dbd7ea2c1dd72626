"""GGUF files: a reader, their weights and tokenizer, and conversion to Hugging Face layout."""
