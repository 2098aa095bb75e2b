"""kamim analyze."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.arguments import check_checkpoints, check_store
from kamim.cli.console import app, out_console, says_errors
from kamim.cli.progress import bar


@app.command()
@says_errors
def analyze(
    checkpoint: Annotated[
        list[str], typer.Option(help="[NAME=]RUN, random:RUN, timm:MODEL or timm:MODEL@FILE.safetensors; repeatable.")
    ],
    store: Annotated[Path, typer.Option(help="Store with the images to analyse.")],
    out: Annotated[Path, typer.Option(help="Folder for figures, analysis.json and index.html.")],
    figures: Annotated[
        str, typer.Option(help="all, or a comma-separated list of 2 to 10, features, cka, weights, probe.")
    ] = "all",
    images: Annotated[int | None, typer.Option(help="Number of images for curves. Default: all, at most 1000.")] = None,
    classes: Annotated[
        str, typer.Option(help="Three classes, comma-separated. Default: the store's first three.")
    ] = "",
    layer: Annotated[
        int | None,
        typer.Option(
            help="Block, counted from 1, for figures 3, 5 and 8 to 10. Default: the last, and the last but one for "
            "figure 3, as in the authors' notebooks. The paper's text uses the last for figure 3, and 11 for figure 8."
        ),
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Figure 5: head, counted from 1; the notebook shows 1. Default: mean of heads.")
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="Figure 5: X,Y of a query token, as fractions of the image sides; repeatable."),
    ] = None,
    probe: Annotated[
        list[Path] | None, typer.Option(help="Figure probe: a JSON file of kamim eval --json; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for images, masks, t-SNE and intervals.")] = 0,
) -> None:
    """Draws the paper's figures 2 to 10 and more for one or several checkpoints side by side."""
    check_checkpoints(checkpoint)
    check_store(store)

    from kamim.analysis.request import Request, check_names, choose, parse_figures, parse_query, read_probes
    from kamim.storage.store import Store

    chosen = {"queries": tuple(parse_query(text) for text in query)} if query else {}
    probes = tuple(result for file in probe or () for result in read_probes(file))
    request = Request(
        figures=parse_figures(figures),
        images=images,
        classes=tuple(filter(None, map(str.strip, classes.split(",")))),
        layer=layer,
        head=head,
        seed=seed,
        probes=probes,
        **chosen,
    )
    check_names(checkpoint)
    choose(request, Store(store))

    from kamim.analysis.analyze import run_analysis

    with bar(f"analyze {store.name}") as update:
        lines = run_analysis(checkpoint, Store(store), request, out, update)
    for line in lines:
        out_console.print(line)
    out_console.print(f"{out / 'index.html'}")
