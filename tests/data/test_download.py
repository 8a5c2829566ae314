"""What is said where the network is missing."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from typer.testing import CliRunner

from keras_nrs import cli
from keras_nrs.data import download
from keras_nrs.data.download import check_connection

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch

RECIPE = "cifar10-resnet18-basic-nrs"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/there" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def address_of_cifar(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The data set is downloaded from another address."""
    infos = property(lambda self: {address: None})
    monkeypatch.setattr(tfds.core.DatasetBuilder, "url_infos", infos)


def closed_port() -> str:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        return f"http://127.0.0.1:{server.server_port}/file"


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_command_says_what_it_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    address = closed_port()
    address_of_cifar(monkeypatch, address)
    arguments = [command, RECIPE, "--data-dir", str(tmp_path / "data")]
    result = CliRunner().invoke(
        cli.build_app(), [*arguments, "--output", str(tmp_path / "runs")]
    )
    assert result.exit_code == 1
    assert f"Trying {address} for up to 10 seconds" in result.stdout
    assert result.stderr.startswith(f"Error: {address} cannot be reached: ")
    assert len(result.stderr.splitlines()) == 1
    assert "--data-dir FOLDER" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_an_address_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a name that is looked up for minutes."""
    ended = threading.Event()

    def never(*args: Any, **options: Any) -> None:
        ended.wait(60)
        raise OSError

    monkeypatch.setattr(download, "_SECONDS", 0.05)
    monkeypatch.setattr(download.urllib.request, "urlopen", never)
    address_of_cifar(monkeypatch, "http://127.0.0.1/file")
    with pytest.raises(ConnectionError, match=r"no answer in 0.05 seconds"):
        check_connection("cifar10", str(tmp_path))
    ended.set()


@pytest.mark.parametrize("path", ["/there", "/not/there"])
def test_an_answer_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, path: str
) -> None:
    lines: list[str] = []
    address_of_cifar(monkeypatch, server + path)
    check_connection("cifar10", str(tmp_path), lines.append)
    assert len(lines) == 1


def test_data_at_hand_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(address: str) -> None:
        raise AssertionError(address)

    monkeypatch.setattr(download, "_problem", fail)
    check_connection("digits", str(tmp_path))
    check_connection("no such set", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "an archive").touch()
    check_connection("cifar10", str(tmp_path))
    # A set with configurations, whose folder lies deeper.
    check_connection("imagenet_v2", str(tmp_path))
    # ImageNet's archives are put there by hand.
    address_of_cifar(monkeypatch, "gs://bucket")
    check_connection("imagenet2012", str(tmp_path / "other"))
