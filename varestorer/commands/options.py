"""The options of every command, each declared once.

Nothing slow is imported here, so that `--help` answers at once. (`train`'s are in `training/config.py`.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from varestorer.training.config import TrainConfig
from varestorer.utils.schema import DEVICES, DTYPES, CommandOptions, listed, option, shown


@dataclass
class RestoreOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Restore images: larger, sharper, and without noise and compression marks.

usage: python scripts/restore.py input=FILE_OR_FOLDER output=FILE_OR_FOLDER [ckpt=MODEL] [key=value ...]
"""
    NOTES: ClassVar[str] = """
Images of any size and aspect are taken: small ones are padded, large ones cut into overlapping squares. Date, camera,
resolution and color profile stay, and 16 bits where the format can (png, tif). A file that cannot be restored is named
and the others go on. Features of prompts are kept in ~/.cache/varestorer (VARESTORER_CACHE names another folder), so
the text encoder is loaded for new prompts only.

Exit status: 0 all well; 1 a file failed; 2 the command was wrong.

examples:
  python scripts/restore.py input=photos output=restored
  python scripts/restore.py input=photos output=restored ckpt=outputs/quickstart/TIME
  python scripts/restore.py input=photo.jpg output=restored ckpt=weights/varestorer.pth caption=auto
"""

    input: str = option(
        MISSING, "an image, or a folder of images (subfolders included)", "PATH", title="what and where"
    )
    output: str = option(
        MISSING,
        "a folder: results are <stem>.png in the same subfolders, and restore.json has an entry for each input; "
        "or better.jpg: of one image, the result itself",
        "PATH",
    )
    ckpt: str | None = option(
        None,
        "a bundle's folder, a run of scripts/train.py (its newest EMA weights), EvanEternal/VARestorer or "
        "qyp2000/VARSR (fetched and converted once; @REVISION pins one), a published file with its companions beside "
        "it, or a bundle's name on the Hugging Face hub; default: nano, a small model that comes with the package. "
        "varestorer models lists what is known",
        "MODEL",
    )
    scale: float = option(4, "how many times larger the result is; 1 keeps the size", above=0)
    width: int | None = option(None, "of the result, instead of scale; with height: to fit in both", "PIXELS", least=1)
    height: int | None = option(None, "likewise", "PIXELS", least=1)
    megapixels: float | None = option(None, "likewise", "N", above=0)
    trained_scale: float = option(4, "what the model was trained for: less than it is made at it, and reduced", above=0)
    reduce: int = option(
        1,
        "the image is made so many times smaller first; scale still counts from its own size. scale=1 reduce=2 cleans "
        "a telephone's photograph at its own size",
        least=1,
    )
    sizes: list[float] | None = option(
        None,
        "enlargements that are written, for models that give several in one pass (H-VAR: a quarter of scale, half and "
        "all of it): the largest as <stem>.png, others as <stem>.x1.png, <stem>.x2.png; default: scale alone",
        "[1,2,4]",
        above=0,
    )
    format: str | None = option(
        None,
        "png, jpg, webp, avif or tif; default: as output says, else png",
        "NAME",
        choices=("png", "jpg", "webp", "avif", "tif"),
    )
    quality: int | None = option(
        None, "of jpg, webp and avif, 1 to 100; default: 95, without loss, 90", "N", least=1, most=100
    )
    gps: bool = option(False, "true: keep the place of the EXIF too")
    overwrite: bool = option(
        False, "restore again what has a result already; what was made from another file than the input is anyway"
    )
    max_pixels: int | None = option(None, "read images of up to N pixels (default: Pillow's limit)", "N", least=1)
    device: str = option("auto", DEVICES)

    prompt: str | None = option(
        None,
        'the same for all images; without it the model\'s learned "no text"',
        "TEXT",
        title="what the images show (only models that were trained with text use it)",
    )
    caption: str = option(
        "none",
        "auto: describe each image with BLIP; its caption becomes the prompt and is noted in restore.json",
        choices=("none", "auto"),
    )
    text_encoder: str | None = option(None, "folder or hub name of the encoder of prompts (google/flan-t5-xl)", "PATH")
    captioner: str | None = option(
        None, "folder or hub name of the captioner (Salesforce/blip-image-captioning-large)", "PATH"
    )

    select: str = option(
        "argmax",
        "argmax | sample: the likelier bits, or bits drawn from their probabilities",
        choices=("argmax", "sample"),
        title="how",
    )
    seed: int = option(0, "of what is drawn; each image and each square has its own stream")
    steps: str = option(
        "one",
        "one: the student at once; K: the teacher predicts the last K-1 scales again; multi: the teacher predicts all "
        "fine scales",
    )
    color: str = option(
        "none", "none | adain | wavelet: give the result the colors of the input", choices=("none", "adain", "wavelet")
    )
    uncertainty: bool = option(False, "true: save <stem>.uncertainty.png, a heat map of where the model guessed")
    fidelity: float = option(
        0.0,
        "0 to 1: the share of the area that is taken from the model's restorer (from the enlarged input where it has "
        "none): where the model changed most without being sure",
        "SHARE",
        least=0,
        most=1,
    )
    tile: int | None = option(
        None, "side of the squares restored at once (default: the size the model was trained on)", "PIXELS", least=1
    )
    overlap: int | None = option(
        None, "that neighboring squares share (default: a quarter of a square)", "PIXELS", least=0
    )
    batch: int | None = option(None, "squares restored at once; fewer need less memory", "N", least=1)
    max_memory: str | None = option(
        None,
        "e.g. 6G: chooses batch, and if need be precision and tile, by what they are measured to need, says how large "
        "a picture may be, and refuses larger ones; of the process on a CPU, of what torch takes on a GPU",
        "SIZE",
    )
    compat: str | None = option(
        None,
        "the released script's arithmetic, with its faults, for comparisons; tile= makes it use squares",
        "official",
        choices=("official",),
    )

    precision: str = option(
        "auto",
        "auto | fp32 | bf16: half the bits for the large products; auto: where the device gains from it",
        choices=("auto", "fp32", "bf16"),
        title="how fast (one step; what rounds differently may decide close bits otherwise)",
    )
    compile: bool = option(False, "true: compile the networks first, a minute or more; for many images")
    graphs: bool = option(False, "true: record each size of a batch as a CUDA graph; for many images on an NVIDIA GPU")
    linears: str = option(
        "none", "none | int8 | fp8: linear layers in 8 bits, through torchao", choices=("none", "int8", "fp8")
    )


