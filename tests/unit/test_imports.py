"""Imports go one way: rooms know only what lies left of them, and nothing heavy comes unasked."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import ROOT, run_python

PACKAGE = ROOT / "flagscale"
ORDER = (
    ("flagscale.errors", "flagscale.env", "flagscale.chips", "flagscale.serve.router.settings"),
    ("flagscale.runner.config",),
    ("flagscale.runner.plan",),
    ("flagscale.runner.render",),
    ("flagscale.runner.launch",),
    ("flagscale.runner.monitor",),
    ("flagscale.serve",),
    ("flagscale.runner.tune",),
    ("flagscale.cli",),
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
HEAVY = ("torch", "megatron", "ray", "vllm", "sglang", "transformers", "triton", "matplotlib", "numpy")
LIGHT_ROOMS = ("errors", "env", "chips", "runner", "patch", "cli", "tinker", "hooks", "serve", "rl", "sync")
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, at_module_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` is `a.b` where that is a module of ours, else `a`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _module_level(tree) if at_module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                file = ROOT / whole.replace(".", "/")
                is_ours = file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()
                yield node.lineno, whole if is_ours else str(node.module)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: no function bodies, nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _module_level(child)


def room_of(module: str) -> str | None:
    return next((room for room in RANKS if module == room or module.startswith(room + ".")), None)


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 40
    assert {room for path in FILES if (room := room_of(name_of(path)))} >= set(RANKS) - {"flagscale.runner.tune"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_know_only_what_lies_left_of_them(path: Path) -> None:
    room = room_of(name_of(path))
    if room is None:
        return
    wrong = [
        f"line {line}: {module}"
        for line, module in imports_of(path)
        if (other := room_of(module)) and RANKS[other] > RANKS[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["patch", "hooks"])
def test_patch_and_hooks_know_only_errors(room: str) -> None:
    own = f"flagscale.{room}"
    wrong = [
        f"{path.name}:{line}: {module}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for line, module in imports_of(path)
        if module.startswith("flagscale") and not module.startswith((own, "flagscale.errors"))
    ]
    assert wrong == []


def test_the_router_knows_only_errors_and_itself() -> None:
    """So that it runs, and is tested, without the rest of the toolkit."""
    own = ("flagscale.serve.router", "flagscale.errors", "flagscale.env")
    wrong = [
        f"{path.name}:{line}: {module}"
        for path in sorted((PACKAGE / "serve" / "router").rglob("*.py"))
        for line, module in imports_of(path)
        if module.startswith("flagscale") and not module.startswith(own)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_heavy_at_module_level(path: Path) -> None:
    parts = name_of(path).split(".")
    if len(parts) < 2 or parts[1] not in LIGHT_ROOMS or parts[1:3] == ["tinker", "worker"]:
        return
    heavy = [module for _, module in imports_of(path, at_module_level=True) if module.split(".")[0] in HEAVY]
    assert heavy == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_left_of_launch_asks_the_machine(path: Path) -> None:
    """No clock, no process, no random number, no socket in config, plan and render."""
    room = room_of(name_of(path))
    if room is None or not 1 <= RANKS[room] <= 3:
        return
    forbidden = {"subprocess", "socket", "random", "secrets", "time", "datetime", "threading", "uuid", "tempfile"}
    assert [module for _, module in imports_of(path) if module.split(".")[0] in forbidden] == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import flagscale.cli; flagscale.cli.render_help()",
            ("hydra", "omegaconf", "pydantic", "rich", "argparse", "yaml"),
        ),
        ("import flagscale.runner.plan.job", ("hydra", "omegaconf", "pydantic", "yaml")),
        ("import flagscale.runner.launch.agent", ("hydra", "omegaconf", "pydantic", "rich", "yaml")),
        ("import flagscale.cli.hydra_app", HEAVY),
        ("import flagscale.runner.config.load, flagscale.runner.launch.dry", ("hydra", *HEAVY)),
        ("import flagscale.serve.router.server", ("hydra", "omegaconf", "rich", "yaml", "paramiko", *HEAVY)),
    ],
)
def test_what_an_import_brings_with_it(code: str, absent: tuple[str, ...]) -> None:
    done = run_python("-c", f"{code}\nimport sys\nprint(sorted({set(absent)!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
