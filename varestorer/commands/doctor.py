"""`varestorer doctor`: whether an installation is whole, and what it lacks."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import DoctorOptions
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.systems import load
from varestorer.utils.device import gains_from_bf16, has_amx, pick_device, usable_cores
from varestorer.utils.errors import UserError
from varestorer.utils.files import cache_folder, file_sha256
from varestorer.utils.iqa import ask_network
from varestorer.utils.iqa_weights import WEIGHT_FILES, find_weights, hub_folder, missing_package
from varestorer.weights import DEFAULT
from varestorer.weights.releases import cached, in_bytes, of_metric, published_files, releases

GOOD, LACKING, WRONG = "ok", "lacking", "WRONG"
Line = tuple[str, str, str]
"""(state, what was looked at, what was found)."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # through which data workers hand over their batches
MIN_SHARED, MIN_DISK = 1e9, 10e9  # bytes


def doctor(options: DoctorOptions) -> int:
    """Look at everything (`DoctorOptions`) and say it; exit status 1 if something that is not optional is wrong."""
    states = []
    for part in (packages(), device(options.device), models(), metrics(options.metrics), places()):
        for state, what, found in part:
            states.append(state)
            say(f"{state:7} {what}: {found}")
    say(f"{states.count(GOOD)} ok, {states.count(LACKING)} lacking (optional), {states.count(WRONG)} wrong")
    return FAILED if WRONG in states else OK


def packages() -> Iterator[Line]:
    """Versions against those that are required, and optional extras."""
    yield GOOD, "python", f"{platform.python_version()} on {platform.platform()}"
    try:
        wanted = [Requirement(text) for text in requires("varestorer") or []]
    except PackageNotFoundError:
        yield LACKING, "varestorer", "not installed, run from its folder: versions cannot be checked; pip install -e ."
        return
    fine = [f"varestorer {version('varestorer')}"]
    extras = [name for name in metadata("varestorer").get_all("Provides-Extra") or [] if name != "dev"]
    for one in wanted:
        extra = None
        if one.marker and not one.marker.evaluate({"extra": ""}):
            extra = next((name for name in extras if one.marker.evaluate({"extra": name})), None)
            if extra is None:
                continue
        remedy = f'pip install "varestorer[{extra}]"' if extra else f'pip install "{one.name}{one.specifier}"'
        try:
            is_fine, there = one.specifier.contains(version(one.name), prereleases=True), version(one.name)
        except PackageNotFoundError:
            is_fine, there = False, "not installed"
        if is_fine:
            fine += [f"{one.name} {there}"]
        else:
            yield LACKING if extra else WRONG, one.name, f"{there}, {one.specifier} is wanted: {remedy}"
    yield GOOD, "packages", ", ".join(dict.fromkeys(fine))


def device(name: str) -> Iterator[Line]:
    """Where networks will run, and in which precision."""
    try:
        chosen = pick_device(name)
    except UserError as error:
        yield WRONG, "device", str(error)
        return
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        made = f"{properties.name}, {in_bytes(properties.total_memory)}, CUDA {torch.version.cuda}"
        yield GOOD, "device", f"{chosen}, {made}, torch {torch.__version__}"
    else:
        yield GOOD, "device", f"{chosen}, {usable_cores()} cores, torch {torch.__version__}"
        if shutil.which("nvidia-smi"):
            yield WRONG, "GPU", "an NVIDIA GPU seems to be here, and this torch does not see it; install torch for CUDA"
    gains = gains_from_bf16(chosen)
    units = ", by matrix units (AMX)" if chosen.type == "cpu" and has_amx() else ""
    yield GOOD, "bf16", f"faster here{units}; precision=auto takes it" if gains else "not faster here; fp32 is taken"


def models() -> Iterator[Line]:
    """The shipped model, and which published files are here."""
    try:
        load()
        yield GOOD, DEFAULT, "comes with the package and can be read"
    except UserError as error:
        yield WRONG, DEFAULT, str(error)
    files = published_files()
    for name, release in releases().items():
        missing = [files[file] for file in release.files if cached(files[file]) is None]
        shown = ", ".join(f"{file.name} (hub {file.hub}{_digest(file.sha256)})" for file in missing)
        lacks = f"without {shown}; varestorer models get {name}"
        yield (LACKING, name, lacks) if missing else (GOOD, name, "all files are in the hub's cache")


def metrics(names: list[str] | None) -> Iterator[Line]:
    """Weights of metrics: of those asked for, or of all protocols, scores and losses."""
    usual = [spec.pyiqa_name for protocol in PROTOCOLS.values() for spec in protocol.metrics]
    for name in dict.fromkeys(names or [*usual, "lpips-vgg"]):
        if name not in WEIGHT_FILES:
            yield LACKING, name, "its weights are not known here; python -m pyiqa.pyiqa_cmd -ls lists the metrics"
            continue
        found = find_weights(name)
        problems, others = [(missing_package(name) or "").removeprefix("needs ")], []
        for entry in WEIGHT_FILES[name]:
            address, digest, terms = of_metric(entry)
            path, file = found.get(entry), entry.rpartition("/")[2]
            if path is None:
                place = "" if entry.startswith("hf:") else f" into {(hub_folder() / entry).parent}"
                problems.append(f"{file}{_digest(digest)} from {address}{place} (license {terms})")
            elif digest and path.is_file() and not file_sha256(path).startswith(digest):
                others.append(f"{path} is not the published file{_digest(digest)}")
        lacks = "; ".join(problem for problem in problems if problem)
        if lacks:
            yield LACKING, name, f"needs {lacks}"
        else:
            yield GOOD, name, "; but ".join(["can be scored", *others])


def places() -> Iterator[Line]:
    """Room on the disks, and whether the hub answers."""
    from huggingface_hub import constants

    thread, answered = ask_network(constants.ENDPOINT)
    named = {"here": Path.cwd(), "hub's cache": Path(constants.HF_HUB_CACHE)}
    own = cache_folder()
    if own is None:
        yield LACKING, "cache", "nothing is remembered: no home folder is known; set VARESTORER_CACHE"
    else:
        named["our cache"] = own
    for what, folder in named.items():
        near = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(near).free
        problem = "" if free >= MIN_DISK else f"; little for weights: {in_bytes(int(MIN_DISK))} are wanted"
        problem += "" if os.access(near, os.W_OK) else ", read only"
        yield LACKING if problem else GOOD, what, f"{folder}, {in_bytes(free)} free{problem}"
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        little = "; little for data workers: docker run --shm-size=8g, or trainer.num_workers=0"
        little = "" if free >= MIN_SHARED else little
        yield LACKING if little else GOOD, str(SHARED_MEMORY), f"{in_bytes(free)} free{little}"
    thread.join(3)
    if answered.is_set():
        yield GOOD, "hub", f"{constants.ENDPOINT} answers"
    else:
        yield LACKING, "hub", f"{constants.ENDPOINT} does not answer: what is in the caches works (HF_HUB_OFFLINE=1)"


def _digest(sha256: str | None) -> str:
    return "" if sha256 is None else f", SHA-256 {sha256}" + ("..." if len(sha256) < 64 else "")


COMMAND = Command("doctor", doctor, DoctorOptions)
