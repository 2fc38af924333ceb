"""The sandbox of Python graders, and code that tries to leave it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier.errors import MissingDependencyError
from luthier.evaluate.sandbox import sandbox as sandbox_module
from luthier.evaluate.sandbox.sandbox import Allowance, CodeError, Sandbox

# Grades 1 where every attempt fails in the kernel.
REFUSED = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) == -1:
        raise OSError(ctypes.get_errno(), "refused")

def refused(attempt):
    try:
        attempt()
    except (OSError, ValueError):  # setrlimit has a ValueError of its own for EPERM
        return True
    return False

def grade(sample, item):
    attempts = [{attempts}]
    return sum(map(refused, attempts)) / len(attempts)
"""
ANY_X86_64 = "if sys.maxsize > 2**32 and os.uname().machine == 'x86_64' else call(-1)"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Allowance(seconds=20))


def grade(sandbox: Sandbox, source: str, sample: dict[str, Any] | None = None, **item: Any) -> float:
    return asyncio.run(sandbox.grade(source, sample or {}, item))


def body(lines: str) -> str:
    return "def grade(sample, item):\n" + "\n".join(f"    {line}" for line in lines.splitlines())


# What it is for


def test_code_gets_the_sample_and_the_item_and_gives_a_score(sandbox: Sandbox) -> None:
    source = "import re\ndef grade(sample, item):\n    return len(re.findall(item['word'], sample['output_text'])) / 4"
    assert grade(sandbox, source, {"output_text": "so so"}, word="so") == 0.5


def test_code_may_use_installed_packages_and_its_own_folder(sandbox: Sandbox) -> None:
    lines = "import numpy, tempfile\nwith open('a.txt', 'w') as file:\n    file.write('ab')\n"
    lines += "with tempfile.NamedTemporaryFile() as file:\n    file.write(b'x')\n"
    lines += "return numpy.float32(len(open('a.txt').read()))"
    assert grade(sandbox, body(lines)) == 2.0


def test_what_code_prints_does_not_disturb_its_score(sandbox: Sandbox) -> None:
    lines = "import os, sys\nprint('{\"score\": 1}')\nos.write(2, b'x')\nsys.stdout.close()\nreturn True"
    assert grade(sandbox, body(lines)) == 1.0


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("def grade(sample, item):\n    return (", "source", "SyntaxError"),
        ("import nothing_of_this_name", "source", "ModuleNotFoundError"),
        ("def score(sample, item):\n    return 1", "source", "does not define grade(sample, item)"),
        (body("return 1 / item['zero']"), "runtime", "ZeroDivisionError"),
        (body("return sample['nobody']"), "runtime", "KeyError: 'nobody'"),
        (body("raise SystemExit(3)"), "runtime", "SystemExit: 3"),
        (body("return 'good'"), "result", "a str, which is not a number"),
        (body("return None"), "result", "a NoneType, which is not a number"),
        (body("return float('nan')"), "result", "not a finite number"),
        (body("import os\nos._exit(0)"), "runtime", "without an answer"),
        (body("import os\nos.abort()"), "runtime", "signal SIGABRT"),
        (body("return grade(sample, item)"), "runtime", "RecursionError"),
    ],
)
def test_an_error_of_the_code_says_what_is_wrong(sandbox: Sandbox, source: str, kind: str, message: str) -> None:
    with pytest.raises(CodeError) as caught:
        grade(sandbox, source, zero=0)
    assert caught.value.kind == kind
    assert message in str(caught.value)


def test_a_traceback_shows_the_codes_own_lines_alone(sandbox: Sandbox) -> None:
    with pytest.raises(CodeError) as caught:
        grade(sandbox, body("ratio = 1 / 0\nreturn ratio"))
    assert "ratio = 1 / 0" in str(caught.value)
    assert "inside.py" not in str(caught.value)


def test_checking_runs_the_source_and_grades_nothing(sandbox: Sandbox) -> None:
    asyncio.run(sandbox.check(body("raise RuntimeError")))
    with pytest.raises(CodeError, match="does not define"):
        asyncio.run(sandbox.check("x = 1"))


# Ways out


