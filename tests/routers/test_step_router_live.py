"""A `StepRouter` with live parts: an executor behind a real server on loopback, and a checkpoint from the Hub."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps
from openai_server import Fault, OpenAIServer
from step_helpers import GAMES

from routers import StepRouter
from routers.data.catalogue import Member
from routers.environments.react import ReActExecutor
from routers.environments.registry import benchmark
from routers.environments.scripted import SCRIPTED
from routers.pool import Retry, live_pool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return steps.policy()


def test_a_live_executor_stays_within_dollars_whatever_its_server_does(policy: Any) -> None:
    """Rate limits, errors that bill, hanging and broken replies, 24 episodes at once: what the server counted is paid,
    and no episode passes its cap."""
    draw = random.Random(0)
    kinds = [Fault.retry_after_seconds(0.0), Fault(status=500), Fault(status=500, billed=True), Fault(reset=True)]
    kinds += [Fault(body="{broken"), Fault(usage=False)]
    with OpenAIServer(reply="Action: look") as server:
        server.faults = [draw.choice(kinds) if draw.random() < 0.4 else Fault() for _ in range(400)]
        member = Member("worker", "a server", 20.0, 80.0, base_url=server.url, max_tokens=8, concurrency=8)
        pool = live_pool({"worker": member}, agent_prompt="{query}", retry=Retry(attempts=3, base=0.0))
        small, large = SCRIPTED["explorer"](0.0001), ReActExecutor(pool, "worker")
        how = steps.settings("progress", executors=("explorer", "worker"), unit="usd", tail_calls=2)
        with StepRouter(*policy, how, call_seconds=5.0) as router:
            caps = [0.004, 0.02, 0.05, 0.2] * 6
            waiting = [
                router.submit(benchmark("alfworld").make(GAMES[i % 6], 12), [small, large], cap, seed=f"{i}")
                for i, cap in enumerate(caps)
            ]
            played = [future.result() for future in waiting]
        assert server.in_flight == 0
        billed = sum(prompt * 20.0 + written * 80.0 for prompt, written in server.usage) / 1e6
        asked, errors = len(server.requests), {(s.error or "").split(":")[0] for p in played for s in p.steps}
    calls = [step for episode in played for step in episode.steps if step.executor == "worker"]
    assert asked > len(calls) > 30 and len(errors) > 1  # retries happened, and some calls failed in the end
    for cap, episode in zip(caps, played, strict=True):
        assert episode.executor_usd <= cap and not episode.violated and episode.stop != "lost"
        assert episode.executor_usd == pytest.approx(sum(step.usd for step in episode.steps))
        assert all(step.usd <= step.bounds[step.executor] for step in episode.steps)
    # Replies that report no usage are paid at their upper bound, so not less than the server's own count.
    assert sum(step.usd for step in calls) >= billed * (1 - 1e-9)
    assert pool.ledger.total().cost == pytest.approx(sum(step.usd for step in calls))


HUB = """
import json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from hub_server import HubServer
source, home = Path(sys.argv[2]), Path(sys.argv[3])
server = HubServer()
os.environ.update(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HOME=str(home))
os.environ.update(HF_TOKEN="hf_" + "none" * 9)
with server:
    from srpo.hub.upload import push_checkpoint
    push_checkpoint(source, "me/steps")
    import step_helpers as steps
    from routers import StepRouter
    from routers.environments.registry import benchmark
    with StepRouter.from_pretrained("me/steps") as router:
        name = steps.GAMES[0]
        played = router.play(benchmark("alfworld").make(name, 12), steps.executors(), 1, seed=name)
        print(json.dumps([list(played.ids), router.settings.observation]))
"""


@pytest.mark.slow
def test_a_pushed_checkpoint_is_used_by_its_hub_id(policy: Any, tmp_path: Path) -> None:
    """Pushed to a Hub on loopback, downloaded from it, read back by name: the same choices."""
    how, name = steps.settings("progress"), GAMES[0]
    source = tmp_path / "checkpoint"
    policy[0].save_pretrained(source)
    policy[1].save_pretrained(source)
    how.save(source)
    run = subprocess.run(
        [sys.executable, "-c", HUB, os.pathsep.join(sys.path), str(source), str(tmp_path / "home")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ids, observation = json.loads(run.stdout.splitlines()[-1])
    with StepRouter(*policy, how) as router:
        played = router.play(benchmark("alfworld").make(name, 12), steps.executors(), 1, seed=name)
    assert (tuple(ids), observation) == (played.ids, "progress")
