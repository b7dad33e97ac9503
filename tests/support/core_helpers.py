"""Real trainers on a model of a few thousand parameters, with completions that are a function of prompt and member.

`scripted` replaces sampling: the same prompt and the same place in its group give the same tokens in every run,
however the batch is cut over micro-batches and ranks. Rewards are a function of those tokens. So runs can be compared.
"""

import hashlib
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback
from trl.trainer import grpo_trainer

from srpo.config import SRPOConfig
from srpo.rollout.turns import State
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.micro_batches import micro_batches
from srpo.trainer.sampler import Sampler
from srpo.trainer.trainer import SRPOTrainer

WORDS = ("red", "green", "blue", "one", "two", "cat", "dog", "sun")
TEXTS = [f"say {a} and {b}" for a in WORDS for b in WORDS]
LENGTH = 8


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=290)


def model(seed: int = 0, layers: int = 1, hidden: int = 32, scale: float = 6.0) -> Any:
    """A fresh network; `scale` makes its distributions peaked, so that divergences and entropies vary."""
    network = tiny_causal_lm(tokenizer(), hidden=hidden, layers=layers, heads=2, intermediate=2 * hidden, seed=seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return network


def dataset(rows: int = 16) -> Dataset:
    chosen = TEXTS[:: max(len(TEXTS) // rows, 1)][:rows]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}], "query_id": f"q{i}"} for i, text in enumerate(chosen)]
    )


def config(folder: Path | str, **changes: Any) -> SRPOConfig:
    """Plain SGD and nothing clipped: what a step moves is the gradient."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": LENGTH,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "distillation_topk": 20,
    }
    return SRPOConfig(**{**settings, **changes})


def script(text: str, member: int, length: int = LENGTH) -> list[int]:
    """Ragged token ids; about one in five is truncated (no end token)."""
    letters = tokenizer()("abcdefgh0123", add_special_tokens=False)["input_ids"]
    draw = random.Random(f"{text}:{member}")
    if draw.random() < 0.2:
        return draw.choices(letters, k=length)
    return [*draw.choices(letters, k=draw.randint(0, length - 2)), tokenizer().eos_token_id]


def scripted(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A `rollout_func` whose completions depend on (prompt, place in the group) only."""
    start = trainer.accelerator.process_index * len(prompts)
    members = [(start + i) % trainer.num_generations for i in range(len(prompts))]
    return {
        "prompt_ids": trainer._tokenize_prompts(prompts)[0],
        "completion_ids": [script(p[-1]["content"], m) for p, m in zip(prompts, members, strict=True)],
        "logprobs": None,
    }


def binary_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for about one completion in three, by its tokens."""
    return [float(digest(ids) % 3 == 0) for ids in completion_ids]


def digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big")


def trainer(
    args: SRPOConfig, network: Any = None, rewards: Any = binary_reward, cls: Any = SRPOTrainer, **kwargs: Any
) -> Any:
    """A trainer with scripted rollouts unless `rollout_func` says otherwise."""
    kwargs.setdefault("rollout_func", scripted)
    kwargs.setdefault("train_dataset", dataset())
    kwargs.setdefault("processing_class", tokenizer())
    made = cls(
        model=model() if network is None else network,
        reward_funcs=rewards,
        args=args,
        **kwargs,
    )
    made.remove_callback(PrinterCallback)
    return made


class TRLInOurOrder(trl.GRPOTrainer):
    """TRL's trainer on our micro-batches, for comparisons bit for bit: a sum has equal bits in one order only.

    That these are TRL's own rows and make the step of its own micro-batches is shown in test_micro_batches.py.
    """

    def _prepare_inputs(self, generation_batch):
        def split(batch, parts):
            assert parts == self.args.steps_per_generation
            return micro_batches(batch, self.args, self.accelerator, router_loss=self.aux_loss_enabled, shared=True)

        with (
            patch.object(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch),
            patch.object(grpo_trainer, "split_tensor_dict", split),
        ):
            return super()._prepare_inputs(generation_batch)


def by_prefix(after: Any, ids: tuple[int, ...] = ()) -> State:
    """The automaton of a function of the ids so far, which says those that may follow."""

    class Next(dict[int, State]):
        def __missing__(self, i: int) -> State:
            return by_prefix(after, (*ids, i))

    return State(after(ids), Next())


def our_samples(made: Any) -> Any:
    """TRL's own trainer with completions of our generator, by our seeds: what differs then is not the sampling."""
    args = SimpleNamespace(**vars(made.args), stop_strings=())
    sampler = Sampler(args, made.accelerator, made.processing_class)

    def single_turn(prompt_ids: Any, *_: Any, **__: Any) -> Any:
        part = made._step % args.gradient_accumulation_steps
        step = GenerationStep((), made.model.training, made.state.global_step, part)
        with sampler.policy(made.model_wrapped, made._dist, made.eos_token_ids, keep_tokens=None) as generator:
            return [list(sample.ids) for sample in sampler.completions(generator, step, prompt_ids)], None

    made._generate_single_turn = single_turn
    return made


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a - b| over all tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]