@dataclass
class ConvertOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Convert, merge, check and share weights.

usage: python scripts/convert.py input=MODEL output=FOLDER [key=value ...]     a bundle, for ckpt= and from_pretrained
       python scripts/convert.py input=MODEL output=FILE.pth [part=...]        a file of the published form
       python scripts/convert.py check=FILE [manifest=NAME_OR_FILE]            look at a file without loading it
"""
    NOTES: ClassVar[str] = """
A bundle is a folder with config.json, *.safetensors and a model card. The same input gives the same bytes.

Exit status: 0 all well; 1 it could not be converted, or the file differs from the manifest; 2 the command was wrong.

examples:
  python scripts/convert.py input=weights/varestorer.pth output=bundle
  python scripts/convert.py input=bundle output=small adapters=merged dtype=bf16
  python scripts/convert.py input=bundle output=shared adapters=only dtype=bf16
  python scripts/convert.py input=shared/adapters.safetensors base=bundle output=again
  python scripts/convert.py input=bundle output=varestorer.pth
  python scripts/convert.py input=nano output=nano.onnx
  python scripts/convert.py input=nano output=nano_4x.safetensors part=restorer scale=4
  python scripts/convert.py check=weights/varestorer.pth
"""

    input: str | None = option(
        None,
        "the published varestorer.pth (its companions beside it), a bundle, a run of scripts/train.py, or an "
        "adapters.safetensors or a folder of peft's adapters (with base=)",
        "MODEL",
        title="from what to what",
    )
    output: str | None = option(
        None,
        "folder of the bundle; or a .pth, .ckpt or .safetensors file in the published form; or a .onnx file: the "
        "one-step student, merged, without a prompt, of squares that are enlarged already (pip install "
        '"varestorer[onnx]")',
        "PATH",
    )
    tokenizer: str | None = option(
        None,
        "the published tokenizer, where it is not beside the input (infinity_vae_d32reg.pth, hub "
        "FoundationVision/Infinity)",
        "FILE",
    )
    restorer: str | None = option(
        None, "the restorer, where it is not beside the input (general_swinir_v1.ckpt, hub lxq007/DiffBIR)", "FILE"
    )
    adapters: str = option(
        "separate",
        "separate: beside the transformer; merged: folded into it, faster, but without a teacher; only: write "
        "adapters.safetensors and nothing else; peft: write them in peft's own form",
        choices=("separate", "merged", "only", "peft"),
    )
    base: str | None = option(
        None,
        "what the adapters of input=adapters.safetensors are put onto: a bundle, or a published student or teacher",
        "MODEL",
    )
    dtype: str | None = option(
        None,
        "fp32, bf16: of the transformer's blocks; fp16: all of the bundle, half the space, for storing only: it is "
        "read as fp32; default: as stored",
        "NAME",
        choices=DTYPES,
    )
    part: str = option(
        "transformer",
        "which network goes into a published file: transformer (a student with adapters apart; other students only "
        "fit into bundles), tokenizer or restorer; whole: the one-step student in one .safetensors file, for spandrel "
        "after varestorer.spandrel.install()",
        choices=("transformer", "tokenizer", "restorer", "whole"),
    )
    scale: int = option(
        1,
        "4, with part=restorer: nano's restorer as a model that enlarges too, for spandrel, chaiNNer and ComfyUI",
        "1|4",
    )
    overwrite: bool = option(False, "true: replace a bundle, or a file, that is there already")

    check: str | None = option(
        None, "compare names, shapes and types of its tensors with a manifest", "FILE", title="look at a file"
    )
    manifest: str | None = option(
        None,
        "infinity_2b, infinity_vae_d32, varestorer_student_lora_r32, general_swinir, or a JSON file "
        '{"head.bias": {"shape": [64], "dtype": "float32"}, ...}; default: by the file\'s names',
        "NAME_OR_FILE",
    )


@dataclass
class DatasetRoot:
    """Below `data`, of a test set."""

    root: str | None = option(
        None,
        "holds hr, hq, gt or test_HR beside lr, lq or test_LR; or images alone, for sets without references",
        "FOLDER",
    )


@dataclass
class EvalOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Score restored images against their references, per image and on average.

usage: python scripts/eval.py dataset=NAME data.root=FOLDER [ckpt=... | predictions=... | method=...]
       python scripts/eval.py image=FILE reference=FILE [protocol=...] [metrics=...]    one image against another
       python scripts/eval.py compare=[ours=RUN,other=FOLDER,bicubic] dataset=NAME data.root=FOLDER   side by side
       python scripts/eval.py protocol=list                                             which paper uses which
"""
    NOTES: ClassVar[str] = """
Writes per_image.csv, summary.json, tables and a page of pictures to `out`, restored images to its folder images/.
`accelerate launch scripts/eval.py ...` (or torchrun) shares the work among processes; the figures are the same.
Exit status: 0 all well; 1 an image, or a metric asked for with metrics=, failed; 2 the command was wrong.
"""
    GROUPS: ClassVar[tuple[str, ...]] = ("dataset", "protocol", "logger")

    ckpt: str | None = option(
        None,
        "restore the data set with this network and score it: a run's folder, a bundle's folder or hub name, "
        "EvanEternal/VARestorer, qyp2000/VARSR, or a published file; without it (and without predictions and method) "
        "the shipped model",
        "MODEL",
        title="what is scored",
    )
    predictions: str | None = option(
        None,
        "score images that somebody else made, matched by their path in the folder, or by a file stem that no other "
        "image of the data set has",
        "FOLDER",
    )
    method: str | None = option(
        None,
        "bicubic: the baseline below all others; spandrel: any super-resolution model that spandrel loads, in "
        "float32, large images in tiles; tokenizer: the references after they passed the bits of a model's tokenizer, "
        "the ceiling of what it can restore",
        "NAME",
        choices=("bicubic", "spandrel", "tokenizer"),
    )
    model_path: str | None = option(
        None, "of method=spandrel its file; of method=tokenizer a MODEL as in ckpt (else the shipped one)", "PATH"
    )
    image: str | None = option(None, "one file, scored against reference=, without a data set", "FILE")
    reference: str | None = option(None, "what image= is compared with", "FILE")
    explain: str | None = option(
        None,
        "figures that a paper prints for these pictures: says which conventions (channel, border, rounding, crop, "
        "file format, variant of the metric) give them, nearest first",
        "'psnr=25.15,ssim=0.7341'",
    )
    compare: list[str] | None = option(
        None,
        "several methods on one page of pictures and in one table: NAME=WHAT each, where WHAT is bicubic, a MODEL as "
        "in ckpt, a folder of restored images or of an evaluation (its out=), or a file that spandrel loads",
        "[ours=...,other=...,bicubic]",
    )
    pairwise: bool = option(
        False,
        "of compare: also pairwise.html, on which people choose blindly between two methods; their answers make "
        "scripts/tables.py table=preference",
    )
    steps: str = option(
        "one", "of ckpt: one: the student at once; K: the teacher predicts the last K-1 scales; multi: all fine ones"
    )
    size: float | None = option(
        None,
        "of ckpt or predictions: score the smaller result that enlarges so many times (H-VAR gives several from one "
        "pass), against references reduced to its size; default: scale",
        "FACTOR",
        above=0,
    )
    precision: str | None = option(
        None,
        "of ckpt: fp32, bf16 or auto, as scripts/restore.py restores (there auto); default: as the weights are stored",
        "NAME",
        choices=("auto", "fp32", "bf16"),
    )

    dataset: Any = option(
        None, "which data set it is: decides which published rows stand beside ours", "NAME", title="on what, by what"
    )
    data: DatasetRoot = field(default_factory=DatasetRoot)
    protocol: Any = option(
        MISSING, "which metrics, in which convention (default: varestorer); never compare across two", "NAME"
    )
    metrics: Any = option(
        None, "e.g. [psnr,ssim]: a subset of the protocol's, or any other metric of pyiqa by name", "[NAME,...]"
    )
    metric_weights: str | None = option(None, "searched for weight files of metrics before torch's cache", "FOLDER")
    offline: bool | None = option(
        None, "never touch the network; missing weights are listed, the other metrics run", "true"
    )
    batch: int | None = option(
        None,
        "images scored at once where sizes agree, by metrics that this does not change; default: 8, and 1 on the CPU, "
        "where more is no faster",
        "N",
        least=1,
    )
    doubt: str | None = option(
        None,
        "of ckpt: also write whether the model knows where it guesses (doubt.md, .png): calibration of its symbols, "
        "and what is left of the error where the most doubtful area is taken from its restorer, or from the enlarged "
        "input (bicubic); restores and scores each image again",
        "restorer|bicubic",
        choices=("restorer", "bicubic"),
    )
    limit: int | None = option(None, "only the first N images", "N", least=1)
    scale: int = option(4, "how much larger the references are", least=1)
    seed: int = option(0, "of what is drawn")
    device: str = option("auto", DEVICES)

    out: str = option(
        "outputs/eval/${oc.select:dataset.name,files}_${now:%Y-%m-%d_%H-%M-%S}",
        "default: outputs/eval/DATASET_TIME. Images made and rows scored are kept there as it goes; the same command "
        "again, with the same out=, does only what is missing. Other settings are refused the folder",
        "FOLDER",
        title="where",
    )
    logger: Any = option(
        None,
        "also log figures, as eval/<dataset>/<metric>, and pictures (default: none); several: [wandb,tensorboard]. "
        "wandb is offline without WANDB_API_KEY",
        "wandb|tensorboard|trackio",
    )
    defaults: list[Any] = field(
        default_factory=lambda: ["_self_", {"protocol": "varestorer"}, {"dataset": None}, {"logger": "none"}]
    )


