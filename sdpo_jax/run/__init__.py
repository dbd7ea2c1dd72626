"""The harness of a run: its loop, its folder, checkpoints, metrics and console."""
