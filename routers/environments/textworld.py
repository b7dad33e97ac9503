"""TextWorld's games (Côté et al. 2018, arXiv 1806.11532, package `textworld`, MIT) as an agent environment.

Optional: `pip install textworld` (it brings Jericho, which is GPL-2). Plays the .z8 games that its `tw-make` writes;
a folder of a hundred, a few seconds each:

    for i in $(seq 100 199); do
      tw-make custom --world-size 3 --nb-objects 6 --quest-length 5 --seed $i --output games/train/$i.z8 --silent
    done
"""

import importlib
import re
from pathlib import Path
from typing import Any

from routers.environments.protocol import GameError


class TextWorldBenchmark:
    """Games that were made before; a `Benchmark`. Part: a folder of .z8 files, each with tw-make's .json beside it."""

    def __init__(self) -> None:
        importlib.import_module("textworld")
        self._files: dict[str, Path] = {}

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        folder = Path(which)
        files = {f"{folder.name}/{file.stem}": file for file in sorted(folder.glob("*.z8"))[: count or None]}
        if not files:
            raise GameError(f"{which}: no folder with .z8 games; make some with tw-make, a folder for each part")
        for name, file in files.items():
            if self._files.setdefault(name, file).resolve() != file.resolve():
                raise GameError(f"{which}: {self._files[name]} is called {name} too; rename the folder")
        return dict.fromkeys(files, TextWorld.task_type)

    def make(self, task: str, limit: int) -> "TextWorld":
        if task not in self._files:
            raise GameError(f"{task}: no folder with it was listed")
        return TextWorld(self._files[task], limit, task)

    def close(self) -> None: ...


class TextWorld:
    """One game; an `AgentEnvironment`. Score: the game's points over its maximum."""

    task_type = "textworld"
    how = ""
    waits = False

    def __init__(self, path: str | Path, limit: int = 50, seed: str = "") -> None:
        if Path(path).suffix != ".z8" or not Path(path).is_file():  # the .json beside it is playable, but has no text
            raise GameError(f"{path}: no such .z8 game file; make one with tw-make")
        if not Path(path).with_suffix(".json").is_file():
            raise GameError(f"{path}: the .json that tw-make writes beside it is missing; it knows what is possible")
        textworld = importlib.import_module("textworld")
        names = ("admissible_commands", "won", "lost", "score", "max_score", "objective", "policy_commands")
        self._game = textworld.start(str(path), textworld.EnvInfos(**dict.fromkeys(names, True)))
        self._state: Any = None
        self.seed, self.limit, self.steps = seed or Path(path).stem, limit, 0

    @property
    def task(self) -> str:
        return str(self._known["objective"])

    @property
    def won(self) -> bool:
        return bool(self._known["won"])

    @property
    def score(self) -> float:
        return self._known["score"] / self._known["max_score"] if self._known["max_score"] else float(self.won)

    @property
    def done(self) -> bool:
        return self.won or bool(self._known["lost"]) or self.steps >= self.limit

    @property
    def admissible(self) -> tuple[str, ...]:
        return tuple(sorted(self._known["admissible_commands"]))

    @property
    def _known(self) -> Any:
        if self._state is None:
            raise GameError(f"{self.seed}: step() before reset(); the game has not been started")
        return self._state

    def expert(self) -> str | None:
        """PRIVILEGED: the next command of the game's own solution from the present state."""
        return next(iter(self._known["policy_commands"] or ()), None)

    def reset(self) -> str:
        if self._state is not None:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._state = self._game.reset()
        return _plain(self._state.feedback)

    def step(self, action: str) -> tuple[str, bool]:
        if self.done:
            raise GameError(f"{self.seed}: step() after the end")
        self.steps += 1
        # One line, no more: the interpreter would take the rest for further commands.
        self._state, _, _ = self._game.step(" ".join(action.split())[:200])
        if self.done:
            self._game.close()
        return _plain(self._state.feedback), self.done


_BANNER = re.compile(r"[ _$|>\\/]*")


def _plain(text: str) -> str:
    """Without the banner, empty lines, and the prompt with its status line."""
    lines = [line.rstrip() for line in text.split("\n>", 1)[0].splitlines()]
    return "\n".join(line for line in lines if not _BANNER.fullmatch(line))
