"""Hooks: they take or they refuse, once, and the view of torch lies to nobody but its readers."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import HookError
from flagscale.hooks import hook as machinery
from flagscale.hooks.hook import Hook, install_hooks, verify_hooks
from flagscale.hooks.megatron import keep_or_backport_override
from flagscale.hooks.megatron_cpu import (
    HOOKS,
    convert_to_numpy_when_asked,
    fork_the_cpu_generator,
    mark_norms_as_sequence_parallel,
    say_cuda_to_megatron,
)
from flagscale.hooks.torch_view import FACTORIES, is_accelerator, on_cpu, torch_view

PACKAGE = {
    "__init__.py": "",
    "tools.py": "LIMIT = 3\nclass Worker:\n    def work(self):\n        return 'worked'\n",
    "early.py": "from json import dumps\nimport json\n",
    "late.py": "import json\n",
    "broken.py": "import a_compiler_for_gpus\n",
    "user.py": "from toybackend.broken import kernel\n",
}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package to hook, and a machinery that forgets afterwards."""
    folder = tmp_path / "toybackend"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machinery, "_taken", {})
    monkeypatch.setattr(machinery, "_after_import", machinery._AfterImport())
    path = list(sys.meta_path)
    yield
    sys.meta_path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toybackend"]:
        del sys.modules[name]


def always(value: Any) -> Callable[[Any], Any]:
    def replace(_original: Any) -> Any:
        return value

    return replace


def make_hook(target: str, make: Callable[[Any], Any], versions: str = ">=1,<2", adds: bool = False) -> Hook:
    return Hook(target, versions, "a test wants it", make, adds)


@pytest.mark.usefixtures("backend")
def test_an_attribute_at_any_depth_is_replaced_once() -> None:
    def louder(original: Any) -> Any:
        return lambda self: original(self).upper()

    hooks = [make_hook("toybackend.tools:LIMIT", always(4)), make_hook("toybackend.tools:Worker.work", louder)]
    for _ in range(2):
        install_hooks(hooks, "1.5")
    tools = importlib.import_module("toybackend.tools")
    assert tools.LIMIT == 4
    assert tools.Worker().work() == "WORKED"


