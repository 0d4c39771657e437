"""Loading transformers models from a folder or the hub, with errors a newcomer can act on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from varestorer.utils.errors import UserError

Loaded = TypeVar("Loaded")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_pretrained(load: Callable[[str], Loaded], path: str, default: str, key: str) -> Loaded:
    """Call `load(path)` and turn what transformers raises into one line.

    Args:
        load: loads from a folder or a hub name, e.g. `T5EncoderModel.from_pretrained`.
        path: the folder or hub name.
        default: hub name of what is expected there, for the message.
        key: configuration key that holds `path`, for the message.
    Raises:
        UserError: nothing there, or nothing that can be loaded.
    """
    remedy = f"download {default} from the Hugging Face hub and set {key} to its folder"
    if not Path(path).is_dir() and not _HUB_NAME.fullmatch(path):
        raise UserError(f"{key} must be a folder or a hub name, but {path} does not exist; {remedy}")
    try:
        return load(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}={path} cannot be loaded as {default} ({reason}); {remedy}") from error
