"""What `tune()` is asked on three data sets."""

from collections.abc import Iterator
from typing import Any

import pytest

from studies import data
from studies import decisions

# Nothing here depends on the backend; this one starts soonest.
pytestmark = pytest.mark.only_torch


def test_a_task_of_the_study() -> None:
    settings = {"learning_rate": 0.3, "weight_decay": 0.003}
    case = decisions.case_of("smoke", settings)
    result = decisions.decide(
        case, settings={"RPR": {"scheme": "rpr"}}, seeds=2, verbose=0
    )
    assert [row["setting"] for row in result.table] == ["baseline", "RPR"]
    assert (len(case.train.x), len(case.validation.x)) == (60, 40)


def test_learning_rates_end_with_the_training() -> None:
    for case in (
        decisions.digits(),
        decisions.case_of("smoke", {"learning_rate": 1.0, "weight_decay": 0.0}),
    ):
        steps = -(-len(case.train.x) // case.fit["batch_size"])
        for epochs in (case.fit["epochs"], 3):
            optimizer = case.make_model(epochs).optimizer
            optimizer.iterations.assign(steps * epochs)
            assert float(optimizer.learning_rate) == pytest.approx(0, abs=1e-9)
            optimizer.iterations.assign(steps * epochs - 1)
            assert float(optimizer.learning_rate) > 1e-9


@pytest.fixture
def _few_sequences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """20,000 are made in ten seconds."""
    monkeypatch.setitem(data.MNIST1D, "mnist1d", (10, 2500))
    for cached in (data.pool_and_test, data.given_labels):
        cached.cache_clear()
    yield
    for cached in (data.pool_and_test, data.given_labels):
        cached.cache_clear()


@pytest.mark.usefixtures("_few_sequences")
def test_all_three(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(decisions, "decide", lambda case, **o: asked.append((case, o)))
    decisions.main(["--minutes", "2"])
    assert [len(case.train.x) for case, _ in asked] == [200, 1000, 3000]
    assert [len(case.validation.x) for case, _ in asked] == [800, 1000, 2000]
    assert all(options["minutes"] == 2 for _, options in asked)
    assert "fashion-mlp-3000: 0 s" in capsys.readouterr().out
