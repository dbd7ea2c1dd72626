"""tunix's GRPO learner at the shapes of `step.py`; `compare_trl.py --peer tunix` runs it.

    PYTHONPATH=benchmarks VENV/bin/python benchmarks/peers/tunix_step.py --objective grpo

VENV holds google-tunix, which has no SDPO. It runs as it was released, with its own sampler and all
rows of the step in one pass; its cache is as long as the rows are, not the 1,024 of the default,
which would take three times as long.
"""

# pyright: basic, reportMissingImports=false

import argparse
import json
import logging
import platform
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from settings import (
    MATMUL,
    Setting,
    Spent,
    append,
    matmul_rate,
    median,
    now,
    parse_flags,
    pin,
    setting_of,
    since,
    step_record,
)

if __name__ == "__main__":
    pin(parse_flags(__doc__).threads)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


class WordTokenizer:
    """Each id is a word; the stop token lies outside the vocabulary and is never sampled."""

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word, 16) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"{i:05x}" for i in ids)

    def bos_id(self) -> int:
        return 0  # tunix takes 0 for none.

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return self._vocabulary


class WatchedPrompts:
    """The same prompts at each step; what passes from one request for them to the next."""

    def __init__(self, s: Setting, steps: int):
        ids = np.random.default_rng(0).integers(1, s.vocabulary, (s.prompts, s.prompt_tokens))
        tokenizer = WordTokenizer(s.vocabulary)
        self._prompts = [tokenizer.decode(row) for row in ids.tolist()]
        self._left = steps
        self._last: Spent | None = None
        self.steps: list[Spent] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._last is not None:
            self.steps.append(since(self._last))
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        self._last = now()
        return {"prompts": np.array(self._prompts)}


def checksum_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    del prompts
    return [float(zlib.crc32(text.encode()) % 2 == 0) for text in completions]


def make_model(s: Setting) -> Any:
    config = ModelConfig(
        num_layers=s.layers,
        vocab_size=s.vocabulary,
        embed_dim=s.width,
        hidden_dim=s.mlp_width,
        num_heads=s.heads,
        head_dim=s.head_size,
        num_kv_heads=s.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return Qwen3(config, rngs=nnx.Rngs(0))


def make_learner(s: Setting, options: argparse.Namespace, mesh: Any) -> Any:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10**9,
        max_steps=options.warmup + options.steps + 1,  # The request of the last ends the others.
        mini_batch_size=s.prompts,
        train_micro_batch_size=s.prompts,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=s.response_tokens,
        max_prompt_length=s.prompt_tokens,
        kv_cache_size=s.prompt_tokens + s.response_tokens,
        temperature=1.0,
    )
    cluster = rl_cluster.RLCluster(
        actor=make_model(s),
        tokenizer=WordTokenizer(s.vocabulary),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )
    config = GRPOConfig(num_generations=s.rollouts, num_iterations=1, beta=0.0, epsilon=0.2)
    return GRPOLearner(cluster, config, checksum_reward)


def watch_generation(cluster: Any) -> list[Spent]:
    """What each call of the cluster's `generate` takes; it returns host arrays."""
    generate, spent = cluster.generate, []

    def timed(*arguments: Any, **more: Any) -> Any:
        began = now()
        out = generate(*arguments, **more)
        spent.append(since(began))
        return out

    cluster.generate = timed
    return spent


def run(options: argparse.Namespace) -> dict[str, Any]:
    s = setting_of(options)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    prompts = WatchedPrompts(s, options.warmup + options.steps + 1)
    with mesh:
        learner = make_learner(s, options, mesh)
        generation = watch_generation(learner.rl_cluster)
        learner.train(prompts)
    a, multiply = jnp.ones((MATMUL, MATMUL), jnp.float32), jax.jit(jnp.matmul)
    matmul = matmul_rate(lambda: multiply(a, a).block_until_ready())
    versions = {"tunix": version("google-tunix"), "jax": jax.__version__}
    extra = {"versions": {**versions, "python": platform.python_version()}}
    steps, generated = prompts.steps[options.warmup :], median(generation[options.warmup :])
    return step_record("tunix", options, steps, generated, matmul, extra)


def main() -> None:
    options = parse_flags(__doc__)
    if options.objective != "grpo":
        raise SystemExit("tunix has no SDPO: expected --objective grpo")
    logging.disable(logging.WARNING)
    record = run(options)
    print(json.dumps(record, indent=1))
    append(options.json, record)


if __name__ == "__main__":
    main()
