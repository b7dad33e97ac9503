"""Keeps credentials out of recipes, logs and model cards: what looks like one, and how it is replaced."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "<redacted>"

# Names in all their spellings: X-API-Key, apiKey, "api key" and OPENAI_API_KEY are the words x api key, api key, ...
_HEADERS = re.compile(r"(^|_)(extra|default)_(query|body)$")
# Names under which nothing but a credential stands, whatever its type.
_SECRET_NAME = re.compile(
    r"(^|_)(hub_token|api_?keys?|(access|secret|private|auth|account|subscription|license|master|signing|virtual)_?keys?"
    r"(_id)?|secrets?|client_secret|passwords?|passwd|passphrase|pwd|access_?tokens?|auth_?tokens?|refresh_?tokens?"
    r"|session_?tokens?|id_token|bearer(_tokens?)?|(proxy_)?authori[sz]ation|credentials?)$"
)
# The same anywhere in a name that goes to others' servers, without its underscores.
_SECRET_PART = re.compile(
    r"api(key|token)|access(key|token)|(private|secret|client|signing)key|(auth|refresh|session|bearer)token"
    r"|secret|passwo?r?d|passphrase|authori[sz]|credential|bearer|cookie|header"
)
# Names under which a text is one, but for the last words that are a model's tokens, a column or a place in a cache.
_SECRET_TEXT_NAME = re.compile(r"(^|_)(token|auth|authentication)$")
_NO_SECRET = re.compile(
    r"(^|_)(eos|bos|pad|unk|mask|sep|cls|stop|start|end|think|image|audio|video|special|first|last|new|per|single|any)_token$"
)
_SECRET_KEY_NAME = re.compile(r"^keys?$|(^|_)x(_\w+)?_key$")
# Prefixes that providers give their keys.
_SECRET_PREFIX = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-|sk_live_|rk_live_|hf_|nvapi-|gsk_|xai-|pplx-|r8_|fw_|tgp_v1_|api_org_|csk-|ghp_|gho_|ghs_|ghu_|ghr_"
    r"|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|dop_v1_|wandb_v1_)[A-Za-z0-9_\-]{12,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*"
    r"|(?i:\bbearer\s+(?=\S*[0-9])[A-Za-z0-9._~+/=-]{8,})|(?i:\bbasic\s+[A-Za-z0-9+/]{6,}=)"
)
# A name and a value in one text: "Authorization: abc123", "api_key=...".
_ASSIGNED = re.compile(
    r"(?i:\b(?:(?:x-)?api[_ -]?key|secret(?:[_-]key)?|password|passwd|(?:access|auth)[_-]?token|authorization)"
    r"[\"']?\s*[:=]\s*[\"']?)(?=[^\s\"',;&]*[0-9])[^\s\"',;&]{6,}"
)
# In addresses: https://user:password@host and ?key=...
_URL_USER = re.compile(r"(?<=://)(?!git@)[^/\s@?#\"']+@")
_URL_QUERY = re.compile(
    r"(?i:(?<=[?&;#])[\w.-]*(?:key|token|secret|passw(?:or)?d|pwd|signature|sig|credential|auth|sas)[\w.-]*=)[^&#\s\"'<]+"
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
    name = _words(key)
    if _SECRET_NAME.search(name) or (_SECRET_TEXT_NAME.search(name) and not _NO_SECRET.search(name)):
        return True
    if any(found.group() != REDACTED + "@" for found in _URL_USER.finditer(value)):
        return True
    if any(pattern.search(value) for pattern in (_SECRET_PREFIX, _ASSIGNED, _URL_QUERY)):
        return True
    return _LONG_TOKEN.fullmatch(value.strip()) is not None and not _DIGEST_KEY.search(key)


def holds_secret(key: str, value: Any) -> bool:
    """`looks_like_secret`, at any depth of lists and mappings, also where they are written as JSON in a text."""
    return any(looks_like_secret(inner, leaf) for inner, leaf in _leaves(key, value))


def credential_in(key: str, value: Any) -> str | None:
    """Where in `value` a credential, a header or a place for either stands, as a path of names; None: nowhere.

    For what is sent to others' servers and shared with people: here the name alone is enough, whatever is below it.
    The properties of a JSON schema may have any name.
    """
    return _credential(key, value, key, schema=False)


def _credential(key: str, value: Any, path: str, schema: bool) -> str | None:
    if value is None:
        return None
    value = _parsed(value)
    name = _words(key)
    if not (schema and isinstance(value, Mapping)):
        if _HEADERS.search(name) or _SECRET_NAME.search(name) or _SECRET_PART.search(name.replace("_", "")):
            return path
        if isinstance(value, str) and _SECRET_KEY_NAME.search(name):
            return path
    if isinstance(value, Mapping):
        for inner, item in value.items():
            text = str(inner)
            if looks_like_secret("", text):
                return f"{path}, in a name"
            if found := _credential(text, item, f"{path}.{text}", schema=name == "properties"):
                return found
        return None
    if isinstance(value, (list, tuple)):
        return next((p for item in value if (p := _credential(key, item, path, schema))), None)
    return path if looks_like_secret(key, value) else None


def _words(key: str) -> str:
    """A name as lower-case words with underscores between them, however it is spelled."""
    plain = unicodedata.normalize("NFKC", key)
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return re.sub(r"[^a-z0-9]+", "_", apart.lower()).strip("_")


def _parsed(value: Any) -> Any:
    """A list or mapping that is written as JSON, as the command line has it; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def redacted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which whatever looks like a secret, at any depth, is replaced."""
    return {
        REDACTED if looks_like_secret("", str(key)) else str(key): _redact(str(key), value)
        for key, value in mapping.items()
    }


def scrubbed(text: str) -> str:
    """`text` without known key formats, credentials in addresses, and values of secret-named environment variables."""
    values = (v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and len(v) >= _SHORTEST_SECRET)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _URL_USER.sub(f"{REDACTED}@", _SECRET_PREFIX.sub(REDACTED, text))
    text = _ASSIGNED.sub(REDACTED, text)
    return _URL_QUERY.sub(lambda found: f"{found.group().partition('=')[0]}={REDACTED}", text)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    value = _parsed(value)
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield "", str(inner)  # a key in the place of a name
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
    if looks_like_secret(key, value):
        return REDACTED
    return json.dumps(_redact(key, _parsed(value))) if holds_secret(key, value) else value
