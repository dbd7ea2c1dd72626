"""The child's side of grading in worker processes: builds the environment, then serves requests.

`workers.py` starts it with `python -m`. The first line on standard input holds the settings, each
further one a request; each gets one line as its reply on standard output. All lines are JSON.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_jax.environments.base import Environment, HasEpisodes, Prompt, Step
from sdpo_jax.environments.grading import Grader, OpenEpisodes
from sdpo_jax.environments.registry import build, settings_of
from sdpo_jax.environments.workers import fingerprint, prompts_by_id
from sdpo_jax.errors import UserError


def main() -> None:
    """Serves requests until standard input ends."""
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    # The environment may print: that must not end up between the replies.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    hello = json.loads(requests.readline())
    os.chdir(hello["folder"])

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        environment = build(settings_of(hello["settings"]))
        prompts = prompts_by_id(environment)
    except UserError as error:
        reply({"error": f"in a worker: {error}"})
        return
    reply({"prompts": fingerprint(environment)})
    _limit_memory(hello["memory_mb"])
    for line in requests:
        reply(_answer(environment, prompts, json.loads(line)))


def _answer(
    environment: Environment, prompts: Mapping[str, Prompt], request: Mapping[str, Any]
) -> dict[str, Any]:
    prompt = prompts[request["id"]]
    try:
        if "responses" in request and isinstance(environment, HasEpisodes):
            episode = OpenEpisodes(environment, [prompt])
            (step,) = [episode([0], [text], [False])[0] for text in request["responses"]][-1:]
        else:
            response, truncated = request["response"], request["truncated"]
            (outcome,) = Grader(environment)([prompt], [response], [truncated])
            step = Step(None, outcome)
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            os._exit(1)
        return {"error": str(error)}
    outcome = step.outcome
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    reward, passed = float(outcome.reward), bool(outcome.passed)
    return {
        "outcome": [reward, passed, outcome.feedback, metrics, bool(outcome.graded)],
        "said": [step.observation, step.instruction],
    }


def _limit_memory(megabytes: int) -> None:
    """Bounds the memory that grading may allocate on top of the built environment."""
    if sys.platform != "linux":
        return
    import resource

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = int(fields["VmData"].split()[0]) << 10
    limit, hard = held + (megabytes << 20), resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    # The hard limit too: otherwise the environment's code could raise it again.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _leave_with_parent(parent: int) -> None:
    """Ends the worker if its trainer is killed: a busy worker does not notice closed pipes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
