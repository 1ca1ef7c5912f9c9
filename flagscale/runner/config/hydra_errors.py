"""What Hydra, OmegaConf and YAML refuse, in our voice: one line for what, one place for where.

Each of the three reports its first fault only, and in its own words; the file or the override that it is about often
has to be found again. That costs a second reading of the files, which nobody pays whose configuration is right.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from flagscale.errors import ConfigError, Fault, UserError, find_nearest
from flagscale.runner.config.origins import display_path, read_lines


def translate_error(error: Exception, config_dir: Path, overrides: Sequence[str] = ()) -> UserError:
    """Hydra's, OmegaConf's and YAML's errors in our voice: one line for what, one for where."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from yaml import MarkedYAMLError
    from yaml.reader import ReaderError

    cause = error.__cause__
    marked = cause if isinstance(cause, MarkedYAMLError) else error
    if isinstance(marked, MarkedYAMLError):
        mark = marked.problem_mark or marked.context_mark
        where = f"{display_path(Path(mark.name))}:{mark.line + 1}" if mark else None
        return ConfigError([Fault("", marked.problem or str(marked), where=where)])
    if isinstance(error, ReaderError):
        text = f"{error.reason} (at byte {error.position})"
        return ConfigError([Fault("", text, where=display_path(Path(error.name)))])
    if isinstance(error, OverrideParseException):
        text = "cannot be read; what a shell or Hydra would take apart stands in quotes: 'key=\"a value\"'"
        return ConfigError([Fault("", text, where=f"override `{error.override}`")])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_config(str(error), str(error.missing_cfg_file), config_dir)
    if isinstance(error, ValueError) and (faults := _find_numbers_for_files(config_dir, overrides)):
        return ConfigError(faults)
    if isinstance(error, ValueError | AttributeError | RecursionError):
        endless = isinstance(error, RecursionError)
        text = "is nested too deeply, or holds itself by an anchor (`&name`)" if endless else f"cannot be read: {error}"
        where = " or ".join(map(display_path, _find_unreadable(config_dir, error))) or display_path(config_dir)
        return ConfigError([Fault("", text, where=where)])
    return _invalid_value(error, config_dir, overrides)


def _find_unreadable(config_dir: Path, known: Exception) -> list[Path]:
    """The files below `config_dir` that a YAML reader fails on in this way."""
    from yaml import SafeLoader, YAMLError, load

    found = []
    for file in _yaml_files(config_dir):
        try:
            load(file.read_text(encoding="utf-8"), SafeLoader)
        except (OSError, ValueError, AttributeError, YAMLError, RecursionError) as error:
            if type(error) is type(known) and (isinstance(known, RecursionError) or str(error) == str(known)):
                found.append(file)
    return found[:3]


def _yaml_files(config_dir: Path) -> list[Path]:
    """The YAML files of a config directory, its groups and their groups; no deeper: it may be somebody's home."""
    found = (file for pattern in ("*.yaml", "*/*.yaml", "*/*/*.yaml") for file in config_dir.glob(pattern))
    return sorted(file for file in found if file.is_file())


def _missing_config(text: str, missing: str, config_dir: Path) -> UserError:
    missing = missing.removesuffix(".yaml")
    files = [file.relative_to(config_dir).with_suffix("") for file in _yaml_files(config_dir)]
    there = sorted(str(file) for file in files if len(file.parts) == len(Path(missing).parts))
    expected = f"one of {', '.join(there)}" if 0 < len(there) <= 12 else None
    near = find_nearest(missing, there)
    return ConfigError([Fault("", text.splitlines()[0], None if near else expected, near, display_path(config_dir))])


def _find_numbers_for_files(config_dir: Path, overrides: Sequence[str]) -> list[Fault]:
    """A fault for each group whose file is chosen by a bare number (`train: 32`), which Hydra takes for no name."""
    from yaml import BaseLoader, YAMLError, load

    chosen = [(f"override `{word}`", *word.lstrip("+").partition("=")[::2]) for word in overrides]
    for file in sorted(config_dir.glob("*.yaml")):
        try:
            tree = load(file.read_text(encoding="utf-8"), BaseLoader)
        except (OSError, ValueError, YAMLError, RecursionError):
            continue
        listed = tree.get("defaults") if isinstance(tree, dict) else None
        rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        chosen += [(display_path(file), str(group), str(value)) for row in rows for group, value in row.items()]
    faults = []
    for where, group, value in chosen:
        names = sorted(file.stem for file in (config_dir / group).glob("*.yaml")) if group.isidentifier() else []
        if names and value not in names and re.fullmatch(r"[\d_.]+", value):
            near = find_nearest(f"{group}/{value}", [f"{group}/{name}" for name in names])
            text = f"{group}/{value}: the name of a file, not a number, chooses a file"
            faults.append(Fault("defaults", text, None if near else f"one of {', '.join(names)}", near, where))
    return faults


def _invalid_value(error: Exception, config_dir: Path, overrides: Sequence[str]) -> UserError:
    """What Hydra or OmegaConf refuses to compose: its own words, and the file or the override that they are about."""
    from omegaconf.errors import GrammarParseError

    cause = error.__cause__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    hints = [line for line in lines[1:] if line.startswith(("To append", "Either", "Or"))]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).removesuffix(".") if lines else ""
    if cause is not error and str(cause):
        text += (": " if text else "") + str(cause).splitlines()[0]
    if isinstance(cause, GrammarParseError):
        text = f"is not an interpolation that can be read ({text}); expected `${{dotted.path}}`"
    key = str(getattr(cause, "full_key", None) or "")
    override = next((word for word in overrides if key and word.lstrip("+~").split("=", 1)[0] == key), None)
    override = override or next((word for word in overrides if f"'{word.lstrip('+~').split('=', 1)[0]}'" in text), None)
    siblings = getattr(cause, "parent_node", None)
    near = None
    if override and siblings is not None and isinstance(getattr(cause, "key", None), str):
        near = find_nearest(str(getattr(cause, "key", "")), [str(name) for name in siblings])
    places = [f"override `{override}`"] if override else _find_key(config_dir, key) if key else []
    where = places[0] if len(places) == 1 else display_path(config_dir)
    path = "" if override else key
    text = ". ".join([text[:1].lower() + text[1:] if path else text, *hints])
    return ConfigError([Fault(path, text or type(error).__name__, None, near, where)])


def _find_key(config_dir: Path, key: str) -> list[str]:
    """Every file and line below `config_dir` where this key stands."""
    from yaml import YAMLError

    places = []
    for file in _yaml_files(config_dir):
        try:
            places += [f"{display_path(file)}:{line}" for path, line in read_lines(file, "") if path == key]
        except (OSError, ValueError, YAMLError, RecursionError):
            continue
    return places
