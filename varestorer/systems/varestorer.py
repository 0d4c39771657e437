"""VARestorer: one-step restoration by a visual autoregressive transformer (arXiv 2604.21450).

degraded image -> (restorer) -> tokenizer -> pyramid of tokens -> student -> bits of all scales -> decoder -> image.
Teacher and student are one transformer with its adapters off or on.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `Z` bits per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from varestorer.conditioning.pyramid import Condition, PyramidConditioner
from varestorer.conditioning.restorer import load_restorer
from varestorer.conditioning.text_encoder import DEFAULT_NAME, DEFAULT_WIDTH, TextEncoder
from varestorer.systems.bundle import save_bundle
from varestorer.systems.loading import HOW, build, download
from varestorer.systems.parts import allocate, check_part, load_part
from varestorer.systems.prefix import generate_from_prefix
from varestorer.systems.student import StudentConfig
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.autoencoder import init_weights as init_tokenizer_weights
from varestorer.transformer import TextContext, TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import adapters_off, attach_adapters, init_adapters, merge_adapters
from varestorer.transformer.generation import Generation, MultiStepGenerator, SamplingOptions
from varestorer.transformer.layout import pyramid_layout
from varestorer.transformer.masks import MASKS, block_causal_mask
from varestorer.transformer.sampling import Noise, bit_entropy, bits_to_map, keyed_noise, select_bits
from varestorer.utils.color import match_color
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.hub import first_line, is_hub_name
from varestorer.utils.images import from_network, to_network
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import restore_tiled, scaled_size

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    """A restored image.

    Attributes:
        image: (3, H, W) float32 in [0, 1].
        uncertainty_KHW: where the student guessed, at each scale: mean entropy of a token's bits, 0 (decided) to 1 (a
            coin toss), up-sampled to the image; None unless asked for.
    """

    image: Tensor
    uncertainty_KHW: Tensor | None = None


class VARestorer(
    nn.Module,
    ModelHubMixin,
    library_name="varestorer",
    pipeline_tag="image-to-image",
    tags=["super-resolution", "image-restoration"],
    paper_url="https://arxiv.org/abs/2604.21450",
):
    """The pieces put together.

    `from_pretrained` loads one, `save_pretrained` and `push_to_hub` (huggingface_hub's) share one as a bundle, in
    the form it has: after `merge_adapters` without adapters, after `set_precision` in that precision.

    Args:
        schedule: arguments of `ScaleSchedule.build`: `size`, or `sides`; the last scale is a square.
        tokenizer: arguments of `TokenizerConfig`.
        transformer: arguments of `TransformerConfig`.
        student: arguments of `StudentConfig`.
        restorer: file of the restorer that cleans images before they are tokenised, or None.
        weights: files of the parts "tokenizer" and "transformer": published, a bundle or a run, see
            `systems.parts.load_part`; a part without a file gets random weights.
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
        self.files = {part: file for part, file in (weights or {}).items() if file}
        for part, file in self.files.items():
            check_part(part, file)
        self.restorer = load_restorer(restorer) if restorer else None
        self.schedule = ScaleSchedule.build(**schedule)
        self.student_config = StudentConfig(**(student or {}))
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(TokenizerConfig(**tokenizer))
            self.transformer = VARTransformer(TransformerConfig(**transformer))
            if (chosen := self.student_config).lora_rank and not chosen.merged:
                attach_adapters(self.transformer, chosen.lora_rank, chosen.cross_value_bias, chosen.lora_targets)
        self._check_sizes()
        self._schedule_options = dict(schedule)
        if torch.get_default_device().type != "meta":
            self._fill(seed)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU
        if restorer:
            self.files["restorer"] = restorer
        self.conditioner = PyramidConditioner(
            self.tokenizer,
            self.transformer.config.head_dim,
            self.student_config.long_input,
            self.student_config.long_positions,
            self.restorer,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None = None, **options: Any
    ) -> VARestorer:
        """Load a system, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a bundle's folder, a run of scripts/train.py (the averaged weights of its
                latest checkpoint) or a checkpoint of one, the published student with its tokenizer and restorer
                beside it, or a bundle's name on the hub.
            options: `device`; `merge=True` folds the adapters into the weights (faster, but only for `steps="one"`);
                `tokenizer_file` and `restorer_file` of the published student, where they lie elsewhere; for the
                hub `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            UsageError: neither a path nor a name that the hub knows.
            UserError: the path holds no system, or its files do not fit.
        """
        if pretrained_model_name_or_path is None:
            raise UserError("no model comes with this version; name a bundle, a run or a published file")
        name = str(Path(pretrained_model_name_or_path).expanduser())
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
        tokenizer_file: str | None = None,
        restorer_file: str | None = None,
        **hub: Any,
    ) -> VARestorer:
        path = Path(model_id) if Path(model_id).exists() or not is_hub_name(model_id) else download(model_id, hub)
        system: VARestorer = build(cls, path, tokenizer_file, restorer_file)
        if merge:
            system.merge_adapters()
        return system.to(device).eval().requires_grad_(False)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_bundle(self, save_directory)

    @property
    def config(self) -> dict[str, Any]:
        """What the system is made of, as its constructor takes it: sizes, without files."""
        return {
            "schedule": self._schedule_options,
            "tokenizer": asdict(self.tokenizer.config),
            "transformer": asdict(self.transformer.config),
            "student": asdict(self.student_config),
        }

    def merge_adapters(self) -> VARestorer:
        """Fold the adapters into the base weights; what is left is the student alone."""
        if self.student_config.lora_rank and not self.student_config.merged:
            merge_adapters(self.transformer)
            self.student_config = replace(self.student_config, merged=True)
        return self

    def set_precision(self, precision: str) -> VARestorer:
        """Keep the blocks of the transformer in "bf16", or in "fp32"; the rest is always float32 (spec E)."""
        if precision not in PRECISIONS:
            raise UserError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
        self.transformer.blocks.to(PRECISIONS[precision])
        return self

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
        for part, file in self.files.items():
            load_part(self, part, file)
        drawn = allocate(self)
        if "tokenizer" not in self.files:
            init_tokenizer_weights(self.tokenizer, torch_generator(seed, "tokenizer"))
        if "transformer" not in self.files:
            self.transformer.init_weights(torch_generator(seed, "transformer"))
        if any(".lora_" in name for name in drawn):
            init_adapters(self.transformer, torch_generator(seed, "adapters"))

    def initial_state(self) -> dict[str, Tensor]:
        """The weights that no file can give again: what was drawn at random."""
        from_files = (*(f"{part}." for part in self.files), "restorer.")
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(from_files)}

    @property
    def tile(self) -> int:
        """Side of the square restored in one go, pixels."""
        return self.schedule.latent_size[0] * self.tokenizer.stride

    @property
    def tiles(self) -> tuple[int, ...]:
        """Sides that `at_tile` takes, pixels: from half the trained one to the end of the table of positions."""
        squares = (h * self.tokenizer.stride for h, w in self.schedule.position_scales if h == w)
        return tuple(side for side in squares if 2 * side >= self.tile)

    def at_tile(self, side: int) -> VARestorer:
        """This system, with the same weights, restoring squares of another side (pixels).

        Raises:
            UserError: not one of `tiles`.
        """
        if side not in self.tiles:
            raise UserError(f"tile must be one of {', '.join(map(str, self.tiles))} pixels for this model, got {side}")
        other = copy(self)
        other.schedule = self.schedule.with_side(side // self.tokenizer.stride)
        return other

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
        mask = MASKS[self.student_config.attention](condition.layout.levels_L)
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
        if steps != "one" and self.student_config.merged:
            raise UserError(
                f"steps={steps} needs the teacher, and the adapters of this model are merged; use steps=one"
            )
        text = text or self.null_text(len(lq_B3HW))
        condition = self.condition(lq_B3HW)
        if self.student_config.conditioning == "prefix":
            generation = generate_from_prefix(self, condition.pyramid, text, noise)
            return RestoredBatch(self.decode(generation.codes), generation.bits, None)
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
        """Where the student guesses: mean entropy of each token's bits, up-sampled to pixels, (B, K, H, W).

        0 where all bits of a token are decided, 1 where all are a coin toss; one map for each scale.
        """
        entropy_BL1 = bit_entropy(logits_BLZ2)[..., None]
        maps = [
            F.interpolate(entropy, size=(self.tile, self.tile), mode="bilinear", align_corners=False)
            for entropy in self.split_bits(entropy_BL1)
        ]
        return torch.cat(maps, dim=1)

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

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            tiles = tiles_B3tt.to(self.device)
            noise = keyed_noise(seed, numbers, "restore", self.device) if select == "sample" else None
            text = None if features is None else TextFeatures.from_list([features.to(self.device)] * len(numbers))
            restored = system.restore_batch(tiles, noise, steps, text)
            images = match_color(restored.images_B3HW, tiles, color)
            if uncertainty and restored.logits_BLZ2 is not None:
                images = torch.cat([images, system.uncertainty(restored.logits_BLZ2)], dim=1)
            return images.to(tiles_B3tt.device)

        size = scaled_size(image.shape[-2], image.shape[-1], scale)
        overlap = system.tile // 4 if overlap is None else overlap
        channels = restore_tiled(image, size, system.tile, overlap, batch, run).clamp_(0, 1)
        return Restoration(channels[:3], channels[3:] if uncertainty else None)
