"""The remote tier against a service that really runs the code."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sdpo_jax.environments.sandbox import Call, Check, Evaluate, Limits, Program, Run, open_sandbox
from sdpo_jax.environments.sandbox.client import LocalSandbox

ANSWER = Program("def f(): return 42", (Call("f"),))


def any_tier() -> str:
    return "bubblewrap" if shutil.which("bwrap") else "landlock"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    opened = open_sandbox(any_tier(), slots=2)
    assert isinstance(opened, LocalSandbox)
    yield opened
    opened.close()


class Service(BaseHTTPRequestHandler):
    """The `/run_code` form of SandboxFusion over a local sandbox that really runs the code."""

    local: LocalSandbox
    failures = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Service.failures > 0:
            Service.failures -= 1
            self.send_error(503)
            return
        # The service hands the record file back: the program reads it at its end and prints it.
        code = asked["code"]
        wrapped = (
            "import os, sys, base64, subprocess\n"
            f"open('main.py', 'w').write({code!r})\n"
            "ran = subprocess.run([sys.executable, 'main.py'], stdin=0, capture_output=True)\n"
            f"name = {asked['fetch_files'][0]!r}\n"
            "file = open(name, 'rb').read() if os.path.exists(name) else b''\n"
            "import json\n"
            "b = lambda d: base64.b64encode(d).decode()\n"
            "print(json.dumps([ran.returncode, b(ran.stdout), b(ran.stderr), b(file)]))\n"
        )
        limits = Limits(10.0, asked["run_timeout"], output_bytes=1 << 20)
        seen = self.local.run([Program(wrapped, (Run(asked["stdin"]),), limits)])[0][0]
        self._answer(seen)

    def _answer(self, seen: Any) -> None:
        result: dict[str, Any] = {"status": "TimeLimitExceeded", "execution_time": 1.0}
        result |= {"return_code": None, "stdout": "", "stderr": ""}
        files = {}
        if seen.status == "done":
            code, out, err, file = json.loads(seen.stdout)
            text = [base64.b64decode(part).decode("utf-8", "replace") for part in (out, err)]
            result |= {"status": "Finished", "return_code": code}
            result |= {"stdout": text[0], "stderr": text[1]}
            files = {"observation.txt": file} if file else {}
        status = "Success" if result["return_code"] == 0 else "Failed"
        body = {"status": status, "message": "", "run_result": result, "files": files}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture(scope="module")
def service(sandbox: LocalSandbox) -> Iterator[str]:
    Service.local = sandbox
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_remote_tier_observes_what_a_local_one_does(
    service: str, sandbox: LocalSandbox
) -> None:
    limits = Limits(cpu_seconds=1.0, wall_seconds=3.0, output_bytes=1000)
    programs = [
        Program(
            "def f(x): return (x, [1.5])\ndef g(): raise ValueError('no')\ndef h(): return {1}",
            (Call("f", ({"a": None},)), Call("g"), Call("h"), Evaluate("f(y)", "y = 'é'")),
            limits,
        ),
        Program("print(input()[::-1])", (Run("abc"),), limits),
        Program("def f(): return 1", (Check("assert f() == 1"), Check("assert f() == 2")), limits),
        Program("import sys; sys.exit(3)", (Run(""),), limits),
        Program("import os; os._exit(0)", (Run(""),), limits),
        Program("def f(:", (Call("f"),), limits),
        Program("while True: pass", (Run(""),), limits),
        Program("print('x' * 5000)", (Run(""),), limits),
    ]
    remote = open_sandbox("remote", slots=2, url=service)
    try:
        seen, expected = remote.run(programs), sandbox.run(programs)
    finally:
        remote.close()
    for ours, theirs in zip(seen, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            same = one._replace(cpu_seconds=0.0), other._replace(cpu_seconds=0.0)
            if other.status == "died" or other.status == "output_limit":
                same = (one.status, other.status)
            assert same[0] == same[1]


def test_the_remote_tier_tries_again_and_then_blames_the_service(service: str) -> None:
    remote = open_sandbox("remote", slots=1, url=service)
    try:
        Service.failures = 2
        assert remote.run([ANSWER])[0][0].value == 42
        Service.failures = 3
        seen = remote.run([ANSWER])[0][0]
        assert seen.status == "infrastructure" and "503" in seen.error
        assert Service.failures == 0
    finally:
        Service.failures = 0
        remote.close()
