"""The bodies of requests as models: made of the configuration's `request.args` and `types`, or fixed."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

from flagscale.runner.config.graph import REQUEST_TYPES
from flagscale.serve.graph.board import MOST_BYTES, MOST_CHARS
from flagscale.serve.router.answers import Refusal


class Body(BaseModel):
    """A JSON object whose types are meant: `"5"` is no number. What it holds beyond its fields is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TaskName(Body):
    """What names a task."""

    task_id: str = Field(min_length=1, max_length=MOST_CHARS)


class TaskStatus(TaskName):
    """A task and what is noted of it."""

    status: Any


def make_request_model(fields: Sequence[tuple[str, str]]) -> type[BaseModel]:
    """The model of a request. Fields stand in it under names of its own, for a user's may be pydantic's (`json`)."""
    made: dict[str, Any] = {
        f"field_{index}": (REQUEST_TYPES[kind], Field(alias=name)) for index, (name, kind) in enumerate(fields)
    }
    return create_model("Request", __base__=Body, **made)


def read_fields(model: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by the names that the configuration gives them.

    Raises:
        Refusal: 422, with all fields that do not fit.
    """
    try:
        return model.model_validate(tree).model_dump(by_alias=True)
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=False)
    told = []
    for row in rows:
        name = ".".join(map(str, row["loc"]))
        told.append(f"`{name}`: {'is missing' if row['type'] == 'missing' else row['msg']}")
    param = str(rows[0]["loc"][0]) if rows[0]["loc"] else None
    raise Refusal(422, "; ".join(told), "invalid_body", param)


def read_task(tree: Mapping[str, Any]) -> tuple[str, Any]:
    """A task's name and status.

    Raises:
        Refusal: 422.
    """
    values = read_fields(TaskStatus, tree)
    if (size := len(to_json(values["status"]))) > MOST_BYTES:
        raise Refusal(422, f"`status`: has {size} bytes; expected {MOST_BYTES} at most", "invalid_body", "status")
    return values["task_id"], values["status"]
