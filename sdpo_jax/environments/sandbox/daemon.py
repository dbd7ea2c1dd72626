"""The executor: a small process beside the trainer that starts boxes and collects observations.

It is started from text in a bare interpreter with an empty environment, so it holds neither the
trainer's memory nor its secrets. Frames come in on descriptor 0 and go out on it too (a socket
pair); the end of that stream ends the executor and every box.
"""

import os
import queue
import select
import signal
import threading
from collections.abc import Mapping
from typing import Any

from sdpo_jax.environments.sandbox import boxes, confine, frames

_STARTS = 3
"""Times a box is started before its tests count as failures of ours."""
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
        # The slots' threads may wait for boxes: end them all, and the boxes with their pipes.
        boxes.close_all(plan)
    os._exit(0)


class Executor:
    """One thread per slot takes programs from a queue and sends their observations back."""

    def __init__(self, plan: boxes.Plan, slots: int):
        self._plan = plan
        self._work: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        for uid in boxes.claim_uids(slots):
            threading.Thread(target=self._slot, args=(uid,), daemon=True).start()

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

    def _slot(self, uid: int) -> None:
        while True:
            request = self._work.get()
            try:
                seen = self._observe(uid, request)
            except Exception as error:
                # A defect here must not cost the slot: the trainer hears of it and goes on.
                seen = [_infrastructure(f"{type(error).__name__}: {error}")] * len(request["tests"])
            try:
                with self._sending:
                    frames.write(0, {"id": request["id"], "observations": seen})
            except OSError:
                return

    def _observe(self, uid: int, program: Mapping[str, Any]) -> list[dict[str, Any]]:
        limits = program["limits"]
        patience = 5 * limits["wall_seconds"] + _MARGIN_SECONDS
        seen: list[dict[str, Any]] = []
        box: boxes.Box | None = None
        try:
            for test in program["tests"]:
                if box is None:
                    box = self._open(uid, program)
                answer = box.run(test, patience)
                seen.append(answer or _ended(box))
                if not answer or not answer["clean"]:
                    # The box ended, or the test left more than a sweep removes: take a new one.
                    box.close()
                    box = None
        except boxes.BoxError as error:
            rest = len(program["tests"]) - len(seen)
            seen += [_infrastructure(f"no box could be started: {error}")] * rest
        finally:
            if box is not None:
                box.close()
        return seen

    def _open(self, uid: int, program: Mapping[str, Any]) -> boxes.Box:
        for attempt in range(_STARTS):
            try:
                return boxes.Box(self._plan, uid, program)
            except (boxes.BoxError, OSError) as error:
                if attempt == _STARTS - 1:
                    raise boxes.BoxError(str(error)) from error
        raise AssertionError("unreachable")


def _ended(box: boxes.Box) -> dict[str, Any]:
    """A box that is gone: by our clock, or by what the program did to it."""
    if box.expired:
        return _infrastructure("the box gave no answer in time")
    return _blank("died", "the box ended before the test did")


def _infrastructure(error: str) -> dict[str, Any]:
    return _blank("infrastructure", error)


def _blank(status: str, error: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"status": status, "error": error, "stdout": "", "stderr": ""}
    return {**fields, "value": "null", "cpu_seconds": 0.0}
