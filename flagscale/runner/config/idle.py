"""Settings that users' files hold, that load, and that this release does nothing with: told, never silently ignored."""

from flagscale.errors import Fault
from flagscale.runner.config.experiment import Experiment

OF_RUNNER = {
    "enable_monitoring": "every run is watched by its agent",
    "hang_detection_timeout": "a run that hangs is not ended; `flagscale status` shows when it last moved",
    "runtime_env": "the job's environment is that of `experiment.envs`",
}
OF_DEPLOY = {
    "use_fs_serve": "each engine runs as a process of its own, without Ray Serve",
    "working_dir": "engines start in the project's root",
}
OF_DISAGGREGATION = {
    "prefill_num", "decode_num", "prefill_address", "decode_address", "prefill_decode_strategy",
    "prefill_decode_connector", "prefill_decode_log_dir", "decode_gpu_memory_utilization",
}  # fmt: skip


def find_idle(experiment: Experiment) -> list[Fault]:
    """A warning for each setting that was given and has no effect."""
    runner, deploy = experiment.runner, experiment.runner.deploy
    found = [("experiment.runner", name, OF_RUNNER[name]) for name in OF_RUNNER if name in runner.model_fields_set]
    found += [
        ("experiment.runner.deploy", name, OF_DEPLOY[name])
        for name in OF_DEPLOY
        if name in deploy.model_fields_set and not deploy.enable_composition
    ]
    holders = {"experiment.runner": runner, "experiment.runner.deploy": deploy}
    warnings = [
        Fault(f"{path}.{name}", f"has no effect in this release: {instead}")
        for path, name, instead in found
        if getattr(holders[path], name)
    ]
    for name, kind in (("slurm", "slurm"), ("ray_address", "ray"), ("ray_wait_s", "ray")):
        if name in runner.model_fields_set and runner.type != kind:
            text = f"has no effect: experiment.runner.type is {runner.type}, not {kind}"
            warnings.append(Fault(f"experiment.runner.{name}", text))
    if not deploy.prefill_decode_disaggregation:
        idle = deploy.model_fields_set & OF_DISAGGREGATION
        text = "has no effect: prefill_decode_disaggregation is off"
        warnings += [Fault(f"experiment.runner.deploy.{name}", text) for name in sorted(idle)]
    if experiment.auto_tuner:
        warnings.append(Fault("experiment.auto_tuner", "has no effect in this release: there is no tuner"))
    return warnings
