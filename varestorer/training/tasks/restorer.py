"""Stage 0, for systems that train their own: the restorer learns to clean degraded images before they are tokenized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from varestorer.losses.perceptual import perceptual_loss
from varestorer.losses.pixel import l1_loss, mesh_loss, mse_loss
from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch, Task, train_only, weighted_sum
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network


@dataclass(frozen=True)
class RestorerWeights:
    """Weights of the parts of the loss: absolute and squared error of the image in [-1, 1], the perceptual loss, and
    the error of what repeats every four pixels (`losses.pixel.mesh_loss`)."""

    l1: float = 1.0
    mse: float = 0.0
    perceptual: float = 0.0
    mesh: float = 0.0


class RestorerTask(Task):
    """The restored image against the photograph; DiffBIR trains its SwinIR by the squared error alone.

    Args:
        system: holds the restorer.
        weights: arguments of `RestorerWeights`; the perceptual loss is not computed where its weight is 0.
        perceptual: see `losses.perceptual.perceptual_loss`.

    Raises:
        UserError: the system has no restorer.
    """

    takes_any_size = True

    def __init__(self, system: VARestorer, weights: dict[str, float] | None = None, perceptual: str = "lpips") -> None:
        super().__init__()
        if system.restorer is None:
            raise UserError("there is no restorer to train: set model.restorer to its sizes or to a file")
        self.system = system
        self.weights = RestorerWeights(**(weights or {}))
        self.perceptual = perceptual_loss(perceptual) if self.weights.perceptual > 0 else None
        train_only(self, system.restorer.parameters())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        target = to_network(batch["hq"])
        with self.watch("restore"):
            image = to_network(self._clean(batch))
        with self.watch("losses"):
            parts = {"l1": l1_loss(image, target), "mse": mse_loss(image, target), "mesh": mesh_loss(image, target)}
            if self.perceptual is not None:
                # AlexNet looks at every fourth pixel, and the restorer writes squares of four: in one phase for ever,
                # a mesh can lie where the loss never looks
                down, right = step % 4, step // 4 % 4
                parts["perceptual"] = self.perceptual(image[..., down:, right:], target[..., down:, right:])
        return {"loss": weighted_sum(self.weights, parts), **parts}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """What the restorer makes of the degraded image."""
        return {"restorer": self._clean(batch).clamp(0, 1)}

    def _clean(self, batch: Batch) -> Tensor:
        assert self.system.restorer is not None
        return self.system.restorer(batch["lq"])
