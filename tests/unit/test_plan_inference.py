"""`plan_inference` and `plan_compress`: an entry point and the file that it reads."""

from pathlib import Path

import pytest
import yaml
from factories import TREES, hosts, inference_tree, plan, write_hostfile
from omegaconf import OmegaConf

from flagscale.runner.plan.common import dump_yaml
from flagscale.runner.render.argv import render_argv


@pytest.mark.parametrize(("kind", "logs"), [("inference", "inference_logs"), ("compress", "compress_logs")])
def test_every_host_reads_the_task_section_from_a_file(kind: str, logs: str, tmp_path: Path) -> None:
    write_hostfile(tmp_path, hosts(2, 2))
    tree = TREES[kind](experiment__runner={"hostfile": "hostfile.txt"})
    job = plan(tree, tmp_path)
    path = f"{tmp_path}/outputs/{logs}/scripts/{kind}.yaml"
    assert job.log_dir == f"{tmp_path}/outputs/{logs}"
    assert job.num_ranks == 0
    for host in job.hosts:
        (process,) = host.processes
        assert render_argv(process) == ("python", tree["experiment"]["task"]["entrypoint"], f"--config-path={path}")
        assert process.entrypoint == tree["experiment"]["task"]["entrypoint"]
        ((written, content),) = host.files
        assert written == path
        assert yaml.safe_load(content) == tree[kind]


NASTY = [
    *("1e-5", "on", "No", "null", "~", "12:30:45", "0x10", "1_000", "", " ", "a: b", "# x", "- x", "é\u2028\x85"),
    *("line\nline\n", "tab\t", "\"'", "{a}", "[b]", "*a", "&a", "!t", "%x", "@", "`", "2024-01-01", ".inf", "<<", "="),
]


def test_strings_stay_strings_for_every_reader() -> None:
    section = {"prompts": NASTY, "keys": dict.fromkeys(NASTY, 1), "numbers": [1, 1.5, 1e-5, -2, True, None]}
    text = dump_yaml(section)
    assert yaml.safe_load(text) == section
    assert OmegaConf.to_container(OmegaConf.create(text)) == section


def test_prompts_reach_the_plan_as_they_are() -> None:
    tree = inference_tree()
    tree["inference"]["generate"]["prompts"] = NASTY
    ((_, content),) = plan(tree).hosts[0].files
    assert yaml.safe_load(content)["generate"]["prompts"] == NASTY


def test_one_value_used_twice_is_written_twice() -> None:
    shared = {"a": [1]}
    assert "&" not in dump_yaml({"x": shared, "y": shared})
