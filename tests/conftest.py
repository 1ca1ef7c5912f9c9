"""What the tests of the shipped examples share: the list of them, and `--rewrite-golden`.

Being here, this file also puts tests/ on the import path, so that a test can say `from factories import ..`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USER_VARIABLES = ("DATA_PATH", "TOKENIZER_PATH", "MODEL_PATH", "NETWORK_INTERFACE")
"""variables that the examples read: a golden script is what a user gets who has set none"""

EXPERIMENTS = tuple(sorted(ROOT.glob("examples/*/conf/train*.yaml")))
SERVICES = tuple(sorted(ROOT.glob("examples/*/conf/serve*.yaml")))


def name_of(experiment: Path) -> str:
    """`qwen3/train_32b` for `examples/qwen3/conf/train_32b.yaml`."""
    return f"{experiment.parent.parent.name}/{experiment.stem}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write tests/golden/**/*.sh anew; the diff is the review"
    )


def pytest_configure() -> None:
    """A shell ignores both for what it starts in the background, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `experiment` runs once for every experiment YAML of examples/."""
    if "experiment" in metafunc.fixturenames:
        metafunc.parametrize("experiment", EXPERIMENTS, ids=map(name_of, EXPERIMENTS))


@pytest.fixture(autouse=True, scope="session")
def _unset_user_variables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in USER_VARIABLES:
            if name in os.environ:
                patch.delenv(name)
        yield
