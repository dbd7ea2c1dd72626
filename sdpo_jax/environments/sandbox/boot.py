"""Starts modules of this package in a bare interpreter from their source text.

The package's parents import jax, and a box cannot read the package's folder. Therefore the few
modules are passed as text, or as code that the same interpreter compiled before, and empty packages
replace the parents.
"""

import base64
import inspect
import subprocess
from importlib import import_module

PACKAGE = "sdpo_jax.environments.sandbox"
RUNNER = ("frames", "values", "confine", "processes", "watch", "inside", "runner")
DAEMON = ("frames", "seccomp", "confine", "processes", "cgroups", "boxes", "daemon")
_LOADER = """\
import sys
sys.path[:] = [p for p in sys.path if p]
from types import ModuleType
def load(name, code):
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []
    exec(code, module.__dict__)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module
"""
_COMPILER = """\
import base64, marshal, sys
codes = [compile(text, name, "exec", dont_inherit=True) for name, text in eval(sys.stdin.read())]
sys.stdout.write(base64.b64encode(marshal.dumps(codes)).decode())
"""
_READER = """
import marshal, os
left, parts = {length}, []
while left:
    parts.append(os.read(0, left))
    left -= len(parts[-1]) or left
for name, code in zip({names!r}, marshal.loads(b"".join(parts))):
    last = load(name, code)
last.main()
"""


def text(modules: tuple[str, ...], *, start: bool = True) -> str:
    """A program that loads the modules, the last one as `last`, and if `start` calls its `main`."""
    lines = [f"last = load({name!r}, {source!r})" for name, source in _sources(modules)]
    return _LOADER + "\n".join([*lines, "last.main()" if start else "", ""])


def compiled(python: str, modules: tuple[str, ...]) -> tuple[str, str]:
    """A program for `python -c`, and in base64 what it reads first; saves a compilation per box.

    Raises `OSError` or `subprocess.SubprocessError` where the interpreter does not run.
    """
    sources = _sources(modules)
    code = subprocess.run(
        [python, "-I", "-S", "-B", "-c", _COMPILER],
        input=repr(sources).encode(),
        env={},
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    length, names = len(base64.b64decode(code)), [name for name, _ in sources]
    return _LOADER + _READER.format(length=length, names=names), code


def _sources(modules: tuple[str, ...]) -> list[tuple[str, str]]:
    parts = PACKAGE.split(".")
    found = [(".".join(parts[: i + 1]), "") for i in range(len(parts))]
    for name in modules:
        found.append((f"{PACKAGE}.{name}", inspect.getsource(import_module(f"{PACKAGE}.{name}"))))
    return found
