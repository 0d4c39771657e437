"""The one door to pyiqa: image quality metrics for the evaluator, and weight files for the perceptual losses.

pyiqa is slow to import, prints, reads the global random generators and fetches weights with long retries.
Behind this door a metric is silent, gives the same figure every time, leaves the caller's generators alone,
and says at once, in one line, when something that it needs is not there.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.iqa_weights import (
    WEIGHT_FILES,
    find_weights,
    hub_folder,
    missing_package,
    missing_weights,
    weights_sha256,
)
from varestorer.utils.seeds import isolated_rng

log = logging.getLogger(__name__)

DATASET_METRICS = frozenset({"fid", "sfid", "fid_dinov2", "inception_score"})
"""Metrics of whole folders: they have no value for a single image."""

BATCHABLE = frozenset({"psnr", "ssim", "lpips", "dists", "niqe"})
"""Metrics that gave each image of a batch the score that it has alone, bit for bit (measured on a CPU, batches of 2, 4
and 8). Others draw patches, or were never measured: they see one image at a time."""

HOSTS = {
    "checkpoints": "https://download.pytorch.org/models",
    "pyiqa": "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main",
}
"""Where torchvision and pyiqa fetch the files of a folder of the hub folder from."""

# What building or calling somebody else's network can raise when a file, a package or an image is not as it
# expects it. Anything else is a bug and should be seen.
METRIC_ERRORS = (
    OSError,
    ImportError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
)


class MetricUnavailableError(UserError):
    """A metric cannot run on this machine; one line says what is missing and where it belongs."""


@dataclass(frozen=True)
class Metric:
    """A metric that is ready to use; made by `create_metric`.

    Attributes:
        name: pyiqa's name.
        model: pyiqa's wrapper around the network, in evaluation mode.
        needs_reference: whether it compares with a reference image, or with a folder of them.
        lower_is_better: direction of the score.
        options: pyiqa's options, where they differ from its defaults.
        weights: SHA-256 of its weight files, see `weights_sha256`; None without weights.
        seed: of the patches that some metrics draw.
    """

    name: str
    model: Any = field(repr=False)
    needs_reference: bool
    lower_is_better: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    seed: int = 0

    @property
    def is_of_folders(self) -> bool:
        """Whether it scores a whole folder, and no single image."""
        return self.name in DATASET_METRICS

    @property
    def takes_batches(self) -> bool:
        """Whether scores do not depend on the other images of a batch."""
        return self.name in BATCHABLE

    @property
    def id(self) -> str:
        """See `metric_id`."""
        return metric_id(self.name, self.options)

    def __call__(self, image_B3HW: Tensor, reference_B3HW: Tensor | None = None) -> Tensor:
        """Score images (B, 3, H, W), RGB in [0, 1]: (B,) float64 on the CPU, always the same for the same images.

        ValueError: no reference where `needs_reference`, or one of another shape. Any of METRIC_ERRORS: the metric does
        not accept the images (too small, for example).
        """
        if self.needs_reference and (reference_B3HW is None or reference_B3HW.shape != image_B3HW.shape):
            got = "none" if reference_B3HW is None else tuple(reference_B3HW.shape)
            raise ValueError(f"{self.name} needs a reference of shape {tuple(image_B3HW.shape)}, got {got}")
        inputs = (image_B3HW, reference_B3HW) if self.needs_reference else (image_B3HW,)
        with torch.no_grad(), quiet(), isolated_rng(self.seed):
            score = self.model(*inputs)
        return torch.as_tensor(score).detach().to("cpu", torch.float64).reshape(image_B3HW.shape[0])

    def score_folders(self, images: str | Path, references: str | Path) -> float:
        """Score a folder of images against a folder of references (FID); for `DATASET_METRICS` only.

        Any of METRIC_ERRORS: an unreadable folder, or too few images.
        """
        inputs = (str(images),) if self.name == "inception_score" else (str(images), str(references))
        with quiet(), isolated_rng(self.seed):
            score = self.model(*inputs, num_workers=0, verbose=False)
        return float(score["inception_score_mean"] if isinstance(score, dict) else score)


def create_metric(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    weights_folder: str | Path | None = None,
    offline: bool | None = None,
    seed: int = 0,
) -> Metric:
    """Build a metric of pyiqa, by its name, e.g. `psnr`, `lpips`, `maniqa-pipal`.

    Args:
        options: pyiqa's for it, e.g. `{"test_y_channel": True, "color_space": "ycbcr"}`.
        weights_folder: searched for weight files before torch's hub folder.
        offline: never touch the network; None: when HF_HUB_OFFLINE is set. When online, pyiqa fetches missing files
            into torch's hub folder.
        seed: of the patches that some metrics draw.
    Raises:
        MetricUnavailableError: a weight file or a Python package is missing, or the metric cannot be built.
        UsageError: pyiqa knows no metric of this name.
    """
    offline = _is_offline() if offline is None else offline
    missing = missing_weights(name, weights_folder)
    is_complete = name in WEIGHT_FILES and not missing
    if missing and not offline:
        ask_network()  # it answers while pyiqa is imported
    config = metric_config(name)
    may_download = not is_complete and not offline and network_reachable()
    _check_available(name, [] if may_download else missing, offline)
    opts = dict(options or {})
    # shown to pyiqa instead of its own folder
    found = {} if weights_folder is None or missing else find_weights(name, weights_folder)
    given = {place: path for place, path in found.items() if not place.startswith("hf:")}
    try:
        downloads = nullcontext() if may_download else no_downloads()
        with quiet(), isolated_rng(seed), weights_in_place(given), downloads:
            model = _pyiqa().create_metric(name, device=torch.device(device), **opts)
    except METRIC_ERRORS as error:
        what = f"could not fetch {'; '.join(missing)}" if missing else "cannot be built"
        raise MetricUnavailableError(f"metric {name!r} {what}: {reason(error)}") from error
    return Metric(
        name=name,
        model=model,
        needs_reference=needs_reference(name),
        lower_is_better=bool(config.get("lower_better", False)),
        options=opts,
        weights=weights_sha256(name, weights_folder),
        seed=seed,
    )


def weight_files(name: str) -> list[Path]:
    """The backbone's file and the metric's own of LPIPS or DISTS (`lpips`, `lpips-vgg`, `dists`), for our own networks.

    Without pyiqa; missing ones are fetched when online. MetricUnavailableError: one is missing (one line: which, and
    where it belongs).
    """
    if missing := missing_weights(name):
        offline = _is_offline()
        _check_available(name, [] if not offline and network_reachable() else missing, offline)
        try:
            for entry in WEIGHT_FILES[name]:
                if not (place := hub_folder() / entry).is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    start_of_hash = place.stem.rpartition("-")[2]
                    url = f"{HOSTS[entry.split('/')[0]]}/{place.name}"
                    torch.hub.download_url_to_file(url, str(place), start_of_hash, progress=False)
        except (OSError, RuntimeError) as error:
            raise MetricUnavailableError(f"could not fetch {'; '.join(missing)}: {reason(error)}") from error
    return [hub_folder() / entry for entry in WEIGHT_FILES[name]]


def metric_config(name: str) -> Mapping[str, Any]:
    """pyiqa's description of a metric: `metric_mode` (FR or NR), `lower_better`, ...; UsageError if unknown."""
    _pyiqa()
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    if name not in DEFAULT_CONFIGS:
        close = get_close_matches(name, DEFAULT_CONFIGS, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"pyiqa has no metric {name!r}{hint} (python -m pyiqa.pyiqa_cmd -ls lists them)")
    return DEFAULT_CONFIGS[name]


