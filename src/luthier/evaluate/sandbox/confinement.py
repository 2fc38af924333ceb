"""Confine the calling process: which files it sees (Landlock), what it may ask the kernel (seccomp), how much it uses.

It runs in the sandbox's own process, before any code of a user, and cannot be undone. It needs Linux 5.13 or newer and
libseccomp, no rights, and nothing but Python's standard library. Whatever fails raises, so no code runs unconfined.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Landlock, from linux/landlock.h; the numbers of these system calls are the same on all architectures.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
ABI_WITH_TRUNCATE, ABI_WITH_NETWORK, ABI_WITH_SCOPES = 3, 4, 6
RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights a version knows; later ones know 16
LATEST_RIGHTS = 16
NETWORK_RIGHTS = SCOPES = 0b11
RULESET_BYTES = 24
ON_FILES = WRITE_FILE | READ_FILE | TRUNCATE  # the others make sense for folders alone

# prctl and capset, from linux/prctl.h and linux/capability.h
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522

# seccomp, from seccomp.h
LIBSECCOMP = "libseccomp.so.2"
ALLOW, FAIL_WITH_EPERM = 0x7FFF0000, 0x00050000 | 1
EQUAL, MASKED_EQUAL = 4, 7

# What code that only computes asks of the kernel. Everything else fails: no new process or thread, no socket, no pipe,
# no signal to anybody else, no mount, no other process's memory, no memory that RLIMIT_AS does not count.
ALLOWED = {
    "files": """
        access chdir close close_range dup dup2 dup3 faccessat faccessat2 fadvise64 fchdir fdatasync fstat fsync
        ftruncate getcwd getdents64 lseek lstat newfstatat poll ppoll pread64 preadv pselect6 pwrite64 pwritev read
        readlink readlinkat readv rename renameat renameat2 select sendfile stat statx umask unlink unlinkat write
        writev""",
    "memory": "brk madvise mmap mprotect mremap munmap",
    "time": """
        alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time times""",
    "itself": """
        exit exit_group futex getegid geteuid getgid getpid getppid getrandom getrlimit getrusage gettid getuid
        restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
        sched_getaffinity sched_yield set_robust_list sigaltstack sysinfo uname""",
}
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
IOCTL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX


@dataclass(frozen=True)
class Walls:
    """What a confined process may read, where it may write, and how much it may use."""

    readable: Sequence[str]
    writable: Sequence[str]
    memory_bytes: int
    cpu_seconds: int
    file_bytes: int
    open_files: int


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def die_with(parent: int) -> None:
    """Have the kernel end this process when the one that started it ends.

    Raises:
        OSError: the kernel refuses, or ``parent`` has ended already.
    """
    _checked(_libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        raise ProcessLookupError("the process that started the sandbox has ended")


def confine(walls: Walls) -> None:
    """Confine this process, which has one thread, for good.

    Raises:
        OSError: the kernel cannot do it, or libseccomp is missing.
    """
    _limit(walls)
    _checked(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _restrict_files(walls)
    _drop_capabilities()
    _restrict_calls()


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _limit(walls: Walls) -> None:
    limits: Mapping[int, int] = {
        resource.RLIMIT_AS: walls.memory_bytes,
        resource.RLIMIT_CPU: walls.cpu_seconds,
        resource.RLIMIT_FSIZE: walls.file_bytes,
        resource.RLIMIT_NOFILE: walls.open_files,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


# Landlock


def _restrict_files(walls: Walls) -> None:
    libc = _libc()
    version = _checked(libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), VERSION_FLAG), "Landlock")
    handled = (1 << RIGHTS_BY_ABI.get(version, LATEST_RIGHTS)) - 1
    network = NETWORK_RIGHTS if version >= ABI_WITH_NETWORK else 0
    scopes = SCOPES if version >= ABI_WITH_SCOPES else 0
    attributes = (ctypes.c_uint64 * 3)(handled, network, scopes)
    ruleset = _checked(
        libc.syscall(
            ctypes.c_long(CREATE_RULESET), ctypes.byref(attributes), ctypes.c_size_t(RULESET_BYTES), ctypes.c_uint(0)
        ),
        "Landlock",
    )
    for path in walls.readable:
        _allow(libc, ruleset, path, READ_FILE | READ_DIR)
    for path in walls.writable:
        truncate = TRUNCATE if version >= ABI_WITH_TRUNCATE else 0
        _allow(libc, ruleset, path, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | truncate)
    _checked(libc.syscall(ctypes.c_long(RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)), "Landlock")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = _PathBeneath(rights if Path(path).is_dir() else rights & ON_FILES, folder)
    arguments = (ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint(0))
    _checked(libc.syscall(ctypes.c_long(ADD_RULE), *arguments), f"Landlock, {path}")
    os.close(folder)


def _drop_capabilities() -> None:
    """Give up what root may do beyond others; nothing for anybody else."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    _checked(_libc().capset(ctypes.byref(header), ctypes.byref(none)), "capset")


# seccomp


def _restrict_calls() -> None:
    try:
        library = ctypes.CDLL(LIBSECCOMP)
    except OSError as error:
        raise OSError(f"{LIBSECCOMP} is not installed") from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(FAIL_WITH_EPERM)))
    if not context:
        raise OSError("seccomp: no filter can be made")
    for name, conditions in _rules():
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # this architecture has no such call
            continue
        compared = (_Comparison * len(conditions))(*conditions)
        added = library.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, len(conditions), compared)
        if added != 0:
            raise OSError(-added, f"seccomp, {name}: {os.strerror(-added)}")
    loaded = library.seccomp_load(context)
    if loaded != 0:
        raise OSError(-loaded, f"seccomp: {os.strerror(-loaded)}")


def _rules() -> list[tuple[str, tuple[_Comparison, ...]]]:
    """Return what is allowed: system calls, each with conditions that all must hold."""
    own_pid = _Comparison(0, EQUAL, os.getpid(), 0)
    truncates, mode = os.O_TRUNC, os.O_ACCMODE
    return [
        *((name, ()) for names in ALLOWED.values() for name in names.split()),
        # Before version 3, Landlock lets a file be truncated that may be read: so whoever truncates has to write.
        ("openat", (_Comparison(2, MASKED_EQUAL, truncates, 0),)),
        ("openat", (_Comparison(2, MASKED_EQUAL, mode, os.O_WRONLY),)),
        ("openat", (_Comparison(2, MASKED_EQUAL, mode, os.O_RDWR),)),
        ("kill", (own_pid,)),
        ("tgkill", (own_pid,)),
        # F_SETOWN and F_SETSIG would have the kernel send any signal to any process.
        *(("fcntl", (_Comparison(1, EQUAL, command, 0),)) for command in FCNTL_COMMANDS),
        *(("ioctl", (_Comparison(1, EQUAL, request, 0),)) for request in IOCTL_REQUESTS),
        ("prlimit64", (_Comparison(0, EQUAL, 0, 0), _Comparison(2, EQUAL, 0, 0))),  # to look, not to set
    ]
