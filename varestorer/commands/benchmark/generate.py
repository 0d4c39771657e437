"""`benchmark what=generate`: one step against scale-by-scale generation with the same network, in turns."""

from __future__ import annotations

from omegaconf import DictConfig

from varestorer.commands.benchmark.shared import build_system, heading, model_name, out_folder, where, write_json
from varestorer.commands.entry import OK, say

PICTURE = "benchmark.png"


def run(cfg: DictConfig) -> int:
    """Print and write how long the variants take, what they compute, and what explains the ratios.

    Raises:
        UsageError: an unknown variant.
    """
    import torch

    from varestorer.evaluation.speed.generation import Variant, count, default_variants, measure_generation
    from varestorer.evaluation.speed.generation_report import (
        Measured,
        generation_content,
        generation_text,
        write_generation_bars,
    )
    from varestorer.utils.device import gains_from_bf16, pick_device
    from varestorer.utils.rates import matrix_rate
    from varestorer.utils.seeds import torch_generator

    device = pick_device(str(cfg.device))
    chosen = {str(name): Variant.parse(str(name)) for name in cfg.variants or ()}
    system = build_system(cfg, device).merge_adapters()
    if not chosen:
        names = default_variants(device, system.student_config.long_input)
        chosen = {name: Variant.parse(name) for name in names}
    precision = "bf16" if gains_from_bf16(device) else "fp32"
    system.set_precision(precision)
    found = where(device) | {"precision": precision}
    say(f"{heading('generate', model_name(cfg), found)}\nblocks in {precision}, squares of {system.tile} pixels")
    rate = matrix_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    num_text, rows = len(system.transformer.condition.null_features), []
    for batch in map(int, cfg.batch):
        drawn = torch.rand(batch, 3, system.tile, system.tile, generator=torch_generator(int(cfg.seed), "generate"))
        timings = measure_generation(system, chosen, drawn.to(device), int(cfg.repeats), int(cfg.warmup))
        for name, variant in chosen.items():
            rows.append(Measured(variant, batch, count(system, variant, batch, num_text), timings[name]))
    say(generation_text(rows, rate))
    folder = out_folder(cfg)
    content = {"what": "generate", "model": model_name(cfg), **found, **generation_content(rows, rate)}
    write_json(folder, content)
    write_generation_bars(folder / PICTURE, rows, f"{model_name(cfg)}, {found['device']}, {precision}")
    say(f"written: {folder}")
    return OK
