"""Asking for a run's end, on purpose or by Ctrl-C.

Python raises KeyboardInterrupt at whatever line it happens to be, also in the middle of reacting to an earlier one. So
whoever waits for a job takes the signal by a handler: it asks the agents at once, counts, and the waiting code looks at
the count when it comes round. The price is a second of delay at most before a person reads what was done.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.notice import Notice, write_notice
from flagscale.runner.launch.procs import Proc, send_signal
from flagscale.runner.launch.record import HostRecord, load_records


def tell_to_end(run: RunRef, by: str, force: bool = False) -> None:
    """Ask every host of a run to end it: agents of this machine by signal, the others through the run's folder."""
    if run.has_notice:
        write_notice(run.notice_path, Notice("", f"stopped by {by}", force))
    ask_to_end(load_records(run), signal.SIGUSR1 if force else signal.SIGTERM)


def ask_to_end(records: tuple[HostRecord, ...], signum: int = signal.SIGTERM) -> None:
    """Ask every agent of this machine that lives; a guard passes it on. SIGUSR1 asks for an end without grace."""
    for record in records:
        event = record.find("agent_started")
        if event is None or not record.is_here or not record.is_alive:
            continue
        for pid, start_time in ((event["pid"], event["start_time"]), (event["guard"], event["guard_start_time"])):
            if pid and start_time:
                send_signal(Proc(pid, 0, start_time, False), signum)


@dataclass(slots=True)
class Interrupts:
    """How often Ctrl-C came since the waiting began."""

    num: int = 0


@contextmanager
def catch_interrupts(run: RunRef, stops_job: bool) -> Iterator[Interrupts]:
    """While this holds, Ctrl-C raises nothing: it is counted.

    stops_job: the first asks the run's agents to end the job, each later one to end it without grace

    Where Ctrl-C is ignored (a shell's `&` without job control) it stays so; only the main thread can take signals.
    """
    caught = Interrupts()

    def react(_signum: int, _frame: FrameType | None) -> None:
        caught.num += 1
        if stops_job:
            tell_to_end(run, "Ctrl-C", force=caught.num > 1)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield caught
        return
    before = signal.signal(signal.SIGINT, react)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
