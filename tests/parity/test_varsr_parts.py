"""The parts of VAR and VARSR against golden tensors of the published networks, each for itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from varsr_parts import Golden, Tokenizer, golden_folder, next_inputs

from varestorer.conditioning.prefix_encoder import PrefixEncoder
from varestorer.systems.official_varsr import blend_latents, enlarged_size, resized, restore_tiled, tile_weights
from varestorer.tokenizer.quantizers import vq_losses
from varestorer.tokenizer.residual import phi_index
from varestorer.transformer.diffusion import DiffusionChain, chain
from varestorer.transformer.heads import CodeHead, keep_top_k, keep_top_p
from varestorer.transformer.refiner import DATA_SCALE, Refiner, TrainingDraws, time_features
from varestorer.utils.color import match_color, match_color_8bit
from varestorer.utils.images import from_network, to_uint8
from varestorer.weights.published_varsr import published_varsr_name, published_vqvae_name, varsr_sizes

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return golden_folder(shared)


def part(golden: Golden, stem: str, network: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """The network with its part of a transformer's golden weights."""
    tensors = golden.weights(stem)
    names = {name: published_varsr_name(f"{prefix}.{name}") for name in network.state_dict()}
    network.load_state_dict({name: tensors[published] for name, published in names.items()})
    return network.eval()


def refiner(golden: Golden, stem: str) -> Refiner:
    sizes = varsr_sizes(golden.weights(stem))
    network = Refiner(sizes["code_width"], sizes["width"], sizes["refiner_width"], sizes["refiner_depth"])
    return part(golden, stem, network, "refiner")


def near(result: Tensor, wanted: Tensor, atol: float) -> None:
    torch.testing.assert_close(result, wanted.to(result.dtype), atol=atol, rtol=0)


@torch.no_grad()
def test_encoder_and_decoder_with_attention(golden: Golden) -> None:
    tokenizer, io = Tokenizer.golden(golden, "vae"), golden.io("var_vae")
    near(tokenizer.encoder(io["image"]), io["encoder_out"], 1e-5)
    near(tokenizer.features(io["image"]), io["f"], 1e-5)
    near(tokenizer.decode(io["f_hat_final"]), io["decoder_raw"], 2e-5)
    near(tokenizer.decode(io["f_hat_0"]).clamp(-1, 1), io["recon_scale0"], 1e-5)
    io = golden.io("varsr_vae")
    near(tokenizer.decode(io["f_hat_5"]), io["decoder_raw_discrete"], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("stem", "phi_at_last"), [("var_vae", True), ("varsr_vae", False)])
def test_codes_sums_and_next_inputs(golden: Golden, stem: str, phi_at_last: bool) -> None:
    tokenizer, io = Tokenizer.golden(golden, "vae"), golden.io(stem)
    sides = golden.json(stem)["config"]["patch_nums"]
    quantized = tokenizer.quantize(io["f"], sides, phi_at_last)
    for k, numbers in enumerate(quantized.indices):
        assert torch.equal(numbers.flatten(1), io[f"idx_{k}"])
    for k, total in enumerate(quantized.cumulative):
        if f"f_hat_{k}" in io:
            near(total, io[f"f_hat_{k}"], 1e-5)
    near(next_inputs(quantized.cumulative, sides), io["next_scale_inputs"], 1e-5)
    if not phi_at_last:
        near(rearrange(quantized.residual, "b z h w -> b (h w) z"), io["continuous_residual"], 1e-5)
    else:
        near(vq_losses(io["f"], quantized.cumulative).mean()[None], io["vq_train_loss"], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("stem", "weights"), [("isr10", "vae32"), ("isr12", "vae32_12")])
def test_codes_of_the_published_schedules(golden: Golden, stem: str, weights: str) -> None:
    tokenizer, io = Tokenizer.golden(golden, weights), golden.io(stem)
    sides = golden.json(stem)["config"]["patch_nums"]
    if "hr_u8" in io:
        image = rearrange(io["hr_u8"], "b h w c -> b c h w").float() / 255 * 2 - 1
        near(tokenizer.features(image), io["f"], 5e-5)
    quantized = tokenizer.quantize(io["f"], sides, phi_at_last=False)
    for k, numbers in enumerate(quantized.indices):
        assert torch.equal(numbers.flatten(1), io[f"idx_{k}"])
    near(next_inputs(quantized.cumulative, sides), io["x_BLCv_wo_first_l"], 1e-5)


