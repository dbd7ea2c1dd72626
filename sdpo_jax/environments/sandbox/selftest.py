"""A few attacks that run once when a sandbox starts, to report what it really blocks."""

import os
import socket
import tempfile
from contextlib import suppress

from sdpo_jax.environments.sandbox import tiers
from sdpo_jax.environments.sandbox.protocol import Evaluate, Program, Report, Sandbox

_ATTACKS = {
    "files": "open({file!r}).read()",
    "writing": "open({file!r} + '.new', 'w').close()",
    "secrets": "secrets()",
    "network": "__import__('socket').create_connection(('127.0.0.1', {port}), 2).close()",
    "signals": "__import__('os').kill({pid}, 0)",
    "namespaces": "unshare()",
    "runner": "__import__('os').listdir('/proc/%d/fd' % __import__('os').getppid())",
}
_PROGRAM = """\
def unshare():
    import ctypes
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
        raise PermissionError
def secrets():
    import os
    found = b""
    for name in os.listdir("/proc"):
        try:
            found += open(f"/proc/{name}/environ", "rb").read()
        except OSError:
            pass
    if SECRET.encode() not in found:
        raise PermissionError
"""
_MARK = "SDPO_SANDBOX_SELF_TEST"


def examine(sandbox: Sandbox, interpreter: str, kernel: str) -> Report:
    """Runs the attacks; raises `tiers.TierError` if an honest program fails or an attack works.

    `unsafe-local` holds nothing and is not refused: the report lists what is open.
    """
    with tempfile.NamedTemporaryFile(prefix=_MARK) as file, socket.create_server(("", 0)) as server:
        os.chmod(file.name, 0o644)
        words = {"file": file.name, "port": server.getsockname()[1], "pid": os.getpid()}
        version = "__import__('sys').version.split()[0]"
        tests = [Evaluate(version)] + [Evaluate(a.format(**words)) for a in _ATTACKS.values()]
        source = f"SECRET = {_MARK!r}\n" + _PROGRAM
        os.environ[_MARK] = _MARK
        try:
            seen = sandbox.run([Program(source, tuple(tests))])[0]
        finally:
            os.environ.pop(_MARK, None)
        # The write may succeed in a file system of the box; only the file outside counts.
        written = os.path.exists(file.name + ".new")
        with suppress(OSError):
            os.unlink(file.name + ".new")
    if seen[0].status != "done":
        remedy = tiers.USER_NAMESPACES_REMEDY if sandbox.tier == "bubblewrap" else ""
        raise tiers.TierError(f"{seen[0].error or seen[0].status}; {remedy}".rstrip("; "))
    outcomes = {n: o.status == "done" for n, o in zip(_ATTACKS, seen[1:], strict=True)}
    outcomes["writing"] = written
    opened = tuple(name for name, worked in outcomes.items() if worked)
    held = tuple(name for name in _ATTACKS if name not in opened)
    if opened and sandbox.tier != "unsafe-local":
        raise tiers.TierError(f"a program got through: {', '.join(opened)}")
    return Report(sandbox.tier, interpreter, seen[0].value, kernel, held, opened)
