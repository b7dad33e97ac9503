"""What the server says of itself: `/openapi.json`, and `/docs` as one page that loads nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from routers.serving.fields import AGENT_FIELDS, OURS, PASSED, REFUSED, Field

PATHS = {
    "/": ("get", "Where things are."),
    "/v1/chat/completions": ("post", "Answer a conversation, whole or as a stream of events."),
    "/v1/responses": ("post", "The same in the shape of OpenAI's responses, without state: no previous_response_id."),
    "/v1/models": ("get", "The router, as the one model."),
    "/v1/models/{model}": ("get", "The router."),
    "/health": ("get", "Whether the server is up."),
    "/metrics": ("get", "Counters for Prometheus."),
    "/ui": ("get", "A page to watch the server by (--ui)."),
    "/openapi.json": ("get", "This, for programs."),
    "/docs": ("get", "This, for people."),
}
HEADERS = {
    "x-srpo-member": "who answered",
    "x-srpo-decision": "what the policy wrote, percent-encoded, its beginning; of a router of steps: why",
    "x-srpo-probabilities": "of the likeliest members, by the router: NAME=P, NAME=P",
    "x-srpo-cost-usd": "of the whole request; a stream says it in its last chunk, usage.cost_usd, if it was asked to",
    "x-srpo-policy-usd": "of the router's own tokens",
    "x-srpo-tried": "members that were asked before, or could not be",
    "x-srpo-conversation": "of a router of steps: the conversation; send it back to stay in it",
}
_KEYLESS = ("/", "/health", "/ui", "/docs", "/openapi.json")


def openapi(name: str) -> dict[str, Any]:
    """The document of OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for path, (method, words) in PATHS.items():
        told: dict[str, Any] = {"summary": words, "responses": {"200": {"description": "as OpenAI's"}}}
        if method == "post":
            kind = "ChatRequest" if path.endswith("completions") else "ResponseRequest"
            schema = {"$ref": f"#/components/schemas/{kind}"}
            told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
            told["responses"]["default"] = {"description": "an error, in OpenAI's shape"}
            heads = {header: {"description": what, "schema": {"type": "string"}} for header, what in HEADERS.items()}
            told["responses"]["200"]["headers"] = heads
        if "{model}" in path:
            told["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path in _KEYLESS:
            told["security"] = []
        paths[path] = {method: told}
    fields = {field: _described(one) for field, one in {**OURS, **PASSED}.items()}
    chat = {"type": "object", "required": ["model", "messages"], "properties": fields, "additionalProperties": False}
    response = {"type": "object", "required": ["model", "input"]}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"srpo: {name}", "version": "1"},
        "paths": paths,
        "security": [{"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"ChatRequest": chat, "ResponseRequest": response},
        },
    }


def _described(field: Field) -> dict[str, str]:
    return {"description": f"{field.says}; {field.must}" if field.says else field.must}


def start_page(name: str) -> dict[str, Any]:
    """What is where: `METHOD /path` -> what it does."""
    return {
        "name": name,
        "about": "a router behind OpenAI's API: use /v1 as the base URL of a client, and this name as its model",
        "paths": {f"{method.upper()} {path}": words for path, (method, words) in PATHS.items()},
    }


def docs_page(name: str) -> str:
    """HTML."""
    paths = [(f"{method.upper()} {path}", words) for path, (method, words) in PATHS.items()]
    rows = [(field, one.must, one.says) for field, one in {**OURS, **PASSED}.items()]
    style = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    style += "td,th{text-align:left;vertical-align:top;padding:.2em 1em .2em 0}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{style}</style>"
        f"<h1>{escape(name)}</h1><p>A router behind OpenAI's API: <a href=/openapi.json>openapi.json</a>."
        f"<h2>Paths</h2>{_table(paths)}<h2>Fields of a chat request</h2>"
        f"<p>A think/route agent takes {escape(', '.join(AGENT_FIELDS))}; a proxy passes every field on.{_table(rows)}"
        f"<h2>Refused</h2>{_table(list(REFUSED.items()))}<h2>Headers of a reply</h2>{_table(list(HEADERS.items()))}"
    )


def _table(rows: list[Any]) -> str:
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
