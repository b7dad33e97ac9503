"""PEFT policies: what TRL and PEFT leave open before one can be trained, and that its files hold the policy only."""

from __future__ import annotations

import types
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper


def prepare_adapter(model: PeftModel, accelerator: Accelerator) -> None:
    """Call once, after TRL's trainer was constructed.

    Raises:
        ValueError: more than one adapter is active, or an engine that cannot train what the adapter trains.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"the policy has {len(active)} active adapters ({', '.join(active)}): train one, and make it of several "
            "with add_weighted_adapter"
        )
    plugin = accelerator.state.deepspeed_plugin
    sharded = accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3)
    tokens = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    if tokens and sharded:
        raise ValueError(
            "trainable_token_indices do not work where weights are sharded (FSDP, ZeRO-3): use ZeRO-2 or DDP, or "
            "modules_to_save with the embeddings"
        )
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    copied = any(isinstance(module, ModulesToSaveWrapper) for module in ends)
    if sharded and copied and getattr(base.config, "tie_word_embeddings", False):
        raise ValueError(
            "modules_to_save with a head that is the embeddings too (tie_word_embeddings) does not work where weights "
            "are sharded (FSDP, ZeRO-3): use ZeRO-2 or DDP"
        )
    for wrapper in tokens:
        # TRL's fused head and ours read the head's bias, which PEFT's wrapper of a tied head does not pass on.
        if not hasattr(wrapper, "bias"):
            bias = getattr(wrapper.original_module, "bias", None)
            if bias is not None:
                raise ValueError("trainable_token_indices do not work with an LM head that has a bias")
            wrapper.bias = None
    _save_policy_only(model, active[0])


def _save_policy_only(model: PeftModel, policy: str) -> None:
    """From now on `save_pretrained` (and `push_to_hub`) writes the policy's adapter, where other tools look for it.

    By itself PEFT also writes TRL's copy for the KL term, and every adapter that is not named "default" into a folder
    of its own.
    """

    # A method, not a closure: a deep copy of the model saves the copy.
    def save_pretrained(self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 or kwargs.get("selected_adapters") is not None:  # the caller knows what it wants
            type(self).save_pretrained(self, save_directory, *args, **kwargs)
            return
        type(self).save_pretrained(self, save_directory, *args, **{**kwargs, "selected_adapters": [policy]})
        own = Path(save_directory) / policy
        if policy == "default" or not own.is_dir() or not kwargs.get("is_main_process", True):
            return
        for path in own.iterdir():
            path.replace(own.parent / path.name)
        with suppress(OSError):  # another process may just be making it
            own.rmdir()

    model.save_pretrained = types.MethodType(save_pretrained, model)
