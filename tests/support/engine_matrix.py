"""Small policies on every engine, from start to push: python support/engine_matrix.py FOLDER [CELL...]

A cell trains three steps on two processes, with a checkpoint after the second, evaluates, saves and pushes to a Hub on
loopback; new processes then go on from the checkpoint. `alone` is one process without an engine.
"""

import json
import os
import signal
import sys
from itertools import product
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
POLICIES = tuple("-".join(both) for both in product(("dense", "moe"), ("full", "lora")))
CELLS = ["-".join(cell) for cell in product(("alone", *ENGINES), POLICIES)]
STEPS, ROWS = 3, 16
# A run of the first may not go on from a checkpoint of the second.
STRANGERS = [
    ("alone", "ddp"), ("ddp", "zero2"), ("zero3", "zero2"), ("zero2", "zero3"), ("ddp", "fsdp2"), ("fsdp2", "ddp"),
]  # fmt: skip


def ids() -> Any:
    import torch

    return torch.arange(5, 25).reshape(2, 10)


def logits(network: Any) -> Any:
    import torch

    network.eval()  # DeepSpeed's returns nothing
    with torch.no_grad():
        return network(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits.contiguous()


def base(cell: str, folder: Path) -> Any:
    """As a run has it: read from a folder, by which an adapter names it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / cell.split("-")[1])


def write_bases(folder: Path) -> None:
    from core_helpers import model, tokenizer
    from replay_cases import moe

    for name, network in (("dense", model()), ("moe", moe())):
        # Half of the tokens end a sample.
        network.generation_config.eos_token_id = [tokenizer().eos_token_id, *range(145, len(tokenizer()))]
        network.save_pretrained(folder / name)


def build(out: Path, cell: str, name: str) -> Any:
    import torch
    from core_helpers import config, dataset, trainer
    from distributed_cases import reward
    from peft import LoraConfig
    from sharded_weights_cases import engine_settings

    engine, kind, policy = cell.split("-")
    settings = engine_settings(engine)
    if engine == "fsdp2" and kind == "moe":
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Qwen3MoeDecoderLayer"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = config(
        out,
        objective="srpo",
        per_device_train_batch_size=ROWS // processes,
        per_device_eval_batch_size=ROWS // processes,
        max_steps=STEPS,
        learning_rate=0.05,
        optim_args="momentum=0.5",  # a state that resuming needs
        routing_replay="R3" if kind == "moe" else "off",
        log_completions=False,
        save_strategy="steps",
        save_steps=2,
        beta=0.05 if policy == "lora" else 0.0,
        push_to_hub=True,
        hub_model_id=f"me/{name}",
        hub_strategy="end",
        **settings,
    )
    torch.manual_seed(0)
    modules = ["q_proj", "v_proj"] if kind == "moe" else ["q_proj", "v_proj", "up_proj"]
    peft = LoraConfig(r=4, target_modules=modules, init_lora_weights=False) if policy == "lora" else None
    return trainer(
        args, base(cell, out.parent), reward, rollout_func=None, train_dataset=dataset(48), eval_dataset=dataset(4),
        peft_config=peft,
    )  # fmt: skip


def run(folder: Path, cell: str, part: str) -> None:
    """`part`: straight or resumed."""
    from safetensors.torch import save_file

    from srpo.policy import whole_policy

    rank, out = int(os.environ.get("RANK", 0)), folder / cell
    made = build(out, cell, f"{cell}-{part}")
    made.train(resume_from_checkpoint=str(out / "checkpoint-2") if part == "resumed" else None)
    record: dict[str, Any] = {
        "engine": f"{made.accelerator.distributed_type.value} {type(made.model_wrapped).__name__}",
        "processes": made.accelerator.num_processes,
        "log": {e["step"]: e for e in made.state.log_history if "loss" in e},
        "evaluated": {k: v for k, v in made.evaluate().items() if "time" not in k and "per_second" not in k},
    }
    found = {"engine": logits(made.model_wrapped)}
    made.save_model(str(out / part), _internal_call=True)  # else it pushes, too
    with whole_policy(made, out / part) as network:
        found["whole"] = logits(network)
    made.teacher.save(str(out / part))  # beside the policy, for the comparison only
    record["pushed"] = made.push_to_hub()
    save_file(found, out / f"{part}_{rank}.st")
    (out / f"{part}_{rank}.json").write_text(json.dumps(record))


def refused(folder: Path, engine: str, wrote: str) -> None:
    made = build(folder / f"{engine}_after_{wrote}", f"{engine}-dense-full", "refused")
    try:
        made.train(resume_from_checkpoint=str(folder / f"{wrote}-dense-full" / "checkpoint-2"))
    except ValueError as error:
        (folder / f"{engine}_after_{wrote}.txt").write_text(str(error))


def hub(folder: Path) -> None:
    """Serve until killed; what is committed lies in FOLDER/hub/OWNER/NAME."""
    from hub_server import HubServer

    class Kept(HubServer):
        def handle(self, request: Any) -> None:
            super().handle(request)
            if "/commit/" in request.path:
                for name, content in self.files.items():
                    path = folder / "hub" / name.replace(":", "/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

    server = Kept()
    (folder / "endpoint.draft").write_text(server.endpoint)
    (folder / "endpoint.draft").rename(folder / "endpoint")
    server.http.serve_forever()


def main(folder: Path, cells: list[str]) -> list[str]:
    if (server := os.fork()) == 0:
        hub(folder)
    try:
        while not (folder / "endpoint").exists():
            pass
        endpoint = (folder / "endpoint").read_text()
        import replay_sharded_cases  # noqa: F401  sets HF_HUB_OFFLINE
        import sharded_weights_cases  # noqa: F401

        # All of these are read when huggingface_hub is imported.
        os.environ.update(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_test")
        os.environ.update(HF_HOME=str(folder / "hf"), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        import distributed_cases  # noqa: F401  imports what every cell needs
        import forked

        def all_ranks(work: Any, *words: str) -> None:
            log = folder / f"{'-'.join(words)}.log"
            forked.group(1 if words[0].startswith("alone") else 2, work, folder, *words, log=log)

        forked.group(1, write_bases, folder, log=folder / "bases.log")
        wrong = []
        for cell in cells:
            (folder / cell).mkdir(exist_ok=True)
            try:
                all_ranks(run, cell, "straight")
                all_ranks(run, cell, "resumed")
            except forked.Failed as error:
                wrong.append(str(error))
        for engine, wrote in STRANGERS:
            if (folder / f"{wrote}-dense-full").exists():
                all_ranks(refused, engine, wrote)
        return wrong
    finally:
        os.kill(server, signal.SIGKILL)


if __name__ == "__main__":
    if wrong := main(Path(sys.argv[1]), sys.argv[2:] or CELLS):
        sys.exit("\n\n".join(wrong))
