"""The model card of a bundle: the `README.md` that the Hugging Face hub shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from varestorer.weights.published import RESTORER_FILE, STUDENT_FILE, TOKENIZER_FILE, TRANSFORMER_FILE

# What was read in the owners' repositories; the license of a repository need not be that of its weights.
TERMS = {
    STUDENT_FILE: "VARestorer (EternalEvan/VARestorer): the repository is MIT",
    TRANSFORMER_FILE: "Infinity (FoundationVision/Infinity): its license was not verified",
    TOKENIZER_FILE: "the tokenizer of Infinity (FoundationVision/Infinity): its license was not verified",
    RESTORER_FILE: "GeneralSwinIR of DiffBIR (XPixelGroup/DiffBIR): the repository is Apache-2.0",
}
BASED_ON = {STUDENT_FILE: (TRANSFORMER_FILE,)}  # what a file was trained from, and so holds too
CONTENTS = {
    "tokenizer.safetensors": "images to tokens and back",
    "transformer.safetensors": "predicts the tokens",
    "adapters.safetensors": "make the one-step student of the transformer",
    "restorer.safetensors": "cleans an image before it is tokenized",
}

PAPERS = {  # system -> its name, arXiv number, title, where, when
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

TEMPLATE = """\
---
{front_matter}
---

# {title}

{what}

## What is in it

{files}

{sizes}

{adapters}

## How to use it

```python
from varestorer.systems import load
from varestorer.utils.images import load_image, save_image

system = load("THIS_FOLDER_OR_ITS_NAME_ON_THE_HUB")
save_image("restored.png", system.restore(load_image("photo.jpg"), scale=4).image)
```

```
python scripts/restore.py input=photo.jpg output=restored ckpt=THIS_FOLDER_OR_ITS_NAME_ON_THE_HUB
```

Images of any size and aspect are taken. What the model cannot see it invents: do not read number plates, faces or
measurements out of its pictures.

## Where the weights came from

{sources}

## Licenses

{licenses}

## Citation

