"""The policy's weights on their way to vLLM: by names that it knows, all of them, into tensors that it computes with.

TRL streams the trainer's parameters and takes no notice of what the engine did with them. A parameter that the engine
does not know, or that its kernels hold a packed copy of, would leave it sampling from older weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

# Names in a model's configuration that only a mixture of experts has.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


def watch_weights(generation: Any) -> None:
    """Each sync of this `VLLMGeneration` sends the policy's own weights only, and all of them must be taken.

    Raises:
        ValueError: an adapter trains one of two tensors that vLLM keeps as one; at a sync: a colocated engine has
            ignored a parameter.
    """
    _refuse_half_a_tie(generation.model)
    send = generation._iter_named_params
    generation._iter_named_params = lambda: _of_the_policy(send())
    if generation.mode != "colocate":
        return
    engine = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    load = engine.load_weights

    def loading(weights: Iterable[tuple[str, Tensor]]) -> Any:
        weights = list(weights)
        taken = load(iter(weights))
        if taken is not None and not taken:
            names = ", ".join(name for name, _ in weights)
            raise ValueError(
                f"use_vllm: vLLM has ignored the policy's {names} and would sample from an older one; it knows this "
                "architecture by other names than transformers. Set use_vllm: false"
            )
        return taken

    engine.load_weights = loading


def _refuse_half_a_tie(model: Any) -> None:
    if not is_peft_model(model) or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if any(p.requires_grad for end in ends for p in end.parameters()):
        raise ValueError(
            "use_vllm: the adapter trains the embedding or the head of a model that ties them (tie_word_embeddings), "
            "and vLLM keeps them as one; leave them out of modules_to_save, trainable_token_indices and "
            "target_modules, or set use_vllm: false"
        )


def _of_the_policy(parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What TRL sends, less what PEFT keeps beside the merged weights: other adapters' copies and tokens' rows."""
    for name, parameter in parameters:
        if ".modules_to_save." in name or ".trainable_tokens_" in name:
            continue
        yield name.replace(".token_adapter.", "."), parameter


@contextmanager
def weights_that_can_be_replaced(model: Any) -> Iterator[None]:
    """An engine for the CPU that is built inside computes with the tensors that `load_weights` writes.

    vLLM's CPU kernels pack the weights after loading; new ones would go to tensors that nothing reads, or that are
    gone. Linear layers are left unpacked here. Experts cannot be.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        raise ValueError(
            f"use_vllm: vLLM on a CPU packs the experts of a {config.model_type} model and cannot take new weights "
            "for them; set use_vllm: false, or train on a GPU"
        )
    packing = utils.dispatch_cpu_unquantized_gemm

    def unpacked(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            packing(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = unpacked
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing
