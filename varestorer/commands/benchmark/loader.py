"""`benchmark what=loader`: how fast pairs of pictures are made, and what a training step wants of them."""

from __future__ import annotations

from omegaconf import DictConfig

from varestorer.commands.entry import OK, say


def run(cfg: DictConfig) -> int:
    """Print pairs a second and core, and the cores that a step needs."""
    from varestorer.data.speed import loader_report
    from varestorer.utils.device import pick_device

    device = pick_device(str(cfg.device))
    say("\n".join(loader_report(cfg.root, cfg.crop, cfg.pairs, cfg.step_seconds, device)))
    return OK
