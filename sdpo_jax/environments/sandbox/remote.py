"""A sandbox behind HTTP: any service with the `/run_code` form of ByteDance's SandboxFusion.

Each test is one request, so that it starts in a fresh process; the isolation is the service's. The
program runs beside a small driver, which writes its record to a file that the request fetches.
Differences from a local box: the service measures wall-clock time, so `wall_seconds` ends a test,
and the limit on CPU time holds per process; `cpu_seconds` of an observation is the service's
execution time; memory is limited per process.
"""

import base64
import http.client
import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdpo_jax.environments.sandbox import boot
from sdpo_jax.environments.sandbox.client import observation, request
from sdpo_jax.environments.sandbox.protocol import Evaluate, Observation, Program, Report
from sdpo_jax.errors import UserError

_ATTEMPTS = 3
_FIRST_PAUSE_SECONDS = 0.5
_MARGIN_SECONDS = 30.0
_MAX_ANSWER = 16 * 1024 * 1024
_RECORD = "observation.txt"
_ENDED_BY_XCPU = (-24, 152)
_FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)
_DRIVER = """
def main():
    import json, math, os, resource, sys
    job = json.loads({job!r})
    limits = job["limits"]
    cpu = math.ceil(limits["cpu_seconds"])
    memory, file = limits["memory_mb"] << 20, limits["file_mb"] << 20
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    sys.path[:0] = job["paths"]
    record = os.open({record!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    last.run_test(job["source"], job["test"], limits["output_bytes"], record)
main()
"""


class RemoteSandbox:
    """Sends tests to a service, `slots` at a time; raises `UserError` if it does not answer."""

    tier = "remote"

    def __init__(self, url: str, slots: int, paths: Sequence[str] = ()):
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"sandbox: the remote tier has the address {url!r}; expected http(s)://HOST[:PORT] "
                "of a service with SandboxFusion's /run_code"
            )
        self._url = url.rstrip("/") + "/run_code"
        self._paths = list(paths)
        self._loader = boot.text(("values", "inside"), start=False)
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="sandbox")
        seen = self.run([Program("", (Evaluate("__import__('sys').version.split()[0]"),))])[0][0]
        if seen.status != "done":
            self.close()
            raise UserError(
                f"sandbox: {self._url} runs no program ({seen.error or seen.status}); start the "
                "service, or mend the address"
            )
        self.report = Report(self.tier, self._url, str(seen.value), "the service's", (), ())

    def run(self, programs: Sequence[Program]) -> list[list[Observation]]:
        """The observations of every test of every program, in order."""
        futures = [
            [self._pool.submit(self._observe, message, test) for test in message["tests"]]
            for message in map(request, programs)
        ]
        return [[future.result() for future in tests] for tests in futures]

    def close(self) -> None:
        """Stops sending and waits for the requests under way."""
        self._pool.shutdown(cancel_futures=True)

    def _observe(self, program: Mapping[str, Any], test: Mapping[str, Any]) -> Observation:
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                answer = self._post(self._body(program, test), program["limits"])
                if answer is None:
                    return Observation("output_limit", error="more output than allowed")
                if answer["status"] != "SandboxError":
                    return _read(answer, program["limits"], test["kind"] == "run")
                reason = str(answer.get("message", ""))
            except _FAILURES as error:
                # A network error or a malformed answer implies nothing about the program.
                reason = f"{type(error).__name__}: {error}"
        return Observation("infrastructure", error=f"{self._url}: {reason}"[:500])

    def _body(self, program: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
        source, limits = program["source"], program["limits"]
        job = {"source": source, "test": test, "limits": limits, "paths": self._paths}
        code = self._loader + _DRIVER.format(job=json.dumps(job), record=_RECORD)
        return {
            "code": code,
            "language": "python",
            "stdin": test["stdin"] if test["kind"] == "run" else "",
            "run_timeout": limits["wall_seconds"],
            "files": {},
            "fetch_files": [_RECORD],
        }

    def _post(self, body: dict[str, Any], limits: Mapping[str, Any]) -> dict[str, Any] | None:
        """The service's answer; None if it is longer than any valid answer."""
        message = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        patience = limits["wall_seconds"] + _MARGIN_SECONDS
        with urllib.request.urlopen(message, timeout=patience) as answer:
            data = answer.read(_MAX_ANSWER + 1)
        return None if len(data) > _MAX_ANSWER else json.loads(data)


def _read(answer: Mapping[str, Any], limits: Mapping[str, Any], script: bool) -> Observation:
    """An answer as an observation; raises `LookupError` and the like for another form."""
    result = answer["run_result"]
    limit = limits["output_bytes"]
    streams = {name: (result.get(name) or "").encode() for name in ("stdout", "stderr")}
    seen: dict[str, Any] = {
        n: data[:limit].decode("utf-8", "replace") for n, data in streams.items()
    }
    seen["cpu_seconds"] = float(result.get("execution_time") or 0)
    coded = (answer.get("files") or {}).get(_RECORD) or ""
    record = base64.b64decode(coded).decode("utf-8", "replace")
    status, _, rest = record.partition("\n")
    if result["status"] == "TimeLimitExceeded" or result["return_code"] in _ENDED_BY_XCPU:
        seen["status"] = "time_limit"
    elif any(len(data) > limit for data in streams.values()) or len(rest) > limit + 16_384:
        seen |= {"status": "output_limit", "error": "more output than allowed"}
    elif script and not record and result["return_code"] == 0:
        seen |= {"status": "done", "value": "null"}  # it left by `os._exit(0)`
    elif status not in ("done", "error", "memory_limit", "died"):
        code = result["return_code"]
        seen |= {"status": "died", "error": f"the process exited with code {code}, no result"}
    else:
        seen |= {"status": status, "value" if status == "done" else "error": rest}
    return observation(seen)
