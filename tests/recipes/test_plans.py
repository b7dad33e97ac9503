"""`srpo plan` of the recipes for GPUs, without a GPU or the Hub; recipes/GPUS.md is written from it:

python tests/recipes/test_plans.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from published import PUBLISHED

PAGE = ROOT / "recipes" / "GPUS.md"
ADAPTER = ["--lora_r", "32", "--learning_rate", "5e-5"]
PLANS: dict[str, tuple[str, list[str], float]] = {
    "1.5B": ("Qwen2.5-1.5B-Instruct/srpo/routing", [], 80),
    "8B": ("Qwen3-8B/srpo/routing", [], 80),
    "8B, LoRA": ("Qwen3-8B/srpo/routing", ADAPTER, 80),
    "30B-A3B": ("Qwen3-30B-A3B/grpo/routing_r3", [], 141),
    "30B-A3B, LoRA": (
        "Qwen3-30B-A3B/grpo/routing_r2",
        [*ADAPTER, "--vllm_tensor_parallel_size", "1", "--vllm_gpu_memory_utilization", "0.5"],
        141,
    ),
}
"""Heading of the page -> recipe, further words, GiB of a GPU."""


def planned(name: str, folder: Path, *more: str) -> str:
    from srpo.plan import plan

    recipe, words, gpu = PLANS[name]
    config = folder / "config.json"
    config.write_text(json.dumps(PUBLISHED[recipe.split("/")[0]]))
    return plan([recipe, *words, *more], 8, gpu, str(folder))


def command(name: str) -> str:
    recipe, words, gpu = PLANS[name]
    return " ".join(["srpo plan", recipe, "--processes 8", f"--gpu_gib {gpu:g}", *words])


def section(name: str, folder: Path) -> str:
    """The command, and the part of its answer that is about memory."""
    return f"### {name}\n\n```\n$ {command(name)}\n{planned(name, folder).split(chr(10) * 2)[1]}\n```\n"


def fits(text: str) -> set[tuple[str, str]]:
    """(GPUs, engine) whose peak is below a GPU's memory."""
    rows = (line.split() for line in text.split("\n\n")[1].splitlines())
    return {(row[0], row[1]) for row in rows if row[-1:] == ["yes"]}


@pytest.mark.parametrize("name", PLANS)
def test_the_page_says_what_the_plan_says(name: str, tmp_path: Path) -> None:
    found = section(name, tmp_path)
    assert found in PAGE.read_text(), f"renew it: python tests/recipes/test_plans.py\n{found}"
    text = planned(name, tmp_path)
    wanted = {"1.5B": ("1", "-"), "8B": ("8", "FSDP2"), "8B, LoRA": ("1", "-"), "30B-A3B": ("8", "FSDP2")}
    assert wanted.get(name, ("1", "-")) in fits(text)
    if "LoRA" not in name:
        assert ("32", "FSDP2") in fits(text)
    if name == "8B":
        assert ("1", "-") not in fits(text) and "training rows" in text
        assert "256 completions, at most 262,144 tokens written and 524,288 read" in text
        assert "32 prompts x 8 completions a step = 8 processes x 4 at a time x 8 micro-batches" in text
        assert "ema does not work with ZeRO-3" in text and "pool calls           none" in text
        assert "nothing is paid; asked live, the training would cost expected $" in text


def test_without_the_hub_the_plan_goes_on_with_what_is_known(tmp_path: Path) -> None:
    from srpo.plan import plan

    text = plan(["Qwen3-8B/srpo/routing", "--model_name_or_path", "nobody/has-this"])
    assert "\n\nmemory: not known: nobody/has-this is neither a folder of a policy nor in the Hub's cache" in text
    assert "say --model_config" in text and "an optimiser step" in text


def test_what_cannot_be_shared_out_and_what_does_not_hold_is_said(tmp_path: Path) -> None:
    text = planned("30B-A3B", tmp_path, "--prompts_per_step", "1", "--vllm_tensor_parallel_size", "1",
                   "--generation_batch_size", "1024", "--per_device_train_batch_size", "2")  # fmt: skip
    assert "16 completions cannot be shared by 32 processes: set prompts_per_step to a multiple of 2" in text
    assert "vLLM: its 35.2 GiB do not hold the 56.9 GiB of weights" in text
    # 1,024 rows x 3,072 tokens x 48 layers x 8 experts x 2 bytes.
    assert "replay table: 2.25 GiB" in text


if __name__ == "__main__":
    page, mark = PAGE.read_text(), "\n## What `srpo plan` says\n"
    with tempfile.TemporaryDirectory() as made:
        parts = [section(name, Path(made)) for name in PLANS]
    PAGE.write_text("\n".join([page.split(mark)[0] + mark, *parts]))
