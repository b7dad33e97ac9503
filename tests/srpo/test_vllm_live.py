"""A live vLLM in this process, on the CPU: what it samples is what the recipe says, from the weights of the last step.

`bash scripts/setup.sh --vllm` installs it. TRL's colocated engine runs as in training; only the compilation, which
takes a minute, is left out. Largest difference of a log-prob to our own forward, measured in fp32: see `CLOSE`.
"""

import functools
import json
import os
from types import SimpleNamespace

import core_helpers as core
import pytest
import torch
from accelerate import Accelerator
from core_helpers import tokenizer
from datasets import Dataset
from episode_worlds import ScriptedEnvironment
from peft import LoraConfig
from test_trainer_bopo import bopo_trainer
from think_route_cases import ROW
from think_route_cases import world as think_route

from srpo.replay.replay import RoutingReplay
from srpo.replay.vllm import EngineRoutes
from srpo.rollout.generator import TransformersGenerator, _processed
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request
from srpo.rollout.vllm import VLLMGenerator
from srpo.rollout.vllm_weights import weights_that_can_be_replaced
from srpo.scratch_lm import tiny_moe_lm
from srpo.types import Observation

pytestmark = pytest.mark.vllm

EOS = tokenizer().eos_token_id
OTHER_EOS = 40
CLOSE = 2e-4  # measured: below 1e-5 at these sizes; other kernels round otherwise
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
PROMPTS = [(5, 6, 7 + i, 9, 11) for i in range(24)]


@pytest.fixture(scope="module", autouse=True)
def quick_engines():
    """Engines without compilation and with little memory; the variables are vLLM's own."""
    from trl.generation import vllm_generation

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for vLLM
            patch.setenv(name, os.environ.get(name, ""))
            patch.delenv(name)
        patch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, enforce_eager=True))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy whose generation configuration would change every sample, and names another end token."""
    made = tmp_path_factory.mktemp("policy")
    core.model(layers=2, hidden=64).save_pretrained(made)  # heads of 32: less than vLLM's CPU kernels know
    tokenizer().save_pretrained(made)
    leaks = {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 3.0, "do_sample": True}
    (made / "generation_config.json").write_text(json.dumps({**leaks, "eos_token_id": [EOS, OTHER_EOS]}))
    return made


@pytest.fixture(scope="module")
def policy():
    return core.model(layers=2, hidden=64).eval()


@pytest.fixture(scope="module")
def engine(folder, policy):
    """TRL's colocated engine on the policy, in fp32."""
    from trl.generation.vllm_generation import VLLMGeneration

    from srpo.rollout.vllm_settings import engine_built_with

    policy.name_or_path = str(folder)
    with engine_built_with(lambda _: {"dtype": "float32"}, lambda: weights_that_can_be_replaced(policy)):
        return VLLMGeneration(policy, Accelerator(cpu=True), tokenizer(), max_model_length=64, max_num_seqs=32)


@pytest.fixture
def sampled(engine):
    """`sampled(sampling, requests)`: by vLLM, which TRL has told the same as we."""

    def sample(sampling, requests, eos=(EOS,)):
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            setattr(engine, name, getattr(sampling, name))
        return VLLMGenerator(engine, tokenizer(), sampling, eos_ids=eos).generate(requests)

    return sample


def same(found, expected, close=CLOSE):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids and a.ended == b.ended
        assert a.logprobs == pytest.approx(b.logprobs, abs=close)


def greedy(network, requests, eos=(EOS,), stop=()):
    return TransformersGenerator(network, tokenizer(), Sampling(temperature=0, stop=stop), eos_ids=eos).generate(
        requests
    )


