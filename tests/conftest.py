"""Settings that must stand before torch or transformers are imported, and the tiny model that tests share."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads sleep: many small processes, few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("HF_TOKEN", None)  # nothing here may act in somebody's name

import importlib.util
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from srpo.garbage import set_imports_aside

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tool = shutil.which("nvidia-smi")
    gpu = tool is not None and subprocess.run([tool], capture_output=True).returncode == 0
    vllm = importlib.util.find_spec("vllm") is not None  # importing it takes longer than most tests
    for item in items:
        if not gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if not vllm and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed; bash scripts/setup.sh --vllm does it"))


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Every training collects garbage at its end, and to look through all that the imports made takes longer than a
    tiny training: what is there before a module's tests is set aside."""
    set_imports_aside()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3-type model and its tokenizer, as `from_pretrained` reads it."""
    from helpers import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> Any:
    """A fresh copy of the tiny model, fp32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """The tiny model's tokenizer; shared, so do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)
