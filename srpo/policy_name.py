"""The name of a policy: a folder here or an id of the Hub; what is neither is an error of one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srpo.hub.files import POLICY
from srpo.run.whole import MANIFEST, fault

FROM_NOTHING = ("tiny", "tiny_moe")
"""Policies that are made here (`srpo.policy.TINY`), with a tokenizer of the task's texts."""
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
        if (path / MANIFEST).is_file() and (why := fault(path, only=POLICY)) is not None:
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
    bars = Path(name).is_dir() and shown.is_progress_bar_enabled()  # those of a download are worth their lines
    if bars:
        shown.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:  # what transformers cannot find, and what it does not know
        what = "cannot be loaded" if Path(name).is_dir() else "is no folder here, and cannot be loaded from the Hub"
        raise FileNotFoundError(f"{name} {what}: {' '.join(str(error).split())}") from error
    finally:
        if bars:
            shown.enable_progress_bar()
