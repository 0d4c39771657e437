"""The picture page of an evaluation: LQ, restored and HQ side by side, with the same places of each enlarged."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

from varestorer.evaluation.pictures import HINT, PictureColumn, detailed_crops, enlarge, html_picture
from varestorer.evaluation.results import Evaluation, Row
from varestorer.evaluation.tables import figure
from varestorer.evaluation.templates import render
from varestorer.utils.files import atomic_write, fitting_name, name_bytes, write_text
from varestorer.utils.images import load_image, save_image

GALLERY, COPIES = "gallery.html", "gallery"
MAX_PICTURES = 30
NUM_CROPS = 2
SHOWN_BY_BROWSERS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})


def write_gallery(evaluation: Evaluation, out: Path, method: str, scale: float = 4) -> Path | None:
    """Write `gallery.html`, which opens from its folder: pictures from elsewhere are copied to `gallery/`.

    Args:
        evaluation: what was scored; of many images `MAX_PICTURES`, evenly spread, are shown.
        out: its folder.
        method: name of the restored column.
        scale: side of the restored image over that of the LQ image.
    Returns:
        The page; None when no scored image has a file.
    Raises:
        UserError: a picture cannot be read, or the page not be written.
    """
    rows = spread([row for row in evaluation.rows if row.image is not None], MAX_PICTURES)
    if not rows:
        return None
    pictures = [_picture(row, out, method, scale) for row in rows]
    introduction = f"{len(rows)} of {len(evaluation.rows)} images, evenly spread."
    title = f"{evaluation.dataset}: {method}"
    page = render("gallery.html", title=title, introduction=introduction, hint=HINT, pictures=pictures)
    write_text(out / GALLERY, page)
    return out / GALLERY


def spread(rows: list[Row], count: int) -> list[Row]:
    """At most `count` of the rows, evenly spread, the first always among them."""
    if len(rows) <= count:
        return rows
    return [rows[number * len(rows) // count] for number in range(count)]


def _picture(row: Row, out: Path, method: str, scale: float) -> str:
    """One image of the page; what is the same place is found at the size of the restored image."""
    files = {"LQ": row.lq, method: row.image, "HQ": row.reference}
    images = {label: load_image(path) for label, path in files.items() if path is not None}
    height, width = images[method].shape[-2:]
    columns = []
    for role, (label, path) in zip(("lq", "restored", "hq"), files.items(), strict=True):
        if path is not None:
            image = images[label]
            source = _link(path, out, fitting_name(row.name, f"_{role}.png"))
            columns.append(PictureColumn(label, source, enlarge(image, height, width), image.shape[-1] < width))
    crops = sorted(detailed_crops(columns[-1].image, NUM_CROPS, max(1, round(scale))), key=lambda crop: crop.left)
    scores = ", ".join(f"{name} {figure(value)}" for name, value in row.scores.items())
    note = f"{width} x {height}" + (f"; {scores}" if scores else "")
    return html_picture(row.name, note, columns, crops)


def _link(path: Path, out: Path, name: str) -> str:
    """Relative URL of a picture; it is copied into `out` when it lies elsewhere, or browsers do not show it."""
    shown = path.suffix.lower() in SHOWN_BY_BROWSERS
    target = path.resolve()
    if not (shown and target.is_relative_to(out.resolve())):
        target = out.resolve() / COPIES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            with atomic_write(target) as temporary:
                shutil.copyfile(path, temporary)
        else:
            save_image(target, load_image(path))
    return quote(name_bytes(target.relative_to(out.resolve()).as_posix()))
