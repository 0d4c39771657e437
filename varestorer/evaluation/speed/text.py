"""What a prompt costs beside restoring: a text encoder, and a captioner that writes the prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varestorer.evaluation.cost import TEXT
from varestorer.evaluation.speed.operations import t5_flops
from varestorer.evaluation.speed.restoring import StageSpeed
from varestorer.evaluation.speed.stages import weight_bytes
from varestorer.utils.errors import UsageError
from varestorer.utils.files import expand_user
from varestorer.utils.seeds import torch_generator
from varestorer.utils.timing import in_turns

PUBLISHED = "t5"
PUBLISHED_T5: dict[str, Any] = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
}
"""Sizes of flan-t5-xl's encoder."""

CAPTIONER = "captioner"


def text_encoder_speed(text: str, num_tokens: int, device: torch.device, repeats: int, warmup: int) -> StageSpeed:
    """Time a T5 encoder on one prompt; float16 on CUDA, as it is used, else float32.

    Args:
        text: "t5" for the published sizes with random weights, or a folder as transformers saves it.
        num_tokens: of the prompt.
        device: where it runs.
        repeats: timed runs.
        warmup: runs before them.
    Raises:
        UsageError: the folder holds no T5.
    """
    encoder: Any = (_random_t5() if text == PUBLISHED else _read_t5(text)).eval().requires_grad_(False)
    encoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    tokens_1T = torch.randint(encoder.config.vocab_size, (1, num_tokens), generator=torch_generator(0, "text")).to(
        device
    )
    work = torch.inference_mode()(partial(encoder, input_ids=tokens_1T))
    timing = in_turns({TEXT: work}, repeats, warmup, device)[TEXT]
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter does not know
    with FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flops}) as counter:
        features: Any = work()
    moved = weight_bytes([encoder.encoder.block]) + features.last_hidden_state.nbytes
    return StageSpeed(TEXT, timing, counter.get_total_flops(), t5_flops(encoder.config, num_tokens), moved)


def _attention_flops(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """Of attention with queries, keys and values of these shapes."""
    return sdpa_flop_count(*shapes[:3])


def captioner_speed(folder: str, image_13HW: Tensor, device: torch.device, repeats: int, warmup: int) -> StageSpeed:
    """Time a captioner on one image in [0, 1]; how much it writes depends on its weights and on the image."""
    from varestorer.conditioning.captioner import Captioner

    captioner = Captioner(folder, device)
    work = partial(captioner.caption, image_13HW)
    timing = in_turns({CAPTIONER: work}, repeats, warmup, device)[CAPTIONER]
    with FlopCounterMode(display=False) as counter:
        work()
    return StageSpeed(CAPTIONER, timing, counter.get_total_flops(), None, None)


@torch.no_grad()
def _random_t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**PUBLISHED_T5))
    encoder.to_empty(device="cpu")
    generator = torch_generator(0, "t5")
    for parameter in encoder.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return encoder


def _read_t5(folder: str) -> nn.Module:
    from transformers import T5EncoderModel

    try:
        encoder: nn.Module = T5EncoderModel.from_pretrained(expand_user(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"text={folder} is neither t5 nor the folder of a T5 ({reason})") from error
    return encoder
