"""The report of a run: one HTML file that holds loss curves, pictures, a table of scores and the facts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from varestorer.utils.files import atomic_write
from varestorer.utils.images import to_uint8

MIN_ZOOM = 3
DETAIL_WIDTH = 216
"""Width of a column and of the enlarged detail in it, pixels: six columns fit a usual screen."""

PICTURE_HINT = """<p class="hint">Under each picture the framed place, enlarged pixel by pixel.
Click a picture to see it at its own pixels; then the arrow keys step through the columns at the same place,
+ and - zoom, Esc closes.</p>"""

Picture = Mapping[str, Tensor]
"""Columns of one photograph: label -> (3, H, W) in [0, 1]; the last one is the reference."""

NOT_LOSSES = frozenset({"stage", "step", "seconds", "lr", "epoch"})


def write_report(
    path: str | Path,
    title: str,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture] | Mapping[str, Picture],
    facts: Mapping[str, Any],
) -> Path:
    """Write a self-contained report.

    Args:
        path: the HTML file.
        title: its heading.
        curves: stage -> lines of `metrics.jsonl`; `loss` is drawn large, its parts beside it.
        rows: one dict per method; the keys of the first row are the columns. In columns called like a score
            (PSNR, SSIM, ...) the best value is bold, in those with `second` the smallest.
        pictures: one mapping per photograph, or photograph's name -> mapping. Images of one photograph should
            have one size; smaller ones are enlarged by repeating pixels.
        facts: name -> value: configuration, git hash, wall time; a value may be a dict of its own.
    Returns:
        The path.
    Raises:
        UserError: the file cannot be written.
    """
    named = pictures if isinstance(pictures, Mapping) else {f"{i + 1}": p for i, p in enumerate(pictures)}
    body = [
        f"<h1>{escape(title)}</h1>",
        *(["<h2>Scores</h2>", html_table(rows)] if rows else []),
        *(["<h2>Pictures</h2>", PICTURE_HINT] if named else []),
        *(html_picture(name, picture) for name, picture in named.items()),
        *(["<h2>Losses</h2>"] if curves else []),
        *(html_curves(stage, lines) for stage, lines in curves.items() if lines),
        "<h2>Run</h2>",
        html_facts(facts),
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(_page(title, "\n".join(body)), encoding="utf-8")
    return Path(path)


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of methods; numbers are right-aligned, the best of each column of scores is bold."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    best = {name: _best(name, [row[name] for row in rows if _is_number(row.get(name))]) for name in columns}
    lines = ["<table><tr>", *(f"<th>{escape(name)}</th>" for name in columns), "</tr>"]
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            kind = "number" if _is_number(value) else "text"
            text = escape(_text(value))
            is_best = kind == "number" and best[name] == value
            cells.append(f'<td class="{kind}">{f"<b>{text}</b>" if is_best else text}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*lines, "</table>"])


def html_picture(name: str, picture: Picture) -> str:
    """One photograph: its columns side by side, and under each the same detail enlarged."""
    height = max(image.shape[-2] for image in picture.values())
    width = max(image.shape[-1] for image in picture.values())
    full = {label: _enlarge(image, height, width) for label, image in picture.items()}
    top, left, side = detailed_crop(list(full.values())[-1])
    # by repeating pixels: what is seen is what the network made
    zoom = max(MIN_ZOOM, DETAIL_WIDTH // side)
    sharp = " sharp" if width < DETAIL_WIDTH else ""
    # the frame is drawn by the page, in percent, so that the picture's own pixels stay as they are
    frame = (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * side / width:.3f}%;height:{100 * side / height:.3f}%"
    )
    cells = []
    for label, image in full.items():
        detail = image[:, top : top + side, left : left + side]
        detail = detail.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        cells.append(
            f"<figure><figcaption>{escape(label)}</figcaption>"
            f'<div class="picture"><img class="full{sharp}" alt="{escape(label)}" src="{png_url(image)}">'
            f'<i style="{frame}"></i></div>'
            f'<img class="detail" alt="{escape(label)}, enlarged" src="{png_url(detail)}"></figure>'
        )
    caption = f"{escape(name)} <small>{width} x {height}</small>"
    return f'<h3>{caption}</h3><div class="row" style="--columns:{len(cells)}">{"".join(cells)}</div>'


def html_curves(stage: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The losses of a stage over its steps, with first and last values in words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in lines[-1] if name not in NOT_LOSSES and _is_number(lines[-1][name])]
    names.sort(key=lambda name: name != "loss")
    columns = min(len(names), 4)
    grid_rows = -(-len(names) // max(columns, 1))
    if not names:
        return ""
    figure = Figure(figsize=(3.3 * columns, 2.3 * grid_rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        steps, values = series(lines, name)
        axes = figure.add_subplot(grid_rows, columns, number + 1)
        axes.plot(steps, values, color="#9bb7d4", linewidth=0.8)
        axes.plot(steps, smooth(values), color="#1f4e79", linewidth=1.6)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.set_xlabel("step", fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    _, losses = series(lines, names[0])
    fall = f"{names[0]} {np.mean(losses[:10]):.4g} (first 10 steps) to {np.mean(losses[-10:]):.4g} (last 10)"
    summary = f"{len(lines)} steps; {fall}"
    return f'<h3>{escape(stage)}</h3><p>{escape(summary)}</p><img class="curves" alt="losses" src="{url}">'


def html_facts(facts: Mapping[str, Any]) -> str:
    """Name and value; a nested mapping becomes a folded block."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            text = "\n".join(f"{key}: {inner}" for key, inner in value.items())
            shown = f"<details><summary>{len(value)} entries</summary><pre>{escape(text)}</pre></details>"
        elif "\n" in str(value):
            shown = f"<details><summary>show</summary><pre>{escape(str(value))}</pre></details>"
        else:
            shown = escape(_text(value))
        lines.append(f"<tr><th>{escape(name)}</th><td>{shown}</td></tr>")
    return f'<table class="facts">{"".join(lines)}</table>'


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, lines without it left out."""
    numbered = [(line.get("step", i + 1), line.get(name)) for i, line in enumerate(lines)]
    kept = [(step, value) for step, value in numbered if _is_number(value)]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept], dtype=float)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred running mean over `share` of the series; the window shrinks at both ends."""
    half = max(int(len(values) * share / 2), 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def detailed_crop(image_3HW: Tensor) -> tuple[int, int, int]:
    """Find the square with the most detail (gradient energy), the first of equals.

    Returns:
        top, left, side; pixels. The side is a quarter of the shorter side, 24 to 72.
    """
    grey = image_3HW.float().mean(dim=0)
    height, width = grey.shape
    side = min(max(min(height, width) // 4, 24), DETAIL_WIDTH // MIN_ZOOM, height, width)
    energy = torch.zeros_like(grey)
    energy[:-1] += (grey[1:] - grey[:-1]).abs()
    energy[:, :-1] += (grey[:, 1:] - grey[:, :-1]).abs()
    stride = max(side // 4, 1)
    sums = torch.nn.functional.avg_pool2d(energy[None], side, stride)[0]
    best = int(sums.argmax())
    return best // sums.shape[1] * stride, best % sums.shape[1] * stride, side


def png_url(image_3HW: Tensor) -> str:
    """An image in [0, 1] as a PNG inside a `data:` URL."""
    from PIL import Image

    buffer = BytesIO()
    array = rearrange(to_uint8(image_3HW.detach()).cpu(), "c h w -> h w c").numpy()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlarge(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """Repeat pixels until the image has the size of the largest column."""
    if tuple(image_3HW.shape[-2:]) == (height, width):
        return image_3HW
    return torch.nn.functional.interpolate(image_3HW[None].float(), (height, width), mode="nearest")[0]


def _best(column: str, values: Sequence[float]) -> float | None:
    """The best value of a column of scores or times; None for other columns."""
    name = column.lower()
    if not values:
        return None
    if "second" in name or any(word in name for word in ("lpips", "dists", "niqe")):
        return min(values)
    return max(values) if any(word in name for word in ("psnr", "ssim", "musiq", "clipiqa")) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"
    return str(value)


def _page(title: str, body: str) -> str:
    template = files("varestorer.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", escape(title)).replace("{{body}}", body)
