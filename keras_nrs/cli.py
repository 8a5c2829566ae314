"""The command `keras-nrs`.

The packages that a command needs beyond Keras are imported when it runs, not before.
"""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from typing import Any

_EXTRAS = ("typer", "sklearn", "scipy", "matplotlib")
_EXPERIMENTS = ("tensorflow", "tensorflow_datasets", "pandas", "keras_tuner")


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: if typer is not installed.
    """
    import typer

    # Rich's boxes would break the lines of error messages.
    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
    )

    @app.callback()
    def keras_nrs() -> None:
        """Neighborhood Region Smoothing for Keras models."""

    @app.command()
    def demo(
        seeds: Annotated[int, typer.Option(help="Runs of each arm, >= 2.")] = 8,
        train_images: Annotated[int, typer.Option(help="From 10 to 900.")] = 100,
        epochs: Annotated[int, typer.Option(help="Epochs of each run, >= 1.")] = 100,
        output: Annotated[
            Path,
            typer.Option(help="Folder of results; finished runs are not repeated."),
        ] = Path("demo"),
    ) -> None:
        """Compare NRS with its controls on scikit-learn's handwritten digits."""
        run_demo(seeds=seeds, train_images=train_images, epochs=epochs, output=output)

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
            Path,
            typer.Option(help="Folder of results; finished ones are not repeated."),
        ] = Path("flatness"),
    ) -> None:
        """Measure how flat saved models are: a table, landscapes, spectra."""
        run_flatness(
            models,
            data,
            output=output,
            variables=variables,
            k=k,
            eps=eps,
            points=points,
            batch_size=batch_size,
        )

    @app.command()
    def train(
        recipe: Annotated[
            str, typer.Argument(help="DATASET-NETWORK-AUGMENTATION-SCHEME, or 'list'.")
        ],
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", help="key=value: a value of the recipe to change."),
        ] = None,
        output: Annotated[
            Path, typer.Option(help="Folder of runs; a stopped run goes on.")
        ] = Path("runs"),
        data_dir: Annotated[
            Path | None, typer.Option(help="Folder of TFDS's prepared data sets.")
        ] = None,
    ) -> None:
        """Train a cell of the paper's tables, once for each of its seeds."""
        run_train(recipe, settings or [], output=output, data_dir=data_dir)

    @app.command()
    def sweep(  # noqa: PLR0913
        recipe: Annotated[
            str, typer.Argument(help="DATASET-NETWORK-AUGMENTATION-SCHEME.")
        ],
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
                help="Largest number of trials. The default is 20 for random and "
                "bayesian."
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", help="key=value: a value of the recipe to change."),
        ] = None,
        output: Annotated[
            Path, typer.Option(help="Folder of sweeps; a stopped sweep goes on.")
        ] = Path("sweeps"),
        data_dir: Annotated[
            Path | None, typer.Option(help="Folder of TFDS's prepared data sets.")
        ] = None,
    ) -> None:
        """Search a recipe's hyperparameters on held-out training images."""
        run_sweep(
            recipe,
            vary or [],
            settings or [],
            search=search,
            trials=trials,
            seed=seed,
            output=output,
            data_dir=data_dir,
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
        run_report(runs, output=output)

    return app


def run_demo(*, seeds: int, train_images: int, epochs: int, output: Path) -> None:
    """Run the demo, print its table and draw its figure.

    Raises:
        ModuleNotFoundError: if an extra is not installed.
        typer.BadParameter: if an argument is not as described.
    """
    import typer
    from rich.console import Console

    from keras_nrs.experiments import demo
    from keras_nrs.experiments import demo_report

    console = Console()
    try:
        settings = demo.Settings(train_images=train_images, epochs=epochs)
        experiment = demo.Experiment(settings, seeds=seeds, output=output)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if experiment.finished:
        typer.echo(f"{len(experiment.finished)} runs are in {output} already.")
    runs = experiment.run(console)
    console.print(demo_report.results_table(runs))
    demo_report.draw_results(runs, output / "demo.png")
    typer.echo(f"Written: {output / 'runs.json'} and {output / 'demo.png'}")


def run_flatness(
    paths: list[Path], data: str, *, output: Path, **settings: Any
) -> None:
    """Measure saved models, print the table and draw the figures.

    Raises:
        ModuleNotFoundError: if an extra is not installed.
        typer.BadParameter: if an argument is not as described.
    """
    import typer
    from rich.console import Console

    from keras_nrs.flatness import report

    console = Console()
    try:
        chosen = report.Settings(**settings)
        models = report.load_models(paths)
        x, y = report.load_data(data, next(iter(models.values())))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    measured = report.Report(models, x, y, settings=chosen, output=output)
    try:
        measured.run(console)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(measured.table())
    typer.echo(f"Written: {output / 'landscape.png'} and {output / 'density.png'}")


def run_train(
    name: str, settings: list[str], *, output: Path, data_dir: Path | None
) -> None:
    """Train a recipe with each of its seeds, and print the test metrics.

    Raises:
        ModuleNotFoundError: if an extra is not installed.
        typer.BadParameter: if an argument is not as described.
    """
    import typer

    from keras_nrs.experiments import recipes

    if name == "list":
        typer.echo("\n".join(recipes.recipes()))
        return
    named = _named_recipe(name)
    from keras_nrs.experiments.training import RecipeError
    from keras_nrs.experiments.training import Training

    try:
        recipe = recipes.with_settings(named, settings)
        trainings = [
            Training(
                recipe,
                seed,
                output / name / f"seed-{seed}",
                _folder_name(data_dir),
            )
            for seed in recipe.seeds
        ]
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for training in trainings:
        is_old = training.is_finished
        typer.echo(f"{training.folder}: {'finished before' if is_old else 'training'}")
        try:
            summary = training.run(verbose=1 if sys.stdout.isatty() else 2)
        except RecipeError as error:
            raise typer.BadParameter(str(error)) from error
        except FloatingPointError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        metrics = [f"{k} {v:.4f}" for k, v in summary.items() if k.startswith("test_")]
        typer.echo(f"{training.folder}: {', '.join(metrics)}")


def run_sweep(
    name: str,
    vary: list[str],
    settings: list[str],
    *,
    output: Path,
    data_dir: Path | None,
    **options: Any,
) -> None:
    """Search the values of a recipe that are best on validation images.

    Raises:
        ModuleNotFoundError: if an extra is not installed.
        typer.BadParameter: if an argument is not as described.
    """
    import typer
    from rich.console import Console

    from keras_nrs.experiments import recipes
    from keras_nrs.experiments import search
    from keras_nrs.experiments.paper_sweeps import sweeps
    from keras_nrs.experiments.space import parse_space
    from keras_nrs.experiments.training import RecipeError

    named = _named_recipe(name)
    with _bad_parameters(TypeError, ValueError):
        planned = sweeps(
            name,
            recipes.with_settings(named, settings),
            parse_space(vary),
            output=output,
            data_dir=_folder_name(data_dir),
            **options,
        )
    while True:
        with _bad_parameters(TypeError, ValueError):
            current = next(planned, None)
        if current is None:
            return
        with _bad_parameters(RecipeError):
            current.run(typer.echo)
        if search.role() == "worker":
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


def run_report(paths: list[Path], *, output: Path) -> None:
    """Write a report of runs, and print its tables as Markdown.

    Raises:
        ModuleNotFoundError: if an extra is not installed.
        typer.BadParameter: if an argument is not as described.
    """
    import typer

    from keras_nrs.experiments import report
    from keras_nrs.experiments import results

    try:
        runs = results.read_runs(paths)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for table in report.write_report(runs, output):
        typer.echo(report.to_markdown(table))
    typer.echo(f"Written: {output / 'report.md'} and {output / 'report.html'}")


def _named_recipe(name: str) -> Any:
    import typer

    from keras_nrs.experiments import recipes

    known = recipes.recipes()
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
        raise typer.BadParameter(
            f"No recipe has the name {name!r}. Similar names: {', '.join(similar)}. "
            "All names: keras-nrs train list"
        )
    return known[name]


@contextmanager
def _bad_parameters(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors into errors of an argument, which are shown without a traceback."""
    import typer

    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error)) from error


def _folder_name(folder: Path | None) -> str | None:
    return None if folder is None else str(folder)


def main() -> None:
    """Entry point of `keras-nrs`."""
    try:
        build_app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in (*_EXTRAS, *_EXPERIMENTS):
            raise
        extra = "experiments" if package in _EXPERIMENTS else "demo"
        sys.exit(
            f"Error: keras-nrs needs the package {error.name}. Install it with: "
            f'pip install "keras-nrs[{extra}]"'
        )
