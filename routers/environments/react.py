"""A pool member as executor: a ReAct prompt (Yao et al. 2023, arXiv 2210.03629), and the action in its reply."""

import difflib
import re
from collections.abc import Sequence
from typing import Protocol

from routers.environments.protocol import Act, View
from srpo.types import Reply, Usage

INSTRUCTION = (
    "You act in a text world, one command at a time. Think in one short sentence, then give the next command on a "
    "line of its own, exactly as it stands in the list of possible commands:\nThought: ...\nAction: ..."
)


class Members(Protocol):
    """What is used of `routers.pool.Pool`."""

    async def ask(self, member: str, query: str, deadline: float, *, max_cost: float) -> Reply: ...

    def price(self, member: str, usage: Usage) -> float: ...

    def bound(self, member: str, query: str) -> float: ...


class ReActExecutor:
    """Asks a member of the pool for the next command. A failed call is an empty action and `reply.error`.

    The query is a whole prompt: make a live pool with `agent_prompt="{query}"`.
    """

    def __init__(self, pool: Members, member: str, instruction: str = INSTRUCTION, history: int = 20) -> None:
        self.pool = pool
        self.name = member
        self.instruction = instruction
        self.history = history
        """The last so many steps are shown."""

    def query(self, view: View) -> str:
        """The prompt of the next call."""
        lines = [self.instruction, "", view.first]
        if len(view.steps) > self.history:
            lines.append(f"({len(view.steps) - self.history} earlier steps are left out)")
        for step in view.steps[-self.history :]:
            lines += [f"> {step.action}", step.observation]
        if view.admissible:
            lines += ["", f"Possible commands: {'; '.join(view.admissible)}"]
        return "\n".join([*lines, "Thought:"])

    def bound(self, view: View) -> float:
        return self.pool.bound(self.name, self.query(view))

    async def act(self, view: View, deadline: float) -> Act:
        # All attempts together stay within what a budget has reserved: a retry only where the first was not billed.
        query = self.query(view)
        reply = await self.pool.ask(self.name, query, deadline, max_cost=self.pool.bound(self.name, query))
        action = "" if reply.error else read_action(reply.text, view.admissible)
        return Act(action, self.pool.price(self.name, reply.usage), reply)


_ACTION = re.compile(r"^\W*(?:next )?(?:action|command)\W*:[\s*`'\">]*(.*)$", re.IGNORECASE | re.MULTILINE)
_OTHER_WORDS = (("put", "move"), ("pick up", "take"), ("place", "move"), ("goto", "go to"), ("turn on", "use"))


def read_action(text: str, admissible: Sequence[str], closeness: float = 0.9) -> str:
    """The command that a reply means: the one after the first "Action:", else the first line that is a command.

    Case, quotes, articles, "in/on" and usual other verbs are forgiven; then the closest admissible command is taken
    if it has the same numbers and is as similar as `closeness` (difflib's ratio, from 0 to 1). What fits nothing is
    returned as it is, on one line, so that the environment can say that nothing happens. With no admissible commands
    (free text) the words after "Action:" are returned as they stand.
    """
    marked = _ACTION.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not admissible:
        return marked[1].strip() if marked else text.strip()
    tidy = {_tidy(command): command for command in admissible}
    said = marked[1] if marked else next((line for line in lines if _tidy(line) in tidy), (lines or [""])[-1])
    wanted = _tidy(said)
    if wanted in tidy:
        return tidy[wanted]
    numbers = re.findall(r"\d+", wanted)
    similar = [command for command in tidy if re.findall(r"\d+", command) == numbers]
    close = difflib.get_close_matches(wanted[:200], similar, n=1, cutoff=closeness)
    return tidy[close[0]] if close else " ".join(said.split())[:200]


def _tidy(command: str) -> str:
    words = " ".join(re.sub(r"[^a-z0-9 /]", " ", command.lower()).split())
    for other, verb in _OTHER_WORDS:
        if words.startswith(other + " "):
            words = verb + words[len(other) :]
            break
    words = re.sub(r"\b(?:in/on|into|onto|in|on)\b", "to", words)
    return " ".join(re.sub(r"\b(?:the|a|an)\b", " ", words).split())
