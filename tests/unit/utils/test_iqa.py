"""The one door to pyiqa: figures, missing weights, silence, private random generators."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from varestorer.utils import iqa, iqa_weights
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.iqa import Metric, MetricUnavailableError, create_metric, needs_reference


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub folder for torch and pyiqa, and a network that must not be touched."""

    tried = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield tmp_path / "hub"
    assert not tried, "tried to reach the network"


def images(seed: int = 0, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(2, 3, size, size, generator=generator)
    noise = 0.1 * torch.randn(reference.shape, generator=generator)
    return (reference + noise).clamp(0, 1), reference


def test_psnr_on_rgb_and_on_luma_follow_their_formulas() -> None:
    image, reference = images()
    rgb = create_metric("psnr")(image, reference)
    wanted = -10 * (image - reference).square().mean(dim=(1, 2, 3)).log10()
    assert torch.allclose(rgb, wanted.double(), atol=1e-4)

    metric = create_metric("psnr", {"test_y_channel": True, "color_space": "ycbcr"})
    weights = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1) / 255
    luma = ((image - reference) * weights).sum(dim=1)
    wanted = -10 * luma.square().mean(dim=(1, 2)).log10()
    assert torch.allclose(metric(image, reference), wanted.double(), atol=1e-3)
    assert metric.id == "psnr[color_space=ycbcr,test_y_channel=True]"


@pytest.mark.parametrize("name", sorted(iqa.BATCHABLE))
def test_batch_equals_single_images(name: str) -> None:
    if missing := iqa_weights.missing_weights(name):
        pytest.skip(f"weights not here (TORCH_HOME={os.environ.get('TORCH_HOME')}): {'; '.join(missing)}")
    image, reference = images(size=200 if name == "niqe" else 64)
    metric = create_metric(name, offline=True)
    singles = torch.cat([metric(image[i : i + 1], reference[i : i + 1]) for i in range(2)])
    assert torch.allclose(metric(image, reference), singles, atol=1e-6, rtol=0)


def test_reference_must_be_there_and_fit() -> None:
    image, reference = images()
    metric = create_metric("psnr")
    with pytest.raises(ValueError, match="needs a reference of shape .*got none"):
        metric(image)
    with pytest.raises(ValueError, match=r"got \(2, 3, 39, 40\)"):
        metric(image, reference[:, :, 1:])


@pytest.mark.parametrize(
    "name", ["lpips", "dists", "niqe", "musiq", "maniqa", "maniqa-pipal", "clipiqa", "liqe", "qalign", "fid"]
)
def test_missing_weights_are_named_without_network_or_pyiqa(
    name: str, empty_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iqa._pyiqa(), "create_metric", None)  # which would look for them for up to a minute
    with pytest.raises(MetricUnavailableError) as caught:
        create_metric(name, offline=True)
    message = str(caught.value)
    file = iqa_weights.WEIGHT_FILES[name][-1]
    folder = HF_HUB_CACHE if file.startswith("hf:") else str(empty_hub)
    assert "\n" not in message
    assert repr(name) in message and Path(file.removeprefix("hf:")).name in message and folder in message


def test_hf_hub_offline_means_offline(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MetricUnavailableError, match="not there, and offline"):
        create_metric("lpips")


