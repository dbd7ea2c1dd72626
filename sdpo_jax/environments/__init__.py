"""Environments: prompts and graders that return a reward and feedback in words."""
