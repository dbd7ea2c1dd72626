"""The teacher's pass alone: prompts that rollouts share run once, or once for each of them.

    python benchmarks/teacher.py --setting A
    python benchmarks/teacher.py --setting C --steps 3

Both forms take the same steps of the real `Trainer` in turn, in the setting of `step.py`. Work is
what the algorithm needs in each form (`settings.floor`); tokens are those that the pass computes.
"""

from typing import Any

from settings import parse_flags, pin, setting_of

if __name__ == "__main__":
    pin(parse_flags(__doc__).threads)  # Before jax reads the environment and counts cores.

from step import run


def measure(options: Any, share: str) -> dict[str, float]:
    """CPU seconds, GFLOP and rate of one form."""
    options.share_prompts = share
    record = run(options)
    needed = record["floor_shared" if share == "on" else "floor"]["teacher"] / 1e9
    seconds = record["phases"]["teacher"]["cpu"]
    return {
        "cpu_seconds": seconds,
        "gflop": needed,
        "gflop_per_cpu_second": needed / seconds,
        "distinct_prompts": record["distinct_teacher_prompts"],
        "prompt_tokens": record["teacher_prompt_tokens"],
    }


def main() -> None:
    """Prints both forms and their ratio."""
    options = parse_flags(__doc__)
    options.objective = "sdpo"
    found = {name: measure(options, share) for name, share in (("alone", "off"), ("shared", "on"))}
    rows = setting_of(options).rows
    print(
        f"setting {options.setting}: {rows} rollouts, {found['shared']['distinct_prompts']} prompts"
    )
    print(f"{'':<24}{'alone':>9}{'shared':>9}{'ratio':>9}")
    for name in ("cpu_seconds", "gflop", "gflop_per_cpu_second"):
        alone, shared = found["alone"][name], found["shared"][name]
        print(f"{name:<24}{alone:>9.2f}{shared:>9.2f}{shared / alone:>9.2f}")


if __name__ == "__main__":
    main()
