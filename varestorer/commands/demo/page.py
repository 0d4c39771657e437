"""The page: what is on it, and what its parts do. Visitors' pictures are kept in their own session's state."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from ipaddress import ip_address
from threading import Event
from typing import Any

import gradio as gr
from matplotlib import colormaps
from matplotlib.colors import to_hex

from varestorer.commands.demo.studio import CancelledError, Result, Studio, suggested
from varestorer.commands.options import RestoreOptions
from varestorer.utils.errors import UserError, reason
from varestorer.utils.images import IMAGE_EXTENSIONS

LOG = logging.getLogger(__name__)
FORMATS = RestoreOptions.__dataclass_fields__["format"].metadata["choices"]
# parts of the page
WISHES = ("scale", "reduce", "prompt", "color", "steps", "select", "seed", "uncertainty", "fidelity")
RESTORED, GUESSED = "restored", "where it guessed"
OWN_QUALITY = {"jpg": 95, "webp": 90, "avif": 90}
CSS = """
#legend .bar { height: 14px; border-radius: 4px; }
#legend .ends { display: flex; justify-content: space-between; font-size: 13px; }
#status, #plan { overflow-wrap: anywhere; }
#gallery .grid-wrap { min-height: 0; }
footer { display: none !important; }
"""

Changes = dict[Any, Any]
"""Part of the page -> what becomes of it."""


class Page:
    """The parts of the page by their names, and what they do with the help of a studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio, host = studio, studio.options.host
        self.stops: dict[str | None, Event] = {}  # of sessions
        try:
            self.is_local = ip_address(host).is_loopback
        except ValueError:
            self.is_local = host == "localhost"
        with gr.Blocks(title="varestorer", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            self.results, self.chosen = gr.State([], delete_callback=studio.forget), gr.State(0)
            gr.Markdown("## varestorer\nDrop photographs, see them before and after, download what they became.")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_wishes()
                with gr.Column(scale=5, min_width=320):
                    self._lay_out_results()
            self._connect()

    def serve(self) -> str:
        """Start the server in a thread of its own; returns the page's address. UserError: no port is free."""
        options = self.studio.options
        place = {"server_name": options.host, "server_port": options.port, "inbrowser": options.browser}
        off = {"share": False, "ssr_mode": False, "enable_monitoring": False, "mcp_server": False, "quiet": True}
        off["_frontend"] = False  # gradio's look at its own page, which gives a busy machine three seconds
        theme = gr.themes.Default(primary_hue="orange", font="system-ui", font_mono="monospace")  # none is fetched
        more = {"theme": theme, "css": CSS, "max_file_size": "500mb", "prevent_thread_lock": True}
        try:
            # everybody is let in at once: the studio makes visitors take turns
            return str(self.blocks.queue(default_concurrency_limit=None).launch(**place, **off, **more)[1])
        except OSError as error:
            where = f"{options.host}:{options.port or 7860}"
            raise UserError(f"no page can be served at {where}: is the port taken? Give another port=") from error

    def _lay_out_wishes(self) -> None:
        kinds = sorted(IMAGE_EXTENSIONS)
        self.files = gr.File(file_count="multiple", file_types=kinds, label="Photographs", height=150)
        self.plan = gr.Markdown(elem_id="plan")
        self.scale = gr.Slider(1, 8, 4, step=0.5, label="Times larger")
        about = "choose 2, and 1 time larger, to clean a telephone's photograph at its own size"
        self.reduce = gr.Radio([1, 2, 3, 4], value=1, label="Times smaller first", info=about)
        models = [(f"{system}: {name}", name) for system, names in self.studio.choices.items() for name in names]
        info = "or the path of a folder or file, or a hub name" if self.is_local else None
        free = {"allow_custom_value": self.is_local, "info": info}
        self.ckpt = gr.Dropdown(models, value=self.studio.first, label="System and checkpoint", **free)
        self.prompt = gr.Textbox(label="What the picture shows", placeholder="a dog on grass", visible=False)
        with gr.Accordion("More", open=False):
            self.color = gr.Radio(["none", "adain", "wavelet"], value="none", label="Take the colors of the input")
            self.steps = gr.Dropdown(["one"], value="one", label="Steps")
            self.select = gr.Radio(["argmax", "sample"], value="argmax", label="Likeliest choices, or drawn ones")
            self.seed = gr.Number(0, precision=0, label="Seed of what is drawn")
            self.uncertainty = gr.Checkbox(True, label="Map of where the model guessed")
            self.fidelity = gr.Slider(0, 1, 0, step=0.05, label="Stay with the input where the model guessed")
        with gr.Row():
            self.start = gr.Button("Restore", variant="primary", min_width=120)
            self.stop = gr.Button("Cancel", variant="stop", visible=False, min_width=120)
        self.status = gr.Markdown(elem_id="status")

    def _lay_out_results(self) -> None:
        self.slider = gr.ImageSlider(label="Before and after", max_height=720, elem_id="slider", buttons=["fullscreen"])
        self.view = gr.Radio([RESTORED, GUESSED], value=RESTORED, label="The right side shows", visible=False)
        self.legend = gr.HTML(visible=False, elem_id="legend")
        looks: dict[str, Any] = {"columns": 4, "height": "auto", "fit_columns": False, "object_fit": "cover"}
        looks |= {"allow_preview": False, "buttons": []}
        self.gallery = gr.Gallery(label="Pictures", visible=False, elem_id="gallery", **looks)
        with gr.Row(visible=False, equal_height=True) as self.saving:
            self.format = gr.Dropdown(list(FORMATS), value="png", label="Format", min_width=100)
            self.quality = gr.Slider(1, 100, 95, step=1, label="Quality", visible=False, min_width=140)
            button: dict[str, Any] = {"size": "md", "min_width": 120}
            self.one = gr.DownloadButton("Download", elem_id="download", variant="primary", **button)
            self.all = gr.DownloadButton("Download all", elem_id="download-all", visible=False, **button)

    def _connect(self) -> None:
        """Say which part calls what: handlers take the parts they read (a set) and return those they change."""
        loud: dict[str, Any] = {"api_visibility": "private"}
        quiet = loud | {"show_progress": "hidden"}
        looks, saved = [self.slider, self.legend, self.view], [self.saving, self.quality, self.one, self.all]
        wishes = {getattr(self, key) for key in WISHES}
        wanted = {self.results, self.chosen, self.view, self.format, self.quality}
        self.files.upload(self.suggest, self.files, [self.scale, self.reduce], **quiet)
        ahead = [self.files.change, self.scale.change, self.reduce.change, self.ckpt.change]
        gr.on(ahead, self.look_ahead, [self.files, self.ckpt, self.scale, self.reduce], self.plan, **quiet)
        of_model = [self.status, self.prompt, self.steps]
        gr.on([self.blocks.load, self.ckpt.change], self.choose_model, self.ckpt, of_model, **loud)
        changed = [self.status, self.results, self.chosen, *looks, self.gallery, self.start, self.stop, *saved]
        asked = {self.files, self.ckpt, *wishes, *wanted}
        self.start.click(self.restore, asked, changed, show_progress_on=[self.slider], **loud)
        self.stop.click(self.cancel, None, self.status, **quiet)
        self.view.input(self.show, wanted, looks, **quiet)
        self.gallery.select(self.choose_picture, wanted, [self.chosen, *looks, *saved], **quiet)
        self.start.click(None, js="() => document.getElementById('slider').scrollIntoView({block: 'center'})", **loud)
        self.format.input(self.choose_format, wanted, saved, show_progress_on=[self.one], **loud)
        self.quality.release(self.offer, wanted, saved, show_progress_on=[self.one], **loud)
        self.blocks.unload(self.leave)

    def suggest(self, files: list[str] | None) -> Changes:
        """For large photographs, the size that they have: four times larger they would be refused, or take hours."""
        sizes = suggested(files or [])
        return {self.scale: gr.skip()} if sizes is None else {self.scale: sizes[0], self.reduce: sizes[1]}

    def look_ahead(self, files: list[str] | None, ckpt: str, scale: float, reduce: int) -> str:
        """How large the pictures become, before it is done."""
        lines = [self.studio.preview(file, ckpt, scale, reduce) for file in files or [] if self.may_use(ckpt)]
        return "\n".join(lines if len(lines) < 2 else [f"- {line}" for line in lines])

    def may_use(self, ckpt: str) -> bool:
        """Whether a model was offered; whoever is at this machine may name any."""
        return self.is_local or any(ckpt in names for names in self.studio.choices.values())

    def choose_model(self, ckpt: str) -> Changes:
        """Load a model, and show what it can be asked for."""
        try:
            if not self.may_use(ckpt):
                raise UserError("choose a model of the list")
            model = self.studio.model(ckpt)
        except UserError as error:
            return {self.status: f"**{error}**"}
        ways = gr.update(choices=model.ways, value="one", visible=len(model.ways) > 1)
        return {self.status: "", self.prompt: gr.update(visible=model.reads_text), self.steps: ways}

    def restore(
        self,
        asked: dict[Any, Any],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how gradio is asked for one
    ) -> Iterator[Changes]:
        """Restore the visitor's pictures and show each as it is done."""
        files, ckpt = asked[self.files] or [], asked[self.ckpt]
        if not files or not self.may_use(ckpt):
            yield {self.status: "**Choose a model of the list.**" if files else "**Drop a photograph first.**"}
            return
        wishes = {key: asked[getattr(self, key)] for key in WISHES}
        wishes |= {"prompt": wishes["prompt"] or None, "seed": int(wishes["seed"] or 0)}
        running = {self.start: gr.update(interactive=False), self.stop: gr.update(visible=True)}
        yield {self.status: "", self.saving: gr.update(visible=False), **running}
        done: list[Result] = []
        failed: list[str] = []
        end = ""
        try:
            self.studio.forget(asked[self.results])
            stop = self.stops[request.session_hash] = Event()
            for outcome in self.studio.restore(files, ckpt, wishes, stop, lambda *now: progress(now[0], desc=now[1])):
                (done if isinstance(outcome, Result) else failed).append(outcome)  # type: ignore[arg-type]
                pictures = gr.update(value=[(str(one.after), one.name) for one in done], visible=len(files) > 1)
                yield {
                    self.status: report(done, failed, len(files)),
                    self.results: list(done),
                    self.chosen: 0,
                    self.gallery: pictures,
                    **self.show(asked | {self.results: done, self.chosen: 0}),
                }
        except CancelledError:
            end = "Cancelled. "
        except UserError as error:
            end = f"**{error}** "
        except Exception as error:  # noqa: BLE001  # the page goes on, and so do other visitors
            LOG.exception("the page failed")
            end = f"**This should not happen: {reason(error)}. The server's terminal says more.** "
        ended = {self.start: gr.update(interactive=True), self.stop: gr.update(visible=False)}
        yield {self.status: end + report(done, failed, len(files)), **ended}
        yield self.offer(asked | {self.results: done, self.chosen: 0})

    def show(self, asked: dict[Any, Any]) -> Changes:
        """Slider and legend of the chosen picture."""
        if not asked[self.results]:
            return {self.view: gr.update(visible=False)}
        result = asked[self.results][asked[self.chosen]]
        is_map = asked[self.view] == GUESSED and result.overlay is not None
        return {
            self.slider: (str(result.before), str(result.overlay if is_map else result.after)),
            self.legend: gr.update(value=legend(result.span), visible=is_map),
            self.view: gr.update(visible=result.overlay is not None),
        }

    def choose_picture(self, asked: dict[Any, Any], event: gr.SelectData) -> Changes:
        """Show the picture that was clicked."""
        asked[self.chosen] = int(event.index)
        return {self.chosen: asked[self.chosen], **self.show(asked), **self.offer(asked)}

    def choose_format(self, asked: dict[Any, Any]) -> Changes:
        """Offer another format, in its own quality."""
        asked[self.quality] = OWN_QUALITY.get(asked[self.format], asked[self.quality])
        return self.offer(asked)

    def offer(self, asked: dict[Any, Any]) -> Changes:
        """Make the files that can be downloaded."""
        done, ending = asked[self.results], asked[self.format]
        if not done:
            return {self.saving: gr.update(visible=False)}
        quality = int(asked[self.quality]) if ending in OWN_QUALITY else None
        try:
            path = self.studio.download([done[asked[self.chosen]]], ending, quality)
            every = self.studio.download(done, ending, quality) if len(done) > 1 else None
        except UserError as error:
            raise gr.Error(str(error)) from error
        return {
            self.saving: gr.update(visible=True),
            self.quality: gr.update(value=asked[self.quality], visible=quality is not None),
            self.one: gr.update(value=str(path), label=f"Download {ending}"),
            self.all: gr.update(value=every and str(every), visible=every is not None),
        }

    def cancel(self, request: gr.Request) -> str:
        """Stop the visitor's own work."""
        self.leave(request)
        return "Stopping after this square..."

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.stops.pop(request.session_hash, Event()).set()


def legend(span: tuple[float, float]) -> str:
    """The color scale of an overlay, as HTML."""
    stops = ", ".join(to_hex(colormaps["inferno"](number / 8)) for number in range(9))
    return (
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ends"><span>surest: {span[0]:.2f}</span><span>guessed: {span[1]:.2f}</span></div>'
        "entropy of the model's choices, from 0 (decided) to 1 (a coin toss); colors span this picture's own range"
    )


def report(done: list[Result], failed: list[str], total: int) -> str:
    """What became of the pictures."""
    said = [*(f"**{line}**" for line in failed), *(f"{one.name}: {text}" for one in done for text in one.warnings)]
    whole = f"{done[0].name}: {done[0].size} pixels" if len(done) == total == 1 else f"{len(done)} of {total} restored"
    return "\n\n".join([*said, whole])
