"""Recipes are read strictly, and every recipe of the repository parses into the dataclasses that run it."""

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from routers.data.catalogue import load_catalogue
from routers.environments.messages.repairs import Junior, Senior
from srpo.recipe import OLD_KEYS, RecipeError, load_recipe, load_run, resolved_recipe
from srpo.shipped import find_recipe
from srpo.task import RunArguments, find_task, task_names

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ("accelerate", "catalogues")
)


class Schedule(Enum):
    CONSTANT = "constant"
    COSINE = "cosine"


@dataclass
class Training:
    learning_rate: float = 1e-6
    num_generations: int = 8
    use_vllm: bool = False
    gradient_checkpointing: bool = True
    run_name: str | None = None
    schedule: Schedule | str = "constant"
    reward_weights: list[float] | None = None
    extra: dict[str, Any] | str | None = None
    mode: Literal["a", "b"] = "a"
    hub_token: str | None = None
    model_revision: str = "main"
    eos_token: str | None = None


@dataclass
class Task:
    table: str
    cost_weight: float = 0.3
    members: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.cost_weight < 0:
            raise ValueError(f"cost_weight={self.cost_weight}: must not be negative")


def read(tmp_path: Path, text: str, *argv: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe((Training, Task), ["--config", str(path), *argv])


def test_file_then_command_line(tmp_path: Path) -> None:
    training, task = recipe = read(
        tmp_path,
        "table: pool.jsonl\nlearning_rate: 5e-6\nuse_vllm: true\nmembers: [a, b]\nschedule: cosine\n",
        "--num_generations", "4", "--learning-rate=1e-5", "--no_gradient_checkpointing", "--members", "c", "d",
    )  # fmt: skip
    assert (training.learning_rate, training.num_generations, training.use_vllm) == (1e-5, 4, True)
    assert training.gradient_checkpointing is False
    assert (task.table, task.members, task.cost_weight) == ("pool.jsonl", ["c", "d"], 0.3)
    assert resolved_recipe(recipe) == {
        "table": "pool.jsonl", "learning_rate": 1e-5, "use_vllm": True, "members": ["c", "d"], "schedule": "cosine",
        "num_generations": 4, "gradient_checkpointing": False,
    }  # fmt: skip


def test_what_is_resolved_reproduces_the_run(tmp_path: Path) -> None:
    first = read(tmp_path, "table: t\nreward_weights: [1, 0.5]\nextra:\n  dtype: float32\n", "--mode", "b")
    assert read(tmp_path, yaml.safe_dump(resolved_recipe(first))) == first


def test_a_part_of_a_recorded_recipe(tmp_path: Path) -> None:
    """Lines of other dataclasses are passed over in the file; on the command line they are mistakes as ever."""
    path = tmp_path / "recipe.yaml"
    path.write_text("table: t\nlearning_rate: 1.0e-3\ncost_weight: 0.5\n")
    [task] = load_recipe(Task, ["--config", str(path), "--members", "b"], partial=True)
    assert task == Task("t", 0.5, ["b"])
    with pytest.raises(RecipeError, match="unknown key 'learning_rate'"):
        load_recipe(Task, ["--config", str(path)])
    with pytest.raises(RecipeError, match="unknown option '--learning_rate'"):
        load_recipe(Task, ["--config", str(path), "--learning_rate", "1"], partial=True)


def test_yaml_writes_small_numbers_as_text_and_we_read_them_as_numbers(tmp_path: Path) -> None:
    assert yaml.safe_load("x: 5e-6") == {"x": "5e-6"}  # YAML 1.1 wants a dot
    assert read(tmp_path, "table: t\nlearning_rate: 5e-6\n")[0].learning_rate == 5e-6


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("table: t\nlearning_rat: 1\n", [], r"recipe.yaml:2: unknown key 'learning_rat'; .* 'learning_rate'"),
        ("table: t\nnum_generation: 1\n", [], r"'num_generations'"),
        ("table: t\nenv: {A: b}\n", [], r"recipe.yaml:2: unknown key 'env'"),
        ("table: t\n", ["--cost-weigth", "1"], r"command line: unknown option '--cost_weigth'; .* 'cost_weight'"),
        ("table: t\n", ["--learning", "1"], r"unknown option '--learning'; .* 'learning_rate'"),  # no abbreviations
        ("table: t\n", ["stray"], r"'stray' belongs to no option"),
        ("table: t\ntable: u\n", [], r"recipe.yaml:2: the key 'table' was already written in line 1"),
        ("table: t\nextra:\n  a: 1\n  a: 2\n", [], r"recipe.yaml:4: the key 'a' .* line 3"),
        ("table: t\nnum_generations: 8.5\n", [], r"recipe.yaml:2: num_generations must be an integer, not 8.5"),
        ("table: t\nnum_generations: true\n", [], r"num_generations must be an integer"),
        ("table: t\nuse_vllm: 'yes'\n", [], r"use_vllm must be true or false, not 'yes' of type str"),
        ("table: t\nlearning_rate: fast\n", [], r"learning_rate must be a number"),
        ("table: t\nlearning_rate:\n", [], r"learning_rate must be a number.*the line is empty"),
        ("table: 7\n", [], r"table must be a text, not 7 .*put it in quotes"),
        ("table: no\n", [], r"table must be a text, not False .*YAML reads yes, no"),
        ("table: t\nschedule: cosinus\n", [], r"schedule must be one of constant, cosine"),
        ("table: t\nmode: c\n", [], r"mode must be one of 'a', 'b'"),
        ("table: t\nmembers: calculator\n", [], r"members must be a list \(a text each\)"),
        ("table: t\nreward_weights: [1, x]\n", [], r"reward_weights must be a list \(a number each\)"),
        ("table: t\n", ["--num_generations", "x"], r"--num_generations: num_generations must be an integer, not 'x'"),
        ("cost_weight: 1\n", [], r"missing table \(of Task\)"),
        ("table: t\ncost_weight: -1\n", [], r"recipe.yaml: cost_weight=-1.0: must not be negative"),
        ("- table\n", [], r"a recipe is a list of `key: value` lines"),
        ("table: [t\n", [], r"not valid YAML"),
        ("table: !!python/object/apply:os.system ['true']\n", [], r"not valid YAML"),
        ("table: t\n", ["--config", "b.yaml"], r"--config is given 2 times"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, argv: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, text, *argv)


def test_missing_file_is_named() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: No such file"):
        load_recipe(Training, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "line",
    [
        "hub_token: anything",
        "run_name: hf_" + "aB3" * 10,
        "run_name: sk-proj-" + "x1" * 12,
        "extra: {nested: [{api_key: short}]}",
        "extra: {url: 'https://user:ghp_" + "a1B2" * 9 + "@host'}",
        "run_name: " + "0a1b" * 10,  # 40 letters and digits: a W&B key
    ],
)
def test_secrets_are_refused_without_being_repeated(tmp_path: Path, line: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:2: .*looks like a secret.*environment variable") as caught:
        read(tmp_path, f"table: t\n{line}\n")
    for word in ("anything", "aB3aB3", "x1x1", "a1B2", "0a1b0a1b", "short"):
        assert word not in str(caught.value)


def test_what_only_resembles_a_secret_is_allowed(tmp_path: Path) -> None:
    commit = "0a1b" * 10
    training, _ = read(
        tmp_path,
        f"table: cache/snapshots/{commit}/pool.jsonl\nmodel_revision: {commit}\neos_token: <|im_end|>\n"
        "run_name: task-of-disk-space-and-half_hf_models\n",
    )
    assert training.model_revision == commit


def test_an_anonymous_recipe_is_only_a_command_line() -> None:
    recipe = load_recipe(Task, ["--table", "x"])
    assert recipe[0] == Task("x") and recipe.path is None and recipe.given == {"table": "x"}


# ------------------------------------------------------------------------------------- the repository's recipes


def test_there_are_recipes_for_every_objective_and_model() -> None:
    have = {path.relative_to(ROOT / "recipes").parts[:2] for path in RECIPES}
    for model in ("Qwen3-4B", "Qwen3-8B"):
        for objective in ("grpo", "sdpo", "srpo"):
            assert (model, objective) in have
    assert (ROOT / "recipes" / "quickstart" / "srpo.yaml").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_parses(path: Path, tmp_path: Path) -> None:
    task, (arguments, run, args) = load_run(
        [str(path), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    )
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == f"task: {run.task}", "the first key of every recipe"
    assert isinstance(arguments, task.Arguments) and find_task(run.task) is task
    parts = path.relative_to(ROOT / "recipes").parts
    objective = parts[1] if len(parts) == 3 else args.objective
    assert args.objective == objective
    assert args.max_steps > 0 or args.num_train_epochs > 0
    assert args.num_generations >= 2


RUN = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]


@pytest.mark.parametrize("how", [["{}"], ["--config", "{}"], ["--config={}"]])
@pytest.mark.parametrize("name", ["quickstart/srpo", "quickstart/srpo.yaml", "recipes/quickstart/srpo.yaml"])
def test_a_recipe_is_a_file_or_the_name_of_a_shipped_one(
    how: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task, recipe = load_run([*(word.format(name) for word in how), *RUN])
    assert task.__name__ == "QueryRouting" and recipe.path == find_recipe("quickstart/srpo")


def test_paths_of_a_shipped_recipe_lie_in_the_package_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = "recipes/catalogues/router_r1.yaml"
    _, (arguments, _, _) = load_run(["Qwen2.5-3B-Instruct/srpo/router_r1", *RUN, "--use_vllm", "false"])
    assert Path(arguments.catalogue).read_text() == (ROOT / shipped).read_text()
    (tmp_path / shipped).parent.mkdir(parents=True)
    (tmp_path / shipped).write_text("mine")
    _, (arguments, _, _) = load_run(["Qwen2.5-3B-Instruct/srpo/router_r1", *RUN, "--use_vllm", "false"])
    assert arguments.catalogue == shipped


def test_the_catalogue_of_the_agent_has_the_prices_of_its_training() -> None:
    live = load_catalogue(ROOT / "recipes/catalogues/agent_live.yaml")
    priced = (
        "name",
        "price_in",
        "price_out",
        "price_cached",
        "cache_seconds",
        "cache_min_tokens",
        "cache_step_tokens",
    )
    for trained in (Junior().member, Senior().member):
        assert [getattr(live[trained.name], name) for name in priced] == [getattr(trained, name) for name in priced]


@pytest.mark.parametrize("old", OLD_KEYS)
def test_an_old_key_names_the_new_one(old: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"task: step_routing\n{old}: 1\n")
    with pytest.raises(RecipeError, match=rf"r.yaml:2: '{old}' is now '{OLD_KEYS[old]}'"):
        load_run([str(path)])
    with pytest.raises(RecipeError, match=rf"command line: '--{old}' is now '{OLD_KEYS[old]}'"):
        load_run(["--task", "step_routing", f"--{old}", "1"])
    new = {f.name for name in task_names() for f in fields(find_task(name).Arguments)} | {
        f.name for f in fields(RunArguments)
    }
    assert OLD_KEYS[old] in new and old not in new


@pytest.mark.parametrize("word", ["inf", ".inf"])
def test_infinity_is_written_in_both_ways(word: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"task: step_routing\ntrain_caps: [{word}, 1]\n")
    _, (arguments, _, _) = load_run([str(path), *RUN, "--heldout_caps", "4", word])
    assert arguments.train_caps == [math.inf, 1.0] and arguments.heldout_caps == [4.0, math.inf]


def test_rewards_are_a_list_of_names_with_weights(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("task: query_routing\nrewards: [{correctness: 1.0}, {cost: 0.2}]\n")
    assert load_run([str(path), *RUN])[1][0].rewards == [{"correctness": 1.0}, {"cost": 0.2}]
    words = ["--rewards", "{correctness: 2}", "{cost: 0.1}"]
    assert load_run([str(path), *RUN, *words])[1][0].rewards == [{"correctness": 2}, {"cost": 0.1}]


def test_words_of_the_command_line_are_what_the_key_wants() -> None:
    words = "--save_strategy no --report_to none --run_name 5 --warmup_steps 0.1 --optim adamw_torch --bf16 false"
    words += " --stop_strings </a> b --max_turn_tokens null --top_k 3 --no_log_completions --use_cpu"
    more = ["--generation_kwargs", "{use_cache: true}", "--task", "query_routing", "--output_dir", "out"]
    _, (_, _, args) = load_run([*more, *words.split()])
    assert args.save_strategy.value == "no" and args.run_name == "5" and args.warmup_steps == 0.1 and args.top_k == 3
    assert args.generation_kwargs == {"use_cache": True} and args.stop_strings == ["</a>", "b"]
    assert args.use_cpu is True and args.max_turn_tokens is None and args.log_completions is False


def paper_settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("model", ["Qwen3-4B", "Qwen3-8B"])
@pytest.mark.parametrize(
    # SRPO paper, Table 3 (specification, section 4.4): learning rate, prompts per optimiser step.
    ("objective", "learning_rate", "mini_batch"),
    [("grpo", 1e-6, 8), ("sdpo", 1e-5, 32), ("srpo", 5e-6, 32)],
)
def test_the_paper_s_settings_are_in_the_recipes(
    model: str, objective: str, learning_rate: float, mini_batch: int
) -> None:
    recipe = paper_settings(ROOT / "recipes" / model / objective / "routing.yaml")
    assert recipe["num_generations"] == 8 and recipe.get("generation_batch_size", 32 * 8) == 32 * 8
    assert recipe["prompts_per_step"] == mini_batch
    assert recipe["learning_rate"] == learning_rate
    assert (recipe["warmup_steps"], recipe["weight_decay"], recipe["max_grad_norm"]) == (10, 0.01, 1.0)
    assert recipe["lr_scheduler_type"] == "constant_with_warmup"
    assert recipe["chat_template_kwargs"] == {"enable_thinking": False}
    assert recipe["vllm_importance_sampling_clip_max"] == 2.0
    if objective != "sdpo":
        assert (recipe["epsilon_high"], recipe["beta"], recipe["scale_rewards"]) == (0.28, 0.0, "none")
    if objective != "grpo":
        assert (recipe["distillation_topk"], recipe["distillation_alpha"]) == (100, 0.5)
        assert (recipe["teacher_model_kind"], recipe["teacher_update_rate"]) == ("ema", 0.05)
        assert recipe["distillation_is_clip"] == 2.0 and recipe["distillation_add_tail"] is True
    if objective == "srpo":
        assert recipe["entropy_weight_beta"] == 1.0


def test_the_objectives_recipes_share_everything_but_the_objective_and_its_optimiser() -> None:
    for model in ("Qwen3-4B", "Qwen3-8B"):
        sdpo, srpo, grpo = (
            paper_settings(ROOT / "recipes" / model / name / "routing.yaml") for name in ("sdpo", "srpo", "grpo")
        )
        for key in ("table", "cost_weight", "format_weight", "max_completion_length", "num_train_epochs", "seed"):
            assert sdpo[key] == srpo[key] == grpo[key]
        differing = {key for key in srpo if srpo[key] != grpo.get(key)}
        own = {"objective", "learning_rate", "prompts_per_step", "output_dir"}
        assert own <= differing
        assert all(
            key.startswith(("distillation", "teacher", "entropy_weight", "success", "max_reprompt"))
            for key in differing - own
        )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    kinds = {"cpu": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kinds[path.stem]
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert config.num_processes == (1 if path.stem == "cpu" else 8)
