"""EasyDeL's SDPO and GRPO trainers at the shapes of `step.py`; `compare_trl.py --peer easydel`.

    PYTHONPATH=benchmarks VENV/bin/python benchmarks/peers/easydel_step.py --objective sdpo

VENV holds easydel, and pillow and torch, which it imports without saying so. It runs as released,
but in float32, without its paged engine, which is several times slower on a CPU, and with beta 0.
Its SDPO compares sampled tokens only, not the vocabulary, and its teacher is the student itself,
not an average: less work than the others do. A row in sixty ends early on a sampled stop token; the
padded work is the same.
"""

# pyright: basic, reportMissingImports=false

import argparse
import json
import os
import platform
import tempfile
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
    os.environ |= {
        "ENABLE_DISTRIBUTED_INIT": "0",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }

import easydel
import jax
import jax.numpy as jnp
from datasets import Dataset
from flax import nnx
from transformers import GenerationConfig
from words import feedback, make_tokenizer, passes, questions


def make_model(s: Setting) -> Any:
    config = easydel.Qwen3Config(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        intermediate_size=s.mlp_width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = easydel.Qwen3ForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    # Models that were not loaded from a folder have none, and cannot generate without it.
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model


def checksum_reward(prompts: Any, completions: list[Any], **_: Any) -> list[float]:
    del prompts
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(passes(text)) for text in texts]


def make_trainer(s: Setting, options: argparse.Namespace, folder: str) -> Any:
    settings: dict[str, Any] = {
        "save_directory": folder,
        "total_batch_size": s.prompts,
        "num_return_sequences": s.rollouts,
        "max_prompt_length": s.prompt_tokens,
        "max_completion_length": s.response_tokens,
        "max_training_steps": options.warmup + options.steps,
        "num_train_epochs": options.warmup + options.steps,
        "learning_rate": 1e-5,
        "clip_grad": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "use_esurge_generation": False,
        "use_wandb": False,
        "do_last_save": False,
        "save_steps": None,
        "progress_bar_type": "json",
        "log_steps": 10**6,
        "report_steps": 10**6,
        "track_memory": False,
    }
    common: dict[str, Any] = {
        "model": make_model(s),
        "reward_funcs": checksum_reward,
        "train_dataset": Dataset.from_list([{"prompt": q} for q in questions(s)]),
        "processing_class": make_tokenizer(s),
    }
    if options.objective == "grpo":
        return easydel.GRPOTrainer(arguments=easydel.GRPOConfig(**settings), **common)
    shown = s.teacher_prompt_tokens - s.prompt_tokens
    arguments = easydel.SDPOConfig(
        **settings,
        max_feedback_length=shown,
        max_length=s.teacher_prompt_tokens + s.response_tokens,
    )
    given = feedback(s)
    return easydel.SDPOTrainer(
        arguments=arguments,
        feedback_func=lambda prompts, completions, rewards: [given] * len(completions),
        **common,
    )


def watch(trainer: Any) -> tuple[list[Spent], list[Spent]]:
    """What passes from the end of one step to the end of the next, and in generation."""
    steps, generation = [], []
    end, generate, last = trainer.on_step_end, trainer.generate_unified, [now()]

    def on_step_end(*arguments: Any, **more: Any) -> Any:
        out = jax.block_until_ready(end(*arguments, **more))
        steps.append(since(last[0]))
        last[0] = now()
        return out

    def generate_unified(*arguments: Any, **more: Any) -> Any:
        began = now()
        out = generate(*arguments, **more)
        jax.block_until_ready(out.sequences)
        generation.append(since(began))
        return out

    trainer.on_step_end, trainer.generate_unified = on_step_end, generate_unified
    return steps, generation


def run(options: argparse.Namespace) -> dict[str, Any]:
    s = setting_of(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(s, options, folder)
        steps, generation = watch(trainer)
        trainer.train()
    a, multiply = jnp.ones((MATMUL, MATMUL), jnp.float32), jax.jit(jnp.matmul)
    matmul = matmul_rate(lambda: multiply(a, a).block_until_ready())
    versions = {"easydel": version("easydel"), "jax": jax.__version__}
    extra = {"versions": {**versions, "python": platform.python_version()}}
    timed, generated = steps[options.warmup :], median(generation[options.warmup :])
    return step_record("easydel", options, timed, generated, matmul, extra)


def main() -> None:
    options = parse_flags(__doc__)
    record = run(options)
    print(json.dumps(record, indent=1))
    append(options.json, record)


if __name__ == "__main__":
    main()