def test_files_of_others_can_neither_be_read_nor_written(sandbox: Sandbox, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    database = home / "luthier.db"
    database.write_text("secrets")
    attempts = """
        lambda: open("/etc/passwd").read(),
        lambda: open(item["database"]).read(),
        lambda: open(item["database"], "a").write("x"),
        lambda: os.open(item["database"], os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(item["database"], os.O_ACCMODE | os.O_TRUNC),
        lambda: os.truncate(item["database"], 0),
        lambda: os.listdir(item["home"]),
        lambda: os.listdir("/"),
        lambda: open(item["home"] + "/new", "w"),
        lambda: open("/tmp/new-file-of-a-grader", "w"),
        lambda: open("/dev/shm/new-file-of-a-grader", "w"),
        lambda: os.open(item["home"], os.O_TMPFILE | os.O_RDWR),
        lambda: os.unlink(item["database"]),
        lambda: os.rename(item["database"], "mine"),
        lambda: os.link(item["database"], "mine"),
        lambda: os.symlink(item["database"], "mine") or open("mine").read(),
        lambda: os.chmod(item["database"], 0o777),
        lambda: os.utime(item["database"]),
        lambda: os.mkdir("folder"),
        lambda: os.mknod("device"),
        lambda: os.mkfifo("fifo"),
        lambda: os.chroot("/"),
        lambda: open(os.__file__, "a"),
        lambda: os.open(os.__file__, os.O_RDONLY | os.O_TRUNC),
        lambda: os.open("../..", os.O_RDONLY),
        lambda: os.open(os.sep.join(["", "proc", "self", "root", "etc", "passwd"]), os.O_RDONLY),
        lambda: os.memfd_create("memory"),
    """
    source = REFUSED.format(attempts=attempts)
    assert grade(sandbox, source, home=str(home), database=str(database)) == 1.0
    assert database.read_text() == "secrets"
    assert list(home.iterdir()) == [database]


def test_nothing_can_be_reached_over_a_socket(sandbox: Sandbox, tmp_path: Path) -> None:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    unix.listen()
    attempts = """
        lambda: socket.socket(),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        lambda: socket.socket(socket.AF_UNIX).connect(item["unix"]),
        lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        lambda: socket.socketpair(),
        lambda: socket.create_connection(("127.0.0.1", 1)),
        lambda: os.pipe(),
        lambda: os.eventfd(0),
    """
    assert grade(sandbox, REFUSED.format(attempts=attempts), unix=str(tmp_path / "socket")) == 1.0
    unix.close()


def test_no_process_can_be_made_found_or_touched(sandbox: Sandbox) -> None:
    attempts = f"""
        lambda: os.fork() or os._exit(0),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.posix_spawn("/bin/true", ["true"], dict()),
        lambda: __import__("subprocess").run(["true"]),
        lambda: os.kill(item["parent"], 0),
        lambda: os.kill(1, 0),
        lambda: os.kill(0, 0),
        lambda: os.kill(-1, 0),
        lambda: os.killpg(0, 0),
        lambda: os.setpriority(os.PRIO_PROCESS, item["parent"], 19),
        lambda: os.sched_setaffinity(item["parent"], [0]),
        lambda: os.pidfd_open(item["parent"]),
        lambda: os.setuid(0),
        lambda: os.setsid(),
        lambda: __import__("resource").prlimit(item["parent"], 7),
        lambda: __import__("resource").setrlimit(9, (-1, -1)),
        lambda: __import__("fcntl").fcntl(0, 8, item["parent"]),
        lambda: __import__("fcntl").fcntl(0, 10, 9),
        lambda: open(f"/proc/{{item['parent']}}/environ").read(),
        lambda: os.listdir("/proc"),
        lambda: call(101, 16, item["parent"], 0, 0) {ANY_X86_64},
        lambda: call(310, item["parent"], 0, 0, 0, 0, 0) {ANY_X86_64},
        lambda: call(272, 0x10000000) {ANY_X86_64},
        lambda: call(165, 0, 0, 0, 0, 0) {ANY_X86_64},
        lambda: call(425, 8, 0) {ANY_X86_64},
        lambda: call(321, 0, 0, 0) {ANY_X86_64},
        lambda: call(29, 0, 4096, 0o1777) {ANY_X86_64},
    """
    assert grade(sandbox, REFUSED.format(attempts=attempts), parent=os.getpid()) == 1.0


def test_no_thread_can_be_started(sandbox: Sandbox) -> None:
    with pytest.raises(CodeError, match="can't start new thread"):
        grade(sandbox, body("import threading\nthreading.Thread(target=print).start()\nreturn 1"))


def test_the_environment_and_open_files_of_the_service_are_not_there(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_API_KEY", "secret")
    listener = socket.create_server(("127.0.0.1", 0))
    os.set_inheritable(listener.fileno(), True)
    lines = "import os\nleft = set(os.environ) - {'LANG', 'LC_CTYPE', 'HOME', 'TMPDIR'}\n"
    lines += "left -= {'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'}\n"
    lines += "opened = 0\nfor number in range(64):\n    try:\n        os.fstat(number)\n        opened += 1\n"
    lines += "    except OSError:\n        pass\nreturn 100 * len(left) + opened"
    assert grade(sandbox, body(lines)) == 4.0  # three pipes, and a second handle of the one for the answer
    listener.close()


# Too much


@pytest.mark.parametrize(
    "lines",
    ["while True: pass", "import time\ntime.sleep(60)", "import os\nos.closerange(0, 9)\nwhile True: pass"],
)
def test_code_that_does_not_end_is_ended(lines: str) -> None:
    with pytest.raises(CodeError, match=r"longer than 0\.5 seconds") as caught:
        grade(Sandbox(Allowance(seconds=0.5)), body(lines))
    assert caught.value.kind == "limit"


def test_code_cannot_shield_itself_from_its_end() -> None:
    lines = "import signal\nfor number in set(signal.Signals) - {9, 19}:\n    signal.signal(number, signal.SIG_IGN)\n"
    with pytest.raises(CodeError, match="longer than"):
        grade(Sandbox(Allowance(seconds=0.5)), body(lines + "while True: pass"))
    assert not [child for child in psutil.Process().children() if "luthier.evaluate.sandbox" in str(child.cmdline())]


@pytest.mark.parametrize(
    "lines",
    [
        "return len(bytearray(10 ** 9))",
        "pieces = []\nwhile True: pieces.append(bytearray(10 ** 7))",
        "import mmap\nreturn len(mmap.mmap(-1, 10 ** 9))",
    ],
)
def test_memory_is_bounded(lines: str) -> None:
    with pytest.raises(CodeError, match=r"MemoryError|Cannot allocate memory"):
        grade(Sandbox(Allowance(memory_bytes=400 * 2**20)), body(lines))


def test_a_bomb_of_processes_does_not_begin(sandbox: Sandbox) -> None:
    with pytest.raises(CodeError, match="PermissionError"):
        grade(sandbox, body("import os\nwhile True: os.fork()"))


@pytest.mark.parametrize("stream", [1, 2])
def test_output_is_bounded(sandbox: Sandbox, stream: int) -> None:
    with pytest.raises(CodeError, match="printed more than 65536 bytes"):
        grade(sandbox, body(f"import os\nwhile True: os.write({stream}, b'x' * 1000)"))


def test_a_forged_answer_is_bounded_too(sandbox: Sandbox) -> None:
    lines = "import os\nfor number in range(3, 9):\n    try:\n        while True: os.write(number, b'[')\n"
    with pytest.raises(CodeError, match="printed more than"):
        grade(sandbox, body(lines + "    except OSError: pass"))


def test_a_file_is_bounded(sandbox: Sandbox) -> None:
    with pytest.raises(CodeError, match=r"OSError.*File too large|SIGXFSZ"):
        grade(sandbox, body("with open('a', 'wb') as file:\n    while True: file.write(b'x' * 10 ** 6)"))


@pytest.mark.parametrize("content", ["b'x' * 10 ** 6", "b''"])
def test_all_files_together_are_bounded(content: str) -> None:
    lines = f"number = 0\nwhile True:\n    number += 1\n    with open(str(number), 'wb') as file: file.write({content})"
    with pytest.raises(CodeError, match="wrote more than 50 files or 20000000 bytes"):
        grade(Sandbox(Allowance(files=50, folder_bytes=20_000_000)), body(lines))


# Of the sandbox itself


def test_nothing_is_left_behind(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    grade(sandbox, body("open('a', 'w').write('x')\nreturn 1"))
    with pytest.raises(CodeError):
        grade(Sandbox(Allowance(seconds=0.5)), body("open('a', 'w').write('x')\nwhile True: pass"))
    assert not list(tmp_path.iterdir())


def test_whoever_stops_waiting_ends_the_process() -> None:
    async def leave() -> None:
        sandbox = Sandbox()
        await sandbox.check("def grade(sample, item): pass")
        task = asyncio.create_task(sandbox.grade(body("while True: pass"), {}, {}))
        while not psutil.Process().children():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert not psutil.Process().children()


def test_only_so_many_run_at_once() -> None:
    async def run() -> tuple[float, ...]:
        sandbox = Sandbox(at_once=1)
        source = body("import time\nbegin = time.time()\ntime.sleep(0.1)\nreturn begin")
        return tuple(sorted(await asyncio.gather(*(sandbox.grade(source, {}, {}) for _ in range(3)))))

    first, second, third = asyncio.run(run())
    assert second - first >= 0.1
    assert third - second >= 0.1


def test_without_seccomp_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    program = sandbox_module.PROGRAM.replace(
        "main()", "from luthier.evaluate.sandbox import confinement; confinement.LIBSECCOMP = 'libnone.so'; main()"
    )
    monkeypatch.setattr(sandbox_module, "PROGRAM", program)
    with pytest.raises(MissingDependencyError, match=r"libnone.so is not installed[\s\S]*libseccomp2"):
        grade(Sandbox(), body("return 1"))


@pytest.mark.parametrize("wall", ["_restrict_files", "_restrict_calls"])
def test_a_wall_that_does_not_hold_is_noticed_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch, wall: str) -> None:
    broken = f"from luthier.evaluate.sandbox import confinement; confinement.{wall} = lambda *_: None; main()"
    monkeypatch.setattr(sandbox_module, "PROGRAM", sandbox_module.PROGRAM.replace("main()", broken))
    with pytest.raises(MissingDependencyError, match="sandbox for Python code does not"):
        grade(Sandbox(), body("return 1"))


def test_another_system_has_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MissingDependencyError, match="no sandbox for Python code on darwin"):
        grade(Sandbox(), body("return 1"))
