"""Runs in a process of its own: trains tiny models against a Hub on loopback that works, refuses, breaks or is gone.

python hub_worker.py MODEL_DIR WORK_DIR      prints one line of JSON
"""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from hub_server import HubServer

MUCH_ELSE = (
    *("start/model.safetensors", "start/config.json", "base/model.safetensors", "start/evaluation.parquet"),
    *(
        "task/rules.parquet",
        "runs/events.out.tfevents.1",
        "completions/completions_1.parquet",
        "report.html",
    ),
    *("environment_0.json", "reference.safetensors", "teacher.safetensors", "spending_0.json", "evaluation.parquet"),
    *("recipe.yaml", "run.json", "quarantine.jsonl", "trainer_state.json", "optimizer.pt", "anything.new"),
)
"""What a run may leave in its folder beside the policy."""
CANARY = "hf_" + "Canary0Secret1" * 3


def main(model_dir: Path, work: Path) -> dict[str, Any]:
    server = HubServer()
    # All of these are read when huggingface_hub is imported.
    os.environ.update(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    os.environ.update(HF_TOKEN=CANARY, HF_HOME=str(work / "hf"))
    from huggingface_hub.utils import _http

    _http.time = type("NoWaiting", (), {**vars(_http.time), "sleep": staticmethod(lambda seconds: None)})

    results: dict[str, Any] = {"pid": os.getpid()}
    with server:
        results["folder"] = push_a_folder(server, work / "folder")
        results["ok"] = train(server, "ok", model_dir, work, save_steps=1)
        for mode in (401, 500, "dies"):
            results[str(mode)] = train(server, mode, model_dir, work, save_steps=1)
        server.mode = "ok"
    results["gone"] = train(server, "gone", model_dir, work, save_steps=1)
    return results


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def push_a_folder(server: HubServer, folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from srpo.hub.hub import push_checkpoint

    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# a model\n")
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.arange(1000.0)}, folder / "model.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "teacher.safetensors"):
        (folder / name).write_text("not for everybody")
    url = push_checkpoint(folder, "me/small", commit_message="hello")
    plain = {name: digest(content) for name, content in server.files.items()}
    push_checkpoint(folder, "me/small", path_in_repo="last-checkpoint", resumable=True)
    return {
        "url": url,
        "received": plain,
        "resumable": sorted(set(server.files) - set(plain)),
        "local": {p.name: digest(p.read_bytes()) for p in folder.iterdir()},
    }


def train(server: HubServer, mode: Any, model_dir: Path, work: Path, **extra: Any) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from srpo import SRPOConfig, SRPOTrainer

    server.mode = mode
    server.requests.clear()
    server.bodies.clear()
    server.files.clear()
    server.messages.clear()
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("srpo.hub.hub").addHandler(handler)

    output = work / f"run-{mode}"
    args = SRPOConfig(
        output_dir=str(output), objective="grpo", push_to_hub=True, hub_model_id="me/router", max_steps=2,
        per_device_train_batch_size=2, num_generations=2, max_completion_length=4, use_cpu=True, bf16=False,
        activation_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="steps",
        save_total_limit=1, **extra,
    )  # fmt: skip
    trainer = SRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir),
        [lambda completions, **_: [float(len(c)) for c in completions]],
        args,
        Dataset.from_dict({"prompt": ["What is 1 plus 1?", "Reverse the word stone."]}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        recipe={"objective": "grpo", "learning_rate": 1e-6, "note": CANARY},
    )

    def beside(folder: str) -> None:
        Path(folder, "router.yaml").write_text("turns: 4\n")
        Path(folder, "prices.txt").write_text("1 1\n")

    trainer.save_beside = beside
    trainer.train()
    for name in MUCH_ELSE:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("of this machine")
    trainer.heldout_table = "| router | accuracy |\n|---|---|\n| held-out | 0.61 |"
    finished = trainer.push_to_hub()
    logging.getLogger("srpo.hub.hub").removeHandler(handler)
    return {
        "steps": trainer.state.global_step,
        "push": finished,
        "logs": logs,
        "messages": list(server.messages),
        "requests": list(server.requests),
        "received": {name: digest(content) for name, content in server.files.items()},
        "local": {p.name: digest(p.read_bytes()) for p in output.iterdir() if p.is_file()},
        "staged": sorted(p.name for p in (output / "_hub").glob("*")),
        "card": (output / "README.md").read_text(),
        "remote_card": server.files.get("me/router:README.md", b"").decode(),
        "leaks": sum(CANARY.encode() in body for body in server.bodies),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
