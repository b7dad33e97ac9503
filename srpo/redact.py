"""Keeps credentials out of recipes, logs and model cards: what looks like one, and how it is replaced."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "<redacted>"

# Keys whose text value is a secret whatever it looks like (`eos_token` and `pad_token` are not among them).
_SECRET_KEY = re.compile(r"(^|_)(hub_token|api_?key|secret|password|access_token|auth_token|bearer)$", re.I)
# Prefixes that providers give their keys.
_SECRET_PREFIX = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-|sk_live_|hf_|nvapi-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|wandb_v1_)"
    r"[A-Za-z0-9_\-]{12,}"
)
# A long run of letters and digits and nothing else: a key without a prefix.
_LONG_TOKEN = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9]{32,}")
# Keys whose long hexadecimal values are commits or digests.
_DIGEST_KEY = re.compile(r"revision|commit|sha|digest|fingerprint", re.I)
_SECRET_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.I)
_SHORTEST_SECRET = 8


def looks_like_secret(key: str, value: Any) -> bool:
    """Whether `value`, written under `key`, may be a credential. Errs on the side of caution for long random words."""
    if not isinstance(value, str) or not value or value == REDACTED:
        return False
    if _SECRET_KEY.search(key) or _SECRET_PREFIX.search(value):
        return True
    return _LONG_TOKEN.fullmatch(value.strip()) is not None and not _DIGEST_KEY.search(key)


def holds_secret(key: str, value: Any) -> bool:
    """`looks_like_secret`, at any depth of lists and mappings."""
    return any(looks_like_secret(inner, leaf) for inner, leaf in _leaves(key, value))


def redacted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which whatever looks like a secret, at any depth, is replaced."""
    return {str(key): _redact(str(key), value) for key, value in mapping.items()}


def scrubbed(text: str) -> str:
    """`text` without known key formats and without the value of any secret-named environment variable."""
    values = (v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and len(v) >= _SHORTEST_SECRET)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    return _SECRET_PREFIX.sub(REDACTED, text)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _leaves(str(inner), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(key, item)
    else:
        yield key, value


def _redact(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted(value)
    if isinstance(value, (list, tuple)):
        return [_redact(key, item) for item in value]
    return REDACTED if looks_like_secret(key, value) else value
