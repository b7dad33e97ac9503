"""The paper's recipe, the file itself, over real HTTP: every phase, what it costs, a cap, and a run that goes on."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from openai_server import Fault, OpenAIServer

ROOT = Path(__file__).resolve().parents[2]

from routers.environments.alfworld.environment import AlfWorldBenchmark
from routers.environments.protocol import AgentEnvironment
from routers.evaluation.episodes import Episodes
from routers.pool.endpoint import TEMPLATE_TOKENS
from routers.tasks.step_routing.player import PhaseStopped
from srpo import evaluate, train

RECIPE = ROOT / "recipes/Qwen2.5-1.5B-Instruct/bopo/alfworld.yaml"
PRICES = {"gpt-4.1-mini": (0.4, 1.6), "gpt-4.1": (2.0, 8.0)}
PHASES = (
    "profiling", "profiling of held-out tasks", "rules on validation tasks", "demonstrations", "evaluation of start",
    "training", "evaluation of bopo", "rules",
)  # fmt: skip


class StandIn:
    """Answers as a model would, in the ReAct form: the large one by the way to the goal, the small one by chance."""

    def __init__(self) -> None:
        self.benchmark = AlfWorldBenchmark()
        self.names = [*self.benchmark.tasks("generated/train", 4), *self.benchmark.tasks("generated/test", 2)]

    def __call__(self, request: dict[str, Any]) -> str:
        prompt = request["messages"][-1]["content"]
        commands = re.search(r"^Possible commands: (.*)$", prompt, re.MULTILINE)
        assert commands is not None, "every prompt lists the commands"
        if request["model"] == "gpt-4.1-mini":
            choice = random.Random(prompt).choice(commands[1].split("; "))
            return f"Thought: perhaps.\nAction: {choice.capitalize()}."
        game = self.game(prompt)
        for action in re.findall(r"^> (.*)$", prompt, re.MULTILINE):
            game.step(action)
        return f"Thought: the next step.\nAction: {game.expert() or 'look'}"  # type: ignore[attr-defined]

    def game(self, prompt: str) -> AgentEnvironment:
        for name in self.names:
            game = self.benchmark.make(name, 99)
            if game.reset() in prompt:
                return game
        raise AssertionError("no game begins like this")


@pytest.fixture
def servers() -> Iterator[dict[str, OpenAIServer]]:
    answer = StandIn()
    with OpenAIServer(answer=answer) as small, OpenAIServer(answer=answer) as large:
        yield {"gpt-4.1-mini": small, "gpt-4.1": large}


def billed(servers: dict[str, OpenAIServer]) -> float:
    """By the servers' own books."""
    return sum(
        (prompt * PRICES[name][0] + completion * PRICES[name][1]) / 1e6
        for name, server in servers.items()
        for prompt, completion in server.usage
    )


def command(folder: Path, servers: dict[str, OpenAIServer], output: str = "out", **overrides: Any) -> list[str]:
    """The recipe's file, and what is smaller here."""
    catalogue = yaml.safe_load((ROOT / "recipes/catalogues/gpt41.yaml").read_text())
    for member in catalogue["members"]:
        del member["api_key_env"]
        member |= {"base_url": servers[member["name"]].url, "timeout": 5.0}
    (folder / "catalogue.yaml").write_text(yaml.safe_dump(catalogue))
    arguments = {
        "config": RECIPE, "output_dir": folder / output, "catalogue": folder / "catalogue.yaml",
        "reply_cache": folder / "replies", "model_name_or_path": "tiny", "train_tasks": "generated/train",
        "train_limit": 4, "heldout_tasks": "generated/test", "heldout_limit": 2, "step_limit": 12,
        "profile_runs": 2, "sft_sweep": 3, "sft_epochs": 1, "heldout_caps": ["inf", "1"], "max_steps": 2,
        "prompts_per_step": 4, "max_cost_usd": 50, "bf16": "false", "gradient_checkpointing": "false",
        "save_strategy": "no", "learning_rate": 1e-4, "disable_tqdm": "true", "concurrency": 8,
    }  # fmt: skip
    words = []
    for key, value in {**arguments, **overrides}.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def run(*arguments: Any, **overrides: Any) -> Episodes:
    return train.main(command(*arguments, **overrides))


