"""Which restoration people prefer: a blind page of pairs, and the table that its answers give.

The page shows two methods' squares of one image without names; sides and order are drawn anew for every rater. Who is
who stands only in a file beside it, so that neither the page nor a rater's answers give it away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from varestorer.evaluation.outputs import shared_rows
from varestorer.evaluation.pictures import Crop, differing_crops, png_url, render
from varestorer.evaluation.results import Evaluation, Row, mean_interval
from varestorer.evaluation.tables import LEVEL, Cell, Column, Table, TableRow
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user, read_text, write_json, write_text
from varestorer.utils.images import load_image

PAGE, KEY = "pairwise.html", "pairwise.json"
SIDE = 512  # pixels of a square: two of them stand side by side on most screens


@dataclass(frozen=True)
class Study:
    """What a page asks."""

    name: str  # of just these images and methods
    trials: list[tuple[str, tuple[str, str]]]  # (image, (one method, the other))


def write_pairwise(evaluations: Mapping[str, Evaluation], out: Path, scale: float = 4) -> list[Path]:
    """Write `pairwise.html`, which needs nothing beside it, and `pairwise.json`, which says who is who.

    The images are those of the picture page, see `outputs.write_report`. UsageError: no image that all methods have.
    """
    rows = shared_rows(evaluations)
    if not rows:
        raise UsageError("pairwise= needs images that all methods of compare= have")
    labels, pictures = list(evaluations), [_squares(of, scale) for of in rows]
    pairs = list(combinations(range(len(labels)), 2))
    named = [(next(iter(of.values())).name, labels[one], labels[other]) for of in rows for one, other in pairs]
    seen = json.dumps([named, [[row.digests for row in of.values()] for of in rows]])
    study = sha256(seen.encode()).hexdigest()[:12]
    trials = [(number, *pair) for number in range(len(rows)) for pair in pairs]
    write_text(out / PAGE, render(PAGE, title="Which is better?", study=study, pictures=pictures, trials=trials))
    key = [{"image": image, "methods": methods} for image, *methods in named]
    write_json(out / KEY, {"study": study, "trials": key}, indent=1)
    return [out / PAGE, out / KEY]


def _squares(rows: Mapping[str, Row], scale: float) -> dict[str, Any]:
    """The same square of every method, where they differ most, and of the LQ image."""
    images = [load_image(row.image) for row in rows.values() if row.image is not None]
    step, first = max(1, round(scale)), next(iter(rows.values()))
    if len({image.shape for image in images}) > 1:
        raise UserError(f"the methods' images of {first.name} have different sizes: they cannot be told apart blindly")
    square, lq = differing_crops(images, 1, step, SIDE)[0], first.lq
    small = Crop(square.top // step, square.left // step, max(1, square.side // step))
    shown = None if lq is None else png_url(small.of(load_image(lq)))
    return {"methods": [png_url(square.of(image)) for image in images], "input": shown}


def read_study(folder: str) -> Study:
    """Who is who on a page; UsageError if the folder holds none."""
    path = expand_user(folder) / KEY
    try:
        found = json.loads(read_text(path))
        return Study(found["study"], [(t["image"], (t["methods"][0], t["methods"][1])) for t in found["trials"]])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"runs: {path} cannot be read ({reason(error)}); give the out= of pairwise=true") from error


def read_answers(study: Study, files: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Each rater's answers; UsageError for a file that cannot be read, holds no answer to this page, or comes twice."""
    raters: list[list[dict[str, Any]]] = []
    for path in map(expand_user, files):
        try:
            found = json.loads(read_text(path))
            answers = [
                {"trial": int(a["trial"]), "chosen": a["chosen"], "left": a.get("left")} for a in found["answers"]
            ]
            is_ours = found["study"] == study.name
            if not answers or any(a["chosen"] not in (0, 1, None) for a in answers):
                raise ValueError("it holds no answers, or others than 0, 1 and null")
            if is_ours and not {a["trial"] for a in answers} <= set(range(len(study.trials))):
                raise ValueError("it answers what was not asked")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"answers: {path} cannot be read ({reason(error)}); save it again from {PAGE}") from error
        if not is_ours:
            raise UsageError(f"answers: {path} belongs to another {PAGE} than runs= names")
        if answers in raters:
            raise UsageError(f"answers: {path} holds just what another file does; give every rater's once")
        raters.append(answers)
    if not raters:
        raise UsageError(f"answers= is missing: the files that were saved from {PAGE}")
    return raters


def preference_tables(study: Study, raters: Sequence[Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Win rates, all against all and in pairs, by `read_answers`; half a win each where no difference was seen.

    Intervals are bootstrapped over images: the answers about one image depend on each other.
    """
    answers = [answer for of_rater in raters for answer in of_rater]
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}  # of methods, and of pairs of them, by image
    for answer in answers:
        image, (one, other) = study.trials[answer["trial"]]
        won = 0.5 if answer["chosen"] is None else 1.0 - answer["chosen"]
        shares_of: dict[tuple[str, ...], float] = {(one, other): won, (one,): won, (other,): 1 - won}
        for key, share in shares_of.items():
            found.setdefault(key, {}).setdefault(image, []).append(share)
    rows, duels = [], []
    for key, shares in found.items():
        rates = {image: fmean(values) for image, values in shares.items()}
        given = [value for values in shares.values() for value in values]
        cells: dict[str, Cell] = {"win rate": f"{fmean(rates.values()):.3f}"}
        if len(key) == 1:
            cells |= {"method": key[0], "95 %": _interval(rates), "comparisons": len(given)}
            rows.append(TableRow(cells, scores={"win rate": rates}))
        else:
            cells |= {"won": given.count(1.0), "no difference": given.count(0.5), "lost": given.count(0.0)}
            duels.append(TableRow(cells | {"methods": " - ".join(key), "95 %": _interval(rates, 0.5)}))
    lefts = [a["chosen"] == a["left"] for a in answers if a["chosen"] is not None]
    images = {image for image, _ in (study.trials[answer["trial"]] for answer in answers)}
    note = (
        f"{len(raters)} raters, {len(images)} images, {len(answers)} answers to {len(study.trials)} pairs. "
        f"Win rate: mean over images, no difference counts half; 95 %: bootstrap over images; {LEVEL} level."
    )
    sides = f"The left picture was chosen in {fmean(lefts):.0%} of {len(lefts)} choices." if lefts else ""
    first = (Column("method", is_text=True), Column("win rate", False), Column("95 %"), Column("comparisons"))
    second = (Column("methods", is_text=True), *map(Column, ("won", "no difference", "lost", "win rate", "95 %")))
    return [Table(first, tuple(rows), notes=(note, *filter(None, [sides]))), Table(second, tuple(duels), "In pairs")]


def _interval(rates: Mapping[str, float], level: float | None = None) -> str | None:
    """In words, marked where it holds `level`; None of a single image."""
    if len(rates) < 2:
        return None
    low, high = mean_interval(list(rates.values()))
    return f"{low:.3f} to {high:.3f}" + (f" {LEVEL}" if level is not None and low <= level <= high else "")
