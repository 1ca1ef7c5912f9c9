"""The terminal while a job is followed: lines go to standard output, what we say ourselves to standard error.

On a terminal a bar shows iteration, loss, throughput and time left, and every tenth of the way stays as a line above
it. Elsewhere each logged iteration is a line, so that a log file of the launcher tells the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flagscale.runner.launch.folder import RunRef, load_job
from flagscale.runner.monitor.megatron_lines import LineFilter
from flagscale.runner.monitor.progress import (
    NUM_FOR_ETA,
    Iteration,
    find_seq_length,
    format_progress,
    parse_iteration,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

NUM_KEPT = 10
"""How many iterations of a training stay as lines on a terminal."""


class Screen:
    """Owns the terminal while a job is followed."""

    def __init__(self, run: RunRef) -> None:
        job = load_job(run.exp_dir, run.run_id)
        self.seq_length = find_seq_length(job.get("config") or {})
        self.choose: Callable[[str], str | None] = lambda line: line
        if job.get("plan", {}).get("backend") == "megatron":
            self.choose = LineFilter().choose
        self.latest: list[Iteration] = []
        self.bar: tuple[Progress, TaskID] | None = None

    @contextmanager
    def show_bar(self) -> Iterator[None]:
        """A bar below the lines while this holds; nothing where either stream is no terminal."""
        if not (sys.stderr.isatty() and sys.stdout.isatty()):
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            self.bar = progress, progress.add_task("running", total=None)
            try:
                yield
            finally:
                self.bar = None

    def show_line(self, prefix: str, line: str) -> None:
        """prefix: the name of the line's source, where there are several."""
        iteration = parse_iteration(line)
        if iteration is not None:
            self._show_iteration(prefix, iteration)
        elif (text := self.choose(line)) is not None:
            print(f"{prefix}{text}", flush=True)

    def _show_iteration(self, prefix: str, last: Iteration) -> None:
        self.latest = [*self.latest[1 - NUM_FOR_ETA :], last]
        text = format_progress(self.latest, self.seq_length)
        if self.bar is not None:
            progress, task = self.bar
            progress.update(task, completed=last.iteration, total=last.num_iterations, description=text)
            if last.iteration % max(1, last.num_iterations // NUM_KEPT):
                return
        print(f"{prefix}{text}", flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
