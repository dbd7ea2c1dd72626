"""The system calls that are forbidden in a box, as a handwritten BPF program.

It is a deny-list: the interpreter and its libraries need several hundred other calls, which
namespaces, Landlock and a separate uid confine. Calls of another architecture or of the x32 ABI
kill the process, because the numbers below would not match them.
"""

import platform
import struct

_NUMBERS: dict[str, tuple[int, int]] = {
    # name: (x86_64, aarch64); -1 where the architecture has no such call.
    "socket": (41, 198),
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
    "mknod": (133, -1),
    "mknodat": (259, 33),
    # System V and POSIX message objects outlive the process, so they would carry state along.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Priorities and affinity affect the other slots.
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
}
_SIGNALS: dict[str, tuple[int, int]] = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_CLONE, _CLONE3, _SOCKETPAIR, _IOCTL = (56, 220), (435, 435), (53, 199), (16, 29)
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
_TIOCSTI = 0x5412
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LOAD, _JEQ, _JGE, _JSET, _RET, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def supported() -> bool:
    """Whether the call numbers of this architecture are known."""
    return platform.machine() in _AUDIT


def program(*, deny_signals: bool = False) -> bytes:
    """The filter for this machine, as an array of `struct sock_filter`.

    `deny_signals` is for a box whose uid the trainer shares and whose kernel cannot scope signals.
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
    code += _on_argument(_IOCTL[column], 24, [_step(_JEQ, _TIOCSTI, 0, 1)])
    # asyncio needs a pair of stream sockets; a datagram pair could send to an address.
    pair = [_step(_AND, 0xF), _step(_JEQ, 1, 1, 0)]
    code += _on_argument(_SOCKETPAIR[column], 24, pair)
    # clone3 hides its flags behind a pointer; libc falls back to clone.
    code += [_step(_JEQ, _CLONE3[column], 0, 1), _step(_RET, _ENOSYS)]
    denied = {**_NUMBERS, **(_SIGNALS if deny_signals else {})}
    for numbers in denied.values():
        if numbers[column] >= 0:
            code += [_step(_JEQ, numbers[column], 0, 1), _step(_RET, _EPERM)]
    return b"".join([*code, _step(_RET, _ALLOW)])


def _on_argument(number: int, offset: int, test: list[bytes]) -> list[bytes]:
    """Denies a call whose argument at `offset` passes the test, whose last step skips if not."""
    steps = [_step(_LOAD, offset), *test, _step(_RET, _EPERM), _step(_LOAD, 0)]
    return [_step(_JEQ, number, 0, len(steps)), *steps]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
