"""Ending a service: in order where its controller answers, and all that is left of it in any case."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flagscale.errors import RunError
from flagscale.runner.launch.folder import find_current
from flagscale.runner.launch.record import load_records
from flagscale.runner.monitor.stop import stop_run
from flagscale.serve.control import NoControllerError, ask_controller
from flagscale.serve.folder import is_run_alive, list_replica_runs
from flagscale.serve.replicas import end_replica

ORDER_LIMIT_S = 150.0
"""What a controller is given to drain and to end its replicas, seconds."""
POLL_S = 0.2
MOST_THREADS = 32


def stop_service(exp_dir: Path, force: bool = False) -> bool:
    """End a service, its controller dead or alive; returns whether anything of it lived.

    force: at once, without waiting for requests

    Raises:
        RunError: something of it cannot be reached; all else has been ended.
    """
    run = find_current(exp_dir)
    is_alive = run is not None and is_run_alive(run)
    if run is not None and is_alive and not force:
        try:
            ask_controller(exp_dir, "/stop", {})
            deadline = time.monotonic() + ORDER_LIMIT_S
            while load_records(run)[0].is_alive and time.monotonic() < deadline:  # of hosts, the one that answers
                time.sleep(POLL_S)
        except NoControllerError:
            pass  # it is dead or stuck: its run is ended without it
    if run is not None:
        stop_run(run, force)
    left = [replica for replica in list_replica_runs(exp_dir) if is_run_alive(replica) or replica.remotes]
    if left:
        with ThreadPoolExecutor(min(MOST_THREADS, len(left))) as pool:
            faults = [fault for fault in pool.map(lambda replica: end_replica(replica, force), left) if fault]
        if faults:
            raise RunError("\n".join(faults))
    return is_alive or bool(left)
