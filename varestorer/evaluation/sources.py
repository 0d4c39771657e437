"""Where the images to be scored come from: a folder of predictions, a restoration system, bicubic resizing.

A source is a callable `(name, lq_path) -> Candidate`; it raises UserError for an image that it cannot give.
"""

from __future__ import annotations

import json
import pickle
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from varestorer.evaluation.progress import IMAGES, SETTINGS, SUMMARY
from varestorer.evaluation.results import Pair
from varestorer.systems.base import System
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user, file_sha256, read_text
from varestorer.utils.finite import check_weights
from varestorer.utils.hub import is_hub_name
from varestorer.utils.images import load_image, resize
from varestorer.utils.scanning import list_images
from varestorer.utils.seeds import derive_seed
from varestorer.utils.tiling import restore_tiled
from varestorer.weights.bundle import is_bundle
from varestorer.weights.files import read_entries
from varestorer.weights.published.infinity import STUDENT_FILE
from varestorer.weights.published.varsr import network_kind
from varestorer.weights.resolve import locate
from varestorer.weights.runs import BEST, LATEST, is_run

TILE, OVERLAP = 256, 32
"""Side of the squares that larger images are cut into, and what neighbors share; pixels of the LQ image."""


@dataclass(frozen=True)
class Candidate:
    """An image to be scored, (3, H, W) RGB in [0, 1]."""

    image: Tensor
    seconds: float | None = None  # wall time that making it took; None when somebody else made it
    path: Path | None = None  # the file it was read from; None when it was made here


Source = Callable[[str, Path], Candidate]


class KnownSource:
    """A source that the command offers: it says what decides its images.

    Attributes:
        method: its name in tables.
        settings: with the same ones it gives the same images; see `progress`.
        runs_ahead: whether it may make an image while the one before is scored: if its work is done elsewhere (on a
            disk, on an accelerator). On a CPU the two would only take the cores from each other.
    """

    method: str
    settings: dict[str, Any]
    runs_ahead: bool = False

    def __call__(self, name: str, lq_path: Path) -> Candidate:
        """Make the image for a low-quality one; its seconds include moving it to a device and back.

        UserError for an unreadable file, or too little memory for it.
        """
        lq_3hw = load_image(lq_path)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                image = self.make(name, lq_3hw).float().cpu()
        except torch.OutOfMemoryError as error:
            raise UserError(f"not enough GPU memory for {lq_path} (try device=cpu)") from error
        return Candidate(image, seconds=time.perf_counter() - start)

    def make(self, name: str, lq_3hw: Tensor) -> Tensor:
        """The image (3, H, W) for a low-quality one of this name."""
        raise NotImplementedError


def source_keys(what: str) -> dict[str, str]:
    """Which options of `eval` a word of compare= stands for: `method`, `predictions`, `model_path` or `ckpt`.

    UsageError: nothing is there, or the folder of an evaluation whose settings cannot be read.
    """
    path = expand_user(what)
    if what == "bicubic":
        return {"method": "bicubic"}
    if path.is_file() and path.name not in (STUDENT_FILE, LATEST, BEST):
        is_varsr = path.suffix.lower() in (".pth", ".safetensors") and network_kind(read_entries(path)) is not None
        return {"ckpt": what} if is_varsr else {"method": "spandrel", "model_path": what}
    if (path / SUMMARY).is_file():  # of an evaluation, which made its images or scored those of a folder
        settings = path / SETTINGS
        try:
            made = path / IMAGES
            return {"predictions": str(made if made.is_dir() else json.loads(read_text(settings))["predictions"])}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"compare: {settings} does not say where the images are ({reason(error)})") from error
    if path.is_dir() and not is_run(path) and not is_bundle(path) and list_images(path):
        return {"predictions": what}
    if not is_hub_name(what) and not locate(what, {}).exists():
        raise UsageError(f"compare: {what} is not here; give bicubic, a model, or a folder of images")
    return {"ckpt": what}


