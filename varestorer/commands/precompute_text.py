"""`varestorer precompute_text`: captions of training photographs and their text features, made once."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import PrecomputeTextOptions
from varestorer.conditioning.captioner import DEFAULT_NAME as CAPTIONER
from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.pretrained import fingerprint, load_pretrained, local_folder
from varestorer.conditioning.text_encoder import DEFAULT_NAME as TEXT_ENCODER
from varestorer.conditioning.text_encoder import MAX_LENGTH, TextEncoder
from varestorer.data.folders import hq_images
from varestorer.data.text import (
    CAPTIONS,
    EncoderRecord,
    TextWriter,
    photograph_names,
    plain_text,
    read_captions,
    write_captions,
)
from varestorer.data.workers import deaths_explained, in_turn
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user, file_sha256, read_text
from varestorer.utils.images import load_image, resize
from varestorer.utils.locks import locked
from varestorer.utils.scanning import first_names, report_unused, scan_folder
from varestorer.utils.tiling import scaled_size

LOG = logging.getLogger(__name__)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CAPTION_SIDE = 512  # pixels: restoring with caption=auto shows the captioner no more than this either
SAVE_EVERY = 200  # captions
WORKERS_KEY = "num_workers"
DESCRIBED = "described.json"  # the digest of each photograph that the captioner described
SHARD_SIZE = 256  # photographs
FAILURES_SHOWN = 20


def precompute_text(options: PrecomputeTextOptions) -> int:
    """Captions first, then features, so that memory never holds both networks; exit status 1 if one got no text.

    UsageError for an option that cannot be; UserError without photographs, captioner, text encoder or captions, or if
    `out` cannot be used.
    """
    if options.captions and options.captioner:
        raise UsageError("captions and captioner contradict each other: give the texts, or have photographs described")
    device = pick_device(options.device)
    paths = hq_images(options.data.root)
    photographs = dict(zip(photograph_names(options.data.root, paths), paths, strict=True))
    out = expand_user(options.out)
    with locked(out):
        failed = make_texts(options, photographs, out, device)
    say(summary(len(photographs), failed, out))
    return FAILED if failed else OK


def make_texts(
    options: PrecomputeTextOptions, photographs: Mapping[str, Path], out: Path, device: torch.device
) -> dict[str, str]:
    """Write captions and features of photographs that have none yet; name -> reason, for those that got none."""
    encoder, record = open_encoder(options, device)
    writer = TextWriter(out, record)
    file = out / CAPTIONS
    captions = read_captions(file) if file.exists() else {}
    if options.captions:
        captions |= given_captions(expand_user(options.captions), list(photographs))
        write_captions(file, captions)
        failed = {name: f"no text in {options.captions}" for name in photographs if name not in captions}
    else:
        captioner = Captioner(options.captioner or CAPTIONER, device)
        failed = describe(photographs, captions, captioner, file, options.num_workers)
    encode({name: captions[name] for name in photographs if name in captions}, encoder, writer, options.dtype)
    return failed


def open_encoder(options: PrecomputeTextOptions, device: torch.device) -> tuple[TextEncoder, EncoderRecord]:
    """The encoder, not loaded yet, and what the index says of it; UserError if there is none."""
    name, key = options.text_encoder or TEXT_ENCODER, "text_encoder"
    folder = str(local_folder(name, TEXT_ENCODER, key))
    mark = load_pretrained(lambda path: fingerprint(Path(path)), folder, TEXT_ENCODER, key)
    encoder = TextEncoder(folder, device, max_length=MAX_LENGTH, cache=None)
    return encoder, EncoderRecord(name, mark, MAX_LENGTH, options.dtype)


def given_captions(source: Path, names: Sequence[str]) -> dict[str, str]:
    """Captions that somebody else made, by the names of the photographs that have one.

    The source is a JSON file `{name: text}`, with or without extensions in the names, or a folder of `<name>.txt`.
    UserError: nothing there, nothing readable, or nothing for any of the photographs.
    """
    bare = {name: Path(name).with_suffix("").as_posix() for name in names}
    keys = bare
    if source.is_dir():
        captions: dict[str, str] = {}
        for name in names:
            path = source / f"{bare[name]}.txt"
            try:
                captions[name] = plain_text(read_text(path))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:  # the others have theirs
                LOG.warning("cannot read the caption %s (%s); wanted a text file in UTF-8", path, reason(error))
        scan = scan_folder(source)
        scan.check_readable()
        there = {path.relative_to(source).as_posix() for path in scan.files if path.suffix == ".txt"}
        unused = sorted(there - {f"{stem}.txt" for stem in bare.values()})
    else:
        given = read_captions(source)
        keys = {name: name if name in given else bare[name] for name in names}
        captions = {name: given[key] for name, key in keys.items() if key in given}
        unused = sorted(given.keys() - set(keys.values()))
    report_unused(source, "texts belong to no photograph", unused if captions else [])
    users = Counter(keys[name] for name in captions)
    shared = [name for name in captions if users[keys[name]] > 1]
    if shared:
        raise UserError(
            f"captions={source}: the text of {bare[shared[0]]} may be that of {first_names(shared)}; give a JSON file "
            "with the extension in the names"
        )
    if not captions:
        wanted = f"{bare[names[0]]}.txt" if source.is_dir() else f'{{"{names[0]}": "text", ...}}'
        raise UserError(f"captions={source} has no text for any of {len(names)} photographs; wanted {wanted}")
    return captions


def describe(
    photographs: Mapping[str, Path], captions: dict[str, str], captioner: Captioner, file: Path, num_workers: int
) -> dict[str, str]:
    """Describe the photographs (name -> file) that have no caption yet, and let go of the captioner.

    So are those that are other files now than the ones that it described; captions from elsewhere stay. `captions`
    grow, and are kept in `file` now and then and at the end, however that comes.

    Returns:
        name -> reason, for those that cannot be read.
    """
    notes = file.with_name(DESCRIBED)
    described = read_captions(notes) if notes.exists() else {}
    todo = [
        name
        for name, path in photographs.items()
        if name not in captions or (name in described and _digest(path) != described[name])
    ]
    failed: dict[str, str] = {}

    def save() -> None:
        write_captions(file, captions)
        write_captions(notes, described)

    try:
        progress = _progress("captions", len(photographs) - len(todo), len(photographs))
        with deaths_explained(WORKERS_KEY), progress as bar:
            pictures = read_pictures([photographs[name] for name in todo], num_workers)
            for number, (name, picture) in enumerate(zip(todo, pictures, strict=True), 1):
                if isinstance(picture, UserError):
                    failed[name] = str(picture)
                    LOG.warning("%s", picture)
                else:
                    described[name] = _digest(photographs[name])
                    captions[name] = captioner.caption(picture[None].to(captioner.device))[0]
                if number % SAVE_EVERY == 0:
                    save()
                bar.update()
    finally:
        if todo:
            save()
    captioner.release()
    return failed


def _digest(path: Path) -> str:
    """`file_sha256`; empty if it cannot be read."""
    try:
        return file_sha256(path)
    except UserError:
        return ""


def read_pictures(paths: Sequence[Path], num_workers: int) -> Iterator[Tensor | UserError]:
    """Whole photographs in turn, as `_Previews` gives them; for a broken one, what is wrong with it."""
    return in_turn(_Previews(paths), min(num_workers, len(paths), os.cpu_count() or 1), WORKERS_KEY)


class _Previews(Dataset[Tensor]):
    """Whole photographs (3, h, w) in [0, 1], no side above `CAPTION_SIDE`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image_3HW = load_image(self.paths[index])
        height, width = image_3HW.shape[-2:]
        return resize(image_3HW, scaled_size(height, width, min(1, CAPTION_SIDE / max(height, width))))


