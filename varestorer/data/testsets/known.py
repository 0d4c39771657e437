"""The public test sets: what each one is, where it comes from and what belongs into its folder."""

from dataclasses import dataclass, field
from functools import partial

RELEASE = (
    "the test sets that StableSR's authors released: dataset Iceclear/StableSR-TestSets on the Hugging Face hub, one "
    "archive, StableSR_testsets.zip (3.1 GB), which holds all three sets"
)
FETCH = (
    "hf download Iceclear/StableSR-TestSets StableSR_testsets.zip --repo-type dataset --local-dir data",
    "unzip -q data/StableSR_testsets.zip -d data",
)
SIDES = "hr (or hq, gt, test_HR) beside lr (or lq, test_LR), the same file names in both"
CROPS = "PNG, 8-bit RGB, 128 x 128 in lr and 512 x 512 in hr"


@dataclass(frozen=True)
class Benchmark:
    """A test set.

    Attributes:
        name: as typed after `dataset=`.
        title: what it is, in a few words.
        purpose: what it is good for.
        origin: where it comes from.
        layout: what its folder holds.
        license: what its images may be used for.
        fetch: commands that fetch it.
        root: the folder to give as `data.root` after these.
        pairs: number of pairs, or of images without references; None: any.
        reference: whether there are good images to compare with.
        lq_side: side of the square bad images, pixels; None: any size.
        formats: file formats that the release has; empty: any.
        pixels: joint hash of all pictures of a side (`checking.joint_hash`), where a faithful copy was at hand.
    """

    name: str
    title: str
    purpose: str
    origin: str
    layout: str
    license: str
    fetch: tuple[str, ...] = ()
    root: str = "FOLDER"
    pairs: int | None = None
    reference: bool = True
    lq_side: int | None = None
    formats: tuple[str, ...] = ()
    pixels: dict[str, str] = field(default_factory=dict)


_released = partial(Benchmark, origin=RELEASE, fetch=FETCH, lq_side=128, formats=("PNG",))
_BENCHMARKS = (
    _released(
        name="div2k",
        title="DIV2K-Val: 3,000 synthetic pairs",
        purpose="the main table of most papers: random crops of DIV2K's validation photographs, degraded as in "
        "StableSR's training",
        layout=f"{SIDES} (the archive has gt beside lq); {CROPS}",
        license="S-Lab License 1.0 (non-commercial) for the release, academic research only for DIV2K's photographs",
        root="data/StableSR_testsets/DIV2K_V2_val",
        pairs=3000,
    ),
    _released(
        name="realsr",
        title="RealSR: 100 pairs photographed at two focal lengths",
        purpose="real degradation with a reference; the central crops of RealSR's (version 3) x4 test images, by two "
        "cameras",
        layout=f"{SIDES} (the archive has test_HR beside test_LR); {CROPS}",
        license="S-Lab License 1.0 (non-commercial) for the release; the photographs are RealSR's (csjcai/RealSR)",
        root="data/StableSR_testsets/RealSRVal_crop128",
        pairs=100,
        pixels={
            "lr": "abb1b8b181721aef9e67ee4cbc21f939f7ae53641f29470d4f3e23787b1d1c9e",
            "hr": "b386b3a9b3d87c26074585a86d9355f21c719f16e5959e8a3471007b787f8a10",
        },
    ),
    _released(
        name="drealsr",
        title="DRealSR: 93 pairs photographed at two focal lengths",
        purpose="real degradation with a reference; the central crops of DRealSR's x4 test images, by five cameras",
        layout=f"{SIDES} (the archive has test_HR beside test_LR); {CROPS}",
        license="S-Lab License 1.0 (non-commercial) for the release; the photographs are DRealSR's (xiezw5/"
        "Component-Divide-and-Conquer-for-Real-World-Image-Super-Resolution)",
        root="data/StableSR_testsets/DrealSRVal_crop128",
        pairs=93,
    ),
    Benchmark(
        name="reallr200",
        title="RealLR200: 200 low-quality images without references",
        purpose="what people have on their disks; only metrics without a reference apply, and looking",
        origin="SeeSR's authors: repository cswry/SeeSR, section Test Benchmark of its README, which links to folders "
        "on two file-sharing services; fetch the folder RealLR200 by hand",
        layout="the images, or a folder that holds them in lr (or lq, test_LR); any size and format",
        license="collected from other test sets and the web: none is stated for the images (SeeSR's code is Apache "
        "2.0); use them for measuring, do not pass them on",
        root="RealLR200",
        pairs=200,
        reference=False,
    ),
    Benchmark(
        name="folder",
        title="any folder of pairs",
        purpose="your own pairs, such as a set made with make=; no published figures stand beside it",
        origin="yours",
        layout=f"{SIDES}; good images exactly scale times as large",
        license="yours to know",
    ),
    Benchmark(
        name="images",
        title="any folder of images without references",
        purpose="your own low-quality images; only metrics without a reference apply, and looking",
        origin="yours",
        layout="images (subfolders included), or a folder that holds them in lr (or lq, test_LR); any size and format",
        license="yours to know",
        reference=False,
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _BENCHMARKS}
