"""What only a GPU can say of the shared prefix, in at most eight minutes on one: exact enough, and how much faster.

    python scripts/benchmark_gpu.py --out gpu.json            # on one GPU
    python scripts/benchmark_gpu.py --small --out small.json  # the same on a CPU, with tiny models, in two minutes

    exactness    log-probs and gradients in bf16, shared and plain, beside what bf16 does by itself: the same rows
                 plain, in another order and with more padding; and both against fp32
    steps        training steps beside TRL's, as `benchmark_step.py`
    rollouts     sampling beside TRL's with transformers, no vLLM, as `benchmark_rollout.py`
    attention    one layer's attention over a packed group, forward and backward: SDPA with a mask, FlexAttention with
                 a block mask, and the rows unshared as SDPA's causal kernel takes them

A part that fails is an entry with its error, a part for which no time is left one that says so; the JSON is written
after every part. Exit status 1 if a part failed or shared log-probs are further from fp32 than plain ones by half.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmark_rollout
import benchmark_step
import torch
from benchmark_common import load_tokenizer, machine, make_model, make_prompts, median
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from srpo import SRPOConfig, SRPOTrainer
from srpo.prefix.tree import Layout, Tree
from srpo.ranges import at_least, ranged

WORST = 1.5
"""Mean error of shared log-probs against fp32, over that of plain ones."""


def batch_of(tokenizer: Any, groups: int, group: int, prompt: int, completion: int, device: str) -> dict[str, Tensor]:
    """Groups of rows, prompts padded at the left and completions of random lengths at the right, all int64."""
    drawn = torch.Generator().manual_seed(0)
    pad, real = tokenizer.pad_token_id, len(tokenizer)
    ids = torch.full((groups * group, prompt + completion), pad)
    mask = torch.zeros_like(ids)
    for g in range(groups):
        length = prompt - 3 * g
        start = torch.randint(3, real, (length,), generator=drawn)
        for row in range(g * group, (g + 1) * group):
            end = prompt + int(torch.randint(completion // 2, completion + 1, (), generator=drawn))
            ids[row, prompt - length : prompt] = start
            ids[row, prompt:end] = torch.randint(3, real, (end - prompt,), generator=drawn)
            mask[row, prompt - length : end] = 1
    return {"ids": ids.to(device), "mask": mask.to(device), "width": torch.tensor(completion)}


def trainer_of(folder: str, output: str, shared: str, device: str) -> Any:
    """A trainer of ours whose passes share or do not."""
    config = SRPOConfig(
        output_dir=output,
        use_cpu=device == "cpu",
        bf16=False,  # autocast is set around the passes, so that fp32 can be had too
        num_generations=2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        shared_prefix=shared,
    )
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    data = make_prompts(tokenizer, 2, 16)
    return SRPOTrainer(model, benchmark_rollout.no_reward, config, data, processing_class=tokenizer)


def passed(trainer: Any, batch: dict[str, Tensor], bf16: bool) -> tuple[Tensor, Tensor]:
    """Log-probs [tokens] of the trained tokens, and the gradient of their mean as one vector on the CPU."""
    device, width = batch["ids"].device, int(batch["width"])
    trainer.model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, batch["ids"], batch["mask"], width)[0]
    kept = logps[batch["mask"][:, -width:].bool()].float()
    kept.mean().backward()
    found = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trainer.model.parameters()]
    return kept.detach().cpu(), torch.cat(found).float().cpu()


def reordered(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows turned round, with eight columns of padding more; and the order that puts trained tokens back."""
    width = int(batch["width"])
    order = torch.arange(len(batch["ids"]) - 1, -1, -1, device=batch["ids"].device)
    wider = {name: torch.nn.functional.pad(batch[name][order], (8, 0)) for name in ("ids", "mask")}
    kept = batch["mask"][:, -width:].bool()
    places = torch.full(kept.shape, -1, device=kept.device)
    places[kept] = torch.arange(int(kept.sum()), device=kept.device)
    return {**wider, "width": batch["width"]}, places[order][kept[order]].argsort().cpu()


