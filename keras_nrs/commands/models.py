"""Commands for a user's own models, and the demonstration."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console

from keras_nrs.commands.app import app
from keras_nrs.commands.app import bad_parameters
from keras_nrs_command import load_package


@app.command()
def demo(
    data: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, or auto: Fashion-MNIST where its files are.",
        ),
    ] = "auto",
    seeds: Annotated[int, typer.Option(help="Runs of each arm, >= 2.")] = 8,
    train_images: Annotated[
        int | None,
        typer.Option(help="100 of the digits by default, 3,000 of Fashion-MNIST."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of each run: 100 or 30 by default.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of results; finished runs are not repeated.")
    ] = Path("demo"),
) -> None:
    """Compare NRS with its controls on small images, and decide."""
    load_package()
    from keras_nrs.experiments import demo
    from keras_nrs.experiments import demo_data
    from keras_nrs.experiments import demo_report

    console = Console()
    given: dict[str, Any] = {"train_images": train_images, "epochs": epochs}
    with bad_parameters(TypeError, ValueError):
        data = demo_data.choose_data(data)
        settings = replace(
            demo.SETTINGS[data], **{k: v for k, v in given.items() if v is not None}
        )
        experiment = demo.Experiment(settings, seeds=seeds, output=output)
    typer.echo(f"Data: {demo_data.TITLES[data]}, from {demo_data.place_of(data)}.")
    if experiment.finished:
        typer.echo(f"{len(experiment.finished)} runs are in {output} already.")
    runs = experiment.run(console)
    console.print(demo_report.results_table(runs, data=data, console=console))
    demo_report.draw_results(runs, output / "demo.png", data)
    typer.echo(f"Written: {output / 'runs.json'} and {output / 'demo.png'}")
    console.print(f"Decision: {demo_report.decision(runs)}", highlight=False)
    typer.echo(
        "Next, with your own model and data:\n"
        "keras-nrs tune SCRIPT.py:make_model --data DATA.npz --epochs 30"
    )


@app.command()
def tune(  # noqa: PLR0913
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT.PY:FUNCTION",
            help="A function that returns a new compiled model.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="'digits', 'fashion-mnist', or an .npz file with arrays x and y, and "
            "x_val and y_val if validation samples are given apart."
        ),
    ],
    epochs: Annotated[int, typer.Option(help="Epochs of a plain training, >= 1.")],
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 32,
    validation_split: Annotated[
        float, typer.Option(help="Share of the samples to choose by, without x_val.")
    ] = 0.2,
    samples: Annotated[
        int | None, typer.Option(help="Number of samples to take; by default all.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time of all trainings; by default unlimited.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds that judge, >= 2.")] = 5,
    metric: Annotated[
        str, typer.Option(help="What decides; by default the accuracy, or the loss.")
    ] = "auto",
    folder: Annotated[
        Path, typer.Option(help="Folder of results; finished runs are not repeated.")
    ] = Path("tune"),
) -> None:
    """Find out whether, and with which setting, NRS helps a model."""
    load_package()
    from keras_nrs.tuning.script import load_data
    from keras_nrs.tuning.script import load_factory
    from keras_nrs.tuning.search import prepare
    from keras_nrs.tuning.task import call_factory

    with bad_parameters(TypeError, ValueError):
        make_model = load_factory(script)
        found = load_data(data, call_factory(make_model, epochs), samples=samples)
        fit: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
        if found.validation is None:
            fit["validation_split"] = validation_split
        search = prepare(
            make_model,
            found.x,
            found.y,
            validation_data=found.validation,
            fit=fit,
            metric=metric,
            seeds=seeds,
            minutes=minutes,
            folder=folder,
        )
    search.run()
    paths = folder / "best.keras", folder / "result.json"
    typer.echo(f"Written: {' and '.join(str(path) for path in paths if path.exists())}")


@app.command()
def flatness(  # noqa: PLR0913
    models: Annotated[
        list[Path], typer.Argument(help="Files of compiled models, to compare.")
    ],
    data: Annotated[
        str, typer.Option(help="'digits', or an .npz file with arrays x and y.")
    ],
    variables: Annotated[
        str, typer.Option(help="Weights of the Hessian: last_layer or all.")
    ] = "last_layer",
    k: Annotated[int, typer.Option(help="Number of eigenvalues, >= 1.")] = 1,
    eps: Annotated[
        float, typer.Option(help="Relative size of the perturbations, >= 0.")
    ] = 0.1,
    points: Annotated[
        int, typer.Option(help="Landscape points along each direction, >= 2.")
    ] = 21,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 128,
    output: Annotated[
        Path, typer.Option(help="Folder of results; finished ones are not repeated.")
    ] = Path("flatness"),
) -> None:
    """Measure how flat saved models are, with figures and a page."""
    load_package()
    from keras_nrs.flatness import measurements
    from keras_nrs.flatness import report

    console = Console()
    with bad_parameters(TypeError, ValueError):
        settings = measurements.Settings(
            variables=variables, k=k, eps=eps, points=points, batch_size=batch_size
        )
        loaded = report.load_models(models)
        x, y = report.load_data(data, next(iter(loaded.values())))
    measured = report.Report(loaded, x, y, settings=settings, output=output)
    with bad_parameters(TypeError, ValueError, NotImplementedError):
        measured.run(console)
    console.print(measured.table())
    names = "report.html", "landscape.png", "density.png"
    typer.echo(f"Written: {', '.join(str(output / name) for name in names)}")
