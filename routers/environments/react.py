"""A pool member as executor: a ReAct prompt (Yao et al. 2023, arXiv 2210.03629), and the action in its reply."""

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Protocol

from routers.data.catalogue import Member
from routers.data.prompt_cache import Conversation
from routers.environments.priced import conversation
from routers.environments.protocol import Act, View
from srpo.types import Reply, Usage

INSTRUCTION = (
    "You act in a text world, one command at a time. Think in one short sentence, then give the next command on a "
    "line of its own, exactly as it stands in the list of possible commands:\nThought: ...\nAction: ..."
)
"""Where possible commands are listed."""
FREE_INSTRUCTION = (
    "You act in an environment, one action at a time. Think in one short sentence, then give the next action:\n"
    "Thought: ...\nAction: ..."
)
"""Where the environment says how actions are written."""


class Members(Protocol):
    """What is used of `routers.pool.Pool`."""

    async def ask(self, member: str, query: str, deadline: float, *, max_cost: float, sample: str) -> Reply: ...

    def price(self, member: str, usage: Usage) -> float: ...

    def bound(self, member: str, query: str) -> float: ...


class ReActExecutor:
    """Asks a member of the pool for the next action. A failed call is an empty action and `reply.error`.

    The query is a whole prompt: make a live pool with `agent_prompt="{query}"`.

    Args:
        pool: knows the member.
        member: its name.
        instruction: the first words of the prompt; None: one of the two above.
        history: the last so many steps are shown.
        characters: of an action or observation of theirs; a longer one is shown without its middle, and says so.
            AppWorld's longest list of APIs has 9,093.
    """

    def __init__(
        self, pool: Members, member: str, instruction: str | None = None, history: int = 20, characters: int = 10_000
    ) -> None:
        self.pool = pool
        self.name = member
        self.instruction = instruction
        self.history = history
        self.characters = characters

    @property
    def member(self) -> Member | None:
        """With its prices and cache, where the pool tells."""
        return getattr(self.pool, "members", {}).get(self.name)

    def caches(self, view: View) -> Conversation:
        """As if every step were shown: its older ones, which `history` leaves out, end what prompts share."""
        assert self.member is not None
        return conversation(view, self.member)

    def query(self, view: View) -> str:
        """The prompt of the next call."""
        listed = not view.how and bool(view.admissible)
        lines = [self.instruction or (INSTRUCTION if listed else FREE_INSTRUCTION)]
        lines += [view.how, "", view.first] if view.how else ["", view.first]
        if len(view.steps) > self.history:
            lines.append(f"({len(view.steps) - self.history} earlier steps are left out)")
        for step in view.steps[-self.history :]:
            action, observation = cut(step.action, self.characters), quoted(cut(step.observation, self.characters))
            if view.admissible:
                lines += [f"> {action}", observation]
            else:
                lines += ["Action:", "```", action, "```", "Observation:", observation]
        if listed:
            lines += ["", f"Possible commands: {'; '.join(view.admissible)}"]
        return "\n".join([*lines, "Thought:"])

    def bound(self, view: View) -> float:
        return self.pool.bound(self.name, self.query(view))

    async def act(self, view: View, deadline: float) -> Act:
        # All attempts together stay within what a budget has reserved: a retry only where the first was not billed.
        query = self.query(view)
        most = self.pool.bound(self.name, query)
        reply = await self.pool.ask(self.name, query, deadline, max_cost=most, sample=view.seed)
        action = "" if reply.error else read_action(reply.text, view.admissible)
        return Act(action, self.pool.price(self.name, reply.usage), reply)


def cut(text: str, characters: int) -> str:
    """A text without its middle where it is longer: a listing begins with what it is, a traceback ends with it."""
    if len(text) <= characters:
        return text
    head = characters * 3 // 4
    note = f"[... {len(text) - characters} characters are left out ...]"
    return f"{text[:head]}\n{note}\n{text[len(text) - characters + head :]}"


_OWN = re.compile(r"^(?=[ \t]*(?:>|```|(?:thought|action|observation|possible commands)\W*:))", re.I | re.M)


def quoted(observation: str) -> str:
    """An observation, with a bar before lines that look like the prompt's own: it cannot pretend to be a step."""
    return _OWN.sub("| ", "\n".join(observation.splitlines()))


_ACTION = re.compile(r"^\W*(?:next )?(?:action|command)\W*:[\s*`'\">]*(.*)$", re.IGNORECASE | re.MULTILINE)
_OTHER_WORDS = (("put", "move"), ("pick up", "take"), ("place", "move"), ("goto", "go to"), ("turn on", "use"))


def read_action(text: str, admissible: Sequence[str], closeness: float = 0.9) -> str:
    """The command that a reply means: the one after the first "Action:", else the first line that is a command.

    Case, quotes, articles, "in/on" and usual other verbs are forgiven; then the closest admissible command is taken
    if it has the same numbers and is as similar as `closeness` (difflib's ratio, from 0 to 1). What fits nothing is
    returned as it is, on one line, so that the environment can say that nothing happens. With no admissible commands
    the action is free text, see `read_free_action`.
    """
    if not admissible:
        return read_free_action(text)
    marked = _ACTION.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
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


_BLOCK = re.compile(r"(?:^|:)[ \t*]*(?P<fence>```)[\w+-]*[ \t]*\n(?P<inside>.*?)(?:^[ \t]*```|\Z)", re.S | re.M)
_BEFORE = r"^[ \t*#>]*"
_FREE_ACTION = re.compile(_BEFORE + r"(?:next )?action[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
_NEXT_STEP = re.compile(_BEFORE + r"(?:thought|observation)[ \t*]*:", re.IGNORECASE | re.MULTILINE)


def read_free_action(text: str) -> str:
    """The action in a reply whose actions are free text, such as code: what comes first of

    - the fenced block behind the first "Action:", and before the next "Observation:" or "Thought:", with which a model
      dreams on; in a fenced block these words mean nothing, so that one in a thought is a quotation
    - the words there, on one or several lines
    - without "Action:": the first fenced block, else the whole text
    """
    blocks = list(_BLOCK.finditer(text))

    def outside(pattern: re.Pattern[str], start: int = 0) -> Iterator[re.Match[str]]:
        found = pattern.finditer(text, start)
        return (m for m in found if not any(block.start("fence") < m.start() < block.end() for block in blocks))

    action = next(outside(_FREE_ACTION), None)
    start = action.end() if action else 0
    end = next((step.start() for step in outside(_NEXT_STEP, start)), len(text)) if action else len(text)
    block = next((block for block in blocks if start <= block.start("fence") < end), None)
    if block:
        return textwrap.dedent(block["inside"]).strip("\n")
    return text[start:end].strip().strip("`").strip()