def test_greedy_turns_and_choices_are_those_of_our_own_generator(sampled, policy):
    """Limits per row, end tokens, and choices among two sets of ids, in one batch."""
    requests = [Request(i, ids, str(i), 3 + i, None) for i, ids in enumerate(PROMPTS)]
    requests += [Request(30, (9, 10), "c", 5, (30, 31)), Request(31, (9, 10, 11), "d", 5, (40, 41, EOS))]
    for eos in ((EOS,), (EOS, *range(100, 180))):  # with many end tokens most rows end early
        same(sampled(Sampling(temperature=0), requests, eos), greedy(policy, requests, eos))
    assert sum(s.ended for s in greedy(policy, requests[:24], eos)) > 5


def test_stop_strings_end_a_turn_where_ours_end_it(sampled, policy):
    """Strings of one token and over several, in texts with torn characters: the model is random."""
    requests = [Request(i, ids, str(i), 20) for i, ids in enumerate(PROMPTS)]
    texts = [tokenizer().decode(s.ids, skip_special_tokens=True) for s in greedy(policy, requests, ())]
    ended = 0
    stops = {text[i : i + n] for n in (1, 2, 3) for text in texts[:4] for i in range(3, 12)}
    for stop in sorted(s for s in stops if s.isascii() and s.isprintable())[::3]:
        expected = greedy(policy, requests, (), (stop,))
        same(sampled(Sampling(temperature=0, stop=(stop,)), requests, ()), expected)
        ended += sum(s.ended for s in expected)
    assert ended > 4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_p=0.8, top_k=20, repetition_penalty=1.2),
        Sampling(min_p=0.05),
    ],
    ids=["plain", "tempered", "cut", "min_p"],
)
def test_what_samples_is_what_the_recipe_says(sampled, policy, sampling):
    """Log-probs are those of our forward under the recipe's distribution; nothing of generation_config.json acts."""
    requests = [Request(i, ids, str(i), 8) for i, ids in enumerate(PROMPTS)]
    found = sampled(sampling, requests)
    assert len({s.ids for s in found}) > 20 and all(len(s.ids) == 8 or s.ids[-1] == EOS for s in found)
    for request, sample in zip(requests, found, strict=True):
        whole = (*request.ids, *sample.ids)
        with torch.no_grad():
            logits = policy(torch.tensor([whole])).logits[0]
        for t, (token, logprob) in enumerate(zip(sample.ids, sample.logprobs, strict=True), start=len(request.ids)):
            scores = _processed(logits[t - 1 : t].clone(), sampling, [whole[:t]])
            assert logprob == pytest.approx(torch.log_softmax(scores, -1)[0, token].item(), abs=CLOSE)


def test_a_choice_is_drawn_at_the_temperature_alone(sampled, policy):
    """top_k 1 and a penalty would leave one of three; each comes as often as its renormalised probability says."""
    context, allowed = (9, 10, 30), (30, 31, 56)
    how = Sampling(temperature=2.0, top_p=0.1, top_k=1, min_p=0.9, repetition_penalty=5.0)
    found = sampled(how, [Request(i, context, str(i), 4, allowed) for i in range(400)])
    with torch.no_grad():
        logits = policy(torch.tensor([context])).logits[0, -1, list(allowed)]
    expected = torch.log_softmax(logits / 2.0, dim=-1)
    for sample in found:
        assert sample.ended and sample.logprobs[0] == pytest.approx(
            expected[allowed.index(sample.ids[0])].item(), abs=CLOSE
        )
    for token, logp in zip(allowed, expected.tolist(), strict=True):
        share = sum(s.ids == (token,) for s in found) / 400
        assert abs(share - torch.tensor(logp).exp().item()) < 0.1  # four standard deviations


def test_a_context_that_does_not_fit_is_refused_and_not_cut(sampled):
    sampled(Sampling(), [Request(0, (5,) * 60, "a", 4)])
    with pytest.raises(
        ValueError, match=r"may take 65 tokens, and vLLM was started for 64; set vllm_max_model_length"
    ):
        sampled(Sampling(), [Request(0, (5,) * 60, "a", 5)])


