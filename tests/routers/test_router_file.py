"""router.yaml: written, read strictly, and the pool of a router that is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from routers import Decision, Member, Router, load_router
from routers.data.billing import PriceTier
from routers.language.grammar import ROUTER_R1, Grammar
from routers.router import (
    ROUTER_FILE,
    CannotDo,
    members_now,
    plain_settings,
    read_router,
    settings_from,
    write_router,
)

MEMBERS = (
    Member("small", "cheap", 0.1, 0.4, latency=0.5, examples={"maths": 0.25}),
    Member("large", "good", 1.0, 4.0, price_tiers=(PriceTier(1000, 2.0, 8.0),), base_url="http://host/v1"),
)


@dataclass(frozen=True)
class Settings:
    members: tuple[Member, ...]
    style: Literal["long", "short"] = "long"
    grammar: Grammar = ROUTER_R1
    weights: tuple[float, ...] = ()
    prices: tuple[float, float] = (0.0, 0.0)
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    typical: dict[str, tuple[float, float]] = field(default_factory=dict)


FULL = Settings(
    MEMBERS, "short", Grammar(route="search"), (0.0, 0.5), (1.0, 2.0), 7, {"a": [1]}, {"small": (10.0, 2.5)}
)


def written(folder: Path, **changes: Any) -> Path:
    document = yaml.safe_load(write_router(folder, "query_routing", plain_settings(FULL)).read_text())
    (folder / ROUTER_FILE).write_text(yaml.safe_dump(document | changes))
    return folder


def test_what_is_written_is_read_and_addresses_stay_here(tmp_path: Path) -> None:
    path = write_router(tmp_path, "query_routing", plain_settings(FULL), {"table": "sha256:" + "ab" * 32})
    file = read_router(tmp_path)
    found = file.settings_of(Settings, "query_routing")
    assert (file.kind, file.made_from) == ("query_routing", {"table": "sha256:" + "ab" * 32})
    assert found.members[0] == MEMBERS[0] and found.members[1].price_tiers == MEMBERS[1].price_tiers
    assert "http" not in path.read_text() and found.members[1].base_url is None
    assert found == Settings(found.members, *list(vars(FULL).values())[1:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "chess"}, "kind 'chess' is unknown; use one of query_routing, think_route, step_routing"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"settings": [1]}, r"settings is \[1\]; it must be a mapping"),
        ({"srpo": 2}, "srpo is 2; it must be a text"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_is_wrong(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"{ROUTER_FILE}: {words}"):
        read_router(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lenght": 3}, "unknown key 'lenght'; the keys are members, style"),
        ({"style": "odd"}, "style is 'odd'; it must be one of long, short"),
        ({"limit": True}, "limit is True; it must be a whole number"),
        ({"weights": 0.5}, "weights is 0.5; it must be a list"),
        ({"weights": [0.5, "x"]}, r"weights\[1\] is 'x'; it must be a number"),
        ({"prices": [1.0]}, r"prices is \[1.0\]; it must be a list of 2"),
        ({"grammar": {"tag": "a"}}, "grammar: unknown key 'tag'"),
        ({"grammar": {"route": "a b"}}, "grammar: tag name 'a b'"),
        ({"members": [{"name": "a", "descriptor": "b", "base_url": "http://elsewhere"}]}, "unknown key 'base_url'"),
        ({"members": [{"name": "a", "descriptor": "b", "price_in": "x", "price_out": 1}]}, "field 'price_in' is 'x'"),
        ({"members": None}, "members is None; it must be a list"),
    ],
)
def test_settings_are_read_strictly(tmp_path: Path, changes: Any, words: str) -> None:
    file = read_router(written(tmp_path, settings=plain_settings(FULL) | changes))
    with pytest.raises(ValueError, match=rf"{ROUTER_FILE}: settings: .*{words}"):
        file.settings_of(Settings, "query_routing")


def test_a_field_without_default_must_be_there() -> None:
    with pytest.raises(ValueError, match="the key 'members' is missing"):
        settings_from(Settings, {"limit": 3})


def test_a_folder_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no router.yaml, so nothing says whom it routes to"):
        load_router(tmp_path)
    with pytest.raises(OSError, match="is no folder here"):
        load_router(tmp_path / "missing")


def test_no_secret_is_written(tmp_path: Path) -> None:
    settings = plain_settings(Settings(MEMBERS, options={"api_key": "sk-abcdefghijklmnopqrstuvwx"}))
    assert "sk-abc" not in write_router(tmp_path, "query_routing", settings).read_text()


def test_members_are_dropped_added_and_repriced() -> None:
    now = {"new": Member("new", "fresh", 2.0, 2.0), "small": Member("small", "cheaper", 0.05, 0.2)}
    assert members_now(MEMBERS) == MEMBERS
    assert [m.name for m in members_now(MEMBERS, ["large"])] == ["large"]
    small, new = members_now(MEMBERS, catalogue=now)
    assert (small.name, small.price_in, small.descriptor, small.latency, small.examples) == (
        *("small", 0.05, "cheaper", 0.5),
        {"maths": 0.25},
    )
    assert new == now["new"]
    with pytest.raises(ValueError, match="there is no member 'gpt-34' to route to; there are small, large"):
        members_now(MEMBERS, ["gpt-34"])
    with pytest.raises(ValueError, match="at least one member"):
        members_now(MEMBERS, [])


def test_what_a_kind_cannot_do_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Always(Router):
        kind = "always"

        def route(self, query: str, **_: Any) -> Decision:
            return Decision(("small",), {"small": 1.0})

    with Always() as router:
        assert router.route("?").member == "small"
        with pytest.raises(CannotDo, match="a router of kind always cannot learn online"):
            router.update("?", router.route("?"), {})
        with pytest.raises(CannotDo, match="cannot be saved"):
            router.save(tmp_path)
    assert Decision((), {}).member is None
