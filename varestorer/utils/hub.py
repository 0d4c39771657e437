"""Names on the Hugging Face hub."""

import re


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a repository on the hub, `owner/name`, and not of a weights file in a folder."""
<<<<<<< ours
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not text.endswith((".pth", ".ckpt", ".safetensors"))
=======
    is_name = re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", text) is not None
    return is_name and not text.endswith((".pth", ".ckpt", ".safetensors"))


def first_line(error: Exception) -> str:
    """The first line of an error's message; the libraries' messages run over several."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
>>>>>>> theirs
