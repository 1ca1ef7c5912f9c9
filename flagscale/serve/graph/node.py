"""What a replica of a node is, in a worker of Ray: the user's class, and calls of its `forward`.

A `forward` that is no coroutine gets one call at a time, in a thread of its own, so that a long one keeps neither Ray's
health checks nor the others waiting, and a class need not be safe for threads. A coroutine gets as many as come.
"""

import asyncio
import importlib.util
import inspect
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any


class NodeStartError(Exception):
    """A class could not be made; the message is one line that says where and why."""


def load_module(path: Path) -> ModuleType:
    """The file as a module, its folder being importable as it is for a script."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"flagscale_graph_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def locate(error: BaseException, path: Path) -> str:
    """`models.py:3: ModuleNotFoundError: No module named 'x'`: the last line of the user's own file that led there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{where}: {describe_error(error)}"


def describe_error(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class Node:
    """One replica.

    path: the file with the class, absolute or relative to the folder that the worker starts in
    """

    def __init__(self, path: str, class_name: str) -> None:
        file = Path(path).absolute()
        try:
            made = getattr(load_module(file), class_name)()
            self.forward_of = made.forward
        except Exception as error:  # of the user's file; told in one line, and whole in the log
            traceback.print_exc()
            raise NodeStartError(locate(error, file)) from None
        self.is_async = inspect.iscoroutinefunction(self.forward_of)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="forward")

    async def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the class's `forward`; its traceback goes to the log."""
        try:
            if self.is_async:
                return await self.forward_of(*args, **kwargs)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.thread, lambda: self.forward_of(*args, **kwargs))
        except Exception:
            traceback.print_exc()
            raise
