"""The sizes of the scales, coarse to fine (Infinity's dynamic resolution templates; VAR, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from varestorer.utils.errors import UserError

Scale = tuple[int, int]

# Number of scales of each named size in the template below (about that many megapixels at aspect 1).
NUM_SCALES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# Aspect h / w -> the 13 scales of the largest size, as (h, w) in latent positions (16 pixels each).
_TALL_TEMPLATES: dict[float, str] = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _all_templates() -> dict[float, tuple[Scale, ...]]:
    entries = {aspect: [entry.split("x") for entry in text.split()] for aspect, text in _TALL_TEMPLATES.items()}
    tall = {aspect: tuple((int(h), int(w)) for h, w in sides) for aspect, sides in entries.items()}
    wide = {int(1000 / a) / 1000: tuple((w, h) for h, w in scales) for a, scales in tall.items() if a != 1.0}
    return tall | wide


TEMPLATES: dict[float, tuple[Scale, ...]] = _all_templates()


@dataclass(frozen=True)
class ScaleSchedule:
    """Sizes (h, w) of the K scales, coarse to fine; the last one is the latent size.

    Args:
        scales: (h, w) of each scale, in latent positions.
        position_scales: the scales whose concatenated grids make the table of positions that tokens read in
            order. It starts with `scales` and may go on beyond them (Infinity reads the 1M template for every
            size); empty means `scales` alone.
        targets: nested sizes at which the sum of codes is an image of its own (H-VAR), the last of them the last
            scale; empty means the last scale alone.
    Raises:
        UserError: no scale, a side below 1, scales that shrink, `position_scales` that do not begin with `scales`, or
            targets that are no scales.
    """

    scales: tuple[Scale, ...]
    position_scales: tuple[Scale, ...] = field(default=())
    targets: tuple[Scale, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.scales or any(h < 1 or w < 1 for h, w in self.scales):
            raise UserError(f"a schedule needs at least one scale of positive sides, got {self.scales}")
        for (h0, w0), (h1, w1) in zip(self.scales, self.scales[1:], strict=False):
            if h1 < h0 or w1 < w0:
                raise UserError(f"scales must grow from coarse to fine, got {h0}x{w0} before {h1}x{w1}")
        if not self.position_scales:
            object.__setattr__(self, "position_scales", self.scales)
        if self.position_scales[: len(self.scales)] != self.scales:
            raise UserError("position_scales must begin with the schedule's own scales")
        if not self.targets:
            object.__setattr__(self, "targets", self.scales[-1:])
        if self.targets[-1] != self.scales[-1] or not set(self.targets) <= set(self.scales):
            raise UserError(f"targets must be scales of the schedule and end with the last one, got {self.targets}")

    @classmethod
    def template(cls, size: str | int = "0.25M", aspect: float = 1.0) -> ScaleSchedule:
        """A schedule of Infinity's templates.

        Args:
            size: "0.06M", "0.25M", "0.60M", "1M", or how many scales of the template to take (1 to 13).
            aspect: h / w, a key of `TEMPLATES`.
        """
        if aspect not in TEMPLATES:
            raise UserError(f"no template of aspect {aspect}; choose one of {sorted(TEMPLATES)}")
        num_scales = NUM_SCALES.get(size) if isinstance(size, str) else size
        if num_scales is None or not 1 <= num_scales <= len(TEMPLATES[aspect]):
            raise UserError(f"schedule size must be one of {list(NUM_SCALES)} or 1 to 13 scales, got {size!r}")
        return cls(TEMPLATES[aspect][:num_scales], TEMPLATES[aspect])

    @classmethod
    def build(
        cls,
        size: str | int | None = None,
        aspect: float = 1.0,
        sides: list[int] | None = None,
        targets: list[int] | None = None,
    ) -> ScaleSchedule:
        """A schedule from a config: a template's `size` and `aspect`, or the `sides` of square scales and `targets`."""
        if sides is None:
            return cls.template("0.25M" if size is None else size, aspect)
        if size is not None:
            raise UserError("a schedule takes either size (and aspect) or sides, not both")
        squares, nested = (tuple((side, side) for side in some or ()) for some in (sides, targets))
        return cls(squares, targets=nested)

    def with_side(self, side: int) -> ScaleSchedule:
        """The schedule that ends with the square of this side, in the same table of positions."""
        if (side, side) not in self.position_scales:
            raise UserError(f"no square scale of side {side} in {self.position_scales}")
        count = self.position_scales.index((side, side)) + 1
        return ScaleSchedule(self.position_scales[:count], self.position_scales)

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def latent_size(self) -> Scale:
        """(h, w) of the last scale."""
        return self.scales[-1]

    @cached_property
    def map_sizes(self) -> tuple[Scale, ...]:
        """Size of the map that each scale's codes are summed at: the smallest target that holds the scale."""
        return tuple(next(t for t in self.targets if t[0] >= h and t[1] >= w) for h, w in self.scales)

    def ends_target(self, k: int) -> bool:
        """Whether the sum is an image of its own after scale k: the last scale of a target."""
        return k == len(self) - 1 or self.map_sizes[k + 1] != self.map_sizes[k]

    @cached_property
    def num_tokens_per_scale(self) -> tuple[int, ...]:
        """Tokens h * w of each scale."""
        return tuple(h * w for h, w in self.scales)

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(self.num_tokens_per_scale)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each scale's tokens lie in the sequence of all scales."""
        starts = [sum(self.num_tokens_per_scale[:k]) for k in range(len(self) + 1)]
        return tuple(slice(start, end) for start, end in zip(starts, starts[1:], strict=False))
