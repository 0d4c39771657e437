"""Small files in the published form: the schedule and the stride of the release, few channels and blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from varestorer.conditioning.restorer import Restorer
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.utils.seeds import torch_generator
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE, TRANSFORMER_FILE, to_published
from varestorer.weights.published.infinity import part_tensors
from varestorer.weights.published.varsr import (
    LEVELS,
    MASK,
    USAGE,
    VQVAE,
    derived_tensor,
    published_varsr_name,
    published_vqvae_name,
    sequence_levels,
)

TOKENIZER = {
    "channels": 32,
    "multipliers": [1, 1, 1, 1, 1],
    "latent_width": 8,
    "num_encoder_blocks": 1,
    "num_decoder_blocks": 1,
}
TRANSFORMER = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "latent_width": 8,
    "text_width": 16,
    "text_length": 3,
    "num_levels": 15,
}
VARSR_SIZES = {
    "schedule": {"sides": [1, 2]},
    "tokenizer": {"channels": 32, "multipliers": [1, 1], "latent_width": 4, "vocabulary": 5} | VQVAE,
    "transformer": {"width": 8, "depth": 1, "num_heads": 2},
    "prefix": {"channels": [2, 3]},
    "refiner": {"width": 4, "depth": 1},
}


def small_restorer() -> Restorer:
    """A SwinIR of the published form: unshuffle by 8, three doublings, window 8."""
    from spandrel.architectures.SwinIR import SwinIR

    size = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2.0}
    return Restorer(SwinIR(**size, window_size=8, upscale=8, upsampler="nearest+conv", start_unshuffle=8))


def small_system(rank: int) -> VARestorer:
    """A system of random weights, none of them idle."""
    system = VARestorer({"size": "0.25M"}, TOKENIZER, TRANSFORMER, {"lora_rank": rank})
    generator = torch_generator(rank, "published")
    with torch.no_grad():
        for parameter in system.transformer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return system


def write_release(folder: Path) -> Path:
    """Write teacher, student, tokenizer and restorer as they are published; returns the student's file."""
    folder.mkdir(parents=True, exist_ok=True)
    student, teacher = small_system(4), small_system(0)
    torch.save({"vae": part_tensors(student, "tokenizer"), "step": 3}, folder / TOKENIZER_FILE)
    torch.save(part_tensors(student, "transformer"), folder / STUDENT_FILE)
    torch.save(part_tensors(teacher, "transformer"), folder / TRANSFORMER_FILE)
    prefixed = {f"module.{name}": tensor for name, tensor in small_restorer().published_state_dict().items()}
    torch.save({"state_dict": prefixed}, folder / "general_swinir_v1.ckpt")
    return folder / STUDENT_FILE


def write_varsr(system: VARSR, folder: Path, name: str) -> Path:
    """Write a system as the authors do: training files with nested state dicts; VAR's own are flat."""
    sides, levels = [h for h, _ in system.schedule.scales], len(system.tokenizer.config.multipliers)
    network = to_published_varsr(system.network(), sides)
    image = to_published_vqvae(system.tokenizer.state_dict(), levels, len(sides))
    is_flat = name.startswith("var_")
    torch.save(network if is_flat else {"epoch": 1, "trainer": {"var_wo_ddp": network}}, folder / name)
    torch.save({"trainer": {"vae_local": image}}, folder / "VQVAE.pth")
    return folder / name


def to_published_varsr(tensors: Mapping[str, Tensor], sides: Sequence[int]) -> dict[str, Tensor]:
    """The inverse of `varsr_tensors`, with all derived tensors."""
    names = {name: published_varsr_name(name) for name in tensors}
    levels_T, width = sequence_levels(sides, tensors["start"].shape[1]), tensors["start"].shape[-1]
    biases = [name.removesuffix("v_bias") + "zero_k_bias" for name in names.values() if name.endswith(".v_bias")]
    derived = {name: derived_tensor(name, levels_T, width) for name in (LEVELS, MASK, *biases)}
    return to_published(tensors, names, {n: t for n, t in derived.items() if t is not None})


def to_published_vqvae(tensors: Mapping[str, Tensor], num_levels: int, num_scales: int) -> dict[str, Tensor]:
    """The inverse of `vqvae_tensors`; the usage of the codes, which we do not keep, is all zero."""
    published = to_published(tensors, {name: published_vqvae_name(name, num_levels) for name in tensors}, {})
    num_codes = len(published["quantize.embedding.weight"])
    return published | {USAGE: torch.zeros(num_scales, num_codes)}
