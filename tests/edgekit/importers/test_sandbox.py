"""A confined process can do nothing to the machine: each deed is tried in Python and in native code, and is shown to
work without the sandbox."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError
from edgekit.importers import sandbox
from edgekit.importers.confine import confine

LINUX = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
PRELUDE = """
import ctypes, os, socket, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def native(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "native")
"""
# code that tries something with `target`, a path or a port, and raises OSError if it may not
DEEDS = {
    "a socket": "socket.create_connection(('127.0.0.1', int(target)))",
    "a socket, native": "native(libc.socket(2, 1, 0))",
    "a program": "subprocess.run(['/bin/true'], check=True)",
    "a program, native": "native(libc.execve(b'/bin/true', (ctypes.c_char_p * 2)(b'x', None), None))",
    "a shell": "sys.exit(os.system('true'))",
    "a fork, native": "pid = libc.fork(); pid or os._exit(0); native(pid)",
    "a new file": "open(target + '.new', 'w')",
    "a new file, native": "native(libc.open(target.encode() + b'.new', 0o101, 0o600))",
    "a file": "open(target, 'a')",
    "a file, native": "native(libc.open(target.encode(), 1))",
    "truncation, native": "native(libc.truncate(target.encode(), ctypes.c_long(0)))",
    "deletion": "os.remove(target)",
    "deletion, native": "native(libc.unlink(target.encode()))",
    "a mode, native": "native(libc.chmod(target.encode(), 0o777))",
    "a link, native": "native(libc.symlink(b'/etc', target.encode() + b'.link'))",
    "a folder, native": "native(libc.mkdir(target.encode() + b'.d', 0o700))",
    "renaming, native": "native(libc.rename(target.encode(), target.encode() + b'.moved'))",
    "a signal, native": "native(libc.kill(os.getppid(), 0))",
    "a queued signal, native": "native(libc.sigqueue(os.getppid(), 0, None))",
    "the owner of a file's signals": "import fcntl; fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "the limits of another process, native": "native(libc.prlimit(os.getppid(), 7, None, None))",
    "truncation of a file opened for reading, native": "native(libc.open(target.encode(), 0o1000))",
    "memory that is a file": "os.memfd_create('x')",
    "a pair of sockets, native": "native(libc.socketpair(1, 1, 0, (ctypes.c_int * 2)()))",
    "the clock, native": "native(libc.adjtimex(ctypes.create_string_buffer(1024)))",
    "a file through a link": "os.symlink(target, 'link'); open('link', 'w')",
}


def tried(deed: str, target: str, scratch: Path, *, confined: bool, layers: str = "") -> str:
    """Try the deed in a process, confined or not; return 'done', or the name of the error."""
    code = (
        textwrap.dedent(f"""
        {{prelude}}
        from pathlib import Path
        from edgekit.importers import confine
        target = sys.argv[1]
        {layers}
        if {confined}:
            confine.confine(Path('.'), memory=4 << 30, seconds=20, file_size=1 << 20)
        try:
            {{deed}}
        except (OSError, RuntimeError) as error:
            print(type(error).__name__)
        else:
            print("done")
        """)
        .replace("{prelude}", PRELUDE)
        .replace("{deed}", deed)
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target], cwd=scratch, capture_output=True, text=True, timeout=60, check=False
    )
    if not confined and not done.stdout and done.returncode == 0:
        return "done"  # it has become another program, or has ended the process with status 0
    return done.stdout.strip() or f"{done.returncode}: {done.stderr[-300:]}"


@pytest.fixture
def target(tmp_path, request):
    """A file with text in a folder of its own, or the port of a server."""
    if "socket" in request.node.name:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield str(server.getsockname()[1])
            return
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "file").write_text("text")
    yield str(folder / "file")


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.skipif(not LINUX, reason="native code is confined on Linux only")
@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
def test_a_confined_process_may_not(deed, target, scratch):
    before = sorted(Path(target).parent.iterdir()) if not target.isdigit() else []
    assert tried(deed, target, scratch, confined=True) == "PermissionError"
    if not target.isdigit():
        assert sorted(Path(target).parent.iterdir()) == before
        assert Path(target).read_text() == "text"


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
def test_without_the_sandbox_the_deed_is_done(deed, target, scratch):
    assert tried(deed, target, scratch, confined=False) == "done"


WITHOUT_KERNEL = "confine._landlock = confine._seccomp = lambda *arguments: False"


WORDS = ("socket", "signal", "limits", "trunc", "memory", "clock")
SECCOMP = [name for name in DEEDS if any(word in name for word in WORDS)]


@pytest.mark.skipif(not LINUX, reason="native code is confined on Linux only")
@pytest.mark.parametrize("name", SECCOMP)
def test_seccomp_alone_refuses_what_older_versions_of_landlock_do_not_know(name, target, scratch):
    without = "confine._landlock = lambda *arguments: False; confine.refusing = lambda folder: lambda *event: None"
    assert tried(DEEDS[name], target, scratch, confined=True, layers=without) == "PermissionError"
    if not target.isdigit():
        assert Path(target).read_text() == "text"


BY_KERNEL = ("native", "owner", "memory")  # deeds that the audit hook does not see


@pytest.mark.parametrize("name", [name for name in DEEDS if not any(word in name for word in BY_KERNEL)])
def test_the_audit_layer_alone_refuses_what_python_does(name, target, scratch):
    assert tried(DEEDS[name], target, scratch, confined=True, layers=WITHOUT_KERNEL) == "PermissionError"


@pytest.mark.skipif(not LINUX, reason="the twin of the kernel's layers")
def test_the_audit_layer_does_not_see_native_code(target, scratch):
    assert tried(DEEDS["a file, native"], target, scratch, confined=True, layers=WITHOUT_KERNEL) == "done"


def test_a_confined_process_may_write_in_its_folder_and_start_threads(scratch):
    deed = (
        "import threading; open('a', 'w').write('x'); os.mkdir('d'); os.rename('a', 'd/b'); open(os.devnull, 'w'); "
        "thread = threading.Thread(target=lambda: open('c', 'w')); thread.start(); thread.join(); os.stat('c')"
    )
    assert tried(deed, "", scratch, confined=True) == "done"
    assert (scratch / "d" / "b").read_text() == "x"


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("bytearray(5 << 30)", "MemoryError"),
        ("open('a', 'wb').write(bytes(2 << 20))", "-25"),
        ("while True: pass", "-24"),
    ],
)
def test_limits(deed, words, scratch):
    code = "from pathlib import Path\nfrom edgekit.importers.confine import confine\n"
    code += f"confine(Path('.'), memory=4 << 30, seconds=1, file_size=1 << 20)\n{deed}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=60, check=False)
    assert words in f"{done.returncode} {done.stderr}" or (words == "-25" and "File too large" in done.stderr)


def test_the_layers_of_this_machine_are_told(scratch):
    code = "from pathlib import Path\nfrom edgekit.importers.confine import confine\n"
    code += "print(*confine(Path('.'), memory=4 << 30, seconds=1, file_size=1 << 20))"
    done = subprocess.run([sys.executable, "-c", code], cwd=scratch, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "limits"
    assert done.stdout.split()[-1] == "audit"
    assert confine.__doc__


@pytest.fixture
def function(tmp_path, monkeypatch):
    """function(body): the name of a function with this body, which a confined process can import."""
    package = Path(sandbox.__file__).parents[2]

    def write(body):
        (tmp_path / "deeds.py").write_text(
            "import os, signal, sys, time\nfrom edgekit.errors import EdgekitError\n"
            f"from edgekit.importers import sandbox\ndef deed(content, source):\n{textwrap.indent(body, '    ')}\n"
        )
        import edgekit

        (tmp_path / "edgekit").symlink_to(package / "edgekit") if not (tmp_path / "edgekit").exists() else None
        monkeypatch.setattr(edgekit, "__file__", str(tmp_path / "edgekit" / "__init__.py"))
        return "deeds:deed"

    return write


def test_bytes_go_in_and_come_out(function):
    assert sandbox.run(function("print('noise'); return source.encode() + content[::-1]"), b"abc", "x: ") == b"x: cba"


def test_it_sees_none_of_the_users_environment(function, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = sandbox.run(function("return repr(dict(os.environ)).encode()"), b"", "x").decode()
    assert "secret" not in found
    assert "'HOME': '/" in found
    assert str(Path.home()) + "'" not in found


def test_a_confined_process_starts_no_second_one(function):
    body = "return content or sandbox.run('deeds:deed', b'inner', source)"
    assert sandbox.run(function(body), b"", "x") == b"inner"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise EdgekitError(f'{source}: odd')", "^x.onnx: odd$"),
        ("raise ValueError('a\\nb')", "^x.onnx: the model cannot be opened: ValueError: a b$"),
        ("sys.exit(7)", "SystemExit"),
        ("os._exit(7)", "exit status 7"),
        ("while True: pass", "more than 1 s of CPU time.*--time-limit"),
        ("time.sleep(100)", "more than 1 s"),
        ("return bytes(6 << 30)", "out of memory, with a limit of 4,563,402,752 bytes.*--read-limit"),
        ("import ctypes; ctypes.string_at(0)", "was ended by signal 11"),
        (
            "sys.stdout.flush(); os.write(2, bytes(300 << 20)); os.write(2, bytes(300 << 20)); return b''",
            "File too large",
        ),
    ],
)
def test_every_end_is_one_line(body, words, function):
    with pytest.raises(EdgekitError, match=words) as caught:
        sandbox.run(function(body), b"", "x.onnx", seconds=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "²", "9" * 5000])
def test_a_time_limit_that_is_none(text, monkeypatch):
    monkeypatch.setenv(sandbox.VARIABLE, text)
    with pytest.raises(EdgekitError, match="expected a number of seconds"):
        sandbox.time_limit()
