"""What training mode adds to a forward pass: dropout and its kin, and how far two passes over one text then differ.

The policy trains in training mode. Teacher and vLLM compute without noise; the old policy, the reference of a PEFT
policy, recorded experts and TRL's own sampling with a mask of their own. Each is compared with the student's pass
token by token, so noise passes for a difference between policies. With one and the same context for teacher and
student the distillation gradient must be 0; with dropout it was 40 % of the real one at LoRA dropout 0.05, and 46 % at
attention dropout 0.1.
"""

from typing import Any

import torch
from torch import nn
from trl.models.utils import disable_gradient_checkpointing

NOTICEABLE = 1e-3  # nats
_ENDINGS = ("drop", "drop_path", "drop_prob", "drop_rate", "jitter", "jitter_noise", "jitter_eps")


def still(model: nn.Module) -> dict[str, float]:
    """Set every rate of dropout, layer dropout and router jitter in a model to 0; what each name was at most.

    Not its configuration, which is saved with it. Modules of `torch.nn`, attributes that a forward hands to functional
    dropout or to attention, and rates by adapter.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if not _is_rate(type(module).__name__, name):
                continue
            if isinstance(value, dict):
                rates = {key: rate for key, rate in value.items() if _positive(rate)}
                value.update(dict.fromkeys(rates, 0.0))
            elif _positive(value):
                rates = {"": value}
                setattr(module, name, 0.0)
            else:
                continue
            label = "dropout" if name == "p" else name
            for rate in rates.values():
                found[label] = max(found.get(label, 0.0), float(rate))
    return found


@torch.no_grad()
def pass_noise(model: nn.Module, base: Any, checkpointing_kwargs: Any = None) -> float:
    """Mean |difference| of the log-probs of two passes over the same tokens, in training and in evaluation mode, nats.

    Weighted by the probabilities. In a sharded engine all ranks call it. The run's random state is left alone.
    """
    device = next(base.parameters()).device
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    training, passes = model.training, []
    try:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            disable_gradient_checkpointing(base, checkpointing_kwargs),
        ):
            for mode in (True, False):
                model.train(mode)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                passes.append(logits.float().log_softmax(-1))
    finally:
        model.train(training)
    noisy, quiet = passes
    return float(((noisy - quiet).abs() * quiet.exp()).sum(-1).mean())


def _is_rate(owner: str, name: str) -> bool:
    return "dropout" in name or name.endswith(_ENDINGS) or (name == "p" and "Drop" in owner)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
