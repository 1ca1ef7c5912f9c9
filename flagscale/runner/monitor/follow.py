"""Staying with a job until it ends: its output, its progress, and Ctrl-C that stops it."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef, load_job
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.startup import NUM_LAST_LINES, ask_to_end, last_lines, output_start
from flagscale.runner.monitor.logs import find_output_tails, follow_lines
from flagscale.runner.monitor.plot import plot_loss
from flagscale.runner.monitor.progress import Iteration, find_seq_length, format_progress, parse_iteration
from flagscale.runner.monitor.state import RunState, query_run
from flagscale.runner.monitor.summary import summarise


def wait_job(run: RunRef, quiet: bool = False) -> int:
    """Show a run until it has ended; returns its exit code (1 where its watchers were lost).

    Lines that tell of a training's iteration are shown short, with throughput and time left; all others as they are,
    or not at all if `quiet`. Ctrl-C stops the job and waits for its end, a second one ends it at once.
    """
    num_interrupts = 0
    show = _Screen(run, quiet)
    tails = find_output_tails(run)
    while True:
        try:
            with show.status():
                for tail, line in follow_lines(tails, lambda: not any(item.is_watched for item in load_records(run))):
                    show.line(f"{tail.name} | " if len(tails) > 1 else "", line)
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            ask_to_end(load_records(run), signal.SIGTERM if num_interrupts == 1 else signal.SIGUSR1)
            is_first = num_interrupts == 1
            show.say(
                f"stopping {run.run_id}; Ctrl-C again ends it at once" if is_first else f"ending {run.run_id} at once"
            )
    return _close(run, query_run(run), show)


def _close(run: RunRef, state: RunState, show: "_Screen") -> int:
    if state.progress is not None:
        try:
            plot_loss(run)
        except RunError as error:
            show.say(str(error))
    if state.state == "succeeded":
        show.say(summarise(state))
        return 0
    if show.quiet and state.state == "failed":
        show.say("\n".join(_last_words(run)))
    show.say(f"run {run.run_id} {state.state}: {state.reason or 'no reason was given'}")
    return state.exit_code or 1


def _last_words(run: RunRef) -> Iterator[str]:
    from pathlib import Path

    for record in load_records(run):
        end = record.find("job_ended")
        if end and end["outcome"] == "failed":
            source = Path(end["source"] or run.output_path(record.label))
            start = output_start(record) if source == run.output_path(record.label) else 0
            yield f"last lines of {source}:"
            yield from (f"  {line}" for line in last_lines(source, NUM_LAST_LINES, start))


class _Screen:
    """Owns the terminal while a job is followed: lines go to standard output, what we say to standard error."""

    def __init__(self, run: RunRef, quiet: bool) -> None:
        self.quiet = quiet
        self.seq_length = find_seq_length(load_job(run.exp_dir, run.run_id).get("config") or {})
        self.iterations: list[Iteration] = []
        self.update: Callable[[str], None] = lambda _text: None

    @contextmanager
    def status(self) -> Iterator[None]:
        if not (sys.stderr.isatty() and sys.stdout.isatty()):
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status("waiting for output") as status:
            self.update = lambda text: status.update(text)
            yield
        self.update = lambda _text: None

    def line(self, prefix: str, text: str) -> None:
        iteration = parse_iteration(text)
        if iteration is not None:
            self.iterations.append(iteration)
            text = format_progress(self.iterations, self.seq_length)
            self.update(text)
        elif self.quiet:
            return
        print(f"{prefix}{text}", flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
