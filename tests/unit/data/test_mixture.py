"""Several data sets as one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from varestorer.data import BicubicDegradation, Degradation, Mixture, PairedCrops, PhotoCrops, build_loader
from varestorer.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


class Counted:
    """A source whose samples say where they come from."""

    crop = 8

    def __init__(self, name, texts=None):
        self.name, self.texts = name, texts

    def __len__(self):
        return 10

    def __getitem__(self, n):
        picture = torch.full((3, 8, 8), n / 1e5)
        sample = {"hq": picture, "lq": picture, "name": f"{self.name}{n}", "key": n}
        return sample if self.texts is None else {**sample, "text": torch.ones(1, 2)}


def mixture(seed=0, **weights):
    return Mixture({name: Counted(name) for name in weights}, weights, 8, seed)


@pytest.fixture
def folders(tmp_path):
    for side, size in (("photos", 48), ("pairs/hr", 48), ("pairs/lr", 12)):
        (tmp_path / side).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{number}.png")
    return tmp_path


def test_every_source_gets_its_share_of_every_thousand():
    data = mixture(a=6, b=3, c=1)
    for block in range(3):
        counts = Counter(data.place(n)[0] for n in range(1000 * block, 1000 * (block + 1)))
        assert counts == {0: 600, 1: 300, 2: 100}
    first = Counter(data.place(n)[0] for n in range(100))
    assert first[0] in range(45, 76)  # mixed, not one after the other


def test_every_source_goes_through_its_own_samples_in_order():
    data = mixture(a=2, b=1)
    places = [data.place(n) for n in range(3000)]
    for source in (0, 1):
        numbers = [number for which, number in places if which == source]
        assert numbers == list(range(len(numbers)))


def test_samples_are_functions_of_their_number():
    names = [mixture(a=2, b=1)[n]["name"] for n in range(2100)]
    again = mixture(a=2, b=1)
    assert [again[n]["name"] for n in reversed(range(0, 2100, 7))] == names[::7][::-1]
    assert names != [mixture(seed=1, a=2, b=1)[n]["name"] for n in range(2100)]
    assert [sample["key"] for sample in (again[5], again[1005])] == [5, 1005]


def test_batches_do_not_depend_on_workers_and_start():
    data = mixture(a=2, b=1)
    whole = [batch["name"] for batch, _ in zip(build_loader(data, 4), range(6), strict=False)]
    loader = build_loader(data, 4, start_sample=8, num_workers=2)
    assert [batch["name"] for batch, _ in zip(loader, range(4), strict=False)] == whole[2:]


def test_shares_that_do_not_divide_add_up():
    assert sorted(mixture(a=1, b=1, c=1).shares) == [333, 333, 334]
    assert mixture(a=0.9985, b=0.0015).shares in ([998, 2], [999, 1])


def test_text_of_some_sources_is_null_text_for_the_others():
    data = Mixture({"a": Counted("a", texts=[1]), "b": Counted("b")}, {"a": 1, "b": 1}, 8, 0)
    found = {data[n]["name"][0]: data[n]["text"] for n in range(20)}
    assert found["b"] is None and torch.equal(found["a"], torch.ones(1, 2))
    assert "text" not in mixture(a=1, b=1)[0]


def test_real_pairs_and_photographs_mix(folders):
    photos = PhotoCrops(str(folders / "photos"), 16, Degradation(), 0)
    pairs = PairedCrops(str(folders / "pairs"), 16, 0)
    data = Mixture({"photos": photos, "pairs": pairs}, {"photos": 1, "pairs": 1}, 16, 0)
    batch = next(iter(build_loader(data, 8)))
    which = [data.place(n)[0] for n in range(8)]
    assert set(which) == {0, 1} and len(data) == 6
    for row in range(8):
        assert not torch.equal(batch["lq"][row], batch["hq"][row])
        assert all(torch.equal(batch[side][row], data[row][side]) for side in ("hq", "lq"))


@pytest.mark.parametrize("weights", [{}, {"a": 1}, {"a": 1, "b": 0}, {"a": 1, "c": 1}])
def test_weights_that_cannot_be(weights):
    with pytest.raises(UserError, match="data.weights must hold a positive number for each of a, b"):
        Mixture({"a": Counted("a"), "b": Counted("b")}, weights, 8, 0)


def test_other_impossible_mixtures():
    with pytest.raises(UserError, match="below one in 1000"):
        mixture(a=1, b=1e-5)
    with pytest.raises(UserError, match="data.sources.a.crop is 8, but data.crop is 16"):
        Mixture({"a": Counted("a")}, {"a": 1}, 16, 0)


def test_config_builds_a_mixture(folders):
    config = OmegaConf.create({"seed": 4, "data": OmegaConf.load(CONFIGS / "data" / "mixture.yaml")})
    config.degradation = {"_target_": "varestorer.data.BicubicDegradation"}
    config.data.crop = 16
    config.data.sources.photos.root, config.data.sources.pairs.root = str(folders / "photos"), str(folders / "pairs")
    data = instantiate(config.data)
    assert data.shares == [900, 100] and data.sources[0].degradation == BicubicDegradation()
    assert data[0]["hq"].shape == (3, 16, 16) and data.sources[1].seed == 4