@dataclass
class TablesOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Assemble a table of a paper: the published rows, and ours beside them.

usage: python scripts/tables.py table=1 "runs=['ours=outputs/eval/realsr_1','ours=outputs/eval/div2k_1']"
       python scripts/tables.py table=2 'model=[nano,2b]'
       python scripts/tables.py table=3 "runs=['w/o KL=outputs/eval/div2k_2']"
       python scripts/tables.py table=preference runs=COMPARISON answers=[FILE,...]
       python scripts/tables.py table=small "runs=['nano=outputs/eval/realsr_1']" "models=['nano=nano']"
"""
    NOTES: ClassVar[str] = """
Writes table<N>.md, .tex and .html to `out`. What nobody published or measured is a dash.
Exit status: 0 all well; 1 something could not be read or written; 2 the command was wrong.
"""
    GROUPS: ClassVar[tuple[str, ...]] = ("model",)

    table: Any = option(
        MISSING,
        "1: ten metrics on DIV2K-Val, DRealSR and RealSR; 2: parameters, FLOPs by torch's counter, seconds and peak "
        "memory, as a whole and by stages; 3: ablations on DIV2K-Val; varsr: VARSR and its ablations, under its "
        "protocol; preference: what people chose on a page of eval pairwise=true; small: LPIPS, DISTS and NIQE of "
        "small models with intervals, their MB, parameters, CPU seconds and licenses",
        "1|2|3|varsr|preference|small",
        title="which table",
    )
    runs: list[str] | None = option(
        None,
        "folders of scripts/eval.py (their out=), each maybe with the name of its row: 'label=folder'; all under one "
        "protocol, for means under two cannot be compared",
        "[...]",
    )
    answers: list[str] | None = option(
        None,
        "of table=preference: the files that raters saved from pairwise.html; runs= names its folder",
        "[FILE,...]",
    )
    out: str = option("outputs/tables", "folder of the tables")
    models: list[str] | None = option(
        None,
        "what runs= scored, by the same labels, to be measured: 'label=MODEL', a file that spandrel loads (of scale 1: "
        "behind bicubic), a bundle or run, or bicubic",
        "[...]",
        title="of table small",
    )
    licenses: list[str] | None = option(
        None, "where no model card beside the files names them: 'label=BSD-3-Clause'", "[...]"
    )
    model: Any = option(
        None,
        "sizes from configs/model, with random weights: nano, 125m, 2b, or a list of them",
        "NAME",
        title="of table 2",
    )
    ckpt: str | None = option(None, "a run of scripts/train.py, a bundle or the published student", "MODEL")
    text_encoder: str | None = option(None, "folder of a T5; its cost is counted too", "FOLDER")
    measure: bool | None = option(
        None, "time the networks; without it those of fewer than 1e9 parameters, on a GPU all", "true|false"
    )
    repeats: int = option(5, "how often each network is timed", least=1)
    device: str = option("auto", DEVICES)
    seed: int = option(0, "of random weights")
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"system": "varestorer"}, {"model": None}])
    system: Any = option(None, "of model=; chosen by its name", "NAME")


@dataclass
class ParityOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Compare the networks with golden tensors of the published ones.

usage: python scripts/parity.py fixtures=FOLDER
"""
    NOTES: ClassVar[str] = """
A folder of Infinity holds meta_va.json (sizes of tiny networks), meta_up.json (settings of multi-step generation) and
safetensors with weights under published names, inputs and outputs. A folder of VARSR holds STEM.io.safetensors,
STEM.weights.safetensors and STEM.json, one of H-VAR hit.json with the hierarchical tokens, losses and positions.
Networks are built from the folder's own sizes. For every golden tensor a line says its name, the largest error, the
tolerance and whether that is ok.

Exit status: 0 all within tolerance, 1 at least one is over, 2 wrong command or unreadable folder.
"""

    fixtures: str = option(MISSING, "the golden files", "FOLDER", title="options")


