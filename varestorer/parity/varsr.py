"""Golden tensors of VAR and VARSR: each group is compared as its name begins, see `COMPARISONS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from varestorer.parity.golden import LEAST, Check, GoldenVARSR, Group, image, kept, largest_error, open_tokenizer
from varestorer.parity.varsr_training import compare_training
from varestorer.systems.official_varsr import blend_latents, resized, tile_weights
from varestorer.systems.official_varsr import restore_tiled as restore_officially
from varestorer.systems.varsr import VARSR, Draws
from varestorer.tokenizer import MultiScaleTokenizer, TokenPyramid
from varestorer.tokenizer.quantizer import to_map, to_tokens, vq_losses
from varestorer.transformer import ClassLabels
from varestorer.transformer.diffusion import chain
from varestorer.transformer.heads import keep_top_k, keep_top_p
from varestorer.transformer.layout import BlockCausal, TokenLayout
from varestorer.transformer.refiner import DATA_SCALE, Refiner, TrainingDraws, guided, time_features
from varestorer.utils.color import match_color, match_color_8bit
from varestorer.utils.errors import UsageError
from varestorer.utils.images import from_network, to_uint8
from varestorer.weights.published.varsr import published_vqvae_name

BLOCK, LOGITS, LOSS, IMAGE, EXACT = 1e-5, 1e-4, 1e-5, 1e-3, 0.0
GRADIENT = 1e-4  # of the tensor's largest entry
FILTERS = {"a": (5, 0.0), "b": (0, 0.75), "c": (20, 0.9), "d": (1, 0.75)}


@torch.no_grad()
def compare(folder: str | Path) -> Iterator[Check]:
    """Every golden tensor of a folder; UsageError for a group of an unknown name, or missing files."""
    golden = GoldenVARSR(folder)
    for stem in golden.stems:
        begun = [name for name in COMPARISONS if stem.startswith(name)]
        if not begun:
            raise UsageError(f"fixtures={folder}: {stem}.io.safetensors is none of {', '.join(COMPARISONS)}")
        yield from COMPARISONS[max(begun, key=len)](Group(golden, stem, golden.io(stem)))


# ---- the tokenizer


def _var_tokenizer(group: Group) -> Iterator[Check]:
    """VAR's: phi at every scale."""
    io, tokenizer = group.io, open_tokenizer(group.golden.weights_file("varsr_vae", "vae"))
    features = tokenizer.features(io["image"])
    pyramid = tokenizer.quantizer(features, group.golden.schedule(group.stem))
    yield from group.near("encoder_out", tokenizer.encoder(io["image"]), BLOCK)
    yield from group.near("f", features, BLOCK)
    yield from _pyramid(group, pyramid)
    yield from group.near("f_hat_final", pyramid.codes, BLOCK)
    yield from group.near("decoder_raw", tokenizer.decoder(tokenizer.post_quant_conv(io["f_hat_final"])), IMAGE)
    yield from group.near("recon_scale0", tokenizer.decode(pyramid.cumulative[0]), IMAGE)
    yield from group.near("vq_train_fhat", pyramid.codes, BLOCK)
    yield from group.near("vq_train_loss", vq_losses(features, pyramid.cumulative).mean(), LOSS, True)


def _varsr_tokenizer(group: Group) -> Iterator[Check]:
    """VARSR's: no phi at the last scale, and what is left before it."""
    tokenizer = open_tokenizer(group.golden.weights_file(group.stem, "vae"))
    features = tokenizer.features(group.golden.io("var_vae")["image"])
    pyramid = tokenizer.quantizer(features, group.golden.schedule(group.stem), raw_last=True)
    yield from group.near("f", features, BLOCK)
    yield from _pyramid(group, pyramid)
    raw = tokenizer.decoder(tokenizer.post_quant_conv(pyramid.codes))
    yield from group.near("decoder_raw_discrete", raw, IMAGE)


