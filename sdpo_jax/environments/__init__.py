"""Environments: prompts, graders that answer in words, the registry."""
