"""Chat templates that open `<think>` in the prompt, from warm start to serving; and those that close it again."""

from typing import Any

import pytest
import torch
from core_helpers import config, dataset
from helpers import greedy_turn

from routers.language.actions import Tags
from routers.language.grammar import Grammar, parse, parse_turn
from routers.tasks.think_route.sft_rows import Demonstration, encode
from srpo.rollout.loop import Limits, play
from srpo.rollout.turns import Sample
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.sft import encode_turn, sft, sft_config
from srpo.task import RunArguments
from srpo.teacher.prompt import strip_thinking
from srpo.texts import inside, opened_by, opened_in, unfinished
from srpo.trainer.trainer import SRPOTrainer
from srpo.types import Observation

HEAD = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ ANSWER }}<|im_end|>\n{% else %}"
REST = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
END = "{% if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"


def template(answer: str, opened: str) -> str:
    return (HEAD + REST + END).replace("{{ ANSWER }}", answer).replace("OPENED", opened)


# As DeepSeek's distillations, as Qwen3-Thinking (its answer keeps the block), as Qwen3 with enable_thinking: false.
R1 = template("{{ m.content.split('</think>')[-1] }}", "<think>\n")
THINKING = template(
    "<think>\n{{ m.content.replace('<think>', '').replace('</think>', '\n</think>\n\n') }}", "<think>\n"
)
CLOSED = template("{{ m.content }}", "{% if enable_thinking is defined %}<think>\n\n</think>\n\n{% endif %}")
NONE = template("{{ m.content }}", "")
TURN = "<think>why</think><route>a</route>"
PROMPT = [{"role": "user", "content": "Write <think>why</think><route>name</route>. Question: what?"}]


def tokenizer(chat_template: str) -> Any:
    made = train_tokenizer(
        [TURN, "what is it", "assistant user"], 300, whole=["<think>", "</think>", "<route>", "</route>"]
    )
    made.chat_template = chat_template
    return made


def prompt_ids(made: Any, **options: Any) -> list[int]:
    return made.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize(
    ("chat_template", "options", "opened"),
    [
        (R1, {}, "<think>"),
        (THINKING, {}, "<think>"),
        (NONE, {}, ""),
        (CLOSED, {}, ""),
        (CLOSED, {"enable_thinking": False}, ""),
    ],
)
def test_what_a_prompt_leaves_open(chat_template, options, opened):
    made = tokenizer(chat_template)
    assert opened_by(made, prompt_ids(made, **options)) == opened
    completion = "why</think><route>a</route>" if opened else TURN
    assert parse(opened + completion, ["a"]).member == "a"
    assert (parse(completion, ["a"]).kind == "invalid") == bool(opened)


def test_texts_by_hand():
    assert opened_in("a <think> \n") == "<think>" and opened_in("<think>\n\n</think>\n\n") == opened_in("") == ""
    assert inside("<think>", "<think>\nwhy</think>x") == "why</think>x" and inside("", TURN) == TURN
    assert strip_thinking(unfinished("<think>", "why</think> so")) == "so"
    assert strip_thinking(unfinished("<think>", "no end")) == "no end"
    assert strip_thinking(unfinished("", TURN)) == "<route>a</route>"


def test_a_special_think_token_is_refused_in_one_sentence():
    made = tokenizer(R1)
    made.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(ValueError, match="make them ordinary added tokens"):
        opened_by(made, prompt_ids(made))


def network(made: Any) -> Any:
    return tiny_causal_lm(made, hidden=32, layers=1, heads=2, intermediate=64, seed=0)


@pytest.mark.parametrize(("chat_template", "says"), [(R1, "why</think><route>a</route>"), (NONE, TURN)])
def test_worlds_and_demonstrations_of_the_trainer(tmp_path, monkeypatch, chat_template, says):
    made = tokenizer(chat_template)
    seen, demonstrations = [], []
    monkeypatch.setattr(
        "srpo.trainer.distiller.strip_thinking", lambda text: demonstrations.append(text) or strip_thinking(text)
    )

    def world(rows, texts):
        seen.extend(texts)
        return {"route": [parse(text, ["a"]).member for text in texts]}

    def rollout(prompts, run):
        ids = made(says, add_special_tokens=False)["input_ids"] + [made.eos_token_id]
        return {
            "prompt_ids": run._tokenize_prompts(prompts)[0],
            "completion_ids": [ids for _ in prompts],
            "logprobs": None,
        }

    run = SRPOTrainer(
        network(made),
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        config(tmp_path, objective="srpo", max_completion_length=64),
        dataset(),
        processing_class=made,
        world=world,
        rollout_func=rollout,
    )
    run.train()
    assert set(seen) == {TURN} and set(demonstrations) == {TURN}


@pytest.mark.parametrize("chat_template", [R1, THINKING, NONE])
def test_episodes_read_the_first_turn_as_the_policy_saw_it(chat_template):
    made, texts = tokenizer(chat_template), []
    opened = chat_template != NONE

    class World:
        def episode(self, row, seed):
            return self

        def choices(self):
            return None

        async def step(self, text):
            texts.append(text)
            return Observation("reply", end=None if len(texts) == 1 else "done")

        def columns(self, stop):
            return {}

    class Writes:
        def generate(self, requests):
            text = TURN if texts or not opened else TURN.removeprefix("<think>")
            return [Sample(tuple(made(text)["input_ids"]), (0.0,) * len(made(text)["input_ids"]), True)]

        def over(self, rows):
            pass

        def finish(self):
            pass

    limits = Limits(turns=3, tokens=200, observation_tokens=20, step_seconds=5.0)
    play(World(), [{}], [prompt_ids(made)], ["0"], Writes(), made, limits)
    assert texts == [TURN, TURN]
    assert parse_turn(texts[0].replace("a<", "a:q<"), ["a"], Grammar()).kind == "route"


@pytest.mark.parametrize(
    ("chat_template", "options"), [(R1, None), (THINKING, None), (NONE, None), (CLOSED, {"enable_thinking": False})]
)
def test_the_warm_start_teaches_what_will_be_sampled(tmp_path, chat_template, options):
    made = tokenizer(chat_template)
    row = {"prompt": PROMPT, "completion": [{"role": "assistant", "content": TURN}]}
    encoded = encode_turn(row, made, [made.eos_token_id], options)
    prompt = prompt_ids(made, **(options or {}))
    trained = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    assert encoded["input_ids"] == [*prompt, *trained] and trained[-1] == made.eos_token_id
    assert opened_by(made, prompt) + made.decode(trained[:-1]) == TURN

    run = RunArguments("query_routing", sft_epochs=60, sft_learning_rate=1e-2, sft_batch_size=8)
    settings = sft_config(run, config(tmp_path), tmp_path, {"disable_tqdm": True})
    torch.manual_seed(0)
    policy = sft(network(made), made, [encoded] * 8, settings)
    rendered = made.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False, **(options or {}))
    text, _ = greedy_turn(policy, made, rendered, 40)
    assert parse(text, ["a"]).member == "a"


@pytest.mark.parametrize("chat_template", [R1, NONE])
def test_demonstrations_of_agents_begin_inside_the_block(chat_template):
    made = tokenizer(chat_template)
    turns = (TURN, Observation("reply"), TURN)
    encoded = encode(Demonstration(PROMPT, turns), made, Tags([], made), 600)
    text = made.decode(encoded["input_ids"][len(prompt_ids(made)) :])
    whole = TURN + "reply" + TURN
    assert text == (whole if chat_template == NONE else whole.removeprefix("<think>"))
