"""Golden scripts of the services in examples/: what each replica runs on each of its hosts, at a made-up site."""

from pathlib import Path

import pytest
from conftest import SERVICES, name_of
from factories import CWD, ROOT

from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import Config, load_config
from flagscale.runner.launch.dry import render_dry_run
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.service import ServicePlan, decode_service, list_first_jobs
from flagscale.runner.plan.site import Site
from flagscale.runner.render.script import render_script

GOLDEN = Path(__file__).parent / "serve"
SITE = Site("/flagscale", None)
HOSTS = {
    "deepseek_r1/serve": 4, "deepseek_v3/serve": 2, "deepseek_v3/serve_disagg": 2, "kimi_k2/serve": 4,
    "qwen2_5/serve_ssh": 2, "qwen3/serve_sglang_multiple_nodes": 2,
}  # fmt: skip
"""how many hosts a replica of each example takes, where that is not one"""


def load_example(path: Path) -> Config:
    composed = compose_config(path.parent, path.stem)
    runner = composed.values["experiment"]["runner"]
    if "hostfile" in runner:  # read where it lies, since the made-up working folder has none
        runner["hostfile"] = str(ROOT / runner["hostfile"])
    for model in composed.values["serve"]:
        if "module" in model:
            model["module"] = str(ROOT / model["module"])
    return load_config(composed, CWD)


def service_of(path: Path) -> ServicePlan:
    job = plan_config(load_example(path), SITE)
    assert job.service is not None
    return decode_service(job.service)


def list_jobs(path: Path) -> list[JobPlan]:
    """The jobs of a service's replicas; a graph of models is one job."""
    return list_first_jobs(service_of(path)) or [plan_config(load_example(path), SITE)]


@pytest.mark.parametrize("path", SERVICES, ids=name_of)
def test_scripts_are_golden(path: Path, request: pytest.FixtureRequest) -> None:
    folder = GOLDEN / name_of(path).replace("/", "_")
    here = str(Path.cwd())  # what `${hydra:runtime.cwd}` stands for
    scripts = {
        f"{job.exp_name}_{host.host.name}_{process.name}.sh": render_script(job, host, process).replace(here, str(CWD))
        for job in list_jobs(path)
        for host in job.hosts
        for process in host.processes
    }
    if request.config.getoption("--rewrite-golden"):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.sh"):
            stale.unlink()
        for name, text in scripts.items():
            (folder / name).write_text(text)
    assert {file.name: file.read_text() for file in folder.glob("*.sh")} == scripts


@pytest.mark.parametrize("path", SERVICES, ids=name_of)
def test_example_is_checked_strictly_and_gives_no_warning(path: Path) -> None:
    config = load_example(path)
    assert config.warnings == ()
    assert config.action == "run"
    text = render_dry_run(plan_config(config, SITE))
    assert text == render_dry_run(plan_config(config, SITE))
    models = service_of(path).models
    if models:
        assert len(models) == (2 if "disagg" in path.stem else 1)
    seats = [seat.job for model in models for seat in model.seats]
    assert {len(job.hosts) for job in seats or list_jobs(path)} == {HOSTS.get(name_of(path), 1)}


def test_a_graph_of_models_is_shown_by_a_dry_run() -> None:
    text = render_dry_run(plan_config(load_example(ROOT / "examples/qwen2_5/conf/serve_multiple_models.yaml"), SITE))
    shown = text.partition("# ==== the graph of models, in Ray Serve\n")[2].replace(str(ROOT), "").splitlines()
    file = "# of /examples/qwen2_5/models.py, replicas:"
    assert shown == [
        "POST /generate (prompt: str)",
        f"tidy = Tidy(request)  {file} 1",
        f"keywords = Keywords(tidy)  {file} 1 to 2",
        f"sentences = Sentences(tidy)  {file} 1",
        f"summary = Summary(keywords, sentences)  {file} 1",
    ]
    assert "RAY_AUTH_TOKEN=<secret: drawn at launch>" in text


def test_no_golden_script_is_left_over() -> None:
    assert {folder.name for folder in GOLDEN.iterdir()} == {name_of(path).replace("/", "_") for path in SERVICES}
