"""A folder of golden files, and the tiny networks in it.

`meta_va.json` holds the configuration, `meta_up.json` the settings of multi-step generation; safetensors hold weights
under published names, inputs, intermediates and outputs. Any folder of that form works: the models are built from its
own configuration.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig
from varestorer.transformer import TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import attach_adapters
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import utf8_path
from varestorer.weights.load import load_tokenizer, load_transformer


class GoldenFolder:
    """A folder of golden files, with models built from it.

    Raises:
        UsageError: the folder or one of its files is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = self._json("meta_va.json")
        self.multi_step = self._json("meta_up.json")
        config = self.meta["config"]
        self.config = config
        self.schedule = ScaleSchedule.template(config["nscale"], config["ratio"])
        given = tuple((h, w) for _, h, w in self.meta["scale_schedule"])
        if self.schedule.scales != given:
            raise UserError(f"{self.folder}: scale_schedule {given} is not the template of ratio {config['ratio']}")
        self.tokenizer_tensors = self.tensors("vae")
        self.teacher_tensors = self.tensors("teacher_outputs")
        self.student_tensors = self.tensors("student")

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {name} ({reason(error)})") from error

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Content of `<stem>.safetensors`."""
        path = self.folder / f"{stem}.safetensors"
        try:
            with utf8_path(path) as plain:
                return load_file(plain)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {path.name} ({reason(error)})") from error

    @staticmethod
    def state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights in a file: the entries under `sd/`."""
        return {name.removeprefix("sd/"): t for name, t in tensors.items() if name.startswith("sd/")}

    def tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer with the folder's weights."""
        config = TokenizerConfig(
            channels=self.config["base_ch"], multipliers=self.config["ch_mult"], latent_width=self.config["d"]
        )
        tokenizer = MultiScaleTokenizer(config).eval().requires_grad_(False)
        load_tokenizer(tokenizer, self.state_dict(self.tokenizer_tensors), "vae.safetensors")
        return tokenizer

    def _transformer(self) -> VARTransformer:
        config = TransformerConfig(
            width=self.config["C"],
            depth=self.config["depth"],
            num_heads=self.config["H"],
            latent_width=self.config["d"],
            text_width=self.config["Ct5"],
            text_length=self.config["tlen"],
            num_levels=len(self.student_tensors["sd/lvl_embed.weight"]),
        )
        return VARTransformer(config).eval().requires_grad_(False)

    def teacher(self) -> VARTransformer:
        """The base network with the folder's weights."""
        model = self._transformer()
        weights = self.state_dict(self.tensors("teacher_weights"))
        load_transformer(model, weights, "teacher_weights.safetensors")
        return model

    def student(self) -> VARTransformer:
        """Base and adapters with the folder's weights, with the traits of the released student."""
        model = self._transformer()
        attach_adapters(model, self.config["r"], cross_value_bias=False)
        weights = self.state_dict(self.student_tensors)
        load_transformer(model, weights, "student.safetensors")
        return model

    def text(self, tensors: dict[str, Tensor]) -> TextFeatures:
        """The two prompts of a file."""
        ends = tensors["input/text_cu_seqlens"].tolist()
        packed = tensors["input/text"]
        return TextFeatures.from_list([packed[a:b] for a, b in zip(ends, ends[1:], strict=False)])
