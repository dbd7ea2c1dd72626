"""From a recipe's `[data]` to demonstrations."""

import sys
from collections.abc import Sequence

from sdpo_jax.config import DataConfig
from sdpo_jax.data.jsonl import Demonstration, read_demonstrations
from sdpo_jax.data.tool_call_corpus import ToolCallCorpus


def load_demonstrations(config: DataConfig) -> Sequence[Demonstration]:
    """The generated corpus, or a JSONL file; rows that are skipped are named on standard error."""
    if config.source == "tool_call_corpus":
        return ToolCallCorpus()
    found = read_demonstrations(config.source, config.on_error)
    for problem in found.problems:
        print(f"skipped {problem}", file=sys.stderr)
    return found.rows
