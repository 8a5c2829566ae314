"""The commands of `keras-nrs`.

A command imports the packages that only it needs when it runs, not before.
"""

import difflib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError

# What some packages say in errors of their own about errors of the system.
_SYSTEM_ERRORS = [
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
]


class _OneLineErrors(TyperGroup):
    """Shows errors that are not of this program as one line, and exits with 1.

    These are errors of the system, and files that are damaged or in use. The exit code
    is 2 after bad arguments, and 130 after Ctrl-C.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped. The same command goes on from here.", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except Exception as error:
            # Typer's own errors, which it shows, may have such an error as the cause.
            text = None if hasattr(error, "exit_code") else _line(error)
            if text is None:
                raise
            typer.echo(f"Error: {text}", err=True)
            raise typer.Exit(1) from error


def _line(error: BaseException) -> str | None:
    """An error in a line, `None` for one that is this program's own."""
    known = (OSError, FloatingPointError, DamagedFileError, InUseError)
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror:
        text = f"{error.strerror}: {error.filename!r}" if error.filename else text
    if isinstance(error, known) or any(name in text for name in _SYSTEM_ERRORS):
        return " ".join(text.split())
    return None if error.__cause__ is None else _line(error.__cause__)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Neighborhood Region Smoothing for Keras models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich's boxes would break the lines of error messages.
    rich_markup_mode=None,
)

RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: a value of the recipe to change."),
]
DataFolder = Annotated[
    str | None,
    typer.Option(
        metavar="<path>",
        help="Folder of TFDS's prepared data sets, or of Fashion-MNIST's idx files.",
    ),
]


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(help="Runs of each arm, >= 2.")] = 8,
    train_images: Annotated[int, typer.Option(help="From 10 to 900.")] = 100,
    epochs: Annotated[int, typer.Option(help="Epochs of each run, >= 1.")] = 100,
    output: Annotated[
        Path, typer.Option(help="Folder of results; finished runs are not repeated.")
    ] = Path("demo"),
) -> None:
    """Compare NRS with its controls on scikit-learn's handwritten digits."""
    from keras_nrs.experiments import demo
    from keras_nrs.experiments import demo_report

    console = Console()
    with _bad_parameters(TypeError, ValueError):
        settings = demo.Settings(train_images=train_images, epochs=epochs)
        experiment = demo.Experiment(settings, seeds=seeds, output=output)
    if experiment.finished:
        typer.echo(f"{len(experiment.finished)} runs are in {output} already.")
    runs = experiment.run(console)
    console.print(demo_report.results_table(runs))
    demo_report.draw_results(runs, output / "demo.png")
    typer.echo(f"Written: {output / 'runs.json'} and {output / 'demo.png'}")


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
    """Find out whether NRS is worth it for a model and data, with which setting."""
    from keras_nrs.tuning.script import load_data
    from keras_nrs.tuning.script import load_factory
    from keras_nrs.tuning.search import prepare
    from keras_nrs.tuning.task import call_factory

    with _bad_parameters(TypeError, ValueError):
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
    typer.echo(f"Written: {folder / 'best.keras'} and {folder / 'result.json'}")


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
    """Measure how flat saved models are: a table, landscapes, spectra."""
    from keras_nrs.flatness import report

    console = Console()
    with _bad_parameters(TypeError, ValueError):
        settings = report.Settings(
            variables=variables, k=k, eps=eps, points=points, batch_size=batch_size
        )
        loaded = report.load_models(models)
        x, y = report.load_data(data, next(iter(loaded.values())))
    measured = report.Report(loaded, x, y, settings=settings, output=output)
    with _bad_parameters(TypeError, ValueError, NotImplementedError):
        measured.run(console)
    console.print(measured.table())
    typer.echo(f"Written: {output / 'landscape.png'} and {output / 'density.png'}")


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="DATASET-NETWORK-AUGMENTATION-SCHEME, or 'list'.")
    ],
    settings: RecipeSettings = None,
    output: Annotated[
        Path, typer.Option(help="Folder of runs; a stopped run goes on.")
    ] = Path("runs"),
    data_dir: DataFolder = None,
) -> None:
    """Train a cell of the paper's tables, once for each of its seeds."""
    from keras_nrs.experiments import recipes

    if recipe == "list":
        typer.echo("\n".join(recipes.recipes()))
        return
    changed = _recipe(recipe, settings)
    from keras_nrs.data.download import check_connection
    from keras_nrs.experiments.training import RecipeError
    from keras_nrs.experiments.training import Training

    check_connection(changed.dataset, data_dir, typer.echo)

    with _bad_parameters(TypeError, ValueError):
        trainings = [
            Training(changed, seed, output / recipe / f"seed-{seed}", data_dir)
            for seed in changed.seeds
        ]
    for training in trainings:
        state = "finished before" if training.is_finished else "training"
        typer.echo(f"{training.folder}: {state}")
        with _bad_parameters(RecipeError):
            summary = training.run(verbose=1 if sys.stdout.isatty() else 2)
        metrics = [f"{k} {v:.4f}" for k, v in summary.items() if k.startswith("test_")]
        typer.echo(f"{training.folder}: {', '.join(metrics)}")


