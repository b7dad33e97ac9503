"""What went wrong between a run and the Hub, in words."""

from srpo.redact import scrubbed

_ADVICE = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def explain(error: BaseException) -> str:
    """One sentence on what failed, free of credentials."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    statuses = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    status = next((s for s in statuses if isinstance(s, int)), None)
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    if status in (401, 403):
        cause_text = f"the Hub refused the credentials (HTTP {status}): {_ADVICE}"
    elif status == 404:
        cause_text = f"the Hub does not know the repository, or hides it from this account (HTTP 404): {_ADVICE}"
    elif status == 429:
        cause_text = "the Hub's rate limit or storage quota is reached (HTTP 429)"
    elif status is not None and status >= 500:
        cause_text = f"the Hub has a problem of its own (HTTP {status}), which usually passes"
    elif "OfflineModeIsEnabled" in names:
        cause_text = "HF_HUB_OFFLINE is set"
    elif "LocalTokenNotFoundError" in names:
        cause_text = f"nobody is logged in to the Hub: {_ADVICE}"
    elif names & {"ConnectionError", "ConnectError", "NetworkError", "TimeoutError", "TimeoutException"}:
        cause_text = "the Hub cannot be reached"
    else:
        cause_text = "unexpected error"
    first_line = str(error).strip().partition("\n")[0][:200]
    return scrubbed(f"{cause_text} [{type(error).__name__}: {first_line}]")