def apart(a: Tensor, b: Tensor) -> dict[str, float]:
    """Of absolute differences, in nats."""
    found = (a - b).abs()
    return {"mean": found.mean().item(), "p99": found.quantile(0.99).item(), "max": found.max().item()}


def exactness(folder: str, output: str, device: str, shape: Sequence[int]) -> dict[str, Any]:
    """Shared beside plain, beside noise, beside fp32. ``shape``: groups, rows of a group, P, C."""
    batch = batch_of(load_tokenizer(folder), *shape, device)
    plain = trainer_of(folder, output, "off", device)
    (exact, exact_g), (off, off_g) = passed(plain, batch, bf16=False), passed(plain, batch, bf16=True)
    other, back = reordered(batch)
    noisy, noisy_g = passed(plain, other, bf16=True)
    del plain  # a GPU need not hold both
    shared = trainer_of(folder, output, "on", device)
    on, on_g = passed(shared, batch, bf16=True)
    on_exact, _ = passed(shared, batch, bf16=False)
    if torch.equal(on, off) and torch.equal(on_exact, exact):
        raise RuntimeError("nothing was shared: every log-prob is the plain one, bit for bit")

    def angle(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    errors = {"shared against fp32": apart(on, exact), "plain against fp32": apart(off, exact)}
    ratio = errors["shared against fp32"]["mean"] / max(errors["plain against fp32"]["mean"], 1e-12)
    return {
        "shape": list(shape),
        "log-probs, nats": {
            "shared against plain": apart(on, off),
            "plain against plain in another order": apart(noisy[back], off),
            **errors,
            "shared against plain, both fp32": apart(on_exact, exact),
        },
        "gradient, relative": {
            "shared against plain": angle(on_g, off_g),
            "plain against plain in another order": angle(noisy_g, off_g),
            "shared against fp32": angle(on_g, exact_g),
            "plain against fp32": angle(off_g, exact_g),
        },
        "error over plain's": ratio,
        "exact enough": ratio <= WORST,
    }


def timed(work: Callable[[], Any], device: str, rounds: int) -> float:
    """Median milliseconds."""
    found = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1000)
    return median(found[2:])


def attention(device: str, heads: int, size: int, shape: Sequence[int], rounds: int) -> dict[str, Any]:
    """One layer's attention over groups of rows; ``shape`` as in `exactness`."""
    groups, group, prompt, completion = shape
    rows = torch.arange(groups).repeat_interleave(group)[:, None] * 10**6 + torch.arange(prompt)[None]
    ends = 10**9 + torch.arange(groups * group * completion).view(-1, completion)
    ids = torch.cat([rows, ends], dim=1)
    tree = Tree(ids, torch.ones_like(ids))
    layout: Layout = tree.lay_out([range(g * group, (g + 1) * group) for g in range(groups)])
    last, seen = layout.last.to(device), layout.sees().to(device)
    width = layout.ids.size(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def inputs(rows: int, columns: int) -> list[Tensor]:
        drawn = torch.Generator().manual_seed(1)
        shaped = [torch.randn(rows, heads, columns, size, generator=drawn) for _ in range(3)]
        return [x.to(device, dtype).requires_grad_(device == "cuda") for x in shaped]

    def whole(kernel: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], None]:
        def work() -> None:
            out = kernel(*given)
            if out.requires_grad:
                out.sum().backward()

        return work

    def sees(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q <= last[b, k])

    packed, plain = inputs(groups, width), inputs(groups * group, prompt + completion)
    blocks = create_block_mask(sees, groups, None, width, width, device=device)
    flex = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    kernels: dict[str, Callable[..., Tensor]] = {
        "SDPA, mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=seen),
        "FlexAttention, block mask": lambda q, k, v: flex(q, k, v, block_mask=blocks),
    }
    milliseconds = {name: timed(whole(kernel, packed), device, rounds) for name, kernel in kernels.items()}
    causal = whole(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), plain)
    with torch.no_grad():
        masked, flexed = (kernel(*packed).float() for kernel in kernels.values())
    return {
        "shape": list(shape),
        "heads, size": [heads, size],
        "columns of a packed group": width,
        "forward and backward": device == "cuda",  # FlexAttention has no backward pass on a CPU
        "milliseconds": {**milliseconds, "unshared rows, SDPA causal": timed(causal, device, rounds)},
        "largest difference": (masked - flexed).abs().max().item(),
        "share of blocks computed": 1 - blocks.sparsity() / 100,
    }


