"""Members' prices: show those of a price list, and refresh them from litellm's table, with a diff.

srpo prices show pool.yaml
srpo prices refresh pool.yaml --source model_prices_and_context_window.json
srpo prices refresh pool.yaml --write --source \\
    https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json

Refreshed are members that say `price_from: litellm:KEY`. The file that the catalogue names as `price_table` is theirs;
--write replaces their entries in it, whole or not at all, and nothing else. Trained routers keep the prices of their
training, which stand in their router.yaml; `load_router(ROUTER, catalogue="pool.yaml")` and --catalogue of the other
commands re-price them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from routers.data.catalogue import Member, load_catalogue, price_table, read_catalogue, read_member
from routers.data.prices import URL, entries_of, litellm_table, parsed_table
from srpo.cli import Parser

FIELDS = {
    "price_in": "in",
    "price_out": "out",
    "price_cached": "cached",
    "price_cache_write": "write",
    "price_cache_write_1h": "write 1h",
    "price_cache_hour": "kept/hour",
    "price_reasoning": "reasoning",
    "price_request": "request",
    "price_tiers": "tiers above",
    "cache_seconds": "cache s",
    "cache_min_tokens": "min",
    "cache_step_tokens": "step",
    "context_length": "context",
}
"""Field of a member that prices decide or that a price table tells -> its column."""
_PLAIN = {"price_cache_hour": 0.0, "price_request": 0.0, "cache_min_tokens": 0, "cache_step_tokens": 1}
"""What a field says that nobody states."""
LARGEST_TABLE = 64 * 1024 * 1024
"""Bytes; litellm's has 5 MB."""
_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|refresh")
    show = verbs.add_parser("show", help="each member's prices, in USD per million tokens")
    refresh = verbs.add_parser("refresh", help="what a newer table changes; with --write, keep it")
    for verb in (show, refresh):
        verb.add_argument("catalogue", type=Path, metavar="CATALOGUE.yaml")
    refresh.add_argument("--source", metavar="FILE|URL", help="litellm's table; default: the installed litellm's")
    refresh.add_argument("--out", type=Path, metavar="FILE", help="the table to write; default: the price_table")
    refresh.add_argument("--write", action="store_true", help="write it; without, nothing is changed")
    args = parser.parse_args(argv)
    if args.verb == "show":
        print(shown(load_catalogue(args.catalogue)))
    else:
        print(refreshed(args.catalogue, args.source, args.out, write=args.write))