class FolderSource(KnownSource):
    """Images that somebody else made, matched to the data set by name: path inside the folder, or file stem.

    A stem counts only if no other image of the data set has it too: an image is the prediction of one pair. So the
    pairs are the whole data set, also where only a part is asked for; `match` gives them later. UsageError: not a
    folder, or no images in it or its subfolders.
    """

    runs_ahead = True

    def __init__(self, folder: str | Path, pairs: Sequence[Pair] = ()) -> None:
        self.folder = expand_user(folder)
        self.method = self.folder.name
        self.settings = {"predictions": str(self.folder.resolve())}
        if not self.folder.is_dir():
            raise UsageError(f"predictions must be a folder of images, and {self.folder} is not a folder")
        self.paths: dict[str, list[Path]] = {}
        for path in list_images(self.folder):
            for key in {self._own_key(path), _key(path.stem)}:
                self.paths.setdefault(key, []).append(path)
        if not self.paths:
            raise UsageError(f"predictions must be a folder of images, and {self.folder} holds none")
        self.match(pairs)

    def match(self, pairs: Sequence[Pair]) -> None:
        """Note the data set, whose images contend for the predictions."""
        self.pairs = pairs
        self.own = {key: name for name, lq, _ in pairs for key in _keys(name, lq)[:2]}
        self.sharing: dict[str, list[str]] = {}
        for name, lq, _ in pairs:
            for key in _keys(name, lq)[2:]:
                self.sharing.setdefault(key, []).append(name)

    def find(self, name: str, lq_path: Path) -> Path:
        """The prediction for `name`; UserError when there is none, or more than one, or it may be that of another."""
        found: list[Path] = []
        for number, key in enumerate(_keys(name, lq_path)):
            found = [path for path in self.paths.get(key, []) if self.own.get(self._own_key(path), name) == name]
            rivals = self.sharing.get(key, [])
            is_own = number < 2 and all(self._own_key(path) == key for path in found)
            if found and not is_own and len(rivals) > 1:
                raise UserError(
                    f"{found[0]} could be the prediction for {', '.join(rivals[:5])}: "
                    "put predictions into the same subfolders as the images they belong to"
                )
            if found:
                break
        if len(found) != 1:
            problem = ", ".join(path.name for path in found) if found else "none"
            raise UserError(f"wanted one prediction {name}.* in {self.folder}, found {problem}")
        return found[0]

    def _own_key(self, path: Path) -> str:
        return _key(path.relative_to(self.folder).with_suffix("").as_posix())

    def __call__(self, name: str, lq_path: Path) -> Candidate:
        """Read the prediction for `name`; UserError when there is none, more than one, or a broken one."""
        path = self.find(name, lq_path)
        return Candidate(load_image(path), path=path)


def _key(name: str) -> str:
    """macOS writes accents as letters of their own."""
    return unicodedata.normalize("NFC", name)


def _keys(name: str, lq_path: Path) -> list[str]:
    """What the prediction of a pair may be called: two paths that are its own, then stems that others may share."""
    folder, slash, stem = _key(name).rpartition("/")
    lq_stem = _key(lq_path.stem)
    return [_key(name), f"{folder}{slash}{lq_stem}", *dict.fromkeys([stem, lq_stem])]


class BicubicSource(KnownSource):
    """Bicubic upsampling by `scale` of the low-quality image: the baseline below all others."""

    method = "bicubic"

    def __init__(self, scale: int = 4) -> None:
        self.scale = scale
        self.settings = {"method": "bicubic", "scale": scale}

    def make(self, name: str, lq_3hw: Tensor) -> Tensor:
        """Upsample one image."""
        height, width = lq_3hw.shape[-2:]
        return resize(lq_3hw, (height * self.scale, width * self.scale), mode="bicubic")


class SystemSource(KnownSource):
    """Restores the low-quality image with a system of any paper.

    Args:
        system: ready to restore.
        scale: side of the output over side of the input.
        seed: each image gets a seed of its own, derived from this one and its name.
        settings: what is known of the system, such as the digest of its weights.
        steps: as `VARestorer.restore` takes them.
        size: side of the result over that of the input, of a system that gives several from one pass; None: `scale`.
    """

    def __init__(
        self,
        system: System,
        scale: int = 4,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        steps: str | int = "one",
        size: float | None = None,
    ) -> None:
        self.system, self.scale, self.seed = system, scale, seed
        sizes = {} if size is None else {"sizes": [size]}
        self.options: dict[str, Any] = {"steps": None if steps == "one" else steps, **sizes}
        named = (settings or {}).get("ckpt", type(system).__name__)  # not the paper's name: it is another's model
        self.method = f"{named}{'' if steps == 'one' else f', steps={steps}'}"
        self.settings = {**(settings or {}), "scale": scale, "seed": seed, "steps": str(steps), **sizes}
        self.runs_ahead = getattr(getattr(system, "device", None), "type", "cpu") != "cpu"

    def make(self, name: str, lq_3hw: Tensor) -> Tensor:
        """Restore one image; as `trained_scale` is the scale, the network itself is measured."""
        options = {"seed": derive_seed(self.seed, name), "trained_scale": self.scale, **self.options}
        return self.system.restore(lq_3hw, self.scale, **options).image


