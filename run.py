"""Run the job of a configuration: `python run.py --config-path ./examples/<model>/conf --config-name train action=run`.

Hydra composes the YAML files; `action` is run, dryrun, test, stop or query. `--config-path` is relative to this file,
`experiment.exp_dir` and `experiment.runner.hostfile` to the folder in which the command is typed.
"""

import gc
import sys

gc.disable()  # composing makes many objects and no garbage: collecting costs a tenth of a dry run

import hydra
from omegaconf import DictConfig

from flagscale.cli.hydra_app import act_composed, run_hydra


@hydra.main(version_base=None, config_name="config")
def main(config: DictConfig) -> None:
    act_composed(config)


if __name__ == "__main__":
    sys.exit(run_hydra(main))
