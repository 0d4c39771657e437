"""`varestorer models`: which models and weights are known, fetching them ahead, and sharing a bundle."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from varestorer.commands.entry import OK, Command, as_list, config_dir, say
from varestorer.commands.options import ModelsOptions
from varestorer.conditioning.pretrained import local_folder
from varestorer.systems import system_class
from varestorer.utils.errors import UsageError
from varestorer.utils.files import cache_folder, expand_user
from varestorer.utils.hub import asking_hub, is_hub_name, split_revision
from varestorer.weights.bundle import ASSETS, CARD, is_bundle, shipped
from varestorer.weights.releases import HUB, PublishedFile, cached, fetch, in_bytes, published_files, releases
from varestorer.weights.resolve import locate, release_of


class ModelsCommand(Command):
    """Takes `get NAME ...` and `push FOLDER NAME` too."""

    def main(self, argv: Sequence[str] | None = None, configs: Path | None = None) -> int:
        """Run the command, see `Command.main`."""
        words = list(sys.argv[1:] if argv is None else argv)
        bare = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        others = [word for word in words[1:] if word not in bare]
        if words[:1] == ["get"] and bare:
            words = [f"get=[{','.join(bare)}]", *others]
        elif words[:1] == ["push"] and len(bare) == 2:
            words = [f"push={bare[0]}", f"to={bare[1]}", *others]
        return super().main(words, configs)


def models(options: ModelsOptions) -> int:
    """List, fetch or push (`ModelsOptions`); UsageError for an unknown name, UserError if the hub refuses."""
    if (options.push is None) != (options.to is None):
        raise UsageError("push=FOLDER and to=OWNER/NAME go together: what is shared, and where")
    if options.push is not None:
        say(push(options.push, str(options.to), options.private))
    for name in as_list(options.get):
        found = get(name)
        say("\n".join(f"{what}: {path}" for what, path in found.items()) or f"{name} needs no published file")
    if options.push is None and not options.get:
        say("\n".join(overview()))
    return OK


def get(name: str) -> dict[str, Path]:
    """What a name means, fetched: a release (converted too), a published file, what an experiment needs, or a bundle.

    Returns what -> where it is; UsageError if nothing of that name is known.
    """
    name = name.removeprefix(f"{HUB}/")
    if is_bundle(shipped(name)):
        return {f"{name}, which comes with the package": shipped(name)}
    if release := release_of(name):
        return {name: locate(name, {}, system_class(release.system).from_published)}
    for file in published_files().values():
        if not file.path and split_revision(name)[0] in (file.name, file.hub):
            return {name: local_folder(name if "/" in name else file.hub, file.hub, "get")}
    if name in published_files():
        return {name: fetch([name])[0]}
    if name in experiments():
        needed = of_experiment(name)
        return dict(zip(needed, fetch(needed) if needed else [], strict=True))
    if not is_hub_name(name):
        known = [*releases(), *published_files(), *experiments()]
        near = get_close_matches(name.lower(), {one.split("/")[-1].lower(): one for one in known}, n=3, cutoff=0.5)
        near = [one for one in known if one.split("/")[-1].lower() in near]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"get={name} is no release, published file, experiment or name on the hub{hint}")
    return {name: locate(name, {})}


def experiments() -> list[str]:
    """Names of experiments."""
    return sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def of_experiment(name: str) -> list[str]:
    """The published files that an experiment's model is made of."""
    cfg = hydra.compose("train", [f"+experiment={name}", f"weights_dir={HUB}"])
    return sorted(set(re.findall(rf": {HUB}/(\S+)", OmegaConf.to_yaml(cfg.model, resolve=True))))


def push(folder: str, name: str, private: bool) -> str:
    """Share a bundle on the hub, and say what was done.

    UsageError if no bundle is there, or no name for it; UserError if the hub does not take it.
    """
    from huggingface_hub import HfApi

    bundle = shipped(expand_user(folder))
    if not is_bundle(bundle):
        raise UsageError(f"push={folder} is no bundle; make one with varestorer convert input={folder} output=FOLDER")
    repository, revision = split_revision(name)
    if not is_hub_name(name):
        raise UsageError(f"to={name} is no name on the hub; give OWNER/NAME")
    with asking_hub(f"{name} a place"):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=bundle, revision=revision)
    return f"{bundle} is at {repository} now; ckpt={repository}@{done.oid} will always mean this state of it"


def overview() -> Iterator[str]:
    """The lines of the list."""
    yield "come with the package (ckpt=NAME)"
    for folder in sorted(path for path in ASSETS.iterdir() if is_bundle(path)):
        yield f"  {folder.name}  {in_bytes(_size(folder))}; license: {folder / CARD}"
    yield "\nreleases (ckpt=NAME or NAME@REVISION; fetched and converted once, or ahead: varestorer models get NAME)"
    files = published_files()
    own = cache_folder()
    for name, release in releases().items():
        made = own is not None and any((own / "models").glob(f"{name.replace('/', '--')}@*/config.json"))
        there = sum(cached(files[file]) is not None for file in release.files)
        state = "converted" if made else f"{there} of {len(release.files)} files here"
        needs = f"; {release.needs}" if release.needs else ""
        yield f"  {name}  {state}; {', '.join(release.files)}{needs}"
    yield f"\npublished files ({HUB}/NAME wherever weights are asked for, weights_dir={HUB} in training)"
    rows = [(file.name, *_state(file), file.license, file.hub, file.what) for file in files.values()]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        yield "  " + "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]])
    if found := dict(_bundles()):
        yield "\nbundles in the hub's cache (ckpt=NAME)"
        yield from (f"  {name}  {size}" for name, size in found.items())


def _state(file: PublishedFile) -> tuple[str, str]:
    """Whether it is here, and its size."""
    path = cached(file)
    if path is not None and not file.path:
        return "here", in_bytes(_size(path.parent))
    if path is not None:
        return "here", in_bytes(path.stat().st_size)
    return "-", "size unknown" if file.size is None else in_bytes(file.size)


def _bundles() -> Iterator[tuple[str, str]]:
    """Name and size of the bundles that were pulled."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        if any(is_bundle(revision.snapshot_path) for revision in repository.revisions):
            yield repository.repo_id, in_bytes(repository.size_on_disk)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


COMMAND = ModelsCommand("models", models, ModelsOptions)
