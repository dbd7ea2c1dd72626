"""Decoder-only transformers as pure functions, their weights and tokenizers."""
