"""Take rights away from this process, for ever, before it opens a file of a stranger.

Four layers, each of which the process cannot undo:

limits     memory, CPU seconds, open files, size of a written file (setrlimit, on every Unix)
seccomp    no sockets, no new processes or programs, no signals to other processes, no access to their memory and
           limits, no memory outside the limits, nothing that only root may do (Linux on x86-64 and ARM64)
Landlock   files are written, made and deleted in one folder only, and no TCP (Linux 5.13; TCP from 6.7 on)
audit      Python's own operations are refused first, with a message; native code does not pass through this layer

The process can still read every file that its user can read. It has no way to send what it read, except into its
result.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path
from typing import Any

# system calls to refuse: x86-64, ARM64 (-1: there is none)
REFUSED = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "truncate": (76, 45),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, -1),
    "utimes": (235, -1),
    "utimensat": (280, 88),
    "futimesat": (261, -1),
    # what only root may do
    "open_by_handle_at": (304, 265),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "pivot_root": (155, 41),
    "umount2": (166, 39),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
OPEN, OPENAT, OPENAT2, FCNTL, PRLIMIT = (2, -1), (257, 56), (437, 437), (72, 25), (302, 261)
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15  # commands of fcntl
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, number for the kernel
CLONE_THREAD, X32 = 0x10000, 0x40000000
Instruction = tuple[int, int, int, int]
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of BPF
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER, DIE_WITH_PARENT, SIGKILL = 38, 22, 2, 1, 9

EXECUTE, WRITE_FILE = 1 << 0, 1 << 1
CHANGES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # write, remove and make: all of the first version
SINCE = {2: 1 << 13, 3: 1 << 14}  # version of Landlock: rights that it added (rename between folders, truncate)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.system",
    "os.startfile",
    "os.kill",
    "pty.spawn",
    "webbrowser.",
    "ftplib.",
    "urllib.",
    "smtplib.",
)
CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
    "os.setxattr",
    "os.removexattr",
)


def confine(folder: Path, *, memory: int, seconds: int, file_size: int) -> list[str]:
    """Take the rights away; `folder` is where the process may still write. Return the layers that this system has.
    Call it before any thread is started."""
    layers = []
    if sys.platform != "win32":
        _limit(memory, seconds, file_size)
        layers.append("limits")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(DIE_WITH_PARENT, SIGKILL, 0, 0, 0)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        layers += ["Landlock"] * _landlock(libc, folder) + ["seccomp"] * _seccomp(libc)
    sys.addaudithook(refusing(folder))
    return [*layers, "audit"]


def _limit(memory: int, seconds: int, file_size: int) -> None:
    import resource

    wanted = {"AS": memory, "CPU": seconds, "FSIZE": file_size, "NOFILE": 256, "CORE": 0}
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value + (name == "CPU")))  # one more second: SIGXCPU comes first, not SIGKILL


def _seccomp(libc: Any) -> bool:
    """Install the filter of system calls. Return False if the kernel or the architecture has none."""
    if platform.machine() not in ARCHITECTURES:
        return False
    column, architecture = ARCHITECTURES[platform.machine()]
    program = _filter(column, architecture)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(SET_SECCOMP, FILTER, ctypes.create_string_buffer(header, len(header)), 0, 0) == 0)


def _filter(column: int, architecture: int) -> list[Instruction]:
    """Return the filter as instructions (code, jump if true, jump if false, operand)."""
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, EPERM),
        (LOAD, 0, 0, 0),
        (JUMP_ABOVE, 0, 1, X32),
        (RETURN, 0, 0, EPERM),
        (JUMP_EQUAL, 1, 0, CLONE3[column]),
        (JUMP_EQUAL, 0, 1, OPENAT2[column]),
        (RETURN, 0, 0, ENOSYS),  # their flags cannot be seen; libc then calls clone, and others openat
    ]
    for numbers in REFUSED.values():
        if numbers[column] >= 0:
            program += [(JUMP_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, EPERM)]
    program += _checked(CLONE[column], 0, [(JUMP_ANY_BIT, 1, 0, CLONE_THREAD)])  # threads, and no processes
    program += _checked(PRLIMIT[column], 0, [(JUMP_EQUAL, 1, 0, 0)])  # the limits of this process, and of no other
    # a file can send signals to its owner, which may be another process
    owners = [(JUMP_EQUAL, 2, 0, F_SETOWN), (JUMP_EQUAL, 1, 0, F_SETSIG), (JUMP_EQUAL, 0, 1, F_SETOWN_EX)]
    program += _checked(FCNTL[column], 1, owners)
    # Landlock before its third version lets O_TRUNC empty a file that is opened for reading
    truncates = [(JUMP_ANY_BIT, 0, 2, os.O_TRUNC), (JUMP_ANY_BIT, 1, 0, os.O_WRONLY | os.O_RDWR)]
    program += _checked(OPEN[column], 1, truncates) + _checked(OPENAT[column], 2, truncates)
    return [*program, (RETURN, 0, 0, ALLOW)]


def _checked(number: int, argument: int, tests: list[Instruction]) -> list[Instruction]:
    """Return instructions that refuse a system call unless the tests of one of its arguments jump over the refusal."""
    if number < 0:
        return []
    load = (LOAD, 0, 0, 16 + 8 * argument)
    return [(JUMP_EQUAL, 0, len(tests) + 3, number), load, *tests, (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]


def _landlock(libc: Any, folder: Path) -> bool:
    """Refuse writes outside the folder, programs, and TCP. Return False if the kernel has no Landlock."""
    create, add_rule, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    changes = CHANGES | sum(right for since, right in SINCE.items() if version >= since)
    handled = [changes | EXECUTE, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"={len(handled)}Q", *handled)  # files; TCP bind and connect; other sandboxes' sockets
    rules = libc.syscall(create, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), 0)
    for path, rights in ((folder, changes), (Path(os.devnull), WRITE_FILE)):
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        libc.syscall(add_rule, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, beneath)), 0)
        os.close(beneath)
    done = libc.syscall(restrict, rules, 0)
    os.close(rules)
    return bool(done == 0)


def refusing(folder: Path) -> Any:
    """Return an audit hook that refuses Python's own ways to do what the process may not do."""
    allowed = Path(os.path.realpath(folder))

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # an open file
        real = Path(os.path.realpath(os.fsdecode(path)))
        return real.is_relative_to(allowed) or str(real) == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(NEVER):
            raise PermissionError(f"a sandboxed process may not do this: {event}")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and path is not None and not inside(path):
                raise PermissionError(f"a sandboxed process may not write {path!r}")
        elif event in CHANGING:
            paths = arguments[:2] if event in ("os.rename", "os.link", "shutil.move") else arguments[:1]
            if not all(inside(path) for path in paths):
                raise PermissionError(f"a sandboxed process may not do this: {event} {paths!r}")

    return hook
