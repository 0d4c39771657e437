"""H-VAR: restoration scale by scale with hierarchical tokens, three sizes from one pass (arXiv 2506.04990, 2605.14891).

degraded image -> tokenizer's encoder -> prefix -> transformer -> codes of all scales -> the sums that complete a target
size -> decoder -> an image of each size. There is no guidance, no text and no refiner.

No code of the authors is public. What the paper's notes leave open is a parameter, stored with the weights: the list of
scales, what becomes of tokens where the size grows (`tokenizer.reuse`), how an image is reduced (`tokenizer.reduce`).

Shapes: `B` batch, `H W` pixels, `t` side of a square, `L` tokens of all scales, `C` width, `Z` width of a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from omegaconf import OmegaConf
from torch import Tensor

from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import BATCH, Request, RestoredBatch
from varestorer.systems.one_step import OneStepConfig, OneStepSystem
from varestorer.systems.varsr_files import fill_tokenizer
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig
from varestorer.tokenizer.quantizer import resize_bicubic, to_tokens
from varestorer.transformer import Context, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import adapters_off, assign_plain
from varestorer.transformer.generation import Generation, Prefix, SamplingOptions
from varestorer.transformer.heads import Noise, keyed_noise
from varestorer.utils.device import to_device
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.tiling import restore_to_sizes, scaled_size
from varestorer.weights.bundle import is_bundle, read_config, shipped
from varestorer.weights.files import read_tensors
from varestorer.weights.load import check_part, fill
from varestorer.weights.published.varsr import TRANSFORMER_NESTED, network_kind, varsr_sizes, varsr_tensors
from varestorer.weights.resolve import model_of_run
from varestorer.weights.runs import is_run

VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Scales of the published VAR for 256 pixels, whose learned positions a new grid starts from."""
PUBLISHED = {
    "tokenizer": "vae_ch160v4096z32.pth (hub FoundationVision/var) or that of Switti (hub yresearch/VQVAE-Switti)",
    "transformer": "var_d16.pth (hub FoundationVision/var)",
}


