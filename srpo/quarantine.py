"""Bad rows of a user's files and data sets: all of them are named with their reasons, written down and left out.

A few bad rows should not end a run, and many mean that something else is wrong: above a share the run stops.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.05
"""The share of bad rows up to which a file is used without them, where nobody says otherwise."""
_SHOWN_ROWS = 5
EXCERPT = 200


class BadRows(ValueError):
    """Rows that cannot be used: more of them than was allowed, or a data set without a single good one."""


class Quarantine:
    """Collects the bad rows of one source; `settle` at the end.

    Args:
        what: how messages call the rows: "dataset rows", "rows of replies.csv".
        path: JSON lines with `row`, `reason`, `detail`, `content`; removed if there is no bad row. None: no file.
        max_share: above this share of bad rows, `settle` raises.
        label: before each row in messages, such as "replies.csv: ".

    Raises:
        ValueError: a share outside 0 to 1.
    """

    def __init__(
        self, what: str, path: str | Path | None = None, max_share: float = MAX_BAD_SHARE, label: str = ""
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share={max_share!r}: must lie in [0, 1]")
        self.entries: list[dict[str, Any]] = []
        self._what, self._label, self._max_share = what, label, max_share
        self._path = None if path is None else Path(path)
        self._notes: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, row: int, reason: str, detail: str, content: Any) -> None:
        """A bad row. `reason`: a few words that are counted, `detail` a sentence; of `content` an excerpt is kept."""
        self.entries.append(_entry(row, reason, detail, content))

    def note(self, reason: str, detail: str, content: Any = "") -> None:
        """Something good that is left out with bad rows: it stands in the file and does not count as a bad row."""
        self._notes.append(_entry(None, reason, detail, content))

    def settle(self, total: int) -> None:
        """Write the file; warn about bad rows, or raise where there are too many.

        Args:
            total: rows, good and bad.

        Raises:
            BadRows: more bad rows than the share allows, or no good row.
        """
        where = "" if self._path is None else f"; all of them are in {self._path}"
        self._write()
        if not self.entries:
            return
        summary = self._summary(total)
        if len(self.entries) == total:
            raise BadRows(f"no row can be used: {summary}{where}")
        if len(self.entries) > self._max_share * total:
            allowed = f"at most {self._max_share:.3g} of them may be (max_bad_share)"
            raise BadRows(f"{summary}; {allowed}: mend them, or allow more{where}")
        written = "" if self._path is None else f" and written to {self._path}"
        logger.warning("%s; they are left out%s", summary, written)

    def _write(self) -> None:
        if self._path is None:
            return
        if not self.entries and not self._notes:
            self._path.unlink(missing_ok=True)  # the file of an earlier run would accuse this one's rows
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")  # every process of a run writes the same
        # ASCII escapes, so that a lone surrogate in a bad row can be written at all.
        draft.write_text(
            "".join(json.dumps(entry) + "\n" for entry in (*self.entries, *self._notes)), encoding="utf-8"
        )
        os.replace(draft, self._path)

    def _summary(self, total: int) -> str:
        counts = Counter(entry["reason"] for entry in self.entries)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        shown = (f"{self._label}row {entry['row']}: {entry['detail']}" for entry in self.entries[:_SHOWN_ROWS])
        more = "; ..." if len(self.entries) > _SHOWN_ROWS else ""
        text = f"{len(self.entries)} of {total} {self._what} are bad ({reasons}): {'; '.join(shown)}{more}"
        return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate would break the log


def _entry(row: int | None, reason: str, detail: str, content: Any) -> dict[str, Any]:
    excerpt = content if isinstance(content, str) else repr(content)
    return {"row": row, "reason": reason, "detail": detail, "content": excerpt[:EXCERPT]}
