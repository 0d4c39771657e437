"""VARestorer: one-step restoration by a visual autoregressive transformer (arXiv 2604.21450).

degraded image -> (restorer) -> tokenizer -> pyramid of tokens -> student -> bits of all scales -> decoder -> image.
Teacher and student are one transformer with its adapters off or on.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `Z` bits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.conditioning.pyramid import Condition, PyramidConditioner
from varestorer.conditioning.restorer import load_restorer
from varestorer.systems.parts import check_part, load_part
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.autoencoder import init_weights as init_tokenizer_weights
from varestorer.transformer import TextContext, TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import adapters_off, attach_adapters, init_adapters
from varestorer.transformer.generation import Generation, MultiStepGenerator, SamplingOptions
from varestorer.transformer.layout import pyramid_layout
from varestorer.transformer.masks import block_causal_mask, cross_scale_mask
from varestorer.transformer.sampling import Noise, bit_entropy, bits_to_map, keyed_noise, select_bits
from varestorer.utils.errors import UserError
from varestorer.utils.images import from_network, resize, to_network
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import restore_tiled, scaled_size


@dataclass(frozen=True)
class StudentConfig:
    """What makes the student of the teacher; the defaults are the traits of the released student.

    Attributes:
        lora_rank: of the adapters; 0 for none (the student is then the base network itself).
        long_input: append the complete codes at the last scale to the input.
        long_positions: rotary rows of the appended tokens, "next_scale" or "own".
        cross_value_bias: whether block cross attention adds its value bias while the adapters are on.
    """

    lora_rank: int = 32
    long_input: bool = True
    long_positions: str = "next_scale"
    cross_value_bias: bool = False


@dataclass(frozen=True)
class RestoredBatch:
    """Restored squares.

    Attributes:
        images_B3HW: in [0, 1].
        bits: of each scale, (B, Z, h, w) bool.
        logits_BLZ2: of the student; None for multi-step generation.
    """

    images_B3HW: Tensor
    bits: list[Tensor]
    logits_BLZ2: Tensor | None


@dataclass(frozen=True)
class Restoration:
    """A restored image: (3, H, W) float32 in [0, 1]."""

    image: Tensor


class VARestorer(nn.Module):
    """The pieces put together.

    Args:
        schedule: arguments of `ScaleSchedule.build`: `size`, or `sides`; the last scale is a square.
        tokenizer: arguments of `TokenizerConfig`.
        transformer: arguments of `TransformerConfig`.
        student: arguments of `StudentConfig`.
        restorer: file of the restorer that cleans images before they are tokenised, or None.
        weights: files of the parts "tokenizer" and "transformer", published or of a run, see
            `systems.loading.load_part`; a part without a file gets random weights.
        seed: of the random weights.
    """

    def __init__(
        self,
        schedule: dict[str, Any],
        tokenizer: dict[str, Any],
        transformer: dict[str, Any],
        student: dict[str, Any] | None = None,
        restorer: str | None = None,
        weights: dict[str, str | None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._files = {part: file for part, file in (weights or {}).items() if file}
        for part, file in self._files.items():
            check_part(part, file)
        loaded_restorer = load_restorer(restorer) if restorer else None
        self.schedule = ScaleSchedule.build(**schedule)
        self.student_config = StudentConfig(**(student or {}))
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(TokenizerConfig(**tokenizer))
            self.transformer = VARTransformer(TransformerConfig(**transformer))
            if self.student_config.lora_rank:
                attach_adapters(self.transformer, self.student_config.lora_rank, self.student_config.cross_value_bias)
        self._check_sizes()
        self.config = {
            "schedule": dict(schedule),
            "tokenizer": asdict(self.tokenizer.config),
            "transformer": asdict(self.transformer.config),
            "student": asdict(self.student_config),
            "restorer": restorer,
        }
        if torch.get_default_device().type != "meta":
            self.to_empty(device=torch.get_default_device())
            self._fill(seed)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU
        self.restorer = loaded_restorer
        self.conditioner = PyramidConditioner(
            self.tokenizer,
            self.transformer.config.head_dim,
            self.student_config.long_input,
            self.student_config.long_positions,
            self.restorer,
        )

    def _check_sizes(self) -> None:
        bits = self.tokenizer.config.num_bits, self.transformer.config.num_bits
        if bits[0] != bits[1]:
            raise UserError(f"model.tokenizer.num_bits={bits[0]} and model.transformer.num_bits={bits[1]} must agree")
        height, width = self.schedule.latent_size
        if height != width:
            raise UserError(f"images are restored in squares: model.schedule must end in one, got {height}x{width}")
        num_levels = len(self.schedule) + int(self.student_config.long_input)
        if self.transformer.config.num_levels < num_levels:
            raise UserError(f"model.transformer.num_levels must be at least {num_levels} for this schedule")

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        """Weights of each part from its file, or drawn; adapters start without effect unless a file has them."""
        init_adapters(self.transformer, torch_generator(seed, "adapters"))
        if "tokenizer" in self._files:
            load_part(self, "tokenizer", self._files["tokenizer"])
        else:
            init_tokenizer_weights(self.tokenizer, torch_generator(seed, "tokenizer"))
        if "transformer" in self._files:
            load_part(self, "transformer", self._files["transformer"])
        else:
            self.transformer.init_weights(torch_generator(seed, "transformer"))

    def initial_state(self) -> dict[str, Tensor]:
        """The weights that no file can give again: what was drawn at random."""
        from_files = (*(f"{part}." for part in self._files), "restorer.")
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(from_files)}

    @property
    def tile(self) -> int:
        """Side of the square restored in one go, pixels."""
        return self.schedule.latent_size[0] * self.tokenizer.stride

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.start.device

    def encode(self, images_B3HW: Tensor) -> TokenPyramid:
        """Tokens of images in [0, 1] of side `tile`."""
        return self.tokenizer.encode(to_network(images_B3HW), self.schedule)

    def decode(self, codes_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of summed codes."""
        return from_network(self.tokenizer.decode(codes_BZhw))

    def condition(self, lq_B3HW: Tensor) -> Condition:
        """The student's input for degraded images in [0, 1] of side `tile`."""
        return self.conditioner(to_network(lq_B3HW), self.schedule)

    def null_text(self, batch_size: int) -> TextFeatures:
        """The learned text that stands for no prompt."""
        return self.transformer.text.null_batch(batch_size)

    def teacher_logits(
        self, pyramid: TokenPyramid, text: TextFeatures | TextContext, teacher: VARTransformer | None = None
    ) -> Tensor:
        """p_T(r_k | r_<k): logits (B, L, Z, 2) of every scale, given the true coarser ones.

        Args:
            pyramid: tokens of the photograph.
            text: of the prompts; a context must come from the network that is asked.
            teacher: a network of its own; None for the system's, adapters off.
        """
        layout = pyramid_layout(self.schedule, self.transformer.config.head_dim, pyramid.codes.device)
        mask = block_causal_mask(layout.levels_L)
        if teacher is not None:
            return teacher(pyramid.inputs(), text, layout, mask)
        with adapters_off(self.transformer):
            return self.transformer(pyramid.inputs(), text, layout, mask)

    def student_logits(self, condition: Condition, text: TextFeatures | TextContext) -> Tensor:
        """p_S(r_k | r_LQ): logits (B, L, Z, 2) of every scale in one pass; all tokens see all tokens."""
        mask = cross_scale_mask(condition.layout.levels_L)
        logits = self.transformer(condition.tokens_BLZ, text, condition.layout, mask)
        return logits[:, : self.schedule.num_tokens]

    def codes(self, bits_BLZ: Tensor) -> Tensor:
        """Summed codes (B, Z, h_K, w_K) of the bits of all scales; keeps gradients of straight-through bits."""
        return self.tokenizer.quantizer.indices_to_codes(self.split_bits(bits_BLZ), self.schedule.latent_size)

    def split_bits(self, bits_BLZ: Tensor) -> list[Tensor]:
        """Bits of all scales as one map (B, Z, h, w) per scale."""
        pairs = zip(self.schedule.slices, self.schedule.scales, strict=True)
        return [bits_to_map(bits_BLZ[:, tokens], scale) for tokens, scale in pairs]

    @torch.inference_mode()
    def restore_batch(
        self,
        lq_B3HW: Tensor,
        noise: Noise | None = None,
        steps: str | int = "one",
        text: TextFeatures | None = None,
    ) -> RestoredBatch:
        """Restore squares of side `tile`.

        Args:
            lq_B3HW: degraded images in [0, 1] at the size of the result.
            noise: uniform noise for sampling, see `sampling.keyed_noise`; None takes the likelier bits.
            steps: "one": the student alone; K: the last K - 1 scales are predicted again by the teacher, given the
                student's coarser ones; "multi": the teacher predicts all scales with a side above a quarter of the
                last, given those of the degraded image.
            text: features of the prompts; None for no prompt.
        """
        text = text or self.null_text(len(lq_B3HW))
        condition = self.condition(lq_B3HW)
        if steps == "multi":
            generation = self._continue(self._coarse_bits(condition.pyramid), text, noise)
            return RestoredBatch(self.decode(generation.codes), generation.bits, None)
        logits = self.student_logits(condition, text)
        bits = self._select(logits, noise)
        if steps != "one":
            num_kept = self._num_kept(steps)
            bits = self._continue(bits[:num_kept], text, noise).bits
        codes = self.tokenizer.quantizer.indices_to_codes(bits, self.schedule.latent_size)
        return RestoredBatch(self.decode(codes), bits, logits)

    def _select(self, logits_BLZ2: Tensor, noise: Noise | None) -> list[Tensor]:
        bits = []
        for k, (tokens, scale) in enumerate(zip(self.schedule.slices, self.schedule.scales, strict=True)):
            part = logits_BLZ2[:, tokens]
            uniform = None if noise is None else noise(k, tuple(part.shape))
            bits.append(bits_to_map(select_bits(part, uniform), scale))
        return bits

    def _num_kept(self, steps: str | int) -> int:
        number = int(steps) if str(steps).isdecimal() else 0
        if not 1 <= number <= len(self.schedule):
            raise UserError(f"steps must be one, multi or 1 to {len(self.schedule)}, got {steps}")
        return len(self.schedule) - number + 1

    def _coarse_bits(self, pyramid: TokenPyramid) -> list[Tensor]:
        limit = max(self.schedule.latent_size) / 4
        return [bits for bits in pyramid.indices if max(bits.shape[-2:]) <= limit]

    def _continue(self, known_bits: Sequence[Tensor], text: TextFeatures, noise: Noise | None) -> Generation:
        """The teacher's scale-by-scale prediction of what follows the given scales."""
        with adapters_off(self.transformer):
            generator = MultiStepGenerator(self.transformer, self.tokenizer.quantizer, self.schedule)
            return generator(text, SamplingOptions(), noise=noise, known_bits=known_bits)

    def uncertainty(self, logits_BLZ2: Tensor) -> Tensor:
        """Where the student guesses: the entropy of its bits at each pixel, mean over the scales, (B, H, W).

        0 where all bits are decided, 1 where all are a coin toss. Each scale is up-sampled to pixels first.
        """
        entropy_BL1 = bit_entropy(logits_BLZ2)[..., None]
        maps = [
            F.interpolate(entropy, size=(self.tile, self.tile), mode="bilinear", align_corners=False)
            for entropy in self.split_bits(entropy_BL1)
        ]
        return torch.stack(maps).mean(dim=0)[:, 0]

    @torch.inference_mode()
    def restore(
        self,
        image: Tensor,
        scale: float = 4,
        *,
        seed: int = 0,
        select: str = "argmax",
        steps: str | int = "one",
        prompt: Tensor | None = None,
        overlap: int | None = None,
        batch: int = 8,
    ) -> Restoration:
        """Restore an image of any size; it is enlarged first, and padded or tiled, never squashed.

        Args:
            image: (3, H, W) float in [0, 1].
            scale: enlargement.
            seed: of the noise when sampling.
            select: "argmax" takes the likelier bits, "sample" draws them.
            steps: see `restore_batch`.
            prompt: text features (T, E) of a prompt; None for no prompt.
            overlap: pixels shared by neighbouring tiles; None for a quarter of a tile.
            batch: tiles per forward pass.

        Raises:
            UserError: unknown `select` or `steps`, an impossible overlap.
        """
        if select not in ("argmax", "sample"):
            raise UserError(f"select must be argmax or sample, got {select!r}")
        height, width = image.shape[-2:]
        size = scaled_size(height, width, scale)
        enlarged = resize(image, size, "bicubic") if size != (height, width) else image

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            noise = keyed_noise(seed, numbers, "restore", self.device) if select == "sample" else None
            text = None if prompt is None else TextFeatures.from_list([prompt.to(self.device)] * len(numbers))
            tiles = tiles_B3tt.to(self.device)
            return self.restore_batch(tiles, noise, steps, text).images_B3HW.to(tiles_B3tt.device)

        overlap = self.tile // 4 if overlap is None else overlap
        return Restoration(restore_tiled(enlarged, self.tile, overlap, batch, run).clamp(0, 1))
