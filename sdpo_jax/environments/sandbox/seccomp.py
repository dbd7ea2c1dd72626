"""The system calls that are forbidden in a box, as a handwritten BPF program.

It is a deny-list: the interpreter and its libraries need several hundred other calls, which
namespaces, Landlock and a separate uid confine. Calls of another architecture or of the x32 ABI
kill the process, because the numbers below would not match them. A call that would act on what lies
outside of the test, where the filter cannot see on what it acts, has no effect and reports success:
honest programs call it on their own files and go on.
"""

import platform
import struct

_NUMBERS: dict[str, tuple[int, int]] = {
    # name: (x86_64, aarch64); -1 where the architecture has no such call.
    "socket": (41, 198),
    # Their buffers lie in the kernel, where no limit of a process counts them; a message may hold
    # files that no process has open.
    "setsockopt": (54, 208),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "perf_event_open": (298, 241),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "pidfd_getfd": (438, 438),
    "personality": (135, 92),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    # System V and POSIX message objects outlive the process, so they would carry state along.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # Attributes outlive a test and take memory that no limit of a process counts.
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # Priorities and affinity affect the other slots.
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
_METADATA: dict[str, tuple[int, int]] = {
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
}
"""Without effect in a box that sees the machine's files: Landlock does not govern them."""
_OWNERS: dict[str, tuple[int, int]] = {
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
}
"""Refused there, since no honest program has another owner to name."""
_SIGNALS: dict[str, tuple[int, int]] = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_CLONE, _CLONE3, _SOCKETPAIR, _IOCTL = (56, 220), (435, 435), (53, 199), (16, 29)
_OPEN, _OPENAT, _OPENAT2, _PRLIMIT = (2, -1), (257, 56), (437, 437), (302, 261)
_FCNTL, _PRCTL, _SIGACTION = (72, 25), (157, 167), (13, 134)
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
_IOCTLS = (0x5412, 0x8901, 0x8902, 0x40086602, 0x401C5820)
"""TIOCSTI, FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR."""
_FCNTLS = (8, 10, 15, 1024, 1026, 1031)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ."""
_TMPFILE, _SIGCHLD, _PR_SET_DUMPABLE = 0x400000, 17, 4
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LOAD, _JEQ, _JGE, _JSET, _RET, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_SILENT, _EOPNOTSUPP = 0x00050000, 0x0005005F


def supported() -> bool:
    """Whether the call numbers of this architecture are known."""
    return platform.machine() in _AUDIT


def program(*, deny_signals: bool = False, own_files: bool = True) -> bytes:
    """The filter for this machine, as an array of `struct sock_filter`.

    `deny_signals` is for a box whose uid the trainer shares and whose kernel cannot scope signals;
    `own_files` says that a test can reach no metadata and no disk but its own.
    """
    machine = platform.machine()
    column = 0 if machine == "x86_64" else 1
    code = [
        _step(_LOAD, 4),
        _step(_JEQ, _AUDIT[machine], 1, 0),
        _step(_RET, _KILL),
        _step(_LOAD, 0),
    ]
    if machine == "x86_64":
        code += [_step(_JGE, _X32, 0, 1), _step(_RET, _KILL)]
    code += _on_argument(_CLONE[column], 16, [_step(_JSET, _NEW_NAMESPACES, 0, 1)])
    code += _on_argument(_IOCTL[column], 24, _any_of(_IOCTLS))
    code += _on_argument(_FCNTL[column], 24, _any_of(_FCNTLS))
    # Only a process's own limits; those of the supervisor have the same user.
    code += _on_argument(_PRLIMIT[column], 16, [_step(_JEQ, 0, 1, 0)])
    # The supervisor has to see the descriptors of every process.
    code += _on_argument(_PRCTL[column], 16, _any_of((_PR_SET_DUMPABLE,)), _SILENT)
    code += _keep_children_waited_for(_SIGACTION[column])
    if not own_files:
        # A file without a name takes disk where nobody finds it; openat2 hides its flags.
        for numbers, offset in ((_OPEN, 24), (_OPENAT, 32)):
            if numbers[column] >= 0:
                flag = [_step(_JSET, _TMPFILE, 0, 1)]
                code += _on_argument(numbers[column], offset, flag, _EOPNOTSUPP)
        code += _answer([_OPENAT2[column]], _ENOSYS)
        code += _answer([numbers[column] for numbers in _METADATA.values()], _SILENT)
        code += _answer([numbers[column] for numbers in _OWNERS.values()], _EPERM)
    # asyncio needs a pair of stream sockets; a datagram pair could send to an address.
    pair = [_step(_AND, 0xF), _step(_JEQ, 1, 1, 0)]
    code += _on_argument(_SOCKETPAIR[column], 24, pair)
    # clone3 hides its flags behind a pointer; libc falls back to clone.
    code += _answer([_CLONE3[column]], _ENOSYS)
    denied = {**_NUMBERS, **(_SIGNALS if deny_signals else {})}
    code += _answer([numbers[column] for numbers in denied.values()], _EPERM)
    return b"".join([*code, _step(_RET, _ALLOW)])


def _answer(calls: list[int], verdict: int) -> list[bytes]:
    """Ends every one of the calls that this architecture has with a verdict."""
    return [
        step
        for number in calls
        if number >= 0
        for step in (_step(_JEQ, number, 0, 1), _step(_RET, verdict))
    ]


def _any_of(values: tuple[int, ...]) -> list[bytes]:
    """A test whether the argument is one of the values."""
    last = len(values) - 1
    return [_step(_JEQ, v, last - i, 0 if i < last else 1) for i, v in enumerate(values)]


def _keep_children_waited_for(number: int) -> list[bytes]:
    """Leaves SIGCHLD as it is: the CPU time of children that it discards is counted nowhere."""
    steps = [
        _step(_LOAD, 16),
        _step(_JEQ, _SIGCHLD, 0, 5),
        # Both halves of the pointer to the new action; none is a question.
        _step(_LOAD, 24),
        _step(_JEQ, 0, 0, 2),
        _step(_LOAD, 28),
        _step(_JEQ, 0, 1, 0),
        _step(_RET, _SILENT),
        _step(_LOAD, 0),
    ]
    return [_step(_JEQ, number, 0, len(steps)), *steps]


def _on_argument(number: int, offset: int, test: list[bytes], verdict: int = _EPERM) -> list[bytes]:
    """Denies a call whose argument at `offset` passes the test, whose last step skips if not."""
    steps = [_step(_LOAD, offset), *test, _step(_RET, verdict), _step(_LOAD, 0)]
    return [_step(_JEQ, number, 0, len(steps)), *steps]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
