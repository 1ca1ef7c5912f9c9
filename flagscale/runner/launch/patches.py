"""What patches the trees of a plan must bear, by the patch sets of this installation."""

from flagscale import env
from flagscale.patch.chiptree import load_layers
from flagscale.patch.series import hash_layers
from flagscale.runner.launch.sources import list_trees
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.site import FOLDERS


def expect_patches(plan: JobPlan) -> dict[str, str]:
    """Path of each tree that must be patched -> the digest of the patch sets that it must bear.

    Raises:
        UserError: a patch set of this installation is damaged.
    """
    hardware = env.root_dir() / "hardware"
    return {
        tree.path: hash_layers(load_layers(hardware, FOLDERS[tree.backend], tree.chip))
        for tree in list_trees(plan)
        if tree.chip
    }
