"""Text features for the transformer by the encoder of flan-t5-xl, kept on the disk: a prompt is encoded once.

Letters: `T` tokens of the prompt, `E` width of the text encoder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varestorer.conditioning.pretrained import Pretrained, fingerprint, load_pretrained
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import atomic_write, cache_folder, utf8_path

logger = logging.getLogger(__name__)
DEFAULT_NAME = "google/flan-t5-xl"
DEFAULT_WIDTH = 2048  # of its features; networks of another width were trained without it
MAX_LENGTH = 512

_PEOPLE = (
    "man woman men women boy girl child person human adult teenager employee employer worker "
    "mother father sister brother grandmother grandfather son daughter"
).split()
_FACES = ". very smooth faces, good looking faces, face to the camera, perfect facial features"
_NAME = "features"

CacheKey = Mapping[str, str | int | bool]
"""All that features depend on, by name."""


def add_positive_prompt(prompt: str) -> str:
    """Ask for good faces when a prompt seems to be about people, as Infinity's option does.

    A word counts wherever its letters appear, in lower case only: `manual` contains `man` (kept as released).
    """
    return prompt + _FACES if any(word in prompt for word in _PEOPLE) else prompt


class TextEncoder(Pretrained):
    """T5 encoder that remembers features on the disk and is loaded when a prompt is new.

    Args:
        path: folder as transformers saves it, or a name on the hub.
        device: where it runs.
        dtype: of its weights; float16 on CUDA as released, else float32.
        max_length: longest prompt in tokens, the end token included; the rest is cut off.
        cache: folder of the remembered features; "default" for the folder `text` in `cache_folder()`, None for none.
    """

    default, key = DEFAULT_NAME, "text_encoder"

    def __init__(
        self,
        path: str = DEFAULT_NAME,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int = MAX_LENGTH,
        cache: str | Path | None = "default",
    ) -> None:
        super().__init__(path, device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.max_length = max_length
        remembered = cache_folder() if cache == "default" else None
        folder = cache if remembered is None else remembered / "text"
        self._cache = None if folder in (None, "default") else TextCache(Path(folder))

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
    def _fingerprint(self) -> str:
        return load_pretrained(lambda path: fingerprint(Path(path)), str(self._folder), DEFAULT_NAME, self.key)

    def _open(self, path: str) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, T5EncoderModel

        model = T5EncoderModel.from_pretrained(path, dtype=self.dtype)
        return AutoTokenizer.from_pretrained(path, legacy=True), model


class TextCache:
    """One safetensors file for each set of features, named by the hash of all that they depend on.

    The folder is made when it is first written to. Trouble with the disk is a warning and never an error: the features
    can be computed without it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_writable = True

    def path(self, key: CacheKey) -> Path:
        """The file of a key, which need not exist."""
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    def read(self, key: CacheKey) -> Tensor | None:
        """Features (T, E) of a key; None if they are not there, or damaged."""
        path = self.path(key)
        try:
            with utf8_path(path) as plain, safe_open(plain, "pt") as file:
                features_TE = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("the cached text features %s cannot be read and are made again (%s)", path, reason(error))
            return None
        if checksum != _checksum(features_TE):
            logger.warning("the cached text features %s are damaged and are made again", path)
            return None
        return features_TE

    def write(self, key: CacheKey, features_TE: Tensor) -> None:
        """Keep the features (T, E) of a key."""
        if not self._is_writable:
            return
        features_TE = features_TE.cpu().contiguous()
        about = {"key": json.dumps(key, sort_keys=True), "sha256": _checksum(features_TE)}
        try:
            with atomic_write(self.path(key)) as temporary:
                save_file({_NAME: features_TE}, temporary, metadata=about)
        except UserError as error:
            self._is_writable = False  # say it once
            logger.warning("text features are not cached: %s (VARESTORER_CACHE names another folder)", error)


def _checksum(features_TE: Tensor) -> str:
    return hashlib.sha256(features_TE.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
