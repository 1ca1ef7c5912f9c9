"""The checks of a service that is a graph of models (`deploy.enable_composition`): its shape, its classes, its request.

A node without `depends` is called with the request's fields by name, any other with the results of the nodes that it
depends on, in their order: `forward(*results)`. The answer is the result of the one node that no other depends on.
"""

import keyword
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from flagscale.errors import Fault, find_nearest
from flagscale.runner.config.experiment import Deploy, Runner
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.signature import ClassOutline, FileOutline, Signature, UnreadableError, read_outline
from flagscale.runner.config.tasks import ServeModel

REQUEST_TYPES: Mapping[str, type] = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict,
}  # fmt: skip
"""what a field of a request may be: the types that JSON has"""
OWN_ROUTES = ("/health", "/openapi.json", "/status", "/manager")
ROUTER_SETTINGS = frozenset(
    {"header_timeout_s", "body_timeout_s", "max_header_bytes", "max_body_bytes", "drain_timeout_s"}
)
"""those of the router's settings that a graph heeds: there is no router in front of it"""
DEPLOY = "experiment.runner.deploy"


def check_graph(models: Sequence[ServeModel], runner: Runner, cwd: Path, hosts: Sequence[Host] = ()) -> Iterator[Fault]:
    """Every fault of the models of a service as a graph, or as what is no graph and has parts of one."""
    if not runner.deploy.enable_composition:
        yield from _find_stray(models)
        return
    yield from _find_engines(models, runner)
    yield from _find_unknown(models)
    yield from find_circles({model.serve_id: model.depends for model in models}, [model.serve_id for model in models])
    yield from _find_sinks(models)
    yield from _check_deploy(runner.deploy, cwd)
    yield from _check_place(runner, hosts)
    outlines: dict[Path, FileOutline | UnreadableError] = {}
    for index, model in enumerate(models):
        yield from _check_class(f"serve.{index}", model, runner.deploy, cwd, outlines)


def _find_stray(models: Sequence[ServeModel]) -> Iterator[Fault]:
    """Parts of a graph in a service that is none."""
    expected = f"{DEPLOY}.enable_composition: true, for a graph of models"
    for index, model in enumerate(models):
        path = f"serve.{index}"
        if model.engine is None and model.module is None:
            yield Fault(path, f"`{model.serve_id}` has neither an engine nor a module", expected="one of the two")
        elif model.engine is None:
            yield Fault(f"{path}.module", f"`{model.serve_id}` is a node of a graph", expected=expected)
        if model.depends:
            yield Fault(f"{path}.depends", "has no effect here", expected=expected)


def _find_engines(models: Sequence[ServeModel], runner: Runner) -> Iterator[Fault]:
    """What is meant for engines: a graph has none."""
    instead = "a service of its own for the engine, which a class of the graph asks over HTTP"
    for index, model in enumerate(models):
        given = {
            "engine": model.engine,
            "engine_args": model.engine_args,
            "engine_args_specific": model.engine_args_specific,
            "profile": model.profile,
        }
        for name, value in given.items():
            if value:
                text = "stands in a graph of models, whose nodes are classes"
                yield Fault(f"serve.{index}.{name}", text, expected=instead if name == "engine" else None)
    if runner.cli_args is not None and (runner.cli_args.model_path or runner.cli_args.engine_args):
        yield Fault("experiment.runner.cli_args", "names a model or arguments of an engine; a graph has no engine")


def _find_unknown(models: Sequence[ServeModel]) -> Iterator[Fault]:
    names = [model.serve_id for model in models]
    for index, model in enumerate(models):
        for name in model.depends:
            if name not in names:
                near = find_nearest(name, names)
                expected = None if near else f"one of {', '.join(names)}"
                yield Fault(f"serve.{index}.depends", f"there is no model `{name}`", expected, near)


