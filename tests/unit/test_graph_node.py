"""A replica of a node without Ray around it: how its class is made and called, and what is said when it cannot be."""

import asyncio
import threading
from pathlib import Path

import pytest
from graphs import write_models

from flagscale.serve.graph.node import Node, NodeStartError

MODELS = """
import asyncio, threading
from neighbour import NAME

class Plain:
    running = 0
    def forward(self, x, *, y=0):
        Plain.running += 1
        assert Plain.running == 1
        Plain.running -= 1
        return NAME, x + y, threading.current_thread().name

class Coroutine:
    def __init__(self):
        self.met = 0
    async def forward(self):
        self.met += 1
        while self.met < 3:
            await asyncio.sleep(0)
        return self.met

class Fails:
    def __init__(self):
        self.load()
    def load(self):
        raise RuntimeError("no weights\\nmore")
    def forward(self): ...

class Without:
    pass
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("NAME = 'next door'")
    return str(write_models(tmp_path, MODELS))


def test_a_plain_forward_is_called_one_at_a_time_beside_the_loop(models: str) -> None:
    async def run() -> list[tuple[str, int, str]]:
        made = Node(models, "Plain")
        return await asyncio.gather(*(made.forward(number, y=1) for number in range(20)))

    found = asyncio.run(run())
    assert [(name, number) for name, number, _ in found] == [("next door", number + 1) for number in range(20)]
    assert {thread for *_, thread in found}.isdisjoint({threading.main_thread().name})


def test_coroutines_run_at_the_same_time(models: str) -> None:
    async def run() -> list[int]:
        made = Node(models, "Coroutine")
        return await asyncio.wait_for(asyncio.gather(*(made.forward() for _ in range(3))), 20)

    assert asyncio.run(run()) == [3, 3, 3]


def test_what_forward_raises_reaches_the_caller_and_the_log(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError):
        asyncio.run(Node(models, "Plain").forward("a", y=1))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (MODELS, "Fails", "models.py:26: RuntimeError: no weights"),
        (MODELS, "Without", "models.py: AttributeError: 'Without' object has no attribute 'forward'"),
        (MODELS, "Missing", "models.py: AttributeError: "),
        ("\n\nimport not_there", "It", "models.py:3: ModuleNotFoundError: No module named 'not_there'"),
        ("class It\n", "It", "models.py:1: SyntaxError: expected ':'"),
    ],
)
def test_why_a_class_cannot_be_made_is_one_line(
    text: str, name: str, told: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(models).write_text(text)
    with pytest.raises(NodeStartError) as caught:
        Node(models, name)
    folder = str(Path(models).parent)
    assert str(caught.value).startswith(f"{folder}/{told}")
    assert "\n" not in str(caught.value)
    assert "Traceback" in capsys.readouterr().err
