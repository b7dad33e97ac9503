"""What the benchmarks share: models, prompts of a given length, clocks, and what sharing a prompt can give at most.

A model made from nothing ends its completions on purpose: rows that end by themselves can be demonstrations and be
distilled, those that are cut off cannot.
"""

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from srpo.scratch_lm import train_tokenizer

Ids = list[int]
MODELS = ("tiny", "moe", "0.5b", "small_moe", "smollm2")
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024},
    "moe": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "moe_intermediate_size": 128},
    "0.5b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "small_moe": {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "moe_intermediate_size": 512},
}
_MIXTURES = {"moe": (16, 4), "small_moe": (32, 4)}
"""Experts of a layer, and how many of them a token goes through."""


def words(seed: int) -> list[str]:
    """Words as routing queries have them, drawn by frequency of a few syllables; the same for the same seed."""
    drawn = random.Random(seed)
    parts = ("ka", "to", "mi", "ren", "sol", "va", "per", "lin", "du", "os", "ter", "mon", "qui", "ba", "fe", "gra")
    return ["".join(drawn.choices(parts, k=drawn.randint(1, 3))) for _ in range(2000)]


def make_model(name: str, folder: str, ends_after: int, dtype: torch.dtype = torch.float32) -> str:
    """Folder of a model and its tokenizer, which `from_pretrained` reads.

    Args:
        name: one of `MODELS`, made with random weights but for smollm2; or a folder, which is returned as it is.
        ends_after: tokens after which a model from nothing ends a completion, in the mean.

    Raises:
        ValueError: neither a name nor a folder.
    """
    if Path(name).is_dir():
        return name
    if name not in MODELS:
        raise ValueError(f"{name!r} is no model; use one of {', '.join(MODELS)}, or the folder of one")
    place = Path(folder, name)
    if name == "smollm2":
        from routers.quickstart.smollm2 import smollm2

        place.mkdir()
        smollm2.convert(place, dtype)
        return str(place)
    tokenizer = train_tokenizer([" ".join(words(seed)) for seed in range(3)], vocab_size=4096)
    shape = {"head_dim": 64, **_SHAPES[name]}
    shape |= {"num_key_value_heads": shape["num_attention_heads"] // 2, "max_position_embeddings": 32768}
    shape |= {"vocab_size": 4096 if shape["hidden_size"] < 512 else 65536, "tie_word_embeddings": False}
    shape |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.06}
    torch.manual_seed(0)
    model: Any
    if name in _MIXTURES:
        experts, used = _MIXTURES[name]
        shape |= {"num_experts": experts, "num_experts_per_tok": used, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(intermediate_size=shape["moe_intermediate_size"], **shape))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    end_sometimes(model, len(tokenizer), tokenizer.eos_token_id, ends_after)
    model.to(dtype).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@torch.no_grad()
def end_sometimes(model: Any, real: int, end: int, after: int) -> None:
    """Give the end a probability of 1 / ``after`` at every token: nothing writes to the first number of the residual
    stream, which is the same for all tokens, and of the head only the end's row reads it. Ids of no text get none."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            weight[..., 0, :] = 0
    table[:, 0] = 1
    head[:, 0] = 0
    head[end], head[end, 0] = 0, 1
    logits = model(torch.randint(0, real, (4, 64))).logits
    reached = logits[..., end].mean()
    logits[..., end] = -math.inf
    head[real:] = 0
    head[real:, 0] = -20 / reached
    others = logits[..., :real].logsumexp(-1).mean()
    head[end, 0] = (others - math.log(after - 1)) / reached


def make_prompts(tokenizer: Any, count: int, tokens: int, common: int = 0) -> Dataset:
    """Questions of about ``tokens`` tokens with their chat template, that begin with the same ``common`` tokens."""
    rows = []
    for index in range(count):
        text = ""
        for source, end in ((words(99), common), (words(100 + index), tokens)):
            pieces = iter(source * 20)
            while _length(tokenizer, text) < end:
                missing = end - _length(tokenizer, text)
                text += "".join(f" {next(pieces)}" for _ in range(max(1, missing // 4)))
        rows.append({"prompt": [{"role": "user", "content": text}], "privileged_context": ""})
    return Dataset.from_list(rows)


def _length(tokenizer: Any, text: str) -> int:
    message = [{"role": "user", "content": text}]
    return len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))


def prefix_tokens(rows: Sequence[Ids]) -> int:
    """Tokens of which each different beginning counts once: what a computation that shares them all has to do."""
    total, before = 0, []
    for row in sorted(rows):
        shared = next((i for i, (a, b) in enumerate(zip(row, before, strict=False)) if a != b), None)
        total += len(row) - (min(len(row), len(before)) if shared is None else shared)
        before = row
    return total


def token_limit(prompts: Sequence[Ids], completions: Sequence[Ids]) -> float:
    """How many times fewer tokens a batch has when everything that rows begin with alike is computed once."""
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    # Completions part at their first token; that two may begin alike is luck, and nothing a layout is made for.
    heads = [[*p, -1 - i] for i, p in enumerate(prompts)]
    return sum(map(len, rows)) / (prefix_tokens(heads) + sum(len(c) - 1 for c in completions))


class Watch:
    """Seconds of parts of a run: of the process's CPUs, or of the wall with the device awaited."""

    def __init__(self, device: str, wall: bool) -> None:
        self.wall, self.device = wall or device == "cuda", device
        self.parts: dict[str, list[float]] = {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.wall else time.process_time()

    def wrap(self, owner: Any, method: str, part: str, seen: Callable[[Any], None] = lambda _: None) -> None:
        """Time every call of a method of an object; ``seen`` is told what it returns."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = plain(*args, **kwargs)
            self.parts.setdefault(part, []).append(self.now() - start)
            seen(result)
            return result

        setattr(owner, method, timed)


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured; for a table's caption or JSON."""
    import transformers
    import trl

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"trl": trl.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    if device == "cuda":
        _, total = torch.cuda.mem_get_info()
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_gib": round(total / 2**30, 1), "cuda": torch.version.cuda}
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def load_tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder, padding_side="left")
