"""What the benchmarks of whole training steps share: shapes, flags, FLOP floors, records.

Only the standard library: peers' drivers import it in environments of their own.

Dimension key: `P` prompts, `G` rollouts of each, `S` tokens of a question, `T` of a response, `C`
of a teacher's prompt.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

OBJECTIVES = ("sdpo", "grpo", "sft")
TEMPLATE_TOKENS = 90
"""What a teacher's prompt holds besides the question and the demonstration."""
MATMUL = 1024


@dataclass(frozen=True)
class Setting:
    """A random decoder shaped like Qwen 3, and one step's batch. Every response has full length."""

    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    mlp_width: int = 768
    vocabulary: int = 4096
    prompts: int = 8
    rollouts: int = 8
    prompt_tokens: int = 64
    response_tokens: int = 64

    @property
    def rows(self) -> int:
        return self.prompts * self.rollouts

    @property
    def teacher_prompt_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens + TEMPLATE_TOKENS

    @property
    def hard_prompts(self) -> int:
        """Prompts of a step whose responses all fail, so that their teacher sees feedback."""
        return self.prompts // 8


SETTINGS = {
    "A": Setting(),
    "B": Setting(vocabulary=32768, prompts=2),
    "C": Setting(response_tokens=256),
}


def parse_flags(documentation: str | None) -> argparse.Namespace:
    """The flags that every driver of a training step takes."""
    parser = argparse.ArgumentParser(description=(documentation or "").split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="A")
    parser.add_argument("--objective", choices=OBJECTIVES, default="sdpo")
    parser.add_argument("--threads", type=int, default=1, help="1 pins the process to one core")
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 2")
    parser.add_argument("--json", help="a file to append one record to")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="ours")
    parser.add_argument("--slots", type=int, default=0, help="rollouts decoded at a time; 0: all")
    parser.add_argument("--share-prompts", choices=("auto", "on", "off"), default="auto")
    for shape in fields(Setting):
        parser.add_argument(f"--{shape.name.replace('_', '-')}", type=int, help="instead")
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that the flags name, with the sizes that they override."""
    given = {f.name: getattr(options, f.name) for f in fields(Setting)}
    sizes = {name: value for name, value in given.items() if value is not None}
    return replace(SETTINGS[options.setting], **sizes)


def pin(threads: int) -> None:
    """Leaves the process `threads` of its cores; call it before an array library is imported."""
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    os.sched_setaffinity(0, cores[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads == 1:
        one = "--xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one}".strip()


class Spent(NamedTuple):
    """Seconds on the wall and of all threads of the process."""

    wall: float
    cpu: float


def now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def since(then: Spent) -> Spent:
    wall, cpu = now()
    return Spent(wall - then.wall, cpu - then.cpu)


def median(spent: Sequence[Spent]) -> Spent:
    return Spent(statistics.median(s.wall for s in spent), statistics.median(s.cpu for s in spent))


def matmul_rate(multiply: Callable[[], Any], repeats: int = 40) -> float:
    """GFLOP per CPU second of `multiply`, which makes one float32 product of 1024³ and waits."""
    multiply()
    times: list[Spent] = []
    for _ in range(repeats):
        began = now()
        multiply()
        times.append(since(began))
    return 2.0 * MATMUL**3 / median(times).cpu / 1e9


def floor(s: Setting, objective: str, distinct: int | None = None) -> dict[str, float]:
    """FLOPs of the matrix products that a step cannot do without, two for a multiply-add.

    Only real tokens and only keys that a query sees count; a backward pass is two forward passes.

    Args:
      s: the shapes.
      objective: `sdpo`, `grpo` or `sft`.
      distinct: None where each row runs through its prompt by itself. Otherwise a question runs
        once for its `G` rows, and this many teacher's prompts differ.
    """
    heads, kv_heads = s.heads * s.head_size, s.kv_heads * s.head_size
    matrices = 2 * s.width * (heads + kv_heads) + 3 * s.width * s.mlp_width

    def run(rows: int, tokens: int, before: int = 0) -> float:
        """A forward pass of `tokens` behind `before` others that are in the cache."""
        keys = tokens * before + tokens * (tokens + 1) / 2
        return s.layers * rows * (2.0 * tokens * matrices + 4.0 * keys * heads)

    questions = s.rows if distinct is None else s.prompts
    contexts = s.rows if distinct is None else distinct
    head = 2.0 * s.rows * s.response_tokens * s.width * s.vocabulary
    prefill = run(questions, s.prompt_tokens)
    responses = run(s.rows, s.response_tokens, s.prompt_tokens)
    teacher = run(contexts, s.teacher_prompt_tokens)
    teacher += run(s.rows, s.response_tokens, s.teacher_prompt_tokens)
    parts = {"student": 3 * (prefill + responses), "student_head": 3 * head}
    if objective != "sft":
        parts = {"prefill": prefill, "decode": responses + head, **parts}
    if objective == "sdpo":
        parts |= {"teacher": teacher, "teacher_head": head}
    return parts | {"total": sum(parts.values())}


def peak_rss_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step_record(
    implementation: str,
    options: argparse.Namespace,
    steps: Sequence[Spent],
    generation: Spent | None,
    matmul: float,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What every driver reports: medians over steps, and where the machine stood."""
    s, spent = setting_of(options), median(steps)
    tokens = s.rows * s.response_tokens
    return {
        "implementation": implementation,
        "setting": options.setting,
        "objective": options.objective,
        "threads": options.threads,
        "shapes": asdict(s),
        "steps": len(steps),
        "cpu_seconds": spent.cpu,
        "wall_seconds": spent.wall,
        "cpu_seconds_of_steps": [x.cpu for x in steps],
        "generation_cpu_seconds": generation.cpu if generation else None,
        "generated_per_cpu_second": tokens / generation.cpu if generation else None,
        "peak_rss_gigabytes": peak_rss_gigabytes(),
        "matmul_gflops": matmul,
        **extra,
    }


def append(path: str | None, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON."""
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
