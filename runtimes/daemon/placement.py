"""Choose how a language model and real-time work share a machine, by the device of the model, and say why.

On a CPU the system's own scheduler protects the alerts: with a core left to them and a low priority of the language
threads, the 99th percentile of alert latency is that of alerts alone (docs/jobs/serve.md has the table). A token budget
or pauses between layers change nothing visible there. A device that has one queue, such as a GPU, has no such
scheduler; there the daemon's arbiter does it, between layers where the engine can stop, else by the size of steps.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import unknown

Mechanism = Literal["kernel", "layers", "budget"]
NICE = 19  # at 1 thread it costs no tokens; SCHED_IDLE costs 13-19 % of them and protects no better
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Placement:
    """mechanism: kernel: each job has a thread of its own, and the system schedules them; layers, budget: one thread
    runs all jobs of the device, and real-time work runs between layers, or steps are short; threads: of the language
    model on the CPU; nice: priority of these threads; why: for the log."""

    mechanism: Mechanism
    threads: int
    nice: int
    why: str

    def __str__(self) -> str:
        return f"{self.mechanism}, {self.threads} language thread{'s' if self.threads > 1 else ''}: {self.why}"


def choose(device: str, *, divisible: bool, cores: int | None = None, alerts: bool = True) -> Placement:
    """Return the placement of a language model. device: "cpu" or "cuda"; divisible: whether its engine can stop between
    two layers; cores: that this process may use; alerts: whether real-time work shares the machine."""
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    if device == "cpu":
        if not alerts:
            return Placement("kernel", cores, 0, f"no alerts share the {cores} cores of this machine")
        if cores == 1:
            return Placement("kernel", 1, NICE, "one core: the language threads run when the alerts leave it")
        return Placement("kernel", cores - 1, NICE, f"one of {cores} cores is left to the alerts")
    if divisible:
        return Placement("layers", 1, 0, "the engine stops between layers, so real-time work waits for one layer")
    return Placement("budget", 1, 0, "the engine runs a step as a whole, so a step must fit into the slack")


def lower_this_thread(nice: int) -> None:
    """Give this thread, and the threads that it will start, a lower priority. Linux has a priority for each thread; the
    others of the process, such as those that answer requests, keep theirs. A program cannot raise it again."""
    if nice > os.getpriority(os.PRIO_PROCESS, threading.get_native_id()):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
