"""Hooks: they take or they refuse, once."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flagscale.errors import HookError
from flagscale.hooks import hook as machinery
from flagscale.hooks.hook import Hook, install_hooks, verify_hooks
from flagscale.hooks.megatron_elsewhere import HOOKS, assume_transformer_engine

PACKAGE = {
    "__init__.py": "",
    "tools.py": "LIMIT = 3\nclass Worker:\n    def work(self):\n        return 'worked'\n",
    "early.py": "from json import dumps\nimport json\n",
    "late.py": "import json\n",
    "broken.py": "import a_compiler_for_gpus\n",
    "user.py": "from toybackend.broken import kernel\n",
}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package to hook, and a machinery that forgets afterwards."""
    folder = tmp_path / "toybackend"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machinery, "_taken", {})
    monkeypatch.setattr(machinery, "_after_import", machinery._AfterImport())
    path = list(sys.meta_path)
    yield
    sys.meta_path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toybackend"]:
        del sys.modules[name]


def always(value: Any) -> Callable[[Any], Any]:
    def replace(_original: Any) -> Any:
        return value

    return replace


def make_hook(target: str, make: Callable[[Any], Any], versions: str = ">=1,<2", adds: bool = False) -> Hook:
    return Hook(target, versions, "a test wants it", make, adds)


@pytest.mark.usefixtures("backend")
def test_an_attribute_at_any_depth_is_replaced_once() -> None:
    def louder(original: Any) -> Any:
        return lambda self: original(self).upper()

    hooks = [make_hook("toybackend.tools:LIMIT", always(4)), make_hook("toybackend.tools:Worker.work", louder)]
    for _ in range(2):
        install_hooks(hooks, "1.5")
    tools = importlib.import_module("toybackend.tools")
    assert tools.LIMIT == 4
    assert tools.Worker().work() == "WORKED"


@pytest.mark.usefixtures("backend")
def test_a_hook_for_other_versions_refuses_before_anything_is_changed() -> None:
    hooks = [make_hook("toybackend.tools:LIMIT", always(4)), make_hook("toybackend.tools:Worker", always(None), "<1")]
    with pytest.raises(HookError) as caught:
        install_hooks(hooks, "1.5")
    message = str(caught.value)
    for part in ("hook replace", "toybackend.tools:Worker", "<1", "1.5", "a test wants it"):
        assert part in message
    assert "toybackend.tools" not in sys.modules


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", ["toybackend.tools:SPEED", "toybackend.tools:Worker.rest", "toybackend.gone:X"])
def test_a_place_that_is_not_there_is_an_error(target: str) -> None:
    with pytest.raises(HookError, match="found no such place"):
        install_hooks([make_hook(target, always(1))], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_hook_that_adds_may_find_nothing_and_may_keep_what_it_finds() -> None:
    install_hooks([make_hook("toybackend.tools:SPEED", always(9), adds=True)], "1.0")
    assert importlib.import_module("toybackend.tools").SPEED == 9
    install_hooks([make_hook("toybackend.tools:LIMIT", lambda original: original)], "1.0")
    assert importlib.import_module("toybackend.tools").LIMIT == 3


@pytest.mark.usefixtures("backend")
def test_a_whole_package_is_hooked_before_and_after_its_modules_are_imported() -> None:
    import json

    stand_in = SimpleNamespace(name="stand-in")
    early = importlib.import_module("toybackend.early")
    hook = make_hook("toybackend.*:json", lambda original: stand_in if original is json else original)
    install_hooks([hook], "1.0")
    late = importlib.import_module("toybackend.late")
    assert early.json is late.json is stand_in
    assert late.__spec__.name == "toybackend.late"
    assert sys.modules["json"] is json
    verify_hooks([hook], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_package_whose_modules_have_no_such_attribute_is_an_error() -> None:
    with pytest.raises(HookError, match="met no module of the package"):
        install_hooks([make_hook("toybackend.*:torch", always(1))], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_module_that_cannot_be_imported_is_stood_in_for() -> None:
    stand_in = ModuleType("toybackend.broken")
    stand_in.kernel = "none"  # type: ignore[attr-defined]
    install_hooks([make_hook("toybackend.broken", always(stand_in))], "1.0")
    assert importlib.import_module("toybackend.user").kernel == "none"


@pytest.mark.usefixtures("backend")
def test_what_is_undone_is_noticed() -> None:
    hook = make_hook("toybackend.tools:LIMIT", always(4))
    install_hooks([hook], "1.0")
    importlib.import_module("toybackend.tools").LIMIT = 3
    with pytest.raises(HookError, match="was undone"):
        verify_hooks([hook], "1.0")


def test_every_hook_for_megatron_says_why_and_has_its_own_name() -> None:
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
    assert all(len(hook.why.split()) > 5 and hook.name != "<lambda>" and hook.versions for hook in HOOKS)


def test_a_transformer_engine_that_is_here_is_believed() -> None:
    assert assume_transformer_engine("1.7") == "1.7"
    assert str(assume_transformer_engine(None)) == "2.9.0"
