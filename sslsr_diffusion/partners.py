"""Which files of two folders belong together: by their names, whatever the usual data sets add to them."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

# 0001x4, 0001x4m, 0001x4w1 (DIV2K); NAME_HR, NAME_LR4 (RealSR); 97_x1, 97_x4 (DRealSR); img_001_SRF_4_HR (SelfExSR); baby_LRBI_x4 (RCAN)
_SIZE = r"x(?:[1-8]|16)(?:[mdw]\d?)?"
_MARK = rf"[-_. ](?:{_SIZE}|(?:hr|gt|hq|high|lr|lq|low|lrbi|lrbd|lrdn)\d{{0,2}})"
_MARKS = re.compile(rf"(?:{_MARK}(?:{_SIZE})?)+$", re.IGNORECASE)
_ADDED = re.compile(rf"(?:{_MARK}|{_SIZE})$", re.IGNORECASE)


def partners(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """name -> the one of `others` that belongs to it, both without suffixes of files, in the order of `names`.

    That is the one of the same name; of those that are left, the one that is the name and what the usual sets add, or the reverse; then
    the one that differs in what they add. A size without separator (fox2 may be an animal's number) is such a thing on one side alone.
    A name that several could belong to has no partner.
    """
    names, rest = list(names), set(others)
    found = {name: name for name in names if name in rest}
    for own in (str, _unmarked):
        rest -= set(found.values())
        found |= _unique([name for name in names if name not in found], rest, own)
    return {name: found[name] for name in names if name in found}


def _unique(names: Iterable[str], others: Iterable[str], own: Callable[[str], str]) -> dict[str, str]:
    """Pairs in which one's `own` name is the other's without some of its additions, where neither could belong to a third."""
    named, starting = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for other in others:
        named[own(other)].add(other)
        for start in _starts(other):
            starting[start].add(other)
    could = {name: starting[own(name)].union(*(named[start] for start in _starts(name))) for name in names}
    claims = Counter(other for several in could.values() for other in several)
    return {name: other for name, several in could.items() if len(several) == 1 for other in several if claims[other] == 1}


def _starts(name: str) -> list[str]:
    """The name, and what is left of it when one addition after the other is taken off."""
    starts = [name]
    while (start := _ADDED.sub("", starts[-1])) != starts[-1]:
        starts.append(start)
    return starts


def _unmarked(name: str) -> str:
    return _MARKS.sub("", name)
