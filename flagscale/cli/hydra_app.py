"""What stands around Hydra's main: its errors in our voice, its dump without secrets, the job's exit code.

Hydra's own dump of the configuration is switched off, since it would hold secrets given on the command line; the same
three files are written here with the secrets masked.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.cli.jobs import act
from flagscale.cli.voice import guard

if TYPE_CHECKING:
    from omegaconf import DictConfig

FULL_ERROR = "HYDRA_FULL_ERROR"
NO_DUMP = "hydra.output_subdir=null"


def run_hydra(main: Callable[[], Any]) -> int:
    """Call a function that `hydra.main` decorates; returns the exit code of what it did."""
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
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flagscale.errors import UserError
    from flagscale.runner.config.compose import translate_error

    try:
        main()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _report_all_faults(sys.argv)
        raise translate_error(error, _config_dir_of(sys.argv)) from error
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
    config_dir = next(
        Path(source.path) for source in hydra.runtime.config_sources if source.provider in ("main", "command-line")
    )
    overrides = OmegaConf.to_container(hydra.overrides.task)
    assert isinstance(overrides, list)
    name, words = str(hydra.job.config_name), [str(word) for word in overrides]
    _EXIT_CODES[0].append(guard(lambda: act(read_composed(config, config_dir, name, words), command=["python", *sys.argv])))


def _report_all_faults(argv: list[str]) -> None:
    """Read the configuration a second time, without Hydra's own section: what stopped Hydra may stem from another fault.

    Raises:
        ConfigError: all that is wrong with the job's own part of it; none is raised where that is sound.
    """
    from hydra._internal.utils import get_args_parser

    from flagscale.runner.config.compose import compose_config
    from flagscale.runner.config.load import load_config

    words = get_args_parser().parse_args(argv[1:])
    config_dir = _config_dir_of(argv)
    if words.config_name and config_dir.is_dir():
        load_config(compose_config(config_dir, words.config_name, words.overrides), Path.cwd())


def _config_dir_of(argv: list[str]) -> Path:
    """The folder that `--config-path` names, relative to the folder of the script, as Hydra has it."""
    for index, word in enumerate(argv):
        for flag in ("--config-path", "-cp"):
            if word == flag and index + 1 < len(argv):
                return Path(argv[0]).parent / argv[index + 1]
            if word.startswith(flag + "="):
                return Path(argv[0]).parent / word.partition("=")[2]
    return Path(argv[0]).parent
