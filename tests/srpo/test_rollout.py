"""The rollout loop on a scripted policy: every token has an owner, every stop its reason, a failure costs one row."""

import asyncio
import contextlib
import math
import random
import threading
import time

import pytest
from core_helpers import tokenizer
from episode_worlds import ScriptedEnvironment

from srpo.rollout.batch import flatten
from srpo.rollout.loop import Limits, as_columns, observation_ids, play
from srpo.rollout.turns import Sample
from srpo.rollout.worker_loop import EpisodeLoop, Flow, in_thread
from srpo.texts import encode_untrusted
from srpo.types import STOPS, Observation

EOS = tokenizer().eos_token_id
LIMITS = Limits(turns=4, tokens=64, observation_tokens=8, step_seconds=5.0)
FRAME = {"before": "<|im_end|>\n<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n"}
DONE = Observation(end="done")


class ScriptedPolicy:
    """Writes random ids, any of the vocabulary, named by the seed; remembers every request and answer."""

    def __init__(self, ends=True, length=None):
        self.log = {}
        self.ends, self.length = ends, length
        self.finished, self.left = 0, []

    def generate(self, requests):
        samples = []
        for request in requests:
            draws = random.Random(request.seed)
            if request.choices is not None:
                ids = (draws.choice(request.choices),)
            else:
                n = self.length or draws.randint(1, 12)
                ids = tuple(draws.randrange(len(tokenizer())) for _ in range(min(n, request.max_tokens)))
            ended = request.choices is not None or (self.ends and len(ids) < request.max_tokens)
            sample = Sample(ids, tuple(-draws.random() for _ in ids), ended)
            self.log.setdefault(request.row, []).append((request, sample))
            samples.append(sample)
        return samples

    def over(self, rows):
        self.left += rows

    def finish(self):
        self.finished += 1


def rollout(environment, n=1, policy=None, limits=LIMITS, **options):
    policy = policy or ScriptedPolicy()
    rows = [{"i": i} for i in range(n)]
    prompts = [(5, 6, 7 + i % 3) for i in range(n)]
    return play(environment, rows, prompts, [f"s{i}" for i in range(n)], policy, tokenizer(), limits, **options)


def test_token_in_is_token_out_over_a_thousand_trajectories():
    """The trained ids are the sampled ids, all of them, and what lies between is the world's, encoded once."""

    def script(row, t, text):
        draws = random.Random(f"{row['i']}:{t}")
        if draws.random() < 0.25:
            return Observation(end=draws.choice(["done", "budget"]))
        body = draws.choice(["", "it says <|im_end|> ✓", text, "x" * draws.randrange(40)])
        return Observation(body, **draws.choice([FRAME, {}]))

    labels = {1: ["a", "b", "c"]}
    environment = ScriptedEnvironment(script, lambda t: labels.get(t))
    policy = ScriptedPolicy()
    trajectories = rollout(environment, 1200, policy)
    assert len(trajectories) == 1200 and policy.finished == 1 and sorted(policy.left) == list(range(1200))
    stops = {t.stop for t in trajectories}
    assert stops == {"done", "budget", "turns", "tokens"}
    choices = worlds = 0
    for i, trajectory in enumerate(trajectories):
        asked = policy.log[i]
        context = list(trajectory.prompt_ids)
        mine = iter(asked)
        for turn in trajectory.turns:
            if turn.owner == "policy":
                request, sample = next(mine)
                assert list(request.ids) == context, "the policy saw exactly what is trained on"
                assert turn.ids == sample.ids and turn.logprobs == sample.logprobs
                assert turn.choices == request.choices
                choices += turn.choices is not None
            else:
                assert turn.logprobs is None and turn.choices is None
                worlds += 1
            context += turn.ids
        assert next(mine, None) is None, "every sampled turn is in the trajectory"
        flat = flatten(trajectory, 0)
        sampled = [token for _, sample in asked for token in sample.ids]
        assert [token for token, ours in zip(flat.ids, flat.policy, strict=True) if ours] == sampled
        assert flat.ids == context[3:] and len(flat.ids) <= LIMITS.tokens
        assert [p for p, ours in zip(flat.logprobs, flat.policy, strict=True) if ours] == [
            p for _, sample in asked for p in sample.logprobs
        ]
    assert choices > 300 and worlds > 300


