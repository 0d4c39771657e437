from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from varestorer.data import BicubicDegradation, Degradation
from varestorer.data.degradation import OneOf, RandomBlur, RandomNoise, RandomResize, pipeline
from varestorer.data.degradation.operations import compress_jpeg
from varestorer.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[4] / "configs" / "degradation"


@lru_cache
def photo(height=64, width=64):
    """A smooth picture with some texture."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    texture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return 0.8 * torch.stack([rows, columns, (rows * columns * 20).sin() / 2 + 0.5]) + 0.2 * texture


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(64, 64), (48, 48), (128, 96), (20, 20), (8, 8), (50, 67), (4, 64)])
def test_any_size_comes_back_with_8_bit_levels(size):
    for seed in range(8):
        lq = Degradation()(photo(*size), rng(seed))
        assert lq.shape == (3, *size) and lq.dtype == torch.float32
        assert lq.min() >= 0 and lq.max() <= 1
        assert torch.allclose(lq * 255, (lq * 255).round(), atol=1e-4)


def test_the_generator_is_the_only_randomness():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [Degradation()(photo(), rng(seed)) for seed in range(12)]
    torch.manual_seed(1)
    np.random.seed(1)
    again = [Degradation()(photo(), rng(seed)) for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first[0], other) for other in first[1:])
    torch.manual_seed(0)
    np.random.seed(0)
    Degradation()(photo(), rng())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_the_input_is_left_as_it_was():
    img = photo().clone()
    Degradation()(img, rng())
    assert torch.equal(img, photo())


def test_it_spoils_but_does_not_move_the_picture():
    img = photo(96, 96)
    average = torch.stack([Degradation()(img, rng(seed)) for seed in range(30)]).mean(0)

    def error(shift):
        return (average - img.roll(shift, dims=(1, 2)))[:, 16:-16, 16:-16].abs().mean()

    assert all(error((0, 0)) < error(shift) for shift in [(3, 0), (-3, 0), (0, 3), (0, -3)])
    single = Degradation()(img, rng())
    assert (single - img).abs().mean() > 0.02


def test_preset_file_is_the_default():
    assert instantiate(OmegaConf.load(CONFIGS / "realesrgan.yaml")) == Degradation()


def test_published_parameters():
    """The values of the published training runs, written out once more."""
    preset = Degradation()
    assert preset.blur1 == RandomBlur(
        1.0, 0.1, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), (0.2, 3), (0.5, 4), (1, 2), (7, 21)
    )
    assert preset.resize1 == RandomResize((0.2, 0.7, 0.1), (0.3, 1.5))
    assert preset.noise1 == RandomNoise(0.5, (1, 15), (0.05, 2), 0.4)
    assert preset.blur2 == replace(preset.blur1, prob=0.5, sigma=(0.2, 1.5))
    assert preset.resize2 == RandomResize((0.3, 0.4, 0.3), (0.6, 1.2))
    assert preset.noise2 == RandomNoise(0.5, (1, 12), (0.05, 1), 0.4)
    assert (preset.jpeg1, preset.jpeg2, preset.final_sinc_prob) == ((60, 95), (60, 100), 0.8)


def test_bicubic_preset():
    degrade = instantiate(OmegaConf.load(CONFIGS / "bicubic.yaml"))
    assert degrade == BicubicDegradation(scale=4)
    img = photo()
    lq = degrade(img, rng())
    assert lq.shape == img.shape and torch.equal(lq, degrade(img, rng(1)))
    assert 0.01 < (lq - img).abs().mean() < 0.06


@pytest.mark.parametrize("kind", range(6))
def test_each_kind_of_kernel(kind):
    blur = RandomBlur(sinc_prob=0, kind_probs=tuple(float(k == kind) for k in range(6)))
    source = rng(kind)
    kernels = [blur.draw_kernel(source) for _ in range(40)]
    # isotropic kernels are their own transpose; turned ones are not
    turned = [not torch.allclose(kernel, kernel.T, atol=1e-6) for kernel in kernels]
    assert sum(turned) > 30 if kind % 2 else not any(turned)
    assert {kernel.shape[0] for kernel in kernels} <= set(range(7, 22, 2))
    rows = [kernel[len(kernel) // 2, len(kernel) // 2 :].log() for kernel in kernels if len(kernel) >= 13]
    falls = [float((row[0] - row[4]) / (row[0] - row[2])) for row in rows if row[4] > -12]
    # of all kinds only the plain isotropic Gaussian's logarithm is quadratic along every row through the center
    assert np.allclose(falls, 4, rtol=0.02) == (kind < 2)


def test_kernel_kinds_come_as_often_as_asked(monkeypatch):
    drawn = []
    for name in ("gaussian_kernel", "plateau_kernel", "sinc_kernel"):
        monkeypatch.setattr(
            f"varestorer.data.degradation.pipeline.{name}",
            lambda size, *args, name=name, **shape: drawn.append((name, "sigma_y" in shape, shape.get("beta"))),
        )
    source = rng()
    for _ in range(8000):
        RandomBlur().draw_kernel(source)
    counts = {
        "sinc": sum(name == "sinc_kernel" for name, _, _ in drawn) / 8000,
        "plateau": sum(name == "plateau_kernel" for name, _, _ in drawn) / 8000,
        "anisotropic": sum(turned for _, turned, _ in drawn) / 8000,
        "plain": sum(name == "gaussian_kernel" and beta == 1 for name, _, beta in drawn) / 8000,
    }
    expected = {"sinc": 0.1, "plateau": 0.9 * 0.15, "anisotropic": 0.9 * 0.31, "plain": 0.9 * 0.7}
    assert counts == pytest.approx(expected, abs=0.015)
    betas = [beta for name, _, beta in drawn if name == "gaussian_kernel" and beta != 1]
    assert np.mean([beta < 1 for beta in betas]) == pytest.approx(0.5, abs=0.06)
    assert min(betas) >= 0.5 and max(betas) <= 4
    plateau = [beta for name, _, beta in drawn if name == "plateau_kernel"]
    assert 1 <= min(plateau) and max(plateau) <= 2


def test_resizes_go_up_down_and_nowhere_as_often_as_asked():
    source, img = rng(), photo(100, 100)[:1]
    sides = np.array([RandomResize()(img, source).shape[-1] for _ in range(1500)])
    shares = [(sides > 100).mean(), (sides < 100).mean(), (sides == 100).mean()]
    assert shares == pytest.approx([0.2, 0.7, 0.1], abs=0.04)
    assert sides.min() >= 30 and sides.max() < 150
    assert RandomResize((0, 1, 0), (0.6, 1.2))(img, source, base=(25, 50)).shape[-1] in range(30, 51)


def test_noise_kinds(monkeypatch):
    drawn = []
    for name in ("add_gaussian_noise", "add_poisson_noise"):
        monkeypatch.setattr(
            f"varestorer.data.degradation.pipeline.{name}",
            lambda img, strength, gray, source, name=name: drawn.append((name, strength, gray)),
        )
    source = rng()
    for _ in range(4000):
        RandomNoise()(photo(), source)
    assert np.mean([name == "add_gaussian_noise" for name, _, _ in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([gray for _, _, gray in drawn]) == pytest.approx(0.4, abs=0.03)
    strengths = {kind: [s for name, s, _ in drawn if name == kind] for kind, _, _ in drawn}
    for kind, low, high in (("add_gaussian_noise", 1, 15), ("add_poisson_noise", 0.05, 2)):
        assert low <= min(strengths[kind]) < 1.1 * low + 0.1 and 0.95 * high < max(strengths[kind]) <= high


def test_sinc_and_jpeg_come_in_both_orders(monkeypatch):
    import varestorer.data.degradation.pipeline as pipeline

    orders = {"sinc first": 0, "jpeg first": 0}
    for seed in range(60):
        steps = []
        monkeypatch.setattr(pipeline, "compress_jpeg", lambda x, q, s=steps: s.append(("jpeg", q)) or x)
        monkeypatch.setattr(pipeline, "blur", lambda x, kernel, s=steps: s.append(("blur", kernel)) or x)
        Degradation(blur1=RandomBlur(0), blur2=RandomBlur(0), final_sinc_prob=1)(photo(), rng(seed))
        names = [name for name, _ in steps]
        assert names in (["jpeg", "jpeg", "blur"], ["jpeg", "blur", "jpeg"])
        orders["sinc first" if names[-1] == "jpeg" else "jpeg first"] += 1
        qualities = [quality for name, quality in steps if name == "jpeg"]
        assert 60 <= qualities[0] <= 95 and 60 <= qualities[1] <= 100
    assert min(orders.values()) > 15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomBlur(prob=1.5), r"RandomBlur.prob.*\[0, 1\].*1.5"),
        (lambda: RandomBlur(kind_probs=[0.5, 0.5]), "kind_probs.*6 probabilities"),
        (lambda: RandomBlur(sigma=[3, 0.2]), "sigma.*range"),
        (lambda: RandomBlur(size=[8, 20]), "size.*odd"),
        (lambda: RandomResize(direction_probs=[0.5, 0.6, -0.1]), "direction_probs"),
        (lambda: Degradation(enlarge_modes=["nearest"]), "enlarge_modes.*bicubic.*nearest"),
        (lambda: OneOf({"a": BicubicDegradation()}, {"b": 1.0}), "degradation.weights .* for each of a, got .*'b'"),
        (lambda: OneOf({"a": BicubicDegradation()}, {"a": 0.0}), "a positive number for each of a"),
    ],
)
def test_wrong_settings_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_in_float64_the_number_of_threads_changes_nothing():
    hq = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([Degradation()(hq, np.random.default_rng(seed)) for seed in range(12)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_every_step_keeps_float64():
    hq = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in (RandomBlur(), RandomResize(), RandomNoise(gaussian_prob=1.0), RandomNoise(gaussian_prob=0.0)):
        assert step(hq, np.random.default_rng(0)).dtype == torch.float64
    assert compress_jpeg(hq, 80).dtype == torch.float64


@pytest.fixture
def steps(monkeypatch) -> list:
    """What the pipeline does, step by step: the name of the operation and its settings."""
    import varestorer.data.degradation.pipeline as pipeline

    taken = []
    names = ("blur", "resample", "compress_jpeg", "add_gaussian_noise", "add_poisson_noise")

    def noting(name):
        real = getattr(pipeline, name)

        def noted(img, *args):
            taken.append((name, *args))
            return real(img, *args)

        return noted

    for name in names:
        monkeypatch.setattr(pipeline, name, noting(name))
    return taken


def test_a_seed_keeps_its_plan(steps):
    """What a sample's seed draws is frozen: it decides the training data of every run that goes on."""
    Degradation()(torch.rand(3, 64, 48, generator=torch.Generator().manual_seed(0)), rng(0))
    assert [step[0] for step in steps] == [
        *("blur", "resample", "add_poisson_noise", "compress_jpeg"),
        *("blur", "resample", "add_gaussian_noise"),
        *("compress_jpeg", "resample", "blur", "resample"),
    ]
    resizes = [step[1:] for step in steps if step[0] == "resample"]
    assert resizes[:2] == [((60, 45), "area"), ((18, 14), "area")]
    assert resizes[2:] == [((16, 12), "bilinear"), ((64, 48), "bilinear")]
    assert [step[1] for step in steps if step[0] == "compress_jpeg"] == [69, 85]
    assert [step[1:3] for step in steps if "noise" in step[0]] == [
        (pytest.approx(1.1100687), False),
        (pytest.approx(1.3115164), False),
    ]
    kernels = [step[1] for step in steps if step[0] == "blur"]
    assert [len(kernel) for kernel in kernels] == [15, 19, 11]
    centers = [float(kernel[len(kernel) // 2, len(kernel) // 2]) for kernel in kernels]
    assert centers == pytest.approx([0.0363694, 0.1206476, 0.2489037], rel=1e-4)


def test_cut_offs_of_small_kernels_are_higher(monkeypatch):
    import varestorer.data.degradation.pipeline as pipeline

    drawn = []
    monkeypatch.setattr(pipeline, "sinc_kernel", lambda size, cutoff: drawn.append((size, cutoff)))
    source = rng()
    for _ in range(600):
        RandomBlur(sinc_prob=1.0).draw_kernel(source)
    lowest = {size: min(cutoff for other, cutoff in drawn if other == size) for size, _ in drawn}
    assert lowest.keys() == set(range(7, 22, 2))
    for size, cutoff in lowest.items():
        wanted = np.pi / 3 if size < 13 else np.pi / 5
        assert wanted <= cutoff < 1.25 * wanted


def test_the_second_resize_is_of_the_small_picture(steps):
    picture, sides = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    for seed in range(100):
        steps.clear()
        Degradation()(picture, rng(seed))
        sides.append([step[1][0] for step in steps if step[0] == "resample"][1])
    assert min(sides) < 11 and max(sides) > 17 and all(9 <= side <= 19 for side in sides)  # 0.6 to 1.2 of 16


def test_bicubic_rounds_the_small_picture_too():
    def resized(picture, side):
        size = {"size": (side, side), "mode": "bicubic", "align_corners": False, "antialias": True}
        out = torch.nn.functional.interpolate(picture[None], **size)[0].clamp(0, 1)
        return (out * 255).round() / 255

    assert torch.equal(BicubicDegradation()(photo()), resized(resized(photo(), 16), 64))


def test_telephones_sharpen_before_the_last_jpeg_and_others_draw_nothing_for_it(monkeypatch):
    amounts = []
    monkeypatch.setattr(pipeline, "sharpen", lambda img, amount, sigma: amounts.append((amount, sigma)) or img)
    plain, telephone = Degradation(), Degradation(sharpen_prob=0.5)
    spoiled = [telephone(photo(), rng(seed)) for seed in range(40)]
    assert 10 < len(amounts) < 30 and all(0.3 <= a <= 1.2 and 0.6 <= s <= 1.5 for a, s in amounts)
    same = [seed for seed in range(40) if torch.equal(spoiled[seed], plain(photo(), rng(seed)))]
    assert len(same) < 40
    amounts.clear()
    Degradation(sharpen_prob=0.0)(photo(), rng(0))
    assert not amounts


def test_one_of_several_degradations_as_often_as_asked():
    one_of = OneOf({name: lambda hq, rng, name=name: hq * 0 + len(name) for name in ("a", "bb")}, {"bb": 3, "a": 1})
    taken = [one_of(photo(4, 4), rng(seed)).mean().item() for seed in range(200)]
    assert {*taken} == {1.0, 2.0} and 135 <= taken.count(2.0) <= 165


def test_the_preset_of_two_cameras_spoils_as_one_of_them_would(compose):
    presets = (compose("train", f"degradation={name}") for name in ("telephone_camera", "telephone", "camera"))
    mixed, *single = (instantiate(cfg.degradation) for cfg in presets)
    for seed in range(4):
        spoiled, drawn = mixed(photo(), rng(seed)), rng(seed)
        drawn.choice(2, p=[0.6, 0.4])
        state = drawn.bit_generator.state
        options = []
        for degrade in single:
            drawn.bit_generator.state = state
            options.append(degrade(photo(), drawn))
        assert any(torch.equal(spoiled, option) for option in options)
