"""Loading holds little on the host beyond the parameters themselves; measured in new processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def measured(*words):
    """What tests/load_memory.py measures in a process of its own."""
    root = Path(__file__).parent.parent
    paths = [str(root), str(root / "models"), os.environ.get("PYTHONPATH", "")]
    out = subprocess.run(
        [sys.executable, str(root / "tests/load_memory.py"), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_proc
def test_loading_needs_little_host_memory_beyond_the_parameters():
    memory = measured("smollm2_135m", "30", "100")
    allowed = 1.3 * memory["largest_shard"]
    assert memory["beyond"] <= allowed < memory["held"] / 2, memory


@needs_proc
@pytest.mark.slow
def test_loading_layers_of_8b_needs_little_host_memory_beyond_the_parameters():
    """Four layers of the 36, in shards of a gigabyte, on two devices."""
    memory = measured("qwen3_8b", "4", "1000", "2")
    assert memory["beyond"] <= 0.7 * memory["largest_shard"], memory
