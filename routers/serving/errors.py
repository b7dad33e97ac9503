"""What a client is told when a request cannot be served: one exception, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RequestError(Exception):
    """Told to the client as ``{"error": {message, type, param, code}}``.

    Args:
        status: of HTTP, 400 to 599.
        message: for a person; holds no secret.
        param: field of the request that is wrong.
        code: for programs, such as "model_not_found".
        headers: sent with the answer, such as ``Retry-After``.
        kind: OpenAI's "type"; None: by the status.
        srpo: what the router did before it failed: who was asked, and what that cost.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        kind: str | None = None,
        srpo: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.srpo = dict(headers or {}), srpo
        self.kind = kind or ("rate_limit_error" if status == 429 else _kind_of(status))

    def document(self) -> dict[str, Any]:
        """The body. Also sent as the last event of a stream that fails after its first byte."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error} if self.srpo is None else {"error": error, "srpo": dict(self.srpo)}


def _kind_of(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"
