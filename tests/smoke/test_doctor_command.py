"""`varestorer doctor` says what there is, what lacks and what is wrong."""

import shutil
from pathlib import Path

import pytest

from varestorer.commands import doctor
from varestorer.commands.doctor import COMMAND
from varestorer.utils import iqa
from varestorer.utils.errors import UserError

pytestmark = pytest.mark.smoke


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = iqa.ask_network.__wrapped__("http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "ask_network", lambda url: asked)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """What was looked at -> its state and what was found."""
    *found, _ = capsys.readouterr().out.splitlines()
    split = [(line[:8].strip(), *line[8:].split(": ", 1)) for line in found]
    return {what: (state, text) for state, what, text in split}


def test_it_names_what_lacks_with_hashes_and_places(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pyiqa = tmp_path / "torch" / "hub" / "pyiqa"
    pyiqa.mkdir(parents=True)
    (pyiqa / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"damaged")
    assert COMMAND.main(["metrics=[psnr,musiq,clipiqa,maniqa,fid,lpips,none]", "device=cpu"]) == 0
    found = lines(capsys)
    assert found["psnr"] == ("ok", "can be scored")
    state, text = found["musiq"]
    assert (
        state == "lacking"
        and "SHA-256 e95806b9... from hub chaofengc/IQA-PyTorch-Weights" in text
        and str(pyiqa) in text
    )
    digest = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
    assert (
        f"SHA-256 {digest} from https://openaipublic.azureedge.net/clip/models/{digest}/RN50.pt" in found["clipiqa"][1]
    )
    assert "from hub timm/vit_base_patch8_224.augreg2_in21k_ft_in1k (license" in found["maniqa"][1]
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in found["lpips"][1]
    assert "is not the published file, SHA-256 6726825d..." in found["fid"][1]
    assert found["none"][0] == "lacking" and found["nano"][0] == found["device"][0] == found["python"][0] == "ok"
    assert "VQVAE.pth (hub qyp2000/VARSR); varestorer models get qyp2000/VARSR" in found["qyp2000/VARSR"][1]
    assert found["hub"][0] == "lacking" and "free" in found["our cache"][1]


def test_what_is_wrong_makes_it_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise UserError("the bundle has lost its tokenizer.safetensors")

    known = {"torch": "1.0", "varestorer": "0.1.0"}
    monkeypatch.setattr(doctor, "load", broken)
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.9", "trackio>=0.20; extra == 'trackio'"])
    monkeypatch.setattr(doctor, "version", lambda name: known.get(name) or missing(name))
    monkeypatch.setattr(doctor, "metadata", lambda name: Extras())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2, 1, 1))
    assert COMMAND.main(["metrics=[psnr]", "device=cuda:77"]) == 1
    found = lines(capsys)
    assert found["torch"] == ("WRONG", '1.0, >=2.9 is wanted: pip install "torch>=2.9"')
    assert found["trackio"] == ("lacking", 'not installed, >=0.20 is wanted: pip install "varestorer[trackio]"')
    assert found["nano"] == ("WRONG", "the bundle has lost its tokenizer.safetensors")
    assert found["device"][0] == "WRONG" and found["here"][0] == found["/dev/shm"][0] == "lacking"


class Extras:
    def get_all(self, name: str) -> list[str]:
        return ["trackio"]


def missing(name: str) -> str:
    raise doctor.PackageNotFoundError(name)