def spent(folder: Path, output: str = "out") -> float:
    state = json.loads((folder / output / "spending_0.json").read_text())
    return float(state["spent"] + state["overrun"])


@pytest.mark.slow
def test_the_papers_recipe_end_to_end(tmp_path: Path, servers: dict[str, OpenAIServer], capsys: Any) -> None:
    # None that may be billed without an answer, such as a call that hangs: it is not made again, its step is wasted,
    # and the second run below would ask what the first one never heard.
    faults = [Fault(status=500), Fault.retry_after_seconds(0.1), Fault(reset=True)]
    for server in servers.values():
        for fault in faults:
            server.faults += [Fault()] * 9 + [fault]
    played = run(tmp_path, servers)
    said = capsys.readouterr().out

    # Money: what every phase said, what the run's books say and what the servers say are the same.
    assert spent(tmp_path) == pytest.approx(billed(servers)) and spent(tmp_path) > 0
    lines = {name: re.search(rf"^{name}: (.*)\. The run has spent \$(\S+) of \$50$", said, re.M) for name in PHASES}
    assert all(lines.values()), [name for name, line in lines.items() if line is None]
    assert "gpt-4.1-mini" in lines["training"][1] and "gpt-4.1 " in lines["training"][1]  # type: ignore[index]
    sums = [float(usd) for line in lines.values() for usd in re.findall(r", \$([0-9.]+)", line[1])]  # type: ignore
    assert sum(sums) == pytest.approx(billed(servers), abs=1e-3)
    assert float(lines["rules"][2]) == pytest.approx(billed(servers), abs=1e-4)  # type: ignore[index]
    assert "| profiling " in said.split("\ntraining tasks")[0]  # the estimate comes before the first call
    most = [int(n.replace(",", "")) for n in re.findall(r"^\| profiling +\| +([\d,]+) \| +([\d,]+) ", said, re.M)[0]]
    assert most == [4 * 2 * 12] * 2

    # What was written, and that no cap was passed.
    out = tmp_path / "out"
    episodes = played.frame.drop(columns="seconds")
    capped = episodes[episodes["cap"] == 1]
    assert len(capped) == 2 * 2 and (capped["large_calls"] <= 1).all() and not episodes["violated"].any()
    assert sorted(set(episodes["router"]) - {"start", "bopo"}) == [
        "always-large", "always-small", "cascade 4", "cascade 8", "escalate inf", "explore 3", "first-large 1",
        "random mixing 0.1", "random mixing 0.3",
    ]  # fmt: skip
    success = episodes.groupby("router")["score"].mean()
    assert success["always-large"] == 1.0 > success["always-small"]
    demonstrations = pd.read_parquet(out / "demonstrations/train.parquet")
    assert set(demonstrations["difficulty"]) == {"hard"}
    first = demonstrations["decisions"][0][0]
    assert first["body"].startswith("> ") and "[steps left 11]" in first["before"]  # verbose

    # Another run, with the cache: nobody is called, and everything is the same.
    calls = sum(len(server.requests) for server in servers.values())
    again = run(tmp_path, servers, "again").frame.drop(columns="seconds")
    assert sum(len(server.requests) for server in servers.values()) == calls and spent(tmp_path, "again") == 0.0
    pd.testing.assert_frame_equal(again, episodes)

    # The checkpoint by itself: the same episodes again, and nobody is called.
    words = [str(out), "--output_dir", str(tmp_path / "alone"), "--max_cost_usd", "0.0001"]
    alone = evaluate.main(words).renamed({"out": "bopo"}).frame.drop(columns="seconds")
    assert sum(len(server.requests) for server in servers.values()) == calls
    pd.testing.assert_frame_equal(alone, episodes[episodes["router"] != "start"].reset_index(drop=True))


