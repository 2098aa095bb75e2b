"""kamim analyze."""

from pathlib import Path
from typing import Annotated

import typer

from kamim.cli.console import app, bar, out_console, says_errors


@app.command()
@says_errors
def analyze(
    checkpoint: Annotated[
        list[str], typer.Option(help="NAME=RUN, NAME=random:RUN, NAME=timm:MODEL or NAME=timm:MODEL@FILE.safetensors.")
    ],
    store: Annotated[Path, typer.Option(help="Images to look at.")],
    out: Annotated[Path, typer.Option(help="Where pictures, analysis.json and index.html go.")],
    figures: Annotated[str, typer.Option(help="all, or some of 2,3,..,10,features,cka,weights,probe.")] = "all",
    images: Annotated[int | None, typer.Option(help="For curves; all, 1000 at most, where not given.")] = None,
    classes: Annotated[str, typer.Option(help="Three, comma-separated; the store's first where not given.")] = "",
    layer: Annotated[
        int | None,
        typer.Option(
            help="Block, from 1, of figures 3, 5 and 8 to 10. Not given: the last, and for figure 3 the last but one, "
            "as in the authors' notebooks. The paper's text says the last of figure 3, too, and 11 of figure 8."
        ),
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Figure 5: head, from 1; the mean if not given, where the notebook shows 1.")
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="Figure 5: X,Y of a query token, as shares of the sides; repeatable.")
    ] = None,
    probe: Annotated[list[Path] | None, typer.Option(help="A result of kamim eval --json; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of images, masks, t-SNE and intervals.")] = 0,
) -> None:
    """The paper's analyses of one or several checkpoints side by side: figures 2 to 10 and more."""
    from kamim.analysis.analyze import run_analysis
    from kamim.analysis.request import Request, parse_figures, parse_query, read_probes
    from kamim.storage.store import Store

    chosen = {"queries": tuple(parse_query(text) for text in query)} if query else {}
    request = Request(
        figures=parse_figures(figures), images=images, classes=tuple(filter(None, classes.split(","))), layer=layer,
        head=head, seed=seed, probes=tuple(result for file in probe or () for result in read_probes(file)), **chosen,
    )  # fmt: skip
    with bar(f"analyze {store.name}") as update:
        lines = run_analysis(checkpoint, Store(store), request, out, update)
    for line in lines:
        out_console.print(line)
    out_console.print(f"{out / 'index.html'}")
