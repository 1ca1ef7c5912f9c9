"""What stands around Hydra's main: its errors in our voice, its record without secrets, the job's exit code.

Hydra's main makes its run folder before anybody has looked at the configuration, so that even a dry run or a misspelt
action leaves one behind. An ordinary command line is therefore composed and acted on here; what Hydra alone can do
(`--cfg`, `--help`, `--multirun`, callbacks of a configuration, ..) goes to its main. Its record of the configuration
(`<hydra.run.dir>/.hydra/*.yaml`) would hold secrets given on the command line: it is switched off, and the same files
are written here, masked, once a job was handed over.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.cli.jobs import act
from flagscale.cli.voice import guard, warn
from flagscale.errors import ConfigError, Fault, FlagScaleError, UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from omegaconf import DictConfig

    from flagscale.runner.config.compose import Composed
    from flagscale.runner.launch.files import NewFile

FULL_ERROR = "HYDRA_FULL_ERROR"
NO_DUMP = "hydra.output_subdir=null"
OF_HYDRA = ("help", "hydra_help", "cfg", "multirun", "shell_completion", "experimental_rerun", "info", "config_dir")
"""options that only Hydra's own main serves"""


def run_hydra(main: Callable[[], Any]) -> int:
    """Do what the command line says; `main` is a function that `hydra.main` decorates. Returns the exit code."""
    from hydra._internal.utils import get_args_parser

    words = get_args_parser().parse_args(sys.argv[1:])
    if not any(getattr(words, option) for option in OF_HYDRA):
        code: list[int] = []
        failed = guard(lambda: _act_here(words, code))
        if failed or code:
            return failed or code[0]
    return _run_main(main)


def _act_here(words: "Namespace", code: list[int]) -> int:
    """Compose and act; `code` stays empty where the configuration asks for what only Hydra's main can do."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from flagscale.runner.config.compose import compose_config

    if not words.config_path:
        raise UserError("--config-path is missing: the folder of the experiment YAML, relative to this script")
    composed = compose_config(_config_dir_of(words), words.config_name or "config", words.overrides)
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN or hydra.callbacks or hydra.job.chdir or hydra.job.env_set:
        return 0
    code.append(act(composed, command=["python", *sys.argv], record=_plan_record(composed)))
    return code[0]


def _run_main(main: Callable[[], Any]) -> int:
    exit_codes: list[int] = []
    _EXIT_CODES[:] = [exit_codes]
    wants_traceback = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"
    if not any(word.startswith("hydra.output_subdir=") for word in sys.argv):
        sys.argv.append(NO_DUMP)
    if wants_traceback:
        main()
        return max(exit_codes, default=0)
    return guard(lambda: _translate(main, exit_codes))


_EXIT_CODES: list[list[int]] = []


def _translate(main: Callable[[], Any], exit_codes: list[int]) -> int:
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flagscale.runner.config.hydra_errors import translate_error

    try:
        main()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        words = get_args_parser().parse_args(sys.argv[1:])
        raise translate_error(error, _config_dir_of(words), words.overrides) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
    return max(exit_codes, default=0)


def act_composed(config: "DictConfig") -> None:
    """The function behind `hydra.main`: do the configuration's action."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from flagscale.runner.config.compose import read_composed

    hydra = HydraConfig.get()
    sources = (source for source in hydra.runtime.config_sources if source.provider in ("main", "command-line"))
    config_dir = Path(next(sources).path)
    overrides = OmegaConf.to_container(hydra.overrides.task)
    assert isinstance(overrides, list)
    name, words = str(hydra.job.config_name), [str(word) for word in overrides]

    def act_on_it() -> int:
        composed = read_composed(config, config_dir, name, words)
        return act(composed, command=["python", *sys.argv], record=_plan_record(composed))

    _EXIT_CODES[0].append(guard(act_on_it))


def _plan_record(composed: "Composed") -> Callable[[], None]:
    """A call that writes down what Hydra composed, in the folder that Hydra would have used.

    It is made for every action and called by those that start a job. Its own failure is only told: the job runs.
    """

    def write() -> None:
        from flagscale.runner.launch.files import write_all

        try:
            write_all(list(_render_record(composed)))
        except FlagScaleError as error:
            warn(f"the job runs, but its configuration could not be recorded: {error}")

    return write


def _render_record(composed: "Composed") -> "list[NewFile]":
    import yaml
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from flagscale.runner.config.load import hidden_values
    from flagscale.runner.config.secrets import mask_secrets
    from flagscale.runner.launch.files import NewFile

    whole: Any = HydraConfig.instance().cfg
    try:
        made = OmegaConf.select(whole, "hydra.runtime.output_dir", throw_on_missing=False)
        run_dir = str(made or HydraConfig.get().run.dir)
    except OmegaConfBaseException as error:
        raise ConfigError([Fault("hydra.run.dir", str(error).splitlines()[0])]) from error
    folder = Path.cwd() / run_dir / ".hydra"
    hidden = hidden_values(composed)
    trees = {
        "config": composed.values,
        "overrides": list(composed.overrides),
        "hydra": OmegaConf.to_container(whole, resolve=False, enum_to_str=True),
    }
    dumped = {name: yaml.safe_dump(mask_secrets(tree, hidden), sort_keys=False) for name, tree in trees.items()}
    return [NewFile(folder / f"{name}.yaml", text.encode(), 0o600) for name, text in dumped.items()]


def _config_dir_of(words: "Namespace") -> Path:
    """The folder that `--config-path` names, relative to the folder of the script, as Hydra has it."""
    return Path(sys.argv[0]).absolute().parent / str(words.config_path or "")