def test_phi_takes_the_published_convolutions(golden: Golden) -> None:
    for num_scales, wanted in golden.json("misc")["phi_index"].items():
        assert [phi_index(k, int(num_scales)) for k in range(int(num_scales))] == wanted


def test_vq_training_loss_and_its_gradients(golden: Golden) -> None:
    tokenizer, io = Tokenizer.golden(golden, "vq_train"), golden.io("vq_train")
    sides = golden.json("vq_train")["config"]["patch_nums"]
    features = io["f"].clone().requires_grad_()
    quantized = tokenizer.quantize(features, sides, phi_at_last=True)
    for k, numbers in enumerate(quantized.indices):
        assert torch.equal(numbers.flatten(1), io[f"idx_{k}"])
    terms = vq_losses(features, quantized.cumulative)
    near(terms, 1.25 * io["mse_per_scale"], 1e-6)
    near(terms.mean()[None], io["vq_loss"], 1e-6)
    terms.mean().backward()
    near(features.grad, io["vq_only/grad_f"], 1e-7)
    near(tokenizer.quantizer.quantiser.entries.grad, io["vq_only/grad/quantize.embedding.weight"], 1e-6)
    for number, conv in enumerate(tokenizer.quantizer.phi.convs):
        name = f"vq_only/grad/quantize.quant_resi.qresi_ls.{number}"
        near(conv.weight.grad, io[f"{name}.weight"], 1e-6)
        near(conv.bias.grad, io[f"{name}.bias"], 1e-6)


def test_gradients_of_the_whole_autoencoder(golden: Golden) -> None:
    tokenizer, io = Tokenizer.golden(golden, "vq_train"), golden.io("vq_train")
    image = rearrange(io["hr_u8"], "b h w c -> b c h w").float() / 255 * 2 - 1
    features = tokenizer.features(image)
    quantized = tokenizer.quantize(features, golden.json("vq_train")["config"]["patch_nums"], phi_at_last=True)
    straight = features + (quantized.cumulative[-1] - features).detach()
    near(straight, io["f_hat_straight_through"], 1e-5)
    output = tokenizer.decode(straight)
    l2, l1 = F.mse_loss(output, image), F.l1_loss(output, image)
    near(torch.stack([l2, l1]), torch.cat([io["l2"], io["l1"]]), 1e-6)
    loss = l2 + 0.2 * l1 + vq_losses(features, quantized.cumulative).mean()
    near(loss[None], io["loss"], 1e-6)
    loss.backward()
    gradients = {published_vqvae_name(name, 5): p.grad for name, p in tokenizer.named_parameters()}
    order = golden.json("vq_train")["parameter_order"]
    norms = torch.stack([gradients[name].norm() for name in order])
    torch.testing.assert_close(norms, io["grad_norms"], atol=1e-6, rtol=1e-4)
    for name, wanted in io.items():
        if name.startswith("grad/"):
            near(gradients[name.removeprefix("grad/")], wanted, 1e-4 * float(wanted.abs().max()) + 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["varsr", "isr10", "isr12"])
def test_prefix_tokens(golden: Golden, stem: str) -> None:
    sizes, io = varsr_sizes(golden.weights(stem)), golden.io(stem)
    encoder = part(golden, stem, PrefixEncoder(sizes["width"], sizes["prefix_channels"]), "prefix_encoder")
    image = io["lr"] if "lr" in io else rearrange(io["lr_u8"], "b h w c -> b c h w").float() / 255 * 2 - 1
    near(encoder(image), io["prefix_tokens"], 1e-5 * max(1.0, float(io["prefix_tokens"].abs().max())))


