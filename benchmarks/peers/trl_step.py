"""TRL's SDPO and GRPO trainers at the shapes of `step.py`; `compare_trl.py` runs it.

    PYTHONPATH=benchmarks VENV/bin/python benchmarks/peers/trl_step.py --setting A --objective sdpo

VENV holds torch, trl and datasets. TRL runs as it was released: float32, all rows of the step in
one pass, no gradient checkpointing. Its tokenizer has a word for each id, so that a response
takes as many tokens in the teacher's prompt as when it was sampled, and that prompt as many
as in `step.py`. Feedback is a column of the data set, as TRL wants it.
"""

# pyright: basic, reportMissingImports=false

import argparse
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from settings import (
    MATMUL,
    TEMPLATE_TOKENS,
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
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }

import torch
import transformers
import trl
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from words import feedback, make_tokenizer, passes, questions


def make_model(s: Setting, folder: str, tokenizer: Any) -> str:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_size,
        intermediate_size=s.mlp_width,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(s: Setting, hard: int) -> Any:
    """As many prompts as a step has."""
    rows = [
        {"prompt": question, "privileged_context": feedback(s), "hard": i < hard}
        for i, question in enumerate(questions(s))
    ]
    return Dataset.from_list(rows)


def checksum_reward(completions: list[Any], hard: list[bool], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(passes(text) and not h) for text, h in zip(texts, hard, strict=True)]


class Watch(TrainerCallback):
    """What passes from the end of one step to the end of the next, and in generation."""

    def __init__(self) -> None:
        self.steps: list[Spent] = []
        self.generation: list[Spent] = []
        self._last = now()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.steps.append(since(self._last))
        self._last = now()

    def generating(self, generate: Any) -> Any:
        def timed(*arguments: Any, **more: Any) -> Any:
            began = now()
            out = generate(*arguments, **more)
            self.generation.append(since(began))
            return out

        return timed


def common_settings(s: Setting, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": str(Path(folder) / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": options.warmup + options.steps,
        "per_device_train_batch_size": s.rows,
        "num_generations": s.rollouts,
        "max_completion_length": s.response_tokens,
        "generation_kwargs": {"min_new_tokens": s.response_tokens},
        "temperature": 1.0,
        "beta": 0.0,
    }


def sdpo_settings(s: Setting) -> dict[str, Any]:
    """Full-vocabulary JSD and an EMA teacher; the template's words make up its 90 tokens."""
    return {
        "distillation_mode": "full_logits",
        "distillation_alpha": 0.5,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.05,
        "include_environment_feedback": True,
        "environment_feedback_only_without_solution": True,
        "max_prompt_length": s.prompt_tokens,
        "max_reprompt_len": 2 * s.teacher_prompt_tokens,
        "reprompt_template": "{prompt} {solution}{feedback}",
        "solution_template": "{successful_previous_attempt}" + " word" * TEMPLATE_TOKENS,
        "feedback_template": "{feedback_raw}",
    }


def make_trainer(s: Setting, options: argparse.Namespace, folder: str) -> Any:
    settings, tokenizer = common_settings(s, options, folder), make_tokenizer(s)
    sdpo = options.objective == "sdpo"
    if sdpo:
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        trainer, config = SDPOTrainer, SDPOConfig(**settings, **sdpo_settings(s))
    else:
        trainer, config = trl.GRPOTrainer, trl.GRPOConfig(**settings)
    return trainer(
        model=make_model(s, folder, tokenizer),
        reward_funcs=checksum_reward,
        args=config,
        train_dataset=make_data(s, s.hard_prompts if sdpo else 0),
        processing_class=tokenizer,
    )


def watch_shapes(trainer: Any) -> dict[str, list[int]]:
    """The widest batch of tokens that went through the model, with and without gradients."""
    seen: dict[str, list[int]] = {}

    def look(module: Any, arguments: Any, more: dict[str, Any]) -> None:
        tokens = more.get("input_ids", arguments[0] if arguments else None)
        name = "student" if torch.is_grad_enabled() else "without_gradients"
        if tokens is not None and tokens.numel() > torch.Size(seen.get(name, [0])).numel():
            seen[name] = list(tokens.shape)

    models = [trainer.model, getattr(trainer, "teacher_model", None)]
    for model in models:
        if model is not None:
            model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def run(options: argparse.Namespace) -> dict[str, Any]:
    s, watch = setting_of(options), Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(s, options, folder)
        seen = watch_shapes(trainer)
        trainer._generate = watch.generating(trainer._generate)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(watch)
        result = trainer.train()
    a = torch.ones(MATMUL, MATMUL)
    matmul = matmul_rate(lambda: a @ a)
    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    extra = {
        "model_inputs": seen,
        "loss": result.training_loss,
        "versions": {**versions, "python": platform.python_version()},
    }
    timed, generation = watch.steps[options.warmup :], median(watch.generation[options.warmup :])
    return step_record("trl", options, timed, generation, matmul, extra)


def main() -> None:
    options = parse_flags(__doc__)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    record = run(options)
    print(json.dumps(record, indent=1))
    append(options.json, record)


if __name__ == "__main__":
    main()
