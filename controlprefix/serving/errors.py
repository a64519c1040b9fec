"""Errors as HTTP responses in OpenAI's form."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from controlprefix.errors import (
    ClientDisconnectedError,
    ContextLengthError,
    ControlPrefixError,
    EngineError,
    ForgottenError,
    InternalServerError,
    InvalidNameError,
    MissingDependencyError,
    ModelNotFoundError,
    OverloadedError,
    PrefixFormatError,
    RateLimitError,
    RequestError,
    RequestTimeoutError,
    StoreError,
    UnauthorizedError,
    UnknownNameError,
    VersionConflictError,
)
from controlprefix.serving.openai import ErrorBody, ErrorResponse

_log = logging.getLogger(__name__)

_TRIED_TYPE = re.compile(r"(str|int|float|bool|InputItem)$|[a-z-]+\[")  # of a union

_MAX_FINDINGS = 10  # mistakes of one body in a response
_MAX_CHARACTERS = 300  # of each

# The first that matches: status, OpenAI's error type, and a code.
_RESPONSES: tuple[tuple[type[ControlPrefixError], int, str, str], ...] = (
    (UnauthorizedError, 401, "authentication_error", "invalid_api_key"),
    (RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (OverloadedError, 503, "server_error", "overloaded"),
    (ClientDisconnectedError, 499, "server_error", "client_gone"),  # seen in metrics only
    (RequestTimeoutError, 504, "server_error", "timeout"),
    (InternalServerError, 500, "server_error", "internal_error"),
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (InvalidNameError, 400, "invalid_request_error", "invalid_name"),
    (UnknownNameError, 404, "invalid_request_error", "not_found"),
    (PrefixFormatError, 500, "server_error", "damaged_prefix"),
    (EngineError, 503, "server_error", "engine_unavailable"),
    (VersionConflictError, 409, "invalid_request_error", "conflict"),
    (ForgottenError, 409, "invalid_request_error", "forgotten"),
    (MissingDependencyError, 501, "server_error", "not_installed"),
    (StoreError, 503, "server_error", "store_unavailable"),
    (ControlPrefixError, 400, "invalid_request_error", "invalid_request"),
)
# Their messages contain internal paths and URLs, which clients must not see.
_PRIVATE = (StoreError, EngineError, InternalServerError, PrefixFormatError)
_CONFLICTS = (VersionConflictError, ForgottenError)


def error_body(error: ControlPrefixError) -> tuple[int, ErrorBody]:
    """The status and the body of an error."""
    message = str(error)
    if isinstance(error, _PRIVATE) and not isinstance(error, _CONFLICTS):
        _log.warning("%s", error)
        message = "something is wrong on the server's side; try again later"
    status, error_type, code = next(
        response[1:] for response in _RESPONSES if isinstance(error, response[0])
    )
    return status, ErrorBody(message=message, type=error_type, code=code)


def error_response(status: int, error: ErrorBody, **headers: str) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(ErrorResponse(error=error).model_dump(), status, headers)


def _place(loc: Sequence[int | str]) -> str:
    """Where in the body a mistake is: `messages.0.role`, without the types that were tried."""
    parts = [str(part) for part in loc[1:]]
    return ".".join(part for part in parts if not _TRIED_TYPE.match(part))


def _message(finding: Mapping[str, Any]) -> str:
    """What is wrong with a field."""
    if finding["type"] in ("model_attributes_type", "model_type"):
        return "must be a JSON object"
    if finding["type"] == "extra_forbidden":
        return "unknown field; /docs lists those of this route"
    return str(finding["msg"]).removeprefix("Value error, ")


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every error in OpenAI's form."""

    @app.exception_handler(ControlPrefixError)
    async def handle_known(_: Request, error: ControlPrefixError) -> JSONResponse:
        status, body = error_body(error)
        headers = {}
        if isinstance(error, RateLimitError):
            headers["Retry-After"] = str(max(1, math.ceil(error.wait_s)))
        elif status == 503:
            headers["Retry-After"] = "1"
        elif status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error_response(status, body, **headers)

    @app.exception_handler(RecursionError)
    async def handle_depth(_: Request, __: RecursionError) -> JSONResponse:
        return error_response(*error_body(RequestError("the body is nested too deeply")))

    @app.exception_handler(Exception)
    async def handle_unknown(_: Request, error: Exception) -> JSONResponse:
        return error_response(*error_body(InternalServerError(str(error))))

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent, which may be large.
        findings = error.errors()
        lines = [
            f"{_place(finding['loc'])[:_MAX_CHARACTERS] or 'body'}: "
            f"{_message(finding)[:_MAX_CHARACTERS]}"
            for finding in findings[:_MAX_FINDINGS]
        ]
        if any(finding["type"] == "json_invalid" for finding in findings):
            reason = str(findings[0].get("ctx", {}).get("error", ""))[:_MAX_CHARACTERS]
            lines = [f"the body is no JSON: {reason} at character {findings[0]['loc'][-1]}"]
        elif any(
            finding["type"] == "model_attributes_type" and len(finding["loc"]) == 1
            for finding in findings
        ):
            lines = ["the body must be a JSON object, with Content-Type: application/json"]
        if len(findings) > _MAX_FINDINGS:
            lines.append(f"and {len(findings) - _MAX_FINDINGS} more")
        message = "; ".join(lines)
        body = ErrorBody(message=message, type="invalid_request_error", code="invalid_request")
        return error_response(400, body)

    @app.exception_handler(HTTPException)
    async def handle_http(_: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 400:  # what JSON's reader raises beside a syntax error
            message = "the body is not valid UTF-8 JSON, or contains a number with too many digits"
        body = ErrorBody(message=message, type="invalid_request_error", code="http")
        return error_response(error.status_code, body, **(error.headers or {}))
