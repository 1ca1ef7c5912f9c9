"""Laws of loading and planning: any tree gives a configuration or its faults, and a plan is a value like any other."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from factories import CWD, SITE, TREES, changed, composed, plan, train_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError, UserError
from flagscale.runner.config.experiment import Deploy, Experiment, Runner
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import load_config
from flagscale.runner.config.tasks import Resources, ServeModel
from flagscale.runner.launch.dry import describe_plan, render_dry_run
from flagscale.runner.plan.job import (
    PLAN_VERSION,
    AtLaunch,
    HostPlan,
    JobPlan,
    ProcessSpec,
    decode_plan,
    encode_plan,
    freeze,
)
from flagscale.runner.plan.registry import plan_config

quick = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
strange = st.sampled_from(
    [
        "",
        "a",
        "8",
        "true",
        "~",
        "\0",
        "\n",
        "-x",
        "é",
        "\ud800",
        "1:2",
        "9" * 5000,
        "9" * 5000 + "k",
        "../x",
        "'",
        "{",
        "a=b",
    ]
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2**70, -(10**30), 65536]), st.floats(), strange,
    st.text(max_size=5), st.binary(max_size=3),
)  # fmt: skip
names = st.sampled_from(
    ["a", "b-c", "type", "engine_args", "0", "envs", "", "A=B", "é", "float", "port", "model", "host"]
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)


def paths_of(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    rows: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        rows = list(node.items())
    elif isinstance(node, list):
        rows = list(enumerate(node))
    found = [(*path, str(key)) for key, _ in rows]
    return found + [deeper for key, value in rows for deeper in paths_of(value, (*path, str(key)))]


FIELDS = [
    *(("experiment", name) for name in [*Experiment.model_fields, "deploy", "nodes_envs"]),
    *(("experiment", "runner", name) for name in Runner.model_fields),
    *(("experiment", "runner", "deploy", name) for name in Deploy.model_fields),
    *(("experiment", "runner", "cli_args", "engine_args"), ("experiment", "envs", "node_specific")),
    *(("device_type_specific",), ("node_specific",), ("unheard_of",)),
]
SERVE_FIELDS = [
    *(("serve", "0", name) for name in ServeModel.model_fields),
    *(("serve", "0", "resources", name) for name in Resources.model_fields),
]
PLACES = {
    kind: [".".join(path) for path in [*paths_of(make()), *FIELDS, *(SERVE_FIELDS if kind == "serve" else [])]]
    for kind, make in TREES.items()
}


@pytest.mark.parametrize("kind", TREES)
@quick
@given(data=st.data())
def test_any_tree_gives_a_configuration_or_its_faults(kind: str, data: st.DataObject) -> None:
    tree = TREES[kind]()
    for _ in range(data.draw(st.integers(1, 3))):
        # one change may have taken the place of another away
        with suppress(TypeError, IndexError, ValueError, AttributeError):
            tree = changed(tree, {data.draw(st.sampled_from(PLACES[kind])): data.draw(trees)})
    try:
        config = load_config(composed(tree), CWD)
        job = plan_config(config, SITE)
    except ConfigError as error:
        return check_faults(error)
    except UserError:
        return None
    assert "\0" not in render_dry_run(job)
    render_dry_run(job).encode()
    encoded = json.dumps(describe_plan(job)["plan"])
    assert json.dumps(encode_plan(decode_plan(json.loads(encoded)))) == encoded
    return None


def check_faults(error: ConfigError) -> None:
    assert error.faults
    assert all(fault.where and fault.message for fault in error.faults)


@quick
@given(tree=st.dictionaries(st.sampled_from(["experiment", "train", "serve", "action", "hydra", "x"]), trees))
def test_any_tree_at_all(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(composed(tree), CWD)


# --- plans as values -------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
ports = st.none() | st.integers(1, 65535)
words: st.SearchStrategy[Any] = text | st.builds(AtLaunch, st.sampled_from(["master_port", "run_id"]), text, text)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
).map(freeze)


def tuples(*columns: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    row = st.tuples(*columns) if len(columns) > 1 else columns[0]
    return st.lists(row, max_size=2).map(tuple)


processes = st.builds(
    ProcessSpec, name=text, argv=tuples(words), cwd=text, backend=text, arguments=tuples(text, values),
    entrypoint=st.none() | text, num_ranks=st.integers(0, 8), first_rank=st.integers(0, 8), announces=st.booleans(),
    env=tuples(text, words), path_dirs=tuples(text), bin_dirs=tuples(text),
)  # fmt: skip
host_plans = st.builds(
    HostPlan, host=st.builds(Host, text, st.integers(1, 8), st.none() | text, st.none() | text, ports),
    node_rank=st.integers(0, 8), processes=tuples(processes), make_dirs=tuples(text), files=tuples(text, text),
    before_start=st.none() | text, after_stop=st.none() | text,
)  # fmt: skip
plans = st.builds(
    JobPlan, task=text, backend=text, exp_name=text, exp_dir=text, log_dir=text, hosts=tuples(host_plans),
    master_addr=text, master_port=ports, checkpoint_dir=st.none() | text, load_dir=st.none() | text,
    secrets=tuples(text, text), foreground=st.booleans(), start_timeout_s=st.floats(1, 10),
    version=st.just(PLAN_VERSION),
)  # fmt: skip


@quick
@given(plans)
def test_a_plan_survives_json(job: JobPlan) -> None:
    assert decode_plan(json.loads(json.dumps(encode_plan(job)))) == job


def test_a_plan_of_another_version_is_refused() -> None:
    row = encode_plan(plan(train_tree()))
    with pytest.raises(UserError, match="this plan has version 99"):
        decode_plan({**row, "version": 99})


@quick
@given(slots=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_ranks_cover_the_job_once(tmp_path_factory: pytest.TempPathFactory, slots: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp()
    Path(folder, "ranks.txt").write_text("".join(f"h{n} slots={count}\n" for n, count in enumerate(slots)))
    tree = train_tree(experiment__runner={"hostfile": "ranks.txt"})
    del tree["train"]["system"]["tensor_model_parallel_size"]
    del tree["train"]["model"]["global_batch_size"]
    job = plan(tree, folder)
    ranks = [
        process.first_rank + local
        for host in job.hosts
        for process in host.processes
        for local in range(process.num_ranks)
    ]
    assert ranks == list(range(sum(slots))) == list(range(job.num_ranks))
    assert [host.node_rank for host in job.hosts] == list(range(len(slots)))


@pytest.mark.parametrize("kind", TREES)
def test_equal_input_gives_equal_plans(kind: str) -> None:
    assert plan(TREES[kind]()) == plan(TREES[kind]())
    assert json.dumps(encode_plan(plan(TREES[kind]()))) == json.dumps(encode_plan(plan(TREES[kind]())))
