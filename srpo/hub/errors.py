"""What went wrong between a run and the Hub, in words; and whether it may pass."""

from collections.abc import Iterator

from srpo.redact import scrubbed

_ADVICE = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_PASSING = (408, 409, 412, 425, 429)
"""Statuses below 500 of something that another try may find otherwise: too slow, another writer, too many requests."""
_NO_ANSWER = {"ConnectionError", "TransportError", "TimeoutError", "ConnectTimeout"}
"""Classes of requests' and httpx's errors, and the system's, of a connection that fails, breaks or is silent."""


def explain(error: BaseException) -> str:
    """One sentence on what failed, free of credentials."""
    status, names = _status(error), _names(error)
    if status in (401, 403):
        cause_text = f"the Hub refused the credentials (HTTP {status}): {_ADVICE}"
    elif status == 404:
        cause_text = f"the Hub does not know the repository, or hides it from this account (HTTP 404): {_ADVICE}"
    elif status in (409, 412):
        cause_text = f"somebody else is writing to the repository (HTTP {status})"
    elif status == 429:
        cause_text = "the Hub's rate limit or storage quota is reached (HTTP 429)"
    elif status is not None and status >= 500:
        cause_text = f"the Hub has a problem of its own (HTTP {status}), which usually passes"
    elif "OfflineModeIsEnabled" in names:
        cause_text = "HF_HUB_OFFLINE is set"
    elif "LocalTokenNotFoundError" in names:
        cause_text = f"nobody is logged in to the Hub: {_ADVICE}"
    elif names & _NO_ANSWER:
        cause_text = "the Hub cannot be reached"
    elif "Differs" in names:
        return scrubbed(str(error))
    else:
        cause_text = "unexpected error"
    first_line = str(error).strip().partition("\n")[0][:200]
    return scrubbed(f"{cause_text} [{type(error).__name__}: {first_line}]")


def passes(error: BaseException) -> bool:
    """Whether another try may succeed."""
    status, names = _status(error), _names(error)
    if status is not None:
        return status in _PASSING or status >= 500
    return bool(names & _NO_ANSWER) and not names & {"OfflineModeIsEnabled", "LocalTokenNotFoundError"}


def retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 where it does not say."""
    for one in _chain(error):
        value = str(getattr(getattr(one, "response", None), "headers", {}).get("Retry-After", ""))
        if value.isdecimal():
            return float(value)
    return 0.0


def _status(error: BaseException) -> int | None:
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in _chain(error)]
    return next((status for status in statuses if isinstance(status, int)), None)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or one.__context__
