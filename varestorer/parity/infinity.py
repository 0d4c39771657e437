"""Golden tensors of Infinity and VARestorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from varestorer.conditioning.pyramid import PyramidConditioner
from varestorer.conditioning.restorer import Restorer
from varestorer.losses.tokens import token_weights
from varestorer.parity.golden import Check, GoldenFolder, kept, largest_error
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig, TokenPyramid
from varestorer.tokenizer.quantizer import resize_area, resize_bilinear, to_map, to_tokens
from varestorer.transformer import TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import attach_adapters
from varestorer.transformer.generation import MultiStepGenerator, SamplingOptions
from varestorer.transformer.heads import BitHead
from varestorer.transformer.layout import BlockCausal, PositionRule, pyramid_layout, rope_table
from varestorer.utils.errors import UserError
from varestorer.weights.load import load_tokenizer, load_transformer
from varestorer.weights.published.infinity import adapter_rank, tokenizer_sizes, transformer_sizes
from varestorer.weights.restorers import restorer_from_state_dict

FLOAT_TOLERANCE = 1e-4


@torch.inference_mode()
def compare(folder: str | Path) -> Iterator[Check]:
    """Every golden tensor group of a folder, compared one after the other."""
    golden = InfinityFolder(folder)
    parts = (compare_tokenizer, compare_rope, compare_student, compare_teacher, compare_generation, compare_restorer)
    for part in parts:
        yield from part(golden)


def _float(file: str, tensors: dict[str, Tensor], name: str, ours: Tensor) -> Check:
    return Check(f"{file}/{name}", largest_error(ours, tensors[name]), FLOAT_TOLERANCE)


def _bits(file: str, tensors: dict[str, Tensor], name: str, bits: list[Tensor] | tuple[Tensor, ...]) -> Iterator[Check]:
    """Bits of all scales, maps (B, Z, h, w), against `<name>_k` stored as (B, 1, h, w, Z) or (B, h * w, Z)."""
    for k, ours in enumerate(bits):
        golden = tensors[f"{name}_{k}"]
        stored = to_tokens(ours) if golden.ndim == 3 else rearrange(ours, "b z h w -> b 1 h w z")
        yield Check(f"{file}/{name}_{k}", largest_error(stored, golden), 0.0)


def _uint8(file: str, tensors: dict[str, Tensor], name: str, image_B3HW: Tensor) -> Check:
    """An image in [-1, 1] as the released scripts write it: truncated to 8 bit, (B, H, W, 3), blue first."""
    levels = ((image_B3HW + 1) / 2 * 255).to(torch.uint8)
    ours = rearrange(levels.flip(1), "b c h w -> b h w c")
    return Check(f"{file}/{name}", largest_error(ours, tensors[name]), 1.0)


def compare_tokenizer(golden: InfinityFolder) -> Iterator[Check]:
    """Encode, bits, next-scale inputs, decode, self-correction."""
    tensors, schedule, tokenizer = golden.tokenizer_tensors, golden.schedule, golden.tokenizer()
    features = tokenizer.features(tensors["input/image"])
    pyramid = tokenizer.quantizer(features, schedule)
    yield _float("vae", tensors, "encode/raw_features", features)
    yield from _bits("vae", tensors, "encode/bits", pyramid.indices)
    for k, (total, scale) in enumerate(zip(pyramid.cumulative, schedule.scales[1:], strict=False), start=1):
        yield _float("vae", tensors, f"encode/var_input_area_{k}", resize_area(total, scale))
    yield _float("vae", tensors, "encode/summed_codes", pyramid.codes)
    rebuilt = tokenizer.quantizer.indices_to_codes(pyramid.indices, schedule)
    yield _float("vae", tensors, "decode_from_bits/summed_codes", rebuilt)
    yield _float("vae", tensors, "decode/image", tokenizer.decode(pyramid.codes))
    yield from _bits("vae", tensors, "requant/gt_bits", pyramid.indices)
    yield _float("vae", tensors, "requant/x_wo_prefix", pyramid.inputs())
    yield _float("vae", tensors, "requant/x_long", torch.cat([pyramid.inputs(), to_tokens(pyramid.codes)], dim=1))
    num_flipped = sum(name.startswith("selfcorr/pred_bits_") for name in tensors)
    noisy = tokenizer.quantizer(features, schedule, _recorded_flips(golden, tokenizer, num_flipped))
    yield from _bits("vae", tensors, "selfcorr/gt_bits", noisy.indices)
    yield from _bits("vae", tensors, "selfcorr/pred_bits", noisy.predicted[:num_flipped])
    yield _float("vae", tensors, "selfcorr/x_wo_prefix", noisy.inputs())


def _recorded_flips(
    golden: InfinityFolder, tokenizer: MultiScaleTokenizer, num_flipped: int
) -> Callable[[int, Tensor], Tensor]:
    """The bit flips of the fixture: one strength per scale, then uniform noise of shape (B, 1, h, w, Z)."""
    strengths = np.random.RandomState(golden.config["gs"])
    generator = torch.Generator().manual_seed(golden.config["gs"])

    def corrupt(scale_number: int, bits: Tensor) -> Tensor:
        if scale_number >= num_flipped:
            return bits
        strength = torch.tensor(strengths.randint(0, 31) * 0.01)
        batch_size, num_bits, h, w = bits.shape
        noise = torch.rand(batch_size, 1, h, w, num_bits, generator=generator)
        return tokenizer.quantizer.codebook.flip(bits, rearrange(noise, "b 1 h w z -> b z h w"), strength)

    return corrupt


def compare_rope(golden: InfinityFolder) -> Iterator[Check]:
    """Tables of several templates and head sizes, and their application."""
    tensors = golden.tensors("rope")
    for name in sorted(tensors):
        if not name.endswith("/token_index"):
            continue
        group = name.removesuffix("/token_index")
        head_dim, aspect = (part.lstrip("hdratio") for part in group.split("/"))
        scales = ScaleSchedule.template("1M", float(aspect)).scales
        cos, sin = rope_table(scales, int(head_dim))
        rows = tensors[name]
        yield _float("rope", tensors, f"{group}/cos", cos[rows])
        yield _float("rope", tensors, f"{group}/sin", sin[rows])
    q = tensors["apply/q"]
    layout = pyramid_layout(golden.schedule, PositionRule("rope", q.shape[-1]), torch.device("cpu"))[: q.shape[2]]
    for name in ("q", "k"):
        turned = layout.rotate(tensors[f"apply/{name}"].transpose(1, 2)).transpose(1, 2)
        yield _float("rope", tensors, f"apply/{name}_rot", turned)


def _kept(model: VARTransformer) -> AbstractContextManager[dict[str, Tensor]]:
    """What flows through the blocks of a transformer, and the parts of the first, under the names of the fixtures."""
    first: Any = model.blocks[0]
    outputs: dict[str, nn.Module] = {
        "mid/block_0_sa_out_before_gamma": first.self_attention,
        "mid/block_0_ca_out": first.cross_attention,
        "mid/block_0_ffn_out_before_gamma": first.ffn,
    }
    outputs |= {f"mid/block_{k}_out": block for k, block in enumerate(model.blocks)}
    return kept(outputs, {"mid/block_0_in": first})


def compare_student(golden: InfinityFolder) -> Iterator[Check]:
    """Text path, block intermediates, logits on the long and short input, bits, images."""
    tensors, schedule = golden.student_tensors, golden.schedule
    student, tokenizer = golden.network("student"), golden.tokenizer()
    text = golden.text(tensors)
    context = student.context(text)
    assert context.modulation_B6C is not None and context.memory_BTC is not None
    packed_norm = torch.cat(TextFeatures(student.condition.norm(text.features_BTE), text.lengths).to_list())
    packed_memory = torch.cat(TextFeatures(context.memory_BTC, text.lengths).to_list())
    yield _float("student", tensors, "mid/text_norm", packed_norm)
    yield _float("student", tensors, "mid/cond", context.cond_BC)
    yield _float("student", tensors, "mid/cond_gss", context.modulation_B6C)
    yield _float("student", tensors, "mid/ca_kv", packed_memory)

    positions, total = student.config.position_rule, schedule.num_tokens
    image = golden.tokenizer_tensors["input/image"]
    condition = PyramidConditioner(tokenizer, positions)(image, schedule)
    yield _float("student", tensors, "input/x_long", condition.tokens_BLZ)
    with _kept(student) as seen:
        logits = student(condition.tokens_BLZ, context, condition.layout)[:, :total]
    for name in sorted(seen.keys() & tensors.keys()):
        yield _float("student", tensors, name, seen[name])
    yield _float("student", tensors, "out/logits_long", logits.flatten(2))
    short = PyramidConditioner(tokenizer, positions, long_input=False)(image, schedule)
    short_logits = student(short.tokens_BLZ, context, short.layout)
    yield _float("student", tensors, "out/logits_short", short_logits.flatten(2))
    yield from _compare_selection(golden, tokenizer, logits)
    # the whole student for the first image and prompt alone, with recorded noise
    alone = TextFeatures.from_list(text.to_list()[:1])
    logits = student(condition.tokens_BLZ[:1], alone, condition.layout)[:, :total]
    bits = _select_all(logits, schedule, torch.Generator().manual_seed(golden.meta["gumbel_manual_seed"]))
    made = tokenizer.decode(tokenizer.quantizer.indices_to_codes(bits, schedule))
    yield _uint8("student", tensors, "gumbel_b1/image_uint8_bgr", made)


def _select_all(logits_BLZ2: Tensor, schedule: ScaleSchedule, generator: torch.Generator | None) -> list[Tensor]:
    """Bits of all scales; noise, if any, in the order of the released code: per scale (B, h * w * Z, 2)."""
    bits, head = [], BitHead(1, logits_BLZ2.shape[-2])
    for tokens, scale in zip(schedule.slices, schedule.scales, strict=True):
        part = logits_BLZ2[:, tokens]
        batch_size, num_tokens, num_bits, _ = part.shape
        uniform = None
        if generator is not None:
            uniform = torch.rand(batch_size, num_tokens * num_bits, 2, generator=generator).view(part.shape)
        bits.append(to_map(head.select(part, uniform), scale))
    return bits


def _compare_selection(golden: InfinityFolder, tokenizer: MultiScaleTokenizer, logits: Tensor) -> Iterator[Check]:
    tensors, schedule = golden.student_tensors, golden.schedule
    likelier = _select_all(logits, schedule, None)
    codes = tokenizer.quantizer.indices_to_codes(likelier, schedule)
    yield from _bits("student", tensors, "argmax/bits", likelier)
    yield _float("student", tensors, "argmax/summed_codes", codes)
    yield _float("student", tensors, "argmax/image", tokenizer.decode(codes))
    sampled = _select_all(logits, schedule, torch.Generator().manual_seed(golden.meta["gumbel_manual_seed"]))
    codes = tokenizer.quantizer.indices_to_codes(sampled, schedule)
    yield from _bits("student", tensors, "gumbel/bits", sampled)
    yield _float("student", tensors, "gumbel/summed_codes", codes)


def compare_teacher(golden: InfinityFolder) -> Iterator[Check]:
    """Teacher-forced logits, intermediates and losses."""
    tensors, schedule, teacher = golden.teacher_tensors, golden.schedule, golden.network("teacher_weights")
    layout = teacher.layout(schedule, torch.device("cpu"))
    pyramid: TokenPyramid = golden.tokenizer().encode(golden.tokenizer_tensors["input/image"], schedule)
    context = teacher.context(golden.text(tensors))
    with _kept(teacher) as seen:
        logits = teacher(pyramid.inputs(), context, layout, BlockCausal.of(layout))
    yield _float("teacher_outputs", tensors, "input/x_wo_prefix", pyramid.inputs())
    yield _float("teacher_outputs", tensors, "mid/cond", context.cond_BC)
    for name in sorted(seen.keys() & tensors.keys()):
        yield _float("teacher_outputs", tensors, name, seen[name])
    yield _float("teacher_outputs", tensors, "forced/logits", logits.flatten(2))
    loss_BL = teacher.head.cross_entropy(logits, pyramid.labels())
    weights = token_weights(schedule)
    yield _float("teacher_outputs", tensors, "forced/loss_plain", loss_BL.mean())
    yield _float("teacher_outputs", tensors, "forced/loss_weight_per_token", weights)
    yield _float("teacher_outputs", tensors, "forced/loss_reweighted", (loss_BL * weights).sum(dim=1).mean())


def compare_generation(golden: InfinityFolder) -> Iterator[Check]:
    """Greedy multi-step generation under every setting of guidance, and the area variant."""
    teacher, tokenizer = golden.network("teacher_weights"), golden.tokenizer()
    prompt = TextFeatures.from_list(golden.text(golden.teacher_tensors).to_list()[:1])
    negative = TextFeatures.from_list([golden.teacher_tensors["input/neg_text"]])
    runs = golden.multi_step | {"multi_area_cfg": golden.multi_step["multi_cfg"]}
    for name, settings in runs.items():
        is_area = name == "multi_area_cfg"
        file = "teacher_outputs_area" if is_area else "teacher_outputs"
        tensors = golden.tensors(file) if is_area else golden.teacher_tensors
        resize = resize_area if is_area else resize_bilinear
        result = MultiStepGenerator(teacher, tokenizer.quantizer, golden.schedule, resize)(
            prompt,
            SamplingOptions(settings["cfg"], settings["tau"], tuple(settings["cfg_insertion_layer"]), top_k=1),
            negative=negative if "neg" in name else None,
        )
        for k, raw in result.logits.items():
            key = f"{name}/raw_logits_{k}"
            if key in tensors:
                yield _float(file, tensors, key, raw[: len(tensors[key])].flatten(2))
        yield from _bits(file, tensors, f"{name}/bits", result.indices)
        yield _float(file, tensors, f"{name}/summed_codes", result.codes)
        image = tokenizer.decode(result.codes)
        if f"{name}/image" in tensors:
            yield _float(file, tensors, f"{name}/image", image)
        yield _uint8(file, tensors, f"{name}/image_uint8_bgr", image)


def compare_restorer(golden: InfinityFolder) -> Iterator[Check]:
    """The restorer that spandrel builds from the folder's weights."""
    tensors = golden.tensors("swinir")
    restorer = restorer_from_state_dict(golden.state_dict(tensors))
    seen = restorer_intermediates(restorer, tensors["input/image01"])
    yield _float("swinir", tensors, "out/image01", seen["image01"])
    for name in sorted(tensors):
        if name.startswith("mid/"):
            yield _float("swinir", tensors, name, seen[name.removeprefix("mid/")])


