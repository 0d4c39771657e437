"""`benchmark`: how fast the program is, stage by stage, and what it needs of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from omegaconf import DictConfig

from varestorer.commands.entry import Command, typed
from varestorer.utils.errors import UsageError
from varestorer.utils.files import check_writable, expand_user

WHAT = {
    "restore": "varestorer.commands.benchmark.restore",
    "generate": "varestorer.commands.benchmark.generate",
    "train_step": "varestorer.commands.benchmark.train_step",
    "startup": "varestorer.commands.benchmark.startup",
    "all": "varestorer.commands.benchmark.together",
    "memory": "varestorer.commands.benchmark.memory",
    "loader": "varestorer.commands.benchmark.loader",
}
"""The module of each benchmark; its `run` takes the config and returns the exit status."""

HELP = """
varestorer benchmark: how fast the program is, stage by stage, and what it needs of memory.

usage: varestorer benchmark what=WHAT [key=value ...]      (or: python scripts/benchmark.py ...)

  varestorer benchmark what=restore                           one-step restoring, each variant in turns, stage by stage
  varestorer benchmark what=restore model=2b 'batch=[1,16]' 'variants=[eager,merged+bf16,merged+bf16+graphs]'
  varestorer benchmark what=generate                          one step beside scale-by-scale generation
  varestorer benchmark what=train_step                        a training step: images a second, share of the peak
  varestorer benchmark what=startup                           how long the program takes to start
  varestorer benchmark what=all model=2b device=cuda          these four, one after another, into one folder
  varestorer benchmark what=memory                            the paper's distillation, by calculation, no GPU needed
  varestorer benchmark what=memory train=teacher_512 'micro_batches=[1,2]'
  varestorer benchmark what=memory 'overrides=["model=125m","stages.student.task.checkpoint_activations=false"]'
  varestorer benchmark what=loader root=PHOTOS                 pairs a second and core, and how many cores a GPU wants

options of what=restore, generate, train_step and startup
  model=nano|125m|2b        weights of these sizes, drawn at random: speed does not depend on their values
  ckpt=MODEL                a run of scripts/train.py, a bundle or the published student instead
  variants=[...]            what is compared; of restore: eager, or merged, bf16, compile, graphs, int8, fp8 joined
                            by + ; default: what the device can do. They take turns (A B A B)
  batch=[1]                 images at once, or several such numbers
  repeats=10 warmup=3       timed runs of each variant, and untimed ones before them
  device=auto|cpu|cuda
  out=FOLDER                default: outputs/benchmark/WHAT_TIME; benchmark.json, benchmark.png

options of what=restore
  picture=512|null          side of a picture that is also restored by tiles, pixels
  restorer=auto|published|none   a restorer of the published sizes in front; auto: for model=2b
  text=null|t5|FOLDER       also time a text encoder: t5 has the published sizes and random weights
  text_tokens=64            tokens of its prompt
  captioner=FOLDER          also time this captioner
  color=adain|wavelet       the correction of colours that is timed beside the networks

options of what=generate
  variants=[...]            one, one+short (without the long input), multi, multi+cfg; with +prefix (the degraded image
                            in front) and +nocache (no keys and values kept); all with +compile or +graphs

options of what=train_step
  train=EXPERIMENT          its last stage counts ('overrides=["~stages.student"]': the one before), at model= sizes
  variants=[...]            eager, bf16, checkpoint, compile, slices, crop256 joined by +

A stage's floor is the larger of two times: its operations at the rate of the device's products of matrices, and the
least bytes it must move (weights once, what goes in and comes out) at the rate of the device's copies, both measured
in the same run, the former in the precision of the blocks. What the floor leaves out (norms, activations, launches,
the float32 of the VAE's encoder beside bfloat16 blocks) is the gap. Every variant but eager keeps what it makes of the
text from batch to batch; eager computes it anew. All variants are in memory at once: on a small GPU name fewer.

what=all model=2b on an H200 prints what the program is meant to reach there, beside what it did.

options of what=loader
  root=FOLDER               photographs; default: the embedded ones
  crop=512 pairs=32         side of the squares, pixels, and how many are made
  step_seconds=1.0          time of a training step that is to be fed

options of what=memory
  train=EXPERIMENT          of scripts/train.py; its last stage counts; default dmd_div2k
  'overrides=["KEY=VALUE"]' of the experiment's config
  micro_batches=[1,2,4]     images that go through the networks at once (trainer.batch_size over processes and
                            trainer.accumulate)
  device=auto|cpu|cuda      on a GPU the peak is measured too, with weights drawn at random
  out=FOLDER                also write memory.json there

The calculation of what=memory follows every tensor of one step, as under bfloat16 autocast on CUDA. Not in it: what
CUDA takes for itself (about half a gigabyte), cuDNN's working memory, and gaps between tensors: leave a tenth.

Exit status: 0 all well; 1 something could not be measured; 2 the command was wrong.
"""


@dataclass
class BenchmarkOptions:
    """The keys of `configs/benchmark.yaml`, explained there; values of another type are refused."""

    model: Any = None
    what: str = "memory"
    device: str = "auto"
    seed: int = 0
    out: str | None = None
    ckpt: str | None = None
    variants: list[str] | None = None
    batch: list[int] = field(default_factory=list)
    repeats: int = 10
    warmup: int = 3
    picture: int | None = None
    restorer: str = "auto"
    text: str | None = None
    text_tokens: int = 64
    captioner: str | None = None
    color: str = "adain"
    train: str = "dmd_div2k"
    overrides: list[str] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    root: str | None = None
    crop: int = 512
    pairs: int = 32
    step_seconds: float = 1.0


def benchmark(cfg: DictConfig) -> int:
    """Do what `cfg.what` names.

    Raises:
        UsageError: an unknown one.
        UserError: the folder of the results cannot be written.
    """
    typed(BenchmarkOptions, cfg)
    if cfg.what not in WHAT:
        raise UsageError(f"what must be one of {', '.join(WHAT)}, got {cfg.what}")
    if cfg.out is not None or cfg.what not in ("memory", "loader"):
        check_writable(expand_user(cfg.out or "outputs"), "out")
    return int(import_module(WHAT[cfg.what]).run(cfg))


COMMAND = Command("benchmark", "benchmark", benchmark, HELP, schema=BenchmarkOptions)
