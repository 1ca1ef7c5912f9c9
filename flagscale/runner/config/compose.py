"""From YAML files and overrides to one plain tree, with the place that each value came from.

Hydra composes. What leaves this module is plain dicts and lists: no DictConfig travels further. Faults that Hydra and
OmegaConf report one at a time, each in a voice of its own (an interpolation that cannot be resolved, a `???` that was
never filled), are gathered over the whole tree and told together.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import ConfigError, Fault, UserError, find_nearest
from flagscale.runner.config.origins import Origins, display_path, read_defaults

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Composed:
    """A composed configuration.

    values: the resolved tree, without Hydra's own node
    references: dotted paths that some interpolation reads, so that a key of the user's own invention is no typo
    environment: dotted path -> the text as written, for values that read `${oc.env:..}`
    """

    values: dict[str, Any]
    config_dir: Path
    config_name: str
    overrides: tuple[str, ...] = ()
    references: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    find_origins: Callable[[], Origins] | None = None

    @property
    def primary_file(self) -> Path:
        return self.config_dir / f"{self.config_name}.yaml"

    def locate(self, faults: Sequence[Fault]) -> list[Fault]:
        """The same faults, each with the file and line, or the override, that it stems from."""
        if not faults:
            return []
        if self.find_origins is None:
            return [fault if fault.where else fault.at(display_path(self.primary_file)) for fault in faults]
        origins = self.find_origins()
        return [fault if fault.where else fault.at(origins.get_nearest(fault.path)) for fault in faults]


def split_config_path(config: Path) -> tuple[Path, str]:
    """`<dir>/<name>.yaml` as Hydra's config directory and config name.

    Raises:
        UserError: no such file; names the nearest one that there is.
    """
    path = config if config.suffix in (".yaml", ".yml") else config.with_name(config.name + ".yaml")
    if path.is_file():
        return path.resolve().parent, path.stem
    siblings = sorted(item.name for item in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    near = find_nearest(path.name, siblings)
    hint = f"; did you mean `{near}`?" if near else (f"; there are: {', '.join(siblings)}" if siblings else "")
    raise UserError(f"{path}: no such configuration{hint}")


def compose_config(config_dir: Path, config_name: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose `<config_dir>/<config_name>.yaml` with Hydra's overrides.

    Raises:
        ConfigError: a file is missing or is not YAML, an override does not parse, a value cannot be resolved.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flagscale.runner.config.hydra_errors import translate_error

    # a YAML tag that does not fit its value (`!!int x`) reaches us as whatever the constructor met
    unreadable = (HydraException, OmegaConfBaseException, YAMLError, ValueError, AttributeError, RecursionError)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base=None, config_dir=str(config_dir.resolve())):
        loader = GlobalHydra.instance().config_loader()
        try:
            config = loader.load_configuration(
                config_name=config_name, overrides=list(overrides), run_mode=RunMode.RUN, from_shell=False
            )
        except unreadable as error:
            raise translate_error(error, config_dir, overrides) from error
        HydraConfig.instance().set_config(config)
        return read_composed(config, config_dir, config_name, overrides)


def read_composed(config: "DictConfig", config_dir: Path, config_name: str, overrides: Sequence[str]) -> Composed:
    """What Hydra composed, as plain values. Hydra must be initialised: origins are asked of it.

    Raises:
        ConfigError: values that cannot be resolved, all of them.
    """
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict, read_write

    loader = GlobalHydra.instance().config_loader()

    def find_origins() -> Origins:
        return Origins.read(read_defaults(loader, config_name, overrides), config_dir, config_name, overrides)

    with read_write(config), open_dict(config):
        config.pop("hydra", None)
    faults: list[Fault] = []
    references: set[str] = set()
    environment: dict[str, str] = {}
    for path, raw, resolve in _leaves(config, ""):
        if isinstance(raw, str) and "${" in raw:
            references |= _references(raw, path)
            if "oc.env" in raw:
                environment[path] = raw
        if fault := _try_resolve(path, raw, resolve):
            faults.append(fault)
    bare = Composed({}, config_dir, config_name, tuple(overrides), find_origins=find_origins)
    if faults:
        raise ConfigError(bare.locate([*faults, *_misnamed(config, bare, references)]))
    values = _to_plain(config)
    return Composed(values, config_dir, config_name, tuple(overrides), frozenset(references), environment, find_origins)


def _misnamed(config: "DictConfig", bare: Composed, references: set[str]) -> list[Fault]:
    """Names that the unresolved tree has wrong: often one of them is why an interpolation finds nothing.

    Only faults that know a better name are taken: beside a value that cannot be read, others may be its consequences.
    """
    from omegaconf import OmegaConf

    from flagscale.runner.config.load import load_config

    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    values = {str(key): value for key, value in raw.items()}
    try:
        load_config(replace(bare, values=values, references=frozenset(references)), Path.cwd())
    except ConfigError as error:
        return [fault for fault in error.faults if fault.suggestion]
    return []


def _to_plain(config: "DictConfig") -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    named: dict[str, Any] = _with_names(plain)
    return named


def _with_names(node: Any) -> Any:
    """The tree with strings for keys: YAML also reads numbers, and `on` and `no` as booleans, before a colon."""
    if isinstance(node, dict):
        return {str(key): _with_names(value) for key, value in node.items()}
    return [_with_names(value) for value in node] if isinstance(node, list) else node


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """Every leaf as (dotted path, raw value, a call that resolves it)."""
    from omegaconf import DictConfig, ListConfig

    keys: Sequence[Any] = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        path = f"{prefix}.{key}" if prefix else str(key)
        child = node._get_node(key)
        raw = child._value() if child is not None else None
        if isinstance(child, DictConfig | ListConfig) and not isinstance(raw, str) and raw is not None:
            yield from _leaves(child, path)
        else:
            yield path, raw, partial(node.__getitem__, key)


def _try_resolve(path: str, raw: Any, resolve: Callable[[], Any]) -> Fault | None:
    from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

    if not isinstance(raw, str) or not ("${" in raw or raw == "???"):
        return None
    try:
        resolve()
    except MissingMandatoryValue:
        return Fault(path, "is `???`: a value that you must give", expected=f"a value in the file, or {path}=<value>")
    except GrammarParseError:
        return Fault(path, f"`{raw}` is not an interpolation that can be read", expected="`${dotted.path}`")
    except OmegaConfBaseException as error:
        reason = str(error.msg if hasattr(error, "msg") and error.msg else error).splitlines()[0]
        reason = reason.partition(" raised while resolving interpolation: ")[2].strip("\"'") or reason
        return Fault(path, f"`{raw}` cannot be resolved: {_hide_read(reason, raw)}", _interpolation_hint(raw))
    except (TypeError, ValueError, RecursionError) as error:
        return Fault(path, f"`{raw}` cannot be resolved: {error or type(error).__name__}")
    return None


def _interpolation_hint(raw: str) -> str | None:
    if ":??" in raw:
        name = raw.split("${", 1)[1].split(":", 1)[0]
        return f"a value in place of it (for one from the environment: `${{oc.env:{name.upper()}}}`)"
    if "${env:" in raw:
        return "`" + raw.replace("${env:", "${oc.env:") + "`"
    return None


def _hide_read(reason: str, raw: str) -> str:
    """The reason without what was read from the environment: the name of a key may be made of a secret."""
    for name in re.findall(r"oc\.env\s*:\s*([A-Za-z_]\w*)", raw):
        if value := os.environ.get(name):
            reason = reason.replace(value, f"${name}")
    return reason


_REFERENCE = re.compile(r"\$\{\s*(?:oc\.select\s*:\s*|oc\.dict\.\w+\s*:\s*)?(\.*)([A-Za-z_][\w.\-\[\]]*)\s*(?=[,}])")


def _references(raw: str, path: str) -> set[str]:
    """The dotted paths that an interpolation at `path` reads; leading dots count sections upward."""
    found = set()
    for dots, name in _REFERENCE.findall(raw):
        above = path.split(".")[: -len(dots)] if dots else []
        found.add(".".join([*above, name.replace("[", ".").replace("]", "")]))
    return found
