"""Confines a box from inside: prctl, limits, Landlock and seccomp, through ctypes.

Every call only removes rights, so a program that repeats it gains nothing. The numbers are the
kernel's (`include/uapi/linux`): prctl.h, landlock.h, seccomp.h.
"""

import ctypes
import math
import os
import resource
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_PR_SET_DUMPABLE, _PR_SET_SECCOMP = 4, 22
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_NEWNS, _CLONE_NEWPID, _SIGCHLD = 0x00020000, 0x20000000, 17
_NOSUID_NODEV, _NOEXEC = 6, 8
_CAPABILITY_VERSION_3 = 0x20080522
_INODES = 8192
"""Files and folders of a test's own file system; it bounds extended attributes, too."""
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1}
"""Rights over files by Landlock ABI; 3 adds truncation and 5 device ioctls."""
_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _prctl(option: int, *arguments: Any) -> None:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    if _libc.prctl(option, *(a if not isinstance(a, int) else ctypes.c_ulong(a) for a in padded)):
        raise _failed(f"prctl({option})")


def _failed(call: str) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, f"{call}: {os.strerror(error)}")


def harden_runner() -> None:
    """Makes the runner opaque to its children and the parent of their orphans.

    Without `PR_SET_DUMPABLE` 0 a child opens the runner's descriptors under /proc and forges
    frames; without the subreaper a daemonised process leaves the box's tree.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def show_to_supervisor() -> None:
    """Lets processes of the same user count this one's descriptors, but not trace it."""
    _prctl(_PR_SET_DUMPABLE, 1)


def fork_apart() -> int:
    """Forks as `os.fork`, into a process and a mount namespace of the child's own.

    The child is process 1 there: no process below it can end or stop it, and all end with it.
    """
    number = _CLONE[os.uname().machine]
    flags = ctypes.c_ulong(_CLONE_NEWNS | _CLONE_NEWPID | _SIGCHLD)
    pid = _libc.syscall(number, flags, None, None, None, None)
    if pid < 0:
        raise _failed("clone")
    return pid


def mount_own(work: str, size_mb: int) -> None:
    """Mounts a new folder and a new /proc over those of the box, then drops every capability."""
    room = f"size={size_mb}m,nr_inodes={_INODES},mode=700".encode()
    proc = (b"proc", b"/proc", b"proc", _NOSUID_NODEV | _NOEXEC, None)
    for *words, flags, data in ((b"tmpfs", work.encode(), b"tmpfs", _NOSUID_NODEV, room), proc):
        if _libc.mount(*words, ctypes.c_ulong(flags), data):
            raise _failed("mount")
    if _libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)):
        raise _failed("capset")


def check_apart(work: str) -> None:
    """Raises `OSError` where this process may not make what each test needs."""
    if (pid := fork_apart()) == 0:
        status = 1
        try:
            mount_own(work, 1)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise PermissionError("a test may not mount its own folder (AppArmor may confine bwrap)")


def set_limits(limits: Mapping[str, Any], count_processes: bool) -> None:
    """Sets the kernel's limits per process; hard limits too, so that none can be raised."""
    cpu = math.ceil(limits["cpu_seconds"]) + 1
    wanted = {
        resource.RLIMIT_AS: limits["memory_mb"] << 20,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: limits["file_mb"] << 20,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 64 << 10,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    if count_processes:
        # The runner, three supervisors and bwrap's two processes count as well.
        wanted[resource.RLIMIT_NPROC] = limits["processes"] + 6
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 if it has none."""
    found = _libc.syscall(_LANDLOCK["create"], None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(found, 0)


def landlock_ruleset(readable: Sequence[str], work: str) -> int:
    """A ruleset's descriptor: read and execute beneath `readable`, all beneath `work`; or -1.

    It also denies TCP (ABI 4), and signals and abstract sockets to the outside (ABI 6).
    """
    abi = landlock_abi()
    if not abi:
        return -1
    rights = _FILE_RIGHTS.get(abi, (1 << 15) - 1 if abi < 5 else (1 << 16) - 1)
    rules = _Ruleset(rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    fd = _libc.syscall(
        _LANDLOCK["create"], ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    if fd < 0:
        return -1
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    for path in readable:
        _allow(fd, path, reading & rights)
    for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        _allow(fd, device, (_READ_FILE | _WRITE_FILE) & rights)
    # No device nodes, sockets or FIFOs that would outlive the test in another shape.
    _allow(fd, work, rights & ~(1 << 6 | 1 << 11))
    return fd


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        # A path that does not exist cannot be granted and is absent for the program, too.
        return
    if not os.path.isdir(path):
        rights &= ~_READ_DIR
    rule = _PathBeneath(rights, fd)
    _libc.syscall(
        _LANDLOCK["add"], ruleset, ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0)
    )
    os.close(fd)


def restrict(ruleset: int) -> None:
    """Applies a Landlock ruleset to this process for good; raises `OSError` if it cannot."""
    if _libc.syscall(_LANDLOCK["restrict"], ruleset, ctypes.c_uint32(0)):
        raise _failed("landlock_restrict_self")


def filter_system_calls(program: bytes) -> None:
    """Applies a BPF program of `seccomp.py` to this process for good; raises `OSError`."""
    assembled = _Filter(len(program) // 8, program)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(assembled))


def become_subreaper() -> None:
    """Makes orphaned descendants the children of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
