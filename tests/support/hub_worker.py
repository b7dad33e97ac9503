"""Runs in a process of its own, against a Hub on loopback; prints one line of JSON.

python hub_worker.py MODEL_DIR WORK_DIR run       pushes a folder, and trains a tiny model while the Hub works
python hub_worker.py MODEL_DIR WORK_DIR refused   trains tiny models while it refuses, is out of order or is gone
python hub_worker.py MODEL_DIR WORK_DIR loads     pushes a whole model, an adapter and the merged one, and loads them
python hub_worker.py MODEL_DIR WORK_DIR faults    pushes a folder through every fault at every kind of request
"""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from hub_server import CUT, DROP, LOST, SILENT, WRONG, HubServer

from srpo.hub.errors import explain
from srpo.losses import noted

MUCH_ELSE = (
    *("start/model.safetensors", "start/config.json", "base/model.safetensors", "start/evaluation.parquet"),
    *(
        "task/rules.parquet",
        "runs/events.out.tfevents.1",
        "completions/completions_1.parquet",
        "report.html",
    ),
    *("environment_0.json", "reference.safetensors", "teacher.safetensors", "spending_0.json", "evaluation.parquet"),
    *("run.json", "quarantine.jsonl", "trainer_state.json", "optimizer.pt", "anything.new"),
)
"""What a run may leave in its folder beside the policy."""
CANARY = "hf_" + "Canary0Secret1" * 3


FAULTS: dict[str, Any] = {
    "503": 503,
    "500": 500,
    "429": (429, {"Retry-After": "1"}),
    "409": 409,
    "412": 412,
    "dropped": DROP,
    "answer lost": LOST,
    "answer cut": CUT,
    "silent": SILENT,
    "wrong bytes": WRONG,
}
FIRST = "whoami create info validate preupload batch put verify commit".split()
"""Kinds of requests of a push into a repository that does not exist."""


def main(model_dir: Path, work: Path, what: str) -> dict[str, Any]:
    server = HubServer()
    # All of these are read when huggingface_hub is imported.
    os.environ.update(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    os.environ.update(HF_TOKEN=CANARY, HF_HOME=str(work / "hf"))
    with server:
        if what == "faults":
            return pushed_through_faults(server, work / "folder")
        if what == "loads":
            return loaded_again(server, work)
        results: dict[str, Any] = {}
        if what == "run":
            results["folder"] = push_a_folder(server, work / "folder")
            results["ok"] = train(server, "ok", model_dir, work, save_strategy="steps", save_steps=1)
            return results
        results["ok"] = train(server, "ok", model_dir, work, push_to_hub=False)
        server.always["*"] = 401
        results["401"] = train(server, "401", model_dir, work)
        server.always["*"] = 503
        results["503"] = train(server, "503", model_dir, work, hub_deadline=4.0)
    results["gone"] = train(server, "gone", model_dir, work, hub_deadline=4.0)
    return results


def loaded_again(server: HubServer, work: Path) -> dict[str, Any]:
    """Kind of push -> largest difference of logits to the model that was pushed, by plain transformers or peft; what
    `load_router` makes of it; and its card."""
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from router_helpers import QUESTIONS, SETTINGS, train_query_router
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from routers import load_router
    from srpo.hub.card import model_card
    from srpo.hub.hub import beside_card
    from srpo.hub.push import main as push

    adapter, whole, ids = work / "adapter", work / "whole", torch.arange(40).view(2, 20)
    for folder in (adapter, whole):
        folder.mkdir()
    train_query_router(whole)
    AutoTokenizer.from_pretrained(whole).save_pretrained(adapter)
    SETTINGS.save(adapter)
    push([str(whole), "me/whole"])
    base = AutoModelForCausalLM.from_pretrained("me/whole", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = {"whole": base(ids).logits}
        policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).eval()
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        wanted["adapter"] = wanted["merged"] = policy(ids).logits
    policy.save_pretrained(adapter)
    about = {"base_model": "me/whole", "adapter": True, "repo_id": "me/adapter", "heldout_table": "| a | 0.61 |"}
    card = model_card(objective="srpo", model_name="r", command=["x"], **about, **beside_card(adapter))
    (adapter / "README.md").write_text(card)
    push([str(adapter), "me/adapter"])
    push([str(adapter), "me/merged", "--merged"])
    found: dict[str, Any] = {"moved": float((wanted["adapter"] - wanted["whole"]).abs().max())}
    for name, logits in wanted.items():
        kind = AutoPeftModelForCausalLM if name == "adapter" else AutoModelForCausalLM
        with torch.no_grad():
            there = kind.from_pretrained(f"me/{name}", dtype=torch.float32).eval()(ids).logits
        with load_router(f"me/{name}") as router:
            told = [router.route(question) for question in QUESTIONS]
        routes = [[one.member, dict(one.scores)] for one in told]
        found[name] = [
            float((there - logits).abs().max()),
            routes,
            server.files.get(f"me/{name}:README.md", b"").decode(),
        ]
    return found


def small(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# a model\n")
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.arange(1000.0)}, folder / "model.safetensors")
    return folder


