"""One box for each slot: it serves many programs, is replaced if it ends, and none is left over."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import alive, in_background, sleep_in, tree

from sdpo_jax.environments.sandbox import Call, Limits, Program, Run, open_sandbox
from sdpo_jax.environments.sandbox.client import LocalSandbox
from sdpo_jax.environments.sandbox.processes import children

# Namespaces tell boxes of bubblewrap apart, and the folder above a test's those of Landlock.
WHO = """
import os
def f():
    return [[os.readlink('/proc/self/ns/net'), os.path.dirname(os.getcwd())], os.getpid()]
"""
SLEEP = "import time\ndef f():\n    time.sleep(30)\n    return 42"
SLOW = "import time\ndef f():\n    time.sleep(1)\n    return 42"
wait_until = partial(processes.wait_until, seconds=30.0)
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=40.0)


# The others run with the slow tests where bubblewrap is there.
_others = [pytest.mark.slow] if shutil.which("bwrap") else []
TIERS = ["bubblewrap", *(pytest.param(t, marks=_others) for t in ("landlock", "unsafe-local"))]


@pytest.fixture(params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap is not installed: the bubblewrap tier is NOT tested here")
    opened = open_sandbox(request.param, slots=1)
    assert isinstance(opened, LocalSandbox)
    # The box of the test at the start is on its way out.
    assert wait_until(lambda: not children(executor_of(opened)))
    yield opened
    opened.close()


def executor_of(sandbox: LocalSandbox) -> int:
    assert sandbox.executor_pid is not None
    return sandbox.executor_pid


def boxes_of(sandbox: LocalSandbox) -> list[int]:
    """The first process of each box, the oldest first."""
    return sorted(alive(children(executor_of(sandbox))), key=started)


def started(pid: int) -> int:
    """When a process began, in ticks: its number says nothing once numbers begin anew."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def start(sandbox: LocalSandbox, source: str, programs: int) -> tuple[threading.Thread, list[Any]]:
    """Runs programs in the background until one of them is in its box."""
    batch = [Program(source, (Call("f"),), LIMITS)] * programs
    running = in_background(lambda: [o[0] for o in sandbox.run(batch)])
    assert wait_until(lambda: len(tree(executor_of(sandbox))) > 3), tree(executor_of(sandbox))
    return running


def test_programs_share_a_box_and_no_test_shares_a_process(sandbox: LocalSandbox) -> None:
    thread, found = in_background(lambda: sandbox.run([Program(WHO, (Call("f"),) * 2, LIMITS)] * 6))
    thread.join(60)
    seen = [o.value for observations in found[0] for o in observations]
    assert len(seen) == 12 and len({str(box) for box, _ in seen}) == 1
    if sandbox.tier != "bubblewrap":  # where process numbers begin anew with each test
        assert len({pid for _, pid in seen}) == 12


def test_a_slot_has_one_box_and_none_where_nothing_is_queued(sandbox: LocalSandbox) -> None:
    most = 0
    thread, found = start(sandbox, "import time\ndef f(): time.sleep(0.2)", 6)
    while thread.is_alive():
        most = max(most, len(boxes_of(sandbox)))
        time.sleep(0.005)
    assert [o.status for o in found[0]] == ["done"] * 6
    assert most == 1
    assert wait_until(lambda: not children(executor_of(sandbox)))


def test_a_program_without_a_successor_starts_no_second_box(sandbox: LocalSandbox) -> None:
    thread, _ = in_background(lambda: sandbox.run([Program(SLOW, (Call("f"),), LIMITS)]))
    seen, inside = set[int](), set[int]()
    while thread.is_alive():
        boxes = boxes_of(sandbox)
        seen |= set(boxes)
        # What a box leaves is the executor's child until it is reaped, and no box.
        inside |= {pid for box in boxes for pid in tree(box)[1:]}
        time.sleep(0.01)
    assert len(seen - inside) == 1


def test_close_ends_the_box_while_programs_wait(sandbox: LocalSandbox) -> None:
    thread, _ = start(sandbox, SLEEP, 3)
    pids = tree(executor_of(sandbox))
    sandbox.close()
    assert wait_until(lambda: not alive(pids)), alive(pids)
    thread.join(20)


def test_a_box_ends_with_a_killed_executor_and_the_programs_are_run_again(
    sandbox: LocalSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_of(sandbox)
    sleep_in(executor, monkeypatch)
    thread, found = start(sandbox, "def f(): return 42", 2)
    pids = tree(executor)
    os.kill(executor, signal.SIGKILL)
    thread.join(60)
    assert [o.value for o in found[0]] == [42, 42]
    assert wait_until(lambda: not alive(pids)), alive(pids)


def test_a_box_that_dies_is_replaced_for_the_next_program(sandbox: LocalSandbox) -> None:
    thread, found = start(sandbox, SLOW, 3)
    os.kill(boxes_of(sandbox)[0], signal.SIGKILL)
    thread.join(60)
    # The first may have been in the box, or have been given another one, or have its supervisor.
    assert next(o.status for o in found[0]) in ("done", "died")
    assert [o.value for o in found[0]][1:] == [42, 42]
    assert wait_until(lambda: not children(executor_of(sandbox)))


def test_each_program_has_its_own_limit_on_files(sandbox: LocalSandbox) -> None:
    fill = "def f():\n    open('x', 'wb').write(bytes(6 << 20))\n    return 42"
    programs = [
        Program(fill, (Call("f"),), LIMITS._replace(file_mb=size)) for size in (4, 16, 4, 16)
    ]
    seen = [o[0] for o in sandbox.run(programs)]
    assert [o.value == 42 for o in seen] == [False, True, False, True], seen


def test_a_program_cannot_end_or_see_the_processes_of_its_box(sandbox: LocalSandbox) -> None:
    if sandbox.tier == "unsafe-local":
        pytest.skip("the tier `unsafe-local` holds nothing")
    hunt = """
import os, signal, time
def f():
    time.sleep(0.5)
    for pid in range(2, 1 << 16):
        if pid not in (os.getpid(), os.getppid()):
            try:
                os.kill(pid, signal.SIGKILL)
                return pid
            except OSError:
                pass
    return 42
"""
    seen = [o[0] for o in sandbox.run([Program(hunt, (Call("f"),), LIMITS)] * 3)]
    assert [(o.status, o.value) for o in seen] == [("done", 42)] * 3


def test_programs_that_hang_leave_no_box_and_no_process(sandbox: LocalSandbox) -> None:
    limits = Limits(cpu_seconds=0.2, wall_seconds=20.0)
    seen = sandbox.run([Program("while True: pass", (Run(""),), limits)] * 6)
    assert {o[0].status for o in seen} == {"time_limit"}
    assert wait_until(lambda: not children(executor_of(sandbox)))
