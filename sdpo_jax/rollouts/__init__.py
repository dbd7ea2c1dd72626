"""Rollouts: sampling responses and episodes, and grading them into batches."""
