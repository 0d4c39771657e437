"""Captions of images by BLIP, used as prompts."""

from typing import Any

import torch
from torch import Tensor

from varestorer.conditioning.pretrained import Pretrained
from varestorer.utils.images import to_uint8

DEFAULT_NAME = "Salesforce/blip-image-captioning-large"


class Captioner(Pretrained):
    """BLIP that is loaded when it is first needed.

    Args:
        path: folder as transformers saves it, or a name on the hub.
        device: where it runs.
        max_tokens: longest caption, in tokens.
    """

    default, key = DEFAULT_NAME, "captioner"

    def __init__(self, path: str = DEFAULT_NAME, device: torch.device | str = "cpu", max_tokens: int = 20) -> None:
        super().__init__(path, device)
        self.max_tokens = max_tokens

    @torch.no_grad()
    def caption(self, images_B3HW: Tensor) -> list[str]:
        """A caption of each image, RGB in [0, 1] of any size; greedy, so the same image always gets the same one.

        UserError if there is no captioner at `path`.
        """
        processor, model = self._load()
        pixels = processor(images=list(to_uint8(images_B3HW).cpu()), return_tensors="pt").pixel_values
        tokens = model.generate(
            pixel_values=pixels.to(self.device), max_new_tokens=self.max_tokens, do_sample=False, num_beams=1
        )
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    def _open(self, path: str) -> tuple[Any, Any]:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        model = BlipForConditionalGeneration.from_pretrained(path)
        return BlipProcessor.from_pretrained(path), model
