"""Which weight files the metrics of pyiqa (0.1.16) read, and where they are on this machine.

pyiqa finds out that a file is missing only while it builds a metric, after up to a minute of retries. This
table says it beforehand. An entry is `folder/file` inside torch's hub folder (`$TORCH_HOME/hub`), or
`hf:owner/name` for a repository in the Hugging Face cache.
"""

from __future__ import annotations

import hashlib
import os.path
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from varestorer.utils.files import expand_user, file_sha256

_ALEXNET = "checkpoints/alexnet-owt-7be5be79.pth"
_VGG16 = "checkpoints/vgg16-397923af.pth"
_INCEPTION = "pyiqa/pt_inception-2015-12-05-6726825d.pth"
_CLIP_RN50 = "clip/RN50.pt"
_CLIP_VIT = "clip/ViT-B-32.pt"
_RESNET50 = "hf:timm/resnet50.a1_in1k"
_RESNET50_TORCHVISION = "checkpoints/resnet50-0676ba61.pth"
_INCEPTION_RESNET = "hf:timm/inception_resnet_v2.tf_in1k"
_VIT_B8 = "hf:timm/vit_base_patch8_224.augreg2_in21k_ft_in1k"

_CLOSED_FORM = "psnr psnry ssim ssimc ms_ssim cw_ssim fsim vif gmsd nlpd vsi mad piqe entropy"

