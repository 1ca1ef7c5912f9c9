"""The fixture that makes a private Slurm: `pytest_plugins = ("slurm_fixtures",)` in a test module.

Where there can be none (no root, Debian's packages not installed) the tests are skipped with the reason.
"""

from collections.abc import Iterator

import pytest
from slurm_cluster import Slurm, missing, slurm_up


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes on this machine, for a whole module."""
    if reason := missing():
        pytest.skip(reason)
    with slurm_up(tmp_path_factory.mktemp("slurm") / "s", ("n1", "n2")) as cluster:
        yield cluster
