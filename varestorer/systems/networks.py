"""The networks of VARestorer and what each does: tokens of an image, logits of teacher and student, images of codes.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `Z` bits per token.
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from varestorer.conditioning.pyramid import Condition, PyramidConditioner
from varestorer.conditioning.restorer import Restorer, load_restorer, new_restorer
from varestorer.systems.parts import allocate, check_part, load_part
from varestorer.systems.student import StudentConfig
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.autoencoder import clamp_keeping_gradient
from varestorer.tokenizer.autoencoder import init_weights as init_tokenizer_weights
from varestorer.transformer import TextContext, TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import adapters_off, attach_adapters, init_adapters, merge_adapters
from varestorer.transformer.layout import pyramid_layout
from varestorer.transformer.masks import BlockCausal
from varestorer.transformer.model import PreparedText
from varestorer.transformer.sampling import bits_to_map
from varestorer.utils.errors import UserError
from varestorer.utils.images import from_network, to_network
from varestorer.utils.seeds import torch_generator
from varestorer.weights.shipped import shipped

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _restorer(given: str | dict[str, int] | None, seed: int) -> Restorer | None:
    """The restorer of a file, or a new one of given sizes."""
    if isinstance(given, dict):
        return new_restorer(**given, seed=seed)
    return load_restorer(given) if given else None


class Networks(nn.Module):
    """Tokenizer, transformer and restorer, of sizes that fit, with their weights.

    Args:
        schedule: arguments of `ScaleSchedule.build`: `size`, or `sides`; the last scale is a square.
        tokenizer: arguments of `TokenizerConfig`.
        transformer: arguments of `TransformerConfig`.
        student: arguments of `StudentConfig`.
        restorer: what cleans images before they are tokenised: a file, a run or a bundle that holds a restorer (see
            `load_restorer`), or the sizes of a new one (arguments of `new_restorer`); None for nothing.
        weights: files of the parts "tokenizer" and "transformer": published, a bundle or a run, see
            `systems.parts.load_part`; a part without a file gets random weights.
        new_adapters: draw the adapters, whatever the transformer's file holds: to distil a student again from the
            teacher of a model that has one.
        seed: of the random weights.
    """

    def __init__(
        self,
        schedule: dict[str, Any],
        tokenizer: dict[str, Any],
        transformer: dict[str, Any],
        student: dict[str, Any] | None = None,
        restorer: str | dict[str, int] | None = None,
        weights: dict[str, str | None] | None = None,
        new_adapters: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.files = {part: shipped(file) for part, file in (weights or {}).items() if file}
        for part, file in self.files.items():
            check_part(part, file)
        self.restorer = _restorer(restorer, seed)
        self.schedule = ScaleSchedule.build(**schedule)
        self.student_config = StudentConfig(**(student or {}))
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(TokenizerConfig(**tokenizer))
            self.transformer = VARTransformer(TransformerConfig(**transformer))
            if (chosen := self.student_config).lora_rank and not chosen.merged:
                attach_adapters(self.transformer, chosen.lora_rank, chosen.cross_value_bias, chosen.lora_targets)
        self._check_sizes()
        self._schedule_options = dict(schedule)
        if torch.empty(0).device.type != "meta":  # torch 2.6 tells no default device inside `with torch.device(...)`
            self._fill(seed, new_adapters)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU
        if isinstance(restorer, str):
            self.files["restorer"] = shipped(restorer)

    @property
    def conditioner(self) -> PyramidConditioner:
        """What makes the student's input of a degraded image, by the restorer and tokenizer of now."""
        chosen, head_dim = self.student_config, self.transformer.config.head_dim
        options = chosen.long_input, chosen.long_positions, chosen.inputs
        return PyramidConditioner(self.tokenizer, head_dim, *options, restorer=self.restorer)

    @property
    def config(self) -> dict[str, Any]:
        """What the system is made of, as its constructor takes it: sizes, without files."""
        return {
            "schedule": self._schedule_options,
            "tokenizer": asdict(self.tokenizer.config),
            "transformer": asdict(self.transformer.config),
            "student": asdict(self.student_config),
        }

    def merge_adapters(self) -> Self:
        """Fold the adapters into the base weights; what is left is the student alone."""
        if self.student_config.lora_rank and not self.student_config.merged:
            merge_adapters(self.transformer)
            self.student_config = replace(self.student_config, merged=True)
        return self

    def set_precision(self, precision: str) -> Self:
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
    def _fill(self, seed: int, new_adapters: bool) -> None:
        """Weights of each part from its file, or drawn; adapters start without effect unless a file has them."""
        for part, file in self.files.items():
            load_part(self, part, file, new_adapters)
        drawn = allocate(self)
        if "tokenizer" not in self.files:
            init_tokenizer_weights(self.tokenizer, torch_generator(seed, "tokenizer"))
        if "transformer" not in self.files:
            self.transformer.init_weights(torch_generator(seed, "transformer"))
        if any(".lora_" in name for name in drawn):
            init_adapters(self.transformer, torch_generator(seed, "adapters"))

    def initial_state(self) -> dict[str, Tensor]:
        """The weights that no file can give again: what was drawn at random."""
        from_files = tuple(f"{part}." for part in self.files)
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

    def at_tile(self, side: int) -> Self:
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

    def text_batch(self, features_TE: Tensor | None, batch_size: int) -> TextFeatures:
        """One prompt's features (T, E), from any device, for a batch; the learned null text for no prompt."""
        if features_TE is None:
            return self.null_text(batch_size)
        return TextFeatures.from_list([features_TE.to(self.device)] * batch_size)

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
        mask = BlockCausal.of(layout)
        if teacher is not None:
            return teacher(pyramid.inputs(), text, layout, mask)
        with adapters_off(self.transformer):
            return self.transformer(pyramid.inputs(), text, layout, mask)

    def student_logits(self, condition: Condition, text: TextFeatures | TextContext | PreparedText) -> Tensor:
        """p_S(r_k | r_LQ): logits (B, L, Z, 2) of every scale in one pass; all tokens see all tokens."""
        mask = BlockCausal.of(condition.layout) if self.student_config.attention == "causal" else None
        num_tokens = self.schedule.num_tokens
        logits = self.transformer(condition.tokens_BLZ, text, condition.layout, mask, num_outputs=num_tokens)
        if keep := self.student_config.keep_bits:
            halves_BLZ = (condition.pyramid.labels().float() - 0.5) * keep  # of the margins
            logits = logits + torch.stack([-halves_BLZ, halves_BLZ], dim=-1)
        return logits

    @torch.no_grad()
    def residual(self, condition: Condition) -> Tensor | None:
        """What the tokenizer loses of the student's input, (B, 3, H, W) around [-2, 2]; None if not to be kept."""
        if not self.student_config.keep_residual:
            return None
        return condition.image_B3HW - self.tokenizer.decode(condition.pyramid.codes)

    def student_image(self, codes_BZhw: Tensor, residual_B3HW: Tensor | None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the student's codes, with the residual of its input where it is kept."""
        image = self.tokenizer.decode(codes_BZhw)
        return image if residual_B3HW is None else clamp_keeping_gradient(image + residual_B3HW)

    def codes(self, bits_BLZ: Tensor) -> Tensor:
        """Summed codes (B, Z, h_K, w_K) of the bits of all scales; keeps gradients of straight-through bits."""
        return self.tokenizer.quantizer.indices_to_codes(self.split_bits(bits_BLZ), self.schedule.latent_size)

    def split_bits(self, bits_BLZ: Tensor) -> list[Tensor]:
        """Bits of all scales as one map (B, Z, h, w) per scale."""
        pairs = zip(self.schedule.slices, self.schedule.scales, strict=True)
        return [bits_to_map(bits_BLZ[:, tokens], scale) for tokens, scale in pairs]
