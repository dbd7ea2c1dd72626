"""Grading in worker processes: an answer that hangs or kills its grader costs one worker, no run.

Each worker is a new interpreter (no fork of the trainer, whose threads and devices a child must not
have). It builds the environment from the recipe's settings and grades in its main thread, where
alarms work. Its environment variables are a short list: no token of the trainer's reaches it.
Requests and answers are lines of JSON; nothing that came from a model is ever unpickled. A prompt
goes over as its id, so that its `data` need not be JSON; both sides check that they mean the same
prompts.

An episode lives in the trainer as the list of its responses. For the next step a worker plays it
from its start, so that any worker can, also after another one was lost: the same responses must
always get the same steps, and the deadline is for all of them.

A worker that does not answer in time is killed and replaced, and the response goes to another one,
`RETRIES` times; then it counts as not graded. So it is with one that wants more than `MEMORY_MB`:
it ends at the first `MemoryError` that leaves the environment, since what is left of it is not to
be trusted. That is no wrong answer: the grader failed, and what the response deserves is unknown.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_jax.environments.base import (
    Environment,
    HasAnswers,
    HasEpisodes,
    HasReferences,
    Outcome,
    Prompt,
    Step,
    not_graded,
)
from sdpo_jax.errors import UserError

RETRIES = 2
START_SECONDS = 300.0
"""Building an environment may read files and import much; after this it is stuck."""
MEMORY_MB = 4096
"""Data of a worker (heap and private maps, `RLIMIT_DATA`) beyond what it has once it has built the
environment: a formula can make a comparison allocate without end. Linux alone counts it so."""
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "VIRTUAL_ENV")
_MAIN = "from sdpo_jax.environments.workers import main; main()"
_LINE_LIMIT = 8 << 20


class Job(NamedTuple):
    """A response to grade, and how often a worker was lost to it."""

    row: int
    request: Mapping[str, Any]
    lost: int = 0


class InWorkers:
    """An environment whose responses are graded in worker processes.

    Prompts and references are those of `environment`, which this process built from the same
    settings. Workers start with the object; `close` ends them, and so does the end of the process.
    """

    def __init__(
        self, environment: Environment, settings: Any, *, workers: int, deadline_seconds: float
    ):
        """Starts the workers; they build their environments while the caller goes on.

        Args:
          environment: built from `settings`.
          settings: the recipe's `[environment]`, a dataclass.
          workers: processes, at least 1.
          deadline_seconds: wall-clock time for one response.

        Raises:
          UserError: two prompts of the environment have one id.
        """
        self.train, self.held_out = environment.train, environment.held_out
        _by_id(environment)
        hello = {
            "settings": dataclasses.asdict(settings),
            "folder": str(Path.cwd()),
            "memory_mb": MEMORY_MB,
        }
        self._pool = _Pool(hello, fingerprint(environment), workers, deadline_seconds)
        self.close = weakref.finalize(self, self._pool.close)
        # Only where there is one: whoever asks for one looks whether the method exists.
        if isinstance(environment, HasReferences):
            self.reference = environment.reference
        if isinstance(environment, HasAnswers):
            self.answer = environment.answer
        if isinstance(environment, HasEpisodes):
            self.reset, self.step_many = self._reset, self._step_many

    def _reset(self, prompt: Prompt) -> "Replayed":
        return Replayed(self, prompt, [])

    def _step_many(
        self, episodes: Sequence["Replayed"], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        del truncated
        for episode, response in zip(episodes, responses, strict=True):
            episode.responses.append(response)
        return self._pool.run(
            [{"id": episode.prompt.id, "responses": episode.responses} for episode in episodes]
        )

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Grades one response."""
        return self.grade_rows([prompt], [response], [False])[0]

    def grade_rows(
        self, prompts: Sequence[Prompt], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Outcome]:
        """One outcome for each row, in order.

        Raises:
          UserError: the environment raised, cannot be built in a worker, or is another one there.
        """
        requests = [
            {"id": prompt.id, "response": response, "truncated": bool(cut)}
            for prompt, response, cut in zip(prompts, responses, truncated, strict=True)
        ]
        return [step.outcome for step in self._pool.run(requests)]


class Replayed(NamedTuple):
    """An episode whose environment is in a worker."""

    environment: InWorkers
    prompt: Prompt
    responses: list[str]

    def step(self, response: str) -> Step:
        """The next step."""
        return self.environment.step_many([self], [response], [False])[0]


