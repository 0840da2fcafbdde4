"""What happens around a command while it works: a second process, a kill, a full disk, a folder that cannot be written,
an unusual user, locale, umask or clock.

Two invariants hold. The output is whole or absent, never mixed. A failure is one line that begins with "edgekit:".
`pack` is tested in every run; the commands that take seconds are tested with -m faults.
"""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from tests.toys import toy_bundle

ROOT = Path(__file__).resolve().parents[1]
EDGEKIT = [sys.executable, "-c", "from edgekit.cli import main; main()"]
RECIPE = '[[pass]]\nname = "cluster"\nbits = 4\nepochs = 0\n'
ON_DATA = ["--data", "data.npz", "--batch", "1", "--objective", "size", "--max-loss", "5", "--runtime", "torch"]
COMMANDS = {  # without the name of the output, which comes last
    "pack": ["pack", "toy.edge", "--force", "-o"],
    "compress": ["compress", "toy.edge", *ON_DATA, "--recipe", "recipe.toml", "--force", "-o"],
    "search": ["compress", "toy.edge", *ON_DATA, "--auto", "--trials", "2", "--force", "-o"],
    "export": ["export", "toy.edge", "--to", "c", "--force", "-o"],
}
SUFFIX = {"pack": ".edgepack", "compress": ".edge", "search": ".edge", "export": ".c"}
KILLS = 6  # moments at which each command is killed
EVERY = [pytest.param(name, marks=() if name == "pack" else pytest.mark.faults, id=name) for name in COMMANDS]


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with a model, data and a recipe."""
    write_bundle(toy_bundle(), tmp_path / "toy.edge")
    rng = np.random.default_rng(0)
    arrays = {"light_curve": rng.normal(size=(96, 12, 2)).astype(np.float32), "labels": rng.integers(0, 5, 96)}
    np.savez(tmp_path / "data.npz", split=(np.arange(96) >= 48).astype(np.int8), **arrays)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def environment(work: Path, **changed: str) -> dict[str, str]:
    return {
        **os.environ,
        "EDGEKIT_CACHE": str(work / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **changed,
    }


def start(work: Path, command: str, output: str = "out", *, before=(), **options) -> subprocess.Popen[str]:
    """Start the command. before: a program that runs it, with its arguments; options: those of Popen."""
    options.setdefault("env", environment(work))
    arguments = [*before, *EDGEKIT, *COMMANDS[command], output + SUFFIX[command]]
    return subprocess.Popen(
        arguments,
        cwd=work,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def finished(child: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what the command printed on standard error."""
    _, errors = child.communicate(timeout=400)
    assert "Traceback" not in errors, errors
    if child.returncode not in (0, -signal.SIGKILL):
        assert child.returncode == 1, errors
        assert errors.splitlines()[-1].startswith("edgekit: "), errors
        assert sum(line.startswith("edgekit: ") for line in errors.splitlines()) == 1, errors
    return child.returncode, errors


def is_whole(path: Path) -> bool:
    """Whether the output exists. An output that exists and is not whole fails the test."""
    if not path.exists():
        return False
    if path.suffix == ".c":
        subprocess.run([sys.executable, "verify.py"], cwd=path, check=True, capture_output=True)
    else:
        bundle = open_bundle(path)  # checks every SHA-256
        inputs, outputs = bundle.golden()
        assert inputs
        assert outputs
    return True


def test_the_check_of_wholeness_sees_a_mixture(work):
    """Planted damage: files of two bundles in one folder."""
    other = write_bundle(toy_bundle("palette"), work / "other.edge")
    shutil.copy(other.path / "weights.safetensors", work / "toy.edge")
    with pytest.raises(EdgekitError, match="SHA-256"):
        is_whole(work / "toy.edge")


@pytest.mark.parametrize("command", EVERY)
def test_two_processes_with_one_output_and_one_cache(work, command):
    """Of two searches the second one is refused, because they would give up each other's trials."""
    ended = [finished(child) for child in [start(work, command) for _ in range(2)]]
    refused = [errors for status, errors in ended if status]
    assert len(refused) == (command == "search"), refused
    assert all("another process runs this search" in errors for errors in refused)
    assert is_whole(work / f"out{SUFFIX[command]}")
    assert not [path.name for path in work.iterdir() if path.name.startswith(".out")]
    assert finished(start(work, command, "again"))[0] == 0  # with the cache that both have written
    assert is_whole(work / f"again{SUFFIX[command]}")


@pytest.mark.parametrize("command", EVERY)
def test_a_killed_command_leaves_a_whole_output_or_none(work, command):
    started = time.monotonic()
    assert finished(start(work, command, "alone", env=environment(work, EDGEKIT_CACHE=str(work / "other"))))[0] == 0
    lasts = time.monotonic() - started
    rng = np.random.default_rng(0)
    killed = 0
    for moment in sorted(rng.uniform(0.2, 1.0, KILLS)):
        child = start(work, command)
        try:
            child.wait(moment * lasts)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its children, such as the compiler, too
            killed += 1
        finished(child)
        is_whole(work / f"out{SUFFIX[command]}")
    assert killed, "no kill came before the end"
    assert finished(start(work, command))[0] == 0  # with what the killed ones have left in the cache
    assert is_whole(work / f"out{SUFFIX[command]}")


