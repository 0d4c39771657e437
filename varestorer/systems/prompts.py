"""The text of images: captions, and the features of prompts that the transformer reads.

Captions come first, then features, then the restoring. Each network is let go before the next is loaded, so that
memory never holds two of them.

Shapes: `H W` pixels, `T` tokens of a prompt, `E` width of the text encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from varestorer.conditioning.captioner import DEFAULT_NAME as CAPTIONER
from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.text_encoder import DEFAULT_NAME as TEXT_ENCODER
from varestorer.conditioning.text_encoder import DEFAULT_WIDTH, TextEncoder
from varestorer.systems.base import System
from varestorer.systems.plan import Job
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError
from varestorer.utils.images import load_picture, resize
from varestorer.utils.tiling import scaled_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextOptions:
    """Where the text of images comes from: one prompt for all, or captions of each.

    The text encoder and the captioner are folders or hub names; None: flan-t5-xl, for systems that were trained with
    it, and BLIP's large one.
    """

    prompt: str | None = None
    use_captions: bool = False
    text_encoder: str | None = None
    captioner: str | None = None


@dataclass(frozen=True)
class Texts:
    """The text of images: prompts by the name of the job, and features (T, E) on the CPU by the prompt.

    There are no features for systems without text.
    """

    prompts: dict[str, str] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def find_texts(
    system: VARestorer,
    jobs: Sequence[Job],
    options: TextOptions,
    device: torch.device,
    scale: float = 4,
    max_pixels: int | None = None,
) -> Texts:
    """The prompt of each job, and its features.

    Args:
        system: its restorer, if it has one, is moved to the captioner's device; nothing else of it is.
        jobs: images that cannot be read get no caption: whoever restores them says why.
        options: where texts come from.
        device: where captioner and text encoder run.
        scale: enlargement of the results.
        max_pixels: largest image that is read, see `load_picture`.
    Raises:
        UserError: captioner or text encoder are not there, or the system does not take its features.
    """
    prompts = {job.name: options.prompt for job in jobs} if options.prompt else {}
    if not prompts and not options.use_captions:
        return Texts()
    if system.transformer.config.num_classes:
        raise UserError(
            f"prompt= and caption= are for systems that read text, and {system.name} does not; leave them out"
        )
    if not reads_text(system, options.text_encoder):
        what = "no captions are made" if options.use_captions else "the prompt is recorded, and changes nothing"
        logger.warning("this model was trained without text: %s", what)
        return Texts(prompts)
    if options.use_captions:
        captioner = Captioner(options.captioner or CAPTIONER, device)
        with logging_redirect_tqdm():
            for job in tqdm(jobs, desc="captions", unit=" images"):
                with suppress(UserError, MemoryError):
                    image_3HW = load_picture(job.source, max_pixels).image
                    prompts[job.name] = captioner.caption(preview(system, image_3HW, scale, device))[0]
        captioner.release()
    return Texts(prompts, _encoded(system, prompts.values(), TextEncoder(options.text_encoder or TEXT_ENCODER, device)))


def _encoded(system: VARestorer, prompts: Iterable[str], encoder: TextEncoder) -> dict[str, Tensor]:
    """Features (T, E) on the CPU of each different prompt; lets go of the encoder."""
    wanted = system.transformer.config.text_width
    different = list(dict.fromkeys(prompts))
    features: dict[str, Tensor] = {}
    with logging_redirect_tqdm():
        for prompt in tqdm(different, desc="prompts", unit=" prompts", disable=len(different) < 2):
            features[prompt] = encoder.encode([prompt])[0].cpu()
            if features[prompt].shape[1] != wanted:
                raise UserError(
                    f"text_encoder={encoder.path} gives features of width {features[prompt].shape[1]}, but the model "
                    f"wants {wanted}; choose the encoder the model was trained with"
                )
    encoder.release()
    return features


def reads_text(system: System, text_encoder: str | None = None) -> bool:
    """Whether prompts change what a system makes, where the encoder is this one; None: flan-t5-xl."""
    config = system.transformer.config
    return not config.num_classes and (text_encoder is not None or config.text_width == DEFAULT_WIDTH)


@torch.inference_mode()
def preview(system: VARestorer, image_3HW: Tensor, scale: float, device: torch.device) -> Tensor:
    """What a captioner is shown of an image in [0, 1]: the result's size, but no side above the system's square.

    (1, 3, h, w) in [0, 1], cleaned by the system's restorer where there is one.
    """
    height, width = image_3HW.shape[-2:]
    size = scaled_size(height, width, min(scale, system.tile / max(height, width)))
    small_13hw = resize(image_3HW[None], size).to(device)
    if system.restorer is None:
        return small_13hw
    return system.restorer.to(device)(small_13hw).clamp(0, 1)
