"""Sampling: prefill once per prompt, decode all rollouts in one compiled loop."""
