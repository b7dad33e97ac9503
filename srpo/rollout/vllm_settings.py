"""How TRL's vLLM engine is built: as the recipe says, and not by vLLM's defaults.

TRL builds a colocated engine without saying a number format or the run's seed. So it would sample fp32 policies in
half precision, from the same random numbers in every run, without a word.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model

from srpo.rollout.vllm_weights import watch_weights, weights_that_can_be_replaced
from srpo.run.watch import part


def check_context(args: Any) -> None:
    """ValueError where vLLM's context is too short for any prompt."""
    limit = args.vllm_max_model_length
    if limit is not None and limit <= args.max_completion_length:
        raise ValueError(
            f"vllm_max_model_length={limit} leaves no room for a prompt beside max_completion_length="
            f"{args.max_completion_length}; set it to the longest prompt plus max_completion_length, or more"
        )


@contextmanager
def engine_built_with(
    options: Callable[[dict[str, Any]], dict[str, Any]],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """The engine that TRL builds inside gets these options over TRL's own.

    Args:
        options: called with TRL's keyword arguments when the engine is built.
        around: what the engine is built in.
    """
    from trl.generation import vllm_generation  # imports vLLM where it is installed: not for a configuration

    engine = getattr(vllm_generation, "LLM", None)
    if engine is None:  # vLLM is not installed, which TRL reports better
        yield
        return

    def build(**given: Any) -> Any:
        with around():
            return engine(**{**given, **options(given)})

    vllm_generation.LLM = build
    try:
        yield
    finally:
        vllm_generation.LLM = engine


def engine_options(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The number format of the policy's own forward, and a seed that is the run's.

    Left alone, vLLM loads fp32 weights in half precision, and TRL numbers the engines' seeds from 0 in every run.
    """
    if not given["model"]:
        raise ValueError(
            "use_vllm: vLLM reads the policy from a folder, and this model was given as an object that no folder "
            "belongs to; save it with its tokenizer and give the path (or set model.config.name_or_path)"
        )
    args, model = trainer.args, trainer.model
    own = model.dtype if is_peft_model(model) else torch.float32  # trainer/precision.py: whole policies train in fp32
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else own
    return {"dtype": str(dtype).removeprefix("torch."), "seed": args.seed + given["seed"]}


@contextmanager
def vllm_of(trainer: Any, args: Any) -> Iterator[None]:
    """Around the constructor of TRL's trainer: its engine is the recipe's, or the recipe is refused."""
    if not args.use_vllm:
        yield
        return
    from trl.import_utils import is_vllm_available  # where it is not, TRL says so

    from srpo.rollout.vllm_waits import bound_answers, wait_for_server  # need packages of the extra `vllm`

    check_context(args)
    asks = args.vllm_mode == "server" and PartialState().is_main_process  # no other process asks the server
    if asks and is_vllm_available():
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        with part("vllm", patient=True):
            wait_for_server(url, args.vllm_server_timeout)
    with engine_built_with(partial(engine_options, trainer), lambda: weights_that_can_be_replaced(trainer.model)):
        yield
    if asks:
        bound_answers(trainer.vllm_generation.vllm_client.session, args.hang_deadline)
    watch_weights(trainer.vllm_generation)


def context_limit(generation: Any) -> int | None:
    """Tokens of prompt and completion that a colocated engine takes; None where a server refuses longer ones itself.

    A colocated engine would cut a completion there in silence.
    """
    engine = getattr(generation, "llm", None)
    return None if engine is None else engine.llm_engine.model_config.max_model_len
