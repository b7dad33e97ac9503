"""What a run has lost, noted when it happens: a line of JSON each in OUTPUT/losses.jsonl, which resumed runs add to.

    {"step": 12, "what": "rollouts", "count": 3, "of": 64, "why": {"large: HTTP 500": 3}, "dropped": 1, "tokens": 210,
     "usd": 0.0012}

What was lost again after a resume stands there again. Bad rows have their own files (`srpo.quarantine`).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from srpo.redact import scrubbed

logger = logging.getLogger(__name__)

LOSSES = "losses.jsonl"
What = Literal["rollouts", "steps", "pushes"]


def note(
    output: str | Path, step: int, what: What, why: Mapping[str, int], of: int | None = None, **amounts: float
) -> None:
    """Add a line. The main process calls this; a disk that does not take it is told, and ends nothing.

    Args:
        step: of the optimiser.
        why: cause -> how many.
        of: how many there were, good and bad.
        amounts: what was lost with them: `tokens`, `usd`, others of their groups (`dropped`).
    """
    causes = {scrubbed(cause): count for cause, count in why.items()}
    line = {"step": step, "what": what, "count": sum(causes.values()), "of": of, "why": causes, **amounts}
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with Path(output, LOSSES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.warning("%s was not noted in %s: %s", line, LOSSES, error)


def noted(output: str | Path) -> list[dict[str, Any]]:
    """All lines; one that a kill has cut is left out."""
    path, found = Path(output, LOSSES), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
