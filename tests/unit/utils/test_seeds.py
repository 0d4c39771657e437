import random

import numpy as np
import torch

from varestorer.utils.seeds import derive_seed, isolated_rng, numpy_generator, torch_generator, uniform_per_sample


def test_derived_seeds_are_frozen_across_machines():
    assert derive_seed(0) == 6844898170297354959
    assert derive_seed(7, "crop", 12) == 8613315740309799000


def test_every_key_and_its_type_count():
    seeds = [(0, "a", "b"), (0, "ab"), (0, "a", 1), (0, "a", "1"), (1, "a", "b"), (0, "b", "a"), (-1,), (0,)]
    assert len({derive_seed(*keys) for keys in seeds}) == len(seeds)
    assert all(0 <= derive_seed(*keys) < 2**63 for keys in seeds)


def test_a_name_that_is_not_utf8_has_a_seed_of_its_own():
    assert len({derive_seed(0, name) for name in ("Mu\udcf1oz", "Muñoz", "Mu\udcf2oz")}) == 3


def test_numpy_integers_are_integers():
    assert derive_seed(3, np.int64(5)) == derive_seed(3, 5)


def test_generators_repeat_and_leave_the_global_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(3, generator=torch_generator(1, "x")), numpy_generator(1, "x").random(3)
    again = torch.rand(3, generator=torch_generator(1, "x")), numpy_generator(1, "x").random(3)
    assert torch.equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert torch.equal(before, torch.get_rng_state())


def test_a_row_depends_on_its_own_key_only():
    together = uniform_per_sample((4, 5), 3, [10, 11, 12], "bits")
    alone = uniform_per_sample((4, 5), 3, torch.tensor([12]), "bits")
    assert together.shape == (3, 4, 5) and together.dtype == torch.float32
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, uniform_per_sample((4, 5), 3, [12], "other"))
    assert not torch.equal(alone, uniform_per_sample((4, 5), 4, [12], "bits"))


def test_uniform_numbers_are_uniform():
    draws = uniform_per_sample((20000,), 0, [0], "bits")
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.003


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_isolated_rng_seeds_inside_and_restores_outside() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    wanted = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with isolated_rng(5):
        first = draw()
    assert draw() == wanted
    with isolated_rng(5):
        assert draw() == first
    with isolated_rng(6):
        assert draw() != first