def _pyramid(group: Group, pyramid: TokenPyramid) -> Iterator[Check]:
    yield from group.each("idx", pyramid.indices, EXACT)
    yield from group.each("f_hat", pyramid.cumulative, BLOCK)
    for name in ("next_scale_inputs", "x_BLCv_wo_first_l"):
        yield from group.near(name, pyramid.inputs(), BLOCK)
    yield from group.near("continuous_residual", to_tokens(pyramid.residual), BLOCK)


@torch.enable_grad()
def _tokenizer_training(group: Group) -> Iterator[Check]:
    """VQ losses, straight-through output, and their gradients."""
    io, schedule = group.io, group.golden.schedule(group.stem)
    tokenizer = open_tokenizer(group.golden.weights_file(group.stem, "own"))
    features = io["f"].clone().requires_grad_()
    pyramid = tokenizer.quantizer(features, schedule)
    terms = vq_losses(features, pyramid.cumulative)
    terms.mean().backward()
    yield from _pyramid(group, pyramid)
    yield from group.near("mse_per_scale", terms / 1.25, LOSS, True)
    yield from group.near("vq_loss", terms.mean(), LOSS, True)
    assert features.grad is not None
    yield from group.near("vq_only/grad_f", features.grad, GRADIENT, True)
    yield from _gradients(group, tokenizer, "vq_only/grad/")

    tokenizer.zero_grad()
    target = image(io["hr_u8"])
    features = tokenizer.features(target)
    yield from group.near("f", features, BLOCK)
    pyramid = tokenizer.quantizer(features, schedule)
    straight = features + (pyramid.codes - features).detach()
    output = tokenizer.decoder(tokenizer.post_quant_conv(straight))  # not clamped
    l2, l1 = F.mse_loss(output, target), F.l1_loss(output, target)
    loss = l2 + 0.2 * l1 + vq_losses(features, pyramid.cumulative).mean()
    loss.backward()
    yield from group.near("f_hat_straight_through", straight, BLOCK)
    crop = io["rec_crop"].shape[-1]
    yield from group.near("rec_crop", output[..., :crop, :crop], IMAGE)
    for name, value in {"l1": l1, "l2": l2, "loss": loss}.items():
        yield from group.near(name, value, LOSS, True)
    yield from _gradients(group, tokenizer, "grad/")
    gradients = _by_published_name(tokenizer)
    order = group.golden.json(group.stem)["parameter_order"]
    norms = torch.stack([gradients[name].norm() for name in order])
    yield from group.near("grad_norms", norms, GRADIENT, True)


