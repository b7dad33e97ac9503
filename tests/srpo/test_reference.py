"""beta > 0: the reference policy is the weights that were given, in every way in which they can be given."""

import copy

import pytest
import torch
from core_helpers import config, distance, equal, logged, model, tokenizer, trainer, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

from srpo.run.whole import seal
from srpo.sft import sft

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def moved(network, seed=7):
    """The same network with other weights than those on the disk, or where there are none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def logps(network, batch):
    """[B, T] by a plain forward of an independent copy."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = network.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    found = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return found[:, -batch["completion_ids"].size(1) :]


def references(run):
    """The batches of a run, as they are scored."""
    batches, inner = [], run._generate_and_score_completions

    def score(inputs):
        batches.append(inner(inputs))
        return batches[-1]

    run._generate_and_score_completions = score
    return batches


def check(run, given, steps=2):
    batches = references(run)
    start = weights(run.model)
    run.train()
    assert len(batches) == steps and distance(start, weights(run.model)) > 1e-3
    for batch in batches:
        mask = batch["completion_mask"].bool()
        assert torch.allclose(batch["ref_per_token_logps"][mask], logps(given, batch)[mask], atol=1e-4)
    kl = logged(run, "kl") or logged(run, "loss/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-5


SETTINGS = {"beta": 0.1, "max_steps": 2, "learning_rate": 1.0}


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
@pytest.mark.parametrize("origin", ["changed after it was read", "made in memory", "warm start"])
def test_a_model_is_its_own_reference_and_not_what_lies_at_its_path(tmp_path, origin, objective):
    network = model(scale=2.0)
    if origin == "changed after it was read":
        network.save_pretrained(tmp_path / "policy")
        network.config._name_or_path = str(tmp_path / "policy")
        moved(network)
    elif origin == "warm start":
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 4
        args = SFTConfig(
            str(tmp_path / "sft"), use_cpu=True, bf16=False, max_steps=2, learning_rate=0.01, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        network = sft(network, tokenizer(), rows, args)
    given = copy.deepcopy(network)
    vars(given).pop("forward", None)
    check(trainer(config(tmp_path / "run", objective=objective, **SETTINGS), network), given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_by_name_is_read_once_more_and_has_the_policys_precision(tmp_path, dtype):
    given = model(scale=2.0)
    for parameter in given.parameters():  # and not its buffers, which are computed anew
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    given.save_pretrained(tmp_path / "policy")
    args = config(tmp_path / "run", objective="grpo", model_init_kwargs={"dtype": dtype}, **SETTINGS)
    run = trainer(args, str(tmp_path / "policy"))
    check(run, given)
    assert logged(run, "kl")[0] == 0.0 and {p.dtype for p in run.ref_model.parameters()} == {torch.float32}


def test_a_copy_computes_with_its_own_head_after_a_trainer_has_cast_it(tmp_path):
    """cast_lm_head_to_fp32 leaves a forward on the head that is bound to that very head."""
    network = model(scale=2.0)
    trainer(config(tmp_path / "first", objective="grpo", cast_lm_head_to_fp32=True), network)
    given = model(scale=2.0)
    check(trainer(config(tmp_path / "run", objective="grpo", **SETTINGS), network), given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_with_a_new_adapter_the_reference_is_the_model_below_as_it_was_given(tmp_path, options):
    """PiSSA and OLoRA move a part of the given weights into the adapter; `bias: all` trains weights below it."""
    network = moved(model(scale=2.0))
    given = copy.deepcopy(network)
    args = config(tmp_path, objective="grpo", **SETTINGS)
    check(trainer(args, network, peft_config=LoraConfig(**LORA, **options)), given)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {}),
        ("policy", {}),
        ("default", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("default", {"trainable_token_indices": [5, 6, 7]}),
        ("default", {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=["plain", "other name", "embeddings", "tokens", "whole module"],
)
def test_with_an_adapter_of_its_own_the_reference_is_that_adapter(tmp_path, name, options):
    """TRL copies what has ".default." in its name: not another name, nor parameters that end in it."""
    network = get_peft_model(model(scale=2.0), LoraConfig(**{**LORA, **options}), adapter_name=name)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    given = copy.deepcopy(network)
    run = trainer(config(tmp_path, objective="grpo", **SETTINGS), network)
    assert list(run.model.peft_config) == [name], "a reference is not a part of the policy"
    check(run, given)


def biased():
    """A network with biases, as Qwen2's attention has them; Qwen3 has none."""
    words = tokenizer()
    settings = Qwen2Config(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return moved(Qwen2ForCausalLM(settings))


@pytest.mark.parametrize("brought", [False, True], ids=["new adapter", "adapter of its own"])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [5, 6, 7]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_trains_beside_a_lora_does_not_move_the_reference(tmp_path, options, brought):
    """Biases of the model below have no other values: without its adapter the policy keeps the trained ones."""
    network = biased()
    adapter = LoraConfig(**LORA, **options)
    if brought:
        network = _moved_adapter(get_peft_model(network, adapter), 3)
    given = copy.deepcopy(network)
    args = config(tmp_path, objective="srpo", **{**SETTINGS, "learning_rate": 3.0})
    run = trainer(args, network, peft_config=None if brought else adapter)
    start = weights(run.model)
    check(run, given)
    kinds = {
        "bias": ".bias",
        "trainable_token_indices": "trainable_tokens_delta",
        "modules_to_save": "modules_to_save",
    }
    part = kinds.get(next(iter(options)), next(iter(options)))
    now = weights(run.model)
    assert max((now[name] - value).abs().max() for name, value in start.items() if part in name) > 1e-3


def test_a_moving_reference_is_for_whole_models(tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        trainer(config(tmp_path, beta=0.1, sync_ref_model=True), model(), peft_config=LoraConfig(**LORA))


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("how", ["model", "sync", "adapter"])
def test_a_resumed_run_has_the_reference_of_the_first(tmp_path, how):
    """Also where it is given other weights than the first run was: they are replaced by the checkpoint's."""
    settings = {**SETTINGS, "objective": "grpo", "learning_rate": 0.1, "max_steps": 4, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "per_device_train_batch_size": 8}
    if how == "sync":
        settings |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}

    def policy(seed):
        network = model(scale=2.0)
        if how != "adapter":
            return moved(network, seed)
        network = get_peft_model(network, LoraConfig(**LORA))
        return moved(network.base_model.model, 1) and _moved_adapter(network, seed)

    whole = trainer(config(tmp_path / "whole", **settings), policy(1))
    seen = references(whole)
    whole.train()
    rest = trainer(config(tmp_path / "whole", **settings), policy(2))
    again = references(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(seen) == 4 and len(again) == 2
    for first, second in zip(seen[2:], again, strict=True):
        assert torch.equal(first["ref_per_token_logps"], second["ref_per_token_logps"])
    assert equal(weights(whole.model), weights(rest.model))
    (tmp_path / "whole" / "checkpoint-2" / "reference.safetensors").unlink()
    seal(tmp_path / "whole" / "checkpoint-2")  # as a run without a reference would have
    with pytest.raises(FileNotFoundError, match="no reference policy"):
        trainer(config(tmp_path / "whole", **settings), policy(1)).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def _moved_adapter(network: PeftModel, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network
