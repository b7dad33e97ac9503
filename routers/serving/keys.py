r"""Who may ask, and how much: API keys by name, each with its own budgets and rate.

    srpo serve ROUTER --keys keys.yaml --spending spending.json

    keys:                                        # keys.yaml holds no key, only what recognises one:
      team-a:                                    #   python -c "import secrets; print(secrets.token_urlsafe(32))"
        sha256: 9f86d081884c7d659a2feaa0c55a...  #   printf %s "$KEY" | sha256sum
        usd_per_day: 5.0                         # UTC days
        usd_total: 100.0                         # since `spending.json` began; without that file, since the start
        usd_per_request: 0.05                    # cap of each; without it a hundredth of the smaller budget
        requests_per_minute: 120                 # in any 60 seconds
        admin: true                              # sees /metrics and /ui, which are of the whole server
      team-b:
        sha256: [2c26b46b68ffc68ff9..., fcde2b2edba56bf408...]   # old and new, while clients change over

The file is read again when it changes and on SIGHUP; what is under way goes on. Budgets and rates belong to the name,
so a name whose key changes keeps what it has spent. A changed file that cannot be read changes nothing, and is said.

Money is set aside before a request begins and settled when it ends (`Allowance`), so `spent + set aside <= budget`
holds however many requests run at once. What was set aside counts as spent in `spending.json` until it is settled. The
file is written once a second and when the server stops: one that is killed forgets what was let in within its last
second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

from routers.pool.ledger import Account, Reservation
from srpo.ranges import Ranges, above, at_least, check_numbers
from srpo.strict_yaml import read_yaml

_log = logging.getLogger(__name__)

ANYONE = "anyone"
"""Name of whoever asks a server without keys, and of the holder of its one key."""
DEFAULT_SHARE = 100
"""A request of a key without `usd_per_request` may cost this part of its smaller budget."""
_MINUTE = 60.0
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class KeyLimits:
    """What a key may use. None: no limit.

    Raises:
        ValueError: a number out of its range, or `admin` that is no truth value.
    """

    RANGES: ClassVar[Ranges] = {
        "usd_per_day": at_least(0),
        "usd_total": at_least(0),
        "usd_per_request": at_least(0),
        "requests_per_minute": above(0),
    }

    usd_per_day: float | None = None
    usd_total: float | None = None
    usd_per_request: float | None = None
    requests_per_minute: int | None = None
    admin: bool = False
    """Sees the numbers of the whole server: names of keys, their budgets, who answered."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not isinstance(self.admin, bool):
            raise ValueError("admin must be true or false")

    @property
    def request_usd(self) -> float:
        """The most that one request may cost."""
        budgets = [budget for budget in (self.usd_per_day, self.usd_total) if budget is not None]
        if self.usd_per_request is not None:
            return min([self.usd_per_request, *budgets])
        return min(budgets) / DEFAULT_SHARE if budgets else math.inf


