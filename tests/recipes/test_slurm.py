"""The shipped Slurm script, with stand-ins for Slurm's commands: a notice, a killed process, and the run is the same.

The stand-in of srun does what slurmstepd does with a step: a signal reaches all its processes, launcher and shell too,
and what is left of them when the task has ended is killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

STEPS = 12
SRUN = """#!{python}
import os, signal, subprocess, sys, psutil
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
task = subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": "0"}}, start_new_session=True)

def step():
    return [one for one in psutil.process_iter() if os.getsid(one.pid) == task.pid]

def forward(number, frame):
    for one in step():
        one.send_signal(number)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
code = task.wait()
for one in step():
    one.kill()
sys.exit(code if code >= 0 else 128 - code)
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo node1 ;;
  requeue) echo "$2" >>requeued ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, repository: Path) -> Path:
    """A folder from which jobs start."""
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    recipe = yaml.safe_load((repository / "recipes" / "quickstart" / "grpo.yaml").read_text())
    recipe |= {
        "sft_epochs": 0, "train_limit": 16, "heldout_limit": 4, "use_cpu": True, "num_generations": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": STEPS, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def started(cluster: Path, repository: Path, *words: str) -> Any:
    """The job, as Slurm starts it."""
    path = os.pathsep.join([str(cluster / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "ACCELERATE": "cpu", "PATH": path}
    environment = {**os.environ, **slurm, "PYTHONPATH": str(repository)}
    script = str(repository / "recipes" / "slurm" / "train.slurm")
    with (cluster / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", script, "recipe.yaml", *words], cwd=cluster, env=environment, stdout=log, stderr=log
        )


def wait_for_step(cluster: Path, job: Any, step: int) -> None:
    while not (cluster / "out" / f"checkpoint-{step}").exists():
        assert job.poll() is None, (cluster / "log").read_text()[-3000:]
        time.sleep(0.02)


def workers(job: Any) -> list[psutil.Process]:
    below = psutil.Process(job.pid).children(recursive=True)
    return [one for one in below if {"-m", "srpo.train"} <= {*one.cmdline()}]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_goes_on_by_itself_after_a_notice_and_after_a_kill(cluster: Path, repository: Path) -> None:
    job = started(cluster, repository)
    wait_for_step(cluster, job, 3)
    os.kill(job.pid, signal.SIGUSR1)  # its time is nearly over
    assert job.wait() == 0 and (cluster / "requeued").read_text() == "7\n"
    saved = max(int(path.name.split("-")[1]) for path in (cluster / "out").glob("checkpoint-*"))
    assert 3 <= saved < STEPS

    job = started(cluster, repository)
    wait_for_step(cluster, job, (saved // 3 + 1) * 3)
    [worker] = workers(job)
    worker.kill()  # a fault of the node
    assert job.wait() == 0 and (cluster / "requeued").read_text() == "7\n7\n"

    job = started(cluster, repository)
    assert job.wait() == 0 and (cluster / "requeued").read_text() == "7\n7\n", "done"
    log = (cluster / "log").read_text()
    assert f"[resume] {cluster}/out/checkpoint-{saved}\n" in log and "its time is nearly over" in log
    assert log.count("[evaluate] the policy that RL starts from") == 1, "paid for once"
    assert json.loads((cluster / "out" / "run.json").read_text())["finished"]
    state = json.loads((cluster / "out" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [*range(1, STEPS + 1)]


@pytest.mark.slow
def test_a_mistake_ends_the_job(cluster: Path, repository: Path) -> None:
    assert started(cluster, repository, "--max_stepz", "3").wait() == 2
    assert not (cluster / "requeued").exists() and "max_steps" in (cluster / "log").read_text()


SERVER = """#!/bin/bash
sleep 600 &
echo "$@" >server
wait
"""
TRAINING = """#!/bin/bash
trap 'kill $!; exit 0' USR1 TERM
echo "$@" >training
sleep 600 &
wait
"""


@pytest.mark.parametrize("told", [signal.SIGUSR1, signal.SIGTERM])
def test_the_server_of_a_job_ends_with_it(cluster: Path, repository: Path, told: int) -> None:
    """vLLM's processes, and the training, are stand-ins."""
    nodes = SCONTROL.replace("echo node1", "printf 'node1\\nnode2\\n'")
    for name, text in {"scontrol": nodes, "trl": SERVER, "srpo": TRAINING}.items():
        (cluster / "bin" / name).write_text(text)
        (cluster / "bin" / name).chmod(0o755)
    recipe = yaml.safe_load((cluster / "recipe.yaml").read_text()) | {"use_vllm": True, "vllm_mode": "server"}
    (cluster / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = started(cluster, repository)
    while not ((cluster / "server").exists() and (cluster / "training").exists()):
        assert job.poll() is None, (cluster / "log").read_text()
        time.sleep(0.02)
    below = psutil.Process(job.pid).children(recursive=True)
    assert sum(one.name() == "sleep" for one in below) == 2
    job.send_signal(told)
    assert job.wait(60) == 0
    assert psutil.wait_procs(below, timeout=30)[1] == []
    assert "--vllm_server_host node2 --vllm_server_port 8000" in (cluster / "training").read_text()
    assert (cluster / "requeued").exists() == (told == signal.SIGUSR1)
