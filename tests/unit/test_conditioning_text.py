"""Text encoder and captioner, with real transformers classes of random tiny size saved to a folder."""

import json
from pathlib import Path

import pytest
import torch

from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.text_encoder import TextEncoder, add_positive_prompt
from varestorer.utils.errors import UserError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    words = [f"▁{word}" for word in "a dog on grass".split()]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *words, *"abcdefghij"]
    vocabulary = [(piece, 0.0 if index < 3 else -float(index)) for index, piece in enumerate(pieces)]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **size)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = [*special, *"a dog cat tree house on grass under sky".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    image_processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 5, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=text | {"eos_token_id": 3, "sep_token_id": 3, "projection_dim": 16},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_rows_are_those_of_the_real_tokens_and_do_not_depend_on_padding(t5_folder: Path) -> None:
    encoder = TextEncoder(str(t5_folder))
    dog, empty = encoder.encode(["a dog on grass", ""])
    assert dog.shape == (5, 16) and empty.shape == (1, 16)
    assert dog.dtype == torch.float32 and not dog.requires_grad
    torch.testing.assert_close(encoder.encode(["a dog on grass"])[0], dog)


def test_padding_to_512_as_released_gives_the_same_rows(t5_folder: Path) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(t5_folder, legacy=True)(
        ["a dog"], max_length=512, padding="max_length", truncation=True, return_tensors="pt"
    )
    model = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        want = model(**tokens).last_hidden_state[0, : int(tokens.attention_mask.sum())]
    torch.testing.assert_close(TextEncoder(str(t5_folder)).encode(["a dog"])[0], want, atol=1e-5, rtol=0)


def test_long_prompts_are_cut_and_no_prompt_needs_no_model(t5_folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(str(t5_folder), max_length=8)
    assert encoder.encode(["dog " * 50])[0].shape == (8, 16)
    assert TextEncoder(str(tmp_path / "nothing")).encode([]) == []


def test_it_loads_once_and_only_when_needed(t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    real = transformers.T5EncoderModel.from_pretrained

    def counted(path: str, **options):
        loads.append(path)
        return real(path, **options)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", counted)
    encoder = TextEncoder(str(t5_folder))
    assert loads == []
    first = encoder.encode(["a dog"])
    encoder.encode(["a"])
    assert len(loads) == 1
    encoder.release()
    assert torch.equal(encoder.encode(["a dog"])[0], first[0])
    assert len(loads) == 2


def test_positive_prompt_is_appended_before_encoding(t5_folder: Path) -> None:
    encoder = TextEncoder(str(t5_folder))
    asked = encoder.encode(["a man"], use_positive_prompt=True)[0]
    assert torch.equal(asked, encoder.encode([add_positive_prompt("a man")])[0])
    assert asked.shape[0] > encoder.encode(["a man"])[0].shape[0]


@pytest.mark.parity
def test_positive_prompts_match_the_released_code(shared: Path) -> None:
    cases = json.loads((shared / "fixtures/infinity/meta_va.json").read_text())["tiling"]["prompt_aug"]
    assert [add_positive_prompt(prompt) for prompt, _ in cases] == [wanted for _, wanted in cases]


def test_captions_are_words_one_an_image_and_repeatable(blip_folder: Path) -> None:
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    captions = Captioner(str(blip_folder), max_tokens=5).caption(images)
    assert len(captions) == 2
    assert all(0 < len(caption.split()) <= 5 for caption in captions)
    again = Captioner(str(blip_folder), max_tokens=5)
    assert again.caption(images) == captions
    again.release()
    assert again.caption(images[:1]) == captions[:1]


def test_missing_folders_say_what_to_get_and_which_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing does not exist.*google/flan-t5-xl.* set text_encoder"):
        TextEncoder(str(tmp_path / "nothing")).encode(["a dog"])
    with pytest.raises(UserError, match=r"download Salesforce/blip.* set captioner"):
        Captioner(str(tmp_path / "nothing")).caption(torch.zeros(1, 3, 8, 8))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded as google/flan-t5-xl"):
        TextEncoder(str(tmp_path)).encode(["a dog"])