WEIGHT_FILES: dict[str, tuple[str, ...]] = {
    **{name: () for name in _CLOSED_FORM.split()},
    "lpips": (_ALEXNET, "pyiqa/LPIPS_v0.1_alex-df73285e.pth"),
    "lpips+": (_ALEXNET, "pyiqa/LPIPS_v0.1_alex-df73285e.pth"),
    "lpips-vgg": (_VGG16, "pyiqa/LPIPS_v0.1_vgg-a78928a0.pth"),
    "lpips-vgg+": (_VGG16, "pyiqa/LPIPS_v0.1_vgg-a78928a0.pth"),
    "stlpips": ("pyiqa/alex_shift_tolerant.pth",),
    "stlpips-vgg": ("pyiqa/vgg_shift_tolerant.pth",),
    "dists": (_VGG16, "pyiqa/DISTS_weights-f5e65c96.pth"),
    "deepdc": ("checkpoints/vgg19-dcbb9e9d.pth",),
    "dmm": (_VGG16,),
    "msswd": ("pyiqa/msswd_weights.pth",),
    "ckdn": ("checkpoints/resnet50-19c8e357.pth", "pyiqa/CKDN_model_best-38b27dc6.pth"),
    "ahiq": (_RESNET50, _VIT_B8, "pyiqa/AHIQ_vit_p8_epoch33-da3ea303.pth"),
    "pieapp": ("pyiqa/PieAPPv0.1-0937b014.pth",),
    "wadiqam_fr": ("pyiqa/WaDIQaM-kadid-f7541ea5.pth",),
    "wadiqam_nr": ("pyiqa/WaDIQaM-NR-koniq-aaffea29.pth",),
    "topiq_fr": (_RESNET50, "pyiqa/cfanet_fr_kadid_res50-2c4cc61d.pth"),
    "topiq_fr-pipal": (_RESNET50, "pyiqa/cfanet_fr_pipal_res50-69bbe5ba.pth"),
    "topiq_nr": (_RESNET50, "pyiqa/cfanet_nr_koniq_res50-9a73138b.pth"),
    "topiq_nr-flive": (_RESNET50, "pyiqa/cfanet_nr_flive_res50-ded1c74e.pth"),
    "topiq_nr-spaq": (_RESNET50, "pyiqa/cfanet_nr_spaq_res50-a7f799ac.pth"),
    "topiq_iaa": ("checkpoints/swin_base_patch4_window12_384_22kto1k.pth", "pyiqa/cfanet_iaa_ava_swin-393b41b4.pth"),
    "topiq_iaa_res50": (_RESNET50, "pyiqa/cfanet_iaa_ava_res50-3cd62bb3.pth"),
    "niqe": ("pyiqa/niqe_modelparameters.mat",),
    "niqe_matlab": ("pyiqa/niqe_matlab_params.mat",),
    "ilniqe": ("pyiqa/ILNIQE_templateModel.mat",),
    "brisque": ("pyiqa/brisque_svm_weights.pth",),
    "brisque_matlab": ("pyiqa/brisque_matlab.mat",),
    "nrqm": ("pyiqa/NRQM_model.mat",),
    "pi": ("pyiqa/NRQM_model.mat", "pyiqa/niqe_modelparameters.mat"),
    "cnniqa": ("pyiqa/CNNIQA_koniq10k-e6f14c91.pth",),
    "dbcnn": (_VGG16, "pyiqa/DBCNN_scnn-7ea73d75.pth", "pyiqa/DBCNN_KonIQ10k-2de81c0a.pth"),
    "hyperiqa": (_RESNET50, "pyiqa/HyperIQA-resnet50-koniq10k-c96c41b1.pth"),
    "maniqa": (_VIT_B8, "pyiqa/ckpt_koniq10k.pt"),
    "maniqa-pipal": (_VIT_B8, "pyiqa/MANIQA_PIPAL-ae6d356b.pth"),
    "maniqa-kadid": (_VIT_B8, "pyiqa/ckpt_kadid10k.pt"),
    "musiq": ("pyiqa/musiq_koniq_ckpt-e95806b9.pth",),
    "musiq-ava": ("pyiqa/musiq_ava_ckpt-e8d3f067.pth",),
    "musiq-paq2piq": ("pyiqa/musiq_paq2piq_ckpt-364c0c84.pth",),
    "musiq-spaq": ("pyiqa/musiq_spaq_ckpt-358bb6af.pth",),
    "nima": (_INCEPTION_RESNET, "pyiqa/NIMA_InceptionV2_ava-b0c77c00.pth"),
    "nima-koniq": (_INCEPTION_RESNET, "pyiqa/NIMA_koniq-250367ae.pth"),
    "nima-spaq": (_INCEPTION_RESNET, "pyiqa/NIMA-spaq-46a7fcb7.pth"),
    "paq2piq": ("checkpoints/resnet18-f37072fd.pth", "pyiqa/P2P_RoIPoolModel-fit.10.bs.120-ca69882e.pth"),
    "tres": (_RESNET50_TORCHVISION, "pyiqa/tres_koniq-f0502926.pth"),
    "tres-flive": (_RESNET50_TORCHVISION, "pyiqa/tres_flive-09b0de5b.pth"),
    "unique": ("checkpoints/resnet34-b627a593.pth", "pyiqa/UNIQUE.pt"),
    "uranker": ("pyiqa/URanker_ckpt-450eb36d.pth",),
    "clipiqa": (_CLIP_RN50,),
    "clipiqa+": (_CLIP_RN50, "pyiqa/CLIP-IQA+_learned_prompts-603f3273.pth"),
    "clipiqa+_rn50_512": (_CLIP_RN50, "pyiqa/CLIPIQA+_RN50_512-89f5d940.pth"),
    "clipiqa+_vitL14_512": ("clip/ViT-L-14.pt", "pyiqa/CLIPIQA+_ViTL14_512-e66488f2.pth"),
    "liqe": (_CLIP_VIT, "pyiqa/liqe_koniq.pt"),
    "liqe_mix": (_CLIP_VIT, "pyiqa/liqe_mix.pt"),
    "qalign": ("hf:q-future/one-align",),
    "qalign_8bit": ("hf:q-future/one-align",),
    "qalign_4bit": ("hf:q-future/one-align",),
    "fid": (_INCEPTION,),
    "sfid": (_INCEPTION,),
    "inception_score": (_INCEPTION,),
}

