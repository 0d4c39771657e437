"""Releases and bundles from a hub of the tests' own: fetched, checked, converted once, pinned, offline, pushed."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import Hub, publish, serving
from published_files import VARSR_SIZES, write_release, write_varsr
from tiny_sizes import HVAR_SIZES
from tiny_sizes import VARSR_SIZES as TINY_VARSR

from varestorer.systems import load
from varestorer.systems.hvar import HVAR
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import cache_folder
from varestorer.weights.bundle import shipped
from varestorer.weights.releases import check_room, fetch, in_bytes

PHOTO = torch.rand(3, 20, 27, generator=torch.Generator().manual_seed(0))
ONE = "EvanEternal/VARestorer"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def release(hub: Hub, tmp_path: Path) -> Path:
    student = write_release(tmp_path / "release")
    publish(hub, student.parent)
    return student


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package said."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("varestorer")]


def weights(system: Any) -> dict[str, torch.Tensor]:
    return system.state_dict()


def assert_same(one: Any, other: Any) -> None:
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_the_release_of_varestorer_just_works(
    hub: Hub, release: Path, caplog: pytest.LogCaptureFixture, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # a bar though this is no terminal
    system = load(ONE, merge=True)
    ours = load(release, merge=True)
    assert isinstance(system, VARestorer)
    assert_same(system, ours)
    files = [release, release.with_name("infinity_vae_d32reg.pth"), release.with_name("general_swinir_v1.ckpt")]
    assert sorted(hub.transfers) == sorted(file.name for file in files)
    sizes, conversion = told(caplog)
    assert sizes.startswith(f"fetching {in_bytes(sum(file.stat().st_size for file in files))}: varestorer.pth")
    assert "(EvanEternal/VARestorer; license: repository MIT)" in sizes
    assert conversion.startswith(f"converting {ONE} once")
    assert "varestorer.pth: 100%" in capfd.readouterr().err
    hub.asked.clear()
    assert_same(VARestorer.from_pretrained(ONE, merge=True), ours)
    assert not hub.asked and len(told(caplog)) == 2  # neither the hub nor the converter is asked again


def test_the_release_of_varsr_just_works_and_is_no_varestorer(hub: Hub, tmp_path: Path) -> None:
    ours = VARSR(**VARSR_SIZES, seed=3)
    file = write_varsr(ours, tmp_path, "VARSR.pth")
    publish(hub, tmp_path)
    with pytest.raises(UserError, match="qyp2000/VARSR holds a model of varsr, and varestorer was asked for"):
        VARestorer.from_pretrained("qyp2000/VARSR")
    assert not hub.asked
    system = load("qyp2000/VARSR")
    assert isinstance(system, VARSR)
    assert_same(system, load(file))


def test_a_broken_transfer_goes_on_where_it_was(
    hub: Hub, release: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # before it asks again
    hub.breaks["weights/varestorer.pth"] = 2
    (path,) = fetch(["varestorer.pth"])
    assert path.read_bytes() == release.read_bytes()
    assert hub.transfers == ["varestorer.pth"] * 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_came_damaged_is_removed_and_fetched_again(hub: Hub, release: Path) -> None:
    hub.spoiled.add("weights/varestorer.pth")
    with pytest.raises(UserError, match=r"varestorer\.pth of EvanEternal/VARestorer came damaged .*start the command"):
        load(ONE)
    hub.spoiled.clear()
    assert load(ONE).files["transformer"].is_dir()


def test_a_file_that_is_not_the_known_one_is_said(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "var_d16.pth").write_bytes(b"another")
    publish(hub, tmp_path)
    fetch(["var_d16.pth"])
    assert "var_d16.pth of FoundationVision/var is another file than the one known here" in caplog.text


def test_a_revision_can_be_pinned(hub: Hub, release: Path) -> None:
    first = next(iter(hub.commits[ONE]))
    old = load(ONE)
    tensors = torch.load(release)
    changed = {name: tensor + 1 if name.endswith("head.bias") else tensor for name, tensor in tensors.items()}
    torch.save(changed, release)
    second = hub.commit(ONE, {"weights/varestorer.pth": release})
    new = load(f"{ONE}@{second}")
    assert any(not torch.equal(tensor, weights(old)[name]) for name, tensor in weights(new).items())
    assert_same(load(ONE, revision=first), old)
    assert_same(load(f"{ONE}@{first}"), old)
    with pytest.raises(UserError, match="the hub does not give .*: it has no such revision"):
        load(f"{ONE}@v7")


def test_what_is_in_the_cache_needs_no_hub(hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(["varestorer.pth", "infinity_vae_d32reg.pth"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"general_swinir_v1.ckpt of lxq007/DiffBIR: it is not in the cache, and the"):
        load(ONE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load(ONE)
    hub.server.shutdown()
    shutil.rmtree(Path(str(cache_folder())))
    assert isinstance(load(ONE, local_files_only=True), VARestorer)  # converted again from the hub's cache


def test_an_unreachable_hub_is_one_line(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    for name, kind in ((ONE, UserError), ("someone/bundle", UsageError)):
        with pytest.raises(kind, match="cannot be reached.*HF_ENDPOINT") as caught:
            load(name)
        assert "\n" not in str(caught.value)
    assert not caplog.messages


def test_no_room_is_said_before_anything_is_fetched(hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(UserError, match=r"has 1 bytes free, and .* are wanted; make room, or name another place"):
        load(ONE)
    assert not hub.transfers
    check_room(Path("/no/such/folder"), 1)


def test_a_published_file_can_be_named_wherever_weights_are(hub: Hub, release: Path) -> None:
    assert shipped("hub/varestorer.pth").read_bytes() == release.read_bytes()
    with pytest.raises(UserError, match=r"none.pth is no published file that is known here; there are varestorer.pth"):
        shipped("hub/none.pth")


@pytest.mark.parametrize("name", ["varestorer", "varsr", "hvar"])
def test_bundles_of_all_systems_are_pushed_and_pulled(
    name: str, hub: Hub, tiny_system: VARestorer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    made = {"varestorer": lambda: tiny_system, "varsr": lambda: VARSR(**TINY_VARSR), "hvar": lambda: HVAR(**HVAR_SIZES)}
    system = made[name]().eval()
    system.push_to_hub("someone/tiny", token="ours")
    first = next(iter(hub.commits["someone/tiny"]))
    with torch.no_grad():
        system.transformer.start.add_(1)
    system.push_to_hub("someone/tiny", token="ours")
    pulled = load("someone/tiny")
    assert type(pulled) is type(system)
    assert_same(pulled, system)
    assert "fetching" in caplog.text and "of someone/tiny" in caplog.text
    assert torch.equal(load(f"someone/tiny@{first}").transformer.start + 1, system.transformer.start)
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(load("someone/tiny"), system)
    assert not hub.asked


def test_what_is_no_bundle_is_not_fetched(hub: Hub) -> None:
    hub.commit("google/other", {"config.json": b'{"model_type": "t5"}', "model.safetensors": b"gigabytes"})
    with pytest.raises(UserError, match="is no bundle's config"):
        load("google/other")
    assert hub.transfers == ["config.json"]
    with pytest.raises(UsageError, match="it has no such repository, or a private one.*; give a run"):
        load("google/none")
