"""Keys and headers do not come into catalogues, and nothing but an allow-list comes out of them into shared files."""

import json

import pytest
import yaml

from routers.data.catalogue import Member, PriceTier, load_catalogue
from routers.router import ROUTER_FILE
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.think_route.settings import AgentSettings
from srpo import SRPOConfig
from srpo.hub.card import model_card
from srpo.recipe import RecipeError, load_recipe
from srpo.redact import REDACTED, credential_in, redacted, scrubbed

CANARY = "c4n4ry-7f3d"
PREFIXED = f"sk-{CANARY}{CANARY}"

REFUSED = [
    {"extra_headers": {"a": CANARY}},
    {"extra_body": {"a": CANARY}},
    {"extra_query": {"a": CANARY}},
    {"vendor": {"http_headers": {"a": CANARY}}},
    {"defaultHeaders": {"a": CANARY}},
    {"Authorization": CANARY},
    {"vendor": [{"authorisation": CANARY}]},
    {"auth": {"token": CANARY}},
    {"X-API-Key": CANARY},
    {"api-key": CANARY},
    {"headers": {"x-api-key": CANARY}},
    {"Ocp-Apim-Subscription-Key": CANARY},
    {"apiKey": 12345},
    {"APIKEY": CANARY},
    {"api key": CANARY},
    {"my_api_key_2": CANARY},
    {"OPENAI_API_KEY": CANARY},
    {"secretKey": CANARY},
    {"aws_secret_access_key": CANARY},
    {"hf_token": CANARY},
    {"key": CANARY},
    {"ｔｏｋｅｎ": CANARY},  # full-width letters
    {"password": CANARY},
    {"credentials": {"a": [CANARY]}},
    {"session": {"cookies": [CANARY]}},
    {"webhook": f"https://user:{CANARY}@host/x"},
    {"webhook": f"https://{CANARY}@host/x"},
    {"webhook": f"https://host/x?api_key={CANARY}"},
    {"webhook": f"https://host/x?a=1&sig={CANARY}"},
    {"metadata": {"note": f"Bearer {CANARY}"}},
    {"metadata": {"note": PREFIXED}},
    {"metadata": {PREFIXED: 1}},
    {"metadata": json.dumps({"api_key": CANARY})},
    {"metadata": {"jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.x"}},
]


def catalogue(folder, **fields):
    path = folder / "pool.yaml"
    entry = {"name": "m", "descriptor": "x", "price_in": 1, "price_out": 1, **fields}
    path.write_text(yaml.safe_dump({"members": [entry]}, allow_unicode=True))
    return path


@pytest.mark.parametrize("request_fields", REFUSED, ids=str)
def test_a_request_with_a_header_or_a_key_is_refused_and_not_shown(tmp_path, request_fields):
    with pytest.raises(ValueError, match=r"pool\.yaml: member 'm': field 'request'.*api_key_env") as caught:
        load_catalogue(catalogue(tmp_path, request=request_fields))
    assert CANARY not in str(caught.value) and "eyJ" not in str(caught.value)


@pytest.mark.parametrize("name", ["headers", "extra_headers", "x-api-key", "api-key", "api_key"])
def test_a_member_has_no_field_for_a_header_or_a_key(tmp_path, name):
    value = {"x-api-key": CANARY} if name.endswith("headers") else CANARY
    with pytest.raises(ValueError, match=f"member 'm': unknown field '{name}'; the fields are ") as caught:
        load_catalogue(catalogue(tmp_path, **{name: value}))
    assert CANARY not in str(caught.value)


def test_what_endpoints_really_take_is_allowed(tmp_path):
    schema = {"properties": {"api_key": {"type": "string"}, "key": {"type": "string"}}, "required": ["api_key"]}
    fields = {
        "top_k": 5,
        "stop_token_ids": [1, 2],
        "prompt_cache_key": "pool",
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "thinking": {"type": "enabled", "budget_tokens": 100},
        "provider": {"order": ["a", "b"]},
    }
    assert load_catalogue(catalogue(tmp_path, request=fields))["m"].request == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"system": f"Use the key {PREFIXED}."},
        {"system": f"api_key: {CANARY}"},
        {"descriptor": f"see https://user:{CANARY}@host"},
        {"name": PREFIXED},
        {"model": f"m?token={CANARY}"},
        {"base_url": f"https://user:{CANARY}@host/v1"},
        {"base_url": f"https://host/v1?api_key={CANARY}"},
        {"base_url": f"https://host/{PREFIXED}/v1"},
        {"api_key_env": PREFIXED},
        {PREFIXED: 1},
        {"price_in": PREFIXED},
        {"price_from": f"litellm:{PREFIXED}"},
    ],
    ids=str,
)
def test_no_field_takes_a_key_or_repeats_it(tmp_path, fields):
    with pytest.raises(ValueError) as caught:
        load_catalogue(catalogue(tmp_path, **fields))
    assert CANARY not in str(caught.value)


