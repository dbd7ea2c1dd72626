"""What the documents say is so: commands, examples, the tree and links.

`.ci/run` executes the shell blocks under `Run it`, `Test it` and `After a run`.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXECUTED = ("Run it", "Test it", "After a run")


def section(heading):
    """Text under a heading, up to the next one of any level."""
    text = README.read_text()
    assert text.count(f"\n## {heading}\n") == 1
    return re.split(r"\n#+ ", text.split(f"\n## {heading}\n")[1])[0]


def blocks(text, language):
    return [body for name, body in BLOCK.findall(text) if name == language]


def examples():
    for path in DOCUMENTS:
        for i, body in enumerate(blocks(path.read_text(), "python")):
            marks = [pytest.mark.slow] if "configs/" in body else []  # it trains
            yield pytest.param(body, id=f"{path.name}-{i}", marks=marks)


SHORT = """"train.steps": 1, "rollout.prompts_per_step": 2, "evaluation.prompts": 4"""


@pytest.mark.parametrize("heading", EXECUTED)
def test_a_heading_that_ci_executes_has_exactly_one_block(heading):
    (body,) = blocks(section(heading), "sh")
    script = (ROOT / ".ci" / "run").read_text()
    assert f'"{heading}"' in script
    assert subprocess.run(["bash", "-n"], input=body, text=True).returncode == 0


def test_every_other_shell_block_is_a_launch_script_that_runs_dry():
    text = README.read_text()
    executed = [body for heading in EXECUTED for body in blocks(section(heading), "sh")]
    others = [body for body in blocks(text, "sh") if body not in executed]
    assert others
    for body in others:
        lines = [line for line in body.splitlines() if line and not line.startswith("#")]
        assert all(re.match(r"export |launch/\w+\.sh |PROCESSES=\d+ launch/", x) for x in lines)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", body],
            cwd=ROOT,
            env=os.environ | {"DRY_RUN": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_readme_shows_the_loss_in_another_project():
    assert any("from sdpo_jax import sdpo_loss" in b for b in blocks(README.read_text(), "python"))


@pytest.mark.parametrize("body", list(examples()))
def test_examples_run(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    body = re.sub(r'"train.steps": \d+', SHORT, body)
    exec(compile(body, "example", "exec"), {"__name__": "example"})


def tree():
    """Paths of the README's tree: two spaces of indentation are one level."""
    (body,) = [b for b in blocks(README.read_text(), "text") if "sdpo_jax/" in b.split("\n")[0]]
    parents = []
    for line in body.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        yield "".join(parents)


@pytest.mark.parametrize("path", list(tree()))
def test_every_file_of_the_tree_exists(path):
    found = list(ROOT.glob(path))  # a line may name several files by a pattern
    assert found
    assert all(x.is_dir() if path.endswith("/") else x.is_file() for x in found)


def links():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" not in target and not target.startswith("#"):
                yield pytest.param(path.parent / target.split("#")[0], id=f"{path.name}-{target}")


@pytest.mark.parametrize("target", list(links()))
def test_relative_links_resolve(target):
    assert target.exists()