def test_a_rollout_over_vllm_is_the_rollout_over_transformers(engine, policy):
    def script(row, t, text):
        return Observation(end="done") if t == row["i"] % 3 else Observation(f"{len(text)} more", before="<|im_end|>")

    rows, prompts = [{"i": i} for i in range(6)], PROMPTS[:6]
    limits = Limits(turns=4, tokens=40, observation_tokens=8, step_seconds=5, turn_tokens=7)
    engine.temperature, engine.repetition_penalty = 0.0, 1.0
    found = []
    for made in (
        VLLMGenerator(engine, tokenizer(), Sampling(temperature=0), eos_ids=[EOS]),
        TransformersGenerator(policy, tokenizer(), Sampling(temperature=0), eos_ids=[EOS]),
    ):
        environment = ScriptedEnvironment(script, lambda t: ["a", "b"] if t == 1 else None)
        found.append(play(environment, rows, prompts, [str(i) for i in range(6)], made, tokenizer(), limits))
    for a, b in zip(*found, strict=True):
        assert [(t.owner, t.ids, t.choices) for t in a.turns] == [(t.owner, t.ids, t.choices) for t in b.turns]


# ------------------------------------------------------------------------------------------------------- training


def trained(folder, tmp_path, rewards=core.binary_reward, **changes):
    kwargs = {name: changes.pop(name) for name in ("peft_config", "environment", "train_dataset") if name in changes}
    args = core.config(tmp_path, **{**COLOCATE, "max_steps": 2, "learning_rate": 1.0, **changes})
    made = core.trainer(args, str(folder), rewards, rollout_func=None, **kwargs)
    made.train()
    return made


def engine_is_at(made, network):
    """What the engine samples now, greedily, is what this network does."""
    made.vllm_generation.sync_weights()
    made.vllm_generation.temperature = 0.0
    requests = [Request(i, ids, str(i), 6) for i, ids in enumerate(PROMPTS)]
    requests.append(Request(30, (9, 10), "c", 5, (30, 31, 56)))
    found = VLLMGenerator(made.vllm_generation, tokenizer(), Sampling(temperature=0), eos_ids=[EOS]).generate(requests)
    same(found, greedy(network.eval(), requests))
    return found


LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}


