"""Bringing a folder to the Hub: ask what is there, send what is missing or differs, ask again; done when nothing is.

So whatever was interrupted goes on where it was, a commit whose answer got lost is not made twice, and what counts as
pushed has been verified by the hashes that the Hub itself tells. An error that passes (no connection, one that breaks,
409, 412, 429, 5xx, another writer) is waited for and tried again until a deadline; any other is raised at once.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from srpo.hub.errors import explain, passes, retry_after
from srpo.hub.files import files_to_push
from srpo.run.whole import MANIFEST, manifest, read_manifest, sha256_of
from srpo.types import Stopped

DEADLINE = 300.0
_REQUEST = 60.0
"""Seconds that one request may be silent; huggingface_hub itself would wait for ever."""
_SENDS = 3
"""Times that a file is sent before it counts as spoilt by the Hub."""
_PAUSES = (1.0, 30.0)
"""Seconds between two tries: of the first pause, which doubles, and at most."""


class NotPushed(Stopped):
    """The Hub has not taken it, and may later: `srpo push` sends what is missing."""

    code = 75  # EX_TEMPFAIL of sysexits.h

    @classmethod
    def of(cls, output: Path, repo_id: str) -> "NotPushed":
        """Of a run that has finished."""
        return cls(f"the run is finished and not on the Hub: srpo push {output} {repo_id} sends what is missing")


class Differs(Exception):
    """What the Hub holds is not what was asked for, yet."""


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    resumable: bool = False,
    beside: Sequence[str] = (),
    deadline: float = DEADLINE,
) -> str:
    """Creates the repository where it is missing and uploads the policy in a folder; returns the URL of the commit
    that holds it, verified by hash.

    Args:
        folder: a saved model, or a checkpoint of a run.
        repo_id: `name` or `owner/name`.
        path_in_repo: folder in the repository; None: its root.
        commit_message: as the Hub shows it.
        token: None: the logged-in user's, or HF_TOKEN.
        private: only for a repository that is created.
        revision: branch to commit to, made where it is missing; None: main.
        resumable: also upload optimiser, scheduler, random state, teacher and whatever else resuming needs.
        beside: names of further files that belong to the policy (see `srpo.hub.files`).
        deadline: seconds in which it is tried again. A request under way may take longer; `srpo.hub.push` ends it.

    Raises:
        ValueError: the folder holds no policy.
        NotPushed: errors that pass have not passed within the deadline.
        Any other error of `huggingface_hub`.
    """
    from huggingface_hub import CommitOperationAdd

    root = Path(folder)
    prefix = "" if path_in_repo is None else f"{path_in_repo.strip('/')}/"
    names = files_to_push(folder, resumable, beside)
    files: dict[str, Path | bytes] = {f"{prefix}{name}": root / name for name in names}
    if MANIFEST in names:  # what goes up is whole by itself, without what stays here
        known_here = read_manifest(root)
        content = manifest({name: entry for name, entry in known_here.items() if name in names})
        files[f"{prefix}{MANIFEST}"] = content.encode()
    hub = Repository(repo_id, token, revision)
    sent: Counter[str] = Counter()

    def missing() -> tuple[list[str], str]:
        known, url = hub.files(private)
        return [name for name, content in files.items() if not _is_there(content, known.get(name))], url

    def push() -> str:
        names, url = missing()
        if spoilt := [name for name in names if sent[name] == _SENDS]:
            raise NotPushed(f"the Hub holds another {spoilt[0]} than was sent, {_SENDS} times")
        if names:
            hub.commit([CommitOperationAdd(name, files[name]) for name in names], commit_message)
            sent.update(names)
            names, url = missing()
        if names:
            raise Differs(f"the Hub holds another {names[0]} than was sent")
        return url

    return tried(push, deadline)


def create(repo_id: str, *, token: str | None, private: bool | None, revision: str | None, deadline: float) -> str:
    """Makes a repository where it is missing; returns `owner/name`.

    Args:
        repo_id: name, or owner/name.
        token: None: of the environment, or of who is logged in.
        private: of one that is made; None: as the owner's settings say.
        revision: branch, made where it is missing; None: main.
        deadline: seconds.
    """
    hub = Repository(repo_id, token, revision)
    tried(lambda: hub.files(private), deadline)
    return hub.name


class Repository:
    """A model repository, as far as a push needs it.

    Attributes:
        name: `owner/name`, after the first request.
    """

    def __init__(self, repo_id: str, token: str | None, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.name, self._revision = repo_id, revision
        self._api = HfApi(token=token, library_name="srpo")

    def files(self, private: bool | None) -> tuple[dict[str, Any], str]:
        """Path -> what the Hub knows of the file, and the URL of the commit; makes repository and branch."""
        from huggingface_hub import get_session
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        get_session().timeout = _REQUEST
        if "/" not in self.name:
            self.name = f"{self._api.whoami()['name']}/{self.name}"
        try:
            found = self._info()
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            there, found = isinstance(error, RevisionNotFoundError), None
        if found is None:  # not while an error of another kind is handled: it would tell whether this one passes
            if not there:
                self._create(private)
            if self._revision is not None:
                self._api.create_branch(self.name, branch=self._revision, exist_ok=True)
            found = self._info()
        url = f"{self._api.endpoint}/{self.name}/commit/{found.sha}"
        return {file.rfilename: file for file in found.siblings or ()}, url

    def _create(self, private: bool | None) -> None:
        try:
            self._api.create_repo(self.name, private=private, exist_ok=True)
        except KeyError:  # huggingface_hub reads an answer of 409 as if the repository existed
            raise Differs(f"the Hub is busy with {self.name}") from None

    def _info(self) -> Any:
        return self._api.model_info(self.name, revision=self._revision, files_metadata=True, timeout=_REQUEST)

    def commit(self, added: Iterable[Any], message: str) -> None:
        """One commit; files whose content the Hub has already are not sent again."""
        self._api.create_commit(self.name, added, commit_message=message, revision=self._revision)


def tried(act: Any, deadline: float) -> Any:
    """What `act` returns, in the end.

    Raises:
        NotPushed: at the deadline, in the words of the last error.
    """
    end, pause = time.monotonic() + deadline, _PAUSES[0]
    while True:
        try:
            return act()
        except Exception as error:
            if not isinstance(error, Differs) and not passes(error):
                raise
            wait = max(pause, retry_after(error))
            if time.monotonic() + wait > end:
                raise NotPushed(f"{explain(error)}, and went on for {deadline:.0f} s") from error
        time.sleep(wait)
        pause = min(2 * pause, _PAUSES[1])


def _is_there(content: Path | bytes, known: Any) -> bool:
    if known is None:
        return False
    if known.lfs is not None:
        here = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)
        return bool(known.lfs.sha256 == here)
    if isinstance(content, Path):
        if known.size is not None and known.size != content.stat().st_size:
            return False
        content = content.read_bytes()  # a small one, which git keeps itself
    return bool(known.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
