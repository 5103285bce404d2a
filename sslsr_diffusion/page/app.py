"""The page's three tabs in gradio: upscale and compare, look at runs, explore graphs. What they do is done elsewhere.

The server imports this file when it knows that gradio is there.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.images import printable
from sslsr_diffusion.inference.open import finished_runs
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.page.bench import Bench, Made
from sslsr_diffusion.page.controls import call_of, fields, scale_of, shown
from sslsr_diffusion.page.explorer import EXAMPLE, explore_files
from sslsr_diffusion.page.runs import draw_curves, list_runs, look_at, name_of
from sslsr_diffusion.page.shelf import Shelf
from sslsr_diffusion.shipped_model import SMALL

ONE = {"concurrency_id": "work", "concurrency_limit": 1}  # of all that computes: whoever comes second waits
LOOKING = {"concurrency_id": "runs", "concurrency_limit": 1}  # pyplot draws for one at a time
BUTTONS = ["fullscreen", "download"]  # of pictures; gradio's third one shares them with a hub
EXPLORED = {"sr": "Result", "gt": "Truth", "lr": "Low-resolution input (optional)"}  # labels of what `explore_files` takes
NARROW = 300  # pixels of a column beside which no other one stands on a phone
ROOM = 64  # pixels in which a bar of progress and its words stand whole
REFRESH = 3.0  # seconds between looks at a run


@dataclass
class App:
    """`models` stand in the list beside the finished runs in `runs`."""

    bench: Bench
    shelf: Shelf
    models: Sequence[str]
    runs: Path

    def build(self) -> Any:
        """The gradio.Blocks."""
        with gr.Blocks(title="sslsr-diffusion", analytics_enabled=False, fill_width=True) as blocks:
            gr.Markdown("# sslsr-diffusion\nEverything stays on this machine; what you upload is deleted when the page's server ends.")
            with gr.Tab("Upscale"):
                self.upscaling()
            with gr.Tab("Runs") as runs:
                self.training(runs)
            with gr.Tab("Explore"):
                self.exploring()

            def leave(request: gr.Request) -> None:
                self.bench.stop(request.session_hash)
                self.bench.withdraw(str(request.session_hash))

            blocks.unload(leave)
        blocks.queue(default_concurrency_limit=1)
        return blocks

    def upscaling(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=NARROW):
                pictures = gr.File(label="Pictures", file_count="multiple", height=130)
                folder = gr.File(label="or a folder", file_count="directory", height=130)
                told = "listed ones, or type a run folder, a hub id, a file of weights; several are compared"
                models = gr.Dropdown(
                    self.listed(), value=self.listed()[:1], multiselect=True, allow_custom_value=True, label="Models", info=told
                )
                with gr.Row():
                    scale = gr.Number(4, label="Scale", info="enlargement", min_width=140)
                    seed = gr.Number(0, label="Seed", info="of every picture", precision=0, minimum=0, min_width=140)
                with gr.Row():
                    options = fields()
                with gr.Row():
                    start = gr.Button("Upscale", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
            with gr.Column(scale=3, min_width=NARROW):
                said = gr.Markdown("Drop pictures and press Upscale.", elem_id="said", container=True, min_height=ROOM)
                picture = gr.Dropdown([], label="Show", visible=False)
                results = gr.File(label="Results, with their metadata", file_count="multiple", interactive=False, visible=False, height=190)
                view = gr.HTML(elem_id="comparison")
        made = gr.State([])

        def upscale(given: dict[Any, Any], request: gr.Request, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
            call = call_of({name: given[component] for name, component in options.items()})
            files = [Path(path) for path in [*(given[pictures] or []), *(given[folder] or [])]]
            work = RunnerOptions(scale_of(given[scale]), int(given[seed] or 0), call)

            def bar(share: float, text: str) -> None:
                progress(share, desc=text)

            done = self.bench.upscale(files, given[models], self.shelf.new(), work, owner=str(request.session_hash), progress=bar)
            names = [(source.name, str(source)) for source in _sources(done)]
            first = names[0][1] if names else None
            shown = gr.update(choices=names, value=first, visible=len(names) > 1)
            paths = [str(path) for each in done for path in each.results.values()]
            text = "\n".join(f"- {printable(line)}" for each in done for line in each.said) or "Withdrawn before it began."
            return [text, shown, self.compare(done, first), gr.update(value=paths, visible=bool(paths)), done]

        given = {pictures, folder, models, scale, seed, *options.values()}

        def wait(request: gr.Request) -> None:
            self.bench.wait(str(request.session_hash))

        def halt(request: gr.Request) -> None:
            session = str(request.session_hash)
            if self.bench.stop(session):
                return
            withdrawn = self.bench.withdraw(session)
            gr.Info("Your job is withdrawn: it ends when its turn comes." if withdrawn else "No job of yours is running.")

        gr.on(None, lambda: gr.update(choices=self.listed()), None, models, show_progress="hidden")  # when the page is loaded
        start.click(wait, queue=False, show_progress="hidden")
        start.click(self.told(upscale), given, [said, picture, view, results, made], show_progress_on=[said], **ONE)
        stop.click(halt, concurrency_limit=None, show_progress="hidden")
        picture.input(self.compare, [made, picture], view, **ONE)
        gr.on(None, self.told(self.options), models, list(options.values()), show_progress="minimal", concurrency_limit=None)

    def listed(self) -> list[str]:
        """The models to choose from: those that were named, the runs that are finished by now, the small one."""
        return list(dict.fromkeys([*self.models, *map(str, finished_runs(self.runs)), SMALL]))

    def options(self, models: list[str]) -> list[Any]:
        """The fields for what at least one of the models has; the values shown are the last one's."""
        had: frozenset[str] = frozenset()
        defaults: dict[str, Any] = {}
        for model in models:
            described = self.bench.describe(model)
            had, defaults = had | described.options, {**defaults, **described.defaults}
        return shown(had, defaults)

    def compare(self, made: Sequence[Made], source: str | None) -> str:
        """The viewer on one picture: its bicubic enlargement and every model's result."""
        results = {each.model: each.results[Path(source)] for each in made if Path(source) in each.results} if source else {}
        return self.shelf.compared(Path(str(source)), results) if results else ""

    def training(self, tab: gr.Tab) -> None:
        names = list_runs(self.runs)
        with gr.Row():
            with gr.Column(scale=1, min_width=NARROW):
                run = gr.Dropdown(names, value=names[0] if names else None, label=f"Run in {self.runs}/")
            with gr.Column(scale=2, min_width=NARROW):
                about = gr.Markdown("" if names else f"No run in {self.runs}/ yet.", elem_id="run", container=True)
        with gr.Row():
            with gr.Column(min_width=NARROW):
                curves = gr.Image(show_label=False, interactive=False, buttons=BUTTONS)
            with gr.Column(min_width=NARROW):
                step = gr.Slider(0, 1, 1, step=1, label="Validation", interactive=True, visible=False)
                caption = gr.Markdown(elem_id="grid")
                grid = gr.Image(show_label=False, interactive=False, buttons=BUTTONS)
        with gr.Accordion("Recipe", open=False):
            recipe = gr.Code(language="yaml", interactive=False)
        seen = gr.State()

        def captioned(grids: Sequence[Path]) -> list[Any]:
            return [f"Validation, {name_of(grids[0])}", grids[0]] if grids else ["", None]

        def look(name: str | None, number: float, before: Any, anew: bool) -> list[Any]:
            found = list_runs(self.runs)
            name = name if name in found else next(iter(found), None)
            if name is None:
                return [gr.skip()] * 8
            at = look_at(self.runs / name)
            state = (name, at.state)
            text = f"**{printable(name)}** {at.about}"
            if state == before and not anew:
                return [gr.update(choices=found), text, *[gr.skip()] * 5, before]
            most = len(at.grids)
            follows = anew or before is None or before[0] != name or number >= before[1][1]  # else an older one is being looked at
            slider = gr.update(minimum=1, maximum=max(2, most), visible=most > 1, **({"value": most} if follows else {}))
            drawn = draw_curves(self.runs / name, self.shelf.new())
            grids = captioned(at.grids[-1:]) if follows else [gr.skip()] * 2
            return [gr.update(choices=found, value=name), text, drawn, slider, *grids, at.recipe, state]

        def choose(name: str, number: float) -> list[Any]:
            grids = look_at(self.runs / name).grids if name in list_runs(self.runs) else ()
            return captioned(grids[: max(1, int(number))][-1:])

        outputs = [run, about, curves, step, caption, grid, recipe, seen]
        gr.Timer(REFRESH).tick(functools.partial(look, anew=False), [run, step, seen], outputs, show_progress="hidden", **LOOKING)
        for event in (run.input, tab.select):
            event(functools.partial(look, anew=True), [run, step, seen], outputs, **LOOKING)
        step.input(choose, [run, step], [caption, grid], show_progress="hidden")

    def exploring(self) -> None:
        with gr.Row():
            sr, gt, lr = (gr.File(label=label, height=150) for label in EXPLORED.values())
            with gr.Column(min_width=160):
                align = gr.Checkbox(False, label="resize a result of another size")
                start = gr.Button("Explore", variant="primary")
                example = gr.Button("Show an example")
        view = gr.HTML(elem_id="explorer")

        def explore(sr: str | None, gt: str | None, lr: str | None, align: bool) -> str:
            if sr is None or gt is None:
                raise UserError(f"{EXPLORED['sr' if sr is None else 'gt']}: expected a picture, got none; drop one into its field.")
            try:
                made = explore_files(Path(sr), Path(gt), Path(lr) if lr else None, align=align)
            except UserError as error:
                name, colon, said = str(error).partition(": ")
                raise UserError(f"{EXPLORED.get(name, name)}{colon}{said}") from None
            return self.shelf.frame(self.shelf.page(made.page))

        def show_example() -> str:
            sr, gt, lr = (str(EXAMPLE / f"{name}.png") for name in ("result", "truth", "lr"))
            return explore(sr, gt, lr, False)

        start.click(self.told(explore), [sr, gt, lr, align], view, **ONE)
        example.click(show_example, None, view, **ONE)

    def told(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """The same, with a user's mistake as a sentence on the page; the server goes on."""

        @functools.wraps(act)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return act(*args, **kwargs)
            except (UserError, MissingDependency) as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        return run


def _sources(made: Sequence[Made]) -> list[Path]:
    """The pictures that at least one model has done."""
    return list(dict.fromkeys(source for each in made for source in each.results))
