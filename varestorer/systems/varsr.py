"""VARSR: restoration scale by scale behind a prefix of the degraded image (arXiv 2501.18993).

degraded image -> convolutions -> prefix tokens -> transformer, guided away from bad quality -> codes of all scales ->
refiner (a small diffusion model of what the last codes leave over) -> decoder -> image.

Without a prefix the same networks make pictures of classes: VARSR's first stage (C2I), and VAR.

Shapes: `B` batch, `H W` pixels, `t` side of a square, `P` prefix tokens, `L` tokens of all scales, `l` those of the
last one, `C` width, `Z` width of a code, `n` steps of the refiner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from varestorer.conditioning.prefix_encoder import PrefixEncoder
from varestorer.systems import official_varsr
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import Request, RestoredBatch
from varestorer.systems.one_step import OneStepConfig, OneStepSystem
from varestorer.systems.varsr_files import PUBLISHED, fill_tokenizer, network_of, published_sizes
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.quantizer import to_map, to_tokens
from varestorer.transformer import ClassLabels, Context, PreparedCondition, TransformerConfig
from varestorer.transformer.adapters import adapters_off, assign_plain, init_adapters, plain_state_dict
from varestorer.transformer.blocks import EPS
from varestorer.transformer.generation import Generation, MultiStepGenerator, Prefix, SamplingOptions
from varestorer.transformer.heads import keyed_noise
from varestorer.transformer.layout import BlockCausal
from varestorer.transformer.refiner import Refined, Refiner
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.finite import spread_nan
from varestorer.utils.images import as_picture, from_levels, to_levels, to_network
from varestorer.utils.seeds import normal_per_sample, torch_generator
from varestorer.utils.watch import watch
from varestorer.weights.bundle import shipped
from varestorer.weights.load import allocate, fitting, split_adapters

GROWTHS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda k, last: k / last,
    "ahead": lambda k, last: (k + 1) / last,
    "square": lambda k, last: (k / last) ** 2,
}
"""Share of the guidance at scale k, where `last` is the number of the last one."""
GOOD = 0
"""Class of good pictures; the last class is what guidance leads away from: bad pictures, or no class."""


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made of predictions; the defaults are the released restorer's.

    Attributes:
        guidance: strength t: logits are (1 + t) positive - t negative, and the refiner's noise likewise; 0 asks the
            network half as often.
        growth: of t over the scales, one of `GROWTHS`: "linear" from 0, "ahead" one scale earlier (the class model's),
            "square" (that of the class model's first release).
        top_k: likeliest codes that are left where codes are drawn (select=sample); 0 leaves all.
        top_p: likewise, the smallest set of codes whose probability exceeds it.
        refiner_steps: n, 1 to 1000.
        use_refiner: whether the refiner adds what the codes leave over.
        raw_last: the codes of the last scale are added without phi (VARSR); VAR has it everywhere.
    """

    guidance: float = 6.0
    growth: str = "linear"
    top_k: int = 20
    top_p: float = 0.75
    refiner_steps: int = 10
    use_refiner: bool = True
    raw_last: bool = True

    def __post_init__(self) -> None:
        checks = {
            "guidance": (self.guidance >= 0, "0 or more"),
            "growth": (self.growth in GROWTHS, " or ".join(GROWTHS)),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "refiner_steps": (1 <= self.refiner_steps <= 1000, "1 to 1000"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise UserError(f"model.sampling.{name} must be {wanted}, got {getattr(self, name)}")

    def strengths(self, num_scales: int) -> list[float]:
        """t of each scale."""
        last = max(num_scales - 1, 1)
        return [self.guidance * GROWTHS[self.growth](k, last) for k in range(num_scales)]

    def options(self, num_scales: int) -> SamplingOptions:
        """Of the generator, whose c is 1 + t."""
        return SamplingOptions([1 + t for t in self.strengths(num_scales)], top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Draws:
    """What is drawn for a batch.

    `uniforms` are of the codes of each scale, (B, l); None takes the likeliest. `normals` are of the refiner, its start
    and one for each step but the last, (B, l, Z); empty for no refiner.
    """

    uniforms: tuple[Tensor, ...] | None = None
    normals: tuple[Tensor, ...] = ()


class VARSR(OneStepSystem):
    """Tokenizer, transformer, prefix encoder and refiner, with their weights.

    Args:
        schedule: arguments of `ScaleSchedule.build`, the last scale is a square.
        tokenizer: arguments of `TokenizerConfig`, with a vocabulary.
        transformer: arguments of `TransformerConfig`; what follows from the other parts need not be given. The last
            class is the negative one.
        prefix: `channels` of the `PrefixEncoder`; None for a model of classes, which restores nothing.
        refiner: `width` and `depth` of the `Refiner`; None for none.
        sampling: arguments of `SamplingConfig`.
        student: arguments of `OneStepConfig`.
        weights: files of the parts "tokenizer" and "transformer" (with prefix encoder and refiner): published ones or
            runs. From a model of classes a restorer takes what fits; the rest is drawn.
        seed: of the random weights.
    """

    name, title = "varsr", "VARSR"
    published = PUBLISHED
    makers: ClassVar[dict[str, Callable[..., Any]]] = {
        "schedule": ScaleSchedule.build,
        "tokenizer": TokenizerConfig,
        "transformer": TransformerConfig,
        "prefix": PrefixEncoder,
        "refiner": Refiner,
        "sampling": SamplingConfig,
        "student": OneStepConfig,
    }

    def __init__(
        self,
        schedule: dict[str, Any],
        tokenizer: dict[str, Any],
        transformer: dict[str, Any],
        prefix: dict[str, Any] | None = None,
        refiner: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        weights: dict[str, str | None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.files = {part: shipped(file) for part, file in (weights or {}).items() if file}
        self.schedule = ScaleSchedule.build(**schedule)
        self.sampling = SamplingConfig(**(sampling or {}))
        self.student_config = OneStepConfig(**(student or {}))
        self._options = {"schedule": dict(schedule), "prefix": prefix, "refiner": refiner}
        sizes = TokenizerConfig(**tokenizer)
        start_rows = 1 if prefix is None else 1 + self.schedule.num_tokens_per_scale[-1]
        own = {"num_classes": 2, "positions": "rope_grid", "start_rows": start_rows}
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(sizes)
            self.transformer = self.make_transformer(sizes, transformer, **own)
            width = self.transformer.config.width
            self.prefix_encoder = None if prefix is None else PrefixEncoder(width, **prefix)
            self.refiner = None if refiner is None else Refiner(sizes.latent_width, width, **refiner)
            self.refiner_norm = None if refiner is None else nn.LayerNorm(width, eps=EPS)
        self._check_sizes()
        self.qualities: PreparedCondition | None = None
        if torch.get_default_device().type != "meta":
            self._fill(seed)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU

    def _check_sizes(self) -> None:
        self.check_codebook()
        self.check_networks(len(self.schedule))
        if self.transformer.config.num_classes < 2:
            raise UserError("model.transformer.num_classes must be 2 or more: the last class is the negative one")
        encoder = self.prefix_encoder
        if encoder is not None and encoder.stride != self.tokenizer.stride:
            raise UserError(
                f"model.prefix.channels must have as many entries as model.tokenizer.multipliers: one token for "
                f"{self.tokenizer.stride} pixels, got {encoder.stride}"
            )

    # ---- what the networks see and say

    @property
    def generator(self) -> MultiStepGenerator:
        parts = self.transformer, self.tokenizer.quantizer, self.schedule
        return MultiStepGenerator(*parts, raw_last=self.sampling.raw_last)

    def encode(self, images_B3HW: Tensor) -> TokenPyramid:
        raw_last = self.sampling.raw_last
        return self.tokenizer.encode(to_network(images_B3HW), self.schedule, raw_last=raw_last)

    def summed(self, indices: Sequence[Tensor]) -> Tensor:
        raw_last = self.sampling.raw_last
        return self.tokenizer.quantizer.indices_to_codes(indices, self.schedule, raw_last=raw_last)

    @watch("prefix encoder")
    def prefix_of(self, lq_B3tt: Tensor) -> Prefix | None:
        """Tokens of degraded squares in [-1, 1]; None where the model has none."""
        if self.prefix_encoder is None:
            return None
        with self.transformer.precision(lq_B3tt.device):
            return Prefix(self.prefix_encoder(lq_B3tt).float(), self.schedule.latent_size)

    def forced_hidden(self, inputs_BLZ: Tensor, context: Context, lq_B3tt: Tensor | None) -> Tensor:
        """What leaves the last block for the tokens of all scales, given the true coarser ones (`TokenPyramid.inputs`).

        (B, L, C); the degraded squares, in [-1, 1], are of no use without a prefix.
        """
        prefix = None if lq_B3tt is None else self.prefix_of(lq_B3tt)
        tokens, size = (None, None) if prefix is None else (prefix.tokens_BPC, prefix.size)
        layout = self.transformer.layout(self.schedule, inputs_BLZ.device, size)
        asked = slice(len(layout) - self.schedule.num_tokens, None)
        mask = BlockCausal.of(layout)
        return self.transformer.hidden(inputs_BLZ, context, layout, mask, asked=asked, prefix_BPC=tokens)

    def see(self, lq_B3tt: Tensor) -> Prefix:
        self._check_restores()
        prefix = self.prefix_of(to_network(lq_B3tt))
        assert prefix is not None
        return prefix

    def refiner_condition(self, hidden_BlC: Tensor, indices_Bhw: Tensor) -> tuple[Tensor, Tensor]:
        """z of the tokens of the last scale (B, l, C), and their codes (B, l, Z).

        Of what left the last block, (B, l, C), and the chosen codes (b, h, w), where B may be a multiple of b.
        """
        assert self.refiner_norm is not None
        codes_BlZ = to_tokens(self.tokenizer.quantizer.codebook.codes(indices_Bhw))
        repeats = len(hidden_BlC) // len(codes_BlZ)
        words_BlC = self.transformer.word_embed(codes_BlZ).repeat(repeats, 1, 1)
        return self.refiner_norm(hidden_BlC + words_BlC), codes_BlZ

    def prepare(self, labels_B: Tensor) -> PreparedCondition:
        """All that depends on the classes alone: those of the samples, then the negative one where it is asked."""
        is_guided = self.sampling.options(len(self.schedule)).is_guided
        return self.generator.prepare(ClassLabels(labels_B), is_guided)

    @torch.no_grad()
    def predict(self, prepared: PreparedCondition, prefix: Prefix | None, draws: Draws) -> Predicted:
        """Codes of all scales, refined, without a word between host and device; all is of the B samples."""
        uniforms = draws.uniforms
        noise = None if uniforms is None else lambda k, shape: uniforms[k].view(shape)
        options = self.sampling.options(len(self.schedule))
        generation = self.generator(prepared, options, noise=noise, prefix=prefix)
        if not draws.normals:
            return Predicted(generation.codes, generation, None)
        refined = self._refine(generation, draws.normals)
        return Predicted(generation.codes + to_map(refined.residual, self.schedule.latent_size), generation, refined)

    @watch("refiner")
    def _refine(self, generation: Generation, normals: Sequence[Tensor]) -> Refined:
        """What the codes of the last scale leave over, drawn by the refiner."""
        assert self.refiner is not None and generation.hidden is not None
        z, _ = self.refiner_condition(generation.hidden, generation.indices[-1])
        positive, *negative = z.split(len(generation.codes))
        strength, steps = self.sampling.strengths(len(self.schedule))[-1], self.sampling.refiner_steps
        with self.transformer.precision(z.device):
            return self.refiner.sample(
                positive,
                lambda draw, shape: normals[draw].view(shape),
                negative[0] if negative else None,
                strength,
                steps,
            )

    def draws(self, numbers: Sequence[int], seed: int, is_sampled: bool) -> Draws:
        """Noise in which that of a square depends on the seed and its number alone."""
        noise = keyed_noise(seed, numbers, "codes", self.device) if is_sampled else None
        drawn = self.uniforms(noise, len(numbers))
        uniforms = None if drawn is None else tuple(drawn)
        if self.refiner is None or not self.sampling.use_refiner:
            return Draws(uniforms)
        normal = keyed_noise(seed, numbers, "refiner", self.device, normal_per_sample)
        shape = (len(numbers), self.schedule.num_tokens_per_scale[-1], self.tokenizer.config.latent_width)
        return Draws(uniforms, tuple(normal(draw, shape) for draw in range(self.sampling.refiner_steps)))

    # ---- restoring squares, or making pictures of classes

    def accept(self, request: Request, uncertainty: bool) -> Request:
        self._check_restores()
        request = super().accept(request, uncertainty)
        if self.is_one_step(request):
            return replace(request, context=self.transformer.prepare(ClassLabels(self._good)))
        with adapters_off(self.transformer):
            return replace(request, context=self.qualities or self.prepare(self._good))

    def restore_squares(self, lq_B3tt: Tensor, numbers: list[int], request: Request) -> RestoredBatch:
        draws = self.draws(numbers, request.seed, request.select == "sample")
        prepared = request.context.for_each(len(numbers))
        run = self.graphs or (lambda function, *inputs: function(*inputs))
        if self.is_one_step(request):
            restored, is_finite = run(self._restore_in_one_step, prepared, lq_B3tt, draws)
        else:
            with adapters_off(self.transformer):
                restored, is_finite = run(self._restore, prepared, lq_B3tt, draws)
        if is_finite is not None:
            Refined(restored.images_B3HW, is_finite).check()
        return restored

    def _restore(self, prepared: PreparedCondition, lq_B3tt: Tensor, draws: Draws) -> tuple[RestoredBatch, Any]:
        predicted = self.predict(prepared, self.prefix_of(to_network(lq_B3tt)), draws)
        images = self.decode(predicted.codes)
        logits = torch.cat([x[: len(images)] for x in predicted.generation.logits.values()], dim=1)
        is_finite = None if predicted.refined is None else predicted.refined.is_finite_n
        return RestoredBatch(images, predicted.generation.indices, logits), is_finite

    def _restore_in_one_step(
        self, prepared: PreparedCondition, lq_B3tt: Tensor, draws: Draws
    ) -> tuple[RestoredBatch, None]:
        indices, logits = self.in_one_step(lq_B3tt, prepared, draws.uniforms)
        images = self.decode(spread_nan(self.summed(indices), logits))
        return RestoredBatch(images, indices, logits), None

    @torch.inference_mode()
    def make(self, classes: Sequence[int], seed: int = 0, select: str = "sample") -> RestoredBatch:
        """Pictures of classes (one a picture, from 0), by a model without a prefix.

        "sample" draws the codes, "argmax" takes the likeliest; what is drawn depends on the seed and on the place in
        `classes`. UserError: a model with a prefix, or a class that it has not.
        """
        if self.prefix_encoder is not None:
            raise UserError("this model restores images, it makes none of classes: use restore")
        most = self.transformer.config.num_classes - 1
        if not all(0 <= number < most for number in classes):
            raise UserError(f"classes must be from 0 to {most - 1}, got {list(classes)}")
        draws = self.draws(range(len(classes)), seed, Request(select=select).select == "sample")
        predicted = self.predict(self.prepare(torch.tensor(list(classes), device=self.device)), None, draws)
        if predicted.refined is not None:
            predicted.refined.check()
        return RestoredBatch(self.decode(predicted.codes), predicted.generation.indices)

    def check_official(self) -> None:
        self._check_restores()
        if self.tile != official_varsr.SIDE:
            raise UsageError(f"compat=official works at {official_varsr.SIDE} pixels, and this model at {self.tile}")

    @torch.inference_mode()
    def restore_official(
        self, image_3HW: Tensor, scale: float = 4, *, prompt: Tensor | None = None, tiled: bool = False, seed: int = 0
    ) -> Tensor:
        """As the released scripts, see `official_varsr`; the colors are matched by their default, AdaIN."""
        self.check_official()
        if prompt is not None or scale != int(scale):
            raise UserError("compat=official of VARSR takes no words, and a whole scale")
        numbers = iter(range(2**31))
        with adapters_off(self.transformer):
            good = self.prepare(self._good)

        def encode(tiles_t3HW: Tensor) -> Tensor:
            draws = self.draws([next(numbers) for _ in tiles_t3HW], seed, is_sampled=False)
            prefix = self.prefix_of(tiles_t3HW.to(self.device))
            with adapters_off(self.transformer):
                predicted = self.predict(good.for_each(len(tiles_t3HW)), prefix, draws)
            if predicted.refined is not None:
                predicted.refined.check()
            return predicted.codes

        lq_HW3 = to_levels(as_picture(image_3HW))
        if tiled:
            restored_HW3 = official_varsr.restore_tiled(lq_HW3, encode, self.tokenizer.decode, int(scale))
        else:
            restored_HW3 = official_varsr.restore_square(lq_HW3, encode, self.tokenizer.decode)
        return from_levels(restored_HW3).to(image_3HW)

    @property
    def _good(self) -> Tensor:
        return torch.full((1,), GOOD, device=self.device)

    def _check_restores(self) -> None:
        if self.prefix_encoder is None:
            raise UserError("this model makes pictures of classes and restores none; train varsr_isr from it")

    def _speed_up(self, chosen: Acceleration) -> None:
        super()._speed_up(chosen)
        if self.prefix_encoder is not None and not self.student_config.lora_rank:
            self.qualities = self.prepare(self._good)  # the weights rest from now on

    # ---- the networks: sizes, weights

    @property
    def networks(self) -> dict[str, Sequence[nn.Module]]:
        found = {"prefix encoder": [self.prefix_encoder] if self.prefix_encoder is not None else [], **super().networks}
        decoder = found.pop("VAE decoder")
        found |= {"refiner": [] if self.refiner is None else self.refiner.layers, "VAE decoder": decoder}
        return {stage: modules for stage, modules in found.items() if modules}

    @property
    def config(self) -> dict[str, Any]:
        parts = {"tokenizer": self.tokenizer.config, "transformer": self.transformer.config}
        parts |= {"sampling": self.sampling, "student": self.student_config}
        return self._options | {name: asdict(part) for name, part in parts.items()}  # type: ignore[call-overload]

    def network(self) -> dict[str, Tensor]:
        """All but the tokenizer by the names of `weights.published.varsr`: the transformer's have no prefix."""
        state, _ = split_adapters(plain_state_dict(self))
        return {name.removeprefix("transformer."): t for name, t in state.items() if not name.startswith("tokenizer.")}

    def load_network(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors named as in `network`; others stay as they are."""
        others = ("prefix_encoder.", "refiner.", "refiner_norm.")
        assign_plain(self, {n if n.startswith(others) else f"transformer.{n}": t for n, t in tensors.items()})

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return super().parts() | {"transformer": self.network()}

    @classmethod
    def from_published(cls, path: Path, tokenizer_file: str | None = None, restorer_file: str | None = None) -> Self:
        """The system of a published VARSR.pth, VARSR_C2I.pth or var_d*.pth.

        Its tokenizer, VQVAE.pth or VAR's vae_ch160v4096z32.pth, lies beside it unless it is named.
        """
        return cls(**published_sizes(path, tokenizer_file))

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        """Weights of each part from its file, or drawn."""
        self._drawn: set[str] = set()
        if file := self.files.get("tokenizer"):
            fill_tokenizer(self.tokenizer, file)
        else:
            self._drawn |= {f"tokenizer.{name}" for name in allocate(self.tokenizer)}
            self.draw_tokenizer(seed)
        given, held = dict[str, Tensor](), dict[str, Tensor]()
        if file := self.files.get("transformer"):
            given, held = split_adapters(network_of(self.network(), [h for h, _ in self.schedule.scales], file))
        if given.keys() != self.network().keys():
            self._drawn |= allocate(self)
            self.transformer.init_weights(torch_generator(seed, "transformer"))
            for part, module in (("prefix", self.prefix_encoder), ("refiner", self.refiner)):
                if module is not None:
                    module.init_weights(torch_generator(seed, part))
            if self.refiner_norm is not None:
                self.refiner_norm.reset_parameters()
        self.load_network(given)
        if self.student_config.has_teacher:
            _, wanted = split_adapters(plain_state_dict(self.transformer))
            self._drawn |= allocate(self)
            init_adapters(self.transformer, torch_generator(seed, "adapters"))
            if held:
                assign_plain(self.transformer, fitting(held, wanted, self.files["transformer"]))

    def initial_state(self) -> dict[str, Tensor]:
        """The weights that no file can give again: what was drawn at random."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self._drawn}


@dataclass(frozen=True)
class Predicted:
    """What was predicted for a batch.

    `codes` are the decoder's input, (B, Z, h_K, w_K), with the refiner's residual if there is one.
    """

    codes: Tensor
    generation: Generation
    refined: Refined | None