class Refused(Exception):
    """A limit of a key is reached.

    Args:
        reason: "rate", "budget" (spent) or "set_aside" (requests under way hold what is left).
        message: for a person.
        retry_after: seconds until it may be worth asking again; None: nothing helps but another budget.
    """

    def __init__(self, reason: str, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after = reason, message, retry_after


class Allowance:
    """Money of one request, set aside: `usd` is the most that it may cost. Settled once, or given back."""

    def __init__(self, usd: float, parts: list[Reservation]) -> None:
        self.usd = usd
        self._parts: list[Reservation] | None = parts

    def settle(self, spent: float) -> None:
        """Spend this much, USD. What is no number >= 0 is not believed and counts as `usd`. Later calls do nothing."""
        if self._parts is not None:
            for part in self._parts:
                part.settle(spent)
            self._parts = None

    def cancel(self) -> None:
        """Nothing was spent. Does nothing after `settle`."""
        for part in self._parts or ():
            part.cancel()
        self._parts = None


class Key:
    """One name's limits, and what it has used. Belongs to an event loop.

    Args:
        name: as logs and metrics call it; the key itself is kept nowhere.
        limits: what it may use.
        clock: seconds since 1970.
    """

    def __init__(self, name: str, limits: KeyLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.limits = limits or KeyLimits()
        self._clock = clock
        self._asked: deque[float] = deque()
        self._day = self._today()
        self.today = Account(self.limits.usd_per_day)
        self.total = Account(self.limits.usd_total)

    def count(self) -> None:
        """One more request begins.

        Raises:
            Refused: there were `requests_per_minute` in the last 60 seconds; a refused request does not count.
        """
        limit = self.limits.requests_per_minute
        if limit is None:
            return
        now = self._clock()
        while self._asked and self._asked[0] <= now - _MINUTE:
            self._asked.popleft()
        if len(self._asked) >= limit:
            wait = self._asked[len(self._asked) - limit] + _MINUTE - now
            raise Refused("rate", f"key {self.name!r} may ask {limit} times a minute", wait)
        self._asked.append(now)

    def allow(self, at_most: float = math.inf) -> Allowance:
        """Set money aside for one request: `at_most` USD, or the cap of a request, or what is left if that is less.

        Raises:
            Refused: nothing is left.
        """
        self._new_day()
        self._cap()
        usd = min(at_most, self.limits.request_usd, self.today.available, self.total.available)
        if math.isinf(usd):  # a key without budgets
            return Allowance(usd, [])
        each = self.limits.usd_per_request
        if usd <= 0 < (at_most if each is None else min(at_most, each)):
            raise self._empty()
        parts = [account.reserve(usd) for account in (self.today, self.total)]
        return Allowance(usd, parts)

    def _empty(self) -> Refused:
        total, today = self.limits.usd_total, self.limits.usd_per_day
        for account, limit, span, wait in (
            (self.total, total, "", None),
            (self.today, today, " of today", self._until_tomorrow()),
        ):
            if limit is not None and account.spent + account.overrun >= limit:
                return Refused("budget", f"the budget{span} of key {self.name!r}, {limit:g} USD, is spent", wait)
        held = "what is left of its budget is set aside for its requests under way"
        return Refused("set_aside", f"key {self.name!r}: {held}", 1.0)

    def spending(self) -> dict[str, Any]:
        """As `spending.json` has it: money set aside counts as spent."""
        self._new_day()
        today, total = (a.spent + a.overrun + a.reserved for a in (self.today, self.total))
        return {"day": self._day, "day_usd": today, "total_usd": total}

    def restore(self, spending: Mapping[str, Any]) -> None:
        """Inverse of `spending`; a day that is over is forgotten."""
        if spending["day"] == self._today():
            self.today.restart(float(spending["day_usd"]))
        self.total.restart(float(spending["total_usd"]))

    def relimit(self, limits: KeyLimits) -> None:
        """New limits for the same name: what was spent and set aside stays."""
        self.limits = limits
        self._cap()

    def _cap(self) -> None:
        """Put the limits to the accounts. One below what is spent and set aside already leaves nothing over."""
        for account, limit in ((self.today, self.limits.usd_per_day), (self.total, self.limits.usd_total)):
            account.cap = None if limit is None else max(limit, account.spent + account.reserved)

    def _new_day(self) -> None:
        if self._day != self._today():
            self._day, self.today = self._today(), Account(self.limits.usd_per_day)  # what runs settles with its day

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).date().isoformat()

    def _until_tomorrow(self) -> float:
        now = datetime.fromtimestamp(self._clock(), UTC)
        return (now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) - now).total_seconds()


