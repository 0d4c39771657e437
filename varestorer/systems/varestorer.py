"""VARestorer: one-step restoration by a visual autoregressive transformer (arXiv 2604.21450).

degraded image -> (restorer) -> tokenizer -> pyramid of tokens -> student -> bits of all scales -> decoder -> image.
Teacher and student are one transformer with its adapters off or on. `systems.networks` holds the parts,
`systems.restoring` what is done with them, `systems.loading` where they come from.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `Z` bits per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from varestorer.conditioning.text_encoder import DEFAULT_NAME, DEFAULT_WIDTH, TextEncoder
from varestorer.systems.acceleration import Acceleration, accelerate
from varestorer.systems.bundle import save_bundle
from varestorer.systems.graphs import BatchGraphs
from varestorer.systems.loading import HOW, build, download
from varestorer.systems.networks import Networks
from varestorer.systems.restoring import PreparedTexts, RestoredBatch, Text, restore_squares, text_of, uncertainty_maps
from varestorer.transformer.sampling import Noise, keyed_noise
from varestorer.utils.color import match_color
from varestorer.utils.device import to_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import expand_user
from varestorer.utils.hub import first_line, is_hub_name
from varestorer.utils.tiling import restore_tiled, scaled_size
from varestorer.weights.shipped import named_or_default

DEVICE_PIXELS = 2**25  # of a result that is put together on the device; larger ones are on the host


@dataclass(frozen=True)
class Restoration:
    """A restored image.

    Attributes:
        image: (3, H, W) float32 in [0, 1].
        uncertainty_KHW: where the student guessed, at each scale: mean entropy of a token's bits, 0 (decided) to 1 (a
            coin toss), up-sampled to the image; None unless asked for.
    """

    image: Tensor
    uncertainty_KHW: Tensor | None = None


class VARestorer(
    Networks,
    ModelHubMixin,
    library_name="varestorer",
    pipeline_tag="image-to-image",
    tags=["super-resolution", "image-restoration"],
    paper_url="https://arxiv.org/abs/2604.21450",
):
    """The pieces put together; made of the arguments of `Networks`.

    `from_pretrained` loads one, `save_pretrained` and `push_to_hub` (huggingface_hub's) share one as a bundle, in
    the form it has: after `merge_adapters` without adapters, after `set_precision` in that precision. `accelerate`
    makes one fast that will only restore.

    Attributes:
        acceleration: how it was accelerated; None if it was not.
        graphs: of `restore_batch`, where CUDA graphs were asked for.
        texts: prepared ones, kept from image to image where the weights no longer change.
    """

    acceleration: Acceleration | None = None
    graphs: BatchGraphs | None = None
    texts: PreparedTexts | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None = None, **options: Any
    ) -> VARestorer:
        """Load a system, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a bundle's folder, a run of scripts/train.py (the averaged weights of its
                latest checkpoint) or a checkpoint of one, the published student with its tokenizer and restorer
                beside it, or a bundle's name on the hub; None for "nano", which comes with the package.
            options: `device`; `merge=True` folds the adapters into the weights (faster, but only for `steps="one"`);
                `precision="fp32"`, `"bf16"`, or `"auto"` for what suits the device (else as stored);
                `acceleration=Acceleration(...)`, in place of these two, for more means; `tokenizer_file` and
                `restorer_file` of the published student, where they lie elsewhere; for the hub `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            UsageError: neither a path nor a name that the hub knows.
            UserError: the path holds no system, or its files do not fit.
        """
        given = pretrained_model_name_or_path
        name = str(named_or_default(given if given is None else expand_user(given)))
        if Path(name).exists() or not is_hub_name(name):
            return cls._from_pretrained(model_id=name, **options)
        try:
            system: VARestorer = super().from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name} is no path here, and the hub does not give it: {first_line(error)}; {HOW}"
            ) from error
        return system

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        device: torch.device | str = "cpu",
        merge: bool = False,
        precision: str | None = None,
        acceleration: Acceleration | None = None,
        tokenizer_file: str | None = None,
        restorer_file: str | None = None,
        **hub: Any,
    ) -> VARestorer:
        path = Path(model_id) if Path(model_id).exists() or not is_hub_name(model_id) else download(model_id, hub)
        if acceleration is None and precision is not None:
            acceleration = Acceleration(merge, precision)
        merged = merge if acceleration is None else acceleration.merge
        system: VARestorer = build(cls, path, tokenizer_file, restorer_file, merged)
        system.to(device).eval().requires_grad_(False)
        return system if acceleration is None else accelerate(system, acceleration)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.acceleration is not None:
            raise UserError("an accelerated system cannot be saved: its weights were rounded; save it before")
        save_bundle(self, save_directory)

    def accelerate(self, acceleration: Acceleration | None = None) -> VARestorer:
        """Make restoring fast, in place; see `systems.acceleration`. Nothing else works as before afterwards.

        Args:
            acceleration: the means; None for merged adapters, and bfloat16 where the device gains from it.
        """
        return accelerate(self, acceleration or Acceleration())

    @torch.inference_mode()
    def restore_batch(
        self,
        lq_B3HW: Tensor,
        noise: Noise | None = None,
        steps: str | int = "one",
        text: Text | None = None,
    ) -> RestoredBatch:
        """Restore squares of side `tile`.

        Args:
            lq_B3HW: degraded images in [0, 1] at the size of the result.
            noise: uniform noise for sampling, see `sampling.keyed_noise`; None takes the likelier bits.
            steps: "one": the student alone; K: the last K - 1 scales are predicted again by the teacher, given the
                student's coarser ones; "multi": the teacher predicts all scales with a side above a quarter of the
                last, given those of the degraded image.
            text: features of the prompts, or, for one step, what `transformer.prepare` made of them; None for no
                prompt.

        Raises:
            UserError: steps that cannot be, or that need a teacher where the adapters are merged.
        """
        return restore_squares(self, lq_B3HW, noise, steps, text)

    def uncertainty(self, logits_BLZ2: Tensor) -> Tensor:
        """Where the student guesses: mean entropy of each token's bits, up-sampled to pixels, (B, K, H, W).

        0 where all bits of a token are decided, 1 where all are a coin toss; one map for each scale.
        """
        return uncertainty_maps(self, logits_BLZ2)

    def text_features(self, prompt: str | Tensor | None) -> Tensor | None:
        """Features (T, E) of a prompt by the text encoder of the released models; None for no prompt.

        Raises:
            UserError: a model that was trained with another encoder; give features then.
        """
        if not isinstance(prompt, str):
            return prompt
        if self.transformer.config.text_width != DEFAULT_WIDTH:
            raise UserError(
                f"this model was trained without {DEFAULT_NAME}: give prompt= the features (T, E) of the encoder it "
                "was trained with, or None"
            )
        return TextEncoder(device=self.device).encode([prompt])[0]

    @torch.inference_mode()
    def restore(
        self,
        image: Tensor,
        scale: float = 4,
        *,
        prompt: str | Tensor | None = None,
        seed: int = 0,
        select: str = "argmax",
        steps: str | int = "one",
        color: str = "none",
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 8,
        uncertainty: bool = False,
    ) -> Restoration:
        """Restore an image of any size; it is enlarged first, and padded or tiled, never squashed.

        Args:
            image: (3, H, W) float in [0, 1].
            scale: enlargement.
            prompt: what the image shows, or text features (T, E); None for no prompt.
            seed: of the noise when sampling.
            select: "argmax" takes the likelier bits, "sample" draws them.
            steps: see `restore_batch`.
            color: "adain" or "wavelet" gives each tile the colours of the input, see `utils.color`; "none" does not.
            tile: side of the squares, pixels, one of `tiles`; None for the one the model was trained on.
            overlap: pixels shared by neighbouring tiles; None for a quarter of a tile.
            batch: tiles per forward pass.
            uncertainty: whether to return it; costs K channels of the size of the result.

        Raises:
            UserError: unknown `select`, `steps`, `color` or `tile`, an impossible overlap.
        """
        if select not in ("argmax", "sample"):
            raise UserError(f"select must be argmax or sample, got {select!r}")
        if uncertainty and (steps == "multi" or self.student_config.conditioning == "prefix"):
            raise UserError("uncertainty is the one-step student's; use steps=one or K of a distilled model")
        system = self if tile is None else self.at_tile(tile)
        features = self.text_features(prompt)
        texts = self.texts or PreparedTexts()

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            tiles = to_device(tiles_B3tt, self.device)
            noise = keyed_noise(seed, numbers, "restore", self.device) if select == "sample" else None
            text = text_of(system, features, len(numbers), steps, texts)
            restored = system.restore_batch(tiles, noise, steps, text)
            images = match_color(restored.images_B3HW, tiles, color)
            if uncertainty and restored.logits_BLZ2 is not None:
                images = torch.cat([images, system.uncertainty(restored.logits_BLZ2)], dim=1)
            return to_device(images, tiles_B3tt.device)

        size = scaled_size(image.shape[-2], image.shape[-1], scale)
        overlap = system.tile // 4 if overlap is None else overlap
        place = self.device if size[0] * size[1] <= DEVICE_PIXELS else image.device
        tiled = restore_tiled(to_device(image, place), size, system.tile, overlap, batch, run)
        channels = to_device(tiled.clamp_(0, 1), image.device)
        return Restoration(channels[:3], channels[3:] if uncertainty else None)

    @torch.inference_mode()
    def reconstruct(self, image: Tensor, batch: int = 8) -> Tensor:
        """An image of any size after it passed the tokenizer's bits: the ceiling of what restoring can reach.

        Args:
            image: (3, H, W) float in [0, 1], at full size.
            batch: tiles per forward pass.

        Returns:
            (3, H, W) float32 in [0, 1].
        """

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            return to_device(self.decode(self.encode(to_device(tiles_B3tt, self.device)).codes), tiles_B3tt.device)

        size = (image.shape[-2], image.shape[-1])
        return restore_tiled(image, size, self.tile, self.tile // 4, batch, run).clamp_(0, 1)