@dataclass
class PrepareDataOptions(CommandOptions):
    GROUPS: ClassVar[tuple[str, ...]] = ("dataset",)

    INTRO: ClassVar[str] = """
Explain the test sets, check a folder before its figures are believed, make a test set, pack photographs to train on,
or tell good ones from bad ones by a table of scores.

usage: python scripts/prepare_data.py                                     what sets there are
       python scripts/prepare_data.py dataset=NAME                        where one comes from, what its folder holds
       python scripts/prepare_data.py dataset=NAME data.root=FOLDER       check a folder
       python scripts/prepare_data.py make=FOLDER source=PHOTOS_FOLDER    make pairs out of good photographs
       python scripts/prepare_data.py shard=FOLDER source=PHOTOS_FOLDER   pack photographs into tar files
       python scripts/prepare_data.py split=FOLDER source=PHOTOS_FOLDER scores=FILE.csv set=koniq   good and bad ones
"""
    NOTES: ClassVar[str] = """
A check decodes every image. Each file that does not pair, cannot be read, or has the wrong size, format or depth is
named.

A made pair depends on the seed and the name of its photograph. Crops are the same on every machine; the pixels of the
bad images are with the same versions of the libraries that manifest.json names. PNG files of equal pixels may differ in
their bytes (zlib), so the manifest holds hashes of pixels. To compare two machines, compare the two lines this
command ends with, or check the set of one with the manifest of the other.
Such a set is like DIV2K-Val but is not it: figures on it stand beside no published ones.

Exit status: 0 all well; 1 the check found something, or the set could not be made; 2 the command was wrong.
"""

    dataset: Any = option(
        None, "what it should be; folder and images are for sets of your own", "NAME", title="check a set"
    )
    data: DatasetRoot = field(default_factory=DatasetRoot)
    manifest: str | None = option(
        None, "compare the pixels with this file (default: manifest.json in the folder, if there is one)", "FILE"
    )
    scale: int = option(4, "how much larger the good images have to be, or are made", least=1)

    source: str | None = option(
        None,
        "of make, shard and split: good photographs (subfolders included), such as DIV2K_valid_HR, or pictures of a "
        "data set of image quality. Broken and small ones are named and left out",
        "FOLDER",
        title="make pairs",
    )
    make: str | None = option(
        None, "new folder for hr/, lr/ and manifest.json; the same command goes on after an interruption", "FOLDER"
    )
    count: int = option(
        3000, "pairs; every photograph gives equally many. It may be raised later: the first pairs stay", least=1
    )
    crop: int = option(512, "side of the good images, pixels", least=1)
    seed: int = option(0, "of crops and degradations")
    workers: int = option(2, "processes (0: none besides this one); the pairs are the same for any number", least=0)
    degradation: Any = option(
        MISSING,
        "how the bad images are made (default: realesrgan); its settings can be changed: degradation.jpeg1=[30,95]",
        "NAME",
    )

    shard: str | None = option(
        None,
        "new folder for shard-000000.tar, ... (as webdataset reads them) and index.json, to train with train.py "
        "data=shards data.root=FOLDER; photographs are packed as the files they are, in the order of their names",
        "FOLDER",
        title="pack photographs",
    )
    shard_mb: int = option(
        500, "a tar file is closed before its photographs get larger than so many million bytes", least=1
    )
    text: str | None = option(
        None, "of scripts/precompute_text.py: its captions and features are packed too (data.text=shards)", "FOLDER"
    )

    split: str | None = option(
        None,
        "new folder for good/ and bad/, of links to the pictures; to train VARSR with data.root=FOLDER/good (or better "
        "photographs) data.bad=FOLDER/bad",
        "FOLDER",
        title="tell good from bad",
    )
    scores: str | None = option(
        None, "a header, then a picture a row: its name in the first column, and its score", "FILE.csv"
    )
    set: str | None = option(
        None, "column and share of spaq, koniq, kadid, flive_patch or ava; share of livec and flive", "NAME"
    )
    column: str | None = option(None, "of the scores, where set= does not know it", "NAME")
    share: float | None = option(
        None, "bad is a score below the least one plus this share of the largest (VARSR's rule)", "0.6"
    )
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"dataset": None}, {"degradation": "realesrgan"}])


