"""`benchmark what=train_step`: how long a training step takes, part by part, by variants in turns.

What a step of the paper's distillation costs on one image of 512x512 pixels, counted on the meta device without LPIPS:
2.1 TFLOP to encode both images, 11.1 for the teacher's 2,521 tokens, 17.4 for the student's 3,545 and its adapters, 2.5
to decode, 23.4 for the gradients, which frozen weights have none of: 56.5 in all. What teacher and student have in
common (text path, the base's keys and values of the text) is 0.3 of it: sharing that gains nothing worth its memory.
Checkpointing computes the student's blocks again, 17 more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.benchmark.memory import experiment_stage, task_of
from varestorer.commands.benchmark.shared import SIZES, heading, model_name, out_folder, where, write_json
from varestorer.commands.entry import OK, say
from varestorer.utils.errors import UsageError
from varestorer.utils.files import atomic_write

if TYPE_CHECKING:
    import torch

    from varestorer.training.speed import StepSpeed, TrainStep

VARIANTS = {
    "cuda": ("bf16", "bf16+checkpoint", "bf16+compile"),
    "cpu": ("eager", "bf16", "checkpoint"),
}
"""What is compared on a device where `variants` does not say."""
GIB = 2**30


def run(cfg: DictConfig) -> int:
    """Measure steps of the last stage of the experiment `train`, print them, and write benchmark.json and .png.

    Raises:
        UsageError: an unknown variant, or one that the stage's task does not have.
    """
    import torch

    from varestorer.evaluation.memory import peak_memory
    from varestorer.training.speed import StepVariant, measure_steps
    from varestorer.utils.device import pick_device
    from varestorer.utils.rates import matrix_rate

    if cfg.ckpt is not None:
        raise UsageError("what=train_step measures random weights of the sizes of model=; leave out ckpt")
    device = pick_device(str(cfg.device))
    rates: dict[torch.dtype, float] = {}
    lines, rows = [], []
    for batch_size in map(int, cfg.batch):
        step = build_step(cfg, device, batch_size)
        names = cfg.variants or VARIANTS.get(device.type, VARIANTS["cpu"])
        variants = {str(name): StepVariant.parse(str(name)) for name in names}
        for dtype in {torch.bfloat16 if variant.bf16 else torch.float32 for variant in variants.values()} - {*rates}:
            rates[dtype] = matrix_rate(device, dtype)
        found = measure_steps(step, variants, int(cfg.repeats), int(cfg.warmup), peak_memory)
        for name, speed in found.items():
            rows.append(row(name, speed, rates[torch.bfloat16 if speed.variant.bf16 else torch.float32]))
        lines.append(table(rows[-len(found) :]))
    place, model = where(device), f"{model_name(cfg)}, {cfg.train}"
    title = heading("train_step", model, place)
    say(f"{title}\nmatrix rate: " + ", ".join(f"{str(k)[6:]} {v / 1e12:.3g} TFLOP/s" for k, v in rates.items()))
    say("\n\n".join(lines))
    folder = out_folder(cfg)
    named_rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}
    write_json(folder, {"what": "train_step", "model": model, **place, "matrix_rate": named_rates, "steps": rows})
    write_bars(folder / "benchmark.png", rows, title)
    say(f"\nwritten: benchmark.json and benchmark.png to {folder}")
    return OK


def build_step(cfg: DictConfig, device: torch.device, batch_size: int) -> TrainStep:
    """Steps of the last stage of `cfg.train`, of a system of the sizes of `cfg.model` with random weights."""
    from hydra.utils import instantiate

    from varestorer.evaluation.cost import add_restorer, random_system
    from varestorer.training.speed import TrainStep

    stage = experiment_stage(str(cfg.train), [f"model={model_name(cfg)}", *cfg.overrides])
    sizes: Any = OmegaConf.to_container(stage.model, resolve=True)
    system = random_system({name: sizes[name] for name in SIZES}, device, int(cfg.seed))
    add_restorer(system, sizes.get("restorer"), int(cfg.seed))
    task = task_of(stage, system)
    factory = instantiate(stage.optimizer, _convert_="all")
    in_bf16 = str(stage.trainer.base_precision) != "fp32"
    return TrainStep(task.to(device), factory, batch_size, system.tile, in_bf16)


def row(name: str, speed: StepSpeed, matrix_rate: float) -> dict[str, Any]:
    """What is kept of a variant: seconds, bytes, operations; `mfu` is of the measured matrix rate."""
    return {
        "variant": name,
        "batch": speed.batch,
        "seconds": speed.whole.median,
        "spread": speed.whole.spread,
        "images_per_second": speed.images_per_second,
        "model_flops": sum(speed.flops.values()),
        "flops_per_second": speed.rate,
        "mfu": speed.rate / matrix_rate,
        "peak_bytes": speed.peak_bytes,
        "parts": {
            part: {"seconds": timing.median, "flops": speed.flops.get(part, 0)} for part, timing in speed.parts.items()
        },
    }


def table(rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> str:
    """Variants of one size of batch beside each other, a line for each figure and each part."""
    names = list(dict.fromkeys(part for found in rows for part in found["parts"]))
    width = max(14, *(len(found["variant"]) + 2 for found in rows))

    def line(title: str, values: list[str]) -> str:
        return f"{title:28}" + "".join(f"{value:>{width}}" for value in values)

    lines = [
        line(f"batch {rows[0]['batch']}", [found["variant"] for found in rows]),
        line("ms a step", [f"{1000 * found['seconds']:.1f}" for found in rows]),
        line("  spread", [f"{1000 * found['spread']:.1f}" for found in rows]),
        line("images/s", [f"{found['images_per_second']:.2f}" for found in rows]),
        line("model GFLOP a step", [f"{found['model_flops'] / 1e9:.1f}" for found in rows]),
        line("GFLOP/s", [f"{found['flops_per_second'] / 1e9:.1f}" for found in rows]),
        line("MFU", [f"{100 * found['mfu']:.1f} %" for found in rows]),
        line("peak GiB beyond the weights", [gib(found["peak_bytes"]) for found in rows]),
    ]
    for name in names:
        parts = [found["parts"].get(name, {"seconds": 0.0}) for found in rows]
        lines.append(line(f"  ms {name}", [f"{1000 * part['seconds']:.1f}" for part in parts]))
    return "\n".join(lines)


def gib(size: int | None) -> str:
    """Bytes in GiB; a dash where they are not known."""
    return "-" if size is None else f"{size / GIB:.2f}"


def write_bars(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw milliseconds of an image, the parts of each variant end to end."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(part for found in rows for part in found["parts"]))
    left = [0.0] * len(rows)
    for name, colour in zip(names, colormaps["tab20"].colors, strict=False):  # type: ignore[attr-defined]
        parts = [found["parts"].get(name, {"seconds": 0.0}) for found in rows]
        widths = [1000 * part["seconds"] / found["batch"] for part, found in zip(parts, rows, strict=True)]
        axes.barh(range(len(rows)), widths, left=left, height=0.6, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{found['variant']}, batch {found['batch']}" for found in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an image, median")
    axes.set_title(title, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
