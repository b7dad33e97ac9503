"""Greedy single turns of a policy, many at once, by `model.generate`: how routes are read off a policy."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srpo.rollout.sampling_rules import own_settings_aside
from srpo.rollout.special_tokens import end_ids, pad_id
from srpo.rollout.thinking import opened_by


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> tuple[list[str], list[int], list[int]]:
    """Greedy completions of rendered prompts, with prompt and completion tokens (the end token counts), in order.

    A completion begins with the think tag where its prompt has opened one.
    """
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of like length need little padding
    texts, tokens_out = [""] * len(ids), [0] * len(ids)
    pad, ends = pad_id(model, tokenizer), end_ids(model, tokenizer)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(ids), batch_size), desc="routing", unit="batch", leave=False, disable=None):
        batch = order[start : start + batch_size]
        width = max(len(ids[i]) for i in batch)
        inputs = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
        with own_settings_aside(model):  # a penalty or a list of suppressed tokens is not the policy's
            output = model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=pad,
                use_cache=True,
            )
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            length = next((n for n, token in enumerate(row, start=1) if token in ends), len(row))
            texts[i] = opened_by(tokenizer, ids[i]) + tokenizer.decode(row[:length], skip_special_tokens=True)
            tokens_out[i] = length
    model.train(was_training)
    return texts, [len(row) for row in ids], tokens_out
