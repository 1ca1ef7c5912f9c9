"""What Megatron 0.19 needs to train on CPUs with gloo, beside the arguments that the chip record Generic_CPU sets.

Most of it is one hook: the modules of Megatron get a view of torch in which every CUDA device is the CPU. What the view
cannot reach is what is asked of a tensor or a module, not of torch, and the few functions that call CUDA by other ways.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from flagscale.hooks.hook import Hook
from flagscale.hooks.megatron import FIRST, LAST, VERSIONS

STASH = "megatron.core.transformer.moe.ops.paged_stash"


def give_a_view_of_torch(original: Any) -> Any:
    import torch

    from flagscale.hooks.torch_view import torch_view

    return torch_view() if original is torch else original


def leave_out_the_stash_kernels(original: ModuleType | None) -> ModuleType:
    """The module without its kernels, so that triton stays absent for everyone who asks whether it is there."""
    if original is not None:
        return original

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("the paged stash of MoE activations needs triton, which needs a GPU: leave it off")

    module = ModuleType(STASH)
    vars(module).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=refuse, paged_stash_pop_kernel=refuse)
    return module


def stay_on_the_cpu(_original: Any) -> Any:
    def cuda(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        """The tensor or module itself: it is where it can be."""
        return self

    return cuda


def say_cuda_to_megatron(original: Any) -> Any:
    def type_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if args or kwargs or not asked_by.startswith("megatron."):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    return type_of


def set_the_cpu_generator(_original: Any) -> Any:
    def set_state(new_state: Any, device: int = -1, graph_safe: bool = False) -> None:  # noqa: ARG001
        import torch

        torch.set_rng_state(new_state)

    return set_state


def fork_the_cpu_generator(_original: Any) -> Any:
    @contextlib.contextmanager
    def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the stream `name`, then go on with the one before, wherever either stands."""
        import torch

        outer, outer_state = self._current_state_name, torch.get_rng_state()
        if outer != "default-rng":
            self.states_[outer] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer_state if outer == "default-rng" else self.states_[outer])
            self._current_state_name = outer

    return fork


def convert_to_numpy_when_asked(original: Any) -> Any:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy=False, record_stream=record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    return maybe_move_tensor_to_cpu


def mark_norms_as_sequence_parallel(original: Any) -> Any:
    build = original.__func__ if isinstance(original, staticmethod) else original

    def new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        import copy

        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(new)


def warm_nothing_up(_original: Any) -> Any:
    def warm_up(tp_size: int | None = None) -> None:
        """Nothing is compiled on first use here."""

    return warm_up


def start_with_empty_moments(original: Any) -> Any:
    def state_dict(self: Any) -> Any:
        """The state, which for an optimiser that has not stepped is step 0 and moments of zero."""
        import torch

        optimizer = self.optimizer
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                state = optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)
        return original(self)

    return state_dict


def count_the_steps_of_each_parameter(original: Any) -> Any:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load_state_dict


def load_no_step_where_none_was_saved(original: Any) -> Any:
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    return set_states


HOOKS = (
    *FIRST,
    Hook(
        "megatron.*:torch",
        VERSIONS,
        "Megatron asks torch.cuda for the current device, streams, events, memory and random state everywhere, makes "
        "tensors with device='cuda', and refuses to start where torch.cuda.is_available() is False",
        give_a_view_of_torch,
    ),
    Hook(STASH, VERSIONS, "it imports triton without asking whether it is there", leave_out_the_stash_kernels),
    Hook("torch:Tensor.cuda", VERSIONS, "batches and loaded states are moved with tensor.cuda()", stay_on_the_cpu),
    Hook("torch.nn:Module.cuda", VERSIONS, "a built model is moved with module.cuda()", stay_on_the_cpu),
    Hook(
        "torch:Tensor.type",
        VERSIONS,
        "the optimisers sort parameters by names of tensor types and know none but torch.cuda.*",
        say_cuda_to_megatron,
    ),
    *LAST,
    Hook(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        VERSIONS,
        "it reaches into CUDA's list of generators",
        set_the_cpu_generator,
    ),
    Hook(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        VERSIONS,
        "it warns at each dropout that the CPU's generator moved, which here is what it is for",
        fork_the_cpu_generator,
    ),
    Hook(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        VERSIONS,
        "it converts to numpy only what it has moved, so that split sizes stay tensors",
        convert_to_numpy_when_asked,
    ),
    Hook(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        VERSIONS,
        "sequence parallelism needs no more of a norm than marked parameters, and torch's norms have no marks",
        mark_norms_as_sequence_parallel,
    ),
    Hook(
        "megatron.training.initialize:_warmup_jit_function",
        VERSIONS,
        "it draws random numbers, as many as the split of the model has it, which on CPUs come from the generator that "
        "the weights are then drawn from: a model would begin differently under each split",
        warm_nothing_up,
    ),
    Hook(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
        VERSIONS,
        "with torch's Adam it reads the step count of an optimiser that has none before its first step, so a job that "
        "resumes fails",
        start_with_empty_moments,
    ),
    Hook(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        VERSIONS,
        "with torch's Adam it gives all parameters one step counter, which then counts once for each of them",
        count_the_steps_of_each_parameter,
    ),
    Hook(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        VERSIONS,
        "with torch's Adam it looks for a step count in each parameter's saved state, which a fully reshardable "
        "checkpoint keeps elsewhere",
        load_no_step_where_none_was_saved,
    ),
)