class HVAR(OneStepSystem):
    """Tokenizer and transformer, with their weights.

    Args:
        schedule: arguments of `ScaleSchedule.build`: `sides`, and as `targets` those at which the sum of codes is an
            image; the last one is the trained square's.
        tokenizer: arguments of `TokenizerConfig`, with a vocabulary. `reuse` "none" makes a plain tokenizer of it,
            whose scales up to a target are decoded at the target's size although they were not made for it.
        transformer: arguments of `TransformerConfig`; what follows from the other parts need not be given.
        sampling: `top_k` and `top_p` of what is drawn (select=sample); the paper's notes leave them open.
        student: arguments of `OneStepConfig`.
        weights: files of the parts "tokenizer" and "transformer": VAR's, a bundle or a run; a part without a file gets
            random weights.
        new_reading: take parts of a run or a bundle although they were trained for another list of scales or another
            use of tokens, to train them for this one.
        seed: of the random weights.
    Attributes:
        nested: the schedule with all targets; `schedule` has the last one alone where the tokenizer is plain.
    """

    name, title = "hvar", "H-VAR"
    published = PUBLISHED
    enlarge = "bilinear"  # as the notes of the paper say
    makers: ClassVar[dict[str, Callable[..., Any]]] = {
        "schedule": ScaleSchedule.build,
        "tokenizer": TokenizerConfig,
        "transformer": TransformerConfig,
        "sampling": SamplingOptions,
        "student": OneStepConfig,
    }

    def __init__(
        self,
        schedule: dict[str, Any],
        tokenizer: dict[str, Any],
        transformer: dict[str, Any],
        sampling: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        weights: dict[str, str | None] | None = None,
        new_reading: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.files = {part: shipped(file) for part, file in (weights or {}).items() if file}
        self.sampling = SamplingOptions(**(sampling or {}))
        self.student_config = OneStepConfig(**(student or {}))
        self.nested = ScaleSchedule.build(**schedule)
        sizes = TokenizerConfig(**tokenizer)
        self.schedule = self.nested if sizes.reuse != "none" else replace(self.nested, targets=())
        self._options = {"schedule": dict(schedule), "sampling": dict(sampling or {})}
        own: dict[str, Any] = {"prefix_width": sizes.latent_width, "text_width": 0, "text_length": 0, "num_classes": 1}
        own |= {"positions": "grid", "position_size": self.schedule.latent_size[0]}
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(sizes)
            self.transformer = self.make_transformer(sizes, transformer, **own)
        if any(h != w for h, w in self.nested.targets):
            raise UserError("images are restored in squares: model.schedule.targets must be squares")
        self.check_codebook()
        self.check_networks(len(self.schedule))
        for part, file in self.files.items():
            self._check_file(part, file, new_reading)
        if torch.get_default_device().type != "meta":
            self._fill(seed)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU

    # ---- what the network sees and says

    def prefix_of(self, lq_B3tt: Tensor) -> Prefix:
        """Degraded squares in [0, 1] as tokens in front of all scales: the encoder's latents, not quantized."""
        with torch.no_grad():
            features_BZhw = self.tokenizer.features(to_network(lq_B3tt))
        embed = self.transformer.prefix_embed
        assert embed is not None
        return Prefix(embed(to_tokens(features_BZhw)), self.schedule.latent_size)

    def see(self, lq_B3tt: Tensor) -> Prefix:
        return self.prefix_of(lq_B3tt)

    def context(self, batch_size: int) -> Context:
        """The one learned condition, for a batch."""
        return Context(self.transformer.condition.embedding.weight[:1].expand(batch_size, -1))

    def logits(self, inputs_BLZ: Tensor, prefix: Prefix) -> Tensor:
        """Logits (B, L, V) of all scales, given the true coarser ones (`TokenPyramid.inputs`) and the prefix."""
        return self.all_scales(self.transformer, inputs_BLZ, self.context(len(inputs_BLZ)), prefix, is_causal=True)

    @torch.no_grad()
    def generate(self, lq_B3tt: Tensor, noise: Noise | None = None, num_scales: int | None = None) -> Generation:
        """Predict the scales (the first ones, or all) one after the other, with a cache of keys and values.

        Squares are in [0, 1], of side `tile`; uniform noise is as of `heads.keyed_noise`, None takes the likeliest
        codes.
        """
        prepared, prefix = self.transformer.prepare(self.context(len(lq_B3tt))), self.prefix_of(lq_B3tt)
        return self.generator(prepared, self.sampling, noise=noise, prefix=prefix, num_scales=num_scales)

    # ---- sizes

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(h * self.tokenizer.stride for h, _ in self.nested.targets)

    def decode_sides(self, indices: list[Tensor], sides: tuple[int, ...]) -> list[Tensor]:
        """Images in [0, 1] of the given sides, from the tokens of the scales up to the largest; no other is decoded."""
        sums = self.tokenizer.quantizer.targets_to_codes(indices, self.nested)
        return [self.decode(codes) for codes in sums if codes.shape[-1] * self.tokenizer.stride in sides]

    def _num_scales(self, side: int) -> int:
        """Scales that an image of this side needs."""
        largest = side // self.tokenizer.stride
        return sum(h <= largest for h, _ in self.nested.scales)

    # ---- restoring

    def accept(self, request: Request, uncertainty: bool) -> Request:
        request = super().accept(request, uncertainty)
        if uncertainty and request.sides and request.sides[-1] != self.tile:
            raise UserError("uncertainty is that of all scales: ask for the largest size too, or leave it out")
        return replace(request, context=uncertainty)

    def restore_squares(self, lq_B3tt: Tensor, numbers: list[int], request: Request) -> RestoredBatch:
        noise = keyed_noise(request.seed, numbers, "restore", self.device) if request.select == "sample" else None
        sides = request.sides or (self.tile,)
        if self.is_one_step(request):
            uniforms = self.uniforms(noise, len(lq_B3tt))
            indices, logits = self.in_one_step(lq_B3tt, self.context(len(lq_B3tt)), uniforms)
        else:
            with adapters_off(self.transformer):
                generation = self.generate(lq_B3tt, noise, self._num_scales(sides[-1]))
            indices, logits = generation.indices, torch.cat([*generation.logits.values()], dim=1)
        *smaller, largest = self.decode_sides(indices, sides)
        return RestoredBatch(largest, indices, logits if request.context else None, tuple(smaller))

    @torch.inference_mode()
    def reconstruct_sizes(self, image: Tensor) -> list[Tensor]:
        """An image of any size after it passed the tokenizer, at each of the sizes, smallest first; (3, h, w)."""

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> list[Tensor]:
            indices = self.encode(to_device(tiles_B3tt, self.device)).indices
            return [to_device(x, tiles_B3tt.device) for x in self.decode_sides([*indices], self.sides)]

        height, width = image.shape[-2:]
        results = [(scaled_size(height, width, side / self.tile), side) for side in self.sides]
        whole = restore_to_sizes(image, (height, width), self.tile, self.tile // 4, BATCH, run, results, self.step)
        return [x.clamp_(0, 1) for x in whole]

    def _speed_up(self, chosen: Acceleration) -> None:
        if chosen.graphs:
            raise UserError("graphs=true is for systems of one step; leave it out")
        super()._speed_up(chosen)

    # ---- sizes and weights

    @property
    def config(self) -> dict[str, Any]:
        networks = {"tokenizer": asdict(self.tokenizer.config), "transformer": asdict(self.transformer.config)}
        return {**self._options, **networks, "student": asdict(self.student_config)}

    @property
    def reading(self) -> dict[str, Any]:
        """What decides which tokens an image has, beside the weights."""
        return _reading({"schedule": self._options["schedule"], "tokenizer": asdict(self.tokenizer.config)})

    def _check_file(self, part: str, file: Path, new_reading: bool) -> None:
        """Refuse at once a file that is not there, or a part of another reading."""
        check_part(part, file, self.published)
        theirs: dict[str, Any] = {}  # a published file says nothing
        if is_run(file):
            theirs = _reading(OmegaConf.to_container(model_of_run(file)))  # type: ignore[arg-type]
        elif is_bundle(file):
            theirs = _reading(read_config(file))
        differing = [name for name, value in theirs.items() if value != self.reading[name]]
        if differing and not new_reading:
            name = differing[0]
            raise UserError(
                f"the {part} of {file} was trained with model.{name}={theirs[name]}, this model has "
                f"{self.reading[name]}; set it so, or model.new_reading=true to train the part for another"
            )

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        for part, file in self.files.items():
            if part == "tokenizer":
                fill_tokenizer(self.tokenizer, file)
            elif is_run(file) or is_bundle(file):
                fill(self.transformer, part, file)
            else:
                var = read_tensors(file, TRANSFORMER_NESTED)
                assign_plain(self.transformer, start_from_var(self.transformer, var, str(file)))
        self.draw_rest(seed)


def start_from_var(transformer: VARTransformer, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights to start from, out of the tensors of a published VAR for 256 pixels (`source`, for messages).

    The grid of positions is VAR's last scale, enlarged bicubically; the condition is that of no class; the prefix is
    embedded as words are; levels that VAR has not are as its last. UserError: no VAR, or one of other sizes.
    """
    config = transformer.config
    if network_kind(tensors) != "var":
        raise UserError(f"{source} is no VAR; get {PUBLISHED['transformer']}, or give a run or a bundle")
    sizes = varsr_sizes(tensors)
    own = {
        "num_classes": sizes["num_classes"],
        "num_levels": sizes["num_levels"],
        "positions": "rows",
        "position_size": sum(side * side for side in VAR_SIDES),
        "start_rows": 1,
        "prefix_width": 0,
    }
    with torch.device("meta"):
        var = VARTransformer(replace(config, **own))
    given = {name: t.float() for name, t in varsr_tensors(var.state_dict(), VAR_SIDES, tensors, source).items()}
    table = given["positions.table"][:, -(VAR_SIDES[-1] ** 2) :]
    given["positions.table"] = enlarged_grid(table, config.position_size)
    given["condition.embedding.weight"] = given["condition.embedding.weight"][-1:]
    levels = given["level_embed.weight"]
    rows = torch.arange(config.num_levels).clamp(max=len(levels) - 1)
    given["level_embed.weight"] = levels[rows]
    words = ("weight", "bias")
    return given | {f"prefix_embed.{name}": given[f"word_embed.{name}"].clone() for name in words}


def enlarged_grid(rows_1NC: Tensor, side: int) -> Tensor:
    """A learned square grid of positions, (1, N, C) row-major, enlarged bicubically to (1, side^2, C)."""
    grid_1Chw = rearrange(rows_1NC, "1 (h w) c -> 1 c h w", h=math.isqrt(rows_1NC.shape[1]))
    return rearrange(resize_bicubic(grid_1Chw, (side, side)), "1 c h w -> 1 (h w) c")


def _reading(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a model's config that decide which tokens an image has."""
    keys = {"schedule": ("sides", "targets"), "tokenizer": ("reuse", "reduce")}
    parts = ((part, key, config.get(part, {})) for part, some in keys.items() for key in some)
    found = {f"{part}.{key}": held[key] for part, key, held in parts if key in held}
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in found.items()}
