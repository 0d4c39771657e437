"""Text encoder and captioner of random tiny size, as transformers saves them."""

from pathlib import Path

import torch


def save_t5(folder: Path, width: int = 16, seed: int = 0) -> Path:
    """Save a T5 whose tokenizer knows the words `a dog on grass` and the letters a to j."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [f"▁{word}" for word in "a dog on grass".split()]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *words, *"abcdefghij"]
    vocabulary = [(piece, 0.0 if index < 3 else -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names["model_input_names"] = ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **size)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """Save a BLIP that knows ten words and sees 32 x 32 pixels."""
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = [*special, *"a dog cat tree house on grass under sky".split()]
    folder.mkdir(parents=True, exist_ok=True)
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
