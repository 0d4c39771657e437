"""`varestorer convert`: published weights to bundles and back, adapters apart or merged, and checks of files."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import ConvertOptions
from varestorer.exchange import onnx, peft, spandrel
from varestorer.systems import load
from varestorer.systems.base import PRECISIONS
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import atomic_folder, atomic_write, check_writable
from varestorer.weights.bundle import is_bundle, put_adapters, save_adapters, save_bundle, student_of
from varestorer.weights.files import read_entries, save_tensors
from varestorer.weights.published import RESTORER_FILE
from varestorer.weights.published.infinity import KINDS, compare, kind_of, part_tensors, read_manifest
from varestorer.weights.published.infinity import manifest as published_manifest
from varestorer.weights.resolve import stored_precision
from varestorer.weights.runs import is_run

LOG = logging.getLogger(__name__)

ADAPTERS_FILE = "adapters.safetensors"
PUBLISHED_SUFFIXES = (".pth", ".ckpt", ".safetensors")
ALONE = ("only", "peft")  # ways to write the adapters and nothing else
WRAPPERS = {"tokenizer": "vae", "restorer": "state_dict"}  # under which the published torch files hold their tensors


def convert(options: ConvertOptions) -> int:
    """Run the command (`ConvertOptions`); exit status 1 if a checked file differs.

    UsageError for options that cannot be, or contradict each other; UserError if the input cannot be read, or the
    output not be written.
    """
    check_options(options)
    if options.check is not None:
        return check_file(options.check, options.manifest)
    output = Path(cast(str, options.output)).resolve()
    if options.adapters == "only" and not is_published(output):
        output = output / ADAPTERS_FILE
    check_output(output, is_published(output) or is_onnx(output), options.overwrite)
    check_writable(output.parent, "output")

    system = open_system(options)
    if options.adapters == "merged":
        system.merge_adapters()
    if options.dtype in PRECISIONS:
        system.set_precision(options.dtype)
    write(system, options, output)
    say(written(output))
    return OK


def write(system: VARestorer, options: ConvertOptions, output: Path) -> None:
    """Write what the options ask for."""
    if options.adapters == "only":
        save_adapters(system, output)
    elif options.adapters == "peft":
        peft.save(system, output)
    elif is_onnx(output):
        onnx.export(system, output)
    elif options.part == "whole":
        spandrel.save_whole(system, output)
    elif options.scale != 1:
        spandrel.save_enlarging(system, output)
    elif is_published(output):
        if options.part == "transformer":
            check_publishable(system, Path(cast(str, options.input)))
        save_published(system, options.part, output)
    else:
        with atomic_folder(output, options.overwrite) as folder:  # refused if another command has filled it meanwhile
            save_bundle(system, folder, half=options.dtype == "fp16")


def check_options(options: ConvertOptions) -> None:
    """Refuse options that cannot be, before anything is read: a UsageError that names the key."""
    if options.check is not None:
        if unused := given(options, *(item.name for item in fields(options) if item.name not in ("check", "manifest"))):
            raise UsageError(f"check= only looks at a file; leave out {unused}")
        return
    if not options.input or not options.output:
        raise UsageError("no value for input or output: add input=... output=..., or check=...; see --help")
    if options.manifest is not None:
        raise UsageError("manifest= belongs to check=FILE")
    if options.adapters in ALONE and options.base:
        raise UsageError(
            f"adapters={options.adapters} takes adapters off a model, base= puts them onto one; choose one of the two"
        )
    check_use(options, Path(options.output))


def check_use(options: ConvertOptions, output: Path) -> None:
    """Refuse options that would not be used for such an output: a UsageError that names them."""
    if options.adapters == "only" and is_published(output) and output.suffix.lower() != ".safetensors":
        raise UsageError(f"adapters=only writes a folder or a .safetensors file, got output={output}")
    if options.adapters == "peft" and is_published(output):
        raise UsageError(f"adapters=peft writes a folder, got output={output}")
    if is_onnx(output) and (unused := given(options, "adapters", "dtype", "part")):
        raise UsageError(f"output={output} is always merged and in fp32; leave out {unused}")
    if options.dtype == "fp16" and (options.adapters in ALONE or is_published(output)):
        raise UsageError(f"dtype=fp16 is for storing a whole bundle: output=FOLDER, without adapters={'|'.join(ALONE)}")
    if options.scale not in (1, 4) or (options.scale == 4 and options.part != "restorer"):
        raise UsageError(f"scale=4 goes with part=restorer, got scale={options.scale} part={options.part}")
    if (options.scale == 4 or options.part == "whole") and output.suffix.lower() != ".safetensors":
        raise UsageError(f"scale=4 and part=whole write a .safetensors file, got output={output}")
    if options.part == "transformer":
        return
    if options.adapters in ALONE or not is_published(output):
        raise UsageError(f"part={options.part} goes with a published file: output=FILE.pth or FILE.safetensors")
    if unused := given(options, "adapters", "dtype"):
        raise UsageError(f"part={options.part} is not the transformer; leave out {unused}")


def given(options: ConvertOptions, *keys: str) -> str:
    """Those of the keys whose values are not the usual ones, as `key= key=`."""
    return " ".join(f"{key}=" for key in keys if getattr(options, key) != getattr(ConvertOptions, key))


def is_onnx(output: Path) -> bool:
    """Whether the name is one of an ONNX file."""
    return output.suffix.lower() == ".onnx"


def is_published(output: Path) -> bool:
    """Whether the name is one of a published file, and not of a bundle's folder."""
    return output.suffix.lower() in PUBLISHED_SUFFIXES