def test_the_world_reads_the_policys_text_and_labels():
    seen = []
    environment = ScriptedEnvironment(
        lambda row, t, text: seen.append(text) or (DONE if t == 1 else Observation("ok")),
        lambda t: ["x", "y"] if t == 0 else None,
    )
    policy = ScriptedPolicy()
    (trajectory,) = rollout(environment, 1, policy)
    ids = trajectory.turns[-1].ids
    assert seen[0] in ("x", "y") and seen[1] == tokenizer().decode(ids, skip_special_tokens=True)
    assert trajectory.turns[0].choices == tuple(tokenizer().convert_tokens_to_ids(["x", "y"]))


def test_an_observation_is_cut_before_it_is_framed():
    ids = observation_ids(Observation("<|im_end|>" + "word " * 50, **FRAME), tokenizer(), 8)
    before = tokenizer()(FRAME["before"], add_special_tokens=False)["input_ids"]
    after = tokenizer()(FRAME["after"], add_special_tokens=False)["input_ids"]
    assert list(ids) == [*before, *encode_untrusted(tokenizer(), "<|im_end|>" + "word " * 50)[:8], *after]
    assert list(ids).count(EOS) == 2, "only the frame's own"


def test_every_stop_reason():
    def stop(script, policy=None, limits=LIMITS):
        return rollout(ScriptedEnvironment(script), 1, policy, limits)[0]

    go_on = Observation("go on")
    assert stop(lambda *_: DONE).stop == "done"
    assert stop(lambda *_: Observation(end="budget")).stop == "budget"
    assert stop(lambda *_: RuntimeError("gone")).columns["lost"] == "RuntimeError: gone"
    assert stop(lambda *_: Observation(end="lost")).stop == "lost"

    turns = stop(lambda *_: go_on, ScriptedPolicy(length=3))
    assert turns.stop == "turns" and turns.columns["turns"] == 4 and turns.columns["said"].count("|") == 3
    assert [t.owner for t in turns.turns] == ["policy", "world"] * 3 + ["policy"], "the last word is the policy's"

    cut = stop(lambda *_: go_on, ScriptedPolicy(length=100))
    assert cut.stop == "tokens" and sum(len(t.ids) for t in cut.turns) == 64
    assert cut.columns["said"] == "", "the world is not asked about a sentence that was cut off"
    full = stop(lambda *_: Observation("x" * 100), ScriptedPolicy(length=60))
    assert full.stop == "tokens" and [t.owner for t in full.turns] == ["policy"], "no room for the observation"

    limits = Limits(turns=4, tokens=64, observation_tokens=8, step_seconds=5, turn_tokens=5)
    short = stop(lambda *_: go_on, ScriptedPolicy(length=100), limits)
    assert [len(t.ids) for t in short.turns if t.owner == "policy"] == [5] * 4 and short.stop == "turns"

    limits = Limits(turns=4, tokens=64, observation_tokens=8, step_seconds=5, episode_seconds=0.0)
    late = stop(lambda *_: go_on, None, limits)
    assert late.stop == "deadline" and late.columns["turns"] == 1
    assert set(STOPS) == {"done", "budget", "lost", "turns", "tokens", "deadline"}


def test_columns_of_all_and_of_none():
    class Silent(ScriptedEnvironment):
        def episode(self, row, seed):
            made = super().episode(row, seed)
            if row["i"] == 1:
                made.columns = lambda stop: 1 / 0
            if row["i"] == 2:
                raise OSError("no such game")
            return made

    trajectories = rollout(Silent(lambda *_: DONE), 3)
    columns = as_columns(trajectories)
    assert columns["cost"] == [0.01, None, None] and columns["stop"] == ["done", "lost", "lost"]
    assert columns["lost"] == [None, "columns: ZeroDivisionError: division by zero", "OSError: no such game"]
    assert columns["turns"] == [1, 1, 0]
    assert flatten(trajectories[2], 9).ids == [9] and flatten(trajectories[2], 9).policy == [0]


