"""What one process of a run cannot grade counts as not graded in all of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import jax
process = int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, process)
from sdpo_jax.environments.base import Outcome, not_graded
from sdpo_jax.rollouts.episodes import agreed
rows = [Outcome(float(i), i == 2, f"row {i}", {}) for i in range(4)]
rows[process] = not_graded(f"process {process} has no sandbox")
print(json.dumps([[o.reward, o.passed, o.feedback, o.graded] for o in agreed(rows)]))
"""


@pytest.mark.slow
def test_rows_that_fail_in_one_process_are_not_graded_in_any_and_the_others_stay():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    first, second = (json.loads(text.splitlines()[-1]) for text in said)
    assert [row[3] for row in first] == [row[3] for row in second] == [False, False, True, True]
    assert first[2:] == second[2:] == [[2.0, True, "row 2", True], [3.0, False, "row 3", True]]
    elsewhere = "another process of the run could not grade it"
    assert [row[2] for row in first[:2]] == ["process 0 has no sandbox", elsewhere]
    assert [row[2] for row in second[:2]] == [elsewhere, "process 1 has no sandbox"]
