"""The one loop that plays episodes: who decides and the world take turns until one of `srpo.types.STOPS`.

    all episodes made -> [ decider: one turn for every row whose world has answered, in one batch
                        -> world: a row's step begins when its turn is written
                        -> the answers that are there                                    ] ... -> columns

No row waits for the world of another. So that batches do not shrink to single rows, answers are waited for after the
first one, for 0.1 s and a quarter of the time that the last batch of turns took: a turn begins at most so much later
than it could, and where all worlds answer within it, rows take their turns all together.

What a row draws does not depend on when answers come: each draws by its own seed, from logits that are the same in
every batch up to the rounding of a batched forward. Two runs in which the same rows met are equal bit for bit: always
where every world answers at once (as recorded ones do) and in rounds (`rounds`); else up to that rounding.

Who decides is a policy (a `Generator`: token in = token out) or a `Rule`. A turn of the policy stays the ids that were
sampled: nothing is decoded and encoded again. The world's text is encoded once, without control tokens
(`srpo.texts`), cut, and framed. An episode that raises or does not answer in time is *lost*: its
trajectory ends with stop "lost" and the cause in its columns, and the others go on.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tqdm.auto import tqdm

from srpo.columns import OF_ROLLOUT, TURNS, check_word
from srpo.ranges import Ranges, above, at_least, check_numbers
from srpo.rollout.turns import Generator, Request, Sample
from srpo.rollout.worker_loop import EpisodeLoop, Failure, Flow, Job, in_thread
from srpo.texts import encode_frame, observation_ids, opened_by, opened_in, reader
from srpo.types import LOST, STOP, Columns, Environment, Episode, Observation, Row, Stop, Trajectory, Turn

Rule = Callable[[int, Episode], str]
"""Decides in a policy's place: (row, its episode) -> the text of its next turn. Called within the episode's own step,
so that a rule that raises or hangs loses that episode. It must answer among `choices()` where there are some."""

_WINDOW = 0.1, 0.25
"""For how long answers are waited for after the first: seconds, and a share of the time that the last turns took. In
simulations (one answer in ten takes 3 s, log-normal, heavy tails; turns of 0.1 to 5 s) the time of 32 to 64 rows is
0.4 to 1.16 of that in rounds; without the share it is up to 1.3, where turns take long and worlds do not."""


@dataclass(frozen=True)
class Limits:
    """What ends an episode, or cuts a part of it.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "turns": at_least(1),
        "tokens": at_least(1),
        "observation_tokens": at_least(0),
        "step_seconds": above(0),
        "turn_tokens": at_least(1),
        "episode_seconds": at_least(0),
    }

    turns: int
    """Turns of the policy."""
    tokens: int
    """Of all turns, the world's too (TRL's `max_completion_length`)."""
    observation_tokens: int
    """Of the body of one observation; its frame is added after the cut."""
    step_seconds: float
    """One step of the world; longer loses the episode."""
    turn_tokens: int | None = None
    """One turn of the policy; the world sees what was written until then."""
    episode_seconds: float | None = None
    """Looked at after each step."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass
class _Play:
    """One row while it is going on."""

    row: int
    prompt: tuple[int, ...]
    episode: Episode | None = None
    choices: tuple[str, ...] | None = None
    turns: list[Turn] = field(default_factory=list)
    said: list[tuple[str, Observation]] = field(default_factory=list)
    """What was decided in each turn, and what the world answered."""
    text: str = ""
    """What the policy wrote in its last turn."""
    opened: str = ""
    """The think tag in which its next text begins, where prompt or observation have opened one."""
    stop: Stop | None = None
    cause: str | None = None

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.prompt, *(i for turn in self.turns for i in turn.ids))

    @property
    def used(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def policy_turns(self) -> int:
        return sum(turn.owner == "policy" for turn in self.turns)

    def lose(self, cause: str) -> None:
        self.stop, self.cause = "lost", cause


def play(
    environment: Environment,
    rows: Sequence[Row],
    prompt_ids: Sequence[Sequence[int]],
    seeds: Sequence[str],
    decider: Generator | Rule,
    tokenizer: Any,
    limits: Limits,
    loop: EpisodeLoop | None = None,
    progress: bool = False,
    out_of_money: Callable[[], bool] = lambda: False,
    rounds: bool = False,
) -> list[Trajectory]:
    """One trajectory per row.

    Args:
        rows: dataset rows, handed to `environment.episode`.
        prompt_ids: per row the ids of its prompt, at least one; none where a rule decides.
        seeds: per row a text that names it: (run, step, row, sample). Turn t draws from `seed:t`.
        decider: the policy, or a rule, whose trajectories have texts (`said`) but no turns.
        tokenizer: of the policy; None where a rule decides.
        loop: where the episodes live; None: a loop of this call's own. Clients of an environment belong to a loop.
        progress: show a bar over episodes.
        out_of_money: asked whenever answers have come; True ends every episode with stop "budget", those under way
            with their answer, so that nothing else is spent.
        rounds: every row waits for all answers. Where processes must ask their generators equally often (sharded
            parameters, a shared engine) they may not wait for each other in between.

    Returns:
        Trajectories whose columns are the episode's, and `STOP`, `LOST` and "turns". An episode that could not give
        its columns has None in each.

    Raises:
        ValueError: a label of `choices()` that is not one token, two labels of the same token.
    """
    started = time.monotonic()
    rule = None if hasattr(decider, "generate") else decider
    opened = ["" if rule else opened_by(tokenizer, ids) for ids in prompt_ids]
    plays = [_Play(i, tuple(ids), opened=tag) for i, (ids, tag) in enumerate(zip(prompt_ids, opened, strict=True))]
    labels, whole = Labels(tokenizer), getattr(environment, "whole_turns", False)
    with EpisodeLoop() if loop is None else nullcontext(loop) as loop:
        _make(environment, plays, rows, seeds, loop, limits)
        ready = [p for p in plays if p.stop is None]
        with (
            tqdm(total=len(plays), desc="episodes", disable=None if progress else True, leave=False) as bar,
            Flow(loop, limits.step_seconds) as flow,
        ):

            def answer(plays: Sequence[_Play]) -> None:
                flow.start({play.row: _step(play, rule) for play in plays})

            window = math.inf if rounds else 0.0
            while ready or len(flow):
                began = time.monotonic()
                if rule is not None:
                    answer(ready)
                elif ready:
                    _policy_turns(ready, seeds, decider, labels, tokenizer, limits, answer, whole)  # type: ignore[arg-type]
                    window = math.inf if rounds else _WINDOW[0] + _WINDOW[1] * (time.monotonic() - began)
                answers = flow.take(window)
                came = [plays[row] for row in sorted(answers)]
                for p in came:
                    _hear(p, answers[p.row], limits, started)
                if rule is None:
                    _observe([p for p in came if p.stop is None], tokenizer, limits)
                spent = out_of_money()
                for p in came if spent else ():
                    p.stop = p.stop or "budget"
                if rule is None:
                    decider.over(sorted({p.row for p in (*ready, *came) if p.stop is not None}))  # type: ignore[union-attr]
                ready = [p for p in came if p.stop is None]
                bar.update(sum(p.stop is not None for p in plays) - bar.n)
        if rule is None:
            decider.finish()  # type: ignore[union-attr]
        return _trajectories(plays, rule, loop, limits)


def _make(
    environment: Environment,
    plays: list[_Play],
    rows: Sequence[Row],
    seeds: Sequence[str],
    loop: EpisodeLoop,
    limits: Limits,
) -> None:
    def job(play: _Play) -> Any:
        async def make() -> Any:
            def begin() -> Episode:
                return environment.episode(rows[play.row], seeds[play.row])

            episode = await in_thread(begin) if getattr(environment, "waits", False) else begin()
            return episode, episode.choices()

        return make

    for play, made in zip(plays, loop.run([job(p) for p in plays], limits.step_seconds), strict=True):
        if isinstance(made, Failure):
            play.lose(made.cause)
        else:
            play.episode, play.choices = made[0], _labels(made[1])


def _policy_turns(
    plays: list[_Play],
    seeds: Sequence[str],
    generator: Generator,
    labels: "Labels",
    tokenizer: Any,
    limits: Limits,
    answer: Callable[[Sequence[_Play]], object],
    whole: bool,
) -> None:
    """One turn each; `answer` is called with those that their worlds have to answer, as soon as turns are written."""
    read, asking = reader(tokenizer), {play.row: play for play in plays}

    def write(turns: Sequence[tuple[Request, Sample]]) -> None:
        written = [(asking.pop(request.row), request.choices, sample) for request, sample in turns]
        for play, choices, sample in written:
            play.turns.append(Turn("policy", sample.ids, sample.logprobs, choices))
            if choices is not None:
                play.text = play.choices[choices.index(sample.ids[0])]  # type: ignore[index]
            else:
                play.text = play.opened + read(sample.ids)
                play.opened = ""
            if not sample.ended and (whole or play.used >= limits.tokens):
                play.stop = "tokens"  # in the middle of a sentence: there is nothing to answer
        answer([play for play, _, _ in written if play.stop is None])

    requests = []
    for play in plays:
        room = limits.tokens - play.used
        request = Request(
            row=play.row,
            ids=play.context,
            seed=f"{seeds[play.row]}:{play.policy_turns}",
            max_tokens=room if limits.turn_tokens is None else min(room, limits.turn_tokens),
            choices=None if play.choices is None else labels.ids(play.choices),
            told=write,
        )
        requests.append(request)
    turns = zip(requests, generator.generate(requests), strict=True)
    write([(request, sample) for request, sample in turns if request.row in asking])


def _step(play: _Play, rule: Rule | None) -> Job:
    """The world's answer to what was decided, and what may be chosen next."""

    async def step() -> Any:
        if rule is not None:
            play.text = rule(play.row, play.episode)  # type: ignore[arg-type]
        observation = await play.episode.step(play.text)  # type: ignore[union-attr]
        if not isinstance(observation, Observation):
            raise TypeError(f"step returned a {type(observation).__name__}, not an Observation")
        return observation, None if observation.end is not None else play.episode.choices()  # type: ignore[union-attr]

    return step