def shown(members: Mapping[str, Member]) -> str:
    """A table of prices; columns that no member needs are left out."""
    rows = [["USD per million tokens", *FIELDS.values()]]
    rows += [[member.name, *(_cell(member, name) for name in FIELDS)] for member in members.values()]
    kept = [j for j in range(len(rows[0])) if not j or any(row[j] for row in rows[1:])]
    widths = [max(len(row[j]) for row in rows) for j in kept]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[j].rjust(w) for j, w in zip(kept[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def refreshed(catalogue: Path, source: str | None = None, out: Path | None = None, write: bool = False) -> str:
    """What a table changes about a catalogue's members, in words; with `write`, their entries are kept in a file.

    Args:
        catalogue: whose members say `price_from`.
        source: litellm's table, a file or an address; None: the installed litellm's.
        out: the file; None: the `price_table` of the catalogue.
        write: or nothing is changed.

    Raises:
        ValueError: the table cannot be had, or says of a member what cannot be; names the member and the field, and
            nothing is written.
    """
    document = read_catalogue(catalogue)
    table = price_table(catalogue, document)
    keys = {str(e["price_from"]).partition(":")[2] for e in document["members"] if isinstance(e, dict) and _from(e)}
    if not keys:
        raise ValueError(
            f"{catalogue}: no member says price_from, so there is nothing to refresh; write price_from: litellm:KEY "
            "in place of prices"
        )
    target = table if out is None else out
    if write and target is None:
        raise ValueError(f"{catalogue}: names no price_table to write; add price_table: prices.json, or give --out")
    newer = litellm_table() if source is None else _read(source)
    before = _before(catalogue, document, table)
    after = load_catalogue(catalogue, newer)
    lines = _changes(document, before, after)
    changes = sum(not line.startswith(" ") and not line.endswith("unchanged") for line in lines)
    own = [member.name for member, e in zip(after.values(), document["members"], strict=True) if not _from(e)]
    if own:
        lines.append(f"without price_from, left as they are: {', '.join(own)}")
    told = f"{changes} of {len(after)} members change"
    if not write:
        return "\n".join([*lines, f"{told}. Nothing is written: --write keeps this in {target or '--out FILE'}"])
    assert target is not None
    kept = litellm_table(target) if target.exists() else {}
    for key in sorted(keys):
        kept |= entries_of(newer, key)
    _write(target, kept)
    lines.append(f"{told}; written to {target}")
    if table is None or target.resolve() != table.resolve():
        lines.append(
            f"{catalogue} does not read it yet: write price_table: {os.path.relpath(target, catalogue.parent)}"
        )
    return "\n".join(lines)


def _before(catalogue: Path, document: Mapping[str, Any], table: Path | None) -> dict[str, Member]:
    """Members as the catalogue prices them today; without those of whom its table says nothing that can be used."""
    found = {}
    read = functools.cache(lambda: litellm_table(table))
    for position, entry in enumerate(document["members"]):
        try:
            member = read_member(entry, read, catalogue, position)
        except ValueError:
            continue
        found[member.name] = member
    return found


def _from(entry: Any) -> bool:
    return isinstance(entry, dict) and "price_from" in entry


def _changes(document: Mapping[str, Any], before: Mapping[str, Member], after: Mapping[str, Member]) -> list[str]:
    """A line per member that says `price_from`, and one per field that changes."""
    lines = []
    for entry, member in zip(document["members"], after.values(), strict=True):
        if not _from(entry):
            continue
        old = before.get(member.name)
        changed = [name for name in FIELDS if old is None or getattr(old, name) != getattr(member, name)]
        found = [_change(name, None if old is None else getattr(old, name), getattr(member, name)) for name in changed]
        found = [line for line in found if line]
        lines.append(f"{member.name} ({entry['price_from']}){'' if found else ': unchanged'}")
        lines += [f"  {line}" for line in found]
    return lines


def _change(name: str, old: Any, new: Any) -> str:
    before, after = _told(name, old), _told(name, new)
    if before == after:
        return ""
    both = isinstance(old, float) and isinstance(new, float) and old
    percent = f"  ({100 * (new - old) / old:+.1f} %)" if both else ""
    return f"{name:20} {before or '-'} -> {after or '-'}{percent}"


def _cell(member: Member, name: str) -> str:
    return _told(name, getattr(member, name))


def _told(name: str, value: Any) -> str:
    """A field in words; empty where nobody states it."""
    if value is None or value == _PLAIN.get(name):
        return ""
    if name == "price_tiers":
        return "; ".join(_tier(tier) for tier in value)
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _tier(tier: Any) -> str:
    stated = {f.name: getattr(tier, f.name) for f in dataclasses.fields(tier) if f.name != "above"}
    return f"{tier.above}: " + " ".join(f"{FIELDS[n]} {price:g}" for n, price in stated.items() if price is not None)


def _read(source: str) -> dict[str, Any]:
    """A table from a file or an address.

    Raises:
        ValueError: it cannot be had; names the source and why.
    """
    if "://" not in source:
        return litellm_table(source)
    import httpx

    host = httpx.URL(source).host if source.startswith(("https://", "http://")) else ""
    if not (source.startswith("https://") or host in ("127.0.0.1", "localhost")):
        raise ValueError(f"--source {source}: give a file, or an address that begins with https://, such as {URL}")
    try:
        with httpx.stream("GET", source, timeout=_SECONDS, follow_redirects=False) as response:
            if response.status_code != 200:
                raise ValueError(
                    f"--source {source}: the server answers {response.status_code}; give {URL}, or a file"
                )
            text = b"".join(_bounded(response.iter_bytes(), source)).decode("utf-8-sig")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeDecodeError) as error:
        raise ValueError(f"--source {source}: cannot be read ({error}); download {URL} and give the file") from error
    return parsed_table(text, source)


def _bounded(chunks: Iterator[bytes], source: str) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > LARGEST_TABLE:
            raise ValueError(f"--source {source}: has more than {LARGEST_TABLE:,} bytes, and is no price table")
        yield chunk


def _write(path: Path, table: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
            file.write("\n")
        os.chmod(draft, path.stat().st_mode if path.exists() else 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
