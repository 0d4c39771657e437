"""Names on the Hugging Face hub."""

import re


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a repository on the hub, `owner/name`, and not of a weights file in a folder."""
    is_name = re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", text) is not None
    return is_name and not text.endswith((".pth", ".ckpt", ".safetensors"))
