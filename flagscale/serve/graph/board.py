"""The board of `/manager/*_task_status`: what callers note about tasks of their own, within bounds of memory."""

from collections import OrderedDict
from typing import Any

MOST_TASKS = 10_000
MOST_CHARS = 256
"""of a task's id"""
MOST_BYTES = 4096
"""of a task's status, as JSON"""


class TaskBoard:
    """Task id -> its status, any JSON value. The task that was set longest ago makes room for a new one."""

    def __init__(self, most_tasks: int = MOST_TASKS) -> None:
        self._most_tasks = most_tasks
        self._statuses: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._statuses)

    def set(self, task_id: str, status: Any) -> None:
        self._statuses[task_id] = status
        self._statuses.move_to_end(task_id)
        while len(self._statuses) > self._most_tasks:
            self._statuses.popitem(last=False)

    def get(self, task_id: str) -> Any:
        """Raises KeyError."""
        return self._statuses[task_id]

    def delete(self, task_id: str) -> Any:
        """Raises KeyError."""
        return self._statuses.pop(task_id)
