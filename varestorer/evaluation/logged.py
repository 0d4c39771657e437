"""An evaluation for the loggers: the figures of its summary, and a table with images."""

from __future__ import annotations

from varestorer.evaluation.outputs import spread
from varestorer.evaluation.results import Evaluation
from varestorer.utils.loggers import Logger


def log_evaluation(evaluation: Evaluation, method: str, logger: Logger) -> None:
    """Log the means as `eval/<dataset>/<metric>`, and the images of the picture page as `eval/<dataset>/images`.

    Args:
        evaluation: what was scored.
        method: heading of the column of restored images.
        logger: is finished with it.
    """
    group = f"eval/{evaluation.dataset}"
    metrics = evaluation.summary()["metrics"]
    logger.log_metrics(group, None, {name: entry["mean"] for name, entry in metrics.items()})
    rows = spread([row for row in evaluation.rows if row.image is not None])
    if rows:
        names = [name for name in evaluation.metrics if any(name in row.scores for row in rows)]
        cells = [[row.name, row.lq, row.image, row.reference, *(row.scores.get(n) for n in names)] for row in rows]
        logger.log_table(group, ["image", "LQ", method, "HQ", *names], cells)
    logger.finish()