class ReconstructionSource(KnownSource):
    """Sends the good image through the bits of a system's tokenizer: no restoration by them can be better.

    Settings are what is known of the system, such as the digest of its weights.
    """

    method = "tokenizer (reconstruction of HQ)"

    def __init__(self, system: System, settings: dict[str, Any]) -> None:
        self.system = system
        self.settings = {"method": "tokenizer", **settings}
        self.runs_ahead = system.device.type != "cpu"

    def make(self, name: str, lq_3hw: Tensor) -> Tensor:
        """Reconstruct an image, which is the good one here."""
        return self.system.reconstruct(lq_3hw)


def weights_digest(module: nn.Module) -> str:
    """Tell one set of weights from another: the SHA-256 of the names, shapes and first and last values of all.

    A step of training changes it, a copy of the files does not; it takes no time with large models either.
    """
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        ends = [flat[:4].double().tolist(), flat[-4:].double().tolist()]
        digest.update(f"{name} {tuple(tensor.shape)} {ends}\n".encode())
    return digest.hexdigest()[:16]


class SpandrelSource(KnownSource):
    """Enlarges the low-quality image with a model file that spandrel knows; one of scale 1 cleans the enlarged image.

    Weights of any precision run in float32, so that a figure does not depend on the machine.

    Raises:
        UsageError: no such file, no model that spandrel knows, or one of another kind or scale.
        UserError: its weights are not finite.
    """

    def __init__(self, model_path: str | Path, scale: int = 4, device: torch.device | str = "cpu") -> None:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

        self.path = expand_user(model_path)
        self.device = torch.device(device)
        if not self.path.is_file():
            raise UsageError(f"model_path must be the file of a super-resolution model, and {self.path} is no file")
        try:
            model = ModelLoader("cpu").load_from_file(self.path)
        except UnsupportedModelError as error:
            known = "its page lists those it loads"
            raise UsageError(f"spandrel knows no model of the form of {self.path}; {known}") from error
        except (OSError, ValueError, RuntimeError, LookupError, SafetensorError, pickle.UnpicklingError) as error:
            raise UsageError(f"model_path={self.path} cannot be read as a model: {reason(error)}") from error
        if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
            raise UsageError(f"{self.path.name} ({model.architecture.name}) does not turn an RGB image into another")
        check_weights(dict(model.model.named_parameters()), f"model_path={self.path}")
        self.model: Any = model.to(self.device).float().eval()
        if self.model.scale not in (1, scale):
            known = f"{self.path.name} ({self.model.architecture.name}) enlarges {self.model.scale} times"
            raise UsageError(f"{known}, and scale={scale} was asked for; use scale={self.model.scale}")
        self.scale = scale // self.model.scale  # by which bicubic resizing enlarges first
        self.method = f"{self.path.stem} ({self.model.architecture.name})"
        self.settings: dict[str, Any] = {
            "method": "spandrel",
            "model_path": f"{self.path.name} (SHA-256 {file_sha256(self.path)[:16]})",
        }
        self.runs_ahead = self.device.type != "cpu"

    def make(self, name: str, lq_3hw: Tensor) -> Tensor:
        """(3, h, w) in [0, 1] to (3, h * scale, w * scale) on the CPU, whole or in tiles."""
        height, width = (self.scale * side for side in lq_3hw.shape[-2:])
        if self.scale > 1:
            lq_3hw = resize(lq_3hw, (height, width), mode="bicubic")
        if max(height, width) <= TILE:
            return self._run(lq_3hw[None])[0]

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            # the tiles are blended at the size of the input: there an output pixel is a channel
            return pixel_unshuffle(self._run(tiles_B3tt), self.model.scale)

        blended = restore_tiled(lq_3hw, (height, width), TILE, OVERLAP, 1, run)
        return pixel_shuffle(blended, self.model.scale).clamp(0, 1)

    def _run(self, lq_B3hw: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(lq_B3hw.to(self.device)).float().cpu()
