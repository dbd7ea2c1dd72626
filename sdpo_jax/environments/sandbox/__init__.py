"""Runs programs that a model wrote, and returns what was seen: observations, never verdicts."""
