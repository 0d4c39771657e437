"""The restorer: a network, frozen outside its own stage, that cleans a degraded image before it is tokenised.

VARestorer uses DiffBIR's general SwinIR. The network itself comes from spandrel, which reads its size from
the weights; any 1x RGB restoration network that spandrel knows fits as well. A small model trains its own, an RCAN
that works at a quarter of the size (`new_restorer`).
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.utils.errors import UserError, reason
from varestorer.utils.images import pad_reflect
from varestorer.utils.seeds import derive_seed, isolated_rng
from varestorer.weights.bundles import RESTORER, is_bundle, tensors_file
from varestorer.weights.files import Differences, differences, read_tensors
from varestorer.weights.published import check_derived, published_restorer_name
from varestorer.weights.runs import is_run, load_run_weights
from varestorer.weights.shipped import shipped

PUBLISHED_SIZES = {
    "img_size": 64,
    "embed_dim": 180,
    "depths": [6] * 8,
    "num_heads": [6] * 8,
    "mlp_ratio": 2.0,
    "window_size": 8,
    "upscale": 8,
    "upsampler": "nearest+conv",
    "start_unshuffle": 8,
}
FEWEST_FEATURES = 16  # of an RCAN, whose attention looks at a sixteenth of them
MOST_MASKS = 4  # two for each size of image
DERIVED = (".attn_mask", ".relative_position_index")  # of a SwinIR: they follow from its sizes
PUBLISHED_FILE = "general_swinir_v1.ckpt"
_REMEDY = (
    f"get {PUBLISHED_FILE} (GeneralSwinIR of DiffBIR, hub lxq007/DiffBIR) and set model.restorer to it, or to a run of "
    "nano_restorer, a bundle, or nano, whose restorer comes with the package"
)


class Restorer(nn.Module):
    """A 1x restoration network that takes any image size, frozen unless `training.restorer` trains it.

    Attributes:
        network: the network; always in evaluation mode.
        multiple: sides the network sees are multiples of this (pixels).
        minimum: and at least this (pixels).
        use_bf16: make its matrix products in bfloat16, as the released restoration does (spec E).
    """

    def __init__(self, network: nn.Module, multiple: int = 1, minimum: int = 1) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        share_masks(network)
        self.multiple = multiple
        self.minimum = max(minimum, 1)
        self.use_bf16 = False

    def train(self, mode: bool = True) -> "Restorer":
        """Stay in evaluation mode: the network must not drop paths because its owner trains."""
        return super().train(False)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Restore images.

        Args:
            image_B3HW: RGB in [0, 1], any size.
        Returns:
            RGB of the same size, nominally in [0, 1] and not clamped, as the released code hands it on.
        """
        height, width = image_B3HW.shape[-2:]
        down, right = self._missing(height), self._missing(width)
        padded_B3HW = pad_reflect(image_B3HW, 0, down, 0, right)
        with torch.autocast(image_B3HW.device.type, torch.bfloat16) if self.use_bf16 else nullcontext():
            return self.network(padded_B3HW)[..., :height, :width].to(image_B3HW.dtype)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Tensors by the names that `load_restorer` reads, derived ones included."""
        unshuffled = getattr(self.network, "start_unshuffle", 1) > 1
        return {published_restorer_name(name, unshuffled): tensor for name, tensor in self.state_dict().items()}

    def _missing(self, length: int) -> int:
        """Pixels to add to a side of `length` pixels."""
        wanted = max(length, self.minimum)
        return -(-wanted // self.multiple) * self.multiple - length


def share_masks(network: nn.Module) -> None:
    """Let a SwinIR's blocks share the masks of their windows, kept where the network is.

    For images of another size than it was trained on, each block makes its own on the host in every pass, and the
    device waits for it.
    """
    kept: dict[Any, Tensor] = {}

    def shared(block: Any, make: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def mask(size: Any) -> Tensor:
            device = block.norm1.weight.device
            key = tuple(size), block.window_size, block.shift_size, device
            if key not in kept:
                if len(kept) >= MOST_MASKS:
                    kept.clear()
                kept[key] = make(size).to(device)
            return kept[key]

        return mask

    for block in network.modules():
        if isinstance(make := getattr(block, "calculate_mask", None), MethodType):
            block.calculate_mask = shared(block, make)  # type: ignore[assignment]


def new_restorer(num_features: int = 64, num_groups: int = 2, num_blocks: int = 5, seed: int = 0) -> Restorer:
    """A restorer to be trained: an RCAN (Zhang et al. 2018) that folds squares of 4 pixels into channels first.

    Args:
        num_features: channels, 16 or more.
        num_groups: residual groups.
        num_blocks: residual blocks of a group, two convolutions each.
        seed: of the random weights; the global generators are left as they were.

    Raises:
        UserError: too few channels.
    """
    from spandrel.architectures.RCAN import RCAN

    if num_features < FEWEST_FEATURES:
        raise UserError(f"model.restorer.num_features must be {FEWEST_FEATURES} or more, got {num_features}")
    sizes = {"n_feats": num_features, "n_resgroups": num_groups, "n_resblocks": num_blocks}
    with isolated_rng(derive_seed(seed, "restorer")):
        return Restorer(RCAN(scale=1, norm=False, unshuffle_mod=True, **sizes))


def load_restorer(path: str | Path, device: torch.device | str = "cpu") -> Restorer:
    """Load a restorer from a file, from a run or a bundle, or from a folder that holds the published file.

    Args:
        path: `.ckpt`, `.pth` or `.safetensors`; the tensors may lie under `state_dict`, named with or without
            the prefix `module.`. Of a run, the restorer that it trained; of a bundle, or the name of a shipped one,
            its `restorer.safetensors`.
        device: where it runs.
    Raises:
        UserError: no such file, a file that is not a plain set of tensors, or not a 1x RGB restorer.
    """
    file = shipped(path)
    if is_run(file):
        tensors = _of_run(file)
    else:
        if file.is_dir():
            file = tensors_file(file, RESTORER) if is_bundle(file) else file / PUBLISHED_FILE
        if not file.is_file():
            raise UserError(f"the restorer's weights were not found at {file}; {_REMEDY}")
        tensors = read_tensors(file, nested=("state_dict",))
    try:
        return restorer_from_state_dict(tensors).to(device)
    except UserError as error:
        raise UserError(f"{file}: {error}; {_REMEDY}") from error


def _of_run(run: Path) -> dict[str, Tensor]:
    """The tensors of the restorer that a run drew and trained, by the names of its network.

    Raises:
        UserError: it has none of its own.
    """
    prefix = "restorer.network."
    held = load_run_weights(run).items()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in held if name.startswith(prefix)}
    if not tensors:
        raise UserError(f"the run {run} has no restorer of its own; give a run of nano_restorer, or {PUBLISHED_FILE}")
    return tensors


def restorer_from_state_dict(state_dict: Mapping[str, Any]) -> Restorer:
    """Build a restorer whose architecture and size are read from its tensors.

    Args:
        state_dict: tensors by their published names, or wrapped and prefixed as `load_restorer` says; it is
            left as it is.
    Raises:
        UserError: tensors missing, left over or misshapen (they are listed), a derived tensor of another value, or
            not the tensors of a 1x RGB restorer.
    """
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError, canonicalize_state_dict

    tensors = dict(canonicalize_state_dict(dict(state_dict)))
    try:  # spandrel renames and pops entries of the dictionary it is given
        with _quiet():
            found = ModelLoader(device="cpu").load_from_state_dict(dict(tensors))
    except (UnsupportedModelError, RuntimeError, KeyError) as error:
        raise UserError(f"the tensors do not make a restorer ({_misfit(tensors, error)})") from error
    if not isinstance(found, ImageModelDescriptor) or (found.scale, found.input_channels) != (1, 3):
        got = f"{found.architecture.name}, {found.scale}x, of {found.input_channels} channels"
        raise UserError(f"a restorer must take RGB images and keep their size, got {got}")
    sizes = found.size_requirements
    restorer = Restorer(found.model, multiple=sizes.multiple_of, minimum=sizes.minimum)
    check_derived(restorer.published_state_dict(), _derived_tensors(restorer), "the restorer")
    return restorer


def published_restorer_tensors() -> dict[str, Tensor]:
    """A network of the published sizes by published names: random weights, and derived tensors as they must be."""
    from spandrel.architectures.SwinIR import SwinIR

    return _tensors_of(SwinIR, PUBLISHED_SIZES)


def _derived_tensors(restorer: Restorer) -> dict[str, Tensor]:
    """What a fresh network of the same sizes holds beside its weights, by published names."""
    network: Any = restorer.network
    if not any(name.endswith(DERIVED) for name in network.state_dict()):
        return {}
    fresh = _tensors_of(type(network), network.hyperparameters)
    return {name: tensor for name, tensor in fresh.items() if name.endswith(DERIVED)}


def _tensors_of(network: type[nn.Module], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a new network by published names; the global generator is left as it was."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        return Restorer(network(**sizes)).published_state_dict()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torch's warning about how spandrel's networks call it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.meshgrid")
        yield


def _misfit(tensors: Mapping[str, Tensor], error: Exception) -> str:
    """Which tensors are wrong, in one line.

    spandrel guesses sizes from the names it finds, so a file that lacks some can pass for a network of other sizes:
    what is nearly the published network is compared with that.
    """
    published = published_restorer_tensors()
    same = sum(name in tensors and tensors[name].shape == tensor.shape for name, tensor in published.items())
    found = differences(published, tensors) if same > len(published) / 2 else _torch_differences(str(error))
    if found:
        return str(found)
    from spandrel import UnsupportedModelError

    # tensors without a fault can still be none that this version of spandrel knows or can build
    return "spandrel knows no such architecture" if isinstance(error, UnsupportedModelError) else reason(error)


def _torch_differences(message: str) -> Differences:
    """The lists in the message of torch's `load_state_dict`."""

    def quoted(kind: str) -> list[str]:
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*)", message)
        return sorted(re.findall(r'"([^"]+)"', found[1])) if found else []

    misshapen = sorted(re.findall(r"size mismatch for (\S+):", message))
    return Differences(quoted("Missing"), quoted("Unexpected"), misshapen)


@torch.no_grad()
def restorer_intermediates(restorer: Restorer, image_B3HW: Tensor) -> dict[str, Tensor]:
    """Run a SwinIR and keep what golden tensors are compared with.

    Args:
        restorer: a restorer whose network is a SwinIR.
        image_B3HW: RGB in [0, 1].
    Returns:
        `conv_first` (B, C, h, w), `layer0`, `layer1`, ... (B, h*w, C) and `image01` (B, 3, H, W).
    """
    network: Any = restorer.network
    parts = {"conv_first": network.conv_first} | {f"layer{i}": part for i, part in enumerate(network.layers)}
    kept: dict[str, Tensor] = {}

    def keep_as(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.update({name: output})

    hooks = [part.register_forward_hook(keep_as(name)) for name, part in parts.items()]
    try:
        kept["image01"] = restorer(image_B3HW)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
