"""Where a job's files lie, as the planner is told it: so that planning looks at no machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flagscale.chips import find_chip
from flagscale.runner.plan.job import BackendTree

FOLDERS = {"megatron": "Megatron-LM", "verl": "verl"}
"""Backend -> its folder below third_party/ and below hardware/<chip>/, of those that can run from a source tree."""


@dataclass(frozen=True)
class Site:
    """The paths that the same installation has on every host.

    root: the project's root, in which a job's processes start
    bin_dir: put before PATH, so that `python` and `torchrun` are the launcher's own; None leaves PATH alone
    sources: backend -> the folder of its fetched source, put on PYTHONPATH
    trees: backend -> chip -> the folder that is patched for this chip, in place of the one in `sources`
    """

    root: str
    bin_dir: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    trees: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def find_tree(self, backend: str, chip: str | None) -> BackendTree | None:
        """The tree of a backend that a process on this chip imports; None where the backend is installed instead.

        chip: a record's name or an alias of it
        """
        record = find_chip(chip) if chip else None
        if record and record.name in self.trees.get(backend, {}):
            return BackendTree(self.trees[backend][record.name], backend, record.name)
        return BackendTree(self.sources[backend], backend) if backend in self.sources else None
