"""One training step through the real `Trainer`: seconds by phase, and how far from the floor.

    python benchmarks/step.py --setting A --objective sdpo
    python benchmarks/step.py --setting B --objective grpo --json steps.jsonl

The model is random and shaped like Qwen 3; A: 8 prompts x 8 rollouts, vocabulary 4096, questions
and responses of 64 tokens; B: vocabulary 32768, 2 prompts; C: A with responses of 256. Every size
has a flag. SDPO is the full-vocabulary JSD with an EMA teacher. No token ends a response. About
half of them pass, by a checksum of their text, but none to one prompt in eight under `sdpo`: its
teacher sees feedback, that of the others a sibling's success.

With one thread, which is pinned to a core, CPU seconds are the work done, whoever else is using
the machine. The floor counts the matrix products that a step cannot do without (`settings.floor`);
its rate is set against that of a 1024³ product, measured by the same process.
"""

import argparse
import contextlib
import platform
import re
import statistics
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from settings import (
    MATMUL,
    TEMPLATE_TOKENS,
    Setting,
    Spent,
    append,
    floor,
    matmul_rate,
    now,
    parse_flags,
    pin,
    setting_of,
    since,
    step_record,
)

if __name__ == "__main__":
    pin(parse_flags(__doc__).threads)  # Before jax reads the environment and counts cores.

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.config import Config, OptimizerConfig, RolloutConfig, TeacherConfig, TrainConfig
from sdpo_jax.config import DataConfig as Data
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig, make_objective
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.run.recipes import default_config
from sdpo_jax.training.trainer import Trainer
from sdpo_models.architecture import Architecture
from sdpo_models.transformer import build_model

TEMPLATE_CHARACTERS = 57
"""Of header and closing line around a demonstration in a teacher's prompt."""
HEADERS = 3
"""Control tokens that `render` adds to one message."""
FEEDBACK_TEMPLATE_TOKENS = 112
"""What feedback, whose header is longer, has around it."""
OBJECTIVES = {"sdpo": SdpoConfig(), "grpo": GrpoConfig(), "sft": SftConfig()}


class WordTokenizer:
    """Each id is a word; foreign text takes so many ids that the template takes its 90."""

    END, ROLES = 0, {"system": 1, "user": 2, "assistant": 3}
    stop_ids = ()
    end_id = END

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.rendered: set[tuple[int, ...]] = set()

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [self.ROLES[message["role"]], *self.encode(message["content"]), self.END]
        ids.append(self.ROLES["assistant"])
        self.rendered.add(tuple(ids))
        return ids

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word, foreign in re.findall(r"\[([0-9a-f]{5})\]|([^\[]+|\[)", text):
            ids += [int(word, 16)] if word else self._foreign(foreign)
        return ids

    def _foreign(self, text: str) -> list[int]:
        count = round(len(text) * TEMPLATE_TOKENS / TEMPLATE_CHARACTERS)
        return [4 + zlib.crc32(f"{text}{i}".encode()) % (self.vocabulary - 4) for i in range(count)]

    encode_response = encode

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"[{i:05x}]" for i in ids)


class ChecksumEnvironment:
    """As many prompts as a step has, so that every step has the same ones."""

    held_out: Sequence[Prompt] = ()

    def __init__(self, s: Setting, tokenizer: WordTokenizer, hard: int):
        self._tokenizer = tokenizer
        self._feedback_tokens = max(
            1, s.teacher_prompt_tokens - s.prompt_tokens - FEEDBACK_TEMPLATE_TOKENS
        )
        self.train = [
            Prompt(
                f"prompt-{i}",
                ({"role": "user", "content": self._words(f"question {i}", s.prompt_tokens)},),
                {"hard": i < hard},
            )
            for i in range(s.prompts)
        ]

    def _words(self, seed: str, rendered: int) -> str:
        random = np.random.default_rng(zlib.crc32(seed.encode()))
        ids = random.integers(4, self._tokenizer.vocabulary, size=rendered - HEADERS)
        return self._tokenizer.decode(ids.tolist())

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        passed = zlib.crc32(response.encode()) % 2 == 0 and not prompt.data["hard"]
        feedback = "" if passed else self._words(response, self._feedback_tokens + HEADERS)
        return Outcome(float(passed), passed, feedback, {})

    def demonstrations(self, s: Setting) -> list[Demonstration]:
        """As many as a step has rows."""
        length = s.response_tokens - 1 + HEADERS  # The end token follows.
        return [
            Demonstration(
                f"row-{i}", self.train[i % s.prompts].messages, self._words(f"{i}", length)
            )
            for i in range(s.rows)
        ]


def make_config(s: Setting, options: argparse.Namespace) -> Config:
    return default_config(
        objective=OBJECTIVES[options.objective],
        rollout=RolloutConfig(
            prompts_per_step=s.prompts,
            rollouts_per_prompt=s.rollouts,
            max_prompt_tokens=s.prompt_tokens,
            max_response_tokens=s.response_tokens,
            slots=options.slots,
        ),
        teacher=TeacherConfig(max_prompt_tokens=2 * s.teacher_prompt_tokens),
        data=Data(rows_per_step=s.rows, max_tokens=s.prompt_tokens + s.response_tokens),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        train=TrainConfig(
            steps=options.warmup + options.steps,
            micro_batch_tokens=options.micro_batch_tokens,
            share_prompts=options.share_prompts,
        ),
    )


