"""How much memory training takes, from the sizes of a model and of a micro-batch; nothing is loaded. Bytes.

What lies there all the time, of P weights of which T train, on N processes

    engine     weights       gradients   optimiser     besides
    plain      4 T + 2 (P-T) 4 T         8 T           DDP: 4 T of buckets; bf16: 2 of each matrix in a forward
    ZeRO-2     2 P           2 T / N     12 T / N      a bucket of 5e8 gradients
    ZeRO-3     2 P / N       2 T / N     12 T / N      gathered layers, 1e9 weights at most
    FSDP2      as plain, / N each                      two gathered blocks, embedding and head, in bf16

(arXiv:1910.02054, section 3, with K = 12 for Adam; srpo/trainer/precision.py for which weights are fp32.)

What one micro-batch leaves for its backward pass, of each position in each layer, counted from the forward of
transformers' pre-norm families (Llama, Qwen2, Qwen3 and their mixtures; the method is that of arXiv:2205.05198,
section 4). c: bytes that a matrix product computes in; x: bytes of an input kept for a gradient; h hidden, f width of
the MLP, q and k widths of queries and keys:

    norms      2 h (4 + 4)          input and normed; frozen weights: 2 h 4
               (q + k) (4 + c)      where heads are normed; frozen: (q + k) 4
    inputs     2 h x                5 h x where each product casts its own
    attention  (2 q + 2 k) c        4 q c with a mask: grouped heads are repeated
    MLP        3 f c + f x          of K experts: K (4 f + 2 h) x
    adapters   7 r x
    masks      c a key              for every query, in every layer

With gradient checkpointing only h 4 of each layer stays, and one layer at a time has all of the above, when the LM
head's work is over. With a shared prefix a group of G rows has P + G C positions instead of G (P + C), or several P
where one row of all would cost more (srpo.prefix cuts it here as in training).

The LM head (TRL's, and srpo.objectives.divergence) comes first in the backward pass, on all that the forward kept, and
is the peak of small models. It works on tiles: of 4,096 tokens x 32,768 ids, and of `CHUNK_BYTES`. On a GPU a tile is
one tensor, of the C positions that a row scores. Without Triton, on a CPU,

- rows that share no prefix send all P + C positions through the head (what is not scored is masked afterwards);
- the backward pass keeps 7 1/4 fp32 copies of a tile beside it;
- of a row of 32,768 numbers only the pages that the vocabulary reaches are ever touched, and so are memory.

Measured: `scripts/benchmark_memory.py --plan` compares this with peaks of a process on a CPU, above what Python and
its libraries take (0.6 GiB, not in here). There, freed memory goes back to the system at once
(MALLOC_MMAP_THRESHOLD_=65536). glibc's malloc as it is keeps and scatters it: the same trainings of a 1M policy took
20 % more, with gradient checkpointing 75 % more. No formula has that.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from srpo.objectives.divergence import CHUNK_BYTES, CHUNK_BYTES_GPU
from srpo.prefix.tree import Costs, Tree, costs_of

ENGINES = ("plain", "ddp", "zero2", "zero3", "fsdp2")
GIB = 2**30
_TILE_TOKENS, _TILE_IDS = 4096, 32768
_TILE_COPIES = 7.25
"""In the backward pass of TRL's head without Triton, beside the tile: seven fp32 tensors and one of bools."""
_PAGE = 4096
_BUCKET = 5e8
_GATHERED = 1e9


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    costs: Costs
    """By which rows that share a prefix are packed."""
    weights: int
    """All of them, experts that a token does not meet too."""
    matrices: int
    """Of `weights`, those of linear layers and experts; not the embedding, not the head."""
    block: int
    """Weights of the largest decoder layer."""
    hidden: int
    layers: int
    vocabulary: int
    queries: int
    """Heads x their size."""
    keys: int
    """Key heads x their size."""
    heads: int
    mlp: int
    """Width; of one expert where there are experts."""
    experts: int = 0
    """Of them a token goes through so many; 0: the MLP is dense."""
    routers: int = 0
    """Layers with experts."""
    normed_heads: bool = False
    tied: bool = False
    linear: int = 0
    """Sum over linear layers of inputs + outputs: an adapter of rank 1 has so many weights."""

    @property
    def head(self) -> int:
        """Weights of the LM head, and of the embedding."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class How:
    """What of a run decides about its memory."""

    engine: str = "plain"
    processes: int = 1
    rows: int = 8
    """Of a micro-batch."""
    group: int = 8
    prompt: int = 512
    completion: int = 256
    rollouts: int = 8
    """Rows of a batch of rollouts, of one process."""
    accumulates: bool = False
    """Several micro-batches make a step."""
    bf16: bool = True
    checkpointing: bool = True
    lora: int = 0
    low_base: bool = False
    """The frozen base of an adapter is in bf16."""
    shared: bool = False
    """Rows share their prompt."""
    padded: bool = True
    teacher: str | None = None
    """None: nothing is distilled."""
    teacher_prompt: int = 0
    teacher_states: bool = True
    """Its hidden states are kept, to be compared with; not where it scores the sampled token."""
    reference: bool = False
    generates: bool = False
    """With the policy itself; no vLLM."""
    device: str = "cuda"
    vllm: float = 0.0
    """Bytes that a colocated engine may take."""
    vllm_sleeps: bool = False
    replays: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part; `work` parts are there in turns."""

    weights: float
    gradients: float
    optimiser: float
    teacher: float
    reference: float
    engine: float
    """Buckets, gathered layers, weights that were cast."""
    kept: float
    """Hidden states of the teacher, for a batch of rollouts."""
    activations: float
    """Of a micro-batch at the start of its backward pass, with the LM head's work."""
    backward: float
    """Peak of forward and backward, gradients included."""
    scoring: float
    """Peak of a pass without gradient: the teacher's, or old log-probs."""
    generation: float
    vllm: float
    vllm_sleeps: bool
    replay_host: float
    """Not on the GPU: expert ids of a batch of rollouts."""

    @property
    def resting(self) -> float:
        """Between steps."""
        return self.weights + self.optimiser + self.teacher + self.reference + self.kept

    @property
    def total(self) -> float:
        """Peak of the process."""
        work = max(self.backward, self.scoring)
        if self.vllm_sleeps:
            return self.resting + max(work, self.generation, self.vllm)
        return self.resting + max(work, self.generation) + self.vllm


