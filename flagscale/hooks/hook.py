"""Installing hooks: replacing attributes of modules, some of which nobody has imported yet.

Three kinds of target:

    package.module:attr.path    one attribute; the module is imported when the hook is installed
    package.*:attr              the attribute of every module of the package that has it, whenever that is imported
    package.module              a whole module that cannot be imported here, put in the place of the real one

Hooks are installed in the order they are listed, so what lets a package be imported comes first.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from flagscale.errors import HookError


@dataclass(frozen=True, slots=True)
class Hook:
    """One change to a running backend.

    target: see the module's docstring
    versions: of the backend, as a version specifier: `==0.19.2`, `>=0.18,<0.20`
    why: what goes wrong without it
    make: original -> replacement; the original is None where there was none. Returning the original changes nothing
    adds: the attribute may be missing; for any other hook that means that the backend is not what it was written for
    """

    target: str
    versions: str
    why: str
    make: Callable[[Any], Any]
    adds: bool = False

    @property
    def name(self) -> str:
        return self.make.__name__


@dataclass(frozen=True, slots=True)
class _Taken:
    hook: Hook
    owner: Any
    attr: str
    replacement: Any


_taken: dict[tuple[str, str], _Taken] = {}
"""(target, name of the owning module) -> what was put there"""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Applies the hooks on `package.*` to each module of the package as soon as it has been executed."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        hooks = [hook for hook in self.hooks if _covers(hook, fullname)]
        if not hooks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _HookedLoader(spec.loader, tuple(hooks))
        return spec


class _HookedLoader(importlib.abc.Loader):
    """The module's own loader, with hooks after it; everything else is asked of the own loader."""

    def __init__(self, loader: importlib.abc.Loader, hooks: tuple[Hook, ...]) -> None:
        self.loader = loader
        self.hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for hook in self.hooks:
            _replace_if_there(hook, module)


_after_import = _AfterImport()


def _covers(hook: Hook, module: str) -> bool:
    package = hook.target.partition(":")[0].removesuffix(".*")
    return module == package or module.startswith(package + ".")


def _replace(hook: Hook, module: ModuleType, path: str) -> None:
    """Put the replacement at `path` below the module; where the hook keeps the original, nothing is noted."""
    *parents, attr = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    original = owner.__dict__.get(attr, getattr(owner, attr, None))
    if original is None and not hook.adds:
        raise AttributeError(f"{module.__name__} has no {path}")
    replacement = hook.make(original)
    if replacement is not original:
        setattr(owner, attr, replacement)
        _taken[hook.target, module.__name__] = _Taken(hook, owner, attr, replacement)


def _replace_if_there(hook: Hook, module: ModuleType) -> None:
    attr = hook.target.partition(":")[2]
    if attr in vars(module):
        _replace(hook, module, attr)


def _fail(hook: Hook, version: str, problem: str) -> HookError:
    return HookError(
        f"hook {hook.name} on {hook.target} (for versions {hook.versions}, this is {version}) {problem}. "
        f"It is there because {hook.why}."
    )


def _check_version(hook: Hook, version: str) -> None:
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(hook.versions).contains(version, prereleases=True):
        raise _fail(hook, version, "was not written for this version")


def _is_installed(hook: Hook) -> bool:
    return hook in _after_import.hooks or any(taken.hook == hook for taken in _taken.values())


def _install_one(hook: Hook, version: str) -> None:
    module_name, colon, path = hook.target.partition(":")
    if not colon:
        stand_in = hook.make(sys.modules.get(module_name))
        sys.modules[module_name] = stand_in
        _taken[hook.target, module_name] = _Taken(hook, sys.modules, module_name, stand_in)
    elif module_name.endswith(".*"):
        if _after_import not in sys.meta_path:
            sys.meta_path.insert(0, _after_import)
        _after_import.hooks.append(hook)
        for name, module in sorted(sys.modules.items()):
            if _covers(hook, name):
                _replace_if_there(hook, module)
    else:
        try:
            _replace(hook, importlib.import_module(module_name), path)
        except (ImportError, AttributeError) as error:
            raise _fail(hook, version, f"found no such place: {error}") from error


def install_hooks(hooks: Iterable[Hook], version: str) -> None:
    """Install every hook, once: a hook that is there already is left as it is.

    version: of the backend that the hooks are for

    Raises:
        HookError: a hook is for other versions (then none was installed), or one did not take; the message names hook,
            target, versions, and what it is for.
    """
    wanted = tuple(hooks)
    for hook in wanted:
        _check_version(hook, version)
    for hook in wanted:
        if not _is_installed(hook):
            _install_one(hook, version)
    verify_hooks(wanted, version)


def verify_hooks(hooks: Iterable[Hook], version: str) -> None:
    """Look again whether what the hooks put in place is still there.

    Raises:
        HookError: something has taken the place of a replacement since, or a hook on a package met none of its modules.
    """
    by_hook: dict[str, list[_Taken]] = {}
    for taken in _taken.values():
        by_hook.setdefault(taken.hook.target, []).append(taken)
    for hook in hooks:
        if ".*:" in hook.target and hook.target not in by_hook:
            raise _fail(hook, version, "met no module of the package")
        for taken in by_hook.get(hook.target, ()):
            owner = taken.owner if isinstance(taken.owner, dict) else vars(taken.owner)
            if owner.get(taken.attr) is not taken.replacement:
                raise _fail(hook, version, "was undone by someone")
