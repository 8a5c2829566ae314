"""The commands of `keras-nrs`.

A command imports the packages that only it needs when it runs, not before.
"""

import difflib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

import keras
import typer
from rich.console import Console
from typer.core import TyperGroup

import keras_nrs
from keras_nrs._files import DamagedFileError
from keras_nrs._locks import InUseError
from keras_nrs_command import without_logs

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
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Rich's boxes would break the lines of error messages.
    rich_markup_mode=None,
)


def _show_versions(is_asked: bool) -> None:
    if is_asked:
        text = f"keras-nrs {keras_nrs.__version__} (Keras {keras.__version__} on "
        typer.echo(f"{text}{keras.config.backend()})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions, and exit.",
        ),
    ] = False,
) -> None:
    """Neighborhood Region Smoothing for Keras models."""


def _complete_recipe(incomplete: str) -> list[str]:
    from keras_nrs.experiments import recipes

    return [name for name in recipes.recipes() if name.startswith(incomplete)]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
]
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: a value of the recipe to change."),
]
DataFolder = Annotated[
    str | None,
    typer.Option(
        metavar="<path>",
        help="Folder of TFDS's prepared data sets, by default $TFDS_DATA_DIR or "
        "~/tensorflow_datasets; or of Fashion-MNIST's idx files.",
    ),
]


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
    from keras_nrs.experiments import demo
    from keras_nrs.experiments import demo_data
    from keras_nrs.experiments import demo_report

    console = Console()
    given: dict[str, Any] = {"train_images": train_images, "epochs": epochs}
    with _bad_parameters(TypeError, ValueError):
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
    """Measure how flat saved models are: a table, landscapes, spectra, a page."""
    from keras_nrs.flatness import measurements
    from keras_nrs.flatness import report

    console = Console()
    with _bad_parameters(TypeError, ValueError):
        settings = measurements.Settings(
            variables=variables, k=k, eps=eps, points=points, batch_size=batch_size
        )
        loaded = report.load_models(models)
        x, y = report.load_data(data, next(iter(loaded.values())))
    measured = report.Report(loaded, x, y, settings=settings, output=output)
    with _bad_parameters(TypeError, ValueError, NotImplementedError):
        measured.run(console)
    console.print(measured.table())
    names = "report.html", "landscape.png", "density.png"
    typer.echo(f"Written: {', '.join(str(output / name) for name in names)}")


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="DATASET-NETWORK-AUGMENTATION-SCHEME, or 'list'.",
            autocompletion=_complete_recipe,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="After 'list': parts of names, such as cifar10 vit."),
    ] = None,
    settings: RecipeSettings = None,
    output: Annotated[
        Path, typer.Option(help="Folder of runs; a stopped run goes on.")
    ] = Path("runs"),
    data_dir: DataFolder = None,
    dry_run: DryRun = False,
) -> None:
    """Train a cell of the paper's tables, once for each of its seeds."""
    from keras_nrs.experiments import plans

    if recipe == "list":
        _list_recipes(words or [])
        return
    if words:
        raise typer.BadParameter(
            f"Only 'list' takes more words. Received: {' '.join(words)}. Change values "
            "of a recipe with --set."
        )
    changed = _recipe(recipe, settings)
    plan = plans.train_plan(recipe, changed, output=output, data_dir=data_dir)
    typer.echo("\n".join([*plan, plans.DRY] if dry_run else plan))
    if dry_run:
        return
    with without_logs():
        from keras_nrs.data.download import check_connection
        from keras_nrs.experiments.progress import RunProgress
        from keras_nrs.experiments.training import RecipeError
        from keras_nrs.experiments.training import Training

    check_connection(changed.dataset, data_dir, typer.echo)

    with _bad_parameters(TypeError, ValueError):
        trainings = [
            Training(changed, seed, output / recipe / f"seed-{seed}", data_dir)
            for seed in changed.seeds
        ]
    number = sum(not training.is_finished for training in trainings)
    has_bar = sys.stdout.isatty() and number > 0
    progress = RunProgress(number, changed.epochs, metric="val_accuracy")
    with progress if has_bar else nullcontext():
        for training in trainings:
            if training.is_finished:
                progress.print(f"{training.folder}: finished before")
            else:
                progress.print(f"{training.folder}: training")
                progress.start(f"seed {training.seed}")
            with _bad_parameters(RecipeError):
                summary = training.run(
                    verbose=0 if has_bar else 2, callbacks=[progress]
                )
            metrics = [
                f"{k} {v:.4f}" for k, v in summary.items() if k.startswith("test_")
            ]
            progress.print(f"{training.folder}: {', '.join(metrics)}")


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
    dry_run: DryRun = False,
) -> None:
    """Search a recipe's hyperparameters on held-out training images."""
    changed = _recipe(recipe, settings)
    with without_logs():
        from keras_nrs.data.download import check_connection
        from keras_nrs.experiments import plans
        from keras_nrs.experiments.paper_sweeps import planned_trials
        from keras_nrs.experiments.paper_sweeps import sweeps
        from keras_nrs.experiments.progress import RunProgress
        from keras_nrs.experiments.search import role
        from keras_nrs.experiments.space import parse_space
        from keras_nrs.experiments.training import RecipeError

    with _bad_parameters(TypeError, ValueError):
        space = parse_space(vary or [])
        numbers = planned_trials(
            recipe, changed, space, search=search, trials=trials, seed=seed
        )
    plan = plans.sweep_plan(recipe, changed, numbers, output=output, data_dir=data_dir)
    typer.echo("\n".join([*plan, plans.DRY] if dry_run else plan))
    if dry_run:
        return
    check_connection(changed.dataset, data_dir, typer.echo)
    with _bad_parameters(TypeError, ValueError):
        planned = sweeps(
            recipe,
            changed,
            space,
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
        left = current.number_left(numbers[current.recipe_name])
        has_bar = sys.stdout.isatty() and role() == "alone" and left is not None
        progress = RunProgress(left or 0, current.recipe.epochs)
        with _bad_parameters(RecipeError), progress if has_bar else nullcontext():
            current.run(progress.print, progress)
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


def _list_recipes(words: list[str]) -> None:
    """Show a table of recipes, or plain names where another program reads them."""
    from keras_nrs.experiments import recipe_list

    with _bad_parameters(ValueError):
        names = recipe_list.matching(words)
    if sys.stdout.isatty():
        Console().print(recipe_list.recipe_table(names))
    else:
        typer.echo("\n".join(names))


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
