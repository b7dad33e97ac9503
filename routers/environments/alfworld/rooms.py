"""Rooms, furniture and things that games are generated from: our own tables in ALFWorld's vocabulary."""

from dataclasses import dataclass

OPENABLE = frozenset("cabinet drawer fridge microwave safe laundryhamper".split())
"""Kinds of receptacle that have a door, closed at the start."""

SHARES = {"coffeemachine": "countertop", "toaster": "countertop"}
"""Kinds of receptacle that stand on another kind: the agent reaches both from one location."""


@dataclass(frozen=True)
class Furniture:
    """How many of a kind of receptacle a room has: at least, and in the largest room."""

    kind: str
    least: int
    most: int


@dataclass(frozen=True)
class ThingKind:
    """A kind of thing: what can be done to it, and where it may lie."""

    kind: str
    flags: frozenset[str]
    places: tuple[str, ...]


def _room(text: str) -> tuple[Furniture, ...]:
    return tuple(Furniture(kind, int(least), int(most)) for kind, least, most in (w.split(":") for w in text.split()))


ROOMS = {
    "kitchen": _room(
        "fridge:1:1 microwave:1:1 sinkbasin:1:1 countertop:1:3 cabinet:2:16 drawer:2:10 stoveburner:2:4 shelf:0:4 "
        "diningtable:0:2 garbagecan:1:1 coffeemachine:1:1 toaster:1:1"
    ),
    "bathroom": _room(
        "sinkbasin:1:2 bathtubbasin:0:1 toilet:1:1 countertop:1:2 cabinet:2:10 drawer:0:8 shelf:0:4 garbagecan:1:1 "
        "towelholder:1:2 laundryhamper:0:1"
    ),
    "bedroom": _room("bed:1:1 desk:1:2 drawer:3:16 dresser:0:1 sidetable:1:2 shelf:0:8 garbagecan:1:1 safe:0:1"),
    "livingroom": _room(
        "sofa:1:2 armchair:0:2 coffeetable:1:2 sidetable:1:3 drawer:2:14 cabinet:0:10 shelf:0:8 tvstand:0:1 "
        "garbagecan:1:1 safe:0:1"
    ),
}

_FLAGS = {"c": "cleanable", "h": "heatable", "k": "coolable", "s": "sliceable", "r": "isReceptacleObject"}


def _things(text: str) -> tuple[ThingKind, ...]:
    found = []
    for line in text.strip().splitlines():
        kind, letters, places = line.split()
        flags = frozenset({"pickupable"} | {_FLAGS[letter] for letter in letters.strip("-")})
        found.append(ThingKind(kind, flags, tuple(places.split(","))))
    return tuple(found)


THINGS = {
    "kitchen": _things("""
        mug chk countertop,cabinet,shelf,diningtable,coffeemachine,sinkbasin,microwave,fridge,drawer
        cup chk countertop,cabinet,shelf,diningtable,sinkbasin,microwave,fridge
        plate chkr countertop,cabinet,shelf,diningtable,sinkbasin,microwave,fridge
        bowl chkr countertop,cabinet,shelf,diningtable,sinkbasin,microwave,fridge
        pan ckr countertop,cabinet,stoveburner,diningtable,sinkbasin,fridge
        pot ckr countertop,cabinet,stoveburner,shelf,sinkbasin,fridge
        apple chks countertop,diningtable,fridge,microwave,garbagecan,sinkbasin
        tomato chks countertop,diningtable,fridge,microwave,garbagecan,sinkbasin
        potato chks countertop,diningtable,fridge,microwave,garbagecan,sinkbasin
        egg chk countertop,diningtable,fridge,microwave,garbagecan,sinkbasin
        lettuce cks countertop,diningtable,fridge,garbagecan,sinkbasin
        bread hks countertop,diningtable,fridge,microwave,cabinet,garbagecan
        fork c countertop,drawer,diningtable,sinkbasin
        spoon c countertop,drawer,diningtable,sinkbasin
        butterknife c countertop,drawer,diningtable,sinkbasin
        spatula c countertop,drawer,diningtable,sinkbasin
        ladle c countertop,drawer,diningtable,sinkbasin
        dishsponge c countertop,drawer,cabinet,sinkbasin,shelf
        soapbottle - countertop,cabinet,drawer,shelf,garbagecan
        saltshaker - countertop,cabinet,drawer,shelf,diningtable
        peppershaker - countertop,cabinet,drawer,shelf,diningtable
    """),
    "bathroom": _things("""
        soapbar c countertop,cabinet,drawer,shelf,sinkbasin,bathtubbasin,toilet,garbagecan
        soapbottle - countertop,cabinet,drawer,shelf,toilet,garbagecan
        spraybottle - countertop,cabinet,drawer,shelf,toilet,garbagecan
        toiletpaper - countertop,cabinet,drawer,shelf,toilet,garbagecan
        candle - countertop,cabinet,drawer,shelf,toilet
        cloth c countertop,cabinet,drawer,shelf,bathtubbasin,laundryhamper
        handtowel - countertop,cabinet,towelholder,laundryhamper
        tissuebox - countertop,cabinet,drawer,shelf,toilet,garbagecan
    """),
    "bedroom": _things("""
        book - bed,desk,drawer,dresser,sidetable,shelf
        pen - desk,drawer,dresser,sidetable,shelf,garbagecan
        pencil - desk,drawer,dresser,sidetable,shelf,garbagecan
        cellphone - bed,desk,drawer,dresser,sidetable,shelf,safe
        keychain - desk,drawer,dresser,sidetable,shelf,safe
        creditcard - desk,drawer,dresser,sidetable,shelf,safe
        cd - desk,drawer,dresser,sidetable,shelf,safe,garbagecan
        alarmclock - desk,dresser,sidetable,shelf,drawer
        watch - desk,drawer,dresser,sidetable,shelf,safe
        bowl chkr desk,dresser,sidetable,shelf
        pillow - bed
        laptop - bed,desk
    """),
    "livingroom": _things("""
        remotecontrol - sofa,armchair,coffeetable,sidetable,drawer,cabinet,shelf,tvstand
        newspaper - sofa,armchair,coffeetable,sidetable,drawer,cabinet,garbagecan
        book - sofa,coffeetable,sidetable,drawer,cabinet,shelf
        keychain - sofa,armchair,coffeetable,sidetable,drawer,cabinet,shelf,safe
        creditcard - sofa,armchair,coffeetable,sidetable,drawer,cabinet,shelf,safe
        watch - coffeetable,sidetable,drawer,cabinet,shelf,safe,tvstand
        vase - coffeetable,sidetable,shelf,cabinet,tvstand
        statue - coffeetable,sidetable,shelf,cabinet,tvstand
        tissuebox - coffeetable,sidetable,drawer,cabinet,shelf,garbagecan
        box r sofa,armchair,coffeetable,sidetable,cabinet
        laptop - sofa,coffeetable,sidetable
    """),
}

LAMPS = {
    "bedroom": ("desklamp", ("desk", "sidetable", "dresser", "shelf")),
    "livingroom": ("floorlamp", ("sidetable", "coffeetable", "shelf", "tvstand")),
}
"""Room -> its kind of lamp, and what it may stand on."""
