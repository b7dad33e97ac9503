"""The name of a policy: a folder here or an id of the Hub; what is neither is an error of one sentence."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

from srpo.hub.files import changed
from srpo.redact import scrubbed

FROM_NOTHING = ("tiny", "tiny_moe")
"""Policies that are made here (`srpo.policy.TINY`), with a tokenizer of the task's texts."""
_ANSWER = 3.0
"""Seconds that the Hub has to answer at all."""
_PARTS = ("config.json", "adapter_config.json")


def check_policy_name(name: str) -> None:
    """Raise where a name can be no Hub id, and is no folder of a policy either. Asks nobody.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a model.
    """
    path = Path(name)
    if path.is_dir():
        if not any((path / part).exists() for part in _PARTS):
            raise FileNotFoundError(f"{name} holds neither config.json nor adapter_config.json; is the training over?")
        if (why := changed(path)) is not None:
            raise FileNotFoundError(f"{name} cannot be used: {why}")
        return
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    # `outputs/mine` may be a Hub id by its form, but somebody who has a folder `outputs` means that one.
    if local or not name.strip() or (name.count("/") == 1 and path.parent.is_dir()):
        raise FileNotFoundError(f"{name!r} is no folder here: give the folder of a policy, or a Hub id (owner/name)")


@contextmanager
def named_policy(name: str) -> Iterator[None]:
    """Around what loads a policy: says in one sentence which one cannot be loaded, and draws no bar of what lies here.

    Raises:
        FileNotFoundError: see `check_policy_name`; and for whatever transformers cannot find, reach or read.
    """
    from transformers.utils import logging as shown

    check_policy_name(name)
    here = Path(name).is_dir()
    silent = "" if here else unreachable()
    bars = here and shown.is_progress_bar_enabled()  # those of a download are worth their lines
    if bars:
        shown.disable_progress_bar()
    try:
        with _cache_only() if silent else nullcontext():
            yield
    except (OSError, ValueError) as error:  # what transformers cannot find, and what it does not know
        if silent and isinstance(error, OSError):
            what = f"is no folder here and not whole in this machine's cache of the Hub, {silent}"
            raise FileNotFoundError(f"{name} {what}") from error
        what = "cannot be loaded" if here else "is no folder here, and cannot be loaded from the Hub"
        raise FileNotFoundError(f"{name} {what}: {' '.join(str(error).split())}") from error
    finally:
        if bars:
            shown.enable_progress_bar()


def unreachable() -> str:
    """Why nothing comes from the Hub, as a relative clause; "": it answers. Asked within seconds, at most once a
    minute: huggingface_hub itself tries for half a minute, for every file, before it looks into its cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "which is switched off here (HF_HUB_OFFLINE)"
    return _silence(constants.ENDPOINT, int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _silence(endpoint: str, minute: int) -> str:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_ANSWER, follow_redirects=False)
    except Exception as error:  # of httpx, of a proxy, of TLS: whatever it is, loading would meet it too
        return scrubbed(f"which cannot be reached ({endpoint}: {type(error).__name__})")
    return ""


@contextmanager
def _cache_only() -> Iterator[None]:
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