_CLIP_REMEDY = 'pip install "setuptools<81"'
PACKAGES: dict[str, tuple[str, str]] = {
    **{name: ("pkg_resources", _CLIP_REMEDY) for name in WEIGHT_FILES if name.startswith(("clip", "liqe"))},
    **{name: ("icecream", "pip install icecream") for name in ("qalign", "qalign_8bit", "qalign_4bit")},
}
"""Python packages that pyiqa does not install for these metrics: (module, remedy)."""


def hub_folder() -> Path:
    """Torch's hub folder as it is now (`$TORCH_HOME/hub`): where pyiqa keeps and looks for weights."""
    return Path(os.path.expanduser(torch.hub.get_dir()))


def missing_package(metric: str) -> str | None:
    """Say which Python package the metric lacks, with the remedy; None when it has all."""
    module, remedy = PACKAGES.get(metric, ("", ""))
    if not module or find_spec(module):
        return None
    return f"needs the Python module {module!r} ({remedy})"


def find_weights(metric: str, folder: str | Path | None = None) -> dict[str, Path]:
    """The weight files of a metric that exist: table entry -> file, or snapshot folder of a whole repository.

    Nothing is known of metrics outside the table. `folder` is searched first: a copy of TORCH_HOME, of its `hub`
    folder, or the bare files.
    """
    places = {entry: _find(entry, folder) for entry in WEIGHT_FILES.get(metric, ())}
    return {entry: path for entry, path in places.items() if path is not None}


def missing_weights(metric: str, folder: str | Path | None = None) -> list[str]:
    """Describe each missing weight file as `file in folder`; empty when all are there."""
    found = find_weights(metric, folder)
    return [_describe(entry, folder) for entry in WEIGHT_FILES.get(metric, ()) if entry not in found]


def weights_sha256(metric: str, folder: str | Path | None = None) -> str | None:
    """Identify the weights that a metric reads; None without files, or when they are not on this machine.

    One file: its SHA-256. Several: the SHA-256 of the lines `<sha256> <file name>` (as `sha256sum` prints them) in the
    table's order.
    """
    files = find_weights(metric, folder)
    if not files or len(files) < len(WEIGHT_FILES[metric]):
        return None
    hashes = [_sha256(str(path)) for path in files.values()]
    if len(hashes) == 1:
        return hashes[0]
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(hashes, files.values(), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _find(entry: str, folder: str | Path | None) -> Path | None:
    if entry.startswith("hf:"):
        return _find_repository(entry.removeprefix("hf:"))
    candidates = [hub_folder() / entry]
    if folder is not None:
        root = expand_user(folder)
        candidates = [root / "hub" / entry, root / entry, root / Path(entry).name, *candidates]
    return next((path for path in candidates if path.is_file()), None)


def _find_repository(repository: str) -> Path | None:
    """The weights of a repository in the Hugging Face cache: its file, or the folder when it has several."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    config = try_to_load_from_cache(repository, "config.json")
    has_shards = isinstance(config, str) and any(Path(config).parent.glob("*.index.json"))
    return Path(str(config)).parent if has_shards else None


def _describe(entry: str, folder: str | Path | None) -> str:
    if entry.startswith("hf:"):
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"the repository {entry.removeprefix('hf:')} in {HF_HUB_CACHE}"
    wanted = hub_folder() / entry
    return f"{wanted.name} in {wanted.parent}" + (f" or {folder}" if folder is not None else "")


@cache
def _sha256(path: str) -> str:
    """Digest of a file; of a folder, that of its files' names and sizes (the contents are gigabytes)."""
    if os.path.isdir(path):
        listing = [f"{p.name} {p.stat().st_size}\n" for p in sorted(Path(path).iterdir())]
        return hashlib.sha256("".join(listing).encode()).hexdigest()
    return file_sha256(path)