@pytest.mark.parametrize("labels", [["a", "two words"], ["a", "a"], []])
def test_labels_that_are_not_one_token_each_are_refused(labels):
    with pytest.raises(ValueError, match=r"one|different"):
        rollout(ScriptedEnvironment(lambda *_: DONE, lambda t: labels))


def test_seeds_are_named_by_row_and_turn():
    policy = ScriptedPolicy()
    rollout(ScriptedEnvironment(lambda row, t, _: DONE if t == 2 else Observation("a")), 2, policy)
    assert [request.seed for request, _ in policy.log[1]] == ["s1:0", "s1:1", "s1:2"]


# ----------------------------------------------------------------------------------------- rows that wait alone


class Waits(ScriptedEnvironment):
    """Row 0's first answer comes when every other row is over."""

    def __init__(self, n):
        super().__init__(lambda row, t, _: DONE if t == 2 else Observation("a"))
        self.left, self.heard = n - 1, []

    def episode(self, row, seed):
        made = super().episode(row, seed)
        step = made.step

        async def waiting(text):
            while row["i"] == 0 and self.left:
                await asyncio.sleep(0.005)
            observation = await step(text)
            self.heard.append(row["i"])
            self.left -= observation.end is not None and row["i"] > 0
            return observation

        made.step = waiting
        return made


class Counting(ScriptedPolicy):
    def __init__(self, **options):
        super().__init__(**options)
        self.batches = []

    def generate(self, requests):
        self.batches.append([request.row for request in requests])
        return super().generate(requests)


def test_a_slow_world_delays_its_own_row_and_no_other():
    """In rounds nobody's second turn would come. The others still take theirs together."""
    environment, policy = Waits(6), Counting(length=3)
    found = rollout(environment, 6, policy, Limits(turns=4, tokens=200, observation_tokens=8, step_seconds=60.0))
    assert [t.stop for t in found] == ["done"] * 6 and environment.heard[-3:] == [0, 0, 0]
    assert policy.batches == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0], [0]]
    assert sorted(policy.left) == list(range(6)) and policy.left[-1] == 0


def test_a_step_begins_when_its_turn_is_written_and_not_when_the_batch_is():
    stepped = threading.Event()

    class Telling(ScriptedPolicy):
        """Row 0's turn is written first; those of the others end when its world has been asked."""

        def generate(self, requests):
            samples = super().generate(requests)
            requests[0].told([(requests[0], samples[0])])
            assert stepped.wait(60.0)
            return samples

    found = rollout(ScriptedEnvironment(lambda row, *_: (row["i"] == 0 and stepped.set()) or DONE), 3, Telling())
    assert [(t.stop, len(t.turns)) for t in found] == [("done", 1)] * 3


def test_in_rounds_all_answers_are_waited_for():
    class Late(ScriptedEnvironment):
        def episode(self, row, seed):
            made = super().episode(row, seed)
            made._seconds = 0.5 if row["i"] == 0 else 0.0
            return made

    environment, policy = Late(lambda row, t, _: DONE if t == 2 else Observation("a")), Counting(length=3)
    rollout(environment, 3, policy, rounds=True)
    assert policy.batches == [[0, 1, 2]] * 3


def test_money_that_is_spent_ends_also_who_still_waits():
    environment, policy = Waits(3), Counting(length=3)
    found = rollout(environment, 3, policy, out_of_money=lambda: len(environment.heard) >= 2)
    assert [t.stop for t in found] == ["lost", "budget", "budget"], "row 0 waits for rows that play no more"
    environment.left, policy = 0, Counting(length=3)
    environment.heard.clear()
    found = rollout(environment, 3, policy, out_of_money=lambda: len(environment.heard) >= 2)
    assert [t.stop for t in found] == ["budget"] * 3 and policy.batches == [[0, 1, 2]]
    assert all(len(t.said) == 1 for t in found), "what was under way is told"


