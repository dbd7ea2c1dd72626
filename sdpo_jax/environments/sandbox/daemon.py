"""The executor: a small process beside the trainer that starts boxes and collects observations.

It starts from source text in a bare interpreter with an empty environment, so it has neither the
trainer's memory nor its secrets. Descriptor 0 is a socket pair that carries frames in both
directions; when it closes, the executor and every box end.
"""

import itertools
import os
import queue
import select
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sdpo_jax.environments.sandbox import boxes, confine, frames

_STARTS = 3
"""Attempts to start a box before its tests count as not graded."""
_MARGIN_SECONDS = 30.0


def main() -> None:
    """Runs until the trainer closes the socket or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    confine.become_subreaper()
    hello = frames.read(0)
    if hello is not None:
        plan = boxes.Plan(**dict[str, Any](hello["plan"]))
        Executor(plan, hello["slots"]).serve(parent)
        # The slots' threads may be waiting for boxes; ending the boxes wakes them.
        boxes.close_all(plan)
    os._exit(0)


class Executor:
    """One thread per slot takes programs from a queue and sends their observations back."""

    def __init__(self, plan: boxes.Plan, slots: int):
        self._plan = plan
        self._work: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        uids = boxes.claim_uids(2 * slots)
        for pair in zip(uids[::2], uids[1::2], strict=True):
            slot = Slot(plan, pair)
            threading.Thread(target=self._serve_slot, args=(slot,), daemon=True).start()

    def serve(self, parent: int) -> None:
        """Queues programs until the stream ends or the trainer is gone."""
        while os.getppid() == parent:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            try:
                request = frames.read(0)
            except (OSError, frames.FrameError):
                return
            if request is None:
                return
            self._work.put(request)

    def _serve_slot(self, slot: "Slot") -> None:
        while True:
            try:
                request = self._work.get_nowait()
            except queue.Empty:
                slot.rest()
                request = self._work.get()
            try:
                seen = slot.observe(request, lambda: not self._work.empty())
            except Exception as error:
                # A bug here must not cost the slot: report it to the trainer and go on.
                seen = [_infrastructure(f"{type(error).__name__}: {error}")] * len(request["tests"])
            try:
                with self._sending:
                    frames.write_all(0, _frame(request, seen))
            except OSError:
                return


class Slot:
    """Runs one program at a time, each in a box of its own.

    While a program runs and others wait, the box before it is closed and the next one started. A
    box shares its uid with neither of its neighbours, since the end of a box ends all of its uid.
    """

    def __init__(self, plan: boxes.Plan, uids: Sequence[int]):
        self._plan, self._uids = plan, itertools.cycle(uids)
        self._used: boxes.Box | None = None
        self._ready: boxes.Box | None = None

    def observe(self, program: Mapping[str, Any], more: Callable[[], bool]) -> list[dict[str, Any]]:
        """The observation of each test; `more()` is whether another program waits."""
        limits = program["limits"]
        patience = 5 * limits["wall_seconds"] + _MARGIN_SECONDS
        seen: list[dict[str, Any]] = []
        box: boxes.Box | None = None
        try:
            for test in program["tests"]:
                if box is None:
                    box = self._open(program)
                box.begin(test, patience)
                self._turn(limits["file_mb"], more)
                answer = box.end()
                seen.append(answer or _ended(box))
                if not answer or not answer["clean"]:
                    # The box ended, or removing its files would take too long: take a new one.
                    box.close()
                    box = None
        except boxes.BoxError as error:
            rest = len(program["tests"]) - len(seen)
            seen += [_infrastructure(f"no box could be started: {error}")] * rest
        finally:
            if box is not None:
                self._leave(box)
        return seen

    def rest(self) -> None:
        """Ends every box, because no program waits."""
        self._close_used()
        if self._ready is not None:
            self._ready.close()
            self._ready = None

    def _leave(self, box: boxes.Box) -> None:
        """Ends a box whose tests are done; the slow part happens while the next box works."""
        self._close_used()
        box.process.kill()
        self._used = box

    def _close_used(self) -> None:
        if self._used is not None:
            self._used.close()
            self._used = None

    def _turn(self, file_mb: int, more: Callable[[], bool]) -> None:
        """Starts the next box and ends the previous ones while a program runs."""
        self._close_used()
        if self._ready is None and more():
            # A failed start is retried, and reported, when the box is needed.
            with suppress(OSError):
                self._ready = boxes.Box(self._plan, next(self._uids), file_mb)

    def _open(self, program: Mapping[str, Any]) -> boxes.Box:
        """A box that has the program; raises `BoxError` if none starts."""
        size, ready = program["limits"]["file_mb"], self._ready
        self._ready = None
        if ready is not None and ready.file_mb != size:
            ready.close()
        elif ready is not None:
            # A box that died while it waited is already closed; start another one.
            with suppress(boxes.BoxError):
                ready.take(program)
                return ready
        self._close_used()
        problem = ""
        for _ in range(_STARTS):
            try:
                box = boxes.Box(self._plan, next(self._uids), size)
                box.take(program)
                return box
            except (boxes.BoxError, OSError) as error:
                problem = str(error)
        raise boxes.BoxError(problem)


def _frame(request: Mapping[str, Any], seen: Sequence[dict[str, Any]]) -> bytes:
    """The answer to a request; without this, output that is too long in sum would cost the slot."""
    try:
        return frames.encode({"id": request["id"], "observations": seen})
    except frames.FrameError as error:
        over = {"status": "output_limit", "error": str(error)}
        return frames.encode({"id": request["id"], "observations": [over] * len(seen)})


def _ended(box: boxes.Box) -> dict[str, Any]:
    """A box ended, because of our time limit or because of the program."""
    if box.expired:
        return _infrastructure("the box gave no answer in time")
    return {"status": "died", "error": "the box ended before the test did"}


def _infrastructure(error: str) -> dict[str, Any]:
    return {"status": "infrastructure", "error": error}
