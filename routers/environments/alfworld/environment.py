"""ALFWorld's text games on a small engine in Python, for ALFWorld's own games and for generated ones alike.

Loads in milliseconds where the official package takes seconds (it starts a planner), and prints the same text.
"""

from routers.environments.alfworld.engine import State, feedback, intro, plan
from routers.environments.alfworld.facts import Game
from routers.environments.alfworld.games import load_games
from routers.environments.alfworld.generate import SPLITS, generate_games, generated
from routers.environments.protocol import NOTHING_HAPPENS, GameError

GENERATED = "generated/"


class AlfWorldBenchmark:
    """ALFWorld's games, generated or its own; a `Benchmark`.

    Parts: `generated/SPLIT` with a count, or the path of a packed file or folder (see `games.load_games`).
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Game] = {}

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        if which.startswith(GENERATED):
            split = which.removeprefix(GENERATED)
            if split not in SPLITS:
                raise GameError(f"{which}: name one of generated/{{{','.join(SPLITS)}}}")
            if count < 1:
                raise GameError(f"{which} has no end: say how many (train_limit, heldout_limit)")
            games = generate_games(count, split)
        else:
            games = load_games(which, count or None)
        for game in games:
            if self._loaded.setdefault(game.id, game) != game:
                raise GameError(f"{which}: another game of the id {game.id} was loaded before; ids must be unique")
        return {game.id: game.task_type for game in games}

    def make(self, task: str, limit: int) -> "AlfWorld":
        if task not in self._loaded and task.startswith(GENERATED):
            self._loaded[task] = generated(task)
        if task not in self._loaded:
            raise GameError(f"{task} is no generated game, and no file with it was loaded")
        return AlfWorld(self._loaded[task], limit)

    def close(self) -> None: ...


class AlfWorld:
    """One episode of a game; an `AgentEnvironment`. Score: 1 once the goal holds, else 0."""

    how = ""
    waits = False

    def __init__(self, game: Game, limit: int = 20) -> None:
        if limit < 1:
            raise GameError(f"{game.id}: the step limit is {limit}; it must be at least 1")
        self.game = game
        self.limit = limit
        self.steps = 0
        self.state = State(game.facts)
        """Hidden from the player: what observations have not said is in here."""
        self._commands = self.state.commands()
        self._won = self.state.fulfilled()
        self._started = False

    @property
    def seed(self) -> str:
        return self.game.id

    @property
    def task(self) -> str:
        return self.game.task

    @property
    def task_type(self) -> str:
        return self.game.task_type

    @property
    def won(self) -> bool:
        return self._won

    @property
    def score(self) -> float:
        return float(self._won)

    @property
    def done(self) -> bool:
        return self._won or self.steps >= self.limit

    @property
    def admissible(self) -> tuple[str, ...]:
        return tuple(sorted(self._commands))

    def expert(self) -> str | None:
        """PRIVILEGED: the next command of a short plan from the hidden state; None where none leads to the goal."""
        return next(iter(plan(self.state) or ()), None)

    def reset(self) -> str:
        if self._started:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._started = True
        return intro(self.game, self.state)

    def step(self, action: str) -> tuple[str, bool]:
        if not self._started or self.done:
            raise GameError(f"{self.seed}: step() {'after the end' if self.done else 'before reset()'}")
        self.steps += 1
        command = self._commands.get(action.strip())
        if command is None:
            return NOTHING_HAPPENS, self.done
        self.state.apply(command)
        self._commands = self.state.commands()
        self._won = self.state.fulfilled()
        return feedback(command, self.state), self.done