def make_architecture(s: Setting) -> Architecture:
    return Architecture(
        family="qwen3",
        vocabulary=s.vocabulary,
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_size=s.head_size,
        mlp_width=s.mlp_width,
        tied_head=True,
        query_key_norm=True,
    )


def watch_phases() -> dict[str, float]:
    """CPU seconds of each phase since the last `clear`, beside the wall seconds of the rows."""
    cpu: dict[str, float] = {}
    phase = PhaseTimer.phase

    @contextlib.contextmanager
    def watched(self: PhaseTimer, name: str) -> Iterator[None]:
        began = time.process_time()
        try:
            with phase(self, name):
                yield
        finally:
            cpu[name] = cpu.get(name, 0.0) + time.process_time() - began

    PhaseTimer.phase = watched
    return cpu


def xla_matmul_rate() -> float:
    a = jnp.ones((MATMUL, MATMUL), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return matmul_rate(lambda: multiply(a, a).block_until_ready())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns the record."""
    s = setting_of(options)
    tokenizer = WordTokenizer(s.vocabulary)
    hard = s.hard_prompts if options.objective == "sdpo" else 0
    environment = ChecksumEnvironment(s, tokenizer, hard)
    model, config = build_model(make_architecture(s)), make_config(s, options)
    demonstrations = environment.demonstrations(s)
    objective = make_objective(config.objective)
    trainer = Trainer(config, model, tokenizer, environment, demonstrations, objective=objective)
    state = trainer.initial_state(model.init(jax.random.key(0)))
    cpu, steps, rows = watch_phases(), [], []
    for step in range(options.warmup + options.steps):
        cpu.clear()
        tokenizer.rendered.clear()
        began = now()
        state, row = trainer.step(state, step)
        jax.block_until_ready(state)
        steps.append(since(began))
        longer = [len(ids) for ids in tokenizer.rendered if len(ids) > s.prompt_tokens]
        rows.append(row | {f"cpu_{k}": v for k, v in cpu.items()} | {"contexts": longer})
    return summary(options, steps, rows)


def summary(
    options: argparse.Namespace, steps: list[Spent], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    s, timed = setting_of(options), rows[options.warmup :]
    phases = [name.removeprefix("cpu_") for name in timed[-1] if name.startswith("cpu_")]
    spent = {
        name: Spent(
            *(statistics.median(r[f"{k}_{name}"] for r in timed) for k in ("seconds", "cpu"))
        )
        for name in phases
    }
    contexts = [n for row in timed for n in row["contexts"]]
    distinct = round(len(contexts) / len(timed))
    shared = floor(s, options.objective, distinct)
    extra = {
        "phases": {name: x._asdict() for name, x in spent.items()},
        "first_step_seconds": steps[0].wall,
        "distinct_teacher_prompts": distinct,
        "teacher_prompt_tokens": statistics.mean(contexts) if contexts else None,
        "floor": floor(s, options.objective),
        "floor_shared": shared,
        "loss": timed[-1]["loss"],
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    timed_steps, matmul = steps[options.warmup :], xla_matmul_rate()
    return step_record("sdpo-jax", options, timed_steps, spent.get("rollout"), matmul, extra)


def show(record: Mapping[str, Any]) -> None:
    cpu, matmul = record["cpu_seconds"], record["matmul_gflops"]
    print(f"setting {record['setting']}, {record['objective']}, {record['threads']} threads")
    print(f"{'seconds':<24}{'wall':>9}{'CPU':>9}")
    for name, spent in record["phases"].items():
        print(f"  {name:<22}{spent['wall']:>9.3f}{spent['cpu']:>9.3f}")
    print(f"  {'step':<22}{record['wall_seconds']:>9.3f}{cpu:>9.3f}")
    print(f"first step, compiling   {record['first_step_seconds']:>9.1f}")
    if record["generation_cpu_seconds"]:
        print(f"generated tokens per CPU second {record['generated_per_cpu_second']:.0f}")
    if record["distinct_teacher_prompts"]:
        count, tokens = record["distinct_teacher_prompts"], record["teacher_prompt_tokens"]
        print(f"teacher's prompts: {count} distinct, {tokens:.1f} tokens on average")
    print(f"peak RSS {record['peak_rss_gigabytes']:.2f} GB, loss {record['loss']:.4f}")
    print(f"matmul {matmul:.0f} GFLOP per CPU second")
    print(f"{'floor, GFLOP':<24}{'alone':>9}{'shared':>9}")
    for name, flops in record["floor"].items():
        print(f"  {name:<22}{flops / 1e9:>9.1f}{record['floor_shared'][name] / 1e9:>9.1f}")
    for name in ("floor", "floor_shared"):
        rate = record[name]["total"] / cpu / 1e9
        print(f"{name}: {rate:.1f} GFLOP per CPU second, {rate / matmul:.1%} of the matmul rate")


def main() -> None:
    options = parse_flags(__doc__)
    record = run(options)
    show(record)
    append(options.json, record)


if __name__ == "__main__":
    main()
