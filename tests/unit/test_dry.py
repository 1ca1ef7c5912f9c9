"""The launcher that only prints."""

import hashlib
import json
from pathlib import Path

import pytest
from factories import SITE, TREES, host_plan, hosts, job_plan, plan, process, run_python, train_tree, write_hostfile

from flagscale.runner.launch.dry import describe_plan, render_dry_run
from flagscale.runner.plan.job import decode_plan, encode_plan


@pytest.mark.parametrize("kind", TREES)
def test_every_task_type_has_a_dry_run(kind: str) -> None:
    job = plan(TREES[kind]())
    text, described = render_dry_run(job), describe_plan(job)
    assert text.startswith(f"# demo: {kind} with {job.backend} on 1 host(s)")
    shown = described["replicas"][0] if kind == "serve" else described  # a service's engines are its replicas'
    for process_ in shown["hosts"][0]["processes"]:
        assert process_["environment"]["GREETING"] == "hello"
        assert process_["script"].rstrip("\n") in text
        assert process_["argv"][0] in text
    assert decode_plan(json.loads(json.dumps(described))["plan"]) == job


def test_every_host_is_shown(tmp_path: Path) -> None:
    write_hostfile(tmp_path, hosts(3, 2))
    tree = train_tree(experiment__runner={"hostfile": "hostfile.txt"}, train__model__global_batch_size=12)
    text = render_dry_run(plan(tree, tmp_path))
    assert [line for line in text.splitlines() if line.startswith("# ====")] == [
        f"# ==== host_{rank}_node{rank}: torchrun" for rank in range(3)
    ]
    assert "on 3 host(s), 6 ranks" in text.splitlines()[0]


def test_names_with_newlines_stay_comments() -> None:
    text = render_dry_run(job_plan(exp_name="a\nrm -rf /", exp_dir="/o\nrm -rf /"))
    assert not [line for line in text.splitlines() if line.startswith("rm")]


def test_secrets_are_told_by_where_they_come_from() -> None:
    job = job_plan(secrets=(("HF_TOKEN", "MY_TOKEN"),))
    assert "HF_TOKEN=<secret: taken from $MY_TOKEN at launch>" in render_dry_run(job)
    assert describe_plan(job)["hosts"][0]["processes"][0]["secrets"] == ["HF_TOKEN"]


def test_files_are_shown_whole() -> None:
    job = job_plan(host_plan(process(), files=(("/out/x.yaml", "a: 1\n"),)))
    assert render_dry_run(job).endswith("# file /out/x.yaml\na: 1\n")
    assert describe_plan(job)["hosts"][0]["files"] == [{"path": "/out/x.yaml", "content": "a: 1\n"}]


def test_equal_input_gives_equal_bytes_in_every_process() -> None:
    code = """
import hashlib, json
from factories import TREES, plan
from flagscale.runner.launch.dry import describe_plan, render_dry_run
text = "".join(render_dry_run(plan(TREES[kind]())) + json.dumps(describe_plan(plan(TREES[kind]()))) for kind in TREES)
print(hashlib.sha256(text.encode()).hexdigest())
"""
    whole = "".join(
        render_dry_run(plan(TREES[kind]())) + json.dumps(describe_plan(plan(TREES[kind]()))) for kind in TREES
    )
    path = f"{Path(__file__).parent.parent}:{Path(__file__).parent.parent.parent}"
    outputs = {
        run_python("-c", code, env={"PYTHONHASHSEED": seed, "PYTHONPATH": path}).stdout.strip() for seed in ("1", "2")
    }
    assert outputs == {hashlib.sha256(whole.encode()).hexdigest()}


def test_planning_looks_at_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = encode_plan(plan(train_tree()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.chdir("/")
    assert encode_plan(plan(train_tree(), site=SITE)) == before
