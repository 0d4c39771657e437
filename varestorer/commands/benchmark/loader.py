"""`benchmark what=loader`: how fast pairs of pictures are made, and what a training step wants of them."""

from __future__ import annotations

from omegaconf import DictConfig

from varestorer.commands.entry import OK, say


def run(cfg: DictConfig) -> int:
    """Print pairs a second and core, and the cores that a step needs."""
    from varestorer.data.speed import loader_report, pairs_per_second

    rate = pairs_per_second(cfg.root, cfg.crop)
    say("\n".join(loader_report(rate, cfg.crop, cfg.pairs, cfg.step_seconds)))
    return OK