@dataclass
class BenchmarkOptions(CommandOptions):
    INTRO: ClassVar[str] = """
How fast the program is, part by part, and what it needs of memory.

usage: python scripts/benchmark.py what=restore [model=2b | ckpt=MODEL] 'variants=[eager,merged+bf16]' 'batch=[1,16]'
       python scripts/benchmark.py what=generate                         one step beside scale-by-scale generation
       python scripts/benchmark.py what=train_step train=EXPERIMENT      a training step: images a second, its parts
       python scripts/benchmark.py what=memory train=EXPERIMENT          its memory, by calculation: no GPU needed
       python scripts/benchmark.py what=startup | what=loader root=PHOTOS
"""
    NOTES: ClassVar[str] = """
Each figure is printed when it is there; restore, generate, train_step and startup write benchmark.json, .md, .tex,
.html and .png. Variants are in memory at once (what they share, once) and take turns (A B A B).

A part's floor is the larger of two times: its operations at the rate of the device's products of matrices, and the
least bytes it must move at the rate of its copies, both measured in the same run. What the floor leaves out (norms,
activations, launches, the float32 of the VAE's encoder beside bfloat16 blocks) is the gap. Every variant but eager
keeps what it makes of the text from batch to batch.

The calculation of what=memory follows every tensor of a step, as under bfloat16 autocast on CUDA. Not in it: what CUDA
takes for itself (about half a gigabyte), cuDNN's working memory, and gaps between tensors: leave a tenth.

Exit status: 0 all well; 1 something could not be measured; 2 the command was wrong.
"""
    GROUPS: ClassVar[tuple[str, ...]] = ("model",)

    what: str = option(
        "memory",
        "restore, generate, train_step, startup, memory, or loader: pairs of training a second and core",
        choices=("restore", "generate", "train_step", "startup", "memory", "loader"),
        title="what is measured",
    )
    model: Any = option(MISSING, "weights of these sizes, drawn at random: speed does not depend on them", "NAME")
    ckpt: str | None = option(
        None, "of restore and generate: a run, a bundle or the published student instead", "MODEL"
    )
    variants: list[str] | None = option(
        None,
        "what is compared, words joined by +; default: what the device can do. restore: eager, or merged, fp32, bf16, "
        "compile, graphs, int8, fp8; generate: one (with short: without the long input) or multi (with cfg; prefix: "
        "the degraded image in front, nocache: no keys and values kept), both with compile or graphs; train_step: "
        "eager, bf16, checkpoint, compile, slices (images decoded one by one)",
        "[...]",
    )
    batch: list[int] = option([1], "images at once, or several such numbers", "[1]")
    repeats: int = option(10, "timed runs of each variant", least=1)
    warmup: int = option(3, "untimed runs before them; the first one is made in any case", least=0)
    minutes: float = option(10, "after so many no further turn begins: the figures are medians of fewer runs", above=0)
    device: str = option("auto", DEVICES)
    seed: int = option(0, "of random weights")
    out: str | None = option(
        None, "default: outputs/benchmark/WHAT_TIME; what=memory writes only where it is given", "FOLDER"
    )

    picture: int | None = option(
        512, "side of a picture that is restored too, from a file to a file, pixels; null: none", title="of restore"
    )
    restorer: str = option(
        "auto",
        "published: a restorer of the published sizes in front; auto: for model=2b; none",
        choices=("auto", "published", "none"),
    )
    color: str = option("adain", "adain or wavelet, of the picture", choices=("adain", "wavelet", "none"))
    text: str | None = option(
        None, "also time a text encoder: t5 has the published sizes and random weights", "t5|FOLDER"
    )
    text_tokens: int = option(64, "of its prompt", least=1)
    captioner: str | None = option(None, "also time this captioner", "FOLDER")

    train: str = option(
        "dmd_div2k",
        "an experiment of scripts/train.py, whose last stage counts (overrides=['~stages.student']: the one before)",
        "EXPERIMENT",
        title="of train_step and memory",
    )
    overrides: list[str] = option([], "of its config, as for scripts/train.py", "'[\"KEY=VALUE\"]'")
    micro_batches: list[int] = option(
        [1, 2, 4],
        "of memory: images that go through the networks at once (trainer.batch_size over processes and accumulate); on "
        "a GPU the peak is measured too",
        "[1,2,4]",
    )

    root: str | None = option(None, "photographs; default: the embedded ones", "FOLDER", title="of loader")
    crop: int = option(512, "side of the squares, pixels", least=1)
    pairs: int = option(32, "of one training step", least=1)
    step_seconds: float = option(1.0, "of a training step that is to be fed", above=0)
    system: Any = option(None, "varestorer, varsr or hvar: whose sizes model= are", "NAME")
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"system": "varestorer"}, {"model": "${system}"}])