@torch.no_grad()
def restorer_intermediates(restorer: Restorer, image_B3HW: Tensor) -> dict[str, Tensor]:
    """Run a SwinIR on RGB in [0, 1] and keep what golden tensors are compared with.

    `conv_first` (B, C, h, w), `layer0`, `layer1`, ... (B, h*w, C) and `image01` (B, 3, H, W).
    """
    network: Any = restorer.network
    parts = {"conv_first": network.conv_first} | {f"layer{i}": part for i, part in enumerate(network.layers)}
    with kept(parts) as seen:
        seen["image01"] = restorer(image_B3HW)
    return seen


class InfinityFolder(GoldenFolder):
    """A folder of golden files, with models built from it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.meta, self.multi_step = self.json("meta_va"), self.json("meta_up")
        config = self.meta["config"]
        self.config = config
        self.schedule = ScaleSchedule.template(config["nscale"], config["ratio"])
        given = tuple((h, w) for _, h, w in self.meta["scale_schedule"])
        if self.schedule.scales != given:
            raise UserError(f"{self.folder}: scale_schedule {given} is not the template of ratio {config['ratio']}")
        self.tokenizer_tensors = self.tensors("vae")
        self.teacher_tensors = self.tensors("teacher_outputs")
        self.student_tensors = self.tensors("student")

    @staticmethod
    def state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights in a file: the entries under `sd/`."""
        return {name.removeprefix("sd/"): t for name, t in tensors.items() if name.startswith("sd/")}

    def tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer with the folder's weights."""
        weights = self.state_dict(self.tokenizer_tensors)
        tokenizer = MultiScaleTokenizer(TokenizerConfig(**tokenizer_sizes(weights))).eval().requires_grad_(False)
        load_tokenizer(tokenizer, weights, "vae.safetensors")
        return tokenizer

    def network(self, stem: str) -> VARTransformer:
        """The base network, with adapters as the released student has them where the file holds some."""
        weights = self.state_dict(self.tensors(stem))
        model = VARTransformer(TransformerConfig(**transformer_sizes(weights))).eval().requires_grad_(False)
        if rank := adapter_rank(weights):
            attach_adapters(model, rank, cross_value_bias=False)
        load_transformer(model, weights, f"{stem}.safetensors")
        return model

    def text(self, tensors: dict[str, Tensor]) -> TextFeatures:
        """The two prompts of a file."""
        ends = tensors["input/text_cu_seqlens"].tolist()
        packed = tensors["input/text"]
        return TextFeatures.from_list([packed[a:b] for a, b in zip(ends, ends[1:], strict=False)])
