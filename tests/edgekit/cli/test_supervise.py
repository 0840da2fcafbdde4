"""Commands that run models end at once, whatever the model does: each attack is shown to work without the parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.store import write_bundle
from edgekit.cli.supervise import Terminated, terminating
from edgekit.importers.onnx import from_onnx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the parent's limits are tested on Linux")
SERVED_SECONDS = 2.0  # from a signal to the end of the command
COMMAND = "from edgekit.cli import main; main()"
UNSUPERVISED = "from edgekit.cli import main; main(supervised=None)"


def number(name, value):
    return numpy_helper.from_array(np.array(value), name)


def graph_of(nodes, stored):
    """A graph of x, of whose nodes the first reads `count`: 3 if all of x is small, `many` if x holds a 1000."""
    choose = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "hundred"], ["is_large"]),
        helper.make_node("Where", ["is_large", "many", "few"], ["count"]),
    ]
    stored = [number("hundred", np.float32(100)), number("few", np.array([3])), *stored]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    graph = helper.make_graph([*choose, *nodes], "g", infos[:1], infos[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def endless():
    """y = x, negated `count` times."""
    values = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("a", TensorProto.FLOAT, ["batch", 2])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Neg", ["a"], ["b"])],
        "body",
        [helper.make_tensor_value_info(*value) for value in values],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 2]),
        ],
    )
    nodes = [
        helper.make_node("Squeeze", ["count"], ["trips"]),
        helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body),
    ]
    return graph_of(nodes, [number("many", np.array([1 << 62])), number("yes", True)])


def large():
    """y = x + the sum of `count` ones, of which many are 40 GB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["ones"]),
        helper.make_node("ReduceSum", ["ones"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return graph_of(nodes, [number("many", np.array([10_000_000_000]))])


@pytest.fixture
def work(tmp_path):
    """A folder with bundles that do no harm with their golden inputs, and inputs with which they do."""
    for name, content in (("endless", endless()), ("large", large())):
        write_bundle(from_onnx(content, name, name), tmp_path / f"{name}.edge")
    np.savez(tmp_path / "small.npz", x=np.ones((1, 2), np.float32))
    np.savez(tmp_path / "bad.npz", x=np.full((1, 2), 1000, np.float32))
    return tmp_path


def start(folder: Path, *arguments: str, code: str = COMMAND) -> subprocess.Popen:
    environment = {**os.environ, "EDGEKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, model: str, inputs: str, *options: str, code: str = COMMAND) -> subprocess.Popen:
    arguments = ["run", f"{model}.edge", "--inputs", inputs, "--outputs", "out.npz", "--runtime", "onnxruntime"]
    return start(folder, *options, *arguments, code=code)


def children(process: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until_it_runs(process: subprocess.Popen, parent: bool) -> int:
    """Wait until the command computes in native code; return the process that does. It has written nothing yet."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        worker = (children(process.pid) or [0])[0] if parent else process.pid
        if worker and "onnxruntime_pybind11" in Path(f"/proc/{worker}/maps").read_text():
            time.sleep(0.7)
            return worker
        time.sleep(0.1)
    raise AssertionError(f"the command does not begin: {process.communicate()}")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_in_an_endless_model(sent, status, work):
    process = run(work, "endless", "bad.npz")
    worker = wait_until_it_runs(process, parent=True)
    told = time.monotonic()
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - told < SERVED_SECONDS
    assert (process.returncode, out, err) == (status, "", "edgekit: stopped\n")
    assert not Path(f"/proc/{worker}").exists()
    assert not (work / "out.npz").exists()


def test_without_the_parent_the_command_does_not_hear_ctrl_c(work):
    process = run(work, "endless", "bad.npz", code=UNSUPERVISED)
    wait_until_it_runs(process, parent=False)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=SERVED_SECONDS)
    process.kill()
    process.communicate()


def test_the_model_gets_no_more_memory_than_is_allowed(work):
    done = run(work, "large", "bad.npz", "--memory-limit", "2GB")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (1, "")
    assert err.startswith("edgekit: onnxruntime cannot run this model")
    assert len(err.splitlines()) == 1
    done = run(work, "large", "small.npz", "--memory-limit", "2GB")
    assert done.communicate(timeout=60)[1] == ""
    assert np.load(work / "out.npz")["y"].tolist() == [[1.0, 1.0]]


def test_the_memory_that_is_free_is_the_limit(tmp_path):
    code = "import resource; from edgekit.cli.supervise import supervise; supervise({}); {}"
    asked = "print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    free = int(start(tmp_path, code=code.format("", asked)).communicate()[0])
    given = int(start(tmp_path, code=code.format(1 << 30, asked)).communicate()[0])
    assert given == 1 << 30
    assert 0 < free < 1 << 50
    status, words = outcome(tmp_path, "supervise(1 << 30); from edgekit.cli import main; x = bytearray(2 << 30)")
    assert status == 1
    assert "MemoryError" in words


def test_a_command_that_is_out_of_memory_says_it_in_one_line(edgekit, monkeypatch):
    import click

    from edgekit import cli

    def fail():
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(cli.edgekit, "get_command", lambda context, name: click.Command(name, callback=fail))
    assert edgekit("run").failed_with(1, "out of memory (Unable to allocate 9 GiB)", "--memory-limit SIZE")


def outcome(folder: Path, code: str) -> tuple[int, str]:
    """The status of a program that supervises itself, and what it wrote to standard error."""
    process = start(folder, code=f"import os, signal, sys, time\nfrom edgekit.cli.supervise import supervise\n{code}")
    err = process.communicate(timeout=30)[1]
    return process.returncode, err


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "was ended by SIGSEGV; the model may be damaged"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "may take 1,073,741,824 bytes of memory, was ended by SIGKILL"),
    ],
)
def test_the_status_is_the_childs_and_a_death_is_explained(end, status, words, tmp_path):
    got, err = outcome(tmp_path, f"supervise(1 << 30); {end}")
    assert got == status
    assert words in err
    assert bool(err) == bool(words)
    if "was ended" in words:
        assert len(err.splitlines()) == 1
        assert err.startswith("edgekit: ")


DROPPED = """
import time
from edgekit.cli.supervise import Terminated, terminating
try:
    with terminating():
        try:
            print('ready', flush=True)
            time.sleep(60)
        except BaseException:
            print('dropped', flush=True)
        {then}
except (KeyboardInterrupt, Terminated) as error:
    print(repr(error))
time.sleep(1.2)  # nothing is raised after the block
"""


@pytest.mark.parametrize(
    ("sent", "raised"), [(signal.SIGINT, "KeyboardInterrupt()"), (signal.SIGTERM, "Terminated('stopped by SIGTERM')")]
)
def test_a_signal_whose_exception_a_library_drops_is_raised_again(sent, raised, tmp_path):
    process = start(tmp_path, code=DROPPED.format(then="time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    assert process.communicate(timeout=30) == (f"dropped\n{raised}\n", "")
    assert process.returncode == 0


def test_what_cleans_up_is_not_interrupted(tmp_path):
    then = "print('end of block', flush=True)"
    code = DROPPED.format(then=then).replace("print('dropped', flush=True)", "time.sleep(1.2); raise")
    process = start(tmp_path, code=code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("Terminated('stopped by SIGTERM')\n", "")


@pytest.mark.parametrize("cause", [Terminated("stopped"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_pythons_c_code_in_place_of_a_signals_is_the_signals(cause):
    """Planted as CPython does it: SystemError, "returned a result with an exception set"."""

    def replaced():
        try:
            os.kill(os.getpid(), signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)
            time.sleep(60)
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error

    with pytest.raises(type(cause)), terminating():
        replaced()
    with pytest.raises(SystemError), terminating():
        raise SystemError("another")


def test_an_error_of_a_library_that_dropped_a_signals_exception_is_the_signals():
    """Planted as numba does it: the compiler's callback drops the exception, and the caller misses its result."""

    def compiled():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        raise RuntimeError("no compiled object yet")

    with pytest.raises(Terminated), terminating():
        compiled()
    with pytest.raises(RuntimeError, match="another"), terminating():
        raise RuntimeError("another")


@pytest.mark.parametrize("signals", [1, 2])
def test_a_child_that_does_not_end_is_killed(signals, tmp_path):
    code = (
        "supervise(1 << 30); signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    process = start(tmp_path, code=f"import signal, time\nfrom edgekit.cli.supervise import supervise\n{code}")
    assert process.stdout.readline() == "ready\n"
    (worker,) = children(process.pid)
    told = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.communicate(timeout=30) == ("", "edgekit: stopped\n")
    assert process.returncode == 130
    assert (time.monotonic() - told < 1.0) == (signals == 2), "the second signal kills at once, the first in a second"
    assert not Path(f"/proc/{worker}").exists()


def test_the_child_does_not_outlive_its_parent(tmp_path):
    code = "from edgekit.cli.supervise import supervise; supervise(1 << 30); print('ready', flush=True)"
    process = start(tmp_path, code=f"{code}; import time; time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    told = time.monotonic()
    process.kill()
    assert process.stdout.read() == ""  # the pipe is closed when the child is gone
    assert time.monotonic() - told < 10
    process.wait()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers")
def test_a_timer_of_the_caller_rings_inside_the_block_and_after_it():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *arguments: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with terminating():
            time.sleep(0.1)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with terminating():
            pass
        time.sleep(0.1)
        assert rung == [1, 1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
