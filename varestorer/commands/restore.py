"""`varestorer restore`: one picture or a folder of them, any size."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.systems.folder import FolderReport, RestoreImage, plan_restoration, restore_files
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from varestorer.systems.varestorer import VARestorer

logger = logging.getLogger(__name__)

PUBLISHED_TEXT_WIDTH = 2048  # of flan-t5-xl; networks of another width were trained with the null text alone

HELP = """
Restore images: larger, sharper, and without noise and compression marks.

usage: python scripts/restore.py input=FILE_OR_FOLDER output=FOLDER ckpt=RUN_OR_FILE [key=value ...]

  input=PATH         an image, or a folder of images (subfolders included)
  output=FOLDER      results: <stem>.png in the same subfolders, and restore.json with an entry for each input
  ckpt=PATH          a run of scripts/train.py (its newest EMA weights), or a checkpoint of one
  scale=4            how many times larger the result is
  prompt=TEXT        what the images show; none: the learned null text
  text_encoder=PATH  folder or hub name of the encoder for the prompt (google/flan-t5-xl)
  seed=0             of the sampling noise; each image and each tile has its own stream
  select=argmax      argmax | sample: the likelier bits, or bits drawn from their probabilities
  steps=one          one: the student at once; K: the teacher predicts the last K-1 scales again;
                     multi: the teacher predicts all fine scales
  overlap=PIXELS     that neighbouring tiles share
  batch=N            tiles restored at once
  device=auto        auto | cpu | cuda | mps
  overwrite=false    restore again what has a result already

Images of any size and aspect are taken: small ones are padded, large ones cut into overlapping tiles.
A file that cannot be restored is named and the others go on.

Exit status: 0 all well; 1 a file failed; 2 the command was wrong.

example:
  python scripts/train.py +experiment=quickstart run_dir=outputs/mine
  python scripts/restore.py input=photos output=restored ckpt=outputs/mine
"""


@dataclass
class RestoreOptions:
    """The keys of `configs/restore.yaml`, explained there; values of another type are refused."""

    input: str = MISSING
    output: str = MISSING
    ckpt: str | None = None
    scale: float = 4
    prompt: str | None = None
    text_encoder: str | None = None
    seed: int = 0
    select: str = "argmax"
    steps: str = "one"
    overlap: int | None = None
    batch: int | None = None
    device: str = "auto"
    overwrite: bool = False


def restore(cfg: DictConfig) -> int:
    """Run the command.

    Args:
        cfg: `configs/restore.yaml` with overrides.
    Returns:
        exit status: 1 if a file failed.
    Raises:
        UsageError: an option that cannot be, no such input, no checkpoint given.
        UserError: the checkpoint or the output folder cannot be used.
    """
    typed = OmegaConf.merge(OmegaConf.structured(RestoreOptions), cfg)
    options = cast(RestoreOptions, OmegaConf.to_object(typed))
    check_options(options)
    plan = plan_restoration(options.input, options.output)
    run, settings = load_restoration(options)
    report = restore_files(plan, run, options.seed, settings, options.overwrite)
    say(summary(report))
    return FAILED if report.failed else OK


def check_options(options: RestoreOptions) -> None:
    """Refuse what cannot be before anything is loaded.

    Raises:
        UsageError: names the key, what it was and what it may be.
    """
    rules = {
        "scale": (options.scale > 0, "above 0"),
        "select": (options.select in ("argmax", "sample"), "argmax or sample"),
        "steps": (re.fullmatch(r"one|multi|[1-9]\d*", options.steps), "one, multi or a number from 1"),
        "overlap": (options.overlap is None or options.overlap >= 0, "at least 0 pixels"),
        "batch": (options.batch is None or options.batch >= 1, "at least 1 tile"),
    }
    for key, (holds, wanted) in rules.items():
        if not holds:
            raise UsageError(f"{key} must be {wanted}, got {key}={getattr(options, key)}")
    if not options.ckpt:
        raise UsageError(
            "ckpt=RUN_OR_FILE is needed: a run of `python scripts/train.py +experiment=quickstart` (minutes "
            "on a CPU; it says where its run folder is), or a checkpoint that somebody gave you"
        )


def load_restoration(options: RestoreOptions) -> tuple[RestoreImage, dict[str, Any]]:
    """Load the system and bind the options, so that it only needs an image and a seed.

    Returns:
        the function, and what the report says of its settings.
    """
    from varestorer.systems.loading import load_system

    needs_teacher = options.steps not in ("one", "1")
    system = load_system(cast(str, options.ckpt), pick_device(options.device), merge=not needs_teacher)
    scale = int(options.scale) if options.scale == int(options.scale) else options.scale
    chosen: dict[str, Any] = {"scale": scale, "select": options.select, "steps": options.steps}
    wishes = {"prompt": encode_prompt(system, options), "overlap": options.overlap, "batch": options.batch}
    chosen |= {key: value for key, value in wishes.items() if value is not None}
    settings: dict[str, Any] = {"prompt": options.prompt or None}
    if options.prompt and "prompt" not in chosen:
        settings["prompt_used"] = False

    def run(image_3HW: Tensor, seed: int) -> Tensor:
        return system.restore(image_3HW, seed=seed, **chosen).image

    return run, settings


def encode_prompt(system: VARestorer, options: RestoreOptions) -> Tensor | None:
    """Features (T, E) of the prompt; None without one, and for models that were trained without text.

    Raises:
        UserError: no text encoder, or one whose features the model does not take.
    """
    width = system.transformer.config.text_width
    if not options.prompt:
        return None
    if options.text_encoder is None and width != PUBLISHED_TEXT_WIDTH:
        logger.warning("this model was trained without text: the prompt is recorded, and changes nothing")
        return None
    from varestorer.conditioning.text_encoder import DEFAULT_NAME, TextEncoder

    # let go on return: the transformer may need its memory
    encoder = TextEncoder(options.text_encoder or DEFAULT_NAME, system.device)
    features = encoder.encode([options.prompt])[0]
    if features.shape[1] != width:
        raise UserError(
            f"text_encoder gives features of width {features.shape[1]}, but ckpt={options.ckpt} wants "
            f"{width}; choose the encoder the model was trained with"
        )
    return features


def summary(report: FolderReport) -> str:
    """What was done, what failed and why, and where it all is."""
    lines = [f"failed: {name}: {reason}" for name, reason in report.failed.items()]
    counts = [f"{report.num_restored} restored"]
    if report.num_skipped:
        counts.append(f"{report.num_skipped} had a result already (overwrite=true restores them again)")
    if report.failed:
        counts.append(f"{len(report.failed)} failed")
    places = f"results in {report.path.parent}, details in {report.path}"
    return "\n".join([*lines, f"{', '.join(counts)}; {places}"])


COMMAND = Command(name="restore", config_name="restore", function=restore, help=HELP)