@pytest.mark.parametrize("adapter", [None, {}, {"use_dora": True}], ids=["full weights", "LoRA", "DoRA"])
def test_srpo_trains_and_the_engine_follows_the_policy(folder, tmp_path, policy, adapter):
    """Single turns. After the steps vLLM's tokens and log-probs are those of the updated model, and not of the old."""
    lora = None if adapter is None else LoraConfig(**LORA, **adapter)
    made = trained(folder, tmp_path, peft_config=lora, max_completion_length=64)
    assert max(core.logged(made, "srpo/distilled_share")) > 0
    # Before each step both are the same weights in fp32: what is between their log-probs is rounding.
    assert max(core.logged(made, "sampling/sampling_logp_difference/max")) < CLOSE
    after = engine_is_at(made, made.accelerator.unwrap_model(made.model))
    old = greedy(policy, [Request(i, ids, str(i), 6) for i, ids in enumerate(PROMPTS)])
    moved = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(after, old, strict=False))
    assert moved > 10 * CLOSE, "the policy has moved, and the engine with it"
    if adapter is None:
        inner = made.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        with pytest.raises(ValueError, match=r"vLLM has ignored the policy's model\.layers\.0\.self_attn"):
            inner.load_weights([("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(16))])


def test_a_saved_head_reaches_the_engine_and_the_teachers_copy_does_not(tmp_path):
    network = core.model(layers=2, hidden=64)
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().flip(0).clone())
    network.save_pretrained(tmp_path / "start")
    tokenizer().save_pretrained(tmp_path / "start")
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["embed_tokens"])
    made = trained(tmp_path / "start", tmp_path / "run", peft_config=lora)
    assert max(core.logged(made, "sampling/sampling_logp_difference/max")) < CLOSE
    engine_is_at(made, made.accelerator.unwrap_model(made.model))


def test_half_of_a_tied_pair_cannot_be_trained(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the adapter trains the embedding or the head of a model that ties them"):
        trained(folder, tmp_path, peft_config=LoraConfig(**LORA, modules_to_save=["embed_tokens"]))


def test_the_seed_of_the_run_is_the_engines(folder, tmp_path):
    """The same seed gives the same completions, another one others; TRL would give every run seed 0."""
    found = []
    for seed in (1, 1, 2):
        seen = []

        def keep(completion_ids, seen=seen, **_):
            seen.extend(map(tuple, completion_ids))
            return [0.0] * len(completion_ids)

        trained(folder, tmp_path, rewards=keep, seed=seed, data_seed=0, max_steps=1, objective="grpo")
        found.append(seen)
    assert found[0] == found[1] and found[0] != found[2]


def test_think_and_route_in_several_turns(folder, tmp_path):
    rows = [{**ROW, "prompt": [{"role": "user", "content": text}]} for text in core.TEXTS[:8]]
    made = trained(
        folder, tmp_path, rewards=lambda cost, **_: [float(c or 0) for c in cost], environment=think_route(),
        train_dataset=Dataset.from_list(rows), max_turns=3, max_completion_length=900, max_turn_tokens=8, max_steps=1,
        max_observation_tokens=100, vllm_max_model_length=1024, stop_strings=["</search>", "</answer>"],
    )  # fmt: skip
    assert core.logged(made, "rollout/turns")[0] > 1
    assert core.logged(made, "sampling/sampling_logp_difference/max")[0] < CLOSE
    engine_is_at(made, made.model)


def test_a_step_of_bopo_is_scored_as_it_was_sampled(folder, tmp_path):
    """Decisions among labels: sampler, old policy and their masks agree, over two labels and not the vocabulary."""
    made = bopo_trainer(tmp_path, str(folder), **COLOCATE, max_steps=1)
    made.train()
    batch = made.batch
    decided = (batch["choices"] >= 0).any(-1) & batch["tool_mask"].bool() & batch["completion_mask"].bool()
    sampled = batch["sampling_per_token_logps"][decided]
    assert decided.sum() > 30 and (batch["old_per_token_logps"][decided] - sampled).abs().max() < CLOSE
    alone = decided & ((batch["choices"] >= 0).sum(-1) == 1)
    assert alone.any() and batch["sampling_per_token_logps"][alone].abs().max() == 0.0


def test_routes_of_a_live_engine_are_those_of_our_own_forward(tmp_path):
    """Row t is token t as it was fed, in every layer; twice, the second time from the prefix cache.

    The colocated trainer refuses experts on a CPU: their packed weights cannot be replaced.
    """
    network = tiny_moe_lm(tokenizer(), hidden=64, layers=2, heads=2, experts=8, top_k=2, intermediate=32).eval()
    network.save_pretrained(tmp_path / "moe")
    tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"packs the experts of a qwen3_moe model and cannot take new weights"):
        trained(tmp_path / "moe", tmp_path / "run")

    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()  # the groups of the dense engines before, which have none of experts
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}
    engine = LLM(str(tmp_path / "moe"), enable_return_routed_experts=True, **options)
    replay = RoutingReplay(network)
    routes = EngineRoutes(SimpleNamespace(llm=engine, tensor_parallel_size=1), replay.spec)
    prompts = [list(PROMPTS[0]), list(PROMPTS[1][:3])]
    for _ in range(2):
        how = SamplingParams(temperature=0, max_tokens=6)
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
        sampled = [list(answer.outputs[0].token_ids) for answer in answers]
        for prompt, ids, found in zip(prompts, sampled, routes.rows(prompts, sampled), strict=True):
            with torch.no_grad(), replay.record_once():
                network(torch.tensor([[*prompt, *ids]]))
            (own,) = replay.recorded()
            assert len(found) == len(prompt) + len(ids) and bool((found[-1] == -1).all())  # the last was not fed
            assert torch.equal(found[:-1].sort(-1).values, own[:-1].sort(-1).values.to(found.dtype))
