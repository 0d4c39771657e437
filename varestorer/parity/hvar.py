"""Comparison of hierarchical tokens, preference loss and position tables with golden tensors (H-VAR).

The authors published no code: the tensors are those of one reading of the paper, computed by an independent
implementation on VAR's autoencoder. A folder holds `hit.json`, `hit.io.safetensors` and `hit_vae.weights.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from varestorer.losses.pixel import mse_loss
from varestorer.losses.tokens import log_likelihood, preference_loss
from varestorer.parity.golden import Check, GoldenFolder, image, largest_error, open_tokenizer
from varestorer.systems.hvar import enlarged_grid
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenPyramid
from varestorer.tokenizer.quantizer import MultiScaleQuantizer, resize_bilinear, to_map, to_tokens
from varestorer.transformer.heads import CodeHead
from varestorer.transformer.layout import LearnedPositions, PositionRule, pyramid_layout

FLOAT_TOLERANCE = 1e-4
SUM_TOLERANCE = 1e-3
"""Of log likelihoods summed over hundreds of tokens, and of the losses that multiply them."""


class HierarchyFolder(GoldenFolder):
    """A folder of golden tensors, and the tokenizer in it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.config: dict[str, Any] = self.json("hit")["config"]
        self.io = self.tensors("hit.io")
        sides = self.config["levels"]
        self.schedule = ScaleSchedule.build(sides=sides, targets=self.config["group_ends"])
        self.plain = ScaleSchedule.build(sides=sides)

    def tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer with the folder's weights."""
        return open_tokenizer(self.folder / "hit_vae.weights.safetensors").requires_grad_(False)

    def indices(self, name: str) -> list[Tensor]:
        """Golden tokens of all levels as maps."""
        pairs = enumerate(self.schedule.scales)
        return [to_map(self.io[f"{name}/idx_{k}"], scale) for k, scale in pairs]

    def check(self, name: str, ours: Tensor, tolerance: float = FLOAT_TOLERANCE) -> Check:
        """One golden tensor against ours."""
        return Check(f"hit/{name}", largest_error(ours, self.io[name]), tolerance)

    def check_indices(self, name: str, indices: Sequence[Tensor]) -> Iterator[Check]:
        """The tokens of all levels, which must be equal."""
        for k, ours in enumerate(indices):
            yield self.check(f"{name}/idx_{k}", to_tokens(ours), 0.0)


def compare(folder: str | Path) -> Iterator[Check]:
    """Every golden tensor of a folder, compared one after the other."""
    golden = HierarchyFolder(folder)
    tokenizer = golden.tokenizer()
    pixels = image(golden.io["hr_u8"])
    features = [tokenizer.features(reduced) for reduced in tokenizer.reduced(pixels, golden.schedule)]
    for n, reduced in enumerate(tokenizer.reduced(pixels, golden.schedule)):
        yield golden.check(f"Z_{n}", features[n])
        crop = golden.io[f"resized_{n}_crop"].shape
        yield golden.check(f"resized_{n}_crop", reduced[..., : crop[-2], : crop[-1]])
    for reuse in ("tokens", "sum"):
        yield from _compare_reading(golden, tokenizer, reuse, features)
    yield from _compare_degraded(golden, tokenizer)
    yield from golden.check_indices("plain", tokenizer.encode(pixels, golden.plain).indices)
    yield from _compare_losses(golden, tokenizer, features)
    for name, value in _preference(golden).items():
        tolerance = SUM_TOLERANCE if "sum" in name else FLOAT_TOLERANCE
        yield golden.check(name, value, 1e-6 if "rows" in name else tolerance)
    yield from _compare_positions(golden)


def _compare_reading(
    golden: HierarchyFolder, tokenizer: MultiScaleTokenizer, reuse: str, features: Sequence[Tensor]
) -> Iterator[Check]:
    given, config, schedule = tokenizer.quantizer, tokenizer.config, golden.schedule
    quantizer = MultiScaleQuantizer(given.codebook, config.enlarge, config.shrink, given.phi, reuse)
    pyramid: TokenPyramid = quantizer(features, schedule)
    yield from golden.check_indices(reuse, pyramid.indices)
    starts = [k for k in range(len(schedule)) if k == 0 or schedule.ends_target(k - 1)]  # of the targets
    for n, first in enumerate(starts):
        yield golden.check(f"{reuse}/residual_start_{n}", features[n] - pyramid.bases[first])
    yield golden.check(f"{reuse}/inputs", pyramid.inputs())
    for n, codes in enumerate(quantizer.targets_to_codes(golden.indices(reuse), schedule)):
        yield golden.check(f"{reuse}/f_hat_{n}", codes)
        decoded = tokenizer.decoder(tokenizer.post_quant_conv(codes))
        wanted = golden.io[f"{reuse}/image_{n}"]
        first = (decoded.shape[-1] - wanted.shape[-1]) // 2  # of the largest the middle alone is kept
        place = slice(first, first + wanted.shape[-1])
        yield golden.check(f"{reuse}/image_{n}", decoded[..., place, place])