def find_circles(depends: Mapping[str, Sequence[str]], names: Sequence[str]) -> Iterator[Fault]:
    """A fault for each circle of dependencies, as many as have no node in common.

    names: of the nodes, in the order in which they stand in the file
    """
    left = dict(depends)
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            circle: list[str] = error.args[1]  # each depends on the one before it
            ring = list(reversed(circle))
            text = f"goes round in a circle: {' -> '.join(ring)}"
            yield Fault(f"serve.{names.index(ring[0])}.depends", text)
            left = {
                name: [other for other in others if other not in ring]
                for name, others in left.items()
                if name not in ring
            }
        else:
            return


def list_sinks(depends: Mapping[str, Sequence[str]]) -> list[str]:
    """The nodes that no other depends on."""
    used = {other for others in depends.values() for other in others}
    return [name for name in depends if name not in used]


def _find_sinks(models: Sequence[ServeModel]) -> Iterator[Fault]:
    sinks = list_sinks({model.serve_id: model.depends for model in models})
    if len(sinks) > 1:
        text = f"{len(sinks)} nodes have a result that no other takes: {', '.join(sinks)}"
        yield Fault("serve", text, expected="exactly one, whose result is the answer")


def _check_deploy(deploy: Deploy, cwd: Path) -> Iterator[Fault]:
    route, path = deploy.name or "/", f"{DEPLOY}.name"
    if not route.startswith("/") or any(letter in route for letter in "{}?# ") or not route.isprintable():
        yield Fault(path, f"is `{route}`", expected="a path such as /generate")
    elif any(route == own or route.startswith(own + "/") for own in OWN_ROUTES):
        yield Fault(path, f"is `{route}`, which every graph has for itself", expected="another path, as /generate")
    if deploy.working_dir and not (cwd / deploy.working_dir).is_dir():
        yield Fault(f"{DEPLOY}.working_dir", f"there is no folder {cwd / deploy.working_dir}")
    if deploy.prefill_decode_disaggregation:
        yield Fault(
            f"{DEPLOY}.prefill_decode_disaggregation", "stands beside enable_composition", expected="one of them"
        )
    if "host_lost_after_s" in deploy.model_fields_set:
        yield Fault(f"{DEPLOY}.host_lost_after_s", "has no effect: a graph of models ends with the first of its hosts")
    for name in deploy.router.keys() - ROUTER_SETTINGS:
        yield Fault(f"{DEPLOY}.router.{name}", "has no effect: there is no router in front of a graph of models")
    yield from _check_request(deploy)


def _check_request(deploy: Deploy) -> Iterator[Fault]:
    request, path = deploy.request, f"{DEPLOY}.request"
    if request is None:
        return
    if len(request.args) != len(request.types):
        text = f"has {len(request.args)} args and {len(request.types)} types"
        yield Fault(path, text, expected="a type for each of the args, in their order")
    for index, name in enumerate(request.args):
        if not name.isidentifier() or keyword.iskeyword(name):
            yield Fault(f"{path}.args.{index}", f"is `{name}`", expected="a name that a parameter can have")
        if name in request.args[:index]:
            yield Fault(f"{path}.args.{index}", f"`{name}` stands here a second time")
    for index, kind in enumerate(request.types):
        if kind not in REQUEST_TYPES:
            near = find_nearest(kind, REQUEST_TYPES)
            yield Fault(f"{path}.types.{index}", f"is `{kind}`", f"one of {', '.join(REQUEST_TYPES)}", near)


def _check_place(runner: Runner, hosts: Sequence[Host]) -> Iterator[Fault]:
    """The program that answers runs where the command is typed, with the head of Ray beside it."""
    if hosts and not hosts[0].is_local:
        text = f"its first host is {hosts[0].name}, but a graph of models is answered by the launching machine"
        expected = "`localhost` as the first host, and runner.master_addr as the others reach it"
        yield Fault("experiment.runner.hostfile", text, expected=expected)
    for name, given in (("docker", runner.docker), ("no_shared_fs", runner.no_shared_fs)):
        if given:
            yield Fault(f"experiment.runner.{name}", "is not for a graph of models: its nodes run in Ray's own workers")


