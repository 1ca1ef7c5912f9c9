"""Staying with a job: its output and progress as they come, Ctrl-C, and what is to be said at the end."""

from flagscale.errors import LaunchError, RunError
from flagscale.runner.launch.ending import Interrupts, catch_interrupts, tell_to_end
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.local import end_cluster
from flagscale.runner.launch.mirror import fetch_outputs
from flagscale.runner.launch.reach import Look
from flagscale.runner.monitor.logs import check_outputs_left, find_output_tails, follow_lines, tell_unread
from flagscale.runner.monitor.plot import plot_loss
from flagscale.runner.monitor.screen import Screen
from flagscale.runner.monitor.state import RunState, query_run
from flagscale.runner.monitor.summary import summarise


def wait_job(run: RunRef) -> int:
    """Show a run until it has ended; returns its exit code (1 where its watchers were lost).

    Lines that tell of a training's iteration are shown short, with throughput and time left, and of all others what a
    person wants to see. Ctrl-C stops the job and waits for its end, a second one ends it at once.
    """
    with catch_interrupts(run, stops_job=True) as interrupts:
        screen = Screen(run)
        _show_until_end(run, screen, interrupts, stops_job=True)
        try:
            end_cluster(run)
        except LaunchError as error:
            screen.say(str(error))
        return _tell_end(query_run(run), screen)


def watch_job(run: RunRef, num_lines: int | None = None, host: str | None = None) -> None:
    """As `wait_job`, for someone who only looks: Ctrl-C leaves the job as it is.

    num_lines: begin with so many last lines of each host, in place of all
    host: only this one's lines, by its name or its label

    Raises:
        RunError: the output was deleted, or there is no such host.
    """
    check_outputs_left(run)
    with catch_interrupts(run, stops_job=False) as interrupts:
        screen = Screen(run)
        _show_until_end(run, screen, interrupts, stops_job=False, num_lines=num_lines, host=host)
        if interrupts.num:
            screen.say(f"run {run.run_id} goes on; `flagscale logs -f {run.run_id}` follows it again")
        else:
            _tell_end(query_run(run), screen)


def _show_until_end(
    run: RunRef,
    screen: Screen,
    interrupts: Interrupts,
    *,
    stops_job: bool,
    num_lines: int | None = None,
    host: str | None = None,
) -> None:
    told = 0
    look = Look(run, also=fetch_outputs)

    def has_ended() -> bool:
        nonlocal told
        if stops_job and interrupts.num > told:
            told = interrupts.num
            is_first = told == 1
            screen.say(
                f"stopping {run.run_id}; Ctrl-C again ends it at once" if is_first else f"ending {run.run_id} at once"
            )
        is_left = interrupts.num > 0 and not stops_job
        records = look.load_records()
        if stops_job and not told and (cut_off := look.find_cut_off()):
            told = 1
            screen.say(f"ending {run.run_id}: {cut_off}")
            tell_to_end(run, f"the launcher: {cut_off}")
        is_over = not any(record.is_watched for record in records)
        if is_over:
            look.fetch()
        return is_left or is_over

    tell_unread(look.fetch())
    tails = find_output_tails(run, host)
    prefixes = {tail.name: f"{tail.name} | " if len(tails) > 1 else "" for tail in tails}
    with screen.show_bar():
        for tail in tails:
            for line in tail.read_last(num_lines):
                screen.show_line(prefixes[tail.name], line)
        for tail, line in follow_lines(tails, has_ended):
            screen.show_line(prefixes[tail.name], line)


def _tell_end(state: RunState, screen: Screen) -> int:
    run = state.run
    if state.progress is not None:
        try:
            plot_loss(run)
        except RunError as error:
            screen.say(str(error))
    if state.state == "succeeded":
        screen.say(summarise(state))
        return 0
    screen.say(f"run {run.run_id} {state.state}: {state.reason or 'no reason was given'}")
    if state.stacks:
        screen.say(state.stacks)
    return state.exit_code or 1
