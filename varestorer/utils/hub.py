"""Names on the Hugging Face hub."""

import re


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a repository on the hub, `owner/name`, and not of a weights file in a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not text.endswith((".pth", ".ckpt", ".safetensors"))