def trained(shape: Shape, lora: int) -> int:
    return lora * shape.linear if lora else shape.weights


def positions(shape: Shape, how: How, prompt: int, shared: bool) -> tuple[int, int, bool]:
    """Positions of a micro-batch, keys of all its queries together, and whether it needs a mask."""
    rows, width = how.rows, prompt + how.completion
    if shared:
        rows, width = _packed(rows, how.group, prompt, how.completion, shape.costs)
    return rows * width, rows * width**2, how.padded or shared


@functools.lru_cache(maxsize=64)
def _packed(rows: int, group: int, prompt: int, completion: int, costs: Costs) -> tuple[int, int]:
    """Packed rows and their width, as `srpo.prefix` cuts groups that begin alike and end as differently as may be."""
    number = torch.arange(rows).unsqueeze(1)
    ids = torch.cat([(number // group).expand(rows, prompt), rows + number.expand(rows, completion)], dim=1)
    tree = Tree(ids, torch.ones_like(ids))
    runs = tree.cut(functools.partial(costs.packed, gradient=True))
    return len(runs), tree.width(runs)


def of_layer(shape: Shape, how: How, masked: bool) -> float:
    """Bytes that one position leaves in one layer for the backward pass, without its mask."""
    h, f, q, k = shape.hidden, shape.mlp, shape.queries, shape.keys
    c = _compute(how)
    pure = _pure(how)  # the residual stream is bf16 too
    low_frozen = how.lora and c == 2
    x = c if not how.lora else 2 if how.bf16 else 4
    trains = 0 if how.lora else 1
    kept = 2 * h * (4 + trains * (2 if pure else 4)) + 8
    if shape.normed_heads:
        kept += (q + k) * (4 + trains * c)
    copies = 2 if (c == 4 or pure) and not low_frozen else 4 if shape.experts else 5
    kept += copies * h * x
    kept += (4 * q if masked else 2 * q + 2 * k) * c + 4 * shape.heads + (q * x if low_frozen else 0)
    if shape.experts:
        kept += shape.experts * (4 * f + 2 * h) * (2 if pure else 4)
    else:
        kept += 3 * f * c + f * x
    return kept + (7 * how.lora * x if how.lora else 0)


def kept_by_forward(shape: Shape, how: How) -> float:
    """Bytes that the decoder's forward of a micro-batch keeps for the backward pass."""
    count, _, _ = positions(shape, how, how.prompt, how.shared)
    stream = count * shape.hidden * (2 if _pure(how) else 4)
    layer = stream if how.checkpointing else _kept_by_layer(shape, how)
    return layer * shape.layers + 2 * count * shape.hidden * 4  # input of the last norm, and normed


def _kept_by_layer(shape: Shape, how: How) -> float:
    """The same of one layer, without checkpointing."""
    count, keys, masked = positions(shape, how, how.prompt, how.shared)
    return count * of_layer(shape, how, masked) + (keys * _compute(how) if masked else 0)


def plan_memory(shape: Shape, how: How) -> Memory:
    """Of one process of a run.

    Raises:
        ValueError: an engine that cannot do it, in one sentence.
    """
    if how.engine not in ENGINES:
        raise ValueError(f"engine {how.engine!r} is none of {', '.join(ENGINES)}")
    weights, gradients, optimiser, engine = _resting(shape, how)
    count, _, _ = positions(shape, how, how.prompt, how.shared)
    c, h = _compute(how), shape.hidden
    saved = kept_by_forward(shape, how)
    head, head_gradient = _head(shape, how, count)
    again = _kept_by_layer(shape, how) if how.checkpointing else 0.0
    activations = saved + max(head, again + count * (2 * shape.mlp * max(shape.experts, 1) * c + 2 * h * 4))
    here = gradients if how.accumulates else 0.0
    ends = gradients + (shape.head * 4 if shape.tied and not how.lora else 0)
    backward = engine + max(here + activations + head_gradient, ends)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=optimiser,
        teacher=_copy(shape, how, how.teacher, "teacher"),
        reference=_copy(shape, how, "frozen" if how.reference else None, "reference"),
        engine=engine,
        kept=how.rollouts * how.completion * h * 4.0 if how.teacher and how.teacher_states else 0.0,
        activations=activations,
        backward=backward,
        scoring=engine + _scoring(shape, how),
        generation=_generation(shape, how) if how.generates else 0.0,
        vllm=how.vllm,
        vllm_sleeps=how.vllm_sleeps,
        replay_host=how.rollouts * (how.prompt + how.completion) * shape.routers * shape.experts * 2.0
        if how.replays
        else 0.0,
    )


def _compute(how: How) -> int:
    """Bytes that a matrix product computes in."""
    return 2 if how.bf16 or (how.lora and how.low_base) else 4


def _pure(how: How) -> bool:
    """Whether weights reach their layers in bf16, and nothing is cast on the way."""
    return how.bf16 and how.engine in ("zero2", "zero3", "fsdp2")


def _resting(shape: Shape, how: How) -> tuple[float, float, float, float]:
    """Weights, gradients, optimiser, and what the engine adds."""
    p, t, n = shape.weights, trained(shape, how.lora), how.processes
    frozen = p if how.lora else 0
    base = 2 if how.low_base or how.bf16 else 4
    cast = 2 * shape.matrices if how.bf16 and not how.lora else 0
    if how.engine in ("plain", "ddp") or (how.engine == "fsdp2" and n == 1):
        buckets = 4 * t if how.engine == "ddp" and n > 1 else 0
        return 4 * t + base * frozen, 4 * t, 8 * t, buckets + cast
    if how.engine == "zero2":
        return 2 * t + 2 * frozen, 2 * t / n, 12 * t / n, 2 * min(_BUCKET, t)
    if how.engine == "zero3":
        return (2 * t + 2 * frozen) / n, 2 * t / n, 12 * t / n, 2 * min(_GATHERED, p) + 2 * min(_BUCKET, t)
    gathered = 2 * (2 * shape.block + shape.head * (1 if shape.tied else 2))
    return (4 * t + base * frozen) / n, 4 * t / n, 8 * t / n, gathered


def _copy(shape: Shape, how: How, kind: str | None, what: str) -> float:
    """A second model of this kind of teacher, or the values of an adapter."""
    if kind in (None, "live"):
        return 0.0
    if how.lora:
        return 4.0 * trained(shape, how.lora) if what == "teacher" else 0.0
    if how.engine == "zero3" and kind == "ema" and how.bf16:
        raise ValueError("teacher_model_kind: ema does not work with ZeRO-3, which would round it")
    low = how.engine in ("zero2", "zero3") and kind != "ema" and how.bf16
    shared_out = how.engine == "fsdp2" or (how.engine == "zero3")
    return shape.weights * (2.0 if low else 4.0) / (how.processes if shared_out else 1)


def _head(shape: Shape, how: How, count: float) -> tuple[float, float]:
    """Work of the LM head in its backward pass; gradients of its weight beyond `gradients`."""
    scored, read = min(how.rows * how.completion, count), _read(how, count)
    work = _tile(shape, how, count, _TILE_COPIES) + 2 * read * shape.hidden * 4  # the states it reads, their gradient
    passes = 1
    if how.teacher and how.teacher_states:
        passes, chunk = 2, scored * 3 * shape.vocabulary * 4
        work = max(work, min(CHUNK_BYTES if how.device == "cpu" else CHUNK_BYTES_GPU, chunk))
        work += count * shape.hidden * 4  # the divergence's gradient, spread over all positions
    return work, 0.0 if how.lora else passes * shape.head * 4.0


def _read(how: How, count: float) -> float:
    """Positions of a micro-batch that the LM head computes."""
    return count if how.device == "cpu" and not how.shared else min(how.rows * how.completion, count)


def _tile(shape: Shape, how: How, count: float, copies: float) -> float:
    """A tile of the LM head and, on a CPU, fp32 copies of it."""
    tokens, c = min(_read(how, count), _TILE_TOKENS), _compute(how)
    if how.device != "cpu":
        return tokens * _TILE_IDS * c
    ids = min(shape.vocabulary, _TILE_IDS)
    return tokens * (math.ceil(ids * c / _PAGE) * _PAGE + copies * ids * 4)


def _scoring(shape: Shape, how: How) -> float:
    """A pass without gradient: one layer's work and its mask, then the forward of the LM head."""
    prompt = max(how.prompt, how.teacher_prompt)
    asked = replace(how, prompt=prompt)
    count, keys, masked = positions(shape, asked, prompt, how.shared and prompt == how.prompt)
    c = _compute(how)
    layer = count * (3 * shape.hidden * 4 + 3 * shape.mlp * max(shape.experts, 1) * c) + (keys * c if masked else 0)
    return max(layer, 2 * count * shape.hidden * 4 + _tile(shape, how, count, 3))


def _generation(shape: Shape, how: How) -> float:
    """Keys and values of all rows of a batch of rollouts, twice while rows leave it, and logits of a token."""
    c = 2 if how.low_base or how.bf16 else 4
    cache = how.rollouts * (how.prompt + how.completion) * 2 * shape.keys * shape.layers * c
    return 2.0 * cache + 3.0 * how.rollouts * shape.vocabulary * 4


def shape_of(config: Any) -> Shape:
    """Of a configuration of transformers; the model is made without memory for its weights.

    Raises:
        ValueError: not of a causal language model.
    """
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    text = config.get_text_config()
    named = dict(model.named_parameters())  # a tied one once
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    ends = {id(embedding), *([] if head is None else [id(head.weight)])}
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in ends and m is not head]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    chosen = _first(text, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")
    routers = sum(any(".experts" in f".{name}" for name, _ in layer.named_modules()) for layer in layers)
    expert = _first(text, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_dim")
    dense = _first(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * text.hidden_size
    return Shape(
        costs=costs_of(model),
        weights=sum(p.numel() for p in named.values()),
        matrices=sum(p.numel() for p in named.values() if p.ndim > 1 and id(p) not in ends),
        block=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        queries=text.num_attention_heads * size,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * size,
        heads=text.num_attention_heads,
        mlp=expert if routers else dense,
        experts=chosen if routers else 0,
        routers=routers,
        normed_heads=any("q_norm" in name for name in named),
        tied=head is not None and head.weight is embedding,
        linear=sum(m.in_features + m.out_features for m in linear),
    )


def _first(text: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)