def test_network_out_of_reach_is_said(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(iqa, "ask_network", lambda: None)
    monkeypatch.setattr(iqa, "network_reachable", lambda: False)
    with pytest.raises(MetricUnavailableError, match="the network cannot be reached"):
        create_metric("musiq")


def test_a_download_that_fails_is_one_line(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("HTTP Error 403:\n Forbidden")

    monkeypatch.setattr(iqa, "ask_network", lambda: None)
    monkeypatch.setattr(iqa, "network_reachable", lambda: True)
    monkeypatch.setattr("pyiqa.utils.download_util.download_url_to_file", fail)
    with pytest.raises(MetricUnavailableError) as caught:
        create_metric("niqe", offline=False)
    what = f"metric 'niqe' could not fetch niqe_modelparameters.mat in {empty_hub / 'pyiqa'}"
    assert str(caught.value) == f"{what}: HTTP Error 403: Forbidden"


def test_fid_needs_references_though_pyiqa_says_no() -> None:
    assert needs_reference("fid") and needs_reference("psnr") and not needs_reference("inception_score")


def test_all_metrics_of_folders_are_known() -> None:
    from pyiqa.archs import fid_arch, inceptionscore_arch
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    of_folders = {name for module in (fid_arch, inceptionscore_arch) for name in vars(module)}
    found = {name for name, config in DEFAULT_CONFIGS.items() if config["metric_opts"]["type"] in of_folders}
    assert found == iqa.DATASET_METRICS


def test_metric_outside_the_table_fails_at_its_first_download(empty_hub: Path) -> None:
    assert "arniqa" not in iqa_weights.WEIGHT_FILES
    with pytest.raises(MetricUnavailableError, match="arniqa.*is not on this machine and was not fetched"):
        create_metric("arniqa", offline=True)


@pytest.mark.parametrize(
    ("name", "module"), [("clipiqa", "pkg_resources"), ("liqe", "pkg_resources"), ("qalign", "icecream")]
)
def test_missing_package_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iqa_weights, "find_spec", lambda asked: None)
    with pytest.raises(MetricUnavailableError, match=f"{name}.*{module}.*pip install"):
        create_metric(name, offline=True)


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(UsageError, match="no metric 'ssmi'; did you mean ssim"):
        create_metric("ssmi")


def test_unavailable_is_a_user_error() -> None:
    assert issubclass(MetricUnavailableError, UserError) and MetricUnavailableError.exit_status == 1


@pytest.mark.parametrize("layout", ["", "hub/pyiqa", "pyiqa"])
def test_weights_folder_may_be_flat_or_laid_out_like_torch_home(
    layout: str, empty_hub: Path, tmp_path: Path, shared: Path
) -> None:
    source = shared / "metrics" / "niqe_modelparameters.mat"
    if not source.is_file():
        pytest.skip(f"no {source}")
    folder = tmp_path / "weights"
    target = folder / layout / source.name
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())
    metric = create_metric("niqe", weights_folder=folder, offline=True)
    image, _ = images(size=200)
    assert torch.isfinite(metric(image)).all() and not metric.needs_reference and metric.lower_is_better
    assert metric.weights == hashlib.sha256(source.read_bytes()).hexdigest()
    assert Path(torch.hub.get_dir()) == empty_hub  # put back


def test_hub_folder_is_that_of_now_not_of_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    source = shared / "metrics" / "niqe_modelparameters.mat"
    if not source.is_file():
        pytest.skip(f"no {source}")
    create_metric("psnr")  # imports pyiqa
    target = tmp_path / "pyiqa" / source.name
    target.parent.mkdir()
    target.write_bytes(source.read_bytes())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert create_metric("niqe", offline=True).weights is not None


def test_hash_of_several_files_is_that_of_their_listing(empty_hub: Path) -> None:
    lines = ""
    for entry in iqa_weights.WEIGHT_FILES["lpips"]:
        path = empty_hub / entry
        path.parent.mkdir(parents=True)
        path.write_bytes(entry.encode())
        lines += f"{hashlib.sha256(entry.encode()).hexdigest()}  {path.name}\n"
    assert iqa_weights.weights_sha256("lpips") == hashlib.sha256(lines.encode()).hexdigest()
    path.unlink()
    assert iqa_weights.weights_sha256("lpips") is None
    assert iqa_weights.weights_sha256("psnr") is None


def test_a_metric_that_draws_patches_repeats_itself() -> None:
    def model(image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(1, 2, 3)) + torch.rand(len(image)) + float(np.random.rand())

    metric = Metric("patches", model, needs_reference=False, lower_is_better=False, seed=3)
    image, _ = images()
    assert torch.equal(metric(image), metric(image))


def test_pyiqa_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    image, reference = images(size=200)
    create_metric("piqe")(image)
    create_metric("gmsd")(image, reference)
    assert capfd.readouterr() == ("", "")
