"""Names on the Hugging Face hub, and what it answers, in one line."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import check_room, in_bytes

LOG = logging.getLogger(__name__)
CACHE_OPTIONS = ("cache_dir", "token")
SMALL = 1e5  # bytes that nobody need be told of
PLACE = "HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none"


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a repository on the hub, `owner/name` or `owner/name@revision`, and not of a
    weights file in a folder."""
    is_name = re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?", text) is not None
    return is_name and not text.endswith((".pth", ".ckpt", ".safetensors"))


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` as its two parts; None where no revision is named."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


@contextmanager
def asking_hub(what: str, error_type: type[UserError] = UserError, remedy: str = "") -> Iterator[None]:
    """Around calls of huggingface_hub that ask for `what`: their errors become one line, with `remedy` at its end.

    Their warnings of every retry are not shown.
    """
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # of whichever HTTP library this version of huggingface_hub has
        raise error_type(f"the hub does not give {what}: {_why(error)}{remedy and f'; {remedy}'}") from error
    finally:
        log.setLevel(level)


def fetch_folder(name: str, patterns: list[str], **options: Any) -> Path:
    """Files of a repository in the hub's cache, their size said first; where no hub is, those of the cache will do.

    Options are `revision`, `cache_dir`, ... of `snapshot_download`. UserError: there is no room. OSError and others: of
    huggingface_hub, see `asking_hub`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *words: Any, **settings: Any) -> None:
            super().__init__(*words, **(settings | {"disable": True}))

    with suppress(OSError):
        files = snapshot_download(name, allow_patterns=patterns, dry_run=True, tqdm_class=NoBar, **options)
        size = sum(file.file_size or 0 for file in files if file.will_download)
        if size > SMALL:
            LOG.info("fetching %s of %s", in_bytes(size), name)
            check_room(Path(options.get("cache_dir") or constants.HF_HUB_CACHE), size)
    return Path(snapshot_download(name, allow_patterns=patterns, **options))


def _why(error: BaseException) -> str:
    """What happened and what can be done, by the kinds of errors that all versions of huggingface_hub share."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "its owners want their terms accepted first, on its page, and then a token (hf auth login, or HF_TOKEN)"
    if "RepositoryNotFoundError" in kinds:
        return "it has no such repository, or a private one (hf auth login, or HF_TOKEN)"
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision"
    if "RemoteEntryNotFoundError" in kinds or kinds >= {"EntryNotFoundError", "HfHubHTTPError"}:
        return "there is no such file in the repository"
    if "OfflineModeIsEnabled" in kinds or "LocalEntryNotFoundError" in kinds:
        return f"it is not in the cache, and the hub cannot be reached, or may not be asked ({PLACE})"
    if kinds & {"ConnectError", "ConnectionError", "TimeoutException", "Timeout"}:
        return f"it cannot be reached ({PLACE}): {reason(error)}"
    return reason(error)
