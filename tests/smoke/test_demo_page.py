"""The page of `demo` in a real browser: Debian's chromium, driven by Playwright. One server for all tests."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from varestorer.systems import load
from varestorer.utils.images import load_image, to_levels

pytestmark = pytest.mark.smoke
pytest.importorskip("gradio", reason='no gradio: pip install -e ".[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[dev]"')
CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 60_000  # milliseconds, on a busy machine
Open = Callable[[], "playwright.Page"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page. At the end, Ctrl-C has to leave nothing behind."""
    folder = tmp_path_factory.mktemp("server")
    words = [sys.executable, str(ROOT / "scripts" / "demo.py"), f"models={folder}", "precision=fp32", "device=cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": (folder / "log").open("w"), "text": True}
    server = subprocess.Popen(words, **pipes, env=os.environ | {"TMPDIR": str(folder)}, cwd=folder)
    line = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, line + (folder / "log").read_text()
    yield found[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
    assert not [*folder.glob("varestorer-demo-*")]
    log = (folder / "log").read_text()
    assert "Traceback" not in log and "UserWarning" not in log, log


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def visit(browser: "playwright.Browser", address: str) -> Iterator[Open]:
    """Open the page as another person; whatever it asks of the network, it asks of its own server."""
    contexts, asked = [], []

    def open_page() -> "playwright.Page":
        contexts.append(browser.new_context(accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Restore").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def picture(path: Path, side: int = 20, color: tuple[int, int, int] = (200, 120, 60)) -> str:
    """A file of one color with a ramp, of which a square of the model is made."""
    levels = np.full((side, side, 3), color, np.float64) * np.linspace(0.5, 1, side)[:, None]
    Image.fromarray(levels.astype(np.uint8)).save(path)
    return str(path)


def bring(page: "playwright.Page", *files: str) -> None:
    page.locator("input[type=file]").first.set_input_files([*files])
    page.locator("#plan").get_by_text(Path(files[-1]).name).wait_for()


def restore(page: "playwright.Page", *files: str) -> None:
    bring(page, *files)
    page.get_by_role("button", name="Restore").click()
    page.locator("#download").wait_for()


def downloaded(page: "playwright.Page", button: str = "#download") -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.locator(button).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_a_picture_before_and_after_and_where_it_guessed(visit: Open, tmp_path: Path) -> None:
    page, file = visit(), picture(tmp_path / "my photo.png")
    restore(page, file)
    assert "20 x 20 to 80 x 80 pixels, squares: 1" in page.locator("#plan").inner_text()
    assert page.locator("#status").inner_text() == "my photo.png: 80 x 80 pixels"
    images = page.locator("#slider img")
    sizes = images.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert sizes == [[80, 80], [80, 80]]
    before, after = (images.nth(number).get_attribute("src") for number in (0, 1))

    handle = page.locator("#slider .handle, #slider [role=slider], #slider .outer").first
    box, frame = handle.bounding_box(), page.locator("#slider").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] / 4, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] < box["x"] - frame["width"] / 8

    assert not page.locator("#legend").is_visible()
    page.get_by_text("where it guessed").click()
    page.locator("#legend .bar").wait_for()
    low, high = map(float, re.findall(r"\d\.\d\d", page.locator("#legend .ends").inner_text()))
    assert 0 <= low < high <= 1
    page.wait_for_function(f"document.querySelectorAll('#slider img')[1].getAttribute('src') != '{after}'")
    assert images.nth(0).get_attribute("src") == before

    name, content = downloaded(page)
    result = load("nano", merge=True, precision="fp32").restore_picture(load_image(file), batch=1)
    difference = np.array(Image.open(io.BytesIO(content))).astype(int) - to_levels(result.image)
    assert name == "my photo_x4.png" and abs(difference).max() <= 1

    page.get_by_label("Format").click()
    page.get_by_role("option", name="jpg").click()
    page.get_by_role("button", name="Download jpg").wait_for()
    assert page.get_by_label("Quality").first.is_visible()
    name, content = downloaded(page)
    assert name == "my photo_x4.jpg" and Image.open(io.BytesIO(content)).format == "JPEG"


def test_what_cannot_be_is_said_and_the_rest_goes_on(visit: Open, tmp_path: Path) -> None:
    page = visit()
    page.get_by_role("button", name="Restore").click()
    page.get_by_text("Drop a photograph first").wait_for()
    (tmp_path / "broken.png").write_bytes(Path(picture(tmp_path / "whole.png", side=60)).read_bytes()[:150])
    restore(page, picture(tmp_path / "good.png"), str(tmp_path / "broken.png"), picture(tmp_path / "other.png", 24))
    words = page.locator("#status").inner_text()
    assert "cannot read the image broken.png: it is truncated" in words and "2 of 3 restored" in words
    assert "/" not in words
    assert page.locator("#gallery img").count() == 2
    page.locator("#gallery img").nth(1).click()
    page.wait_for_function("document.querySelector('#slider img').naturalWidth == 96")
    assert downloaded(page)[0] == "other_x4.png"
    name, content = downloaded(page, "#download-all")
    assert name == "restored.zip"
    assert sorted(ZipFile(io.BytesIO(content)).namelist()) == ["good_x4.png", "other_x4.png"]


def test_a_large_photograph_keeps_its_size_unless_told_otherwise(visit: Open, tmp_path: Path) -> None:
    page = visit()
    bring(page, picture(tmp_path / "telephone.png", side=1740))
    page.locator("#plan").get_by_text("1740 x 1740 to 1740 x 1740 pixels").wait_for()
    assert page.get_by_role("radio", name="2", exact=True).is_checked()


def test_cancelling_stops_and_leaves_the_page_ready(visit: Open, tmp_path: Path) -> None:
    page = visit()
    bring(page, picture(tmp_path / "large.png", side=400))
    page.get_by_role("button", name="Restore").click()
    page.get_by_text(re.compile(r"square [1-9]\d* of \d+, \d+ s left")).first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled. 0 of 1 restored").wait_for()
    page.get_by_role("button", name="Cancel").wait_for(state="hidden")
    page.get_by_label("Clear").first.click()
    restore(page, picture(tmp_path / "small.png"))
    assert page.locator("#status").inner_text() == "small.png: 80 x 80 pixels"


def test_two_people_at_once_get_their_own(visit: Open, tmp_path: Path) -> None:
    people = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    pages = {name: visit() for name in people}
    for name, color in people.items():
        bring(pages[name], picture(tmp_path / f"{name}.png", side=60, color=color))
    for page in pages.values():
        page.get_by_role("button", name="Restore").click()
    pages["blue"].get_by_text("another visitor's picture comes first").first.wait_for()
    for name, color in people.items():
        pages[name].locator("#download").wait_for()
        file, content = downloaded(pages[name])
        assert file == f"{name}_x4.png"
        mean = np.array(Image.open(io.BytesIO(content)).convert("RGB")).mean((0, 1))
        assert mean.argmax() == np.argmax(color), (name, mean)
        assert name in pages[name].locator("#status").inner_text()
