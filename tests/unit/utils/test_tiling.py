"""Tiles: where they lie, how they blend, that an image survives being cut up, and that no seam is seen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import skimage.data
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from varestorer.utils.errors import UserError
from varestorer.utils.images import resize
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import (
    enlarged_tile,
    gaussian_weights,
    ramp_window,
    restore_tiled,
    restore_to_sizes,
    scaled_size,
    tile_positions,
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return json.loads((shared / "fixtures/infinity/meta_va.json").read_text())["tiling"]


def identity(tiles_B3tt: Tensor, indices: list[int]) -> Tensor:
    return tiles_B3tt


@pytest.mark.parity
def test_positions_weights_and_sizes_match_the_released_code(golden: dict) -> None:
    for case in golden["positions"]:
        assert tile_positions(case["length"], case["tile"], case["overlap"]) == case["out"]
    weights = gaussian_weights(golden["weights"]["h"])
    for place, value in golden["weights"]["at"].items():
        y, x = map(int, place.split(","))
        assert weights[y, x].item() == pytest.approx(value, rel=1e-5)
    for case in golden["sr_size"]:
        width, height = case["wh"]
        assert scaled_size(height, width, case["scale"]) == tuple(reversed(case["out"]))


@pytest.mark.parametrize(("length", "tile", "overlap"), [(1, 8, 3), (8, 8, 0), (9, 8, 7), (100, 16, 0), (97, 16, 5)])
def test_positions_cover_everything_once_and_end_flush(length: int, tile: int, overlap: int) -> None:
    positions = tile_positions(length, tile, overlap)
    assert positions == sorted(set(positions))
    assert positions[0] == 0 and positions[-1] == max(length - tile, 0)
    steps = [after - before for before, after in zip(positions, positions[1:], strict=False)]
    assert all(step <= tile - overlap for step in steps)


@pytest.mark.parametrize("overlap", [-1, 16, 40])
def test_impossible_overlap_is_refused_with_the_numbers(overlap: int) -> None:
    with pytest.raises(UserError, match=f"16 pixels, got {overlap}"):
        tile_positions(100, 16, overlap)


def test_ramps_facing_each_other_sum_to_one_and_touch_only_the_overlap() -> None:
    window = ramp_window(16, 6)
    torch.testing.assert_close(window[:6] + window[-6:], torch.ones(6, dtype=torch.float64))
    assert (window[6:10] == 1).all()
    assert (window > 0).all() and window[0] < 0.05


def test_identity_gives_any_image_back() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        height, width, tile = draw.randint(1, 200), draw.randint(1, 200), draw.randint(1, 64)
        overlap, batch = draw.randint(0, tile - 1) // 2, draw.randint(1, 9)
        image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
        out = restore_tiled(image, (height, width), tile, overlap, batch, identity)
        assert out.shape == image.shape and out.dtype == torch.float32
        torch.testing.assert_close(out, image, atol=1e-6, rtol=0)


def test_a_constant_shift_leaves_no_seam() -> None:
    image = torch.rand(3, 77, 130, generator=torch.Generator().manual_seed(0))
    out = restore_tiled(image, (77, 130), 32, 8, 4, lambda tiles, indices: tiles + 0.25)
    torch.testing.assert_close(out, image + 0.25, atol=1e-6, rtol=0)


def test_tiles_that_disagree_are_blended_without_a_jump() -> None:
    def paint(tiles_B3tt: Tensor, indices: list[int]) -> Tensor:
        return torch.tensor(indices).view(-1, 1, 1, 1).float().expand_as(tiles_B3tt)

    row = restore_tiled(torch.zeros(3, 32, 56), (32, 56), 32, 8, 1, paint)[0, 0]
    assert row[0] == 0 and row[-1] == 1
    assert (row.diff() >= 0).all() and row.diff().max() < 0.25


def test_batches_are_full_numbered_in_row_major_order_and_do_not_change_the_result() -> None:
    image = torch.rand(3, 50, 90, generator=torch.Generator().manual_seed(1))

    def run_with(batch: int) -> tuple[list[list[int]], Tensor]:
        calls: list[list[int]] = []

        def run(tiles_B3tt: Tensor, indices: list[int]) -> Tensor:
            calls.append(indices)
            return tiles_B3tt * torch.tensor(indices).view(-1, 1, 1, 1)

        return calls, restore_tiled(image, (50, 90), 32, 4, batch, run)

    one_by_one, alone = run_with(1)
    batched, together = run_with(4)
    assert one_by_one == [[n] for n in range(8)]
    assert batched == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(alone, together)


def test_small_images_are_continued_by_their_mirror_image_never_stretched() -> None:
    seen: list[Tensor] = []

    def run(tiles_B3tt: Tensor, indices: list[int]) -> Tensor:
        seen.append(tiles_B3tt)
        return tiles_B3tt

    image = torch.tensor([0.0, 0.5, 1.0]).expand(3, 1, 3)
    assert restore_tiled(image, (1, 3), 6, 0, 1, run).shape == (3, 1, 3)
    assert seen[0][0, 0].tolist() == [[0, 0.5, 1, 0.5, 0, 0.5]] * 6


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((40, 50), (160, 200)),
        ((40, 50), (148, 185)),
        ((130, 90), (33, 41)),
        ((50, 60), (50, 120)),
        ((70, 30), (70, 30)),
        ((1, 1), (4, 4)),
        ((1, 300), (4, 1200)),
        ((500, 1), (1850, 3)),
        ((2, 3), (7, 5)),
    ],
)
def test_tiles_are_crops_of_the_enlarged_image(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    whole = resize(image.double(), size, "bicubic").float()
    out = restore_tiled(image, size, 32, 8, 3, identity)
    torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
    tile = min(*size, 32)
    for top, left in ((0, 0), (size[0] - tile, size[1] - tile), ((size[0] - tile) // 3, (size[1] - tile) // 2)):
        expected = whole[:, top : top + tile, left : left + tile]
        torch.testing.assert_close(enlarged_tile(image, size, top, left, tile), expected, atol=1e-6, rtol=0)


def test_bilinear_tiles_are_crops_of_torchs_bilinear_image() -> None:
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(image[None], size=(36, 28), mode="bilinear")[0]

    def run(tiles: torch.Tensor, numbers: list[int]) -> list[torch.Tensor]:
        return [tiles]

    (restored,) = restore_to_sizes(image, (36, 28), 16, 4, 2, run, [((36, 28), 16)], enlarge="bilinear")
    torch.testing.assert_close(restored, whole, atol=1e-6, rtol=0)


def test_enlarged_tiles_are_clamped_and_smaller_images_mirrored_after_enlarging() -> None:
    image = torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(3, 4, 4)
    tile = enlarged_tile(image, (8, 8), 0, 0, 15)
    assert tile.min() == 0 and tile.max() == 1
    torch.testing.assert_close(tile[:, :8, :8], resize(image, (8, 8), "bicubic"))
    assert torch.equal(tile, tile.flip(-1, -2))


def test_the_result_has_as_many_channels_as_the_tiles_that_come_back() -> None:
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(3))
    out = restore_tiled(image, (40, 60), 32, 8, 2, lambda tiles, indices: torch.cat([tiles, tiles[:, :1] * 3], dim=1))
    assert out.shape == (4, 40, 60)
    torch.testing.assert_close(out[3], out[0] * 3)


def peak_memory(act: Callable[[], Tensor], folder: Path) -> int:
    """Most bytes of torch's CPU allocator held at once beyond what `act` returns.

    The profiler's trace has every allocation and every release, temporary ones inside operations included, so the
    number is exact and the same in every run, unlike the memory of the process.
    """
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = act()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    live = [0]
    for _, change in changes:
        live.append(live[-1] + change)
    assert live[-1] == result.nbytes
    return max(live) - result.nbytes


def test_memory_beyond_input_and_output_does_not_grow_with_the_image(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1))

    def peak(side: int) -> int:
        image, size = torch.zeros(3, side, side), (4 * side, 4 * side)
        return peak_memory(lambda: restore_tiled(image, size, 64, 16, 4, lambda x, n: network(x)), tmp_path)

    small, large = peak(48), peak(96)
    whole = 3 * 4 * (4 * 96) ** 2  # bytes of the enlarged image
    assert small < large + 1 < small + whole / 25  # what grows are weights as long as a side


@pytest.mark.parametrize(
    ("shape", "size", "batch", "message"),
    [
        ((3, 8, 8), (8, 8), 0, "batch must be at least 1"),
        ((3, 0, 8), (8, 8), 1, "with pixels is needed"),
        ((3, 8, 8), (0, 8), 1, "with pixels is needed"),
    ],
)
def test_bad_requests_are_refused(shape: tuple[int, ...], size: tuple[int, int], batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        restore_tiled(torch.zeros(shape), size, 8, 0, batch, identity)


@pytest.mark.parametrize("crop", [(slice(1, None),), (..., slice(4))])
def test_run_must_keep_number_and_side_of_its_tiles(crop: tuple) -> None:
    with pytest.raises(ValueError, match="1 tiles of side 8 came back as"):
        restore_tiled(torch.zeros(3, 8, 8), (8, 8), 8, 0, 1, lambda tiles, indices: tiles[crop])


def test_a_scale_that_is_a_slip_is_refused() -> None:
    assert scaled_size(100, 50, 2.5) == (250, 125)
    with pytest.raises(UserError, match="the result would have 3000000 x 4000000 pixels; lower scale"):
        scaled_size(40, 30, 1e5)


def strange(numbers: list[int], odd: int, calls: list[int]) -> Callable[[Tensor, list[int]], Tensor]:
    """A network that darkens one square: so many times (`calls`), or whenever it comes."""

    def run(tiles_B3tt: Tensor, given: list[int]) -> Tensor:
        out = tiles_B3tt.clone()
        for place, number in enumerate(given):
            numbers.append(number)
            if number == odd and (not calls or calls.pop()):
                out[place] *= 0.7
        return out

    return run


@pytest.mark.parametrize("odd", [0, 5, 11])
@pytest.mark.parametrize("is_accident", [True, False])
def test_a_square_unlike_its_neighbors_is_done_again_or_named(caplog, odd: int, is_accident: bool) -> None:
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.6
    seen: list[int] = []
    once = [False] * 20 + [True] if is_accident else []
    out = restore_tiled(image, (24, 32), 12, 6, 4, strange(seen, odd, once))
    assert seen.count(odd) == 2 and len(seen) > 15
    if is_accident:
        assert torch.allclose(out, image, atol=1e-5) and not caplog.messages
    else:
        assert "1 of 15 squares differ" in caplog.messages[-1] and len(caplog.messages) == 1


def test_a_model_that_changes_all_squares_alike_or_by_chance_is_left_alone(caplog) -> None:
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.6
    restore_tiled(image, (24, 32), 12, 6, 4, lambda tiles, numbers: tiles * 0.5)
    chance = torch.Generator().manual_seed(1)
    restore_tiled(image, (24, 32), 12, 6, 4, lambda tiles, numbers: torch.rand(tiles.shape, generator=chance))
    assert not caplog.messages


def test_a_batch_that_memory_is_too_little_for_is_halved(caplog) -> None:
    image, sizes = torch.rand(3, 24, 32), []

    def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
        sizes.append(len(numbers))
        if len(numbers) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return tiles_B3tt

    assert torch.allclose(restore_tiled(image, (24, 32), 12, 6, 8, run), image, atol=1e-5)
    assert sizes[:4] == [8, 4, 2, 2] and caplog.messages[0] == "out of memory with 8 squares at once, going on with 4"
    with pytest.raises(RuntimeError, match="another fault"):
        restore_tiled(image, (24, 32), 12, 6, 8, lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))


TILE = 64
PHOTOGRAPHS = {"smooth": "moon", "textured": "brick"}


def seam_positions(length: int, tile: int, overlap: int) -> list[int]:
    """Pixels whose step from the one before crosses a seam.

    They are where a tile's weight begins and ends, and the middle between the two.
    """
    positions = tile_positions(length, tile, overlap)
    found: set[int] = set()
    for before, after in zip(positions, positions[1:], strict=False):
        found |= {after, before + tile, (after + before + tile) // 2}
    return sorted(p for p in found if 0 < p < length)


def seam_ratio(image_3HW: Tensor, original_3HW: Tensor, tile: int, overlap: int, period: int = 1) -> float:
    """Mean absolute gradient across seams over that elsewhere, relative to the same in the picture without tiles.

    Dividing by the original's ratio takes out what the picture itself has at these places. Mean of rows and columns.

    Args:
        image_3HW: restored from tiles.
        original_3HW: of the same size, without seams.
        tile: side, pixels.
        overlap: of the tiles, pixels.
        period: a decoder that draws patches has edges between them everywhere; seams are then compared with places
            that lie alike in a patch of this many pixels.
    """
    ratios = []
    for dim in (-2, -1):
        seams = torch.tensor(seam_positions(image_3HW.shape[dim], tile, overlap))
        places = torch.arange(1, image_3HW.shape[dim])
        elsewhere = ~torch.isin(places, seams)
        alike = elsewhere & (places % period == seams[:, None] % period)
        image, original = (
            (steps[seams - 1] / ((alike * steps).sum(dim=1) / alike.sum(dim=1))).mean()
            for steps in (x.diff(dim=dim).abs().double().mean(dim=(0, -3 - dim)) for x in (image_3HW, original_3HW))
        )
        ratios.append((image / original).item())
    return sum(ratios) / 2


@cache
def photograph(kind: str) -> Tensor:
    """A quarter of a photograph, reduced as low-resolution inputs are: (3, 96, 96) in [0, 1]."""
    gray = torch.tensor(getattr(skimage.data, PHOTOGRAPHS[kind])()[:384, :384]) / 255
    return resize(gray.expand(3, -1, -1), (96, 96), "area")


def disagreeing_network(seed: int):  # noqa: ANN201
    """A network whose tiles disagree where they overlap.

    Every tile has its own offset of each channel, its own contrast, and darker or brighter borders some 3 pixels wide
    (standard deviations 0.02, 10 % and 0.02; those of a model of quickstart_scratch differ as much from tile to tile).
    """

    def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
        reach = torch.exp(-(torch.arange(TILE) + 0.5) / 3)
        from_border = torch.stack([reach, reach.flip(0)])
        restored = []
        for tile_3tt, number in zip(tiles_B3tt, numbers, strict=True):
            generator = torch_generator(seed, "tile", number)
            mean = tile_3tt.mean(dim=(-2, -1), keepdim=True)
            contrast = 1 + 0.1 * torch.randn((), generator=generator)
            offset = 0.02 * torch.randn(3, 1, 1, generator=generator)
            borders = 0.02 * torch.randn(2, 3, 2, generator=generator) @ from_border
            restored.append((tile_3tt - mean) * contrast + mean + offset + borders[0, :, None] + borders[1, :, :, None])
        return torch.stack(restored)

    return run


def restored_seam_ratio(kind: str, overlap: int, seed: int) -> float:
    size = (384, 384)
    out = restore_tiled(photograph(kind), size, TILE, overlap, 16, disagreeing_network(seed))
    return seam_ratio(out, resize(photograph(kind), size, "bicubic"), TILE, overlap)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_borders_of_tiles_look_like_the_rest_of_the_picture(kind: str, seed: int) -> None:
    assert restored_seam_ratio(kind, TILE // 4, seed) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_hard_cuts_are_seen_as_seams(kind: str) -> None:
    assert restored_seam_ratio(kind, 0, 0) > 2


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_a_picture_has_no_seams_compared_with_itself(kind: str) -> None:
    image = photograph(kind)
    assert seam_ratio(image, image, 32, 8) == 1
    assert seam_ratio(image, image, 32, 8, period=4) == 1


def test_seams_lie_where_weights_begin_and_end_and_in_the_middle_of_overlaps() -> None:
    assert seam_positions(112, 64, 16) == [48, 56, 64]
    assert seam_positions(128, 64, 0) == [64]
    assert seam_positions(64, 64, 16) == []


def test_patches_of_a_decoder_are_not_taken_for_seams() -> None:
    patches = 0.1 * (torch.arange(256) // 8 % 2).expand(3, 256, 256)
    plain = 0.1 * torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    patchy = plain + patches + patches.mT
    assert seam_ratio(patchy, plain, TILE, 16) > 1.2
    assert seam_ratio(patchy, plain, TILE, 16, period=8) == pytest.approx(1, abs=0.03)
