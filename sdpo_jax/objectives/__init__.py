"""The objectives: `sdpo`, `grpo`, `sdft` and `sft`, one file each."""
