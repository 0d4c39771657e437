"""`varestorer models` and `restore` with names on a hub of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_hub import Hub, publish, serving
from published_files import write_release

from varestorer.commands.convert import COMMAND as CONVERT
from varestorer.commands.models import COMMAND, of_experiment
from varestorer.commands.restore import COMMAND as RESTORE
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.images import save_image
from varestorer.weights.files import read_entries
from varestorer.weights.published.infinity import tokenizer_sizes

pytestmark = pytest.mark.smoke
ONE = "EvanEternal/VARestorer"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as hub:
        publish(hub, write_release(tmp_path / "release").parent)
        yield hub


def test_what_was_fetched_ahead_restores_without_a_hub(hub: Hub, tmp_path: Path, capsys) -> None:
    assert COMMAND.main([]) == 0
    before = capsys.readouterr().out
    assert f"{ONE}  0 of 3 files here" in before and "nano" in before
    assert f"{'vae_ch160v4096z32.pth':28} -  436 MB        repository MIT" in " ".join(before.split(" "))
    assert COMMAND.main(["get", ONE]) == 0
    assert f"{ONE}: " in capsys.readouterr().out
    assert COMMAND.main([]) == 0
    assert f"{ONE}  converted" in capsys.readouterr().out
    save_image(tmp_path / "photo.png", torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)))
    words = [f"input={tmp_path / 'photo.png'}", f"output={tmp_path / 'out.png'}", f"ckpt={ONE}", "scale=1"]
    asked = len(hub.asked)
    assert RESTORE.main([*words, "device=cpu", "trained_scale=1"]) == 0
    assert (tmp_path / "out.png").is_file() and len(hub.asked) == asked
    told = capsys.readouterr().err
    assert "fetching" not in told and "HTTP" not in told


def test_a_command_with_a_hub_name_fetches_first(hub: Hub, tmp_path: Path, capfd) -> None:
    assert CONVERT.main([f"input={ONE}", f"output={tmp_path / 'bundle'}"]) == 0
    told = capfd.readouterr().err.splitlines()
    assert "fetching 2.59 MB: varestorer.pth" in told[0] and "converting" in told[1] and len(told) == 2


def test_what_an_experiment_needs(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["get", "dmd_div2k", "quickstart"]) == 0
    out = capsys.readouterr().out
    files = {"infinity_vae_d32reg.pth", "infinity_2b_reg.pth", "general_swinir_v1.ckpt"}
    assert set(hub.transfers) == files and all(f"{name}: " in out for name in files)
    assert "quickstart needs no published file" in out
    tokenizer = "hub/infinity_vae_d32reg.pth"
    sizes = tokenizer_sizes(read_entries(tmp_path / "release" / "infinity_vae_d32reg.pth"))
    transformer = {"width": 32, "depth": 2, "num_heads": 2, "latent_width": 8, "text_width": 16, "num_levels": 15}
    restorer = "hub/general_swinir_v1.ckpt"
    system = VARestorer({"size": "0.25M"}, sizes, transformer, {}, restorer, weights={"tokenizer": tokenizer})
    assert system.restorer is not None and system.files["tokenizer"].is_file()


def test_unknown_names_and_half_a_push_are_one_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for words, status, message in [
        (["get", "varestorrer"], 2, "is no release, published file, experiment or name on the hub; did you mean Evan"),
        (
            ["get", "someone/none"],
            2,
            "the hub does not give someone/none, which is no path here either: it has no such",
        ),
        (["get", "VARSR.pth"], 1, "the hub does not give VARSR.pth of qyp2000/VARSR: it has no such repository"),
        (["push=nano"], 2, "push=FOLDER and to=OWNER/NAME go together"),
        (["push", "nowhere", "a/b"], 2, "push=nowhere is no bundle; make one with varestorer convert"),
        (["push", "nano", "b"], 2, "to=b is no name on the hub; give OWNER/NAME"),
    ]:
        assert COMMAND.main(words) == status, words
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_bundle_is_pushed_pinned_and_pulled(hub: Hub, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "ours")
    assert COMMAND.main(["push", "nano", "someone/copy", "private=true"]) == 0
    commit = next(iter(hub.commits["someone/copy"]))
    assert f"ckpt=someone/copy@{commit}" in capsys.readouterr().out
    assert COMMAND.main(["get", f"someone/copy@{commit}", "nano"]) == 0
    assert COMMAND.main([]) == 0
    assert "someone/copy  2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("varsr_isr", ["VARSR_C2I.pth", "VQVAE.pth"]),
        ("hvar", ["var_d16.pth"]),
        ("dmd_1024", ["general_swinir_v1.ckpt", "infinity_vae_d32reg.pth", "varestorer.pth"]),
    ],
)
def test_every_experiment_of_paper_scale_says_its_files(name: str, files: list[str], compose) -> None:
    assert compose("train", f"+experiment={name}", "weights_dir=hub").weights_dir == "hub"
    import hydra

    from varestorer.commands.entry import config_dir

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert of_experiment(name) == files