```bibtex
{citation}
```
"""
OWN_LICENSE = (
    "The weights belong to whoever trained them; change `license` in the head of this file if it is not MIT.\n"
    "The `varestorer` package is MIT."
)


def model_card(
    config: Mapping[str, Any], files: Mapping[str, int], sources: Mapping[str, str], precision: str | None = None
) -> str:
    """The text of a card; the same arguments give the same text.

    Args:
        config: of the bundle: `system`, `schedule`, `tokenizer`, `transformer`, and `student` where there is one.
        files: the bundle's files of tensors and their sizes in bytes.
        sources: SHA-256 of the files that the weights were converted from, by their names.
        precision: of the transformer's blocks, or "fp16": in which all is stored; None leaves it out.
    """
    from_release = any(name in TERMS for name in sources)
    student = config.get("student") or {"lora_rank": 0}
    name, arxiv, title, venue, year = PAPERS[config["system"]]
    return TEMPLATE.format(
        front_matter=_front_matter(from_release),
        title="VARestorer" if STUDENT_FILE in sources else f"A {name} model",
        what=_what(bool(student["lora_rank"])) if "student" in config else _of_paper(name, arxiv),
        files=_table(files),
        sizes=_sizes(config, precision),
        adapters=_adapters(student),
        sources=_sources(sources),
        licenses=_licenses(sources) if from_release else OWN_LICENSE,
        citation=_citation(config["system"], title, venue, year, arxiv),
    )


def _front_matter(from_release: bool) -> str:
    license = ["license: other", "license_name: terms-of-the-parts"] if from_release else ["license: mit"]
    tags = ["super-resolution", "image-restoration", "visual-autoregressive", "safetensors"]
    lines = [*license, "library_name: varestorer", "pipeline_tag: image-to-image", "tags:"]
    return "\n".join([*lines, *(f"  - {tag}" for tag in tags)])


def _what(is_student: bool) -> str:
    kind = (
        "one-step image super-resolution with a visual\nautoregressive transformer. It is a text-to-image network, "
        "distilled so that a single pass predicts the bits of all\nscales from the degraded image"
        if is_student
        else "a visual autoregressive transformer without the\nadapters of a one-step student"
    )
    return f"A bundle of the `varestorer` package: {kind} ([arXiv 2604.21450](https://arxiv.org/abs/2604.21450))."


def _of_paper(name: str, arxiv: str) -> str:
    return (
        "A bundle of the `varestorer` package: image super-resolution with a visual autoregressive transformer,\n"
        f"{name} ([arXiv {arxiv}](https://arxiv.org/abs/{arxiv}))."
    )


def _citation(key: str, title: str, venue: str, year: int, arxiv: str) -> str:
    lines = [f"@inproceedings{{{key}{year},", f"  title     = {{{title}}},", f"  booktitle = {{{venue}}},"]
    return "\n".join([*lines, f"  year      = {{{year}}},", f"  note      = {{arXiv:{arxiv}}}", "}"])


def _table(files: Mapping[str, int]) -> str:
    sizes = {name: f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n:,} bytes" for name, n in sorted(files.items())}
    rows = [f"| `{name}` | {size} | {CONTENTS.get(name, '')} |" for name, size in sizes.items()]
    return "\n".join(["| file | size | what it does |", "|---|---|---|", *rows, "| `config.json` | | the sizes |"])


def _sizes(config: Mapping[str, Any], precision: str | None) -> str:
    transformer, tokenizer = config["transformer"], config["tokenizer"]
    stride = tokenizer["patch_size"] * 2 ** (len(tokenizer["multipliers"]) - 1)
    classes, vocabulary = transformer.get("num_classes"), tokenizer.get("vocabulary")
    condition = f"{classes} learned conditions" if classes else f"text features of width {transformer['text_width']}"
    token = f"one of {vocabulary} codes" if vocabulary else f"{tokenizer['latent_width']} bits"
    lines = [
        f"- Transformer: width {transformer['width']}, {transformer['depth']} blocks, "
        f"{transformer['num_heads']} heads, {condition}.",
        f"- Tokenizer: {token} per token of {stride}x{stride} pixels, {tokenizer['channels']} channels.",
        f"- Schedule: {', '.join(f'{key} {value}' for key, value in sorted(config['schedule'].items()))}.",
    ]
    if precision == "fp16":
        lines.append("- Stored in fp16, computed in fp32 or, in the transformer's blocks and the decoder, in bf16.")
    elif precision:
        lines.append(f"- Precision: the transformer's blocks in {precision}, everything else in fp32.")
    return "\n".join(lines)


def _adapters(student: Mapping[str, Any]) -> str:
    rank = student["lora_rank"]
    if not rank:
        return "It has no adapters."
    if student.get("merged"):
        return (
            f"The adapters (rank {rank}) are merged into the transformer: it is faster so, but the teacher is gone, "
            "and\n`steps=one` is the only choice."
        )
    return (
        f"The adapters (rank {rank}) are kept apart: without them the transformer is the teacher, which `steps=K` and\n"
        "`steps=multi` need. `scripts/convert.py adapters=merged` folds them in."
    )


def _sources(sources: Mapping[str, str]) -> str:
    if not sources:
        return "They were trained with `varestorer`; no file was converted."
    rows = [f"| `{name}` | `{digest}` |" for name, digest in sorted(sources.items())]
    return "\n".join(["| file | SHA-256 |", "|---|---|", *rows])


def _licenses(sources: Mapping[str, str]) -> str:
    names = set(sources).union(*(BASED_ON.get(name, ()) for name in sources))
    lines = [f"- `{name}`: {terms}." for name, terms in TERMS.items() if name in names]
    head = (
        "The owners' terms apply to the weights, and converting changes nothing about that: read them before you use\n"
        "or share the weights. None of these statements was checked for the weights themselves:"
    )
    return "\n".join([head, "", *lines, "", "The `varestorer` package is MIT."])