def _compare_degraded(golden: HierarchyFolder, tokenizer: MultiScaleTokenizer) -> Iterator[Check]:
    """The degraded image's own tokens, which the preference rejects, and the prefix."""
    side = golden.schedule.latent_size[0] * tokenizer.stride
    enlarged = resize_bilinear(image(golden.io["lr_u8"]), (side, side))
    crop = golden.io["lr_up_crop"].shape
    yield golden.check("lr_up_crop", enlarged[..., : crop[-2], : crop[-1]])
    yield golden.check("lr/prefix_features", tokenizer.features(enlarged))
    indices = tokenizer.encode(enlarged, golden.schedule).indices
    yield from golden.check_indices("lr", indices)
    pairs = zip(indices, golden.indices("tokens"), strict=True)
    shares = torch.stack([(ours == other).float().mean() for ours, other in pairs])
    yield golden.check("lr/equal_share_per_level", shares)


def _compare_losses(
    golden: HierarchyFolder, tokenizer: MultiScaleTokenizer, features: Sequence[Tensor]
) -> Iterator[Check]:
    images = tokenizer.reduced(image(golden.io["hr_u8"]), golden.schedule)
    pyramid = tokenizer.quantizer(features, golden.schedule)
    sums = tokenizer.quantizer.targets_to_codes(pyramid.indices, golden.schedule)
    for name, latents in (("quantised", sums), ("continuous", features)):
        pairs = zip(latents, images, strict=True)
        losses = [mse_loss(tokenizer.decoder(tokenizer.post_quant_conv(x)), wanted) for x, wanted in pairs]
        yield golden.check(f"loss/pixel_{name}", torch.stack(losses))
    per_level = tokenizer.quantizer.codebook_losses(features, pyramid, golden.schedule)
    yield golden.check("loss/codebook_per_level", per_level)


@torch.inference_mode(False)
@torch.enable_grad()
def _preference(golden: HierarchyFolder) -> dict[str, Tensor]:
    """Likelihoods, preference losses, their total with the cross entropy, and its gradients."""
    head, beta = CodeHead(1, golden.config["vae"]["vocab_size"]), golden.config["beta"]
    logits = {name: golden.io[f"dpo/logits_{name}"].float().clone().requires_grad_() for name in ("hr", "lr")}
    tokens = {
        name: torch.cat([to_tokens(x) for x in golden.indices(source)], dim=1).clone()
        for name, source in (("hr", "tokens"), ("lr", "lr"))
    }
    values: dict[str, Tensor] = {}
    for reduction in ("sum", "mean"):
        log_p = {name: log_likelihood(head, x, tokens[name], reduction) for name, x in logits.items()}
        values |= {f"dpo/log_p_{name}_{reduction}": value for name, value in log_p.items()}
        for name in golden.io:
            if name.startswith(f"dpo/{reduction}/beta_"):
                values[name] = preference_loss(log_p["hr"], log_p["lr"], float(name.rpartition("_")[2]))
    cross_entropy = head.cross_entropy(logits["hr"], tokens["hr"]).mean()
    total = cross_entropy + preference_loss(log_p["hr"], log_p["lr"], beta).mean()
    gradients = torch.autograd.grad(total, [*logits.values()])
    values |= {"dpo/ce": cross_entropy[None], f"dpo/total_beta_{beta}": total[None]}
    values |= {f"dpo/grad_logits_{name}_rows": x[:, ::17] for name, x in zip(logits, gradients, strict=True)}
    values["dpo/grad_norms"] = torch.stack([gradient.norm() for gradient in gradients])
    return {name: value.detach() for name, value in values.items()}


def _compare_positions(golden: HierarchyFolder) -> Iterator[Check]:
    table = golden.io["positions/table"]
    rows = rearrange(table, "1 c h w -> 1 (h w) c")
    rule = PositionRule("grid", rows.shape[-1], table.shape[-1])
    layout = pyramid_layout(golden.schedule, rule, torch.device("cpu"))
    for name, reduction in (("tokens", "area"), ("tokens_bilinear", "bilinear")):
        positions = LearnedPositions(rows.shape[1], rows.shape[2], is_grid=True, reduction=reduction)
        positions.load_state_dict({"table": rows})
        yield golden.check(f"positions/{name}", positions(layout)[None])
    wanted = golden.io["positions/from_var_32x32"]
    enlarged = enlarged_grid(golden.io["positions/var_16x16"], wanted.shape[-1])
    yield golden.check("positions/from_var_32x32", rearrange(enlarged, "1 (h w) c -> 1 c h w", h=wanted.shape[-1]))
