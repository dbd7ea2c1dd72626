"""Programs per second of the sandbox, and how it ends programs that hang.

    python benchmarks/sandbox.py                       # the tier that `auto` takes
    python benchmarks/sandbox.py --tier landlock --slots 2

prints one JSON line: programs per second with five tests each; seconds until 64 programs that hang
have ended, beside their CPU limits in waves of `slots`; processes left; growth of this process by a
program that prints 1 GB.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from sdpo_jax.environments.sandbox import Call, Limits, Program, Run, open_sandbox
from sdpo_jax.environments.sandbox.client import LocalSandbox
from sdpo_jax.environments.sandbox.processes import children

_SOURCE = """
from collections import Counter
def solve(words):
    counts = Counter(words)
    return sorted(counts, key=lambda word: (-counts[word], word))
"""
_FLOOD = "import os\nblock = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, block)"


def throughput(sandbox: LocalSandbox, programs: int = 60) -> float:
    """Programs per second, each with five tests that pass."""
    tests = tuple(Call("solve", (["b", "a", "b"] * n,)) for n in range(1, 6))
    sandbox.run([Program(_SOURCE, tests)] * sandbox.slots)
    began = time.perf_counter()
    seen = sandbox.run([Program(_SOURCE, tests)] * programs)
    seconds = time.perf_counter() - began
    if any(o.value != ["b", "a"] for observations in seen for o in observations):
        raise AssertionError("a program did not pass")
    return programs / seconds


def hanging(sandbox: LocalSandbox, programs: int = 64, cpu_seconds: float = 0.5) -> dict[str, Any]:
    """Seconds until all have ended, the seconds that their limits allow, processes left."""
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=20 * cpu_seconds)
    began = time.perf_counter()
    seen = sandbox.run([Program("while True: pass", (Run(""),), limits)] * programs)
    seconds = time.perf_counter() - began
    time.sleep(0.2)
    executor = sandbox.executor_pid
    return {
        "seconds": round(seconds, 2),
        "allowed": cpu_seconds * -(-programs // sandbox.slots),
        "ended_by_time": sum(o[0].status == "time_limit" for o in seen),
        "most_cpu_seconds": max(o[0].cpu_seconds for o in seen),
        "left": len(children(executor)) if executor else 0,
    }


def growth(sandbox: LocalSandbox) -> int:
    """Bytes by which this process grows while a program prints 1 GB."""
    before = _resident()
    (seen,) = sandbox.run([Program(_FLOOD, (Run(""),))])[0]
    if seen.status != "output_limit":
        raise AssertionError(f"the flood ended as {seen.status}")
    return _resident() - before


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--slots", type=int, default=0)
    options = parser.parse_args()
    sandbox = open_sandbox(options.tier, slots=options.slots)
    if not isinstance(sandbox, LocalSandbox):
        parser.error("the remote tier has no processes here to measure")
    print(sandbox.report)
    figures = {
        "tier": sandbox.tier,
        "slots": sandbox.slots,
        "programs_per_second": round(throughput(sandbox), 1),
        "hanging": hanging(sandbox),
        "growth_bytes": growth(sandbox),
    }
    print(json.dumps(figures))
    sandbox.close()


if __name__ == "__main__":
    main()
