"""Restorers from files: published ones, those of runs and bundles; spandrel reads their sizes from the tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.conditioning.restorer import PUBLISHED_SIZES, Restorer
from varestorer.utils.errors import UserError, reason
from varestorer.weights.bundle import RESTORER, is_bundle, shipped, tensors_file
from varestorer.weights.files import Differences, differences, read_tensors
from varestorer.weights.published import RESTORER_FILE, check_derived
from varestorer.weights.runs import is_run, load_run_weights

DERIVED = (".attn_mask", ".relative_position_index")  # of a SwinIR: they follow from its sizes
_REMEDY = (
    f"get {RESTORER_FILE} (GeneralSwinIR of DiffBIR, hub lxq007/DiffBIR) and set model.restorer to it, or to a run of "
    "nano_restorer, a bundle, or nano, whose restorer comes with the package"
)


def load_restorer(path: str | Path) -> Restorer:
    """Load a restorer from a file, from a run or a bundle, or from a folder that holds the published file.

    A file is `.ckpt`, `.pth` or `.safetensors`; the tensors may lie under `state_dict`, named with or without the
    prefix `module.`. Of a run, it is the restorer that it trained; of a bundle, or the name of a shipped one, its
    `restorer.safetensors`. UserError: no such file, one that is not a plain set of tensors, or not a 1x RGB restorer.
    """
    file = shipped(path)
    if is_run(file):
        prefix = "restorer.network."
        held = load_run_weights(file).items()
        tensors = {name.removeprefix(prefix): tensor for name, tensor in held if name.startswith(prefix)}
        if not tensors:
            told = f"give a run of nano_restorer, or {RESTORER_FILE}"
            raise UserError(f"the run {file} has no restorer of its own; {told}")
    else:
        if file.is_dir():
            file = tensors_file(file, RESTORER) if is_bundle(file) else file / RESTORER_FILE
        if not file.is_file():
            raise UserError(f"the restorer's weights were not found at {file}; {_REMEDY}")
        tensors = read_tensors(file, nested=("state_dict",))
    try:
        return restorer_from_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}; {_REMEDY}") from error


def restorer_from_state_dict(state_dict: Mapping[str, Any]) -> Restorer:
    """Build a restorer whose architecture and size are read from its tensors, named as `load_restorer` says.

    UserError: tensors missing, left over or misshapen (they are listed), a derived tensor of another value, or not the
    tensors of a 1x RGB restorer.
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
    network: Any = restorer.network
    if any(name.endswith(DERIVED) for name in network.state_dict()):
        fresh = _tensors_of(type(network), network.hyperparameters)
        derived = {name: tensor for name, tensor in fresh.items() if name.endswith(DERIVED)}
        check_derived(restorer.published_state_dict(), derived, "the restorer")
    return restorer


def published_restorer_tensors() -> dict[str, Tensor]:
    """A network of the published sizes by published names: random weights, and derived tensors as they must be."""
    from spandrel.architectures.SwinIR import SwinIR

    return _tensors_of(SwinIR, PUBLISHED_SIZES)


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