@app.command()
def sweep(  # noqa: PLR0913
    recipe: Annotated[str, typer.Argument(help="DATASET-NETWORK-AUGMENTATION-SCHEME.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="key=V1,V2 or key=LOW:HIGH or key=LOW:HIGH:log; by default the "
            "paper's grid."
        ),
    ] = None,
    search: Annotated[
        str, typer.Option(help="grid, random, bayesian or hyperband.")
    ] = "grid",
    trials: Annotated[
        int | None,
        typer.Option(
            help="Largest number of trials. The default is 20 for random and bayesian."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    settings: RecipeSettings = None,
    output: Annotated[
        Path, typer.Option(help="Folder of sweeps; a stopped sweep goes on.")
    ] = Path("sweeps"),
    data_dir: DataFolder = None,
) -> None:
    """Search a recipe's hyperparameters on held-out training images."""
    from keras_nrs.data.download import check_connection
    from keras_nrs.experiments.paper_sweeps import sweeps
    from keras_nrs.experiments.search import role
    from keras_nrs.experiments.space import parse_space
    from keras_nrs.experiments.training import RecipeError

    changed = _recipe(recipe, settings)
    check_connection(changed.dataset, data_dir, typer.echo)
    with _bad_parameters(TypeError, ValueError):
        planned = sweeps(
            recipe,
            changed,
            parse_space(vary or []),
            search=search,
            trials=trials,
            seed=seed,
            output=output,
            data_dir=data_dir,
        )
    while True:
        with _bad_parameters(TypeError, ValueError):
            current = next(planned, None)
        if current is None:
            return
        with _bad_parameters(RecipeError):
            current.run(typer.echo)
        if role() == "worker":
            continue
        Console().print(current.table)
        typer.echo(f"Written: {current.folder / 'trials.csv'}")
        try:
            best = current.best
        except ValueError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        typer.echo(
            f"Best: {best.name}, in {current.folder / 'best.json'}. To train it on all "
            f"training images and test it:\n{current.train_command}"
        )


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, and CSV files of runs.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the report; an old one is replaced.")
    ] = Path("report"),
) -> None:
    """Put runs into the paper's tables beside its numbers, with tests and costs."""
    from keras_nrs.experiments import report
    from keras_nrs.experiments import results

    left_out: list[str] = []
    with _bad_parameters(FileNotFoundError, ValueError):
        found = results.read_runs(runs, left_out)
    if str(output / "runs.csv") in set(found["folder"]):
        raise typer.BadParameter(
            f"The report would replace {output / 'runs.csv'}, which it reads. Choose "
            "another --output."
        )
    for table in report.write_report(found, output, left_out):
        typer.echo(report.to_markdown(table))
    if left_out:
        typer.echo("\n  ".join(["Left out, and why:", *left_out]) + "\n")
    typer.echo(f"Written: {output / 'report.md'} and {output / 'report.html'}")


def _recipe(name: str, settings: list[str] | None) -> Any:
    """The recipe of a name, with some values changed."""
    from keras_nrs.experiments import recipes

    known = recipes.recipes()
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
        raise typer.BadParameter(
            f"No recipe has the name {name!r}. Similar names: {', '.join(similar)}. "
            "All names: keras-nrs train list"
        )
    with _bad_parameters(TypeError, ValueError):
        return recipes.with_settings(known[name], settings or [])


@contextmanager
def _bad_parameters(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors into errors of an argument, which are shown without a traceback."""
    try:
        yield
    except DamagedFileError:
        raise
    except errors as error:
        raise typer.BadParameter(str(error)) from error