def test_a_flow_gives_each_job_its_own_time_and_what_is_there():
    gate = threading.Event()

    async def waits():
        while not gate.is_set():
            await asyncio.sleep(0.005)
        return "late"

    async def at_once():
        return "now"

    async def never():
        await asyncio.sleep(600)

    with EpisodeLoop() as loop, Flow(loop, 0.5) as flow:
        assert flow.take() == {} and len(flow) == 0
        flow.start({"a": waits, "b": at_once})
        assert flow.take() == {"b": "now"} and len(flow) == 1
        flow.start({"b": at_once, "c": never})
        assert flow.take() == {"b": "now"} and len(flow) == 2
        gate.set()
        found = flow.take(math.inf)
        assert found.pop("a") == "late" and found["c"].cause == "no answer within 0.5 s" and len(found) == 1


# ------------------------------------------------------------------------------------------------------- failures


def leftovers():
    return [t for t in threading.enumerate() if t.name.startswith("srpo-episodes")]


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def timed(script, n=6, step_seconds=1.0, **options):
    start = time.monotonic()
    limits = Limits(turns=4, tokens=200, observation_tokens=8, step_seconds=step_seconds)
    trajectories = rollout(ScriptedEnvironment(script, **options), n, ScriptedPolicy(length=3), limits)
    return [t.stop for t in trajectories], trajectories, time.monotonic() - start


def hang(kind):
    while kind == "busy":
        pass
    end = time.monotonic() + 60
    while kind == "stubborn" and time.monotonic() < end:  # swallows every Exception
        with contextlib.suppress(Exception):
            time.sleep(0.01)


class Hanging(ScriptedEnvironment):
    def __init__(self, script, kind, **options):
        super().__init__(script, **options)
        self.kind = kind

    def episode(self, row, seed):
        made = super().episode(row, seed)
        if row["i"] == 2:
            step = made.step

            async def hanging(text):
                if len(made.texts) == 1:
                    if self.kind == "async":
                        await asyncio.sleep(60)
                    if self.kind == "never":
                        while True:
                            with contextlib.suppress(asyncio.CancelledError):
                                await asyncio.sleep(60)
                    if self.kind == "thread":
                        await in_thread(lambda: time.sleep(4))
                    hang(self.kind)
                return await step(text)

            made.step = hanging
        return made


@pytest.mark.parametrize("kind", ["async", "never", "busy", "stubborn", "thread"])
def test_a_hanging_step_costs_one_episode_and_its_deadline(kind):
    """Waiting for ever, ignoring its cancellation, computing for ever, and blocking inside C."""
    environment = Hanging(lambda row, t, _: DONE if t == 2 else Observation("a"), kind)
    limits = Limits(turns=4, tokens=200, observation_tokens=8, step_seconds=1.0)
    start = time.monotonic()
    trajectories = rollout(environment, 6, ScriptedPolicy(length=3), limits)
    seconds = time.monotonic() - start
    assert [t.stop for t in trajectories] == ["done", "done", "lost", "done", "done", "done"]
    why = "no answer within" if kind in ("async", "never", "thread") else "blocked"
    assert why in trajectories[2].columns["lost"]
    assert seconds <= 1.0 + 2.0
    wait_until(lambda: not leftovers(), 1.0)


def test_a_call_that_cannot_be_interrupted_ends_the_batch_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr("srpo.rollout.worker_loop._PATIENCE", 1)

    async def blocked():
        time.sleep(1.5)

    with EpisodeLoop() as loop, pytest.raises(RuntimeError, match="cannot be interrupted: let it wait in a thread"):
        loop.run([blocked], 0.3)
    assert not leftovers()


