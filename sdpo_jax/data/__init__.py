"""Demonstrations from JSONL, prompts in a resumable order, ragged rows in fixed shapes."""
