"""`benchmark what=restore`: restoring by variants in turns, part by part, of any paper's system."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from varestorer.benchmark.counting import count
from varestorer.benchmark.measure import Measured, Work
from varestorer.benchmark.networks import Source, Variants, fill, num_parameters, restoring_counts, words_of
from varestorer.benchmark.report import Report, Run, cost_table
from varestorer.benchmark.roofline import Rates
from varestorer.conditioning.captioner import Captioner
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import System
from varestorer.utils.device import gains_from_bf16, num_bytes
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user
from varestorer.utils.images import load_image, save_image
from varestorer.utils.seeds import torch_generator
from varestorer.utils.watch import watch

LOG = logging.getLogger(__name__)
VARIANTS = {
    "cuda": ("eager", "merged", "bf16", "bf16+compile", "bf16+graphs", "bf16+compile+graphs"),
    "cpu": ("eager", "merged"),
}
"""What is compared on a device where nothing is said."""
SCALE = 4  # of the picture
PUBLISHED_T5: dict[str, Any] = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
}
"""Sizes of flan-t5-xl's encoder."""


def run(report: Report, source: Source, device: torch.device, options: Any, folder: Path) -> bool:
    """Measure, print, and write benchmark.json, the tables and benchmark.png; says whether all could be measured.

    UserError: nothing could be measured; a text encoder or a captioner cannot be used.
    """
    chosen = {}
    for name in options.variants or default_variants(device):
        words_of("restore", name)
        chosen[name] = Acceleration.parse(name)
    blank = source.blank(merged=True)
    title = f"one image of {blank.tile} x {blank.tile} pixels, adapters merged, by count"
    parameters = num_parameters(blank)  # counting changes it
    report.show(cost_table(restoring_counts(blank), parameters, title))
    rates = Rates.of(device, [means.precision for means in chosen.values()])
    report.show_rates(rates)
    variants = Variants(source, device, chosen)
    systems = {}
    for name in chosen:
        try:
            systems[name] = variants.system(name)
        except UserError as error:
            LOG.warning("%s is not measured: %s", name, error)
    if not systems:
        raise UserError(f"none of the variants {', '.join(chosen)} can be measured here; choose others")

    def run_of(name: str, batch: int, measured: Measured) -> Run:
        measured = with_weights(measured, systems[name])
        return Run(name, batch, chosen[name].precision, measured, variants.counts(name, batch))

    def works_of(batch: int) -> dict[str, Work]:
        return {name: restoring(system, batch) for name, system in systems.items()}

    runs = report.compare(works_of, run_of, rates, device, options)
    pictures = picture_runs(report, systems, chosen, device, options) if options.picture else []
    if pictures:
        title = f"a picture of {options.picture} x {options.picture} pixels, from file to file, by tiles"
        report.show_runs(pictures, rates, title)
    beside = beside_restoring(report, device, options)
    if beside:
        report.show_runs(beside, rates, "of one prompt")
    content = {
        "picture": {"side": options.picture, "runs": {run.variant: run.content(rates) for run in pictures}},
        "beside": [run.content(rates) for run in beside],
    }
    report.write(folder, runs, rates, content)
    return len(runs) == len(chosen) * len(options.batch)


def default_variants(device: torch.device) -> list[str]:
    """What the device can do."""
    chosen = list(VARIANTS.get(device.type, VARIANTS["cpu"]))
    return [*chosen, "bf16"] if device.type == "cpu" and gains_from_bf16(device) else chosen


def restoring(system: System, batch: int) -> Work:
    """The work on a batch of squares, from the host's memory to the host's memory."""
    images_B3tt = torch.rand(batch, 3, system.tile, system.tile, generator=torch_generator(0, "speed"))
    if system.device.type == "cuda":
        images_B3tt = images_B3tt.pin_memory()
    return lambda: system.restore_batch(images_B3tt.to(system.device, non_blocking=True)).images_B3HW.cpu()


def with_weights(measured: Measured, system: System) -> Measured:
    """The same with the weights in the peak, as if no other variant shared them."""
    peak = measured.peak_bytes
    return replace(measured, peak_bytes=None if peak is None else peak + num_bytes(system.state_dict().values()))


def picture_runs(
    report: Report,
    systems: Mapping[str, System],
    chosen: Mapping[str, Acceleration],
    device: torch.device,
    options: Any,
) -> list[Run]:
    """Restore a picture from a file to a file, as `varestorer restore` does."""
    side = max(1, options.picture // SCALE)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "lq.png", Path(folder) / "restored.png"
        save_image(source, torch.rand(3, side, side, generator=torch_generator(0, "picture")))

        def work(system: System) -> None:
            save_image(target, system.restore(load_image(source), SCALE, color=options.color).image)

        works = {name: partial(work, system) for name, system in systems.items()}
        found = report.measure(works, device, options)
    return [Run(name, 1, chosen[name].precision, measured, {}) for name, measured in found.items()]


def beside_restoring(report: Report, device: torch.device, options: Any) -> list[Run]:
    """Time the text encoder (float16 on CUDA, as it is used, else float32) and the captioner, where they are asked for.

    UsageError: the text encoder's folder holds no T5.
    """
    works: dict[str, Work] = {}
    if options.captioner is not None:
        image_13HW = torch.rand(1, 3, 512, 512, generator=torch_generator(0, "captioned"))
        works["captioner"] = partial(Captioner(options.captioner, device).caption, image_13HW)
    if options.text is not None:
        encoder = text_encoder(options.text).to(device, torch.float16 if device.type == "cuda" else torch.float32)
        size = 1, options.text_tokens
        tokens_1T = torch.randint(encoder.config.vocab_size, size, generator=torch_generator(0, "text")).to(device)
        works["text encoder"] = torch.inference_mode()(partial(encoder, input_ids=tokens_1T))
    works = {name: watch(name)(work) for name, work in works.items()}
    found = report.measure(works, device, options) if works else {}
    return [Run(name, 1, "fp32", measured, count(works[name])) for name, measured in found.items()]


def text_encoder(named: str) -> Any:
    """The T5 encoder of a folder, or one of the published sizes with random weights ("t5")."""
    from transformers import T5Config, T5EncoderModel  # slow to import

    if named == "t5":
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config(**PUBLISHED_T5))
        fill(encoder.to_empty(device="cpu"), 0)
    else:
        try:
            encoder = T5EncoderModel.from_pretrained(expand_user(named), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"text={named} is neither t5 nor the folder of a T5 ({reason(error)})") from error
    return encoder.eval().requires_grad_(False)
