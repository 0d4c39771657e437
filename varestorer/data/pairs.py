"""Which bad image belongs to which good one, by their names alone.

Public sets write side and scale into the names: `0801x4` and `0801`, `Canon_001_LR4` and `Canon_001_HR`,
`baby_LRBI_x4` and `baby_HR_x4`. An ending is cut only where the rest is the name of just one partner, so that `box1`
stays `box1`; where two images could be meant, neither is taken.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from varestorer.utils.scanning import natural_key

_SCALE = r"x(?:[2-9]|1[0-6])(?:[mwdb]\d?)?"  # DIV2K calls its mild, wild and difficult ones 0801x4m, 0801x4w1, 0801x4d
_LOW_ENDINGS = (
    rf"(?:[ _-]|(?<=\d)){_SCALE}",
    r"[ _-](?:bic(?:ubic)?[ _-]?)?(?:lr|lq)(?:bi|bd|dn)?(?:[ _-]?x?\d{1,2})?",
    r"[ _-]bic(?:ubic)?(?:[ _-]?x?\d{1,2})?",
)
_HIGH_ENDINGS = (r"[ _-](?:hr|hq|gt)(?:mod\d{1,2})?(?:[ _-]?x?\d{1,2})?", r"[ _-]x\d{1,2}")

Images = Mapping[str, Path]
"""Images of a side by name: path inside its folder, without extension."""


@dataclass
class Matching:
    """What belongs together.

    Attributes:
        pairs: (name, bad image, good image), in natural order of the names.
        unpaired: images without a partner, likewise.
        ambiguous: images that could belong together in several ways; they are in no pair.
    """

    pairs: list[tuple[str, Path, Path]] = field(default_factory=list)
    unpaired: list[Path] = field(default_factory=list)
    ambiguous: list[tuple[Path, ...]] = field(default_factory=list)


def match_names(low: Images, high: Images) -> Matching:
    """Pair the images of two sides: equal names first, then those that are equal without their endings."""
    lows, highs = set(low), set(high)
    low_forms = partial(_forms, endings=_LOW_ENDINGS + _shared_scale(low))
    high_forms = partial(_forms, endings=_HIGH_ENDINGS)
    found: dict[str, list[tuple[str, str]]] = {}
    ambiguous: dict[tuple[Path, ...], None] = {}
    for forms in ((_whole, _whole), (low_forms, _whole), (_whole, high_forms), (low_forms, high_forms)):
        partners, rivals = _partners(lows, highs, *forms), _partners(highs, lows, *reversed(forms))
        for name, others in partners.items():
            contending = sorted({rival for other in others for rival in rivals[other]}, key=natural_key)
            if len(others) == 1 and contending == [name]:
                shared = max(low_forms(name) & high_forms(others[0]), key=len)
                found.setdefault(shared, []).append((name, others[0]))
            elif others:
                ambiguous[*(low[rival] for rival in contending), *(high[other] for other in others)] = None
        lows -= {name for name, others in partners.items() if others}
        highs -= {other for other, names in rivals.items() if names}
    pairs = [(name, low[one], high[other]) for name, [(one, other), *more] in found.items() if not more]
    twice = [same for same in found.values() if len(same) > 1]  # two pairs would get one name
    unpaired = [(name, low[name]) for name in lows] + [(name, high[name]) for name in highs]
    return Matching(
        sorted(pairs, key=lambda pair: natural_key(pair[0])),
        [path for _, path in sorted(unpaired, key=lambda item: natural_key(item[0]))],
        [*ambiguous, *(tuple(path for one, other in same for path in (low[one], high[other])) for same in twice)],
    )


def _shared_scale(names: Iterable[str]) -> tuple[str, ...]:
    """After a letter a scale is an ending (`babyx4`) only where all names have it: `matrix2` is a name."""
    found = {match[0].lower() if (match := re.search(rf"(?i){_SCALE}$", name)) else "" for name in names}
    return (re.escape(found.pop()),) if len(found) == 1 and "" not in found else ()


def _whole(name: str) -> set[str]:
    return {name}


def _forms(name: str, endings: Iterable[str]) -> set[str]:
    folder, slash, stem = name.rpartition("/")
    cut = (re.fullmatch(rf"(?is)(.+?){ending}", stem) for ending in endings)
    return {name, *(folder + slash + match[1] for match in cut if match)}


Forms = Callable[[str], set[str]]


def _partners(names: set[str], others: set[str], forms: Forms, other_forms: Forms) -> dict[str, list[str]]:
    """For each name the others that share a form with it."""
    by_form: dict[str, list[str]] = {}
    for other in sorted(others):
        for form in other_forms(other):
            by_form.setdefault(form, []).append(other)
    return {name: sorted({other for form in forms(name) for other in by_form.get(form, [])}) for name in names}
