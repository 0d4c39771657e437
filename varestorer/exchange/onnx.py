"""The merged one-step student as an ONNX file: degraded squares in, restored squares and their bits out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer

INPUT, IMAGE, BITS = "image", "restored", "bits"
OPSET = 18
MOST_BYTES = 2**31 - 2**24  # of a protobuf message, with room for the graph


class OneStep(nn.Module):
    """What is exported: from squares (B, 3, t, t) in [0, 1] to squares in [0, 1] and the bits (B, L, Z).

    The system has merged adapters, and restores without a prompt, by the likelier bits.
    """

    def __init__(self, system: VARestorer) -> None:
        super().__init__()
        self.system = system
        self.text = system.transformer.prepare(system.null_text(1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        batch = self.system.predict_squares(self.text, image, None)
        return batch.images_B3HW, torch.cat([bits.flatten(2) for bits in batch.indices], dim=2).transpose(1, 2)


@torch.no_grad()
def export(system: VARestorer, path: Path) -> None:
    """Write the one-step student of a fixed square with a batch of any size.

    Bits are torch's but for ties: nano's on 24 squares of RealSR differed in 7 of 744,960 (torch's own, one by one
    and by eight, in 1), and no pixel by more than 0.02 levels.

    The system's adapters are folded in, so that no teacher is left. Metadata of the file say `tile`, the side of the
    square (pixels). UserError: not a one-step student of VARestorer, too large a one, or no extra `[onnx]`.
    """
    if system.name != "varestorer" or system.student_config.conditioning == "prefix":
        raise UserError("output=FILE.onnx is for one-step students of varestorer; this model restores in several steps")
    try:
        import onnxscript  # noqa: F401  # by torch's exporter
    except ImportError as error:
        raise UserError('output=FILE.onnx needs more packages: pip install "varestorer[onnx]"') from error
    if sum(tensor.nbytes for tensor in system.state_dict().values()) > MOST_BYTES:
        raise UserError("this model is larger than an ONNX file can hold (2 GB)")
    student = OneStep(system.set_precision("fp32").merge_adapters().eval())
    example = torch.zeros(2, 3, system.tile, system.tile)  # of one sample the exporter would make a constant batch
    student(example)  # tables of positions, made once for all passes, are constants of the graph
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            student,
            (example,),
            input_names=[INPUT],
            output_names=[IMAGE, BITS],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=OPSET,
            optimize=True,  # no faster, but without it onnxruntime warns of each cast that it cannot fold
            verbose=False,
            dynamo=True,
        )
    model = program.model_proto
    model.producer_name = "varestorer"
    entry = model.metadata_props.add()
    entry.key, entry.value = "tile", str(system.tile)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
