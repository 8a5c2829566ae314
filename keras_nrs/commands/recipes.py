"""Commands for the paper's recipes: train, sweep, report."""

import difflib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console

from keras_nrs.commands.app import app
from keras_nrs.commands.app import bad_parameters
from keras_nrs_command import load_package
from keras_nrs_command import without_logs


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
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="This process is one of several that train together: of SLURM, Open "
            "MPI, Kubernetes or a TPU pod on JAX, of TF_CONFIG on TensorFlow, of "
            "torchrun on PyTorch.",
        ),
    ] = False,
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
    if dry_run:
        typer.echo("\n".join([*plan, plans.DRY]))
        return
    load_package()
    with without_logs():
        from keras_nrs.backend import join_processes
        from keras_nrs.backend import processes

    if distributed:
        with bad_parameters(ValueError):
            join_processes()
    is_first = processes()[0] == 0
    with without_logs():
        from keras_nrs.data.download import check_connection
        from keras_nrs.experiments.progress import RunProgress
        from keras_nrs.experiments.training import RecipeError
        from keras_nrs.experiments.training import Training

    if is_first:
        typer.echo("\n".join(plan))
        check_connection(changed.dataset, data_dir, typer.echo)

    with bad_parameters(TypeError, ValueError):
        trainings = [
            Training(changed, seed, output / recipe / f"seed-{seed}", data_dir)
            for seed in changed.seeds
        ]
    number = sum(not training.is_finished for training in trainings)
    has_bar = sys.stdout.isatty() and number > 0 and is_first
    console = None if is_first else Console(quiet=True)
    progress = RunProgress(number, changed.epochs, console, metric="val_accuracy")
    with progress if has_bar else nullcontext():
        for training in trainings:
            if training.is_finished:
                progress.print(f"{training.folder}: finished before")
            else:
                progress.print(f"{training.folder}: training")
                progress.start(f"seed {training.seed}")
            with bad_parameters(RecipeError):
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
    load_package()
    with without_logs():
        from keras_nrs.data.download import check_connection
        from keras_nrs.experiments import plans
        from keras_nrs.experiments.paper_sweeps import planned_trials
        from keras_nrs.experiments.paper_sweeps import sweeps
        from keras_nrs.experiments.progress import RunProgress
        from keras_nrs.experiments.search import role
        from keras_nrs.experiments.space import parse_space
        from keras_nrs.experiments.training import RecipeError

    with bad_parameters(TypeError, ValueError):
        space = parse_space(vary or [])
        numbers = planned_trials(
            recipe, changed, space, search=search, trials=trials, seed=seed
        )
    plan = plans.sweep_plan(recipe, changed, numbers, output=output, data_dir=data_dir)
    typer.echo("\n".join([*plan, plans.DRY] if dry_run else plan))
    if dry_run:
        return
    check_connection(changed.dataset, data_dir, typer.echo)
    with bad_parameters(TypeError, ValueError):
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
        with bad_parameters(TypeError, ValueError):
            current = next(planned, None)
        if current is None:
            return
        left = current.number_left(numbers[current.recipe_name])
        has_bar = sys.stdout.isatty() and role() == "alone" and left is not None
        progress = RunProgress(left or 0, current.recipe.epochs)
        with bad_parameters(RecipeError), progress if has_bar else nullcontext():
            current.run(progress.print, progress)
        if role() == "worker":
            continue
        console = Console()
        console.print(current.table(console))
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
    """Put runs into the paper's tables, beside the paper's numbers."""
    load_package()
    from keras_nrs.experiments import report
    from keras_nrs.experiments import results

    left_out: list[str] = []
    with bad_parameters(FileNotFoundError, ValueError):
        found = results.read_runs(runs, left_out)
    if str(output / "runs.csv") in set(found["folder"]):
        raise typer.BadParameter(
            f"The report would replace {output / 'runs.csv'}, which it reads. Choose "
            "another --output."
        )
    is_tty = sys.stdout.isatty()
    for table in report.write_report(found, output, left_out):
        typer.echo(report.to_text(table) if is_tty else report.to_markdown(table))
    if left_out:
        typer.echo("\n  ".join(["Left out, and why:", *left_out]) + "\n")
    typer.echo(f"Written: {output / 'report.md'} and {output / 'report.html'}")


def _list_recipes(words: list[str]) -> None:
    """Show a table of recipes, or plain names where another program reads them."""
    from keras_nrs.experiments import recipe_list

    with bad_parameters(ValueError):
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
        names = f"Similar names: {', '.join(similar)}. " if similar else ""
        raise typer.BadParameter(
            f"No recipe has the name {name!r}. {names}All names: keras-nrs train list"
        )
    # Some values only Keras knows: its logs are left out.
    with bad_parameters(TypeError, ValueError), without_logs():
        return recipes.with_settings(known[name], settings or [])