def step_records(model: str, device: str, small: bool, shape: Sequence[int]) -> list[dict[str, Any]]:
    groups, group, prompt, completion = shape
    case = benchmark_step.Case(model, prompt, completion, group, groups * group, groups * group)
    args = argparse.Namespace(
        trainers=["trl-grpo", "grpo", "srpo"],
        common_tokens=0,
        repeats=1,
        steps=2 if small else 5,
        warmup=1,
        device=device,
        clock="cpu",
        set=[],
    )
    return benchmark_step.numbers(case, benchmark_step.measure(case, args))


def rollout_record(model: str, device: str, small: bool, turns: int, shape: Sequence[int]) -> dict[str, Any]:
    groups, group, prompt, completion = shape
    tokens = completion if turns == 1 else max(1, completion // turns)
    args = argparse.Namespace(
        prompts=groups,
        group=group,
        prompt_tokens=prompt,
        common_tokens=0,
        tokens=tokens,
        repeats=1 if small else 2,
        device=device,
        clock="cpu",
    )
    return benchmark_rollout.measure(model, turns, args)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns what it wrote.

    Raises:
        SystemExit: 1, see above.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU where there is no GPU")
    parser.add_argument("--seconds", type=ranged(at_least(1)), default=420.0, help="no part begins after that")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        parser.error("no GPU is seen; --small runs on a CPU")
    start = time.monotonic()
    shape = (2, 4, 48, 8) if args.small else (4, 8, 400, 48)
    models = ("tiny", "moe") if args.small else ("0.5b", "small_moe")
    heads, size = (4, 64) if args.small else (16, 64)
    found: dict[str, Any] = {"machine": machine(device), "parts": {}}

    def part(name: str, work: Callable[[], Any]) -> None:
        begun = time.monotonic()
        if begun - start > args.seconds:
            found["parts"][name] = {"skipped": f"{args.seconds:g} seconds were over"}
        else:
            try:
                found["parts"][name] = {"result": work()}
            except Exception as error:
                traceback.print_exc()
                found["parts"][name] = {"error": f"{type(error).__name__}: {error}"}
            found["parts"][name]["seconds"] = round(time.monotonic() - begun, 1)
        found["seconds"] = round(time.monotonic() - start, 1)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(found['parts'][name])}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            part(
                f"exactness {model}",
                lambda model=model: exactness(make_model(model, folder, shape[3]), folder, device, shape),
            )
        part("attention", lambda: attention(device, heads, size, shape, 3 if args.small else 20))
        for model in models:
            part(f"steps {model}", lambda model=model: step_records(model, device, args.small, shape))
        for model in models[: 1 if args.small else 2]:
            for turns in (1, 3):
                part(
                    f"rollouts {model}, {turns} turns",
                    lambda model=model, turns=turns: rollout_record(model, device, args.small, turns, shape),
                )
    inexact = [name for name, one in found["parts"].items() if one.get("result", {}) and _inexact(one["result"])]
    failed = [name for name, one in found["parts"].items() if "error" in one]
    if failed or inexact:
        raise SystemExit(
            f"failed: {', '.join(failed) or 'nothing'}; not exact enough: {', '.join(inexact) or 'nothing'}"
        )
    return found


def _inexact(result: Any) -> bool:
    return isinstance(result, dict) and result.get("exact enough") is False


if __name__ == "__main__":
    main()
