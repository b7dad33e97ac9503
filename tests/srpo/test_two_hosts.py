"""Two hosts train one policy, one is cut off in the middle: the other ends and says why, and the run goes on later.

Hosts are network and process namespaces of this machine, each with an address of its own, joined by a virtual cable,
and sharing a folder, as nodes of a cluster do. Each has its own launcher (torchrun, c10d rendezvous) and one process.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("east", "west")
PORT, CABLE, HANG = 29471, "cable", 20
RUNS = itertools.count()
SMALL = {
    "train_limit": 32, "heldout_limit": 2, "sft_epochs": 0, "max_steps": 6, "save_steps": 1, "save_strategy": "steps",
    "logging_steps": 1, "gradient_accumulation_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8,
    "max_completion_length": 24, "use_cpu": "true", "report_to": "none", "disable_tqdm": "true",
    "hang_deadline": HANG, "objective": "grpo",
}  # fmt: skip


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two of them, by name; `address` of each, and a cable that can be cut."""

    def __init__(self) -> None:
        self.spaces = {name: f"srpo-{os.getpid()}-{name}" for name in NAMES}
        self.address = {name: f"192.0.2.{i}" for i, name in enumerate(NAMES, 1)}  # of documentation: nobody's

    def __enter__(self) -> "Hosts":
        try:
            for space in self.spaces.values():
                ip("netns", "add", space)
                ip("-n", space, "link", "set", "lo", "up")
            (one, other), space = self.spaces.values(), f"c{os.getpid()}"
            ip("link", "add", f"{space}e", "type", "veth", "peer", "name", f"{space}w")
            for end, where, name in ((f"{space}e", one, "east"), (f"{space}w", other, "west")):
                ip("link", "set", end, "netns", where)
                ip("-n", where, "link", "set", end, "name", CABLE)
                ip("-n", where, "addr", "add", f"{self.address[name]}/24", "dev", CABLE)
            self.join()
        except OSError:
            self.__exit__()
            raise
        return self

    def join(self) -> None:
        for space in self.spaces.values():
            ip("-n", space, "link", "set", CABLE, "up")

    def cut(self, name: str) -> None:
        ip("-n", self.spaces[name], "link", "set", CABLE, "down")

    def __exit__(self, *_: Any) -> None:
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def start(self, name: str, log: Path, run: int, words: list[str]) -> "subprocess.Popen[bytes]":
        """One host's launcher. The rendezvous lies on the first host."""
        inside = [
            "ip",
            "netns",
            "exec",
            self.spaces[name],
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += [
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"{self.address['east']}:{PORT}",
            "--rdzv_id",
            str(run),
        ]
        launcher += ["--rdzv_conf", f"is_host={int(name == 'east')}", "--local_addr", self.address[name]]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
        with log.open("w") as said:
            return subprocess.Popen(
                [*inside, *launcher, "-m", "srpo.train", *words], stdout=said, stderr=said, env=environment, cwd=ROOT
            )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Hosts())
        except OSError as refused:
            pytest.skip(f"network namespaces are not allowed here: {refused}")
        yield made


def together(hosts: Hosts, folder: Path, output: Path, **changes: Any) -> dict[str, "subprocess.Popen[bytes]"]:
    settings = {"config": ROOT / "recipes/quickstart/srpo.yaml", "output_dir": output, **SMALL, **changes}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    run = next(RUNS)
    return {name: hosts.start(name, folder / f"{name}{run}.log", run, words) for name in NAMES}


def wait_for(path: Path, running: dict[str, "subprocess.Popen[bytes]"], folder: Path) -> None:
    deadline = time.monotonic() + 1200
    while not path.exists():
        ended = [name for name, process in running.items() if process.poll() is not None]
        assert not ended, f"{ended} ended: " + "".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.2)


def test_a_host_that_is_cut_off_ends_the_run_which_then_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = together(hosts, tmp_path, output)
    try:
        wait_for(output / "checkpoint-2" / "manifest.json", running, tmp_path)
        hosts.cut("west")
        began = time.monotonic()
        code, lost = running["east"].wait(timeout=600), tmp_path / "west0.log"
        # The launcher of the host that was cut off waits for its rendezvous for minutes: torch's own patience.
        while "[watch] the run ends" not in lost.read_text():
            assert time.monotonic() - began < 300, lost.read_text()
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    print(f"both hosts' processes have ended {time.monotonic() - began:.0f} s after the cut")
    assert code, "nobody reports a finished run"
    said = (tmp_path / "east0.log").read_text()
    assert f"nothing moves within hang_deadline ({HANG} s): process 1: " in said
    assert "no sign of it since" in said and "resume_from_checkpoint: auto goes on" in said
    assert not (output / "model.safetensors").exists()

    hosts.join()
    running = together(hosts, tmp_path, output, resume_from_checkpoint="auto")
    assert {name: process.wait(timeout=1200) for name, process in running.items()} == dict.fromkeys(NAMES, 0)
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    again = (tmp_path / "east1.log").read_text()
    assert "2 processes x 8 at a time x 1 micro-batch" in again