def _hear(play: _Play, answer: Any, limits: Limits, started: float) -> None:
    """Take the world's answer, or that there is none."""
    if isinstance(answer, Failure):
        play.lose(answer.cause)
        return
    observation, choices = answer
    play.said.append((play.text, observation))
    play.choices = _labels(choices)
    if observation.end is not None:
        play.stop = observation.end
        play.cause = "the episode says so" if observation.end == "lost" else None
    elif len(play.said) >= limits.turns:
        play.stop = "turns"
    elif limits.episode_seconds is not None and time.monotonic() - started > limits.episode_seconds:
        play.stop = "deadline"


def _observe(plays: Sequence[_Play], tokenizer: Any, limits: Limits) -> None:
    """What the worlds have answered becomes a part of the contexts."""
    observations = [play.said[-1][1] for play in plays]
    found = [observation_ids(observation, tokenizer, limits.observation_tokens) for observation in observations]
    tags = [opened_in(observation.after) for observation in observations]
    for play, ids, opened in zip(plays, found, tags, strict=True):
        play.opened = opened
        if play.used + len(ids) >= limits.tokens:
            play.stop = "tokens"
        elif ids:
            play.turns.append(Turn("world", ids))


def _trajectories(plays: list[_Play], rule: Rule | None, loop: EpisodeLoop, limits: Limits) -> list[Trajectory]:
    def job(play: _Play) -> Any:
        async def columns() -> Any:
            return dict(play.episode.columns(play.stop))  # type: ignore[union-attr, arg-type]

        return columns

    alive = [p for p in plays if p.episode is not None]
    columns: list[dict[str, Any]] = [{} for _ in plays]
    said = list(zip(alive, loop.run([job(p) for p in alive], limits.step_seconds), strict=True))
    for row, found in ((play.row, found) for play, found in said if not isinstance(found, Failure)):
        if taken := [name for name in (STOP, TURNS) if name in found]:
            raise ValueError(
                f"the episode of row {row} has a column {taken[0]!r}, which is the rollout's own; rename it"
            )
        check_word(LOST, found.get(LOST), f"the episode of row {row}")
    for play, found in said:
        if isinstance(found, Failure):
            play.lose(play.cause or f"columns: {found.cause}")
        else:
            columns[play.row] = found
            if play.stop == "lost":
                play.cause = found.get(LOST) or play.cause
            elif found.get(LOST):
                play.lose(str(found[LOST]))
    names = sorted({name for c in columns for name in c} - set(OF_ROLLOUT))
    return [
        Trajectory(
            prompt_ids=play.prompt,
            turns=tuple(play.turns),
            stop=play.stop,  # type: ignore[arg-type]
            columns={
                **{name: columns[play.row].get(name) for name in names},
                STOP: play.stop,
                LOST: play.cause,
                TURNS: len(play.said) if rule else play.policy_turns,
            },
            said=tuple(play.said),
        )
        for play in plays
    ]


def as_columns(trajectories: Sequence[Trajectory]) -> Columns:
    """One list per column, one value per trajectory."""
    names = {name: None for t in trajectories for name in t.columns}
    return {name: [t.columns.get(name) for t in trajectories] for name in names}


def _labels(choices: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if choices is None else tuple(choices)


class Labels:
    """Labels of choices as ids, looked up once; each must be one token."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: dict[tuple[str, ...], tuple[int, ...]] = {}

    def ids(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        if labels not in self._ids:
            encoded = [encode_frame(self._tokenizer, label) for label in labels]
            for label, ids in zip(labels, encoded, strict=True):
                if len(ids) != 1:
                    raise ValueError(
                        f"the choice {label!r} is {len(ids)} tokens of this tokenizer; each label must be exactly one"
                    )
            found = tuple(ids[0] for ids in encoded)
            if not found or len(set(found)) < len(found):
                raise ValueError(f"the choices {labels!r} are not different tokens of this tokenizer")
            self._ids[labels] = found
        return self._ids[labels]
