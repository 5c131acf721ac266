"""The error tree, and its mapping to HTTP. Everything a user can meet is drawn here once.

    DeltaserveError                 500  internal_error
      InvalidRequest                400  invalid_request
        ContextTooLong              400  context_length_exceeded
        DeltaRefused                400  invalid_delta
        InvalidComposition          400  invalid_composition (deltas that have no exact sum)
        UnsupportedTask             400  unsupported_task    (a backbone or a delta of another kind)
        DatasetInvalid              400  invalid_dataset     (rows of a file to train on; with ``rows``: the bad ones)
      AuthenticationFailed          401  invalid_api_key
      PermissionDenied              403  permission_denied
      NotFound                      404  not_found
        ModelNotFound               404  model_not_found
      MethodNotAllowed              405  method_not_allowed
      Conflict                      409  conflict            x-should-retry: false
        Quarantined                 409  delta_quarantined
      TooLarge                      413  too_large
      LimitExceeded                 429  rate_limit_exceeded Retry-After
      Unavailable                   503  unavailable         Retry-After
        QueueTimeout                503  queue_timeout       Retry-After
        EngineRestarting            503  engine_restarting   Retry-After
      RowFailed                     500  row_failed          (one row's computation failed; its neighbours' did not)

The wire form is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from server.types import BadRow


class DeltaserveError(Exception):
    """Base of all errors. ``param`` names the offending field; ``retry_after`` is in seconds."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body of an HTTP error answer or of a stream's error event."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Extra response headers."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}


class InvalidRequest(DeltaserveError):
    """The request itself is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """Prompt longer than the backbone's context."""

    code = "context_length_exceeded"


class DeltaRefused(InvalidRequest):
    """An uploaded delta that cannot be served exactly."""

    code = "invalid_delta"


class InvalidComposition(InvalidRequest):
    """A sum of deltas that has no exact meaning, or that the device cannot hold."""

    code = "invalid_composition"

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param)


class UnsupportedTask(InvalidRequest):
    """The backbone or the delta is made for something else: an encoder does not generate, a decoder has no embeddings."""

    code = "unsupported_task"

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param)


class DatasetInvalid(InvalidRequest):
    """A file to train or validate on that cannot be used.

    ``param`` is ``training_file`` or ``validation_file``. ``rows`` are the first bad rows, ``count`` is how many there are;
    ``report`` is a JSONL file of all of them, as long as its folder is kept, and ``report_file`` the id of a copy that the
    caller can get from ``/v1/files``, where one was made.
    """

    code = "invalid_dataset"

    def __init__(
        self,
        message: str,
        *,
        param: str,
        rows: Sequence[BadRow] = (),
        count: int = 0,
        report: Path | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.rows = list(rows)
        self.count = count
        self.report = report
        self.report_file: str | None = None

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"]["rows"] = [row._asdict() for row in self.rows]
        body["error"]["bad_rows"] = self.count
        body["error"]["report_file"] = self.report_file
        body["error"]["report_file"] = self.report_file
        return body


class AuthenticationFailed(DeltaserveError):
    """No key, or one that nobody holds."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class PermissionDenied(DeltaserveError):
    """A valid key on a route that only the admin key may use."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(DeltaserveError):
    """No such object, or it is another tenant's: the two look the same."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No backbone, delta, version or alias of that name."""

    code = "model_not_found"


class MethodNotAllowed(DeltaserveError):
    """The path exists, the HTTP method there does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(DeltaserveError):
    """The object's present state does not allow this; repeating it will not help."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class Quarantined(Conflict):
    """A delta or a sum of deltas whose computation failed."""

    code = "delta_quarantined"

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param)


class TooLarge(DeltaserveError):
    """The body is larger than the server takes."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class LimitExceeded(DeltaserveError):
    """A tenant's own limit."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(DeltaserveError):
    """The server cannot take this now: overload, draining, not ready."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, retry_after=retry_after, code=code)


class QueueTimeout(Unavailable):
    """The request waited for a place in the batch for as long as the server lets one wait."""

    code = "queue_timeout"

    def __init__(self, message: str, *, retry_after: float = 10.0, code: str | None = None) -> None:
        super().__init__(message, retry_after=retry_after, code=code)


class EngineRestarting(Unavailable):
    """The engine process died or is starting; running requests end with this."""

    code = "engine_restarting"


class RowFailed(DeltaserveError):
    """One row's computation failed (a poisoned delta, say). Other rows of the batch are untouched."""

    code = "row_failed"
