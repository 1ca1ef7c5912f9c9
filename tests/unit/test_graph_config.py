"""The checks of a graph of models: every fault at its path, all at once, and no class imported for it."""

from pathlib import Path
from typing import Any

import pytest
from factories import Tree, changed, hosts, load, write_hostfile
from graphs import MODELS, NODES, graph_tree, node, write_models

from flagscale.errors import ConfigError
from flagscale.runner.config.tasks import ServeModel

REQUEST = "experiment.runner.deploy.request"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    write_models(tmp_path)
    return tmp_path


def faults_of(tree: Tree, folder: Path) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(tree, folder)
    return {fault.path: str(fault).partition(f"{fault.path}: ")[2] for fault in caught.value.faults}


def test_a_sound_graph_has_no_fault_and_its_module_is_not_imported(folder: Path) -> None:
    write_models(folder, "raise SystemExit('imported')\n" + MODELS)
    config = load(graph_tree(), folder)
    assert config.warnings == ()
    assert isinstance(config.task, tuple)


def test_one_dependency_may_stand_without_a_list(folder: Path) -> None:
    config = load(graph_tree(NODES[0], {**node("B", "Length"), "depends": "A"}), folder)
    assert isinstance(config.task, tuple)
    assert [model.depends for model in config.task if isinstance(model, ServeModel)] == [[], ["A"]]


def test_all_faults_of_a_graph_are_told_at_once(folder: Path) -> None:
    rows = (
        node("A", "Uper"),
        node("A", "Length", "AA"),
        node("C", "Join", "A", "B", module="model.py"),
        node("B", "Length", "C"),
        {**node("lone", "Upper"), "engine": "vllm", "engine_args": {"model": "/m"}},
        node("idle", "Upper"),
    )
    found = faults_of(graph_tree(*rows, request={"args": ["prompt"], "types": ["string"]}), folder)
    assert found == {
        "serve.0.name": "models.py has no class `Uper`; did you mean `Upper`?",
        "serve.1.serve_id": "`A` is the name of another model too",
        "serve.1.depends": "there is no model `AA`; did you mean `A`?",
        "serve.2.module": f"{folder}/model.py cannot be read: No such file or directory; did you mean `models.py`?",
        "serve.2.depends": "goes round in a circle: C -> B -> C",
        "serve.4.engine": "stands in a graph of models, whose nodes are classes; expected a service of its own for "
        "the engine, which a class of the graph asks over HTTP",
        "serve.4.engine_args": "stands in a graph of models, whose nodes are classes",
        "serve": "2 nodes have a result that no other takes: lone, idle; expected exactly one, whose result is the "
        "answer",
        f"{REQUEST}.types.0": "is `string`; expected one of str, int, float, bool, list, dict; did you mean `str`?",
    }


@pytest.mark.parametrize(
    ("edges", "circles"),
    [
        ({"A": ["A"]}, ["A -> A"]),
        ({"A": ["B"], "B": ["A"]}, ["A -> B -> A"]),
        ({"A": ["B"], "B": ["C"], "C": ["A"]}, ["A -> B -> C -> A"]),
        ({"A": ["B"], "B": ["A"], "C": ["D"], "D": ["C"]}, ["A -> B -> A", "C -> D -> C"]),
    ],
)
def test_circles_are_shown(edges: dict[str, list[str]], circles: list[str], folder: Path) -> None:
    rows = [node(name, "Length" if len(others) == 1 else "Join", *others) for name, others in edges.items()]
    with pytest.raises(ConfigError) as caught:
        load(graph_tree(*rows), folder)
    told = [fault.message for fault in caught.value.faults if "circle" in fault.message]
    shown = [text.removeprefix("goes round in a circle: ") for text in told]
    rings = [{*text.split(" -> ")} for text in shown]
    assert rings == [{*text.split(" -> ")} for text in circles]
    assert all(text.split(" -> ")[0] == text.split(" -> ")[-1] for text in shown)


FORWARDS: list[tuple[str, list[str], str | None]] = [
    ("def forward(self, x, y): ...", ["A", "A2"], None),
    ("def forward(self, x): ...", ["A", "A2"], "is given 2 results, of A, A2"),
    ("def forward(self, x, y, z): ...", ["A", "A2"], "is given 2 results"),
    ("def forward(self, x, y=1): ...", ["A"], None),
    ("def forward(self, *all): ...", ["A", "A2"], None),
    ("def forward(self, x, /): ...", ["A"], None),
    ("@staticmethod\n    def forward(x): ...", ["A"], None),
    ("@classmethod\n    def forward(cls, x): ...", ["A"], None),
    ("async def forward(self, x): ...", ["A"], None),
    ("def forward(self, x, *, mode): ...", ["A"], "needs `mode` by name"),
    ("def forward(self, x, *, mode=1): ...", ["A"], None),
    ("forward = print", ["A", "A2"], None),
    ("def forwards(self, x): ...", ["A"], "has no method `forward`; did you mean `forwards`?"),
    ("def __init__(self, path): ...\n    def forward(self, x): ...", ["A"], "needs arguments"),
    ("def __init__(self, path='m'): ...\n    def forward(self, x): ...", ["A"], None),
]


