"""Whether a data set that has to be downloaded can be."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from keras_nrs.data.fashion_mnist import builder_of

_SECONDS = 10


def check_connection(
    name: str, data_dir: str | None, report: Callable[[str], None] = print
) -> None:
    """Try the address of a data set that is not prepared yet.

    TFDS itself tries for minutes.

    Args:
        name: Name of the data set.
        data_dir: Folder of the prepared data sets; `None` is TFDS's own.
        report: Called with a line of text before the address is tried.

    Raises:
        ConnectionError: if there is no answer.
    """
    try:
        builder = builder_of(name, data_dir)
    except (tfds.core.registered.DatasetNotFoundError, TypeError, ValueError):
        return  # `ImageData` says what is wrong with the name.
    addresses = [url for url in builder.url_infos or () if url.startswith("http")]
    # Below it are the set's name, its configuration if it has some, and its version.
    folder = Path(builder.data_dir).parents[builder.info.full_name.count("/")]
    has_downloads = any((folder / "downloads").glob("*"))
    if builder.is_prepared() or has_downloads or not addresses:
        return
    report(
        f"{name} is not in {folder}, and is downloaded. Trying {addresses[0]} for up "
        f"to {_SECONDS} seconds."
    )
    problem = _problem(addresses[0])
    if problem is not None:
        raise ConnectionError(
            f"{addresses[0]} cannot be reached: {problem}. Connect this machine to the "
            "network, or prepare the data on another one, with python -c 'import "
            f'tensorflow_datasets as tfds; tfds.load("{name}", data_dir="FOLDER")\', '
            "and give a copy of that folder: --data-dir FOLDER."
        )


def _problem(address: str) -> str | None:
    """Why there is no answer from an address; `None` if there is one."""
    problems: list[str | None] = [f"no answer in {_SECONDS} seconds"]

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
        except urllib.error.HTTPError:
            problems.append(None)  # An answer, though not the file.
        except OSError as error:
            problems.append(str(getattr(error, "reason", error)))
        else:
            problems.append(None)

    # Looking up a name has no limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return problems[-1]