@dataclass
class PhotographsRoot:
    """Below `data`, of photographs to describe."""

    root: str = option(
        MISSING,
        "the photographs: a folder (subfolders included), or one that holds hr, hq, gt, DIV2K_train_HR, ...",
        "FOLDER",
        title="options",
    )


@dataclass
class PrecomputeTextOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Make the prompts of training photographs and their text features, so that training needs neither BLIP nor T5.

usage: python scripts/precompute_text.py data.root=PHOTOGRAPHS out=FOLDER [key=value ...]
"""
    NOTES: ClassVar[str] = """
Captions are about whole photographs; training shows squares of them, so a caption may name what a square does not
show. An empty text ("") stands for the null text. With captions=PATH nothing is described: photographs without a text
there (or in an earlier captions.json) are named and left out, and so are files that cannot be read.

Interrupted, start it again: it goes on. captions.json may be corrected by hand; started again, the command encodes what
has changed. About 80 kB are kept for each photograph (20 tokens of flan-t5-xl, fp16).

Exit status: 0 all well; 1 a photograph got no text, or the command could not go on; 2 the command was wrong.

examples:
  python scripts/precompute_text.py data.root=DIV2K out=text/div2k
  python scripts/train.py +experiment=dmd_div2k data.root=DIV2K data.text=text/div2k
