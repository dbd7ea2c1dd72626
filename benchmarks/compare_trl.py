"""Training steps of TRL, or of another peer, and ours at the same shapes, in turns.

    python benchmarks/compare_trl.py                              # TRL, settings A and B
    python benchmarks/compare_trl.py --peer tunix                 # which has GRPO only
    python benchmarks/compare_trl.py --python VENV/bin/python --rounds 5 --json compared.jsonl

Settings and objectives are those of `step.py`. Each run is a process of its own with one thread on
one core; the two take turns, so that a busy machine slows both alike. Figures are medians over the
rounds of each run's medians over steps; a ratio is ours over the peer's, its median over rounds.

Without `--python` the peer gets an environment from PyPI, once, under `~/.cache/sdpo-jax`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from settings import OBJECTIVES, SETTINGS, append

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Peer(NamedTuple):
    """How to run one, and what it can do."""

    name: str
    script: str
    packages: tuple[str, ...]
    objectives: tuple[str, ...]


PEERS = {
    "trl": Peer(
        "TRL",
        "trl_step.py",
        ("torch==2.13.0", "trl==1.16.0", "datasets", "psutil"),
        ("sdpo", "grpo"),
    ),
    "easydel": Peer(
        "EasyDeL",
        "easydel_step.py",
        ("easydel==0.3.0", "pillow", "torch==2.13.0"),
        ("sdpo", "grpo"),
    ),
    "tunix": Peer("tunix", "tunix_step.py", ("google-tunix==0.1.7",), ("grpo",)),
}
MEASURES = {
    "cpu_seconds": "CPU seconds a step",
    "wall_seconds": "wall seconds a step",
    "generated_per_cpu_second": "generated tokens per CPU second",
    "peak_rss_gigabytes": "peak RSS, GB",
    "matmul_gflops": "matmul, GFLOP per CPU second",
}
RECORDED = {
    ("A", "sdpo"): {"TRL 1.16": 6.13, "EasyDeL 0.3 (sampled token, live teacher)": 5.06},
    ("A", "grpo"): {"TRL 1.16": 4.70, "EasyDeL 0.3": 4.37, "tunix 0.1.7": 3.49},
    ("B", "sdpo"): {"TRL 1.16": 4.60, "EasyDeL 0.3 (sampled token, live teacher)": 3.39},
    ("B", "grpo"): {"tunix 0.1.7": 2.36},
}
"""CPU seconds a step, measured once by other drivers, where a core made 247 GFLOP/s of a 1024³
product in XLA: for orientation, not for a ratio."""


def peer_python(peer: str, given: str | None) -> str:
    """The Python of the peer's environment, which is made if there is none."""
    if given:
        return given
    folder = Path.home() / ".cache" / "sdpo-jax" / peer
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        print(f"installing {PEERS[peer].name} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer].packages], check=True)
        done.touch()
    return str(python)


def run_once(command: Sequence[str], python_path: Sequence[Path]) -> dict[str, Any]:
    """Runs a driver and reads its record."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.jsonl"
        done = subprocess.run(
            [*command, "--json", str(file)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{tail}")
        return json.loads(file.read_text())


def compare(
    peer: str, python: str, setting: str, objective: str, options: argparse.Namespace
) -> dict[str, Any]:
    """`rounds` runs of each, in turns."""
    flags = ["--setting", setting, "--objective", objective, "--steps", str(options.steps)]
    flags += ["--warmup", str(options.warmup), "--threads", "1"]
    theirs = [python, str(HERE / "peers" / PEERS[peer].script), *flags]
    ours = [sys.executable, str(HERE / "step.py"), *flags]
    runs: dict[str, list[dict[str, Any]]] = {peer: [], "sdpo-jax": []}
    for turn in range(options.rounds):
        runs[peer].append(run_once(theirs, [HERE]))
        runs["sdpo-jax"].append(run_once(ours, [HERE, ROOT, ROOT / "models"]))
        seconds = [f"{runs[name][-1]['cpu_seconds']:.2f}" for name in runs]
        print(f"  round {turn + 1}: {' and '.join(seconds)} CPU seconds a step", flush=True)
    return {"setting": setting, "objective": objective, "machine": platform.machine(), "runs": runs}


def medians(compared: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Of each measure: the peer's, ours, and ours over the peer's."""
    theirs, ours = compared["runs"].values()
    out: dict[str, tuple[float, float, float]] = {}
    for name in MEASURES:
        pairs = [(a[name], b[name]) for a, b in zip(theirs, ours, strict=True) if a[name]]
        if pairs:
            peer, own = (statistics.median(side) for side in zip(*pairs, strict=True))
            out[name] = (peer, own, statistics.median(b / a for a, b in pairs))
    return out


def show(peer: str, compared: Mapping[str, Any]) -> None:
    theirs = compared["runs"][peer][0]
    versions = ", ".join(f"{name} {version}" for name, version in theirs["versions"].items())
    print(f"setting {compared['setting']}, {compared['objective']}; {versions}")
    print(f"  {'':<34}{PEERS[peer].name:>10}{'ours':>10}{'ratio':>8}")
    for name, (a, b, ratio) in medians(compared).items():
        print(f"  {MEASURES[name]:<34}{a:>10.2f}{b:>10.2f}{ratio:>8.3f}")
    recorded = RECORDED.get((compared["setting"], compared["objective"]), {})
    if recorded:
        listed = "; ".join(f"{name} {seconds}" for name, seconds in recorded.items())
        print(f"  recorded elsewhere, CPU seconds a step, matmul 247: {listed}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", choices=PEERS, default="trl")
    parser.add_argument("--python", help="of an environment that has the peer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["A", "B"])
    parser.add_argument("--objectives", nargs="+", choices=("sdpo", "grpo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed ones of each run")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", help="a file to append one record for each comparison to")
    a = parser.parse_args()
    objectives = [o for o in PEERS[a.peer].objectives if o in (a.objectives or OBJECTIVES)]
    python = peer_python(a.peer, a.python)
    for setting in a.settings:
        for objective in objectives:
            compared = compare(a.peer, python, setting, objective, a)
            show(a.peer, compared)
            append(a.json, compared)


if __name__ == "__main__":
    main()