def encode(captions: Mapping[str, str], encoder: TextEncoder, writer: TextWriter, dtype: str) -> None:
    """Encode the captions whose features are not there yet, shard by shard, and let go of the encoder.

    UserError without text encoder, for features that `dtype` cannot hold, or a full disk.
    """
    todo = writer.pending(captions)
    with _progress("features", len(captions) - len(todo), len(captions)) as bar:
        for start in range(0, len(todo), SHARD_SIZE):
            prompts = {name: captions[name] for name in todo[start : start + SHARD_SIZE]}
            features = {}
            for name, prompt in prompts.items():
                if prompt:
                    features[name] = encoder.encode([prompt])[0].to("cpu", DTYPES[dtype])
                    if not features[name].isfinite().all():
                        raise UserError(
                            f"{prompt!r}: the features are not finite in {dtype}; try dtype=fp32 or device=cpu"
                        )
                bar.update()
            writer.add(prompts, features)
    encoder.release()


def summary(count: int, failed: Mapping[str, str], out: Path) -> str:
    """What failed and why, what was done, and how training gets at it."""
    lines = [f"failed: {name}: {reason}" for name, reason in list(failed.items())[:FAILURES_SHOWN]]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"failed: {len(failed) - FAILURES_SHOWN} more")
    counts = f"{count - len(failed)} of {count} photographs have text in {out}"
    return "\n".join([*lines, f"{counts}; train with data.text={out}"])


@contextmanager
def _progress(what: str, done: int, total: int) -> Iterator[tqdm]:
    """A bar that warnings do not break."""
    with logging_redirect_tqdm(), tqdm(desc=what, initial=done, total=total, unit=" photographs") as bar:
        yield bar


COMMAND = Command("precompute_text", precompute_text, PrecomputeTextOptions)