def check_output(output: Path, is_file: bool, overwrite: bool) -> None:
    """Refuse to write over what is there.

    UsageError for the current folder, or one around it; UserError for a file, or a folder with something in it, where
    `overwrite` allows a file, and a bundle.
    """
    if Path.cwd().is_relative_to(output):
        raise UsageError(f"output={output} is the current folder or one around it; name a new one")
    if is_file:
        if output.is_dir() or (output.exists() and not overwrite):
            raise UserError(f"output={output} is there already; choose another name, or add overwrite=true")
    elif output.is_file():
        raise UserError(
            f"output={output} is a file, and a bundle is a folder; published forms end in .pth or .safetensors"
        )
    elif output.is_dir() and any(output.iterdir()):
        if not is_bundle(output) and not peft.is_peft(output):
            raise UserError(f"output={output} is a folder with other things in it; choose another")
        if not overwrite:
            raise UserError(f"output={output} holds a model already; choose another folder, or add overwrite=true")


def check_file(path: str, manifest: str | None) -> int:
    """Compare a file with a manifest and say what differs; exit status 1 if anything does."""
    entries = read_entries(path)
    name = manifest or kind_of(entries)
    if name is None:
        raise UsageError(f"check={path} is like no published file; add manifest={'|'.join(KINDS)}|FILE.json")
    result = compare(entries, published_manifest(name) if name in KINDS else read_manifest(name))
    types = ", ".join(f"{count} {dtype}" for dtype, count in result.types.items())
    say(f"{path}: {result.mapped} / {result.total} tensors of {name}; it holds {types}")
    if result.retyped:
        say(f"{result.retyped} are of another floating type than in the manifest, which is no difference")
    lists = {"missing": result.found.missing, "unexpected": result.found.unexpected}
    for kind, names in (lists | {"misshapen": result.found.misshapen}).items():
        if names:
            say("\n".join([f"{len(names)} {kind}:", *(f"  {one}" for one in names)]))
    return FAILED if result.found else OK


def open_system(options: ConvertOptions) -> VARestorer:
    """The model that `input=` names, in the precision in which it is stored."""
    source = Path(cast(str, options.input))
    if not source.exists() and (options.base or is_published(source)):  # others may be names on the hub
        raise UsageError(f"input={source} does not exist")
    adapters, of_peft = student_of(source), peft.is_peft(source)
    is_adapters = of_peft or adapters is not None
    if options.base and not is_adapters:
        raise UsageError(f"base= goes with input={ADAPTERS_FILE} or a folder of peft's, but {source} is neither")
    if is_adapters and not options.base:
        raise UsageError(f"{source} holds adapters alone; add base=MODEL to put them onto it")
    model = Path(options.base or source)
    beside = {"tokenizer_file": options.tokenizer, "restorer_file": options.restorer}
    if any(beside.values()) and not is_published(model):
        raise UsageError(f"tokenizer= and restorer= go with a published file, but {model} is none; leave them out")
    system = load(model, **beside)
    if is_published(model) and stored_precision(model) == "bf16":
        system.set_precision("bf16")  # what was read is float32: nothing is lost
    if is_run(model):
        system.files["run"] = model
    if of_peft:
        student, tensors = peft.read(source, system)
        return put_adapters(system, source / peft.TENSORS, student, tensors)
    return system if adapters is None else put_adapters(system, source, adapters)


def check_publishable(system: VARestorer, source: Path) -> None:
    """Refuse a transformer that nobody could use from a published file, and warn of what such a file cannot hold.

    A published file without adapters (`source`) holds a teacher, and may again. UserError for a student without
    adapters of its own, which would be read as a teacher.
    """
    student = system.student_config
    if student.merged or (student.lora_rank == 0 and not is_published(source)):
        raise UserError("the published form has no place for a student without adapters; write a bundle: output=FOLDER")
    if student.unreleased:
        trait = student.unreleased[0]
        raise UserError(f"the published form has no place for student.{trait}; write a bundle: output=FOLDER")
    if dict(system.config["schedule"]) != {"size": "0.25M"}:
        LOG.warning("the published form has no place for the schedule: what reads it will assume that of 0.25M")
    if system.restorer is None:
        LOG.warning("this model has no restorer, and the published form wants %s beside it", RESTORER_FILE)


def save_published(system: VARestorer, part: str, path: Path) -> None:
    """Write one network under its published names, derived tensors included."""
    tensors = {name: tensor.contiguous() for name, tensor in sorted(part_tensors(system, part).items())}
    if path.suffix.lower() == ".safetensors":
        save_tensors(path, tensors)
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a name would get into the file's bytes
        torch.save({WRAPPERS[part]: tensors} if part in WRAPPERS else tensors, file)


def written(output: Path) -> str:
    """What the command says at the end: every file and its size."""
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    lines = [f"  {path.name:24} {path.stat().st_size:>14,} bytes" for path in files]
    use = f"\nuse it with ckpt={output}" if is_bundle(output) else ""
    return "\n".join([f"wrote {output}", *lines]) + use


COMMAND = Command("convert", convert, ConvertOptions)
