"""Every refusal in the shape that OpenAI's clients read: message, type, the parameter at fault, a code."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flagscale.errors import ConfigError, FlagScaleError, UserError

RETRY_AFTER_S = "1"
ONE_OF_MANY = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
}
"""what may have several forms, said once instead of once for each form"""


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class RequestError(Exception):
    """A request cannot be answered; `status` and the rest is what the client is told."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def error_body(status: int, message: str, param: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    # A name that was sent may hold half a surrogate pair, which no answer can.
    message = message.encode("utf-8", "replace").decode("utf-8")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status if code is None else code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    more = {"Retry-After": RETRY_AFTER_S} if status == 503 else {}
    return JSONResponse(error_body(status, message, param, code), status, {**more, **(headers or {})})


def refusal_of(error: UserError, param: str | None = None) -> RequestError:
    """What the engine found wrong with a request, as the client is told; `param`: where it does not say itself."""
    if isinstance(error, ConfigError):
        message = "; ".join(str(fault).removeprefix("sampling.") for fault in error.faults)
        return RequestError(message, param=error.faults[0].path.removeprefix("sampling.").split(".")[0])
    message = str(error)
    if message.startswith("sampling."):
        message = message.removeprefix("sampling.")
        param = message.partition(":")[0]
    return RequestError(message, param=param)


def error_of(error: BaseException) -> RequestError:
    """The same voice for whatever goes wrong, also when a stream runs and the status is already out."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return refusal_of(error)
    if isinstance(error, FlagScaleError):
        return RequestError(str(error), status=503)
    return RequestError("the engine failed on this request", status=500)


def describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """(message, first parameter at fault); what was sent is not echoed."""
    texts, params = [], []
    for each in error.errors():
        if each["type"] == "json_invalid":
            return f"the body is not JSON: {each['ctx']['error']} at character {each['loc'][-1]}", None
        if each["loc"] == ("body",):
            return "the body is not a JSON object; expected one with content type application/json", None
        place = [str(part) for part in each["loc"] if part != "body"]
        if place and place[0] in ONE_OF_MANY and each["type"] != "missing":
            place, each = place[:1], {"msg": f"expected {ONE_OF_MANY[place[0]]}"}
        param = place[0] if place else None
        text = f"{'.'.join(place)}: {each['msg']}" if place else each["msg"]
        if text not in texts:
            texts.append(text)
            params.append(param)
    return "; ".join(texts), params[0]


def install_faults(app: FastAPI) -> None:
    """Answer every error of the framework, the engine and ourselves in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, *describe_validation(error))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return error_response(error.status_code, message, headers=error.headers)

    @app.exception_handler(RequestError)
    @app.exception_handler(FlagScaleError)
    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> JSONResponse:
        found = error_of(error)
        return error_response(found.status, found.message, found.param, found.code)