class Keys:
    """All keys of a server. Belongs to an event loop.

    Args:
        path: keys.yaml; None: no file, see `single` and `Keys()`, which lets anybody in.
        spending: file that keeps what was spent over restarts; None: it is counted from the start.
        clock: seconds since 1970.

    Raises:
        ValueError: a file that cannot be used; names file, key and field, and shows no value.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        spending: str | Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._spending = None if spending is None else Path(spending)
        self._clock = clock
        self._digests: dict[bytes, Key] = {}
        self._known: dict[str, Key] = {}
        """Also those that a newer file has no more: one that comes back has spent what it has."""
        self._stamp: Any = None
        self._written: Any = None
        """What the file of spending says."""
        self.reloads = {"read": 0, "refused": 0}
        """How often a changed file was taken over, or could not be."""
        self.open = self._path is None
        """Anybody may ask."""
        before = self._read_spending()
        if self._path is None:
            self._known[ANYONE] = Key(ANYONE, KeyLimits(admin=True), clock)
        else:
            self._stamp = self._now_stamp()
            self._take(read_keys(self._path))
        for name, spent in before.items():
            key = self._known.setdefault(name, Key(name, clock=clock))
            key.restore(spent)

    @classmethod
    def single(cls, secret: str) -> Keys:
        """One key without limits, named `ANYONE`, which may see everything."""
        keys = cls()
        keys.open = False
        keys._digests = {_digest(secret.encode()): keys._known[ANYONE]}
        return keys

    def find(self, given: bytes | None) -> Key | None:
        """Whose key this is; None: nobody's. Takes the same time whichever it is, and whether it is one."""
        self._reload_if_changed()
        if self.open:
            return self._known[ANYONE]
        digest, found = _digest(given or b""), None
        for known, key in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = key
        return found if given else None

    def reload(self) -> bool:
        """Read the file again; whether it could be."""
        if self._path is None:
            return True
        self._stamp = self._now_stamp()
        try:
            self._take(read_keys(self._path))
        except (OSError, ValueError) as error:
            self.reloads["refused"] += 1
            _log.error("the keys stay as they were: %s", error)
            return False
        self.reloads["read"] += 1
        _log.warning("%s was read again: %d keys", self._path, len({key.name for key in self._digests.values()}))
        return True

    def budgets(self, spent: bool) -> dict[tuple[str, ...], float]:
        """USD by (name, "day" or "total"), of keys with such a budget: the budget, or what is spent of it and set
        aside."""
        found: dict[tuple[str, ...], float] = {}
        for key in self._known.values():
            used = key.spending()
            for period, limit in (("day", key.limits.usd_per_day), ("total", key.limits.usd_total)):
                if limit is not None:
                    found[key.name, period] = used[f"{period}_usd"] if spent else limit
        return found

    def save(self) -> None:
        """Write what was spent, if there is a file for it and it says something else.

        Raises:
            OSError: it cannot be written.
        """
        if self._spending is None:
            return
        document = {"spending": {name: key.spending() for name, key in sorted(self._known.items())}}
        if document == self._written:
            return
        beside = self._spending.with_name(f"{self._spending.name}.new")
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._spending)
        self._written = document

    def _take(self, found: Mapping[str, tuple[list[bytes], KeyLimits]]) -> None:
        digests = {}
        for name, (own, limits) in found.items():
            key = self._known.setdefault(name, Key(name, clock=self._clock))
            key.relimit(limits)
            digests.update(dict.fromkeys(own, key))
        self._digests = digests

    def _reload_if_changed(self) -> None:
        if self._path is not None and self._now_stamp() != self._stamp:
            self.reload()

    def _now_stamp(self) -> Any:
        try:
            found = os.stat(self._path)  # type: ignore[arg-type]
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read_spending(self) -> dict[str, Any]:
        if self._spending is None or not self._spending.exists():
            return {}
        try:
            found = json.loads(self._spending.read_text(encoding="utf-8"))["spending"]
            for spent in found.values():
                if not (isinstance(spent["day"], str) and spent["day_usd"] >= 0 and spent["total_usd"] >= 0):
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{self._spending}: is no file of spendings; move it away to begin anew, with nothing spent"
            ) from None
        return dict(found)


def read_keys(path: Path) -> dict[str, tuple[list[bytes], KeyLimits]]:
    """Name -> digests and limits.

    Raises:
        OSError: no such file.
        ValueError: names file, key and field, and shows no value.
    """
    document = read_yaml(path)
    if not (isinstance(document, dict) and set(document) == {"keys"} and isinstance(document["keys"], dict)):
        raise ValueError(f"{path}: must hold `keys:`, and below it a name for each key, and nothing else")
    if not document["keys"]:
        raise ValueError(f"{path}: holds no key, so nobody could ask")
    names = {f.name for f in fields(KeyLimits)}
    found: dict[str, tuple[list[bytes], KeyLimits]] = {}
    seen: dict[bytes, str] = {}
    for place, (name, entry) in enumerate(document["keys"].items(), 1):
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            wanted = "must be 1 to 64 of A-Z a-z 0-9 . _ -, in quotes if it is a number"  # it may be a key: not shown
            raise ValueError(f"{path}: the name of entry {place} {wanted}")
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name}: must be a mapping with sha256 and limits")
        if "key" in entry:
            raise ValueError(
                f'{path}: {name}: write no key here, but `sha256:` of it, by: printf %s "$KEY" | sha256sum'
            )
        if unknown := [key for key in entry if key not in names | {"sha256"}]:
            word = (
                repr(unknown[0]) if re.fullmatch(r"[a-z_]{1,40}", str(unknown[0])) else "such field"
            )  # it may be a key
            raise ValueError(f"{path}: {name}: there is no {word}; there are sha256, {', '.join(sorted(names))}")
        written = entry.get("sha256")
        digests: list[Any] = written if isinstance(written, list) else [written]
        if not digests or not all(isinstance(one, str) and _DIGEST.fullmatch(one.lower()) for one in digests):
            raise ValueError(
                f'{path}: {name}: sha256 must be 64 hexadecimal digits, from: printf %s "$KEY" | sha256sum'
            )
        own = [bytes.fromhex(one) for one in digests]
        for one in own:
            if seen.setdefault(one, name) != name:
                raise ValueError(f"{path}: {name} and {seen[one]} have the same key; each needs its own")
        try:
            limits = KeyLimits(**{key: value for key, value in entry.items() if key != "sha256"})
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        found[name] = (own, limits)
    return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
