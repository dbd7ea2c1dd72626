"""Test-time training on one hard question, and its baselines."""