@pytest.mark.usefixtures("backend")
def test_a_hook_for_other_versions_refuses_before_anything_is_changed() -> None:
    hooks = [make_hook("toybackend.tools:LIMIT", always(4)), make_hook("toybackend.tools:Worker", always(None), "<1")]
    with pytest.raises(HookError) as caught:
        install_hooks(hooks, "1.5")
    message = str(caught.value)
    for part in ("hook replace", "toybackend.tools:Worker", "<1", "1.5", "a test wants it"):
        assert part in message
    assert "toybackend.tools" not in sys.modules


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("target", ["toybackend.tools:SPEED", "toybackend.tools:Worker.rest", "toybackend.gone:X"])
def test_a_place_that_is_not_there_is_an_error(target: str) -> None:
    with pytest.raises(HookError, match="found no such place"):
        install_hooks([make_hook(target, always(1))], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_hook_that_adds_may_find_nothing_and_may_keep_what_it_finds() -> None:
    install_hooks([make_hook("toybackend.tools:SPEED", always(9), adds=True)], "1.0")
    assert importlib.import_module("toybackend.tools").SPEED == 9
    install_hooks([make_hook("toybackend.tools:LIMIT", lambda original: original)], "1.0")
    assert importlib.import_module("toybackend.tools").LIMIT == 3


@pytest.mark.usefixtures("backend")
def test_a_whole_package_is_hooked_before_and_after_its_modules_are_imported() -> None:
    import json

    stand_in = SimpleNamespace(name="stand-in")
    early = importlib.import_module("toybackend.early")
    hook = make_hook("toybackend.*:json", lambda original: stand_in if original is json else original)
    install_hooks([hook], "1.0")
    late = importlib.import_module("toybackend.late")
    assert early.json is late.json is stand_in
    assert late.__spec__.name == "toybackend.late"
    assert sys.modules["json"] is json
    verify_hooks([hook], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_package_whose_modules_have_no_such_attribute_is_an_error() -> None:
    with pytest.raises(HookError, match="met no module of the package"):
        install_hooks([make_hook("toybackend.*:torch", always(1))], "1.0")


@pytest.mark.usefixtures("backend")
def test_a_module_that_cannot_be_imported_is_stood_in_for() -> None:
    stand_in = ModuleType("toybackend.broken")
    stand_in.kernel = "none"  # type: ignore[attr-defined]
    install_hooks([make_hook("toybackend.broken", always(stand_in))], "1.0")
    assert importlib.import_module("toybackend.user").kernel == "none"


@pytest.mark.usefixtures("backend")
def test_what_is_undone_is_noticed() -> None:
    hook = make_hook("toybackend.tools:LIMIT", always(4))
    install_hooks([hook], "1.0")
    importlib.import_module("toybackend.tools").LIMIT = 3
    with pytest.raises(HookError, match="was undone"):
        verify_hooks([hook], "1.0")


def test_every_hook_for_megatron_says_why_and_has_its_own_name() -> None:
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
    assert all(len(hook.why.split()) > 5 and hook.name != "<lambda>" and hook.versions for hook in HOOKS)


def test_override_is_kept_where_python_has_it() -> None:
    assert keep_or_backport_override(len) is len
    assert callable(keep_or_backport_override(None))


# the view of torch


def test_the_view_has_a_device_and_torch_keeps_the_truth() -> None:
    real = torch.cuda.is_available()
    view = torch_view()
    assert view.cuda.is_available()
    assert view.cuda.device_count() == 1
    assert torch.cuda.is_available() is real
    assert view is torch_view()
    assert view.Tensor is torch.Tensor
    assert view.distributed is torch.distributed
    assert view.cuda.OutOfMemoryError is torch.cuda.OutOfMemoryError


DEVICES = st.sampled_from(["cuda", "cuda:3", 0, 7, torch.device("cuda", 1), "cpu", torch.device("cpu"), None])


@given(DEVICES, st.lists(st.integers(0, 4), max_size=3))
def test_whatever_device_is_asked_for_the_tensor_is_on_the_cpu(device: Any, shape: list[int]) -> None:
    made = torch_view().zeros(shape, device=device, pin_memory=True)
    assert made.device == torch.device("cpu")
    assert torch.equal(made, torch.zeros(shape))


@given(st.sampled_from(["cuda", "cuda:0", "cpu", "meta"]))
def test_a_device_of_the_view_is_a_device_of_torch(name: str) -> None:
    device = torch_view().device(name)
    assert isinstance(device, torch.device)
    assert isinstance(device, torch_view().device)
    assert device.type == ("meta" if name == "meta" else "cpu")
    assert not is_accelerator(device)


def test_every_factory_is_one_of_torch_and_keeps_its_name() -> None:
    for name in FACTORIES:
        assert getattr(torch_view(), name).__name__ == name
        assert getattr(torch_view(), name).__wrapped__ is getattr(torch, name)


@given(st.integers(), st.text())
def test_arguments_that_are_no_device_pass_through(number: int, text: str) -> None:
    assert on_cpu(lambda *args, **kwargs: (args, kwargs))(number, text=text) == ((number,), {"text": text})


def test_streams_and_events_are_done_at_once() -> None:
    cuda = torch_view().cuda
    stream, event = cuda.Stream(priority=-1), cuda.Event(enable_timing=True)
    with cuda.stream(stream):
        stream.wait_stream(cuda.current_stream())
        event.record(stream)
    stream.wait_event(stream.record_event(event))
    cuda.synchronize()
    assert stream.query()
    assert event.query()
    assert event.elapsed_time(cuda.Event()) == 0.0
    assert cuda.memory_stats()["allocated_bytes.all.peak"] == cuda.max_memory_allocated() == 0


def test_the_view_s_random_state_is_the_cpu_s() -> None:
    cuda = torch_view().cuda
    cuda.manual_seed(5)
    state = cuda.get_rng_state()
    first = torch.rand(3)
    cuda.set_rng_state(state, "cuda")
    assert torch.equal(first, torch.rand(3))


# single replacements


class Tracker:
    """What Megatron's tracker holds, with our way of forking."""

    fork = fork_the_cpu_generator(None)

    def __init__(self, names: list[str]) -> None:
        self._current_state_name = "default-rng"
        self.states_ = {name: torch.Generator().manual_seed(seed).get_state() for seed, name in enumerate(names)}


STEPS = st.lists(st.tuples(st.sampled_from(["outside", "a", "b"]), st.sampled_from([None, "a", "b"])), max_size=12)


@given(STEPS)
def test_each_stream_gives_its_own_numbers_however_draws_are_mixed(steps: list[tuple[str, str | None]]) -> None:
    tracker = Tracker(["a", "b"])
    torch.manual_seed(99)
    alone = {"outside": torch.Generator().manual_seed(99)}
    alone |= {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(["a", "b"])}

    def check_draw(name: str) -> None:
        assert torch.equal(torch.rand(2), torch.rand(2, generator=alone[name]))

    for name, inner in steps:
        if name == "outside":
            check_draw(name)
            continue
        with tracker.fork(name):
            check_draw(name)
            if inner:
                with tracker.fork(inner):
                    check_draw(inner)
            check_draw(name)
    check_draw("outside")


def test_only_megatron_hears_of_cuda_tensors() -> None:
    type_of = say_cuda_to_megatron(torch.Tensor.type)

    def ask(*args: Any) -> Any:
        return type_of(torch.zeros(1), *args)

    answers = {}
    for name in ("megatron.core.optimizer", "torch.optim", "megatronic"):
        inside = FunctionType(ask.__code__, {"__name__": name, "torch": torch}, closure=ask.__closure__)
        answers[name] = (inside(), inside(torch.int).dtype)
    assert answers == {
        "megatron.core.optimizer": ("torch.cuda.FloatTensor", torch.int),
        "torch.optim": ("torch.FloatTensor", torch.int),
        "megatronic": ("torch.FloatTensor", torch.int),
    }


def test_split_sizes_become_numpy_when_asked() -> None:
    move = convert_to_numpy_when_asked(lambda tensor, **_kwargs: tensor)
    assert type(move(torch.ones(2), as_numpy=True)).__name__ == "ndarray"
    assert isinstance(move(torch.ones(2)), torch.Tensor)
    assert move(None, as_numpy=True) is None


@pytest.mark.parametrize("parallel", [True, False])
def test_norms_are_marked_for_sequence_parallelism(parallel: bool) -> None:
    def build(_cls: Any, config: Any, hidden_size: int) -> Any:
        assert not config.sequence_parallel
        return torch.nn.LayerNorm(hidden_size)

    config = SimpleNamespace(sequence_parallel=parallel)
    norm = mark_norms_as_sequence_parallel(staticmethod(build)).__func__(object, config, 4)
    assert [getattr(parameter, "sequence_parallel", False) for parameter in norm.parameters()] == [parallel, parallel]
    assert config.sequence_parallel is parallel
