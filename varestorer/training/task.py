"""What a stage of training is: its networks, its loss, its preview.

Shapes: `B` samples, `H W` pixels. A batch is what `varestorer.data.build_loader` yields:
`{"hq": (B,3,H,W), "lq": (B,3,H,W), "name": list of B file names, "key": int64 (B,)}`, images in [0, 1]. The keys stay
on the host, where they seed what is drawn: reading them from a GPU would wait for all that it was given before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from varestorer.transformer.blocks import Block
from varestorer.transformer.model import UNDECAYED, branch_factors
from varestorer.utils.seeds import uniform_per_sample
from varestorer.utils.watch import watch

Batch = dict[str, Any]


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """A batch whose tensors are on a device; its keys stay on the host."""
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) and name != "key" else value
        for name, value in batch.items()
    }


class Task(nn.Module, ABC):
    """One stage of training, seen by `fit` through the methods below.

    A task is a module so that Accelerate (DDP, FSDP) can wrap it whole: its `forward` is the loss. It holds
    the system it trains as `self.system`; parameters with `requires_grad` train, all others are the frozen
    base. `train_only` sets those flags, and is best called at the end of the constructor.

    Randomness must be drawn per sample from `batch["key"]` and `step` (see `utils.seeds`), so that the
    number of processes and a resume change nothing.

    Attributes:
        name: of the stage; the run's config sets it (`stages: {name: ...}`).
        seed: of what is drawn.
        drop_path: probability with which a sample leaves out each branch of the transformer's last block, growing
            linearly from 0 in the first.
        takes_any_size: whether images need not have the system's `tile`.
        shows_lq: whether pictures are made of the degraded images, which then stand beside them.
        watch: opened around each part of `forward`, see `utils.watch`.
    """

    name: str = "task"
    seed: int = 0
    drop_path: float = 0.0
    takes_any_size = False
    shows_lq = True
    watch = watch

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of one (micro-)batch.

        Args:
            batch: images already on the task's device, see `to_device`.
            step: the optimizer step being taken, from 1.
        Returns:
            scalars: `"loss"`, the total that is minimized, and any parts to report beside it (such as `kl`,
            `mse`). Means over the samples, so that micro-batches and processes average. In eval mode nothing is
            dropped, flipped or drawn.
        """

    @abstractmethod
    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """What the stage makes of held-out pairs as it will be used, free-running: no true codes are shown to it.

        Drawn without gradients, in eval mode and with the EMA weights; for the eye and for the scores.

        Returns:
            headings and pictures, each (B,3,h,w) in [0, 1]; sides differ where several sizes are made.
        """

    def compared(self, batch: Batch, restored: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The restored pictures with what they should be, for the scores.

        Returns:
            what is put behind the names of the scores -> (pictures, references); none where there is no right answer.
        """
        (picture,) = restored.values()
        return {"": (picture, batch["hq"])}

    def preview(self, batch: Batch, restored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures for the eye.

        Returns:
            columns in order, such as `{"LQ": ..., "student": ..., "HQ": ...}`, each (B,3,H,W) in [0, 1]; smaller
            pictures are enlarged by repeating pixels.
        """
        size = batch["hq"].shape[-2:]
        shown = {name: interpolate(picture, size=size, mode="nearest") for name, picture in restored.items()}
        return {**({"LQ": batch["lq"]} if self.shows_lq else {}), **shown, "HQ": batch["hq"]}

    def branch_factors(self, keys: Tensor, step: int) -> Tensor | None:
        """What drop path makes of each sample's branches in this step, (B, D, 3); None where it is off."""
        if not (self.training and self.drop_path):
            return None
        system: Any = self.system
        shape, device = (system.transformer.config.depth, 3), system.device
        draws = uniform_per_sample(shape, self.seed, keys, f"drop path/{step}", device)
        return branch_factors(draws, self.drop_path)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by the name it has in checkpoints.

        Names are relative to `self.system` (the keys of its `state_dict`), so that a checkpoint can be loaded
        into a system without any task; parameters of other modules keep their name within the task.
        """
        named = self.named_parameters()
        return {name.removeprefix("system."): p for name, p in named if p.requires_grad}

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the system: what EMA weights consist of.

        Networks that only serve the training, such as a discriminator, train beside it and are not averaged.
        """
        prefix = "system."
        named = self.named_parameters()
        return {name.removeprefix(prefix): p for name, p in named if p.requires_grad and name.startswith(prefix)}

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay leaves this parameter alone: biases, norms, embeddings and gains, as in Infinity."""
        return parameter.ndim < 2 or UNDECAYED.search(name) is not None

    def frozen_state(self) -> dict[str, Tensor]:
        """The frozen base a checkpoint relies on without holding it: saved tensors that do not train."""
        trained = self.trainable_parameters()
        named = ((name.removeprefix("system."), value) for name, value in self.state_dict().items())
        return {name: value for name, value in named if name not in trained and torch.is_tensor(value)}


def weighted_sum(weights: object, parts: Mapping[str, Tensor]) -> Tensor:
    """The sum of the parts times their weights; no gradient goes through those whose weight is 0."""
    counted = [name for name in parts if getattr(weights, name)] or [*parts]
    return torch.stack([getattr(weights, name) * parts[name] for name in counted]).sum()


def train_only(root: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Freeze all of `root` (usually the task: nothing an earlier stage trained stays trainable) but `trained`."""
    root.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def keep_base_in(task: Task, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of the transformer's blocks in a precision; vectors and what trains stay float32.

    Under bfloat16 autocast, which rounds every matrix before its product, bfloat16 halves the memory of the base and
    changes no loss and no gradient. Without autocast the blocks cannot be used then. The task is not sharded yet;
    float32 gives what bfloat16 left, rounded.
    """
    for layer in frozen_matrices(task):
        layer.weight.data = layer.weight.data.to(dtype)


def frozen_matrices(task: Task) -> Iterator[nn.Linear]:
    """Linear layers inside the blocks whose weights do not train, of the student and of a separate teacher."""
    blocks = (module for module in task.modules() if isinstance(module, Block))
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    return (layer for layer in layers if not layer.weight.requires_grad)
