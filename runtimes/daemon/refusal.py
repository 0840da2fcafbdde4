"""What the daemon answers to a request that it does not serve: one line, with a status of HTTP."""

from __future__ import annotations

from typing import Any

from edgekit.errors import EdgekitError

LONGEST = 600  # characters of a message; a client's own text may be in it


class RefusedError(EdgekitError):
    """status: of HTTP; code: a word for programs; parameter: the field of the request that is wrong; retry_after:
    seconds after which the client may try again."""

    def __init__(
        self, status: int, message: str, *, code: str = "", parameter: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(shortened(message))
        self.status, self.code = status, code or CODES.get(status, "invalid_request")
        self.parameter, self.retry_after = parameter, retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def as_openai(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        category = "invalid_request_error" if self.status < 500 else "server_error"
        category = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, category)
        return {"error": {"message": str(self), "type": category, "param": self.parameter, "code": self.code}}

    def as_inference(self) -> dict[str, Any]:
        """Return it as clients of the Open Inference Protocol read it."""
        return {"error": str(self)}


CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "overloaded",
    504: "deadline_exceeded",
    507: "insufficient_memory",
}


def shortened(message: str) -> str:
    """Return a message on one line, and not too long."""
    line = " ".join(message.split())
    line = line.encode(errors="backslashreplace").decode()  # halves of a surrogate pair cannot be sent
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def from_error(error: BaseException, status: int = 400) -> RefusedError:
    """Return the refusal for an error. Only an EdgekitError's text is for clients."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, EdgekitError):
        return RefusedError(status, str(error))
    return RefusedError(500, "the daemon has failed on this request; its log has the reason")


def stopping() -> RefusedError:
    return RefusedError(503, "the daemon stops; send the request again", code="stopping", retry_after=5)


def late() -> RefusedError:
    return RefusedError(504, "the answer was not complete at its deadline; ask for fewer tokens, or give more time")
