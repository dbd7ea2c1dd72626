"""The executor: a small process beside the trainer that starts boxes and collects observations.

It starts from source text in a bare interpreter with an empty environment, so it has neither the
trainer's memory nor its secrets. Descriptor 0 is a socket pair that carries frames in both
directions; when it closes, the executor and every box end.
"""

import os
import queue
import select
import signal
import threading
from collections.abc import Mapping, Sequence
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
        for uid in boxes.claim_uids(slots):
            slot = Slot(plan, uid)
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
                seen = slot.observe(request)
            except Exception as error:
                # A bug here must not cost the slot: report it to the trainer and go on.
                seen = [_infrastructure(f"{type(error).__name__}: {error}")] * len(request["tests"])
            try:
                with self._sending:
                    frames.write_all(0, _frame(request, seen))
            except OSError:
                return


class Slot:
    """Runs one program at a time, in a box that serves many: it holds nothing of any of them."""

    def __init__(self, plan: boxes.Plan, uid: int):
        self._plan, self._uid = plan, uid
        self._box: boxes.Box | None = None

    def observe(self, program: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The observation of each test."""
        patience = 5 * program["limits"]["wall_seconds"] + _MARGIN_SECONDS
        shared = {"source": program["source"], "limits": program["limits"]}
        numpy = bool(self._plan.paths) and "numpy" in program["source"]
        seen: list[dict[str, Any]] = []
        try:
            for test in program["tests"]:
                box = self._open(numpy)
                box.group.limit(program["limits"])
                box.begin({"program": shared, "test": test}, patience)
                answer = box.end()
                seen.append(answer or _ended(box))
                if not answer or not answer["clean"]:
                    # The box ended, or removing its files would take too long: take a new one.
                    self.rest()
        except boxes.BoxError as error:
            rest = len(program["tests"]) - len(seen)
            seen += [_infrastructure(f"no box could be started: {error}")] * rest
        return seen

    def rest(self) -> None:
        """Ends the box, because no program waits or the box cannot be used again."""
        if self._box is not None:
            self._box.close()
            self._box = None

    def _open(self, numpy: bool) -> boxes.Box:
        """A box that waits for a test; raises `BoxError` if none starts."""
        if self._box and self._box.process.poll() is None and self._box.numpy >= numpy:
            return self._box
        self.rest()
        problem = ""
        for _ in range(_STARTS):
            try:
                box = boxes.Box(self._plan, self._uid, numpy)
                box.handshake()
                self._box = box
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
    """A box ended or hung after it had started: a program must not gain by that."""
    if box.expired:
        return {"status": "time_limit", "error": ""}
    return {"status": "died", "error": "the box ended before the test did"}


def _infrastructure(error: str) -> dict[str, Any]:
    return {"status": "infrastructure", "error": error}
