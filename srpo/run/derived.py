"""What a run derives, and from what: an artefact carries the values it was made from, and is used for no others.

    made_from.json   {"learning_rate": 0.001, "table": "sha256:..."}   beside an artefact, written when it is whole

Files that an artefact depends on count by their content, models of the Hub by their name.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MADE_FROM = "made_from.json"
_WHOLE = 64 * 2**20
_SAMPLES = 64
_CHUNK = 2**20
POLICY_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
"""What of a folder a policy consists of; notes, evaluations and logs beside it do not count."""
_NOT_OF_A_POLICY = ("trainer_state.json", "run.json", "training_args.bin", "manifest.json")


class StaleArtefact(ValueError):
    """Something in a run's folder was made from other values than the recipe's; names the first that differs."""


def made_from(**values: Any) -> dict[str, Any]:
    """Values as they come back from JSON, to be compared and kept."""
    return dict(json.loads(json.dumps(values, sort_keys=True, default=str)))


def source(name: str | Path | None) -> str | None:
    """A file or folder by its content, anything else (a Hub id, a word such as `quickstart`) by its name."""
    if name is None or not Path(name).exists():
        return None if name is None else str(name)
    return digest(Path(name))


def digest(path: Path) -> str:
    """Content of a file, or of all files of a policy's folder, as one hash; of a file above 64 MiB, 64 parts of it."""
    hasher = hashlib.sha256()
    if path.is_file():
        _feed(hasher, path)
    else:
        files = {file for pattern in POLICY_FILES for file in path.glob(pattern) if file.is_file()}
        for file in sorted(file for file in files if not _beside_a_policy(file.name)):
            hasher.update(file.name.encode() + b"\0")
            _feed(hasher, file)
    return f"sha256:{hasher.hexdigest()}"


def _beside_a_policy(name: str) -> bool:
    return name in _NOT_OF_A_POLICY or name.endswith(MADE_FROM)


def _feed(hasher: Any, file: Path) -> None:
    size = file.stat().st_size
    hasher.update(f"{size}\0".encode())
    with file.open("rb") as stream:
        if size <= _WHOLE:
            hasher.update(stream.read())
            return
        for part in range(_SAMPLES):
            stream.seek((size - _CHUNK) * part // (_SAMPLES - 1))
            hasher.update(stream.read(_CHUNK))


def mark(path: Path, values: Mapping[str, Any]) -> None:
    """Say what an artefact (a folder, or a file) was made from, once it is whole."""
    _place(path).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def unmark(path: Path) -> None:
    """Before it is made again: what is interrupted in the middle counts as not made."""
    _place(path).unlink(missing_ok=True)


def is_made_from(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether the artefact is whole and was made from exactly these values."""
    return path.exists() and made_of(path) == dict(values)


def check_made_from(path: Path, values: Mapping[str, Any], what: str) -> None:
    """Raise unless the artefact is whole and was made from exactly these values.

    Args:
        what: the artefact, for the message.

    Raises:
        StaleArtefact: names the value that differs, then and now.
    """
    then = made_of(path) if path.exists() else None
    if then is None:
        raise StaleArtefact(f"{what}: {path} is missing or not whole (no {_place(path).name}): start the run again")
    changed = sorted(key for key in {*then, *values} if then.get(key) != values.get(key))
    if changed:
        key, more = changed[0], f" (and {', '.join(changed[1:])})" if changed[1:] else ""
        raise StaleArtefact(
            f"{what} in {path} was made with {key}={then.get(key)!r}, now it is {values.get(key)!r}{more}: set it "
            "back to go on, or start a new run in another output_dir"
        )


def _place(path: Path) -> Path:
    return path / MADE_FROM if path.is_dir() or not path.suffix else path.with_name(f"{path.name}.{MADE_FROM}")


def made_of(path: Path) -> dict[str, Any] | None:
    """What an artefact says that it was made from; None: nothing, or it is not whole."""
    try:
        found = json.loads(_place(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
