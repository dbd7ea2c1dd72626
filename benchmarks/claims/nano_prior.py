"""What the start model could do before training: read contexts, and predict its pre-training text.

    python benchmarks/claims/nano_prior.py nano runs/nano_sdft

The rows are from the pre-training corpus under a seed that pre-training did not see. Every row has
an API of its own, so that no row is a task of the environment. `solution` and `feedback` are the
shares of greedy answers whose last line is the wanted call when the prompt holds a solution, or
feedback; `context_loss` and `bare_loss` are nats per response token (the end token included) of
rows with and without a context. Rows without a context have the formats that were common in
pre-training, and training on another API replaces them: `bare_loss` rises in every model that
learned the task.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.api import load_components
from sdpo_jax.config import MeshConfig, ModelConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.tool_call_corpus import ToolCallCorpus
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.losses.likelihood import sft_loss
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.run.components import RunComponents
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.context import DEMONSTRATION_HEADER, FEEDBACK_HEADER

SEED, ROWS, MAX_TOKENS = 20_601, 256, 64


def rows_of_each_kind(count: int = ROWS) -> dict[str, list[Demonstration]]:
    """`count` unseen rows each: bare, with a solution, with feedback."""
    found: dict[str, list[Demonstration]] = {"bare": [], "solution": [], "feedback": []}
    corpus = ToolCallCorpus(seed=SEED)
    for row in map(corpus.__getitem__, range(len(corpus))):
        if all(len(rows) == count for rows in found.values()):
            return found
        text = row.messages[-1]["content"]
        solution, feedback = DEMONSTRATION_HEADER in text, FEEDBACK_HEADER in text
        kind = "solution" if solution else "feedback" if feedback else "bare"
        if not (solution and feedback) and len(found[kind]) < count:
            found[kind].append(row)
    raise ValueError(f"the corpus has fewer than {count} rows of a kind")


def measure(path: str) -> dict[str, float]:
    """The suite on `nano` or on the student of a run."""
    components = load_components(default_config(model=ModelConfig(path=path)))
    params, rows = components.params(), rows_of_each_kind()
    return {
        "solution": copied(components, params, rows["solution"]),
        "feedback": copied(components, params, rows["feedback"]),
        "context_loss": loss(components, params, rows["solution"] + rows["feedback"]),
        "bare_loss": loss(components, params, rows["bare"]),
    }


def copied(components: RunComponents, params: Any, rows: Sequence[Demonstration]) -> float:
    """Share of greedy answers whose last line is the row's response."""
    tokenizer = components.tokenizer
    sampler = Sampler(components.model, Devices(make_mesh(MeshConfig())), tokenizer.stop_ids)
    prompts = [tokenizer.render(row.messages) for row in rows]
    settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "seed": 0, "step": 0}
    answers = sampler(params, prompts, group=1, **settings).responses()
    texts = [tokenizer.decode(ids).strip().rpartition("\n")[2] for ids in answers]
    return float(np.mean([text == row.response for text, row in zip(texts, rows, strict=True)]))


def loss(
    components: RunComponents, params: Any, rows: Sequence[Demonstration], size: int = 64
) -> float:
    """Mean cross-entropy of the responses' tokens, nats."""
    tokenizer, total, weight = components.tokenizer, 0.0, 0.0
    pairs = [(tokenizer.render(r.messages), tokenizer.encode_response(r.response)) for r in rows]
    width, loss_of = max(len(x) + len(y) + 1 for x, y in pairs), _loss_of(components.model)
    for start in range(0, len(pairs), size):
        batch = np.zeros((3, size, width), np.int32)  # tokens, segments, mask
        for line, (prompt, response) in enumerate(pairs[start : start + size]):
            ids = [*prompt, *response, tokenizer.end_id]
            batch[0, line, : len(ids)], batch[1, line, : len(ids)] = ids, 1
            batch[2, line, len(prompt) : len(ids)] = 1
        got, count = loss_of(params, batch)
        total, weight = total + float(got), weight + float(count)
    return total / weight


def _loss_of(model: Any) -> Any:
    def function(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, segments, mask = batch
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = model.hidden(params, tokens, positions, segments)[:, :-1]
        output = sft_loss(hidden @ model.head(params), tokens[:, 1:], mask[:, 1:])
        return output.total, output.weight

    return jax.jit(function)


def main() -> None:
    """Prints the suite of each model as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="nano, or folders of runs")
    for path in parser.parse_args().models:
        print(path, json.dumps(measure(path)), flush=True)


if __name__ == "__main__":
    main()
