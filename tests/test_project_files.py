"""The files around the code agree with pyproject.toml: hooks, workflow, lock, citation, forms."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = ROOT / "requirements-dev.lock"
LOCKED_EXTRAS = ("train", "test", "dev", "envs")
PYTHONS = ["3.11", "3.12", "3.13"]


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


def pinned(requirements):
    """Name to version, of the requirements that allow one version alone."""
    parsed = [Requirement(text) for text in requirements]
    return {r.name: str(r.specifier) for r in parsed if str(r.specifier).startswith("==")}


def test_pre_commit_runs_the_versions_that_pyproject_pins():
    hooks = [h for repo in read_yaml(".pre-commit-config.yaml")["repos"] for h in repo["hooks"]]
    expected = pinned(EXTRAS["dev"])
    assert set(expected) == {"pyright", "ruff"}
    used = {}
    for hook in hooks:
        versions = pinned(hook["additional_dependencies"])
        assert len(versions) == 1 and hook["entry"].split()[0] in versions
        assert versions.items() <= expected.items()
        used |= versions
    assert used == expected


def test_the_workflow_runs_what_developers_run():
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    (setup,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    # The last is the default, the oldest that the package supports.
    assert setup["with"]["python-version"].split()[-1] == PYTHONS[0]


def test_the_form_of_a_bug_report_asks_for_what_contributing_asks():
    form = read_yaml(".github/ISSUE_TEMPLATE/bug_report.yml")
    assert {"name", "description", "body"} <= form.keys()
    labels = " ".join(item["attributes"]["label"].lower() for item in form["body"])
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    (sentence,) = re.findall(r"A bug report needs [^.]*(?:\.toml[^.]*)?\.", text)
    for asked in ("command", "config.toml", "whole output", "pip list"):
        assert asked in sentence and asked in labels


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["title"] == PROJECT["name"] and citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] and citation["authors"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("2601.20802") and paper["authors"][0]["given-names"] == "Jonas"


def locked(python):
    """Name to version, as pip would install from the lock under a Python on Linux."""
    environment = dict(default_environment())
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"}
    versions = {}
    for line in LOCK.read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            versions[name] = specifier.version
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_pyproject_asks_for(python):
    versions = locked(python)
    asked = [*PROJECT["dependencies"], *(r for extra in LOCKED_EXTRAS for r in EXTRAS[extra])]
    for requirement in map(Requirement, asked):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, locked: {version}"


def test_the_lock_names_no_host():
    """It must install from whichever index or mirror pip is set up for."""
    lines = LOCK.read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-") or " @ " in line]


def test_the_classifiers_name_the_supported_pythons():
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert named == PYTHONS and PROJECT["requires-python"] == ">=3.11,<3.14"