def _by_published_name(tokenizer: MultiScaleTokenizer) -> dict[str, Tensor]:
    num_levels = len(tokenizer.config.multipliers)
    named = {published_vqvae_name(name, num_levels): p.grad for name, p in tokenizer.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def _gradients(group: Group, tokenizer: MultiScaleTokenizer, prefix: str) -> Iterator[Check]:
    for name, gradient in _by_published_name(tokenizer).items():
        # In a bias's gradient, a sum over all pixels, most cancels: what is left of the rounding (which differs between
        # processors) belongs to the size of the whole layer's.
        weight = group.io.get(prefix + name.removesuffix("bias") + "weight") if name.endswith(".bias") else None
        least = LEAST if weight is None else max(weight.abs().max().item(), LEAST)
        yield from group.near(prefix + name, gradient, GRADIENT, True, least)


# ---- the transformer, given the true tokens


def _forced(group: Group, system: VARSR, indices: Sequence[Tensor], lq_B3HW: Tensor | None) -> Iterator[Check]:
    """Inputs, what leaves every block, logits and losses, given the true codes of each scale as maps.

    The group has the labels of the pictures; degraded images are in [-1, 1].
    """
    io, transformer = group.io, system.transformer
    inputs_BLZ = _inputs(system, indices)
    yield from group.near("x_BLCv_wo_first_l", inputs_BLZ, BLOCK)
    labels_B = io.get("label", torch.zeros(len(inputs_BLZ), dtype=torch.int64))
    prefix = None if lq_B3HW is None else system.prefix_of(lq_B3HW)
    tokens, size = (None, None) if prefix is None else (prefix.tokens_BPC, prefix.size)
    if tokens is not None:
        scale = max(1.0, io["prefix_tokens"].abs().max().item())
        yield from group.near("prefix_tokens", tokens, BLOCK * scale)
    layout = transformer.layout(system.schedule, labels_B.device, size)
    context = transformer.context(ClassLabels(labels_B))
    blocks = {f"hidden_{number}": block for number, block in enumerate(transformer.blocks)}
    with kept(blocks, {"embed_in": transformer.blocks[0]}) as seen:
        transformer.hidden(inputs_BLZ, context, layout, BlockCausal.of(layout), prefix_BPC=tokens)
    rows = io.get("rows", torch.arange(len(layout)))
    yield from _rows(group, seen, layout, rows)

    hidden = system.forced_hidden(inputs_BLZ, context, lq_B3HW)
    logits = transformer.predict(hidden, context)
    yield from group.near("logits", logits, LOGITS)
    if "logits_rows" in io:
        yield from group.near("logits_rows", logits[:, rows], LOGITS)
    labels_BL = torch.cat([to_tokens(x) for x in indices], dim=1)
    cross_entropy = transformer.head.cross_entropy(logits, labels_BL)
    yield from group.near("ce_loss", cross_entropy.mean(), LOSS, True)
    per_scale = torch.stack([cross_entropy[:, tokens].mean() for tokens in system.schedule.slices])
    yield from group.near("ce_per_scale", per_scale, LOSS, True)
    yield from group.near("accuracy", transformer.head.accuracy(logits, labels_BL).mean(), LOSS, True)
    if system.refiner is not None:
        yield from _refiner_loss(group, system, hidden, logits, cross_entropy.mean())


def _rows(group: Group, seen: dict[str, Tensor], layout: TokenLayout, rows: Tensor) -> Iterator[Check]:
    """Tokens, all or some of them, and their rotary tables."""
    for name, output in seen.items():
        for suffix, shown in (("", output), ("_rows", output[:, rows])):
            wanted = group.io.get(name + suffix)
            if wanted is not None:
                yield from group.near(name + suffix, shown, BLOCK * max(1.0, wanted.abs().max().item()))
    for name, table in (("cos", layout.cos_LD), ("sin", layout.sin_LD)):
        if table is not None:
            yield from group.near(f"rope_{name}", table, BLOCK)
            yield from group.near(f"rope_rows_{name}", table[rows], BLOCK)


def _inputs(system: VARSR, indices: Sequence[Tensor]) -> Tensor:
    """Inputs of scales 2 to K, made of the codes alone."""
    total = system.tokenizer.quantizer.running_sum(system.schedule, system.sampling.raw_last)
    inputs = []
    for numbers in indices[:-1]:
        total.add(numbers)
        following = total.next_input()
        assert following is not None
        inputs.append(following)
    return torch.cat(inputs, dim=1)


def _refiner_loss(
    group: Group, system: VARSR, hidden: Tensor, logits: Tensor, cross_entropy: Tensor
) -> Iterator[Check]:
    io, last = group.io, system.schedule.slices[-1]
    assert system.refiner is not None
    chosen = to_map(system.transformer.head.select(logits[:, last]), system.schedule.latent_size)
    z, codes = system.refiner_condition(hidden[:, last], chosen)
    residual = io["continuous_residual"] if "continuous_residual" in io else io["last_layer_gt"]
    yield from group.near("refiner_z", z, LOGITS)
    yield from group.near("refiner_target_unscaled", residual - codes, BLOCK)
    draws = TrainingDraws(io["train_t"], io["train_noise"])
    loss = system.refiner.loss(z, residual - codes, draws).total.mean()
    yield from group.near("diff_loss", loss, LOSS * 10, True)
    yield from group.near("total_loss", cross_entropy + 2 * loss, LOSS * 10, True)


# ---- generation


def _generated(
    group: Group, system: VARSR, labels_B: Tensor, lq_B3HW: Tensor | None, known: Sequence[Tensor] = ()
) -> Iterator[Check]:
    """Greedy generation with guidance, the refiner with recorded noise, and the image."""
    io = group.io
    normals = _recorded_normals(io, len(labels_B))
    if known:
        scales = iter(known)  # recorded codes in place of drawn ones
        system.transformer.head.select = lambda *args, **options: next(scales)  # type: ignore[method-assign]
    prefix = None if lq_B3HW is None else system.prefix_of(lq_B3HW)
    predicted = system.predict(system.prepare(labels_B), prefix, Draws(None, normals))
    if known:
        del system.transformer.head.select
    generation = predicted.generation
    strengths = system.sampling.strengths(len(system.schedule))
    for k, raw in generation.logits.items():
        positive, negative = raw.chunk(2)
        mixed = (1 + strengths[k]) * positive - strengths[k] * negative
        yield from group.near(f"infer_logits_{k}", mixed, LOGITS)
        yield from group.near(f"infer_raw_logits_{k}", raw, LOGITS)
    yield from group.each("infer_idx", generation.indices, EXACT)
    yield from group.near("infer_f_hat", generation.codes, BLOCK)
    yield from group.near("infer_f_hat_discrete", generation.codes, BLOCK)
    yield from group.near("infer_f_hat_final", predicted.codes, IMAGE)
    if predicted.refined is not None and generation.hidden is not None:
        z, _ = system.refiner_condition(generation.hidden, generation.indices[-1])
        yield from group.near("infer_z", z, LOGITS * 10)
        yield from group.near("infer_z_positive", z.chunk(2)[0], LOGITS * 10)
        residual = predicted.refined.check().flatten(0, 1)
        # of the released two halves only the positive one is used, and ours draws no other
        ours = torch.cat([residual, io["infer_refiner_out"][len(residual) :]])
        yield from group.near("infer_refiner_out", ours, IMAGE)
    restored = system.decode(predicted.codes)
    yield from group.near("infer_image", restored, IMAGE)
    if "infer_image_crop" in io:
        yield from group.near("infer_image_crop", _crop(restored, io["infer_image_crop"], (200, 300)), IMAGE)
    moments = torch.stack([restored.mean(dim=(0, 2, 3)), restored.std(dim=(0, 2, 3))])
    yield from group.near("infer_image_channel_mean_std", moments, IMAGE)


def _recorded_normals(io: dict[str, Tensor], batch_size: int) -> tuple[Tensor, ...]:
    """The refiner's noise of the positive half, as `Draws` has it; none where none was recorded."""
    if "infer_init_noise_half" not in io:
        return ()
    start = io["infer_init_noise_half"]
    steps = io["infer_step_noise_half"] if "infer_step_noise_half" in io else io["infer_step_noise"][:, : len(start)]
    return tuple(rearrange(x, "(b l) z -> b l z", b=batch_size) for x in (start, *steps[:-1]))


def _crop(images: Tensor, wanted: Tensor, corner: tuple[int, int]) -> Tensor:
    """As large a piece as is wanted, from a corner given as (row, column)."""
    (top, left), (height, width) = corner, wanted.shape[-2:]
    return images[..., top : top + height, left : left + width]


# ---- whole groups


def _var(group: Group) -> Iterator[Check]:
    """VAR: classes, learned positions, phi at every scale."""
    io, system = group.io, group.golden.system(group.stem)
    yield from _forced(group, system, system.split(io["gt_idx"]), None)
    yield from _generated(group, system, io["infer_label"], None)
    for name, (top_k, top_p) in FILTERS.items():
        left = keep_top_p(keep_top_k(io["filter_in"], top_k), top_p)
        yield Check(f"{group.stem}/filter_{name}", 0.0 if torch.equal(left, io[f"filter_{name}"]) else 1.0, EXACT)


def _varsr(group: Group) -> Iterator[Check]:
    """VARSR with its codes given, its refiner alone, and all of it."""
    io, system = group.io, group.golden.system(group.stem)
    if "gt_idx" in io:
        indices, lq = system.split(io["gt_idx"]), io["lr"]
    else:
        lq = image(io["lr_u8"])
        features = io["f"]
        if "hr_u8" in io:
            features = system.tokenizer.features(image(io["hr_u8"]))
            yield from group.near("f", features, BLOCK * max(1.0, io["f"].abs().max().item()))
        pyramid = system.tokenizer.quantizer(features, system.schedule, raw_last=True)
        yield from _pyramid(group, pyramid)
        indices = list(pyramid.indices)
    yield from _forced(group, system, indices, lq)
    if "ref_z" in io:
        assert system.refiner is not None
        yield from _refiner_alone(group, system.refiner, system.sampling.guidance)
    labels_B = io.get("infer_label", torch.zeros(len(lq), dtype=torch.int64))
    yield from _generated(group, system, labels_B, lq)


def _class_model(group: Group) -> Iterator[Check]:
    """C2I: no prefix; its codes were drawn, so the recorded ones are taken."""
    io, system = group.io, group.golden.system(group.stem)
    config = group.golden.json(group.stem)["config"]
    indices = [io[f"infer_idx_{k}"] for k in range(len(system.schedule))]
    maps = [to_map(x, scale) for x, scale in zip(indices, system.schedule.scales, strict=True)]
    yield from _forced(group, system, maps, None)
    yield from _generated(group, system, io["label"], None, indices)
    is_safe = io["infer_is_safe"].bool()
    probabilities = []
    for k, safe in enumerate(is_safe.split(list(system.schedule.num_tokens_per_scale), dim=1)):
        left = keep_top_p(keep_top_k(io[f"infer_logits_{k}"], config["top_k"]), config["top_p"])
        counts = torch.where(safe, left.isfinite().sum(dim=-1), io[f"infer_kept_{k}"])
        yield from group.near(f"infer_kept_{k}", counts, EXACT)
        probabilities.append(left.softmax(dim=-1).gather(-1, indices[k][..., None])[..., 0])
    ours = torch.where(is_safe, torch.cat(probabilities, dim=1), io["infer_probability_of_index"])
    yield from group.near("infer_probability_of_index", ours, BLOCK)


def _refiner_alone(group: Group, refiner: Refiner, guidance: float) -> Iterator[Check]:
    """Tables, losses of rows, the network with and without guidance, and samples."""
    io, few = group.io, chain(len(group.io["sched_betas_gen"]))
    tables = {
        "sched_betas_train": chain().betas,
        "sched_betas_gen": few.betas,
        "sched_alphas_cumprod_gen": few.alphas_cumprod,
        "sched_post_logvar_gen": few.posterior_log_variance_clipped,
    }
    for name, table in tables.items():
        yield from group.near(name, table, 1e-9)
    yield from group.near("sched_timestep_map_gen", few.timesteps, EXACT)
    yield from group.near("ref_temb_raw", time_features(io["ref_t"]), BLOCK)
    x0 = io["ref_target"] / DATA_SCALE
    x = chain().noised(x0, io["ref_t"], io["ref_noise"])
    yield from group.near("ref_x_t", x, BLOCK)
    losses = chain().loss(refiner(x, io["ref_t"], io["ref_z"]), x0, x, io["ref_t"], io["ref_noise"])
    for name, loss in {"_mse": losses.mse, "_vb": losses.vlb, "": losses.total}.items():
        yield from group.near(f"ref_loss{name}", loss, LOSS, True)
    output = refiner(io["ref_x"], io["ref_t"], io["ref_z"])
    yield from group.near("ref_net_out", output, BLOCK)
    half = len(output) // 2
    again = refiner(io["ref_x"][:half].repeat(2, 1), io["ref_t"], io["ref_z"])
    mixed = guided(again[:half], again[half:], 3.0)
    # the released network guides the noise of both halves alike and leaves each its own variance
    both = torch.cat([mixed, torch.cat([mixed[:, : refiner.channels], again[half:, refiner.channels :]], dim=1)])
    yield from group.near("ref_net_out_cfg3", both, LOGITS)
    start, steps = io["refsample_init_half"], io["refsample_step_noise"]
    positive, negative = io["ref_z"].chunk(2)
    sample = _sampled(refiner, positive, start, steps[:, : len(start)], negative, guidance)
    yield from group.near("refsample_out", torch.cat([sample, io["refsample_out"][len(sample) :]]), IMAGE)


def _sampled(
    refiner: Refiner,
    z: Tensor,
    start: Tensor,
    steps: Tensor,
    negative: Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """A sample with recorded noise."""

    def noise(draw: int, shape: tuple[int, ...]) -> Tensor:
        return (start if draw == 0 else steps[draw - 1]).view(shape)

    return refiner.sample(z, noise, negative, guidance, len(steps), temperature).check()


def _colors(group: Group) -> Iterator[Check]:
    """Colors in floats; the golden ones are not clamped yet."""
    for method in ("adain", "wavelet"):
        matched = match_color(group.io["target"], group.io["source"], method)
        error = largest_error(matched, group.io[method].clamp(0, 1))
        yield Check(f"{group.stem}/{method}", error, BLOCK)


def _miscellany(group: Group) -> Iterator[Check]:
    """8-bit colors and resizing, tables of chains, filters, and the refiner's guidance."""
    io = group.io
    for name, wanted in io.items():
        kind, _, rest = name.partition("/")
        if kind.startswith("color_") and rest in ("adain_u8", "wavelet_u8"):
            target, source = (io[f"{kind}/{which}_u8"].numpy() for which in ("target", "source"))
            ours = torch.from_numpy(match_color_8bit(target, source, rest.removesuffix("_u8")))
            yield from group.near(name, ours, EXACT)
        elif kind.startswith("resize_") and rest == "out_u8":
            ours = torch.from_numpy(resized(io[f"{kind}/in_u8"].numpy(), (wanted.shape[0], wanted.shape[1])))
            yield from group.near(name, ours, EXACT)
        elif kind.startswith("diffusion_"):
            tables = chain(int(kind.removeprefix("diffusion_")))
            is_whole = rest == "timesteps"
            yield from group.near(name, getattr(tables, rest), EXACT if is_whole else 1e-9, not is_whole)
        elif kind == "filter" and rest != "in":  # such as filter/kept_top_k_3_top_p_0.75
            words = name.split("_")
            left = keep_top_p(keep_top_k(io["filter/in"], int(words[3])), float(words[6]))
            if "kept" in words[0]:
                yield from group.near(name, left.isfinite().sum(dim=-1), EXACT)
            else:
                is_same = torch.equal(left.sort(dim=-1).values, wanted)
                yield Check(f"{group.stem}/{name}", 0.0 if is_same else 1.0, EXACT)
    system = group.golden.system(group.stem, "network")
    assert system.refiner is not None
    z = io["refiner/z"]
    for name in [name.removesuffix("/out") for name in io if name.startswith("refiner/") and name.endswith("/out")]:
        start, steps, out = (io[f"{name}/{which}"] for which in ("init", "steps", "out"))
        what, value = name.removeprefix("refiner/").rsplit("_", 1)
        temperature, guidance = (float(value), 2.5) if what == "temperature" else (1.0, float(value))
        if len(start) == len(z):  # without guidance each row is a sample of its own
            ours = _sampled(system.refiner, z, start, steps)
        else:
            positive, negative = z.chunk(2)
            half = len(start)
            ours = _sampled(system.refiner, positive, start, steps[:, :half], negative, guidance, temperature)
            ours = torch.cat([ours, out[half:]])
        yield from group.near(f"{name}/out", ours, IMAGE)


def _tiles(group: Group) -> Iterator[Check]:
    """The released loop over tiles, with recorded noise; what follows the latents, from the golden ones.

    8-bit levels turn at less than what float32 leaves in a refiner's sample.
    """
    io, meta = group.io, group.golden.json(group.stem)
    system = group.golden.system(group.stem, "network")
    starts = io["init_noise_half"].split(system.schedule.num_tokens_per_scale[-1])
    steps = io["step_noise_half"].split(system.schedule.num_tokens_per_scale[-1], dim=1)
    seen: dict[str, list[Tensor]] = {"tiles": [], "indices": [], "latents": [], "image": []}

    def encode(tiles_t3HW: Tensor) -> Tensor:
        numbers = range(len(seen["indices"]), len(seen["indices"]) + len(tiles_t3HW))
        normals = [torch.stack([starts[n] for n in numbers])]
        normals += [torch.stack([steps[n][draw] for n in numbers]) for draw in range(len(steps[0]) - 1)]
        good = torch.zeros(len(tiles_t3HW), dtype=torch.int64)
        predicted = system.predict(system.prepare(good), system.prefix_of(tiles_t3HW), Draws(None, tuple(normals)))
        tokens = torch.cat([to_tokens(x) for x in predicted.generation.indices], dim=1)
        seen["tiles"] += tiles_t3HW.unbind()
        seen["indices"] += tokens.unbind()
        seen["latents"] += predicted.codes.unbind()
        return io["tile_f_hat"][numbers.start : numbers.stop]

    def decode(codes: Tensor) -> Tensor:
        seen["image"].append(system.tokenizer.decode(codes))
        return seen["image"][0]

    low = io["lr_u8"].numpy()
    final = torch.from_numpy(restore_officially(low, encode, decode, meta["scale"]))
    first = rearrange(((seen["tiles"][0] + 1) * 127.5).round().byte(), "c h w -> h w c")
    yield from group.near("enlarged_u8_crop", first[300:428, 300:428], EXACT)
    yield from group.near("tile_weight", tile_weights(), 1e-9)
    yield from group.near("tile_idx", torch.stack(seen["indices"]), EXACT)
    latents = torch.stack(seen["latents"])
    yield from group.near("tile_f_hat", latents, IMAGE)
    yield from group.near("blended_f_hat", blend_latents(latents, meta["rows"], meta["columns"]), IMAGE)
    size = (meta["scale"] * low.shape[0], meta["scale"] * low.shape[1])
    whole = from_network(seen["image"][0])
    yield from group.near("image_crop", _crop(whole, io["image_crop"], tuple(meta["image_crop_from"])), IMAGE)
    large = resized(rearrange(to_uint8(whole), "1 c h w -> h w c").numpy(), size)
    yield from group.pixels("resized_u8_crop", torch.from_numpy(large)[100:164, 100:164])
    yield from group.pixels("final_u8_crop", final[100:164, 100:164])
    pixels = final.double().flatten(0, 1)
    yield from group.near("final_u8_mean_std", torch.stack([pixels.mean(dim=0), pixels.std(dim=0)]), 2e-3)


COMPARISONS: dict[str, Callable[[Group], Iterator[Check]]] = {
    "var_vae": _var_tokenizer,
    "varsr_vae": _varsr_tokenizer,
    "vq_train": _tokenizer_training,
    "var": _var,
    "varsr": _varsr,
    "isr": _varsr,
    "c2i": _class_model,
    "colorfix": _colors,
    "misc": _miscellany,
    "tiles": _tiles,
    "train": compare_training,
}
"""By what a group's name begins with; the longest that fits counts."""
