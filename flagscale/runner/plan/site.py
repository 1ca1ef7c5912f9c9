"""Where a job's files lie, as the planner is told it: so that planning looks at no machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """The paths that the same installation has on every host.

    root: the project's root, in which a job's processes start
    bin_dir: put before PATH, so that `python` and `torchrun` are the launcher's own; None leaves PATH alone
    sources: backend -> the folder of its fetched source, put on PYTHONPATH
    """

    root: str
    bin_dir: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
