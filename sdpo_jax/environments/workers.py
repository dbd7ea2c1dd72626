"""The trainer's side of grading in worker processes: a pool with deadlines and replacement.

A response that hangs or kills its grader costs one worker and does not stop the run. Each worker is
a new interpreter (`worker_process.py`), not a fork of the trainer, whose threads and devices a
child must not inherit. It builds the environment from the recipe's settings and grades in its main
thread, where alarms work. It gets only the environment variables that an interpreter needs, so no
access token reaches it. Requests and replies are lines of JSON, so nothing that a model wrote is
ever unpickled. A prompt is sent as its id, so its `data` need not be JSON; both sides compare a
hash of all prompts.

The trainer keeps an episode as the list of its responses. For each step a worker replays it from
the start, so any worker can take it over after another one was lost. Therefore the same responses
must always produce the same steps, and the deadline covers the whole replay.

A worker that misses the deadline is killed and replaced, and the response goes to another worker,
at most `RETRIES` times; after that it counts as not graded. The same holds for a worker that needs
more than `MEMORY_MB`: it exits at the first `MemoryError` that leaves the environment, since its
state can no longer be trusted. Such a response is not a wrong answer: the grader failed, and the
reward that the response deserves is unknown. An environment with `late`, which only evaluates what
the response says, blames the response instead: it gets that outcome at the first missed deadline,
or once three workers died.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_jax.environments.base import (
    Environment,
    HasAnswers,
    HasEpisodes,
    HasReferences,
    JudgesLate,
    Outcome,
    Prompt,
    Step,
    not_graded,
)
from sdpo_jax.environments.settings import WorkerConfig
from sdpo_jax.errors import UserError

RETRIES = 2
START_SECONDS = 300.0
"""Time for a worker to build its environment; a slower one counts as stuck."""
MEMORY_MB = 4096
"""Memory that grading may allocate on top of the built environment (heap and private mappings,
`RLIMIT_DATA`; enforced on Linux only): comparing two formulas can allocate without bound."""
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "VIRTUAL_ENV")
_LINE_LIMIT = 8 << 20


class Job(NamedTuple):
    """A response to grade; `lost` counts the workers that it has killed."""

    row: int
    request: Mapping[str, Any]
    lost: int = 0


class InWorkers:
    """An environment whose responses are graded in worker processes.

    Prompts and references come from `environment`, which this process built from the same settings.
    The workers start with this object and end with `close` or with this process.
    """

    def __init__(self, environment: Environment, settings: WorkerConfig, *, workers: int):
        """Starts the workers, which build their environments in the background.

        Args:
          environment: built from `settings`.
          settings: the recipe's `[environment]`, with the time limit for one response.
          workers: processes, at least 1.

        Raises:
          UserError: two prompts of the environment have one id.
        """
        self.train, self.held_out = environment.train, environment.held_out
        prompts_by_id(environment)
        hello = {
            "settings": dataclasses.asdict(settings),
            "folder": str(Path.cwd()),
            "memory_mb": MEMORY_MB,
        }
        late = environment.late if isinstance(environment, JudgesLate) else None
        self._pool = _Pool(
            hello, fingerprint(environment), workers, settings.deadline_seconds, late
        )
        self.close = weakref.finalize(self, self._pool.close)
        # Set only where the environment has them: callers test for the attribute.
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
          UserError: the environment raised, cannot be built in a worker, or has other prompts
            there.
        """
        requests = [
            {"id": prompt.id, "response": response, "truncated": bool(cut)}
            for prompt, response, cut in zip(prompts, responses, truncated, strict=True)
        ]
        return [step.outcome for step in self._pool.run(requests)]


class Replayed(NamedTuple):
    """An episode that a worker replays from its start at every step."""

    environment: InWorkers
    prompt: Prompt
    responses: list[str]

    def step(self, response: str) -> Step:
        """The next step."""
        return self.environment.step_many([self], [response], [False])[0]


class _Worker:
    """One worker process; `job` is its current job, which has to end by `deadline`."""

    def __init__(self, hello: Mapping[str, Any]):
        self.job: Job | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sdpo_jax.environments.worker_process"],
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
        """The next reply; None while its line is incomplete, `{}` if the process is gone."""
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
        """Kills the process and all processes that it started."""
        # Before `wait`, so that the id of the process group cannot have been reused.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._in, self.out):
            with contextlib.suppress(OSError):  # flushing to a dead process fails
                pipe.close()
        self._process.wait()

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # The process is gone, which the next read reports.
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()


class _Pool:
    """The workers and the loop that distributes jobs among them."""

    def __init__(
        self,
        hello: Mapping[str, Any],
        prompts: str,
        workers: int,
        seconds: float,
        late: Outcome | None,
    ):
        self._hello, self._prompts, self._seconds, self._late = hello, prompts, seconds, late
        self._workers = [_Worker(hello) for _ in range(workers)]
        self._dead_starts = 0

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Step]:
        """One step for each request, in order; of a single response only `outcome` counts."""
        outcomes: dict[int, Step] = {}
        waiting = deque(Job(row, request) for row, request in enumerate(requests))
        try:
            while len(outcomes) < len(requests):
                for worker in self._workers:
                    if waiting and worker.ready and worker.job is None:
                        worker.start(waiting.popleft(), self._seconds)
                self._wait(waiting, outcomes)
        except BaseException:
            # Otherwise the next call would read a late reply to this one as its own.
            self._workers = [self._replace(w) if w.job is not None else w for w in self._workers]
            raise
        return [outcomes[row] for row in range(len(requests))]

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.kill()

    def _wait(self, waiting: deque[Job], outcomes: dict[int, Step]) -> None:
        """Reads the replies that have arrived; replaces the workers that missed their deadline."""
        busy = [w for w in self._workers if w.job is not None or not w.ready]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        ready = connection.wait([worker.out.fileno() for worker in busy], max(0.0, left))
        heard = [worker for worker in busy if worker.out.fileno() in ready]
        for worker in heard:
            reply = worker.read()
            if reply == {}:
                died = "its worker died (a kill, or more memory than a worker may have)"
                self._lost(worker, died, waiting, outcomes)
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
        """Replaces a worker; its job is retried by another one or counts as not graded."""
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
        if self._late and (job.lost == RETRIES or time.monotonic() >= worker.deadline):
            outcomes[job.row] = Step(None, self._late)
        elif job.lost < RETRIES:
            waiting.append(job._replace(lost=job.lost + 1))
        else:
            outcomes[job.row] = Step(None, not_graded(f"{why}, {job.lost + 1} times"))

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        return _Worker(self._hello)


def clean_environment() -> dict[str, str]:
    """Environment variables of a worker: those that an interpreter needs, and CPU only for JAX."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}


def fingerprint(environment: Environment) -> str:
    """A hash of the ids and messages of all prompts; their `data` does not count."""
    digest = hashlib.blake2b(digest_size=8)
    for side in (environment.train, environment.held_out):
        for prompt in side:
            messages = [dict(message) for message in prompt.messages]
            digest.update(json.dumps([prompt.id, messages], sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def prompts_by_id(environment: Environment) -> dict[str, Prompt]:
    """All prompts of an environment by id.

    Raises:
      UserError: two prompts have the same id.
    """
    found: dict[str, Prompt] = {}
    for prompt in (*environment.train, *environment.held_out):
        if prompt.id in found:
            raise UserError(
                f"two prompts of the environment have the id {prompt.id!r}; expected each id once: "
                "a worker finds a prompt by its id"
            )
        found[prompt.id] = prompt
    return found
