"""One process = two = four, and any micro-batches: the gradient of every objective, also where a rank has nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from equality_cases import CELLS, cuts, name
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SAME = ("loss", "grad_norm", "reward", "completions/mean_length", "srpo/distilled_share", "loss/sdpo")


def made(folder, *words):
    script = Path(__file__).parents[1] / "support" / "equality_cases.py"
    done = subprocess.run([sys.executable, script, str(folder), *words], capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def relative(found, wanted):
    """Norm of the difference of two gradients of a step, by that of the second."""
    assert found.keys() == wanted.keys()
    apart = torch.cat([(found[key].double() - wanted[key]).flatten() for key in wanted])
    length = torch.cat([value.double().flatten() for value in wanted.values()]).norm()
    assert length > 1e-3, "there is no gradient to compare"
    return float(apart.norm() / length)


def compared(folder, objective, kind):
    """Largest relative difference of a gradient; every rank has the same one."""
    first, *others = cuts(kind)
    stem = folder / name(objective, kind, first)
    wanted, log = load_file(f"{stem}-0.st"), json.loads(Path(f"{stem}-0.json").read_text())
    assert {key.partition("/")[0] for key in wanted} == {"0", "1"}
    worst = 0.0
    for cut in others:
        ranks = [load_file(folder / f"{name(objective, kind, cut)}-{rank}.st") for rank in range(cut[0])]
        for rank in ranks[1:]:
            assert all(torch.equal(rank[key], ranks[0][key]) for key in wanted), "the ranks drifted apart"
        for step in ("0/", "1/"):
            both = [{key: of[key] for key in of if key.startswith(step)} for of in (ranks[0], wanted)]
            worst = max(worst, relative(*both))
        theirs = json.loads((folder / f"{name(objective, kind, cut)}-0.json").read_text())
        for step, ours in zip(theirs, log, strict=True):
            for key in set(SAME) & ours.keys():
                assert step[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), (cut, key)
    return worst


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return made(tmp_path_factory.mktemp("equality"), "srpo:no tokens", "minirl:no tokens")


@pytest.mark.parametrize("objective", ["srpo", "minirl"])
def test_ranks_without_tokens_change_no_gradient(some, objective):
    assert compared(some, objective, "no tokens") <= 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("equality"))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kind"), CELLS)
def test_the_gradient_is_that_of_one_process(whole, objective, kind, record_property):
    worst = compared(whole, objective, kind)
    record_property("relative", worst)
    assert worst <= 1e-5