def pushed_through_faults(server: HubServer, folder: Path) -> dict[str, Any]:
    """(kind, fault) -> how a push went at whose first request of the kind that happened; and one error for each that
    does not pass."""
    from huggingface_hub.utils import _http

    from srpo.hub import upload

    _http.time = type("NoWaiting", (), {**vars(_http.time), "sleep": staticmethod(lambda seconds: None)})
    upload._PAUSES, upload._REQUEST = (0.01, 0.05), 1.0
    small(folder)
    local = {name: (folder / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")}
    found: dict[str, Any] = {}
    for kind in FIRST:
        for name, fault in FAULTS.items():
            if name == "wrong bytes" and kind not in ("put", "commit"):
                continue
            server.reset()
            server.faults[kind].append(fault)
            try:
                url = upload.push_checkpoint(folder, "small", deadline=60.0)
                told = "pushed" if url.endswith("/tester/small/commit/" + server.commits["tester/small"][-1]) else url
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            there = {path: server.files.get(f"tester/small:{path}") == data for path, data in local.items()}
            commits, puts = len(server.messages), server.count()["put"]
            met = not server.faults[kind]
            found[f"{kind}, {name}"] = [told, all(there.values()), commits, puts, met]
    for status in (400, 401, 403):
        server.reset()
        server.always["*"] = status
        try:
            upload.push_checkpoint(folder, "me/small", deadline=60.0)
        except Exception as error:
            found[str(status)] = [type(error).__name__, explain(error), len(server.kinds)]
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def push_a_folder(server: HubServer, folder: Path) -> dict[str, Any]:
    from srpo.hub.upload import push_checkpoint

    small(folder)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "teacher.safetensors"):
        (folder / name).write_text("not for everybody")
    url = push_checkpoint(folder, "me/small", commit_message="hello")
    plain = {name: digest(content) for name, content in server.files.items()}
    before = server.count()
    again = push_checkpoint(folder, "me/small")
    asked = server.count() - before
    (folder / "config.json").write_text('{"changed": 1}')
    push_checkpoint(folder, "me/small", path_in_repo="last-checkpoint", resumable=True)
    push_checkpoint(folder, "me/small")
    (folder / "config.json").write_text("{}")
    return {
        "url": url,
        "again": [again, dict(asked)],
        "received": plain,
        "puts": server.count()["put"],
        "changed": server.files["me/small:config.json"].decode(),
        "resumable": sorted(set(server.files) - set(plain)),
        "local": {p.name: digest(p.read_bytes()) for p in folder.iterdir()},
    }


def train(server: HubServer, mode: Any, model_dir: Path, work: Path, **extra: Any) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from srpo import SRPOConfig, SRPOTrainer

    always = dict(server.always)
    server.reset()
    server.always.update(always)
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("srpo.hub").addHandler(handler)

    output = work / f"run-{mode}"
    args = SRPOConfig(
        output_dir=str(output), objective="grpo", hub_model_id="me/router", max_steps=2,
        per_device_train_batch_size=2, num_generations=2, max_completion_length=4, use_cpu=True, bf16=False,
        activation_checkpointing=False, report_to="none", disable_tqdm=True, save_total_limit=1,
        **{"save_strategy": "no", "push_to_hub": True, **extra},
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
    finished = trainer.push_to_hub() if args.push_to_hub else trainer.save_model()
    logging.getLogger("srpo.hub").removeHandler(handler)
    return {
        "steps": trainer.state.global_step,
        "push": finished,
        "logs": logs,
        "messages": list(server.messages),
        "losses": noted(output),
        "received": {name: digest(content) for name, content in server.files.items()},
        "local": {p.name: digest(p.read_bytes()) for p in output.iterdir() if p.is_file()},
        "staged": sorted(p.name for p in (output / "_hub").glob("*")),
        "card": (output / "README.md").read_text() if args.push_to_hub else "",
        "remote_card": server.files.get("me/router:README.md", b"").decode(),
        "leaks": sum(CANARY.encode() in body for body in server.seen),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
