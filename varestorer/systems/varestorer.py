"""VARestorer: one-step restoration by a visual autoregressive transformer (arXiv 2604.21450).

degraded image -> (restorer) -> tokenizer -> pyramid of tokens -> student -> bits of all scales -> decoder -> image.
Teacher and student are one transformer with its adapters off or on.

Shapes: `B` batch, `H W` pixels, `t` side of a square, `L` tokens of all scales, `Z` bits per token, `T` text tokens,
`E` width of their features.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from varestorer.conditioning.pyramid import INPUTS, Condition, PyramidConditioner
from varestorer.conditioning.restorer import Restorer, new_restorer
from varestorer.conditioning.text_encoder import DEFAULT_NAME, DEFAULT_WIDTH, TextEncoder
from varestorer.systems import official
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import Request, RestoredBatch, System
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.autoencoder import clamp_keeping_gradient
from varestorer.tokenizer.quantizer import to_tokens
from varestorer.transformer import (
    ClassLabels,
    Context,
    PreparedCondition,
    TextFeatures,
    TransformerConfig,
    VARTransformer,
)
from varestorer.transformer.adapters import TARGETS, adapters_off, attach_adapters, target_pattern
from varestorer.transformer.generation import Generation, Prefix, SamplingOptions
from varestorer.transformer.heads import Noise, keyed_noise
from varestorer.transformer.layout import MASKS, BlockCausal, prefix_causal_mask
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.finite import spread_nan
from varestorer.utils.images import from_network, to_network
from varestorer.weights.bundle import RESTORER, shipped, tensors_file
from varestorer.weights.files import read_entries
from varestorer.weights.load import check_part, load_part
from varestorer.weights.published.infinity import (
    STUDENT_FILE,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    adapter_rank,
    tokenizer_sizes,
    transformer_sizes,
)
from varestorer.weights.resolve import companion, is_published
from varestorer.weights.restorers import load_restorer

MOST_TEXTS = 8

Text = TextFeatures | Context | PreparedCondition
"""Text in one of the forms that the transformer takes."""


@dataclass(frozen=True)
class StudentConfig:
    """What makes the student of the teacher; the defaults are the traits of the released student.

    Attributes:
        lora_rank: of the adapters; 0 for none (the student is then the base network itself).
        lora_targets: layers of the blocks that carry them, see `adapters.target_pattern`.
        inputs: what the tokens of a scale start from: "next_scale", the degraded image's codes of the coarser scales
            (as the teacher's start from the photograph's), or "own_scale", those of its own scale with them.
        keep_bits: what the degraded image's own bits count in the logits: each margin starts from plus or minus this,
            and the network has to learn only what to change. 0: nothing, as in the paper.
        keep_residual: add to the decoded image what the tokenizer loses of the degraded one (cleaned), so that it costs
            nothing where bits are kept. False: the paper's.
        long_input: append the complete codes at the last scale to the input.
        long_positions: rotary rows of the appended tokens, "next_scale" or "own".
        cross_value_bias: whether block cross attention adds its value bias while the adapters are on.
        attention: "cross_scale": every token sees all, or "causal": its own and coarser scales (table 3).
        conditioning: "pyramid": one step from the degraded image's tokens, or "prefix": scale by scale, with the
            degraded image in front of all (table 3, without distillation; see `VARestorer.prefix_logits`), where
            `inputs`, `keep_bits`, `keep_residual`, `attention` and the long input say nothing.
        guidance: c of the prefix: c * with it + (1 - c) * without it.
        merged: the adapters are folded into the base weights, so that no teacher is left.
    """

    lora_rank: int = 32
    lora_targets: tuple[str, ...] = TARGETS
    inputs: str = "next_scale"
    keep_bits: float = 0.0
    keep_residual: bool = False
    long_input: bool = True
    long_positions: str = "next_scale"
    cross_value_bias: bool = False
    attention: str = "cross_scale"
    conditioning: str = "pyramid"
    guidance: float = 1.0
    merged: bool = False

    @property
    def unreleased(self) -> list[str]:
        """Traits that the released student has not, as `name=value`; the rank and what is merged are left aside."""
        released = StudentConfig(lora_rank=self.lora_rank, merged=self.merged)
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [f"{name}={value}" for name, value in named if value != getattr(released, name)]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if self.keep_bits < 0:
            raise UserError(f"model.student.keep_bits must be 0 or more, got {self.keep_bits}")
        target_pattern(self.lora_targets)
        for name, choices in (("attention", MASKS), ("conditioning", ("pyramid", "prefix")), ("inputs", INPUTS)):
            if getattr(self, name) not in choices:
                raise UserError(f"model.student.{name} must be {' or '.join(choices)}, got {getattr(self, name)}")


class VARestorer(System):
    """Tokenizer, transformer and restorer, of sizes that fit, with their weights.

    Args:
        schedule: arguments of `ScaleSchedule.build`: `size`, or `sides`; the last scale is a square.
        tokenizer: arguments of `TokenizerConfig`.
        transformer: arguments of `TransformerConfig`.
        student: arguments of `StudentConfig`.
        restorer: what cleans images before they are tokenized: a file, a run or a bundle that holds a restorer (see
            `load_restorer`), or the sizes of a new one (arguments of `new_restorer`); None for nothing.
        weights: files of the parts "tokenizer" and "transformer": published, a bundle or a run, see
            `weights.load.load_part`; a part without a file gets random weights.
        new_adapters: draw the adapters, whatever the transformer's file holds: to distil a student again from the
            teacher of a model that has one.
        merge: fold the adapters of a bundle into its base weights as they are read; the quick way to the student alone.
        seed: of the random weights.
    Attributes:
        texts: prompts used last, prepared, kept from image to image where the weights no longer change.
    """

    name = "varestorer"
    published: ClassVar[dict[str, str]] = {
        "tokenizer": f"{TOKENIZER_FILE} (hub FoundationVision/Infinity)",
        "transformer": f"{TRANSFORMER_FILE} (hub FoundationVision/Infinity) or {STUDENT_FILE} (VARestorer's release)",
    }
    makers: ClassVar[dict[str, Callable[..., Any]]] = {
        "schedule": ScaleSchedule.build,
        "tokenizer": TokenizerConfig,
        "transformer": TransformerConfig,
        "student": StudentConfig,
    }
    texts: OrderedDict[int, tuple[Tensor | None, PreparedCondition]] | None = None

    def __init__(
        self,
        schedule: dict[str, Any],
        tokenizer: dict[str, Any],
        transformer: dict[str, Any],
        student: dict[str, Any] | None = None,
        restorer: str | dict[str, int] | None = None,
        weights: dict[str, str | None] | None = None,
        new_adapters: bool = False,
        merge: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.files = {part: shipped(file) for part, file in (weights or {}).items() if file}
        for part, file in self.files.items():
            check_part(part, file, self.published)
        if isinstance(restorer, dict):
            self.restorer: Restorer | None = new_restorer(**restorer, seed=seed)
        else:
            self.restorer = load_restorer(restorer) if restorer else None
        self.schedule = ScaleSchedule.build(**schedule)
        self.student_config = StudentConfig(**(student or {}))
        if merge and self.student_config.lora_rank:
            self.student_config = replace(self.student_config, merged=True)
        with torch.device("meta"):
            self.tokenizer = MultiScaleTokenizer(TokenizerConfig(**tokenizer))
            self.transformer = VARTransformer(TransformerConfig(**transformer))
            if (chosen := self.student_config).lora_rank and not chosen.merged:
                attach_adapters(self.transformer, chosen.lora_rank, chosen.cross_value_bias, chosen.lora_targets)
        self.check_networks(len(self.schedule) + int(self.student_config.long_input))
        self._schedule_options = dict(schedule)
        if torch.get_default_device().type != "meta":
            self._fill(seed, new_adapters)
            self.tokenizer.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU and GPU
        if isinstance(restorer, str):
            self.files["restorer"] = shipped(restorer)

    # ---- the paper: what the student sees, what it predicts, what becomes of it

    def condition(self, lq_B3HW: Tensor) -> Condition:
        """r_LQ: the student's input for degraded images in [0, 1] of side `tile`."""
        return self.conditioner(to_network(lq_B3HW), self.schedule)

    @torch.no_grad()
    def pair_tokens(self, hq_B3HW: Tensor, lq_B3HW: Tensor) -> tuple[TokenPyramid, Condition]:
        """r_HQ, which the teacher sees, and r_LQ, which the student sees, by one pass through the encoder.

        Both sides are in [0, 1], of side `tile`; the restorer, if there is one, cleans the degraded ones first.
        """
        cleaned = to_network(lq_B3HW if self.restorer is None else self.restorer(lq_B3HW))
        hq, lq = self.tokenizer.encode(torch.cat([to_network(hq_B3HW), cleaned]), self.schedule).halves()
        return hq, self.conditioner.from_pyramid(lq, self.schedule, cleaned)

    def teacher_logits(
        self,
        pyramid: TokenPyramid,
        text: TextFeatures | ClassLabels | Context,
        teacher: VARTransformer | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """p_T(r_k | r_<k): logits (B, L, Z, 2) of every scale, given the photograph's coarser ones.

        A context as the text must come from the network that is asked: `teacher`, or the system's with adapters off.
        This teacher does not see the condition, which is of the degraded image.
        """
        layout = self.transformer.layout(self.schedule, pyramid.codes.device)
        mask = BlockCausal.of(layout)
        if teacher is not None:
            return teacher(pyramid.inputs(), text, layout, mask)
        with adapters_off(self.transformer):
            return self.transformer(pyramid.inputs(), text, layout, mask)

    def student_logits(self, condition: Condition, text: Text) -> Tensor:
        """p_S(r_k | r_LQ): logits (B, L, Z, 2) of every scale in one pass; all tokens see all tokens."""
        mask = BlockCausal.of(condition.layout) if self.student_config.attention == "causal" else None
        asked = slice(0, self.schedule.num_tokens)
        logits = self.transformer(condition.tokens_BLZ, text, condition.layout, mask, asked=asked)
        if margin := self.student_config.keep_bits:
            logits = logits + self.transformer.head.leaning(condition.pyramid.labels(), margin)
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

    def predict_squares(self, text: PreparedCondition, lq_B3HW: Tensor, uniforms: list[Tensor] | None) -> RestoredBatch:
        """One pass from degraded to restored squares in [0, 1], without a word between host and device.

        The text is of one prompt for all, or of B. Noise is of each scale, (B, l, Z, 2); None takes the likelier bits.
        """
        condition = self.condition(lq_B3HW)
        logits = self.student_logits(condition, text)
        bits = self.select(logits, uniforms)
        codes = spread_nan(self.summed(bits), logits)
        images = from_network(self.student_image(codes, self.residual(condition)))
        return RestoredBatch(images, bits, logits)

    # ---- restoring squares, in one step or in several

    def faithful(self, lq_B3tt: Tensor) -> Tensor:
        return lq_B3tt if self.restorer is None else self.restorer(lq_B3tt)

    @torch.inference_mode()
    def restore_batch(
        self, lq_B3HW: Tensor, noise: Noise | None = None, steps: str | int = "one", text: Text | None = None
    ) -> RestoredBatch:
        """Restore squares of side `tile`, degraded images in [0, 1] at the size of the result.

        Args:
            noise: uniform noise for sampling, see `heads.keyed_noise`; None takes the likelier bits.
            steps: "one": the student alone; K: the last K - 1 scales are predicted again by the teacher, given the
                student's coarser ones; "multi": the teacher predicts all scales with a side above a quarter of the
                last, given those of the degraded image.
            text: features of the prompts, or, for one step, what `transformer.prepare` made of them; None for no text.
        Raises:
            UserError: steps that cannot be, or that need a teacher where the adapters are merged.
        """
        if self._is_one_pass(steps):
            return self._in_one_pass(lq_B3HW, noise, text)
        if text is not None and not isinstance(text, TextFeatures):
            raise TypeError(f"restoring in several steps wants TextFeatures, got {type(text).__name__}")
        if steps != "one" and self.student_config.merged:
            raise UserError(
                f"steps={steps} needs the teacher, and the adapters of this model are merged; use steps=one"
            )
        return self._in_several_steps(lq_B3HW, noise, steps, text or self.null_text(len(lq_B3HW)))

    def restore_squares(self, lq_B3tt: Tensor, numbers: list[int], request: Request) -> RestoredBatch:
        is_drawn, steps = request.select == "sample", request.steps or "one"
        noise = keyed_noise(request.seed, numbers, "restore", self.device) if is_drawn else None
        text = request.context
        if not self._is_one_pass(steps):  # several passes need the features themselves
            text = self.text_batch(request.prompt, len(numbers))  # type: ignore[arg-type]
        return self.restore_batch(lq_B3tt, noise, steps, text)

    def accept(self, request: Request, uncertainty: bool) -> Request:
        if uncertainty and (request.steps == "multi" or self.student_config.conditioning == "prefix"):
            raise UserError("uncertainty is the one-step student's; use steps=one or K of a distilled model")
        prompt = self.text_features(request.prompt) if isinstance(request.prompt, str) else request.prompt
        is_one_pass = self._is_one_pass(request.steps or "one")
        context = self.prepared_text(prompt) if is_one_pass else None
        return replace(request, prompt=prompt, context=context)

    @property
    def ways(self) -> list[str]:
        student = self.student_config
        if student.merged or not student.lora_rank or student.conditioning == "prefix":
            return ["one"]
        return ["one", *map(str, range(2, len(self.schedule) + 1)), "multi"]

    def _is_one_pass(self, steps: str | int) -> bool:
        return steps == "one" and self.student_config.conditioning != "prefix"

    def _in_one_pass(self, lq_B3HW: Tensor, noise: Noise | None, text: Text | None) -> RestoredBatch:
        """The student alone; what the host has to do for it is done first, then the device is not interrupted."""
        if text is None and self.texts is not None:
            text = self.prepared_text(None)
        if not isinstance(text, PreparedCondition):
            text = self.transformer.prepare(text or self.null_text(len(lq_B3HW)))
        uniforms = self.uniforms(noise, len(lq_B3HW))
        if self.graphs is None:
            return self.predict_squares(text, lq_B3HW, uniforms)
        return self.graphs(self.predict_squares, text, lq_B3HW, uniforms)

    def _in_several_steps(
        self, lq_B3HW: Tensor, noise: Noise | None, steps: str | int, text: TextFeatures
    ) -> RestoredBatch:
        """Scale by scale: by the teacher after the student or after the degraded image, or by a prefixed network."""
        condition, logits, residual = self.condition(lq_B3HW), None, None
        if self.student_config.conditioning == "prefix":
            generation = self._generate_from_prefix(condition.pyramid, text, noise)
        elif steps == "multi":
            limit = max(self.schedule.latent_size) / 4
            coarse = [bits for bits in condition.pyramid.indices if max(bits.shape[-2:]) <= limit]
            generation = self._continue(coarse, text, noise)
        else:
            number = int(steps) if str(steps).isdecimal() else 0
            if not 1 <= number <= len(self.schedule):
                raise UserError(f"steps must be one, multi or 1 to {len(self.schedule)}, got {steps}")
            residual = self.residual(condition)
            logits = self.student_logits(condition, text)
            known = self.select(logits, self.uniforms(noise, len(lq_B3HW)))[: len(self.schedule) - number + 1]
            generation = self._continue(known, text, noise)
        codes = spread_nan(generation.codes, condition.pyramid.codes)
        images = from_network(self.student_image(codes, residual))
        return RestoredBatch(images, generation.indices, logits)

    def _continue(self, known: Sequence[Tensor], text: TextFeatures, noise: Noise | None) -> Generation:
        """The teacher's scale-by-scale prediction of what follows the given scales."""
        with adapters_off(self.transformer):
            return self.generator(text, SamplingOptions(), noise=noise, known=known)

    # ---- without distillation (table 3): multi-step VAR that sees the degraded image as a prefix

    def prefix_of(self, lq_pyramid: TokenPyramid) -> Prefix:
        """The degraded image's summed codes at the last scale, as tokens in front of all scales.

        All scales see them; among themselves the scales stay causal. Guidance compares with and without them.
        """
        tokens_BPC = self.transformer.word_embed(to_tokens(lq_pyramid.codes))
        return Prefix(tokens_BPC, self.schedule.latent_size, is_conditional=True)

    def prefix_logits(
        self,
        pyramid: TokenPyramid,
        lq_pyramid: TokenPyramid,
        text: TextFeatures | ClassLabels | Context,
        dropped_B: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, Z, 2) of every scale, given the true coarser ones and the degraded image.

        Tokens are those of the photograph and of the degraded image; nobody sees the prefix of the dropped samples
        (B,).
        """
        prefix = self.prefix_of(lq_pyramid)
        num_prefix = prefix.tokens_BPC.shape[1]
        layout = self.transformer.layout(self.schedule, pyramid.codes.device, prefix.size)
        mask: Tensor | BlockCausal = BlockCausal.of(layout)
        if dropped_B is not None:
            is_prefix_L = torch.arange(len(layout), device=pyramid.codes.device) < num_prefix
            mask = prefix_causal_mask(layout.levels_L, is_prefix_L, dropped_B)
        asked, tokens = slice(num_prefix, None), pyramid.inputs()
        return self.transformer(tokens, text, layout, mask, asked=asked, prefix_BPC=prefix.tokens_BPC)

    def _generate_from_prefix(self, lq_pyramid: TokenPyramid, text: TextFeatures, noise: Noise | None) -> Generation:
        options = SamplingOptions(cfg=self.student_config.guidance)
        return self.generator(text, options, noise=noise, negative=text, prefix=self.prefix_of(lq_pyramid))

    # ---- text

    def null_text(self, batch_size: int) -> TextFeatures:
        """The learned text that stands for no prompt."""
        return self.transformer.condition.null_batch(batch_size)

    def text_batch(self, features_TE: Tensor | None, batch_size: int) -> TextFeatures:
        """One prompt's features (T, E), from any device, for a batch; the learned null text for no prompt."""
        if features_TE is None:
            return self.null_text(batch_size)
        return TextFeatures.from_list([features_TE.to(self.device)] * batch_size)

    def prepared_text(self, features_TE: Tensor | None) -> PreparedCondition:
        """What the transformer makes of a prompt, for batches of any size, so that tiles, and images, share it.

        A prompt is known again by being the same tensor; None for no prompt.
        """
        kept = OrderedDict() if self.texts is None else self.texts
        if id(features_TE) not in kept:
            while len(kept) >= MOST_TEXTS:
                kept.popitem(last=False)
            # the features are kept as well, as their id might else be that of others later
            kept[id(features_TE)] = features_TE, self.transformer.prepare(self.text_batch(features_TE, 1))
        kept.move_to_end(id(features_TE))
        return kept[id(features_TE)][1]

    def text_features(self, prompt: str) -> Tensor:
        """Features (T, E) of a prompt by the text encoder of the released models; UserError: the model had another."""
        if self.transformer.config.text_width != DEFAULT_WIDTH:
            raise UserError(
                f"this model was trained without {DEFAULT_NAME}: give prompt= the features (T, E) of the encoder it "
                "was trained with, or None"
            )
        return TextEncoder(device=self.device).encode([prompt])[0]

    # ---- the networks: sizes, weights, forms

    @property
    def conditioner(self) -> PyramidConditioner:
        """What makes the student's input of a degraded image, by the restorer and tokenizer of now."""
        chosen, positions = self.student_config, self.transformer.config.position_rule
        options = chosen.long_input, chosen.long_positions, chosen.inputs
        return PyramidConditioner(self.tokenizer, positions, *options, restorer=self.restorer)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "schedule": self._schedule_options,
            "tokenizer": asdict(self.tokenizer.config),
            "transformer": asdict(self.transformer.config),
            "student": asdict(self.student_config),
        }

    @property
    def networks(self) -> dict[str, Sequence[nn.Module]]:
        return super().networks if self.restorer is None else {"restorer": [self.restorer], **super().networks}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        restorer = {} if self.restorer is None else {RESTORER: dict(self.restorer.published_state_dict())}
        return super().parts() | restorer

    @classmethod
    def options_of(cls, bundle: Path, config: dict[str, Any], merge: bool) -> dict[str, Any]:
        restorer = tensors_file(bundle, RESTORER)
        if config["restorer"] and not restorer.is_file():
            raise UserError(f"the bundle {bundle} has lost its {restorer.name}; download or convert it again")
        return {"restorer": str(restorer) if config["restorer"] else None, "merge": merge}

    @classmethod
    def from_published(cls, path: Path, tokenizer_file: str | None = None, restorer_file: str | None = None) -> Self:
        """The released student, or a network of other sizes in its form."""
        student = read_entries(path)
        try:  # before companions of something else are asked for
            sizes = transformer_sizes(student)
        except UserError as error:
            other = "a file that spandrel loads is scored by eval.py method=spandrel model_path=FILE"
            raise UserError(f"{path} holds no model: {error}; {other}") from error
        tokenizer = companion("tokenizer", path, tokenizer_file)
        restorer = companion("restorer", path, restorer_file)
        return cls(
            schedule={"size": "0.25M"},
            tokenizer=tokenizer_sizes(read_entries(tokenizer)),
            transformer=sizes,
            student={"lora_rank": adapter_rank(student)},
            restorer=str(restorer),
            weights={"tokenizer": str(tokenizer), "transformer": str(path)},
        )

    def check_source(self) -> None:
        """Refuse a published teacher where a student is asked; runs and bundles may hold students without adapters."""
        if self.student_config.lora_rank == 0 and self.source is not None and is_published(self.source):
            raise UsageError(
                f"ckpt={self.source} is a teacher without adapters; use steps=multi, or give {STUDENT_FILE}"
            )

    def check_official(self) -> None:
        if traits := self.student_config.unreleased:
            raise UsageError(f"compat=official is for students like the released one, and this has student.{traits[0]}")

    def restore_official(
        self, image_3HW: Tensor, scale: float = 4, *, prompt: Tensor | None = None, tiled: bool = False, seed: int = 0
    ) -> Tensor:
        random.seed(seed)  # the script draws from both global generators
        torch.manual_seed(seed)
        return official.restore_official(self, image_3HW, scale, prompt=prompt, tiled=tiled)

    def _speed_up(self, chosen: Acceleration) -> None:
        if self.restorer is not None and self.device.type == "cpu":
            self.restorer.to(memory_format=torch.channels_last)  # 1.1 times as fast in bf16, 1.4 in float32
        if self.restorer is not None and chosen.precision == "bf16":
            self.restorer.use_bf16 = True
        super()._speed_up(chosen)
        self.texts = OrderedDict()

    @torch.no_grad()
    def _fill(self, seed: int, new_adapters: bool) -> None:
        """Weights of each part from its file, or drawn; adapters start without effect unless a file has them."""
        for part, file in self.files.items():
            load_part(self, part, file, new_adapters)
        self.draw_rest(seed)
