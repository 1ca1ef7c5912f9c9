"""A rank's sign of life is a file that its launcher asked for."""

import os
from pathlib import Path

import pytest

from flagscale.env import RANK_DIR
from flagscale.train.readiness import announce_rank_up


def test_the_sign_bears_the_global_rank_and_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANK_DIR, str(tmp_path / "made" / "on the way"))
    monkeypatch.setenv("RANK", "17")
    sign = announce_rank_up()
    assert sign == tmp_path / "made" / "on the way" / "rank_17.up"
    assert sign.read_text() == f"{os.getpid()}\n"
    assert [path.name for path in sign.parent.iterdir()] == ["rank_17.up"]


def test_saying_it_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANK_DIR, str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    assert announce_rank_up() == announce_rank_up() == tmp_path / "rank_0.up"


def test_nobody_asked_so_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RANK_DIR, raising=False)
    monkeypatch.chdir(tmp_path)
    assert announce_rank_up() is None
    assert not list(tmp_path.iterdir())
