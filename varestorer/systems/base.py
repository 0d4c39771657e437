"""What every paper's system shares: restoring an image of any size, loading, saving, and making it fast.

A paper's system says how a batch of squares is encoded, predicted and decoded, and nothing else.

Shapes: `B` batch, `H W` pixels, `t` side of a square, `L` tokens of all scales, `K` scales.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, overload

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from omegaconf import OmegaConf
from torch import Tensor, nn

from varestorer.systems.acceleration import (
    Acceleration,
    BatchGraphs,
    check_means,
    compile_parts,
    decode_in_bf16,
    quantize_linears,
)
from varestorer.systems.fidelity import check_fidelity, give_up
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenPyramid
from varestorer.tokenizer.autoencoder import init_weights as init_tokenizer_weights
from varestorer.tokenizer.quantizer import resize_area, to_map
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import init_adapters, merge_adapters, plain_state_dict
from varestorer.transformer.generation import MultiStepGenerator
from varestorer.transformer.heads import Noise
from varestorer.utils.color import match_color
from varestorer.utils.device import to_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.finite import check_finite
from varestorer.utils.images import as_picture, from_anything, from_network, is_gray, pad_reflect, resize, to_network
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import num_tiles, restore_tiled, restore_to_sizes, scaled_size
from varestorer.weights.bundle import ADAPTERS, CONFIG, is_bundle, read_config, save_bundle
from varestorer.weights.load import allocate, load_into, split_adapters
from varestorer.weights.resolve import HOW, check_is_whole, is_published, locate, model_of_run, release_of
from varestorer.weights.runs import is_run, latest_checkpoint, load_run_weights

LOG = logging.getLogger(__name__)
REDUCE = "area"  # on held-out photographs at x1.5 and x2 better than Lanczos in PSNR and LPIPS
DEVICE_PIXELS = 2**25  # of a result that is put together on the device; larger ones are on the host
BATCH = 8
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Restoration:
    """A restored image.

    Attributes:
        image: of the kind that was given, see `from_anything`: (3, H, W) float32 in [0, 1], a PIL image (for a path
            too), or uint8 (H, W, 3); of several sizes the largest.
        uncertainty_KHW: where the network guessed, at each scale: mean entropy of a token, 0 (decided) to 1 (any symbol
            is as likely), up-sampled to the image; None unless asked for.
        smaller: the other sizes asked for, by their enlargement, smallest first.
        warnings: of squares that came out unlike their neighbors, and of too little memory for a batch; also logged.
    """

    image: Any
    uncertainty_KHW: Tensor | None = None
    smaller: dict[float, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RestoredBatch:
    """Restored squares.

    Attributes:
        images_B3HW: in [0, 1], of several sizes the largest; NaN where the networks' numbers were not finite.
        indices: of each scale, as maps.
        logits: of a one-step network, (B, L, ...); None for scale-by-scale generation.
        smaller: the other sizes of the request, smallest first.
    """

    images_B3HW: Tensor
    indices: list[Tensor]
    logits: Tensor | None = None
    smaller: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Request:
    """How an image is restored; what a system does not have is refused by it.

    Attributes:
        prompt: what the image shows, or text features (T, E); None for no prompt.
        seed: of whatever is drawn.
        select: "argmax" takes the likeliest symbols, "sample" draws them.
        steps: how many passes; None for the system's own way.
        sides: of the images that a square becomes (pixels), smallest first; empty for the square's own side.
        context: what the system made of the prompt, once for all squares.
    """

    prompt: str | Tensor | None = None
    seed: int = 0
    select: str = "argmax"
    steps: str | int | None = None
    sides: tuple[int, ...] = ()
    context: Any = None

    def __post_init__(self) -> None:
        if self.select not in ("argmax", "sample"):
            raise UserError(f"select must be argmax or sample, got {self.select!r}")


def smaller_copy(image_3HW: Tensor, times: int) -> Tensor:
    """An image so many times smaller; what its sides lack of a multiple is mirrored at their ends."""
    height, width = image_3HW.shape[-2:]
    padded = pad_reflect(image_3HW, 0, -height % times, 0, -width % times)
    return resize(padded, (padded.shape[-2] // times, padded.shape[-1] // times), REDUCE)


def whole_number(value: float) -> float:
    """An integer where the value is one: 4, not 4.0."""
    return int(value) if value == int(value) else value


class System(
    nn.Module,
    ModelHubMixin,
    library_name="varestorer",
    pipeline_tag="image-to-image",
    tags=["super-resolution", "image-restoration"],
):
    """A tokenizer and a transformer that restore images.

    `varestorer.systems.load` opens one. `save_pretrained` and `push_to_hub` (huggingface_hub's) share one as a bundle,
    in the form it has: after `merge_adapters` without adapters, after `set_precision` in that precision. `accelerate`
    makes one fast that will only restore.

    Attributes:
        name: of the paper's system, as configs and bundles call it.
        enlarge: how images are enlarged before they are restored, see `utils.tiling.ENLARGE`.
        makers: entry of `config` -> what takes it, for checks of a bundle.
        published: part -> the published file of it, and where to get that.
        schedule: the scales.
        tokenizer: images to tokens and back.
        transformer: predicts the tokens.
        files: part -> the file its weights came from.
        student_config: what makes a one-step student of the transformer.
        acceleration: how it was accelerated; None if it was not.
        graphs: of `restore_batch`, where CUDA graphs were asked for.
        source: the path that it was loaded from, if it was.
        weak: what it is poor at, as its bundle says: an option such as "steps=multi" -> why, and what to do.
    """

    name: ClassVar[str]
    makers: ClassVar[dict[str, Callable[..., Any]]]
    published: ClassVar[dict[str, str]]
    enlarge: ClassVar[str] = "bicubic"
    schedule: ScaleSchedule
    tokenizer: MultiScaleTokenizer
    transformer: VARTransformer
    files: dict[str, Path]
    student_config: Any
    acceleration: Acceleration | None = None
    graphs: BatchGraphs | None = None
    source: Path | None = None
    weak: Mapping[str, str] = MappingProxyType({})

    # ---- what a paper's system says

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What the system is made of, as its constructor takes it: sizes, without files."""

    @abstractmethod
    def restore_squares(self, lq_B3tt: Tensor, numbers: list[int], request: Request) -> RestoredBatch:
        """Restore degraded squares of side `tile` in [0, 1], on the system's device.

        Their numbers in their image key what is drawn.
        """

    @abstractmethod
    def accept(self, request: Request, uncertainty: bool) -> Request:
        """The request with what is done once for all squares.

        UserError: something that this system cannot do; says what it has instead.
        """

    @property
    def traits(self) -> dict[str, Any]:
        """What of the config decides how a picture looks, beside sizes and weights."""
        return {
            name: part for name, part in self.config.items() if name not in ("schedule", "tokenizer", "transformer")
        }

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of each file of a bundle: adapters, where there are any, in one of their own."""
        network, adapters = split_adapters(plain_state_dict(self.transformer))
        parts = {"tokenizer": dict(self.tokenizer.state_dict()), "transformer": network, ADAPTERS: adapters}
        return {part: tensors for part, tensors in parts.items() if tensors}

    def initial_state(self) -> dict[str, Tensor]:
        """The weights that no file can give again: what was drawn at random."""
        from_files = tuple(f"{part}." for part in self.files)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(from_files)}

    @abstractmethod
    def restore_batch(self, lq_B3HW: Tensor) -> RestoredBatch:
        """Restore squares (B, 3, t, t) in [0, 1] of side `tile` in the system's own way."""

    @property
    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """Stage -> the modules that are called in it, in the order in which an image passes them."""
        return {
            "VAE encoder": [self.tokenizer.encoder],
            "transformer": [self.transformer],
            "VAE decoder": [self.tokenizer.decoder],
        }

    # ---- what all share

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.start.device

    @property
    def tile(self) -> int:
        """Side of the square restored in one go, pixels."""
        return self.schedule.latent_size[0] * self.tokenizer.stride

    @property
    def tiles(self) -> tuple[int, ...]:
        """Sides that `at_tile` takes, pixels: from half the trained one to the end of the table of positions."""
        squares = (h * self.tokenizer.stride for h, w in self.schedule.position_scales if h == w)
        return tuple(side for side in squares if 2 * side >= self.tile)

    @property
    def ways(self) -> list[str]:
        """What `steps` may be, the model's own way first; it is called "one" whatever it is."""
        return ["one"]

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the images that one pass can make of a square of side `tile`, smallest first, `tile` the last."""
        return (self.tile,)

    @property
    def step(self) -> int:
        """Tiles lie at multiples of it, so that each of `sides` cuts at whole pixels, whichever are asked for."""
        return math.lcm(*(self.tile // math.gcd(side, self.tile) for side in self.sides))

    def sides_of(self, sizes: Sequence[float] | None, scale: float) -> tuple[int, ...]:
        """Which of `sides` are the enlargements asked for, where the largest is `scale`; None for the largest.

        UserError: an enlargement that one pass does not give, or none at all.
        """
        if sizes is None:
            return (self.tile,)
        known = {side: scale * side / self.tile for side in self.sides}
        found = {size: [s for s, factor in known.items() if math.isclose(size, factor)] for size in sizes}
        if not found or not all(found.values()):
            wanted, got = (", ".join(f"{size:g}" for size in some) for some in (known.values(), sizes))
            raise UserError(f"sizes must be of {wanted} for this model at scale={scale:g}, got {got or 'none'}")
        return tuple(sorted({side for sides in found.values() for side in sides}))

    def at_tile(self, side: int) -> Self:
        """This system, the weights shared, for squares of another side (pixels); UserError if it is none of `tiles`."""
        if side not in self.tiles:
            raise UserError(f"tile must be one of {', '.join(map(str, self.tiles))} pixels for this model, got {side}")
        other = copy(self)
        other.schedule = self.schedule.with_side(side // self.tokenizer.stride)
        return other

    @property
    def generator(self) -> MultiStepGenerator:
        """Scale by scale generation with these networks."""
        return MultiStepGenerator(self.transformer, self.tokenizer.quantizer, self.schedule)

    def encode(self, images_B3HW: Tensor) -> TokenPyramid:
        """Tokens of images in [0, 1] of side `tile`."""
        return self.tokenizer.encode(to_network(images_B3HW), self.schedule)

    def decode(self, codes_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of summed codes."""
        return from_network(self.tokenizer.decode(codes_BZhw))

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, L, ...) of all scales as one map per scale."""
        pairs = zip(self.schedule.slices, self.schedule.scales, strict=True)
        return [to_map(tokens[:, of_scale], scale) for of_scale, scale in pairs]

    def summed(self, indices: Sequence[Tensor]) -> Tensor:
        """Summed codes (B, Z, h_K, w_K) of the maps of all scales."""
        return self.tokenizer.quantizer.indices_to_codes(indices, self.schedule)

    def codes(self, tokens: Tensor) -> Tensor:
        """Summed codes of the tokens (B, L, ...) of all scales; keeps gradients of straight-through tokens."""
        return self.summed(self.split(tokens))

    def uniforms(self, noise: Noise | None, batch_size: int) -> list[Tensor] | None:
        """Uniform noise (B, l, ...) of each scale, with which `select` draws; None for no noise."""
        symbol, counts = self.transformer.head.draw_shape(), self.schedule.num_tokens_per_scale
        return None if noise is None else [noise(k, (batch_size, n, *symbol)) for k, n in enumerate(counts)]

    def select(self, logits: Tensor, uniforms: Sequence[Tensor] | None) -> list[Tensor]:
        """The symbols of each scale as maps: the likeliest ones, or samples."""
        head, scales = self.transformer.head, zip(self.schedule.slices, self.schedule.scales, strict=True)
        drawn: Sequence[Tensor | None] = uniforms or [None] * len(self.schedule)
        pairs = zip(scales, drawn, strict=True)
        return [to_map(head.select(logits[:, tokens], uniform), scale) for (tokens, scale), uniform in pairs]

    def uncertainty(self, logits: Tensor) -> Tensor:
        """Where the network guesses: entropy of each token, up-sampled to pixels, (B, K, H, W).

        0 where all symbols of a token are decided, 1 where they are a coin toss; one map for each scale.
        """
        entropy_BL1 = self.transformer.head.entropy(logits)[..., None]
        size = (self.tile, self.tile)
        maps = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in self.split(entropy_BL1)]
        return torch.cat(maps, dim=1)

    def faithful(self, lq_B3tt: Tensor) -> Tensor:
        """What `fidelity` falls back to: degraded squares in [0, 1], cleaned where there is a restorer."""
        return lq_B3tt

    @overload
    def restore(self, image: list[Any], scale: float = ..., **options: Any) -> list[Restoration]: ...

    @overload
    def restore(self, image: Any, scale: float = ..., **options: Any) -> Restoration: ...

    def restore(
        self, image: Any, scale: float = 4, *, reduce: int = 1, **options: Any
    ) -> Restoration | list[Restoration]:
        """Restore an image of any size, or a list of them, and give back what was given; see `restore_picture`.

        Args:
            image: a path, a PIL image, uint8 NumPy (H, W, 3), or a float tensor (3, H, W) in [0, 1], see
                `from_anything`; or a list of such.
            scale: enlargement, above 0, of the image as it was given.
            reduce: the image is made so many times smaller first, by area, and noise, blur and blocks of JPEG with it.
                Not with `sizes`.
            options: see `restore_picture`.
        Raises:
            ValueError: an image or a scale of another kind or range; says what was wanted and what came.
            UserError: see `restore_picture`; a file that cannot be read; `reduce` is no whole number from 1.
        """
        if reduce < 1 or reduce != int(reduce) or (reduce > 1 and options.get("sizes")):
            raise UserError(f"reduce must be 1, 2, 3 and so on, and 1 with sizes, got {reduce}")
        if isinstance(image, list):
            return [self.restore(one, scale, reduce=reduce, **options) for one in tuple(image)]
        picture, back = from_anything(image)
        rows, columns = scaled_size(picture.shape[-2], picture.shape[-1], scale)
        result = self.restore_picture(smaller_copy(picture, reduce), scale * reduce, **options)
        maps = result.uncertainty_KHW if result.uncertainty_KHW is None else result.uncertainty_KHW[:, :rows, :columns]
        smaller = {size: back(one) for size, one in result.smaller.items()}
        return Restoration(back(result.image[:, :rows, :columns]), maps, smaller, result.warnings)

    @torch.inference_mode()
    def restore_picture(
        self,
        image: Tensor,
        scale: float = 4,
        *,
        trained_scale: float = 4,
        color: str = "none",
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = BATCH,
        uncertainty: bool = False,
        fidelity: float = 0.0,
        sizes: Sequence[float] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **request: Any,
    ) -> Restoration:
        """Restore an image of any size; it is enlarged first, and padded or tiled, never squashed.

        What is gray stays gray: where the three channels of the image are equal, those of the result are.

        Args:
            image: (3, H, W) float in [0, 1], see `as_picture`; 8-bit, NumPy, (H, W, 3) and other ranges are refused.
            scale: enlargement, above 0.
            trained_scale: enlargement that the model was trained for. A smaller one is made at this one and reduced
                (as by Real-ESRGAN's outscale): squares sharper than in training come out wrecked. Not with `sizes`.
            color: "adain" or "wavelet" gives each tile the colors of the input, see `utils.color`; "none" does not.
            tile: side of the squares, pixels, one of `tiles`; None for the one the model was trained on.
            overlap: pixels shared by neighboring tiles; None for a quarter of a tile.
            batch: tiles per forward pass.
            uncertainty: whether to return it; costs K channels of the size of the result.
            fidelity: share of the area, 0 to 1, that is taken from the restorer, or from the enlarged image where there
                is none: where the network changed most without being sure, see `systems.fidelity`. Costs K + 3
                channels. Not with `sizes`.
            sizes: enlargements that are returned, from one pass: `scale`, and what part of it the model's `sides` are
                of `tile`. None for `scale` alone.
            progress: is called with the squares done and all there are, first with none done.
            request: `prompt`, `seed`, `select` and `steps`, see `Request`.
        Raises:
            ValueError: an image or a scale of another kind or range; says what was wanted and what came.
            UserError: unknown `select`, `steps`, `color`, `tile` or `sizes`, an impossible overlap or fidelity; a
                result that is not finite.
        """
        check_fidelity(fidelity, sizes)
        image = as_picture(image)
        height, width = image.shape[-2:]
        wanted = scaled_size(height, width, scale)
        if sizes is None:
            scale = max(scale, trained_scale)
        system = self if tile is None else self.at_tile(tile)
        sides = system.sides_of(sizes, scale)
        size = scaled_size(height, width, scale)
        overlap = system.tile // 4 if overlap is None else overlap
        total = num_tiles(size, system.tile, overlap, system.step)
        if progress is not None:
            progress(0, total)
        warnings: list[str] = []

        def warn(text: str) -> None:
            LOG.warning(text)
            warnings.append(text)

        has_maps = uncertainty or fidelity > 0
        asked = self.accept(Request(**request, sides=sides), has_maps)

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> list[Tensor]:
            tiles = to_device(tiles_B3tt, self.device)
            restored = system.restore_squares(tiles, numbers, asked)
            pairs = zip((*restored.smaller, restored.images_B3HW), sides, strict=True)
            images = [match_color(image, resize_area(tiles, (side, side)), color) for image, side in pairs]
            faithful = [match_color(self.faithful(tiles), tiles, color)] if fidelity else []
            maps = [system.uncertainty(restored.logits)] if has_maps and restored.logits is not None else []
            images[-1] = torch.cat([images[-1], *faithful, *maps], dim=1)
            if progress is not None:
                progress(numbers[-1] + 1, total)
            return [to_device(image, tiles_B3tt.device) for image in images]

        place = self.device if size[0] * size[1] <= DEVICE_PIXELS else image.device
        factors = [whole_number(scale * side / system.tile) for side in sides]
        results = [(scaled_size(height, width, factor), side) for factor, side in zip(factors, sides, strict=True)]
        squares = size, system.tile, overlap, batch, run, results, system.step
        tiled = restore_to_sizes(to_device(image, place), *squares, enlarge=self.enlarge, warn=warn)
        tiled[-1] = give_up(tiled[-1], fidelity)
        for whole in tiled:
            check_finite(whole, "the result")
            if is_gray(image):
                whole[:3] = whole[:3].mean(dim=0)
        *smaller, channels = (to_device(whole.clamp_(0, 1), image.device) for whole in tiled)
        if wanted != size:
            channels = resize(channels, wanted, REDUCE)
        others = dict(zip(factors, smaller, strict=False))
        return Restoration(channels[:3], channels[3:] if uncertainty else None, others, tuple(warnings))

    @torch.inference_mode()
    def reconstruct(self, image: Tensor) -> Tensor:
        """An image of any size after it passed the tokenizer: the ceiling of what restoring can reach.

        The image is (3, H, W) float in [0, 1], at full size, see `as_picture`, which says what is refused; likewise the
        result. UserError: a result that is not finite.
        """
        image = as_picture(image)

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            return to_device(self.decode(self.encode(to_device(tiles_B3tt, self.device)).codes), tiles_B3tt.device)

        tiled = restore_tiled(image, (image.shape[-2], image.shape[-1]), self.tile, self.tile // 4, BATCH, run)
        check_finite(tiled, "the result")
        return tiled.clamp_(0, 1)

    # ---- loading, saving, speed

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        merge: bool = False,
        precision: str | None = None,
        acceleration: Acceleration | None = None,
        tokenizer_file: str | None = None,
        restorer_file: str | None = None,
        **hub: Any,
    ) -> Self:
        """Load a system of this class, in evaluation mode; `varestorer.systems.load` finds the class by itself.

        Args:
            pretrained_model_name_or_path: a bundle's folder, a run of scripts/train.py (the averaged weights of its
                latest checkpoint) or a checkpoint of one, a published file with its companions beside it, or a
                bundle's or a known release's name on the hub (`owner/name`, `owner/name@revision`); None for "nano",
                which comes with the package.
            device: of the networks.
            merge: fold the adapters into the weights (faster, but only for `steps="one"`).
            precision: "fp32", "bf16", or "auto" for what suits the device; None: as stored.
            acceleration: in place of these two, for more means.
            tokenizer_file, restorer_file: of a published file, where they lie elsewhere.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.
        Raises:
            UsageError: neither a path nor a name that the hub knows.
            UserError: the path holds no system, or its files do not fit.
        """
        release = release_of(pretrained_model_name_or_path)
        if release is not None and release.system != cls.name:
            raise UserError(f"{release.name} holds a model of {release.system}, and {cls.name} was asked for")
        path = locate(pretrained_model_name_or_path, hub, cls.from_published)
        if acceleration is None and precision is not None:
            acceleration = Acceleration(merge, precision)
        merged = merge if acceleration is None else acceleration.merge
        system = cls._opened(path, merged, tokenizer_file, restorer_file)
        if merged:
            system.merge_adapters()
        system.source = path
        system.to(device).eval().requires_grad_(False)
        return system if acceleration is None else system.accelerate(acceleration)

    @classmethod
    def _opened(cls, path: Path, merge: bool, tokenizer_file: str | None, restorer_file: str | None) -> Self:
        """The system of a path, as `from_pretrained` takes it."""
        if not path.exists():
            raise UsageError(f"{path} does not exist; {HOW}")
        if is_bundle(path):
            return cls.from_bundle(path, merge)
        if is_published(path):
            check_is_whole(path)
            return cls.from_published(path, tokenizer_file, restorer_file)
        if not is_run(path):
            raise UserError(f"{path} holds no model; {HOW}")
        model = OmegaConf.to_container(model_of_run(path))
        system = cls(**{key: value for key, value in model.items() if not str(key).startswith("_")})  # type: ignore
        load_into(system, load_run_weights(path), f"the run {latest_checkpoint(path).parents[2]}")
        return system

    @classmethod
    def from_bundle(cls, bundle: Path, merge: bool = False) -> Self:
        """The system of a bundle's folder; `merge` folds adapters, where there are any, into the base as they are read.

        UserError: it is another system's, or has entries that a later version may know.
        """
        config = read_config(bundle)
        if config["system"] != cls.name:
            raise UserError(f"{bundle} holds a model of {config['system']}, and {cls.name} was asked for")
        given = {part: config[part] for part in cls.makers if part in config}
        unknown = [
            f"{part}.{key}"
            for part, entries in given.items()
            for key in sorted((entries or {}).keys() - inspect.signature(cls.makers[part]).parameters)
        ]
        if unknown:
            names = ", ".join(unknown)
            raise UserError(f"{bundle / CONFIG} has entries this version does not know ({names}); update varestorer")
        weights = {part: str(bundle) for part in ("tokenizer", "transformer")}
        system = cls(**given, weights=weights, **cls.options_of(bundle, config, merge))
        system.weak = dict(config.get("weak", {}))
        return system

    @classmethod
    def options_of(cls, bundle: Path, config: dict[str, Any], merge: bool) -> dict[str, Any]:
        """Arguments of the constructor beside sizes and weights."""
        return {}

    @classmethod
    def from_published(cls, path: Path, tokenizer_file: str | None = None, restorer_file: str | None = None) -> Self:
        """The system of a published file, with its companions beside it unless they are named.

        UserError: there is no such file of this system, or a companion is missing.
        """
        raise UserError(f"{path} is no published model of {cls.name}: there is none; give a run or a bundle")

    def check_source(self) -> None:
        """Refuse to restore (UsageError) with what was loaded, where another network than that is meant."""

    def check_official(self) -> None:
        """Refuse `restore_official` (UsageError) where no script was released, or one for other models than this."""
        raise UsageError(f"compat=official: no script for models of {self.name} was released; leave it out")

    def restore_official(
        self, image_3HW: Tensor, scale: float = 4, *, prompt: Tensor | None = None, tiled: bool = False, seed: int = 0
    ) -> Tensor:
        """An image in [0, 1] as the script of the paper's authors restores it, its faults included.

        Args:
            image_3HW: rounded to 8 bits first.
            scale: enlargement.
            prompt: text features (T, E), where the model reads text.
            tiled: overlapping squares instead of the whole, squashed to one.
            seed: of whatever is drawn.
        Returns:
            (3, H', W') in [0, 1], multiples of 1/255.
        """
        self.check_official()
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.acceleration is not None:
            raise UserError("an accelerated system cannot be saved: its weights were rounded; save it before")
        save_bundle(self, save_directory)

    def merge_adapters(self) -> Self:
        """Fold the adapters, where there are any, into the base weights; what is left is the student alone."""
        if self.student_config.lora_rank and not self.student_config.merged:
            merge_adapters(self.transformer)
            self.student_config = replace(self.student_config, merged=True)
        return self

    def check_networks(self, num_levels: int) -> None:
        """Refuse networks that do not fit each other (UserError), for a transformer that tells `num_levels` apart."""
        height, width = self.schedule.latent_size
        if height != width:
            raise UserError(f"images are restored in squares: model.schedule must end in one, got {height}x{width}")
        for name in ("latent_width", "vocabulary"):
            ours, theirs = getattr(self.transformer.config, name), getattr(self.tokenizer.config, name)
            if ours != theirs:
                raise UserError(f"model.tokenizer.{name}={theirs} and model.transformer.{name}={ours} must agree")
        if self.transformer.config.num_levels < num_levels:
            raise UserError(f"model.transformer.num_levels must be at least {num_levels} for this schedule")

    def draw_tokenizer(self, seed: int) -> None:
        """Random weights of the tokenizer."""
        init_tokenizer_weights(self.tokenizer, torch_generator(seed, "tokenizer"))
        if self.tokenizer.config.vocabulary:
            self.tokenizer.quantizer.codebook.init_weights(torch_generator(seed, "codebook"))

    def draw_rest(self, seed: int) -> None:
        """Random weights of the parts without a file; adapters start without effect unless a file had them."""
        drawn = allocate(self)
        if "tokenizer" not in self.files:
            self.draw_tokenizer(seed)
        if "transformer" not in self.files:
            self.transformer.init_weights(torch_generator(seed, "transformer"))
        if any(".lora_" in name for name in drawn):
            init_adapters(self.transformer, torch_generator(seed, "adapters"))

    def set_precision(self, precision: str) -> Self:
        """Keep the blocks of the transformer in "bf16", or in "fp32"; the rest is always float32."""
        if precision not in PRECISIONS:
            raise UserError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
        self.transformer.blocks.to(PRECISIONS[precision])
        return self

    def accelerate(self, acceleration: Acceleration | None = None) -> Self:
        """Make restoring fast, in place; nothing else works as before afterwards: no training, no saving.

        None merges adapters, and takes bfloat16 where the device gains from it. UserError: what this machine cannot do,
        or a second time by other means.
        """
        chosen = (acceleration or Acceleration()).on(self.device)
        if self.acceleration == chosen:
            return self
        if self.acceleration is not None:
            raise UserError("this system is accelerated already; load it again to choose other means")
        check_means(chosen, self.device)
        if chosen.precision == "fp32":
            self.set_precision("fp32")  # before the adapters are merged, so that nothing is rounded
        if chosen.merge:
            self.merge_adapters()
        self._speed_up(chosen)
        self.acceleration = chosen
        return self

    def _speed_up(self, chosen: Acceleration) -> None:
        """Precision, low-precision linear layers, compiled code and graphs."""
        if chosen.precision == "bf16":
            self.set_precision("bf16")
            decode_in_bf16(self.tokenizer.decoder)
        if chosen.linears != "none":
            quantize_linears(self.transformer.blocks, chosen.linears)
        if chosen.compile:
            compile_parts(*self.transformer.blocks, self.tokenizer.encoder, self.tokenizer.decoder)
        if chosen.graphs:
            self.graphs = BatchGraphs()
