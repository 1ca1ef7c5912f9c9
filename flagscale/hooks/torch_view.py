"""The module `torch` as a backend written for CUDA may see it on a machine without: every device is the CPU.

The view is a module object of its own, put into the backend's modules under the name `torch`. torch itself, and
everyone else who uses it, keeps the truth: `torch.cuda.is_available()` stays False for torch's own optimisers,
checkpoints and data loaders. The price is that a backend module which imports torch inside a function gets the real
one.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "tril_indices",
    "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
"""The functions of torch that take a device and that Megatron calls with one."""

COMPUTE_CAPABILITY = (8, 0)
"""What the view says when asked which kind of chip it is: one without what Hopper brought."""


def is_accelerator(device: Any) -> bool:
    """Whether `device`, in any of the ways torch takes one, is not the CPU and not `meta`."""
    kind = getattr(device, "type", device)
    return isinstance(kind, int) or (isinstance(kind, str) and kind.partition(":")[0] == "cuda")


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a CUDA device turned into the CPU and pinned memory, which only an accelerator has, left out."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_accelerator(kwargs.get("device", "cpu")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """What synchronising, freeing a cache or pushing a profiler's range comes to on a CPU."""


def _zero(*_args: Any, **_kwargs: Any) -> int:
    return 0


class Stream:
    """A CUDA stream where there is only one order of work: waiting is over at once."""

    cuda_stream = 0
    wait_stream = wait_event = synchronize = _nothing

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """A CUDA event that has always happened."""

    record = wait = synchronize = _nothing

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: "Event") -> float:
        return 0.0


def _copy_of(module: ModuleType, name: str) -> ModuleType:
    """A module with the same attributes; those that `module` makes on demand are made by it."""
    copy = ModuleType(name, module.__doc__)
    vars(copy).update({key: value for key, value in vars(module).items() if key not in ("__name__", "__spec__")})
    vars(copy)["__getattr__"] = functools.partial(getattr, module)
    return copy


def _make_device(torch: Any) -> type:
    """`torch.device` as a class: constructs a real device, of the CPU where CUDA was asked for, and knows one."""

    class DeviceType(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, torch.device)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            kind = args[0] if args else kwargs.get("device", kwargs.get("type"))
            return torch.device("cpu") if is_accelerator(kind) else torch.device(*args, **kwargs)

    return DeviceType("device", (), {})


def _make_cuda(torch: Any) -> ModuleType:
    """`torch.cuda` with one device, which is the CPU; its random generator is the CPU's."""
    cuda = _copy_of(torch.cuda, "torch.cuda")
    stream = Stream()
    quiet = ("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats", "_lazy_init", "init")
    numbers = (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
        "device_memory_used",
    )
    replaced: dict[str, Any] = {
        **dict.fromkeys(quiet, _nothing),
        **dict.fromkeys(numbers, _zero),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: torch.device("cpu"),
        "get_device_capability": lambda *_args: COMPUTE_CAPABILITY,
        "get_device_name": lambda *_args: "CPU",
        "get_device_properties": lambda *_args: SimpleNamespace(
            name="CPU",
            major=COMPUTE_CAPABILITY[0],
            minor=COMPUTE_CAPABILITY[1],
            total_memory=0,
            multi_processor_count=1,
        ),
        "memory_stats": lambda *_args: defaultdict(int),
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda *_args: contextlib.nullcontext(),
        "device": lambda *_args: contextlib.nullcontext(),
        "current_stream": lambda *_args: stream,
        "default_stream": lambda *_args: stream,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "random": SimpleNamespace(get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state()),
        "nvtx": SimpleNamespace(
            range_push=_nothing, range_pop=_nothing, range=lambda *_args, **_kwargs: contextlib.nullcontext()
        ),
    }
    vars(cuda).update(replaced)
    return cuda


@functools.cache
def torch_view() -> ModuleType:
    """The view, made once: modules that compare `torch` by identity see the same one."""
    import torch

    view = _copy_of(torch, "torch")
    vars(view).update({name: on_cpu(getattr(torch, name)) for name in FACTORIES})
    vars(view).update(cuda=_make_cuda(torch), device=_make_device(torch))
    return view