def _check_class(
    path: str, model: ServeModel, deploy: Deploy, cwd: Path, outlines: dict[Path, FileOutline | UnreadableError]
) -> Iterator[Fault]:
    """A node's class: there, made without arguments, with a `forward` that takes what it will be given."""
    for name in ("module", "name"):
        if not getattr(model, name) and model.engine is None:
            wanted = "a Python file" if name == "module" else "the name of a class in its module"
            yield Fault(f"{path}.{name}", "is missing", expected=wanted)
    if not model.module or not model.name:
        return
    file = cwd / model.module
    if file not in outlines:
        try:
            outlines[file] = read_outline(file)
        except UnreadableError as error:
            outlines[file] = error
    outline = outlines[file]
    if isinstance(outline, UnreadableError):
        near = find_nearest(file.name, [found.name for found in file.parent.glob("*.py")])
        suggestion = str(Path(model.module).with_name(near)) if near and not file.exists() else None
        yield Fault(f"{path}.module", str(outline), suggestion=suggestion)
    elif model.name in outline.classes:
        yield from _check_methods(path, model, deploy, outline.classes[model.name])
    elif model.name not in outline.others:  # else it comes from elsewhere, and only its import tells
        near = find_nearest(model.name, outline.classes)
        expected = None if near else f"one of {', '.join(outline.classes)}" if outline.classes else "a class"
        yield Fault(f"{path}.name", f"{model.module} has no class `{model.name}`", expected, near)


def _check_methods(path: str, model: ServeModel, deploy: Deploy, outline: ClassOutline) -> Iterator[Fault]:
    made = outline.methods.get("__init__")
    if made is not None and made.required:
        text = f"`{model.name}.__init__{made}` needs arguments, and a node is made without any"
        yield Fault(f"{path}.name", text, expected="a default for each of them")
    if "forward" not in outline.methods:
        if outline.is_whole:
            near = find_nearest("forward", outline.methods)
            yield Fault(f"{path}.name", f"`{model.name}` has no method `forward`", suggestion=near)
        return
    forward = outline.methods["forward"]
    if forward is None:
        return
    if model.depends:
        yield from _check_positions(path, model, forward)
    else:
        yield from _check_names(path, model, forward, deploy.request.args if deploy.request else [])


def _check_positions(path: str, model: ServeModel, forward: Signature) -> Iterator[Fault]:
    """`forward` of a node that is given the results of others."""
    num_given = len(model.depends)
    num_needed = sum(name in forward.required for name in forward.positional)
    if num_needed > num_given or (num_given > len(forward.positional) and not forward.takes_more):
        text = f"`{model.name}.forward{forward}` is given {num_given} results, of {', '.join(model.depends)}"
        yield Fault(f"{path}.depends", text, expected="a parameter for each, in their order")
    for name in forward.keyword_only:
        if name in forward.required:
            yield Fault(f"{path}.name", f"`{model.name}.forward{forward}` needs `{name}` by name; results have none")


def _check_names(path: str, model: ServeModel, forward: Signature, fields: Sequence[str]) -> Iterator[Fault]:
    """`forward` of a node that is given the request."""
    where = f"{path}.name"
    for name in fields:
        if name not in forward.named and not forward.takes_names:
            text = f"`{model.name}.forward{forward}` takes no `{name}`, which is a field of {DEPLOY}.request"
            yield Fault(where, text, suggestion=find_nearest(name, forward.named))
    for name in (*forward.positional, *forward.keyword_only):
        if name in forward.required and name not in fields:
            text = f"`{model.name}.forward{forward}` needs `{name}`, and {DEPLOY}.request has no such field"
            yield Fault(where, text, suggestion=find_nearest(name, fields))
