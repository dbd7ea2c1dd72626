"""From a recipe's `[data]` to demonstrations."""

import sys
from collections.abc import Sequence

from sdpo_jax.config import DataConfig
from sdpo_jax.data.jsonl import Demonstration, read_demonstrations
from sdpo_jax.data.tool_call_corpus import ToolCallCorpus
from sdpo_jax.environments.base import Environment, HasReferences
from sdpo_jax.errors import UserError


def load_demonstrations(config: DataConfig, environment: Environment) -> Sequence[Demonstration]:
    """The generated corpus, the environment's own answers, or a JSONL file.

    Rows of a file that are skipped are named on standard error.

    Raises:
      UserError: the environment knows no answers, or the file cannot be used.
    """
    if config.source == "tool_call_corpus":
        return ToolCallCorpus()
    if config.source == "tool_call_corpus_with_preamble":
        return ToolCallCorpus(preamble=True)
    if config.source == "environment":
        return _references(environment)
    found = read_demonstrations(config.source, config.on_error)
    for problem in found.problems:
        print(f"skipped {problem}", file=sys.stderr)
    return found.rows


def _references(environment: Environment) -> list[Demonstration]:
    if not isinstance(environment, HasReferences):
        raise UserError(
            'data.source = "environment" needs an environment that knows its answers, such as '
            'environment.kind = "tool_calls" or "bfcl"; expected a JSONL file or another one'
        )
    return [Demonstration(p.id, p.messages, environment.reference(p)) for p in environment.train]
