"""Which files of two folders belong together: by their names, whatever the usual data sets add to them."""

import re
from collections import defaultdict
from collections.abc import Iterable

# 0001x4, 0001x4m, 0001x4w1 (DIV2K); NAME_HR, NAME_LR4 (RealSR); 97_x1, 97_x4 (DRealSR); img_001_SRF_4_HR (SelfExSR); baby_LRBI_x4 (RCAN)
_ADDED = re.compile(r"(?:[-_. ]?x(?:[1-8]|16)(?:[mdw]\d?)?|[-_. ](?:hr|gt|hq|high|lr|lq|low|lrbi|lrbd|lrdn)\d{0,2})+$", re.IGNORECASE)


def partners(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """name -> the one of `others` that belongs to it, both without suffixes of files, in the order of `names`.

    That is the one of the same name; of those that are left, the one that differs by no more than what the usual sets add. A name that
    several could belong to has no partner.
    """
    names, rest = list(names), set(others)
    found = {name: name for name in names if name in rest}
    rest -= found.keys()
    mine, theirs = _by_core(name for name in names if name not in found), _by_core(rest)
    found |= {alike[0]: theirs[core][0] for core, alike in mine.items() if len(alike) == len(theirs[core]) == 1}
    return {name: found[name] for name in names if name in found}


def _by_core(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[_ADDED.sub("", name)].append(name)
    return found