"""

    data: PhotographsRoot = field(default_factory=PhotographsRoot)
    out: str = option(MISSING, "gets captions.json, index.json and shards/*.safetensors", "FOLDER")
    captions: str | None = option(
        None,
        'texts that are there already: a JSON file {"sub/a.png": "a dog on grass"}, or a folder of text files '
        "sub/a.txt (the photographs' own folder, where they lie beside them)",
        "PATH",
    )
    captioner: str | None = option(
        None,
        "folder or hub name of what describes the other photographs (Salesforce/blip-image-captioning-large)",
        "PATH",
    )
    text_encoder: str | None = option(
        None, "folder or hub name of the encoder the model was made for (google/flan-t5-xl)", "PATH"
    )
    dtype: str = option("fp16", "fp16 | bf16 | fp32: how the features are kept", choices=DTYPES)
    num_workers: int = option(4, "processes that read photographs for the captioner, at most one a processor", least=0)
    device: str = option("auto", DEVICES)


@dataclass
class ModelsOptions(CommandOptions):
    INTRO: ClassVar[str] = """
List the models and weights that are known, fetch them ahead, or share a bundle.

usage: varestorer models                           what there is: shipped, released, published, in the cache
       varestorer models get NAME [NAME ...]       fetch into the hub's cache, sizes said first; a release is converted
       varestorer models push FOLDER OWNER/NAME    share a bundle on the hub
