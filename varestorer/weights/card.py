"""The model card of a bundle: the `README.md` that the Hugging Face hub shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varestorer.weights.published import RESTORER_FILE, STUDENT_FILE, TOKENIZER_FILE, TRANSFORMER_FILE

# What was read in the owners' repositories; the license of a repository need not be that of its weights.
TERMS = {
    STUDENT_FILE: "VARestorer (EternalEvan/VARestorer): the repository is MIT",
    TRANSFORMER_FILE: "Infinity (FoundationVision/Infinity): its license was not verified",
    TOKENIZER_FILE: "the tokenizer of Infinity (FoundationVision/Infinity): its license was not verified",
    RESTORER_FILE: "GeneralSwinIR of DiffBIR (XPixelGroup/DiffBIR): the repository is Apache-2.0",
}
CONTENTS = {
    "tokenizer.safetensors": "images to tokens and back",
    "transformer.safetensors": "predicts the tokens",
    "adapters.safetensors": "make the one-step student of the transformer",
    "restorer.safetensors": "cleans an image before it is tokenized",
}
PAPER = ("name", "arxiv", "title", "venue", "year")
PAPERS = {
    "varestorer": (
        "VARestorer",
        "2604.21450",
        "VARestorer: One-Step VAR Distillation for Real-World Image Super-Resolution",
        "International Conference on Learning Representations",
        2026,
    ),
    "varsr": (
        "VARSR",
        "2501.18993",
        "Visual Autoregressive Modeling for Image Super-Resolution",
        "International Conference on Machine Learning",
        2025,
    ),
    "hvar": (
        "H-VAR",
        "2506.04990",
        "Multi-scale Image Super Resolution with a Single Auto-Regressive Model",
        "arXiv",
        2025,
    ),
}


def model_card(
    config: Mapping[str, Any], files: Mapping[str, int], sources: Mapping[str, str], precision: str | None = None
) -> str:
    """The text of a card, by the template `card.md`; the same arguments give the same text.

    Args:
        config: of the bundle: `system`, `schedule`, `tokenizer`, `transformer`, and `student` where there is one.
        files: the bundle's files of tensors and their sizes in bytes.
        sources: SHA-256 of the files that the weights were converted from, by their names.
        precision: of the transformer's blocks, or "fp16": in which all is stored; None leaves it out.
    """
    from jinja2 import Template

    # the student was trained from Infinity's transformer, and so holds it too
    known = {*sources, TRANSFORMER_FILE} if STUDENT_FILE in sources else set(sources)
    tokenizer = config["tokenizer"]
    return Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        {"student": None, **config},
        **dict(zip(PAPER, PAPERS[config["system"]], strict=True)),
        files=files,
        contents=defaultdict(str, CONTENTS),
        sources=sources,
        terms={name: terms for name, terms in TERMS.items() if name in known},
        is_release=STUDENT_FILE in sources,
        stride=tokenizer["patch_size"] * 2 ** (len(tokenizer["multipliers"]) - 1),
        precision=precision,
    )