def in_a_mount(work: Path, mount: str, command: str, output: str) -> tuple[int, str, str]:
    """Run the command in a name space of its own in which `mount` was done before; also list the folder `disk`."""
    (work / "disk").mkdir(exist_ok=True)
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=work).returncode:
        pytest.skip(f"no file system can be mounted here: unshare -rm {mount} fails")
    call = shlex.join([*EDGEKIT, *COMMANDS[command], output + SUFFIX[command]])
    # the files have to be listed in the name space: the file system is gone after it
    script = f"{mount} && {call}; status=$?; find disk -type f -o -name '.*' | sort; exit $status"
    child = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=work, env=environment(work), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    listed, errors = child.communicate(timeout=400)
    assert "Traceback" not in errors, errors
    return child.returncode, errors, listed


@pytest.mark.parametrize("command", EVERY)
def test_a_full_disk_under_the_output(work, command):
    status, errors, listed = in_a_mount(work, "mount -t tmpfs -o size=8k none disk", command, "disk/out")
    assert status == 1, errors
    assert "No space left on device" in errors.splitlines()[-1], errors
    assert not [line for line in listed.splitlines() if "disk/" in line], "something was left on the full disk"


@pytest.mark.parametrize("command", EVERY)
def test_an_output_folder_that_cannot_be_written(work, command):
    mount = "mount --bind disk disk && mount -o remount,bind,ro disk"
    status, errors, listed = in_a_mount(work, mount, command, "disk/out")
    assert status == 1, errors
    assert errors.splitlines()[-1].startswith("edgekit: "), errors
    assert "Read-only file system" in errors.splitlines()[-1], errors
    assert not [line for line in listed.splitlines() if "disk/" in line]


@pytest.mark.parametrize("command", [pytest.param(name, marks=pytest.mark.faults) for name in ("compress", "export")])
def test_a_cache_that_cannot_be_written(work, command):
    """A command that needs the cache names it and the remedy."""
    (work / "cache").mkdir(mode=0o700)
    mount = "mount --bind cache cache && mount -o remount,bind,ro cache"
    status, errors, _ = in_a_mount(work, mount, command, "out")
    if status:
        assert "EDGEKIT_CACHE" in errors.splitlines()[-1], errors
        assert not (work / f"out{SUFFIX[command]}").exists()
    else:
        assert is_whole(work / f"out{SUFFIX[command]}")


SETTINGS = {  # environment variables; None removes one
    "no home": {"HOME": None, "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None},
    "plain locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "far time zone": {"TZ": "Pacific/Kiritimati"},
    "no temporary folder named": {"TMPDIR": None},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("command", EVERY)
def test_environments(work, command, setting):
    """The name of the output has a letter beyond ASCII, which the C locale cannot print."""
    changed = environment(work) | {name: value for name, value in SETTINGS[setting].items() if value is not None}
    for name, value in SETTINGS[setting].items():
        if value is None:
            changed.pop(name, None)
    status, errors = finished(start(work, command, "größe", env=changed))
    assert status == 0, errors
    assert is_whole(work / f"größe{SUFFIX[command]}")


@pytest.mark.parametrize("umask", [0o077, 0o000], ids=["077", "000"])
@pytest.mark.parametrize("command", EVERY)
def test_umasks(work, command, umask):
    """The output follows the umask. The cache is for one user whatever the umask is."""
    status, errors = finished(start(work, command, umask=umask))
    assert status == 0, errors
    output = work / f"out{SUFFIX[command]}"
    assert is_whole(output)
    written = [output, *output.rglob("*")] if output.is_dir() else [output]
    if umask == 0o077:
        assert not [path for path in written if path.stat().st_mode & 0o077]
    kept = [work / "cache", *(work / "cache").rglob("*")] if (work / "cache").exists() else []
    assert not [path for path in kept if stat.S_IMODE(path.stat().st_mode) & 0o077]


@pytest.mark.parametrize("command", EVERY)
def test_a_user_without_roots_rights(work, command):
    """A name space of its own makes the command's user number 1000 and takes all capabilities from it."""
    user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    told = "import os; print(os.getuid()); open('locked/file', 'w')"
    (work / "locked").mkdir(mode=0o500)
    if shutil.which("unshare") is None or subprocess.run([*user, "true"]).returncode:
        pytest.skip(f"no user name space can be made here: {shlex.join(user)} fails")
    probe = subprocess.run([*user, sys.executable, "-c", told], cwd=work, capture_output=True, text=True)
    assert probe.stdout == "1000\n"
    assert "PermissionError" in probe.stderr  # root would have written the file
    status, errors = finished(start(work, command, before=user))
    assert status == 0, errors
    assert is_whole(work / f"out{SUFFIX[command]}")
    status, errors = finished(start(work, command, "locked/out", before=user))
    assert status == 1
    assert "Permission denied" in errors.splitlines()[-1]
    assert not list((work / "locked").iterdir())


@pytest.mark.faults
@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumped_between_two_runs(work, years):
    """States whose times lie in the future or far in the past are used, and give the same bytes."""
    assert finished(start(work, "compress"))[0] == 0
    states = list((work / "cache").rglob("*"))
    assert states
    for path in states:
        moved = path.stat().st_mtime + years * 365 * 86400
        os.utime(path, (moved, moved))
    assert finished(start(work, "compress", "again"))[0] == 0
    first, second = (open_bundle(work / f"{name}.edge").contents for name in ("out", "again"))
    assert first["weights.safetensors"] == second["weights.safetensors"]
    assert first["golden.npz"] == second["golden.npz"]
