"""What a training process checks before it imports a backend, and how it speaks when something is wrong."""

import importlib
import json
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flagscale.env import CHIP
from flagscale.errors import SourceError, UserError
from flagscale.train import backend, validate
from flagscale.train.train_gpt import REFUSED, check_scope


@pytest.fixture
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interpreter whose path holds no Megatron, whatever this one's holds."""
    clean = [folder for folder in sys.path if not (Path(folder or ".") / "megatron").is_dir()]
    monkeypatch.setattr(sys, "path", clean)
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.path_importer_cache.clear()


def plant(folder: Path, version: str | None = "0 19 2", training: bool = True) -> None:
    (folder / "megatron" / "core").mkdir(parents=True)
    if version:
        numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split(), strict=True)
        lines = [f"{name} = {number}" for name, number in numbers]
        (folder / "megatron" / "core" / "package_info.py").write_text(
            "\n".join([*lines, "raise SystemExit('executed')"])
        )
    if training:
        (folder / "megatron" / "training").mkdir()
        (folder / "megatron" / "training" / "__init__.py").touch()


@pytest.mark.usefixtures("no_megatron")
@pytest.mark.parametrize("version", ["0.19.2", "0.20.0", "1.0.13"])
def test_the_version_is_read_without_importing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    plant(tmp_path, version.replace(".", " "))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert backend.megatron_version() == version
    assert "megatron" not in sys.modules


@pytest.mark.usefixtures("no_megatron")
@pytest.mark.parametrize("there", [{}, {"training": False}, {"version": None}])
def test_a_megatron_that_is_none_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, None]
) -> None:
    if there:
        plant(tmp_path, **there)  # type: ignore[arg-type]
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SourceError, match="flagscale source fetch megatron"):
        backend.megatron_version()


@pytest.mark.parametrize(
    ("word", "name"), [(None, "NVIDIA"), ("cpu", "Generic_CPU"), ("a800", "NVIDIA"), ("Generic_CPU", "Generic_CPU")]
)
def test_the_job_s_chip_is_the_launcher_s_word(monkeypatch: pytest.MonkeyPatch, word: str | None, name: str) -> None:
    monkeypatch.delenv(CHIP, raising=False)
    if word:
        monkeypatch.setenv(CHIP, word)
    assert backend.chip_of_this_job().name == name


def test_a_chip_that_is_none_gets_its_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHIP, "A1000")
    with pytest.raises(UserError, match=r"FLAGSCALE_CHIP=A1000: no such chip; there are .*; did you mean `A100`\?"):
        backend.chip_of_this_job()


FAILING = """
def fail(kind):
    left, right, table = 3, 4, {}
    if kind == "bare assertion":
        assert left * 2 == right
    if kind == "spoken assertion":
        assert left == right, "three is not four"
    if kind == "missing key":
        print(table["layers"])
    raise ValueError("said by itself")
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bare assertion", "`assert left * 2 == right` does not hold (Megatron, failing.py:5)"),
        ("spoken assertion", "three is not four (Megatron, failing.py:7)"),
        ("missing key", "KeyError('layers') in `print(table[\"layers\"])` (Megatron, failing.py:9)"),
        ("", "said by itself (Megatron, failing.py:10)"),
    ],
)
def test_what_megatron_meant_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(str(tmp_path))
    failing = importlib.import_module("failing")
    monkeypatch.delitem(sys.modules, "failing")
    linecache.checkcache()
    with pytest.raises((AssertionError, KeyError, ValueError)) as caught:
        failing.fail(kind)
    assert backend._explain(caught.value) == said


@pytest.mark.parametrize("unit", ["iters", "samples"])
@pytest.mark.parametrize(
    ("warmup", "decay", "train", "wrong"),
    [
        (0, None, 5, False),
        (4, None, 5, False),
        (5, None, 5, True),
        (5, 9, 5, False),
        (9, 9, 20, True),
        (3, None, None, False),
    ],
)
def test_a_warmup_ends_before_the_decay(
    unit: str, warmup: int, decay: int | None, train: int | None, wrong: bool
) -> None:
    args = SimpleNamespace(
        **{f"lr_warmup_{unit}": warmup, f"lr_decay_{unit}": decay, f"train_{unit}": train},
    )
    if wrong:
        with pytest.raises(UserError, match=f"--lr-warmup-{unit} {warmup} is not less than {decay or train}"):
            backend._check_warmup(args, unit)
    else:
        backend._check_warmup(args, unit)


def test_arguments_are_borrowed_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--own"])
    seen = []

    def fail_on(argv: list[str]) -> None:
        with backend._arguments(argv):
            seen.append(sys.argv)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_on(["--megatron", "1"])
    assert seen == [["program", "--megatron", "1"]]
    assert sys.argv == ["program", "--own"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_entry_point_cannot_do_is_refused_by_name(name: str) -> None:
    check_scope(SimpleNamespace(**dict.fromkeys(REFUSED, False)))
    with pytest.raises(UserError, match=f"it has no --{name.replace('_', '-')}$"):
        check_scope(SimpleNamespace(**{name: True}))


@pytest.mark.parametrize("name", ["data_path", "train_data_path", "valid_data_path", "test_data_path"])
def test_data_that_is_not_there_is_refused_wherever_it_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.bin.*none\.idx"):
        check_scope(SimpleNamespace(**{name: ["1.0", str(tmp_path / "none")]}))


def test_lists_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(argv: list[str], world_size: int) -> None:
        if len(argv) != world_size:
            raise UserError(f"{len(argv)} is not {world_size}")

    monkeypatch.setattr(validate, "check_arguments", judge)
    rows = [{"name": "a", "world_size": 1, "argv": [1]}, {"name": "b", "world_size": "2", "argv": ["x"]}]
    answers = list(validate.check_lines([json.dumps(rows[0]), "\n", json.dumps(rows[1])]))
    assert answers == [
        {"name": "a", "valid": True, "error": None},
        {"name": "b", "valid": False, "error": "1 is not 2"},
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "x"}', '{"name": "x", "world_size": "many", "argv": []}', "3"])
def test_a_line_that_is_no_list_is_named_by_number(line: str) -> None:
    with pytest.raises(UserError, match="line 2: expected name, world_size and argv"):
        list(validate.check_lines(["\n", line]))
