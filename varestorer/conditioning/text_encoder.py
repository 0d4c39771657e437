"""Text features for the transformer: the encoder of flan-t5-xl."""

from typing import Any

import torch
from torch import Tensor

from varestorer.conditioning.pretrained import load_pretrained

DEFAULT_NAME = "google/flan-t5-xl"
MAX_LENGTH = 512

_PEOPLE = (
    "man woman men women boy girl child person human adult teenager employee employer worker "
    "mother father sister brother grandmother grandfather son daughter"
).split()
_FACES = ". very smooth faces, good looking faces, face to the camera, perfect facial features"


def add_positive_prompt(prompt: str) -> str:
    """Ask for good faces when a prompt seems to be about people, as Infinity's option does.

    A word counts wherever its letters appear, in lower case only: `manual` contains `man` (kept as released).
    """
    return prompt + _FACES if any(word in prompt for word in _PEOPLE) else prompt


class TextEncoder:
    """T5 encoder that is loaded when it is first needed.

    Args:
        path: folder as transformers saves it, or a name on the hub.
        device: where it runs.
        dtype: of its weights; float16 on CUDA as released, else float32.
        max_length: longest prompt in tokens, the end token included; the rest is cut off.
    """

    def __init__(
        self,
        path: str = DEFAULT_NAME,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int = MAX_LENGTH,
    ) -> None:
        self.path = str(path)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.max_length = max_length
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def encode(self, prompts: list[str], use_positive_prompt: bool = False) -> list[Tensor]:
        """Encode prompts.

        The released code pads every prompt to 512 tokens and drops the padding's rows again. Masked positions
        do not change the others, so here prompts are padded to the longest of the list only.

        Args:
            prompts: texts; an empty one gives the end token's row.
            use_positive_prompt: pass each through `add_positive_prompt` first.
        Returns:
            one (length, width) float32 tensor a prompt, the end token's row included.
        Raises:
            UserError: no text encoder at `path`.
        """
        if not prompts:
            return []
        if use_positive_prompt:
            prompts = [add_positive_prompt(prompt) for prompt in prompts]
        tokenizer, model = self._load()
        tokens = tokenizer(
            prompts, max_length=self.max_length, padding="longest", truncation=True, return_tensors="pt"
        ).to(self.device)
        features = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [rows[mask.bool()].float() for rows, mask in zip(features, tokens.attention_mask, strict=True)]

    def release(self) -> None:
        """Give the memory back; the next `encode` loads again."""
        self._loaded = None

    def _load(self) -> tuple[Any, Any]:
        """Tokenizer and encoder, loaded once."""
        if self._loaded is None:
            from transformers import AutoTokenizer, T5EncoderModel

            def load(path: str) -> tuple[Any, Any]:
                model = T5EncoderModel.from_pretrained(path, dtype=self.dtype)
                return AutoTokenizer.from_pretrained(path, legacy=True), model.eval().requires_grad_(False)

            tokenizer, model = load_pretrained(load, self.path, DEFAULT_NAME, "text_encoder")
            self._loaded = tokenizer, model.to(self.device)
        return self._loaded
