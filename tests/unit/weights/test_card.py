"""The model card: a head the hub understands, what is in the bundle, where it came from, whose terms apply."""

from dataclasses import asdict

import yaml

from varestorer.systems.varestorer import StudentConfig
from varestorer.tokenizer import TokenizerConfig
from varestorer.transformer import TransformerConfig
from varestorer.weights.card import model_card

FILES = {"transformer.safetensors": 8_818_256_128, "adapters.safetensors": 54_525_952, "tokenizer.safetensors": 99}
RELEASE = {"varestorer.pth": "a" * 64, "infinity_vae_d32reg.pth": "b" * 64, "general_swinir_v1.ckpt": "c" * 64}


def config(**student: object) -> dict:
    parts = {"tokenizer": TokenizerConfig(), "transformer": TransformerConfig(), "student": StudentConfig(**student)}
    return {
        "format": 1,
        "system": "varestorer",
        "schedule": {"size": "0.25M"},
        **{name: asdict(part) for name, part in parts.items()},
    }


def head(card: str) -> dict:
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_the_head_is_what_the_hub_reads() -> None:
    found = head(model_card(config(), FILES, RELEASE))
    assert found["license"] == "other"
    assert found["license_name"] == "terms-of-the-parts"
    assert (found["library_name"], found["pipeline_tag"]) == ("varestorer", "image-to-image")
    assert "super-resolution" in found["tags"]


def test_a_model_of_ones_own_is_mit_and_says_that_nothing_was_converted() -> None:
    card = model_card(config(), FILES, {})
    assert head(card)["license"] == "mit"
    assert "no file was converted" in card
    assert "whoever trained them" in card
    assert "Infinity" not in card


def test_sources_are_listed_with_their_hashes_and_the_owners_terms() -> None:
    card = model_card(config(), FILES, RELEASE)
    for name, digest in RELEASE.items():
        assert f"| `{name}` | `{digest}` |" in card
    assert "`varestorer.pth`: VARestorer (EternalEvan/VARestorer): the repository is MIT." in card
    assert "`infinity_2b_reg.pth`: Infinity (FoundationVision/Infinity): its license was not verified." in card
    assert "DiffBIR (XPixelGroup/DiffBIR): the repository is Apache-2.0." in card
    assert "owners' terms apply" in card


def test_files_and_sizes_are_told() -> None:
    card = model_card(config(), FILES, RELEASE, precision="bf16")
    assert "| `transformer.safetensors` | 8,818.3 MB |" in card
    assert "| `adapters.safetensors` | 54.5 MB |" in card
    assert "| `tokenizer.safetensors` | 99 bytes |" in card
    assert "width 2048, 32 blocks, 16 heads" in card
    assert "32 bits per token of 16x16 pixels" in card
    assert "blocks in bf16, everything else in fp32" in card
    assert "Precision" not in model_card(config(), FILES, RELEASE)


def test_what_became_of_the_adapters_is_told() -> None:
    separate = model_card(config(), FILES, RELEASE)
    merged = model_card(config(merged=True), FILES, RELEASE)
    without = model_card(config(lora_rank=0), FILES, RELEASE)
    assert "(rank 32) are kept apart" in separate
    assert "are merged into the transformer" in merged
    assert "`steps=one` is the only choice" in merged
    assert "It has no adapters." in without
    assert "one-step image super-resolution" in separate
    assert "without the\nadapters of a one-step student" in without


def test_the_use_and_the_citation_are_there_and_no_brace_is_left_over() -> None:
    card = model_card(config(), FILES, RELEASE)
    assert 'load("' in card
    assert "python scripts/restore.py input=photo.jpg" in card
    assert "@inproceedings{varestorer2026," in card
    assert "{{" not in card
    assert all(len(line) <= 120 for line in card.splitlines())


def test_the_same_facts_give_the_same_text() -> None:
    backwards = dict(reversed(RELEASE.items()))
    assert model_card(config(), FILES, RELEASE) == model_card(config(), dict(reversed(FILES.items())), backwards)
