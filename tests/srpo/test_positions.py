"""Prompts of different lengths: padding moves neither what is scored nor what is learnt, or the model is refused."""

import pytest
import torch
import transformers
from core_helpers import TEXTS, config, distance, tokenizer, trainer, weights
from datasets import Dataset
from peft import LoraConfig

from srpo.trainer.forward_checks import positions_of

SIZES = {
    "GPT2": {"n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "GPTNeo": {
        "max_position_embeddings": 256, "hidden_size": 32, "num_layers": 1, "num_heads": 2,
        "attention_types": [[["global"], 1]],
    },
    "OPT": {
        "max_position_embeddings": 256, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "word_embed_proj_dim": 32,
    },
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "Mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 256},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "Bart": {
        "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
        "max_position_embeddings": 256, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
    },
    "Qwen3": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 256,
    },
}  # fmt: skip


def network(family, **changes):
    words = tokenizer()
    settings = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    made = getattr(transformers, f"{family}Config")(
        **settings, bos_token_id=words.eos_token_id, **{**SIZES[family], **changes}
    )
    torch.manual_seed(0)
    policy = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(made)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return policy


def rows():
    """Eight prompts, the longest four times as long as the shortest."""
    texts = [" and ".join(TEXTS[i : i + 1 + i % 4]) for i in range(8)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def run(folder, family, adapter=False, **changes):
    settings = {
        "max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 32, "num_generations": 4,
        "success_reward_threshold": 0.5,
    }  # fmt: skip
    args = config(folder, **settings | changes)
    lora = LoraConfig(r=4, target_modules="all-linear") if adapter else None
    made = trainer(args, network(family), train_dataset=rows(), peft_config=lora)
    made.train()
    return made


CASES = [
    ("GPT2", {"objective": "grpo"}),
    ("GPT2", {"objective": "grpo", "beta": 0.2, "num_iterations": 2}),
    ("GPT2", {"objective": "grpo", "loss_type": "minirl", "num_iterations": 2}),
    ("GPT2", {"objective": "srpo"}),
    ("GPT2", {"objective": "srpo", "beta": 0.2, "num_iterations": 2, "teacher_model_kind": "trust_region"}),
    ("GPT2", {"objective": "sdpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("GPT2", {"objective": "srpo", "adapter": True, "beta": 0.2}),
    ("GPTNeo", {"objective": "srpo", "beta": 0.2}),
    ("OPT", {"objective": "srpo", "beta": 0.2}),
    ("Bloom", {"objective": "srpo"}),
    ("Mpt", {"objective": "grpo"}),
    ("Qwen3", {"objective": "srpo"}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_padding_does_not_move_what_is_learnt(tmp_path, family, changes):
    """The same rows in one batch, and in smaller ones that are padded further. On a20621b GPT-2 was off by 100 %."""
    one = run(tmp_path / "one", family, **changes)
    accumulate = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "pad_to_multiple_of": 32}
    other = run(tmp_path / "other", family, **changes, **accumulate)
    a, b = weights(one.model), weights(other.model)
    if changes.get("adapter"):
        moved = max(value.abs().max().item() for name, value in a.items() if "lora_B" in name)  # they start at 0
    else:
        moved = distance(weights(network(family)), a)
    assert moved > 1e-4 and distance(a, b) < 1e-2 * moved


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_the_old_and_the_reference_policy_are_scored_as_each_row_alone(tmp_path, family):
    settings = {"objective": "grpo", "beta": 0.2, "num_iterations": 2, "per_device_train_batch_size": 32}
    made = trainer(config(tmp_path, **settings), network(family), train_dataset=rows())
    batches, inner = [], made._generate_and_score_completions
    made._generate_and_score_completions = lambda inputs: batches.append(inner(inputs)) or batches[-1]
    made.train()
    batch, policy = batches[0], network(family).eval()
    lengths = batch["prompt_mask"].sum(dim=1)
    assert lengths.min() * 2 < lengths.max()
    for i in range(len(lengths)):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = policy(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            assert torch.allclose(batch[name][i, : len(completion)], wanted, atol=1e-4), name


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_a_model_that_cannot_be_told_positions_is_refused_at_the_start(tmp_path, objective):
    words = "BartForCausalLM counts or reads padding as text and takes no position_ids: prompts of unequal length"
    with pytest.raises(ValueError, match=words):
        trainer(config(tmp_path, objective=objective), network("Bart"), train_dataset=rows())


def test_a_recurrent_model_that_masks_its_padding_is_not_refused(tmp_path):
    trainer(config(tmp_path, objective="grpo"), network("Mamba"), train_dataset=rows())


def test_rotary_models_are_left_as_trl_runs_them(tmp_path):
    """Positions relative to each other need no help, and TRL's bits are the contract."""
    made = trainer(config(tmp_path, objective="grpo"), network("Qwen3"), train_dataset=rows())
    assert not made.model._forward_pre_hooks


def test_a_policy_whose_weights_are_nan_is_refused_at_the_start(tmp_path):
    broken = network("Qwen3")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN before any training: its weights are damaged"):
        trainer(config(tmp_path), broken, train_dataset=rows())


def test_positions_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