"""
    NOTES: ClassVar[str] = """
Files come from the Hugging Face hub into its cache (HF_HOME), converted releases into ~/.cache/varestorer/models
(VARESTORER_CACHE names another folder); a transfer that breaks off is taken up. HF_TOKEN or `hf auth login` opens
private repositories, HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none.

Exit status: 0 all well; 1 the hub did not give or take something; 2 the command was wrong.

examples:
  varestorer models get EvanEternal/VARestorer
  varestorer models get dmd_div2k
  varestorer models push bundle someone/my_model private=true
"""

    get: Any = option(
        None,
        "a release, a published file, an experiment (whose published weights are meant, as weights_dir=hub wants them) "
        "or a bundle on the hub, each name@revision where one is to be pinned; or a list",
        "NAME",
        title="options",
    )
    push: str | None = option(None, "a bundle to share", "FOLDER")
    to: str | None = option(None, "where it goes", "OWNER/NAME")
    private: bool = option(False, "true: nobody else sees it")


@dataclass
class DoctorOptions(CommandOptions):
    INTRO: ClassVar[str] = """
Check an installation: versions, device, precision, missing weights with their hashes and where to get them, disks.

usage: varestorer doctor [key=value ...]
"""
    NOTES: ClassVar[str] = """
A line each: ok, lacking (something optional, and how to get it) or WRONG. Nothing is fetched or changed.

Exit status: 0 nothing is wrong, though something may lack; 1 something is wrong; 2 the command was wrong.
"""

    device: str = option("auto", DEVICES, title="options")
    metrics: list[str] | None = option(None, "those to look at (default: of all protocols and losses)", "[NAME,...]")


@dataclass
class DemoOptions(CommandOptions):
    INTRO: ClassVar[str] = """
A page in the browser: drop photographs, see them before and after, download the results.

usage: python scripts/demo.py [ckpt=MODEL] [key=value ...]      (pip install -e ".[demo]" first)
"""
    NOTES: ClassVar[str] = """
Says the page's address when it is ready; Ctrl-C ends it. Nothing is sent anywhere. What visitors bring and get lies in
a temporary folder, which is removed at the end. Visitors take turns, picture by picture.

Exit status: 0 ended by Ctrl-C; 1 the page could not be served; 2 the command was wrong.
"""

    ckpt: str | None = option(
        None, "chosen at first, as ckpt= of scripts/restore.py; without it the shipped model", "MODEL", title="options"
    )
    models: str = option("outputs", "folder whose runs and bundles can be chosen too")
    text_encoder: str | None = option(
        None, "folder or hub name of the encoder of prompts (google/flan-t5-xl), for models that read text", "PATH"
    )
    max_megapixels: float = option(64, "of a result; larger ones are refused", above=0)
    batch: int | None = option(
        None, "squares restored at once; default: as the model has it, and 1 on the CPU", "N", least=1
    )
    precision: str = option("auto", "auto | fp32 | bf16, as of scripts/restore.py", choices=("auto", "fp32", "bf16"))
    device: str = option("auto", DEVICES)
    host: str = option(
        "127.0.0.1", "who may visit: this machine alone; 0.0.0.0: whoever reaches it, without a password"
    )
    port: int | None = option(None, "of the page; default: the first free one from 7860", "N", least=1)
    browser: bool = option(False, "true: open the page in the browser here")


OPTIONS: dict[str, type[CommandOptions]] = {
    "train": TrainConfig,
    "restore": RestoreOptions,
    "convert": ConvertOptions,
    "eval": EvalOptions,
    "tables": TablesOptions,
    "parity": ParityOptions,
    "prepare_data": PrepareDataOptions,
    "benchmark": BenchmarkOptions,
    "precompute_text": PrecomputeTextOptions,
    "models": ModelsOptions,
    "doctor": DoctorOptions,
    "demo": DemoOptions,
}

for _name, _options in OPTIONS.items():
    ConfigStore.instance().store(_name, _options)


def markdown() -> str:
    """The tables of options that end `configs/README.md`: a command a section, an option a row."""
    lines = []
    for name, options in OPTIONS.items():
        rows = [(f"{key}={shown(item)}", item.metadata["text"]) for key, item in listed(options)]
        lines += [f"### {name}", "", "| option | meaning |", "|---|---|"]
        lines += ["| `{}` | {} |".format(*(re.sub(r"[|<]", r"\\\g<0>", text) for text in row)) for row in rows]
        lines.append("")
    return "\n".join(lines)
