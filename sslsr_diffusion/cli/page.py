from pathlib import Path
from typing import Annotated, Any

import typer

from sslsr_diffusion.cli.flags import as_flags
from sslsr_diffusion.cli.infer import Dtype, MemoryBudget

Model = Annotated[
    list[str] | None,
    typer.Option(help="Run folder, model's folder or file, or hub id to have in the list beside the finished runs; repeatable."),
]


def page(
    model: Model = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine, 127.0.0.1; 0: a free one.")] = 7860,
    runs: Annotated[Path, typer.Option(help="Folder of the runs that are shown.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto: float16 on a GPU, float32 on the CPU.")] = Dtype.auto,
    memory_budget: MemoryBudget = None,
) -> None:
    """A page for this machine's browser: upscale and compare models, look at runs, explore graphs. Ctrl-C ends it.

    It listens on 127.0.0.1 alone; nothing leaves the machine, and what was uploaded is deleted at the end.
    """
    import signal

    from sslsr_diffusion.devices import find_device, parse_bytes
    from sslsr_diffusion.inference.open import glance
    from sslsr_diffusion.page.server import serve

    with as_flags("model", "port", "device", "memory_budget"):
        find_device(device, field="device")
        where: dict[str, Any] = {"device": device, "dtype": dtype.value}
        if memory_budget is not None:
            where["memory_budget"] = parse_bytes(memory_budget)
        for name in model or ():
            with glance(name):
                pass  # it is there; weights of the hub are fetched when it is opened

        def ready(address: str) -> None:
            typer.echo(f"open {address} in a browser on this machine; Ctrl-C ends it")

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises a signal again when it is done with it
        try:
            serve(model or (), port=port, runs=runs, where=where, on_ready=ready)
        except KeyboardInterrupt:
            typer.echo("ended; what was uploaded and made there is deleted")
