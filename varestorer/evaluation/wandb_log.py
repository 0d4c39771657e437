"""An evaluation on Weights & Biases: the figures of its summary, and a table with images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varestorer.evaluation.outputs import MAX_PICTURES, SHOWN_BY_BROWSERS, spread
from varestorer.evaluation.results import Evaluation, Row
from varestorer.utils.images import load_image
from varestorer.utils.wandb_run import open_wandb_run


def log_to_wandb(evaluation: Evaluation, out: Path, method: str, config: Mapping[str, Any]) -> bool:
    """Log the means as `eval/<dataset>/<metric>`, and the images of the picture page as `eval/<dataset>/images`.

    Args:
        evaluation: what was scored.
        out: its folder, which remembers the run.
        method: heading of the column of restored images.
        config: what the evaluation was configured with.
    Returns:
        Whether wandb could start; a warning says why it could not.
    """
    run = open_wandb_run(out, {**config, "method": method})
    if run is None:
        return False
    prefix = f"eval/{evaluation.dataset}"
    metrics = evaluation.summary()["metrics"]
    run.log({f"{prefix}/{name}": entry["mean"] for name, entry in metrics.items()})
    rows = spread([row for row in evaluation.rows if row.image is not None], MAX_PICTURES)
    if rows:
        run.log({f"{prefix}/images": _table(rows, method, list(evaluation.metrics))})
    run.finish()
    return True


def _table(rows: list[Row], method: str, metrics: list[str]) -> Any:
    import wandb

    names = [name for name in metrics if any(name in row.scores for row in rows)]
    table = wandb.Table(columns=["image", "LQ", method, "HQ", *names])
    for row in rows:
        images = [None if path is None else _image(path) for path in (row.lq, row.image, row.reference)]
        table.add_data(row.name, *images, *(row.scores.get(name) for name in names))
    return table


def _image(path: Path) -> Any:
    import wandb

    if path.suffix.lower() in SHOWN_BY_BROWSERS:
        return wandb.Image(str(path))
    return wandb.Image(load_image(path))
