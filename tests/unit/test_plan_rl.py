"""`plan_rl`: verl's trainer on the first host, Ray under several."""

from pathlib import Path

from factories import hosts, plan, rl_tree, write_hostfile

from flagscale.runner.render.argv import render_argv


def test_the_trainer_gets_its_configuration_as_overrides() -> None:
    (process,) = plan(rl_tree()).hosts[0].processes
    assert render_argv(process) == (
        "python", "-m", "verl.trainer.main_ppo", "--config-path=config", "--config-name=ppo_trainer.yaml",
        "trainer.logger=[console,wandb]", "trainer.val_before_train=False", "trainer.nnodes=1",
        "+actor_rollout_ref.rollout.trust_remote_code=True",
    )  # fmt: skip
    assert process.entrypoint is None
    assert process.path_dirs == ("/opt/verl", "/opt/flagscale")


def test_null_replaces_a_value_of_verls_own() -> None:
    (process,) = plan(rl_tree(rl__trainer={"total_steps": None, "empty": {}})).hosts[0].processes
    assert render_argv(process)[5:7] == ("trainer.total_steps=null", "trainer.empty={}")


def test_several_hosts_form_a_ray_cluster(tmp_path: Path) -> None:
    write_hostfile(tmp_path, hosts(3, 8, "A800"))
    runner = {"hostfile": "hostfile.txt", "ray_port": 7000, "ray_dashboard_port": 7001}
    job = plan(rl_tree(experiment__runner=runner), tmp_path)
    assert [[process.name for process in host.processes] for host in job.hosts] == [
        ["ray", "trainer"],
        ["ray"],
        ["ray"],
    ]
    assert "7001" in render_argv(job.hosts[0].processes[0])
    assert render_argv(job.hosts[2].processes[0])[4:6] == ("--address", "node0:7000")


def test_a_host_of_cpus_gives_cpus(tmp_path: Path) -> None:
    write_hostfile(tmp_path, hosts(2, 4, "cpu"))
    job = plan(rl_tree(experiment__runner={"hostfile": "hostfile.txt"}), tmp_path)
    assert render_argv(job.hosts[0].processes[0])[-2:] == ("--num-cpus", "4")


def test_a_chip_that_ray_does_not_know_is_not_counted(tmp_path: Path) -> None:
    write_hostfile(tmp_path, hosts(2, 4, "some_new_chip"))
    job = plan(rl_tree(experiment__runner={"hostfile": "hostfile.txt"}), tmp_path)
    assert not [word for word in render_argv(job.hosts[0].processes[0]) if word.startswith("--num-")]
