"""API errors in OpenAI's format: an HTTP status and {"error": {message, type, param, code}}.

Every error response of the server is built here, whatever raised it.
"""

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

INVALID = "invalid_request_error"
SERVER = "server_error"
CLIENT_GONE = 499  # logged for a request whose client disconnected; never sent
DO_NOT_RETRY = {"x-should-retry": "false"}  # honoured by OpenAI's clients, which otherwise repeat every 5xx


class ApiError(HTTPException):
    """An error response. An HTTPException, so that FastAPI passes it through wherever it is raised."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.kind, self.param = code, kind, param

    def body(self) -> dict:
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client disconnected or stopped reading; no response can be delivered."""

    code = "client_gone"


Failure = ApiError | ClientGone  # what ends a request early


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def context_length(prompt: int, answer: int, limit: int, *, param: str) -> ApiError:
    """A prompt and an answer that do not fit into the model together; with the numbers."""
    asked = f"The prompt has {prompt:,} tokens"
    asked += f" and the answer may have {answer:,}, {prompt + answer:,} together" if answer else ""
    return invalid(
        f"This model's context is {limit:,} tokens. {asked}. Shorten the prompt or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


def overloaded(waiting: int, retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"The queue is full: {waiting:,} answers are running or waiting. Try again in {retry_after} s.",
        code="queue_full",
        kind="rate_limit_error",
        headers={"retry-after": str(retry_after)},
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"The answer was not finished within {seconds:g} s, the longest a request may take on this server. "
        "Ask for fewer tokens, or stream the answer.",
        code="request_timeout",
        kind=SERVER,
        headers=DO_NOT_RETRY,
    )


def stopping() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down.",
        code="server_stopping",
        kind=SERVER,
        headers={"retry-after": "10", "connection": "close"},
    )


def nonfinite(found: str) -> ApiError:
    """found: what the engine says of it, and what to do."""
    return ApiError(500, found, code="nonfinite_logits", kind=SERVER, headers=DO_NOT_RETRY)


def engine_failed() -> ApiError:
    return ApiError(
        500,
        "The engine failed while this request was running; the server's log says why. Other requests go on; send this "
        "one again.",
        code="engine_error",
        kind=SERVER,
    )


def internal(request_id: str) -> ApiError:
    return ApiError(
        500,
        f"The server failed; its log says why, under {request_id}.",
        code="internal_error",
        kind=SERVER,
    )


CODES = {404: "not_found", 405: "method_not_allowed"}


def from_http(error: HTTPException, method: str, path: str) -> ApiError:
    """Map the framework's own HTTPException (unknown path, wrong method, unreadable body) to an ApiError."""
    if isinstance(error, ApiError):
        return error
    messages = {
        404: f"There is nothing at {path}. This server's endpoints are listed at /openapi.json.",
        405: f"{path} does not take {method}.",
        400: "The body cannot be read as JSON.",
    }
    return ApiError(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        code=CODES.get(error.status_code, "invalid_request"),
        headers=error.headers,
    )


def from_validation(error: RequestValidationError) -> ApiError:
    """All that is wrong with a request's parameters in one error; param and code are the first one's."""
    found = [_finding(item) for item in error.errors()]
    more = f" And {len(found) - 20} more." if len(found) > 20 else ""
    param, code, _ = found[0]
    return invalid(" ".join(message for _, _, message in found[:20]) + more, param=param, code=code)


def _finding(item: dict) -> tuple[str | None, str, str]:
    """(parameter, code, sentence) of one finding of pydantic's."""
    kind, name = item["type"], _dotted(item["loc"][1:])
    if kind == "json_invalid":
        return None, "invalid_json", f"The body is not JSON: {item['ctx']['error']} at character {item['loc'][-1]}."
    if kind in ("missing", "model_attributes_type", "dict_type") and name is None:
        return None, "invalid_json", "The body has to be a JSON object."
    if kind == "missing":
        return name, "missing_required_parameter", f"`{name}` is missing."
    if kind == "extra_forbidden":
        return name, "unknown_parameter", f"`{name}` is not a parameter that this server knows."
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return name, code, f"`{name}`: {item['msg'].rstrip('.')}."


def _dotted(place: tuple) -> str | None:
    """("messages", 0, "content") -> "messages[0].content"; long names of unknown parameters are cut."""
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:100] or None