@pytest.mark.parametrize("num_kept", [2, 3, 4, 5, 10, 20, 21, 25, 50, 100, 250, 1000])
def test_diffusion_tables(golden: Golden, num_kept: int) -> None:
    io, tables = golden.io("misc"), DiffusionChain(num_kept)
    assert torch.equal(tables.timesteps, io[f"diffusion_{num_kept}/timesteps"])
    for name, wanted in io.items():
        if name.startswith(f"diffusion_{num_kept}/") and not name.endswith("timesteps"):
            torch.testing.assert_close(getattr(tables, name.split("/")[1]), wanted, atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_refiner_alone(golden: Golden) -> None:
    network, io = refiner(golden, "varsr"), golden.io("varsr")
    near(chain().betas, io["sched_betas_train"], 1e-12)
    near(time_features(io["ref_t"]), io["ref_temb_raw"], 1e-6)
    x0 = io["ref_target"] / DATA_SCALE
    x = chain().noised(x0, io["ref_t"], io["ref_noise"])
    near(x, io["ref_x_t"], 1e-6)
    output = network(x, io["ref_t"], io["ref_z"])
    losses = chain().loss(output, x0, x, io["ref_t"], io["ref_noise"])
    near(losses.mse, io["ref_loss_mse"], 1e-5)
    torch.testing.assert_close(losses.vlb, io["ref_loss_vb"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total, io["ref_loss"], atol=1e-5, rtol=1e-5)
    near(network(io["ref_x"], io["ref_t"], io["ref_z"]), io["ref_net_out"], 1e-5)


@torch.no_grad()
def test_training_loss_of_the_refiner(golden: Golden) -> None:
    network, io = refiner(golden, "varsr"), golden.io("varsr")
    losses = network.loss(
        io["refiner_z"], io["refiner_target_unscaled"], TrainingDraws(io["train_t"], io["train_noise"])
    )
    near(losses.total.mean()[None], io["diff_loss"], 1e-5)


def recorded(start: Tensor, steps: Tensor):  # noqa: ANN201
    return lambda draw, shape: (start if draw == 0 else steps[draw - 1]).view(shape)


@torch.no_grad()
def test_guided_samples(golden: Golden) -> None:
    network, io = refiner(golden, "varsr"), golden.io("varsr")
    positive, negative = io["ref_z"].chunk(2)
    noise = recorded(io["refsample_init_half"], io["refsample_step_noise"][:, :6])
    near(network.sample(positive, noise, negative, 6.0).check(), io["refsample_out"][:6], 1e-4)
    positive, negative = io["infer_z"].chunk(2)
    noise = recorded(io["infer_init_noise_half"], io["infer_step_noise"][:, :128])
    near(network.sample(positive, noise, negative, 6.0).check(), io["infer_refiner_out"][:128], 1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "guidance", "temperature"),
    [("cfg_0.0", 0.0, 1.0), ("cfg_2.5", 2.5, 1.0), ("temperature_0.5", 2.5, 0.5), ("cfg_1.0", 1.0, 1.0)],
)
def test_guidance_and_temperature(golden: Golden, case: str, guidance: float, temperature: float) -> None:
    network, io = refiner(golden, "isr10"), golden.io("misc")
    start, steps, out = (io[f"refiner/{case}/{name}"] for name in ("init", "steps", "out"))
    positive, negative = io["refiner/z"].chunk(2)
    sampled = network.sample(
        positive, recorded(start[:5], steps[:, :5]), negative, guidance, temperature=temperature
    ).check()
    near(sampled, out[:5], 1e-4)
    if guidance == 1.0:  # the released code goes on without guidance: twice as many samples, each for itself
        near(network.sample(io["refiner/z"], recorded(start, steps)).check(), out, 1e-4)


@torch.no_grad()
def test_samples_at_the_published_size(golden: Golden) -> None:
    network, io = refiner(golden, "isr10"), golden.io("isr10")
    positive, negative = io["infer_z"].chunk(2)
    noise = recorded(io["infer_init_noise_half"], io["infer_step_noise_half"])
    near(network.sample(positive, noise, negative, 6.0).check(), io["infer_refiner_out"], 1e-3)
    last = io["infer_f_hat_discrete"] + rearrange(io["infer_refiner_out"], "(h w) z -> 1 z h w", h=32)
    near(last, io["infer_f_hat_final"], 1e-6)


def test_filters(golden: Golden) -> None:
    io, misc = golden.io("var"), golden.io("misc")
    for name, (top_k, top_p) in {"a": (5, 0.0), "b": (0, 0.75), "c": (20, 0.9), "d": (1, 0.75)}.items():
        assert torch.equal(keep_top_p(keep_top_k(io["filter_in"], top_k), top_p), io[f"filter_{name}"])
    cases = [name.removeprefix("filter/kept_") for name in misc if name.startswith("filter/kept_")]
    assert len(cases) == 6
    for case in cases:
        top_k, top_p = int(case.split("_")[2]), float(case.split("_")[5])
        kept = keep_top_p(keep_top_k(misc["filter/in"], top_k), top_p)
        assert torch.equal(kept.isfinite().sum(dim=-1), misc[f"filter/kept_{case}"])
        assert torch.equal(kept.sort(dim=-1).values, misc[f"filter/sorted_{case}"])


def test_filters_of_the_class_model(golden: Golden) -> None:
    io, config = golden.io("c2i12"), golden.json("c2i12")["config"]
    probabilities = []
    is_safe = io["infer_is_safe"].bool().split([side**2 for side in config["patch_nums"]], dim=1)
    for k, safe in enumerate(is_safe):
        kept = keep_top_p(keep_top_k(io[f"infer_logits_{k}"], config["top_k"]), config["top_p"])
        assert torch.equal(kept.isfinite().sum(dim=-1)[safe], io[f"infer_kept_{k}"][safe])
        probabilities.append(kept.softmax(dim=-1).gather(-1, io[f"infer_idx_{k}"][..., None])[..., 0])
    safe = torch.cat(is_safe, dim=1)
    near(torch.cat(probabilities, dim=1)[safe], io["infer_probability_of_index"][safe], 1e-5)


@pytest.mark.parametrize("stem", ["isr10", "isr12"])
def test_cross_entropy_and_accuracy(golden: Golden, stem: str) -> None:
    io, sides = golden.io(stem), golden.json(stem)["config"]["patch_nums"]
    labels = torch.cat([io[f"idx_{k}"] for k in range(len(sides))], dim=1)
    head = CodeHead(1, io["logits"].shape[-1])
    losses = head.cross_entropy(io["logits"], labels)
    near(losses.mean()[None], io["ce_loss"], 1e-5)
    near(torch.stack([part.mean() for part in losses.split([s**2 for s in sides], dim=1)]), io["ce_per_scale"], 1e-5)
    assert head.accuracy(io["logits"], labels).mean().item() == pytest.approx(io["accuracy"].item(), rel=1e-5)


def test_colors(golden: Golden) -> None:
    io, misc = golden.io("colorfix"), golden.io("misc")
    for method in ("adain", "wavelet"):
        near(match_color(io["target"], io["source"], method), io[method].clamp(0, 1), 1e-6)
        for k in (0, 1):
            target, source, wanted = (misc[f"color_{k}/{name}_u8"] for name in ("target", "source", method))
            assert (match_color_8bit(target.numpy(), source.numpy(), method) == wanted.numpy()).all()


def test_resizes(golden: Golden) -> None:
    misc = golden.io("misc")
    for k in range(3):
        given, wanted = misc[f"resize_{k}/in_u8"].numpy(), misc[f"resize_{k}/out_u8"].numpy()
        assert (resized(given, wanted.shape[:2]) == wanted).all()


@torch.no_grad()
def test_tiles(golden: Golden) -> None:
    io, meta = golden.io("tiles"), golden.json("tiles")
    tokenizer, latents, kept = Tokenizer.golden(golden, "vae32"), iter(io["tile_f_hat"].split(2)), {}
    torch.testing.assert_close(tile_weights(), io["tile_weight"], atol=0, rtol=1e-12)
    near(blend_latents(io["tile_f_hat"], meta["rows"], meta["columns"]), io["blended_f_hat"], 1e-6)
    assert enlarged_size(130, 150) == tuple(meta["enlarged_size_wh"][::-1])

    def encode(tiles: Tensor) -> Tensor:
        kept.setdefault("first", tiles)
        return next(latents)

    def decode(codes: Tensor) -> Tensor:
        kept["image"] = tokenizer.decode(codes).clamp(-1, 1)
        return kept["image"]

    restored = torch.from_numpy(restore_tiled(io["lr_u8"].numpy(), encode, decode))
    enlarged = rearrange(((kept["first"][0] + 1) * 127.5).round().byte(), "c h w -> h w c")
    assert torch.equal(enlarged[300:428, 300:428], io["enlarged_u8_crop"])
    near((kept["image"][..., 370:434, 370:434] + 1) / 2, io["image_crop"], 1e-4)
    large = resized(to_uint8(from_network(kept["image"]))[0].permute(1, 2, 0).contiguous().numpy(), (520, 600))
    assert torch.equal(torch.from_numpy(large)[100:164, 100:164], io["resized_u8_crop"])
    assert restored.shape == (520, 600, 3)
    assert torch.equal(restored[100:164, 100:164], io["final_u8_crop"])
    pixels = restored.double().flatten(0, 1)
    near(torch.stack([pixels.mean(dim=0), pixels.std(dim=0)]), io["final_u8_mean_std"], 2e-3)


def test_residuals_are_scaled_as_published(golden: Golden) -> None:
    assert DATA_SCALE == golden.json("varsr")["config"]["refiner_vae_scale"]