def metric_id(name: str, options: Mapping[str, Any]) -> str:
    """pyiqa's name and the options set, e.g. `psnr[color_space=ycbcr,test_y_channel=True]`."""
    listed = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{name}[{listed}]" if listed else name


def reads_plainly(path: str | Path, image_3HW: Tensor) -> bool:
    """Whether pyiqa's metrics of folders see these pixels (uint8) in a file.

    They know nothing but `convert("RGB")`, and miss orientation, depth, ranges and color profiles.
    """
    try:
        with Image.open(path) as file:
            seen_HW3 = np.asarray(file.convert("RGB"))
    except METRIC_ERRORS:
        return False
    return np.array_equal(seen_HW3, image_3HW.permute(1, 2, 0).numpy())


def needs_reference(name: str) -> bool:
    """Whether a metric compares with references; pyiqa counts FID among those that need none. UsageError if unknown."""
    compares = metric_config(name).get("metric_mode") == "FR"
    return compares or name in DATASET_METRICS - {"inception_score"}


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _check_available(name: str, missing: Sequence[str], offline: bool) -> None:
    """Say in one line (MetricUnavailableError) what a metric lacks: a Python package, or the files `missing`."""
    package = missing_package(name)
    problems = [package] if package else []
    if missing:
        why = "offline" if offline else "the network cannot be reached"
        problems.append(f"needs {'; '.join(missing)}: not there, and {why}")
    if problems:
        raise MetricUnavailableError(f"metric {name!r} {'; '.join(problems)}")


