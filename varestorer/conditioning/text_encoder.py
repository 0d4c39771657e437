"""Text features for the transformer: the encoder of flan-t5-xl."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.conditioning.pretrained import fingerprint, free_memory, load_pretrained, local_folder
from varestorer.conditioning.text_cache import CacheKey, TextCache
from varestorer.utils.files import cache_folder

DEFAULT_NAME = "google/flan-t5-xl"
DEFAULT_WIDTH = 2048  # of its features; networks of another width were trained without it
MAX_LENGTH = 512

_KEY = "text_encoder"  # of the configuration, for messages

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
    """T5 encoder that remembers features on the disk and is loaded when a prompt is new.

    Args:
        path: folder as transformers saves it, or a name on the hub.
        device: where it runs.
        dtype: of its weights; float16 on CUDA as released, else float32.
        max_length: longest prompt in tokens, the end token included; the rest is cut off.
        cache: folder of the remembered features; "default" for the folder `text` in `cache_folder()`, None for none.
    """

    def __init__(
        self,
        path: str = DEFAULT_NAME,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int = MAX_LENGTH,
        cache: str | Path | None = "default",
    ) -> None:
        self.path = str(path)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.max_length = max_length
        remembered = cache_folder() if cache == "default" else None
        folder = cache if remembered is None else remembered / "text"
        self._cache = None if folder in (None, "default") else TextCache(Path(folder))
        self._loaded: tuple[Any, Any] | None = None

    def encode(self, prompts: list[str], use_positive_prompt: bool = False) -> list[Tensor]:
        """Encode prompts, one at a time, so that the bits of a prompt's features do not depend on the others.

        The released code pads every prompt to 512 tokens and drops the padding's rows again. Masked positions
        do not change the others, so here nothing is padded.

        Args:
            prompts: texts; an empty one gives the end token's row.
            use_positive_prompt: pass each through `add_positive_prompt` first.
        Returns:
            one (length, width) float32 tensor a prompt, the end token's row included, on `device`.
        Raises:
            UserError: no text encoder at `path`.
        """
        return [self._remembered(prompt, use_positive_prompt).to(self.device) for prompt in prompts]

    def release(self) -> None:
        """Give the memory back; the next new prompt loads again."""
        self._loaded = None
        free_memory(self.device)

    def _remembered(self, prompt: str, use_positive_prompt: bool) -> Tensor:
        """Features of a prompt from the disk, else computed and kept there."""
        text = add_positive_prompt(prompt) if use_positive_prompt else prompt
        if self._cache is None:
            return self._compute(text)
        key: CacheKey = {
            "prompt": prompt,
            "encoder": self._fingerprint,
            "max_length": self.max_length,
            "use_positive_prompt": use_positive_prompt,
            "dtype": str(self.dtype),
        }
        features_TE = self._cache.read(key)
        if features_TE is None:
            features_TE = self._compute(text)
            self._cache.write(key, features_TE)
        return features_TE

    @torch.no_grad()
    def _compute(self, text: str) -> Tensor:
        tokenizer, model = self._load()
        tokens = tokenizer(text, max_length=self.max_length, truncation=True, return_tensors="pt").to(self.device)
        return model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0].float()

    @cached_property
    def _folder(self) -> Path:
        return local_folder(self.path, DEFAULT_NAME, _KEY)

    @cached_property
    def _fingerprint(self) -> str:
        return load_pretrained(lambda folder: fingerprint(Path(folder)), str(self._folder), DEFAULT_NAME, _KEY)

    def _load(self) -> tuple[Any, Any]:
        """Tokenizer and encoder, loaded once."""
        if self._loaded is None:
            from transformers import AutoTokenizer, T5EncoderModel

            def load(path: str) -> tuple[Any, Any]:
                model = T5EncoderModel.from_pretrained(path, dtype=self.dtype)
                return AutoTokenizer.from_pretrained(path, legacy=True), model.eval().requires_grad_(False)

            tokenizer, model = load_pretrained(load, str(self._folder), DEFAULT_NAME, _KEY)
            self._loaded = tokenizer, model.to(self.device)
        return self._loaded
