"""Runs in a forked child of a box: one test of one program, which writes one record.

A record is a status, a line break and a text: the JSON value after `done`, else the error. The
program shares this process, so the reader treats the whole record as data that the program chose.

Departures from the reference grader (lasgroup/SDPO, `feedback/code.py`): all builtins and the whole
standard library are available, whereas its list lacks exceptions, `super` and more, because the box
confines the process and not its names; expected values are not here; methods of `Solution` can be
called; a script's `exit()` is a normal end, while a called function that exits has `died`. Integers
have no limit of digits, because the limit on CPU time bounds their conversion.
Sockets, POSIX semaphores (so `multiprocessing` locks and pools) and packages that are not mounted
do not work.
"""

import builtins
import gc
import io
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

from sdpo_jax.environments.sandbox import values

SOLUTION = "Solution.py"
_MAX_MESSAGE = 2000


def run_test(source: str, test: Mapping[str, Any], limit: int, result_fd: int) -> None:
    """Runs the test, writes its record to `result_fd` and ends the process; never returns."""
    process = os.getpid()
    # The interpreter runs without `site`, which defines them.
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    try:
        record = _observe(source, test, limit)
    except BaseException as error:
        record = _failure(error)
    _flush()
    # A fork that the program made must not write the outcome.
    if os.getpid() == process:
        data = record.encode("utf-8", "replace")
        while data:
            data = data[os.write(result_fd, data) :]
    # Without a record, the exit status decides: a script may have closed the descriptor.
    os._exit(0 if record.startswith("done") else 1)


def _observe(source: str, test: Mapping[str, Any], limit: int) -> str:
    kind = test["kind"]
    name = "__main__" if kind == "run" else "Solution"
    # Under its name, because dataclasses and pickle look it up.
    module = sys.modules[name] = ModuleType(name)
    namespace = module.__dict__
    try:
        code = compile(source, SOLUTION, "exec", dont_inherit=True)
        if kind == "run":
            return _run_main(code, namespace)
        exec(code, namespace)
        if kind == "check":
            exec(compile(test["source"], "<test>", "exec", dont_inherit=True), namespace)
            return "done\nnull"
        value = _call(namespace, test) if kind == "call" else _evaluate(namespace, test)
    except SystemExit as error:
        return f"died\nSystemExit: {error.code!r}\n{_frames(error)}".rstrip()
    try:
        return "done\n" + values.dumps(value, limit)
    except values.NotJsonError as error:
        return f"error\nTypeError: {error}"


def _run_main(code: Any, namespace: dict[str, Any]) -> str:
    """Runs the program as a script, including the interpreter's cleanup at its end."""
    import atexit
    import threading

    outcome = "done\nnull"
    try:
        exec(code, namespace)
    except SystemExit as error:
        if error.code not in (None, 0):
            outcome = f"error\nSystemExit: {error.code!r}\n{_frames(error)}"
    except BaseException as error:
        outcome = _failure(error)
    # As an interpreter at its end: wait for the threads, then call the exit functions.
    threading.__dict__["_shutdown"]()
    atexit.__dict__["_run_exitfuncs"]()
    _flush()
    for name in [n for n in namespace if n != "__builtins__"]:
        namespace[name] = None  # so that finalizers run, which may print
    for thing in gc.get_objects():
        if issubclass(type(thing), io.IOBase.__base__ or io.IOBase):
            with suppress(BaseException):  # closed, or the program's own class
                thing.flush()
    return outcome


def _call(namespace: dict[str, Any], test: Mapping[str, Any]) -> Any:
    name, owner = test["function"], namespace.get("Solution")
    function = namespace.get(name)
    # A program may hold both: helpers at the top are not what the question asked for.
    if owner is not None and (function is None or hasattr(owner, name)):
        function = getattr(owner(), name, None)
    if function is None:
        raise NameError(f"the program defines no function {name!r}")
    return function(*test["arguments"], **test["keywords"])


def _evaluate(namespace: dict[str, Any], test: Mapping[str, Any]) -> Any:
    if test["setup"]:
        exec(compile(test["setup"], "<test>", "exec", dont_inherit=True), namespace)
    expression = test["expression"].strip()
    return eval(compile(expression, "<test>", "eval", dont_inherit=True), namespace)


def _failure(error: BaseException) -> str:
    kind = type(error)
    status = "memory_limit" if kind is MemoryError else "error"
    try:
        message = str(error.msg) if isinstance(error, SyntaxError) else str(error)
    except BaseException:
        # A program's own __str__ may raise; the class is still informative.
        message = ""
    head = f"{kind.__name__}: {message[:_MAX_MESSAGE]}" if message else f"{kind.__name__}"
    return f"{status}\n{head}\n{_frames(error)}".rstrip()


def _frames(error: BaseException) -> str:
    """The last three frames in the program's own text, outermost first."""
    lines: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == SOLUTION:
            lines.append(f"Line {trace.tb_lineno} in {code.co_name} ({SOLUTION})")
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == SOLUTION and error.lineno:
        lines.append(f"Line {error.lineno} in <module> ({SOLUTION})")
    return "\n".join(lines[-3:])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            # The program may have closed or replaced its streams; then there is nothing to flush.
            continue