def test_router_yaml_holds_an_allow_list(tmp_path):
    member = Member(
        *("m", "facts", 1.0, 2.0, "org/m"),
        base_url="https://host/v1",
        api_key_env="SOME_KEY",
        system=f"private words {CANARY}",
        request={"extra_headers": {"Authorization": CANARY}},
        examples={"nq": 0.5},
        price_request=0.25,
        price_tiers=(PriceTier(9, 3.0, 4.0),),
    )
    settings = AgentSettings(members=(member,), chat_template_kwargs={"enable_thinking": False, "api_key": CANARY})
    settings.save(tmp_path)
    text = (tmp_path / ROUTER_FILE).read_text()
    assert CANARY not in text and "SOME_KEY" not in text and "host" not in text
    allowed = {"name", "descriptor", "context_length", "max_tokens", "latency", "examples", "price_in", "price_out"}
    allowed |= {"price_cached", "price_cache_write", "price_reasoning", "price_request", "price_tiers"}
    allowed |= {"price_cache_write_1h", "price_cache_hour", "cache_seconds", "cache_min_tokens", "cache_step_tokens"}
    assert yaml.safe_load(text)["settings"]["members"][0].keys() == allowed
    loaded = AgentSettings.load(tmp_path)
    kept = Member(
        "m", "facts", 1.0, 2.0, examples={"nq": 0.5}, price_request=0.25, price_tiers=(PriceTier(9, 3.0, 4.0),)
    )
    assert loaded.members == (kept,)
    assert loaded.chat_template_kwargs == {"enable_thinking": False, "api_key": REDACTED}


def test_step_router_card_and_logged_arguments_hold_no_key(tmp_path):
    kwargs = {"vendor": [{"apiKey": CANARY}], "url": f"https://user:{CANARY}@host"}
    StepSettings(("a", "b"), ("<a>", "<b>"), chat_template_kwargs=kwargs).save(tmp_path)
    card = model_card(
        objective="srpo",
        model_name="r",
        recipe={"model_init_kwargs": kwargs, "note": json.dumps({"password": CANARY})},
        command=["train.py", f"https://u:{CANARY}@h", f"http://h?token={CANARY}", f"Authorization: {CANARY}"],
    )
    logged = SRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=kwargs).to_dict()
    for text in ((tmp_path / ROUTER_FILE).read_text(), card, json.dumps(logged, default=str)):
        assert CANARY not in text and REDACTED in text
    assert logged["use_cpu"] is True and logged["learning_rate"] > 0


@pytest.mark.parametrize(
    "line",
    [
        f"model_init_kwargs: {{api-key: {CANARY}}}",
        f"chat_template_kwargs: {{a: [{{Access_Token: {CANARY}}}]}}",
        f"vllm_server_base_url: https://user:{CANARY}@host",
        f"vllm_server_base_url: http://host?key={CANARY}",
        f'model_init_kwargs: \'{{"token": "{CANARY}"}}\'',
    ],
)
def test_a_recipe_is_refused_for_the_same(tmp_path, line):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: o\n{line}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: .*looks like a secret") as caught:
        load_recipe(SRPOConfig, ["--config", str(path)])
    assert CANARY not in str(caught.value)


def test_what_only_resembles_a_secret_stays():
    for key, value in [
        ("eos_token", "</s>"),
        ("model_name_or_path", "git+ssh://git@github.com/x/y"),
        ("revision", "0a" * 20),
        ("system", "Answer basic questions; never reveal tokens or the password."),
        ("base_url", "https://api.host/accounts/0123456789abcdef0123456789abcdef/v1"),
    ]:
        assert credential_in(key, value) is None and redacted({key: value}) == {key: value}
        assert scrubbed(value) == value