@pytest.mark.parametrize(("method", "depends", "told"), FORWARDS)
def test_forward_takes_the_results_of_what_it_depends_on(
    method: str, depends: list[str], told: str | None, folder: Path
) -> None:
    write_models(folder, f"{MODELS}\n\nclass It:\n    {method}\n")
    firsts = [node(name, "Upper") for name in depends]
    tree = graph_tree(*firsts, node("It", "It", *depends))
    if told is None:
        load(tree, folder)
    else:
        assert told in " ".join(faults_of(tree, folder).values())


ROOTS: list[tuple[str, list[str], list[str]]] = [
    ("def forward(self, prompt): ...", ["prompt"], []),
    ("def forward(self, promt): ...", ["prompt"], ["takes no `prompt`", "needs `promt`"]),
    ("def forward(self, prompt, n): ...", ["prompt"], ["needs `n`"]),
    ("def forward(self, prompt, n=3): ...", ["prompt"], []),
    ("def forward(self, prompt, *, n): ...", ["prompt", "n"], []),
    ("def forward(self, **fields): ...", ["prompt", "n"], []),
    ("def forward(self, prompt, /): ...", ["prompt"], ["takes no `prompt`"]),
    ("def forward(self, *args): ...", ["prompt"], ["takes no `prompt`"]),
    ("def forward(self): ...", [], []),
]


@pytest.mark.parametrize(("method", "fields", "told"), ROOTS)
def test_forward_of_a_root_takes_the_fields_of_the_request_by_name(
    method: str, fields: list[str], told: list[str], folder: Path
) -> None:
    write_models(folder, f"class It:\n    {method}\n")
    tree = graph_tree(node("It", "It"), request={"args": fields, "types": ["str"] * len(fields)})
    if not told:
        load(tree, folder)
        return
    with pytest.raises(ConfigError) as caught:
        load(tree, folder)
    assert len(caught.value.faults) == len(told)
    assert all(part in str(caught.value) for part in told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("class It(Base):\n    pass\nclass Base:\n    def forward(self, prompt): ...", ""),
        ("class It(Base):\n    pass\nclass Base:\n    def forward(self): ...", "takes no `prompt`"),
        ("from somewhere import It", ""),
        ("import torch\nclass It(torch.nn.Module):\n    pass", ""),
        ("try:\n    import x\nexcept ImportError:\n    class It:\n        def forward(self, prompt): ...", ""),
        ("class It(It):\n    def forward(self, prompt): ...", ""),
        ("class It:\n    pass", "has no method `forward`"),
        ("class It\n", "models.py:1: expected ':'"),
        ("x = '\x00'", "source code string cannot contain null bytes"),
        ("", "has no class `It`; expected a class"),
    ],
)
def test_a_class_is_read_from_its_text(text: str, told: str, folder: Path) -> None:
    write_models(folder, text)
    tree = graph_tree(node("It", "It"))
    if told:
        assert told in " ".join(faults_of(tree, folder).values())
    else:
        load(tree, folder)


@pytest.mark.parametrize(
    ("changes", "path", "told"),
    [
        ({"name": "generate"}, "name", "expected a path such as /generate"),
        ({"name": "/g/{x}"}, "name", "expected a path such as /generate"),
        ({"name": "/health"}, "name", "which every graph has for itself"),
        ({"name": "/manager/mine"}, "name", "which every graph has for itself"),
        ({"working_dir": "nowhere"}, "working_dir", "there is no folder"),
        ({"prefill_decode_disaggregation": True}, "prefill_decode_disaggregation", "expected one of them"),
        ({"host_lost_after_s": 5}, "host_lost_after_s", "ends with the first of its hosts"),
        ({"router": {"policy": "session"}}, "router.policy", "there is no router in front of a graph"),
        ({"request": {"args": ["prompt"], "types": []}}, "request", "has 1 args and 0 types"),
        ({"request": {"args": ["prompt", "prompt"], "types": ["str", "str"]}}, "request.args.1", "a second time"),
        ({"request": {"args": ["class"], "types": ["str"]}}, "request.args.0", "a name that a parameter can have"),
        ({"request": {"args": ["prompt"], "types": ["flot"]}}, "request.types.0", "did you mean `float`?"),
    ],
)
def test_faults_of_deploy(changes: dict[str, Any], path: str, told: str, folder: Path) -> None:
    tree = changed(graph_tree(), {f"experiment.runner.deploy.{name}": value for name, value in changes.items()})
    assert told in faults_of(tree, folder)[f"experiment.runner.deploy.{path}"]


def test_what_a_graph_cannot_run_in_is_refused(folder: Path) -> None:
    file = write_hostfile(folder, hosts(2, chip="cpu"))
    tree = changed(graph_tree(), {"experiment.runner.hostfile": str(file), "experiment.runner.docker": "box"})
    found = faults_of(tree, folder)
    assert "its first host is node0" in found["experiment.runner.hostfile"]
    assert "its nodes run in Ray's own workers" in found["experiment.runner.docker"]
    told = faults_of(changed(graph_tree(), {"experiment.runner.cli_args": {"model_path": "/m"}}), folder)
    assert "a graph has no engine" in told["experiment.runner.cli_args"]
    nameless = faults_of(graph_tree({"serve_id": "A"}), folder)
    assert nameless == {
        "serve.0.module": "is missing; expected a Python file",
        "serve.0.name": "is missing; expected the name of a class in its module",
    }