@pytest.mark.slow
def test_a_cap_stops_it_and_a_higher_one_goes_on(tmp_path: Path, servers: dict[str, OpenAIServer]) -> None:
    """Explorer (scripted, free) and a large model behind an endpoint; one call in twenty fails and is billed."""
    large = servers["gpt-4.1"]
    large.faults = ([Fault()] * 19 + [Fault(status=500, billed=True)]) * 100
    mixed = {"executors": ["explorer", "gpt-4.1"], "executor_usd": [0, 0], "max_steps": 1}
    for cap in (0.012, 0.016, 0.02):
        with pytest.raises(PhaseStopped, match=r"max_cost_usd is reached: \$[0-9.]+ are spent"):
            run(tmp_path, servers, max_cost_usd=cap, concurrency=1, **mixed)
        assert spent(tmp_path) == pytest.approx(billed(servers)) and spent(tmp_path) <= cap
        most = (TEMPLATE_TOKENS + 4000) * 2e-6 + 256 * 8e-6  # of one call: a prompt is shorter than 4,000 bytes
        assert spent(tmp_path) >= cap - most  # one at a time: it stopped because of one call
    played = run(tmp_path, servers, max_cost_usd=9, **mixed)
    assert "bopo" in played.routers and not servers["gpt-4.1-mini"].requests
    assert spent(tmp_path) == pytest.approx(billed(servers)) and any(r["model"] == "gpt-4.1" for r in large.requests)

    # Training, where many episodes ask at once: those that could not be paid are nobody's, and a checkpoint is left.
    again = {
        **mixed,
        "max_steps": 3,
        "seed": 1,
        "start_from": tmp_path / "out/start",
        "task_dir": tmp_path / "out/task",
    }
    with pytest.raises(PhaseStopped, match=r"The policy of step \d is saved"):
        run(tmp_path, servers, "rl", max_cost_usd=0.012, **again)
    assert spent(tmp_path, "rl") <= 0.012 and spent(tmp_path) + spent(tmp_path, "rl") == pytest.approx(billed(servers))
    [checkpoint] = (tmp_path / "rl").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] < 3 and 0 < state["log_history"][0]["rollout/stop/lost"] <= 1
    assert (tmp_path / "rl/model.safetensors").exists()
    played = run(tmp_path, servers, "rl", max_cost_usd=9, resume_from_checkpoint=checkpoint, **again)
    assert "bopo" in played.routers
    assert spent(tmp_path) + spent(tmp_path, "rl") == pytest.approx(billed(servers))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_pay_for_their_own_rollouts_and_once_for_the_rest(
    tmp_path: Path, servers: dict[str, OpenAIServer]
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    changes = {"use_cpu": "true", "per_device_train_batch_size": 2, "max_steps": 1}
    words = [*launch, "-m", "srpo.train", *command(tmp_path, servers, **changes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"^process (\d): ([a-zA-Z -]+): (.*)\. The run", done.stdout, re.MULTILINE)
    assert [name for process, name, _ in lines if process == "0"] == list(PHASES)
    assert [name for process, name, _ in lines if process == "1"] == [*PHASES[4:]], "all but what is paid once"
    assert all(" 0 calls" not in said and "gpt-4.1" in said for _, name, said in lines if name == "training")
    books = [json.loads((tmp_path / f"out/spending_{process}.json").read_text()) for process in (0, 1)]
    assert all(book["spent"] > 0 for book in books)
    assert sum(book["spent"] + book["overrun"] for book in books) == pytest.approx(billed(servers))
    last = re.findall(r"In all, the run has spent \$([0-9.]+) of", done.stdout)
    assert float(last[0]) == pytest.approx(billed(servers), abs=1e-4)  # the other process's share is counted