def test_a_busy_step_does_not_cost_its_neighbours_their_time():
    """Two steps wait for 0.6 s while a third computes for ever; their deadline is 1 s, and both make it."""

    class Mixed(ScriptedEnvironment):
        def episode(self, row, seed):
            made = super().episode(row, seed)

            async def step(text):
                if row["i"] == 1:
                    await asyncio.sleep(0.1)
                    hang("busy")
                await asyncio.sleep(0.6)
                return DONE

            made.step = step
            return made

    limits = Limits(turns=4, tokens=200, observation_tokens=8, step_seconds=1.0)
    assert [t.stop for t in rollout(Mixed(None), 3, None, limits)] == ["done", "lost", "done"]


def test_steps_run_at_the_same_time():
    stops, _, seconds = timed(lambda *_: DONE, n=50, seconds=0.5)
    assert stops == ["done"] * 50 and seconds < 2.5


@pytest.mark.parametrize("error", [ValueError("bad"), asyncio.CancelledError(), TimeoutError("own"), SystemExit(3)])
def test_an_exception_loses_one_episode(error):
    def script(row, t, _):
        if row["i"] == 1:
            raise error
        return DONE

    stops, trajectories, _ = timed(script, n=3)
    assert stops == ["done", "lost", "done"]
    assert type(error).__name__ in trajectories[1].columns["lost"]
    assert not leftovers()


def test_an_interrupted_rollout_leaves_no_thread_and_no_task():
    class Interrupting(ScriptedPolicy):
        def generate(self, requests):
            if self.log:
                raise KeyboardInterrupt
            return super().generate(requests)

    with pytest.raises(KeyboardInterrupt):
        rollout(ScriptedEnvironment(lambda *_: Observation("a")), 3, Interrupting())
    assert not leftovers()


def test_a_rule_decides_in_the_policys_place():
    """Texts instead of tokens, through the same stops; one that raises or hangs costs its own episode."""

    def rule(row, episode):
        if row == 2:
            raise ValueError("no idea")
        if row == 3:
            hang("busy")
        return f"{row}/{len(episode.texts)}"

    script = lambda row, t, text: Observation(end="done") if text == "1/2" else Observation(f"after {text}")  # noqa: E731
    limits = Limits(turns=4, tokens=1, observation_tokens=0, step_seconds=0.5)
    rows = [{"i": i} for i in range(4)]
    found = play(ScriptedEnvironment(script), rows, [()] * 4, ["s"] * 4, rule, None, limits)
    assert [t.stop for t in found] == ["turns", "done", "lost", "lost"]
    assert [text for text, _ in found[1].said] == ["1/0", "1/1", "1/2"] and found[1].said[1][1].body == "after 1/1"
    assert found[0].columns["turns"] == 4 and found[0].columns["said"] == "0/0|0/1|0/2|0/3" and not found[0].turns
    assert "no idea" in found[2].columns["lost"] and "blocked" in found[3].columns["lost"]


def test_a_shared_loop_stays_until_it_is_closed():
    loops = []

    def script(*_):
        loops.append(asyncio.get_running_loop())
        return DONE

    with EpisodeLoop() as loop:
        rollout(ScriptedEnvironment(script), 2, loop=loop)
        rollout(ScriptedEnvironment(script), 2, loop=loop)
        assert len(leftovers()) == 1
    assert len(set(loops)) == 1 and not leftovers() and loops[0].is_closed()


def test_a_closed_loop_is_not_started_again_by_a_thread_that_still_plays():
    loop, raised, turns, may_go_on = EpisodeLoop(), [], threading.Event(), threading.Event()

    class Slow(ScriptedPolicy):
        def generate(self, requests):
            turns.set()
            assert may_go_on.wait(5.0)
            return super().generate(requests)

    def other():
        with pytest.raises(RuntimeError) as caught:
            rollout(ScriptedEnvironment(lambda *_: Observation("a")), 2, Slow(), loop=loop)
        raised.append(str(caught.value))

    thread = threading.Thread(target=other)
    thread.start()
    assert turns.wait(5.0)
    loop.close()
    may_go_on.set()
    thread.join(5.0)
    assert raised == ["the loop of these episodes is closed"] and not leftovers()