class _Worker:
    """One process; `job` is what it works on, until `deadline`."""

    def __init__(self, hello: Mapping[str, Any]):
        self.job: Job | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(),
            # A Ctrl-C is the trainer's: it stops after the step, and needs its workers until then.
            process_group=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self.out = self._process.stdin, self._process.stdout
        self._write(hello)

    def start(self, job: Job, seconds: float) -> None:
        """Hands a ready worker its next job."""
        self.job, self.deadline = job, time.monotonic() + seconds
        self._write(job.request)

    def read(self) -> dict[str, Any] | None:
        """The reply once its line is whole; `{}` if the process is gone."""
        chunk = os.read(self.out.fileno(), 1 << 16)
        self._buffer += chunk
        if not chunk or len(self._buffer) > _LINE_LIMIT:
            return {}
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and what it started."""
        # The group outlives its first process, and nobody else can have its id before the wait.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._in, self.out):
            with contextlib.suppress(OSError):  # what was buffered for a dead process
                pipe.close()
        self._process.wait()

    def _write(self, message: Mapping[str, Any]) -> None:
        try:
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()
        except OSError:  # It is gone: reading says so.
            pass


class _Pool:
    """Workers, and the one loop that feeds them."""

    def __init__(self, hello: Mapping[str, Any], prompts: str, workers: int, seconds: float):
        self._hello, self._prompts, self._seconds = hello, prompts, seconds
        self._workers = [_Worker(hello) for _ in range(workers)]
        self._dead_starts = 0

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Step]:
        """One step for each request, in order; of a response alone it is an outcome."""
        outcomes: dict[int, Step] = {}
        waiting = deque(Job(row, request) for row, request in enumerate(requests))
        try:
            while len(outcomes) < len(requests):
                for worker in self._workers:
                    if waiting and worker.ready and worker.job is None:
                        worker.start(waiting.popleft(), self._seconds)
                self._wait(waiting, outcomes)
        except BaseException:
            # A reply to this call must not be read as one to the next.
            self._workers = [self._replace(w) if w.job is not None else w for w in self._workers]
            raise
        return [outcomes[row] for row in range(len(requests))]

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.kill()

    def _wait(self, waiting: deque[Job], outcomes: dict[int, Step]) -> None:
        """Reads what has come, or gives up on who is late."""
        busy = [w for w in self._workers if w.job is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.out, selectors.EVENT_READ, worker)
            first = min(worker.deadline for worker in busy)
            events = selector.select(max(0.0, first - time.monotonic()))
        heard: list[_Worker] = [key.data for key, _ in events]
        for worker in heard:
            reply = worker.read()
            if reply == {}:
                self._lost(
                    worker,
                    "its worker died (a kill, or more memory than a worker may have)",
                    waiting,
                    outcomes,
                )
            elif reply is not None:
                self._reply(worker, reply, outcomes)
        for worker in busy:
            if worker not in heard and time.monotonic() >= worker.deadline:
                late = f"no answer of its worker within {self._seconds:g} s"
                self._lost(worker, late, waiting, outcomes)

    def _reply(self, worker: _Worker, reply: dict[str, Any], outcomes: dict[int, Step]) -> None:
        if "error" in reply:
            worker.job = None
            raise UserError(reply["error"])
        if worker.job is None:
            if reply["prompts"] != self._prompts:
                raise UserError(
                    "the environment has other prompts in a worker than here; expected the same "
                    "each time it is built: seed every generator, and sort what comes from a set"
                )
            worker.ready, self._dead_starts = True, 0
            return
        observation, instruction = reply["said"]
        outcomes[worker.job.row] = Step(observation, Outcome(*reply["outcome"]), instruction)
        worker.job = None

    def _lost(
        self, worker: _Worker, why: str, waiting: deque[Job], outcomes: dict[int, Step]
    ) -> None:
        """Replaces a worker; its job goes to another one or is given up."""
        job = worker.job
        if not worker.ready:
            self._dead_starts += 1
            if self._dead_starts > RETRIES:
                raise UserError(
                    "workers cannot start: the process that builds the environment ended, or took "
                    f"more than {START_SECONDS:g} s, {self._dead_starts} times in a row; "
                    "try `sdpo env check` with environment.workers = 0"
                )
        self._workers[self._workers.index(worker)] = self._replace(worker)
        if job is None:
            return
        if job.lost < RETRIES:
            waiting.append(job._replace(lost=job.lost + 1))
        else:
            outcomes[job.row] = Step(None, not_graded(f"{why}, {job.lost + 1} times"))

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        return _Worker(self._hello)


def clean_environment() -> dict[str, str]:
    """Variables of a worker: what an interpreter needs, and no accelerator."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}


def fingerprint(environment: Environment) -> str:
    """A hash of ids and messages of all prompts; `data` is the environment's own affair."""
    digest = hashlib.blake2b(digest_size=8)
    for side in (environment.train, environment.held_out):
        for prompt in side:
            messages = [dict(message) for message in prompt.messages]
            digest.update(json.dumps([prompt.id, messages], sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _by_id(environment: Environment) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in (*environment.train, *environment.held_out):
        if prompt.id in found:
            raise UserError(
                f"two prompts of the environment have the id {prompt.id!r}; expected each id once: "
                "a worker finds a prompt by its id"
            )
        found[prompt.id] = prompt
    return found


def main() -> None:
    """A worker: a line with the settings, then a line for each response."""
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    # What the environment prints must not get between the replies.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    hello = json.loads(requests.readline())
    os.chdir(hello["folder"])

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        environment, prompts = _build(hello["settings"])
    except UserError as error:
        reply({"error": f"in a worker: {error}"})
        return
    reply({"prompts": fingerprint(environment)})
    _limit_memory(hello["memory_mb"])
    for line in requests:
        reply(_answer(environment, prompts, json.loads(line)))


def _build(settings: dict[str, Any]) -> tuple[Environment, dict[str, Prompt]]:
    from sdpo_jax.environments.registry import build, settings_of

    environment = build(settings_of(settings))
    return environment, _by_id(environment)


def _answer(
    environment: Environment, prompts: Mapping[str, Prompt], request: Mapping[str, Any]
) -> dict[str, Any]:
    from sdpo_jax.environments.grading import Grader, OpenEpisodes

    prompt = prompts[request["id"]]
    try:
        if "responses" in request and isinstance(environment, HasEpisodes):
            episode = OpenEpisodes(environment, [prompt])
            (step,) = [episode([0], [text], [False])[0] for text in request["responses"]][-1:]
        else:
            (outcome,) = Grader(environment)(
                [prompt], [request["response"]], [request["truncated"]]
            )
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
    """Bounds what the grader may allocate on top of what the environment holds by now."""
    if sys.platform != "linux":
        return
    import resource

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = int(fields["VmData"].split()[0]) << 10
    limit, hard = held + (megabytes << 20), resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    # Soft is hard: the environment's code cannot raise it again.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _leave_with_parent(parent: int) -> None:
    """Ends a worker whose trainer was killed while the worker was busy."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
