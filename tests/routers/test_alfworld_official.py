"""Our engine in lockstep with the official package, where that is installed; skipped elsewhere."""

import json
import lzma
import random
from pathlib import Path

import pytest
from alfworld_problem import data

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.games import load_game

ALFWORLD = "the official engine is not installed: pip install 'textworld[pddl]' and pip install --no-deps alfworld"


def official(path: Path):  # type: ignore[no-untyped-def]
    """The official engine on a game file, with the names that ALFWorld gives to things."""
    textworld = pytest.importorskip("textworld", reason=ALFWORLD)
    pytest.importorskip("fast_downward", reason=ALFWORLD)
    misc = pytest.importorskip("alfworld.agents.utils.misc", reason=ALFWORLD)

    class Demangled(textworld.core.Wrapper):  # alfworld's AlfredDemangler, whose module needs much more to import
        def load(self, *args: object, **kwargs: object) -> None:
            super().load(*args, **kwargs)
            names = misc.Demangler(game_infos=self._entity_infos)
            for info in self._entity_infos.values():
                info.name = names.demangle_alfred_name(info.id)

    return textworld.start(str(path), textworld.EnvInfos(won=True, admissible_commands=True), wrappers=[Demangled])


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 30, 60, 90, 120, 133])
def test_texts_commands_and_success_are_those_of_the_official_engine(index: int, tmp_path: Path) -> None:
    source = data("valid_unseen.jsonl.xz")
    pytest.importorskip("textworld", reason=ALFWORLD)
    with lzma.open(source, "rt") as lines:
        row = json.loads(list(lines)[index])
    content = {"pddl_domain": source.with_name("domain.pddl").read_text(), "solvable": True}
    content["grammar"] = source.with_name("grammar_base.twl2").read_text().replace("@@TASK@@", row["task"])
    content |= {"pddl_problem": row["problem"], "walkthrough": row["walkthrough"]}
    path = tmp_path / "game.tw-pddl"
    path.write_text(json.dumps(content))

    theirs, ours = official(path), AlfWorld(load_game(path), limit=100)
    state = theirs.reset()
    assert ours.reset() == state.feedback
    rng, walkthrough = random.Random(index), list(row["walkthrough"])
    for _ in range(40):
        assert list(ours.admissible) == state["admissible_commands"]
        if walkthrough and rng.random() < 0.4 and walkthrough[0] in ours.admissible:
            command = walkthrough.pop(0)
        else:
            verbs = sorted({command.split()[0] for command in ours.admissible} | {"nonsense"})
            verb = rng.choice(verbs)
            command = rng.choice([c for c in ours.admissible if c.split()[0] == verb] or ["take moon 1 from sky 1"])
        state, _, done = theirs.step(command)
        assert ours.step(command) == (state.feedback, done), command
        assert ours.won == state["won"]
        if done:
            break