@cache
def _pyiqa() -> Any:
    """Import pyiqa without its chatter; MetricUnavailableError without it: training and restoring do without."""
    try:
        with quiet():
            import pyiqa
    except ImportError as error:
        raise MetricUnavailableError(f"metrics need pyiqa (pip install pyiqa): {reason(error)}") from error
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    return pyiqa


class _Printed(StringIO):
    """What was printed inside `quiet`."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep prints and warnings of other people's code off the terminal (to our debug log instead).

    A block inside another adds nothing: what it would put back, another thread may have changed since.
    """
    if isinstance(sys.stdout, _Printed):
        yield
        return
    printed = _Printed()
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("ignore")
        yield
    if text := printed.getvalue().strip():
        log.debug("pyiqa printed: %s", text)


@contextmanager
def weights_in_place(files: Mapping[str, Path]) -> Iterator[None]:
    """Make pyiqa and torch look for weights in a hub folder that holds just these files.

    Args:
        files: place inside the hub folder (`pyiqa/x.pth`) -> the file; none: leave the hub folder as it is.
    """
    from pyiqa.utils import download_util

    with tempfile.TemporaryDirectory(prefix="varestorer-metrics-") as temporary:
        # links, because pyiqa takes some files by folder and some by name
        for place, path in files.items():
            link = Path(temporary, place)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        with ExitStack() as stack:
            if files:
                stack.callback(torch.hub.set_dir, torch.hub.get_dir())
                torch.hub.set_dir(temporary)
            # pyiqa remembers the folder of when it was imported; TORCH_HOME may have been set since
            folder = str(Path(torch.hub.get_dir(), "pyiqa"))
            stack.enter_context(patch.object(download_util, "DEFAULT_CACHE_DIR", folder))
            yield


@contextmanager
def no_downloads() -> Iterator[None]:
    """Make every way in which pyiqa fetches files fail at once: for metrics outside our table of files."""
    import huggingface_hub.constants
    from pyiqa.utils import download_util

    def refuse(url: Any, *args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(f"{Path(str(url)).name} is not on this machine and was not fetched")

    with (
        patch.object(download_util, "download_url_to_file", refuse),
        patch.object(torch.hub, "download_url_to_file", refuse),
        patch.object(urllib.request, "urlopen", refuse),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@cache
def ask_network(url: str = "https://huggingface.co") -> tuple[threading.Thread, threading.Event]:
    """Ask the host of the weights for an answer, once, in a thread: name servers may take longer than any timeout.

    Gives the thread, and what is set once the host has answered.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except OSError as error:
            return log.debug("%s does not answer: %s", url, reason(error))
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread, answered


@cache
def network_reachable() -> bool:
    """Whether the host of the weights answers: at once if `ask_network` was called long enough before."""
    thread, answered = ask_network()
    thread.join(0.8)  # seconds
    return answered.is_set()
