"""Without distillation (paper, table 3): adapters learn to restore scale by scale from a prefix of degraded tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenPyramid
from varestorer.training.task import Batch, train_only
from varestorer.training.teacher import TeacherTask
from varestorer.transformer import ClassLabels, TextFeatures
from varestorer.transformer.adapters import adapter_parameters
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import uniform_per_sample


class PrefixTask(TeacherTask):
    """Bit cross entropy on the photograph, the degraded image in front; only the adapters train.

    Args:
        system: with `student.conditioning: prefix`.
        prefix_drop: share of samples whose prefix is hidden, so that guidance has something to compare with.
        options: those of `TeacherTask`.
    """

    def __init__(self, system: VARestorer, prefix_drop: float = 0.1, **options: float | bool) -> None:
        if system.student_config.conditioning != "prefix":
            raise UserError("this stage trains the prefix; set model.student.conditioning=prefix")
        super().__init__(system, **options)  # type: ignore[arg-type]
        self.prefix_drop = prefix_drop
        train_only(self, adapter_parameters(system.transformer).values())

    def logits(self, pyramid: TokenPyramid, text: TextFeatures | ClassLabels, batch: Batch) -> Tensor:
        with torch.no_grad():
            lq_pyramid = self.system.condition(batch["lq"]).pyramid
        if not self.training:
            return self.system.prefix_logits(pyramid, lq_pyramid, text)
        draws = uniform_per_sample((), self.seed, batch["key"], "prefix drop", batch["lq"].device)
        return self.system.prefix_logits(pyramid, lq_pyramid, text, draws < self.prefix_drop)

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """The degraded image restored scale by scale."""
        return {"multi-step": self.system.restore_batch(batch["lq"]).images_B3HW}
