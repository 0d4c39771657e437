"""Random networks are drawn once, and their variants share what they do not change."""

from typing import Any

import pytest
import torch

from varestorer.benchmark.networks import Source, Variants, num_parameters, num_trained, without_weights
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.varestorer import VARestorer

CPU = torch.device("cpu")
C, DEPTH, RANK = 32, 2, 4  # of `tiny_system`


@pytest.fixture
def source(tiny_system: VARestorer) -> Source:
    return Source("tiny", {"_target_": "varestorer.systems.varestorer.VARestorer", **tiny_system.config})


def test_random_weights_follow_the_seed(source: Source) -> None:
    one, same = source.system(CPU).state_dict(), source.system(CPU).state_dict()
    source.seed = 1
    other = source.system(CPU).state_dict()
    assert all(torch.equal(tensor, same[name]) and tensor.isfinite().all() for name, tensor in one.items())
    assert not torch.equal(one["transformer.head.weight"], other["transformer.head.weight"])


@pytest.mark.parametrize("name", ["varestorer", "varsr", "hvar"])
def test_every_system_restores_with_random_weights(compose: Any, name: str) -> None:
    from omegaconf import OmegaConf

    words = [f"system={name}", "model=" + ("tiny" if name == "varestorer" else f"{name}_tiny")]
    model: Any = OmegaConf.to_container(compose("train", *words).model, resolve=True)
    system = Source(name, model).system(CPU, merged=True)
    assert system.restore_batch(torch.rand(1, 3, system.tile, system.tile)).images_B3HW.isfinite().all()
    named, whole = sum(num_parameters(system).values()), sum(p.numel() for p in system.parameters())
    assert named == whole if name == "varestorer" else 0.9 * whole < named < whole  # codebooks are no network


def test_variants_share_the_weights_of_their_precision(source: Source) -> None:
    names = ("eager", "merged", "bf16", "bf16+compile")
    variants = Variants(source, CPU, {name: Acceleration.parse(name) for name in names})
    systems = {name: variants.system(name) for name in names}
    held = {name: systems[name].transformer.blocks[0].ffn.fc1.weight for name in names}
    assert held["eager"].data_ptr() == held["merged"].data_ptr() and held["eager"].dtype == torch.float32
    assert held["bf16"].data_ptr() == held["bf16+compile"].data_ptr() and held["bf16"].dtype == torch.bfloat16
    assert systems["eager"].acceleration is None and systems["merged"].student_config.merged
    images = torch.rand(1, 3, systems["eager"].tile, systems["eager"].tile)
    assert torch.allclose(*(systems[name].restore_batch(images).logits for name in ("eager", "merged")), atol=1e-4)


def test_a_checkpoint_is_merged_apart_from_its_eager_twin(tiny_system: VARestorer, tmp_path: Any) -> None:
    tiny_system.save_pretrained(tmp_path)
    chosen = {name: Acceleration.parse(name) for name in ("eager", "merged")}
    variants = Variants(Source("tiny", {}, str(tmp_path)), CPU, chosen)
    images = torch.rand(1, 3, tiny_system.tile, tiny_system.tile)
    wanted = tiny_system.restore_batch(images).logits
    for name in ("merged", "eager"):
        assert torch.allclose(variants.system(name).restore_batch(images).logits, wanted, atol=1e-4)


def test_trained_parameters_are_those_of_the_adapters_merged_or_not(tiny_system: VARestorer) -> None:
    per_block = RANK * ((C + 3 * C) + (C + C) + (C + C) + (C + 2 * C) + (C + C))
    assert num_trained(tiny_system) == DEPTH * per_block
    assert num_trained(without_weights(tiny_system).merge_adapters()) == DEPTH * per_block


def test_what_trains_is_all_but_the_tokenizer_or_the_adapters_alone(compose: Any) -> None:
    from hydra.utils import instantiate

    with torch.device("meta"):
        model = compose("train", "system=varsr", "model=varsr_tiny").model
        system, student = instantiate(model), instantiate(model, student={"lora_rank": 2})
    whole = sum(p.numel() for p in system.parameters())
    assert num_trained(system) == whole - sum(p.numel() for p in system.tokenizer.parameters())
    assert num_trained(student) == sum(p.numel() for n, p in student.named_parameters() if ".lora_" in n) > 0


def test_the_published_restorer_stands_in_front_of_the_papers_sizes(source: Source) -> None:
    assert "restorer" not in source.blank(merged=True).networks
    blank = Source("2b", source.model, restorer="auto").blank(merged=True)
    assert num_parameters(blank)["restorer"] == 15_792_587 and next(iter(blank.networks)) == "restorer"
