"""A model card's example, run as printed, for each kind of router: in the card's folder, and by Hub id elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from agent_helpers import train_policy
from router_helpers import train_query_router

from routers.router import ROUTER_FILE
from srpo.hub.card import model_card

ROOT = Path(__file__).resolve().parents[2]


def step_router(folder: Path, observation: str) -> Path:
    from step_helpers import policy, settings

    model, tokenizer = policy()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings(observation, unit="usd").save(folder)
    return folder


MAKERS: dict[str, Any] = {
    "query_routing": train_query_router,
    "think_route": train_policy,
    "step_routing": lambda folder: step_router(folder, "verbose"),
    "step_routing compact": lambda folder: step_router(folder, "compact"),
    "step_routing progress": lambda folder: step_router(folder, "progress"),
}
SAYS = {
    "query_routing": ("A query router", "Members: small, small-maths, large."),
    "think_route": ("A think/route agent", "Members: alpha, beta."),
    "step_routing": ("A step router", "Executors: explorer, planner."),
}


def printed(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def run(code: str, folder: Path, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=MAKERS)
def router(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param.split()[0], MAKERS[request.param](tmp_path_factory.mktemp("policy"))


@pytest.mark.slow  # a Python with torch for each kind
def test_the_example_runs_in_its_folder_and_with_a_hub_id_anywhere(router: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = router
    document = yaml.safe_load((folder / ROUTER_FILE).read_text())
    card = model_card(objective="srpo", model_name="mine", router=document, command=["x"])
    for words in SAYS[kind]:
        assert words in card
    assert str(folder) not in card
    of_hub = printed(
        model_card(objective="srpo", model_name="mine", router=document, repo_id="me/mine", command=["x"])
    )
    assert 'load_router("me/mine")' in of_hub and '"."' not in of_hub
    cache = tmp_path / "hub/models--me--mine"  # as huggingface_hub keeps what it has downloaded
    shutil.copytree(folder, cache / "snapshots/0123")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    (tmp_path / "elsewhere").mkdir()
    both = f"{printed(card)}\nimport os\nos.chdir({str(tmp_path / 'elsewhere')!r})\n{of_hub}"
    said = run(both, folder, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").splitlines()
    said = [line for line in said if not line.startswith("[INFO]")]  # wandb's own, with WANDB_MODE=offline
    settings = document["settings"]
    names = settings.get("executors") or [member["name"] for member in settings["members"]]
    assert len(said) == 2 and {line.split()[0] for line in said} <= set(names)
