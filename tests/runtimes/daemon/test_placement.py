"""Which mechanism protects the alerts, and priorities of threads that others keep."""

import os
import subprocess
import sys
import textwrap

import pytest

from edgekit.errors import EdgekitError
from runtimes.daemon.placement import NICE, choose


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", {"divisible": True, "cores": 2}, ("kernel", 1, NICE)),
        ("cpu", {"divisible": False, "cores": 8}, ("kernel", 7, NICE)),
        ("cpu", {"divisible": True, "cores": 1}, ("kernel", 1, NICE)),
        ("cpu", {"divisible": True, "cores": 4, "alerts": False}, ("kernel", 4, 0)),
        ("cuda", {"divisible": True, "cores": 4}, ("layers", 1, 0)),
        ("cuda", {"divisible": False, "cores": 4}, ("budget", 1, 0)),
    ],
)
def test_the_device_and_the_engine_decide(device, options, expected):
    found = choose(device, **options)
    assert (found.mechanism, found.threads, found.nice) == expected
    assert found.why in str(found)
    assert str(found).startswith(expected[0])


def test_an_unknown_device_is_refused():
    with pytest.raises(EdgekitError, match="unknown device 'tpu'; expected one of: cpu, cuda"):
        choose("tpu", divisible=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="priorities of threads are Linux's")
def test_only_this_thread_and_those_that_it_starts_are_lowered():
    script = textwrap.dedent("""
        import os, threading
        from runtimes.daemon.placement import lower_this_thread
        def nice():
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        def low():
            lower_this_thread(19)
            lower_this_thread(5)  # no program can raise it again
            found.append(nice())
            child = threading.Thread(target=lambda: found.append(nice()))
            child.start()
            child.join()
        found = []
        thread = threading.Thread(target=low)
        thread.start()
        thread.join()
        print(*found, nice())
    """)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert answer.stdout.split() == ["19", "19", str(own)]
