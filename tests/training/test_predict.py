"""``python -m training.predict``: files in, files out, in this process and with a service."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from support.images import image_bytes
from support.networks import publish_network, publish_tiny, tiny_version
from support.responses import metric_samples
from support.service import Serve, address

from app import key_file
from app.store import Store
from training.prediction import main

DAYS = pd.date_range("2024-01-01", periods=30)
KNOWN = {"name": "price", "mean": 2.0, "scale": 1.0, "coefficient": 0.3}
CALENDAR = {"country": "DE", "step": "day", "first_year": 2024, "last_year": 2034, "dates": ["2024-01-30"]}


@pytest.fixture
def store(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a store with networks of all tasks, and one with known covariates. Make its parent the working folder."""
    monkeypatch.chdir(tiny_store.parent)
    for name in ("tiny-forecaster", "tiny-cgan"):
        publish_tiny(tiny_store, name)
    columns = [KNOWN, {**KNOWN, "name": "holidays DE"}]
    traits = {"season": 4, "known": {"columns": columns, "calendar": CALENDAR}}
    publish_network(tiny_store, "known", seed=0, series=traits)
    card, tensors = tiny_version("tiny-cnn")
    Store(tiny_store).publish({**card, "name": "tags", "thresholds": [0.0] * 9 + [1.0]}, tensors)
    return tiny_store


@pytest.fixture
def places(store: Path, serve: Serve) -> Iterator[dict[str, list[str]]]:
    """Return the options for predictions in this process, and by a service with the same store."""
    with serve() as client:
        yield {"process": ["--store", str(store)], "service": ["--url", f"http://{address(client)}"]}


Run = Callable[..., pd.DataFrame]


@pytest.fixture
def predicted(places: dict[str, list[str]]) -> Run:
    """Return a function that runs a command in both places, and returns the CSV file, which is the same."""

    def run(*command: str, failed: str = "") -> pd.DataFrame:
        first, second = (read(*command, *place, failed=failed) for place in places.values())
        assert_same(first, second)
        return first

    return run


def assert_same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Check that two tables are equal. The last decimal places depend on the batch."""
    pd.testing.assert_frame_equal(first, second, rtol=1e-5, atol=1e-5)


def read(*command: str, failed: str = "") -> pd.DataFrame:
    """Run the command, which ends with the message ``failed``. Return its output file."""
    with pytest.raises(SystemExit, match=failed) if failed else contextlib.nullcontext():
        main([*command, "--out", "out.csv"])
    assert not Path("out.csv.part").exists()
    return pd.read_csv("out.csv")


def save_images(count: int) -> None:
    Path("photos/cats").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 30), (i, 50, 2 * i)).save(f"photos/cats/{i:03}.png")


def save_sales(**days: int) -> None:
    shops = [
        pd.DataFrame({"day": DAYS[:count], "shop": shop, "sold": range(count), "price": [2.0, 2.5] * (count // 2)})
        for shop, count in {"north": 30, **days}.items()
    ]
    pd.concat(shops).to_csv("sales.csv", index=False)


def test_images_become_rows_of_labels_and_damaged_images_are_reported(
    predicted: Run,
) -> None:
    save_images(3)
    Path("photos/bad.png").write_bytes(image_bytes()[:90])
    Path("photos/notes.txt").write_text("no image")
    failed = r"^1 failed:\nbad\.png: .* damaged"
    frame = predicted("tiny-cnn", "photos", "--top-k", "2", failed=failed)
    assert list(frame) == ["file", "label", "probability", "label_2", "probability_2"]
    assert list(frame["file"]) == ["cats/000.png", "cats/001.png", "cats/002.png"]
    assert (frame["probability"] > frame["probability_2"]).all()
    frame = predicted("tags", "photos", "--top-k", "2", failed=failed)
    assert list(frame) == ["file", "label", "probability", "label_2", "probability_2", "selected"]
    assert all(sorted(labels.split(";")) == list("abcdefghi") for labels in frame["selected"])


def test_a_table_becomes_the_next_values_of_each_series(predicted: Run) -> None:
    save_sales(south=20, east=2)
    failed = r"^1 failed:\neast: values has 2 values; tiny-forecaster needs at least 3$"
    options = ("--column", "sold", "--group", "shop", "--horizon", "2", "--levels", "80")
    frame = predicted("tiny-forecaster", "sales.csv", *options, failed=failed)
    assert list(frame) == ["series", "time", "mean", "median", "lower_80", "upper_80"]
    assert list(frame["series"] + frame["time"]) == [
        *("north2024-01-31", "north2024-02-01"),
        *("south2024-01-21", "south2024-01-22"),
    ]
    assert (frame["lower_80"] < frame["median"]).all()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pd.date_range("2021-04-30", periods=12, freq="ME"), ["2022-04-30", "2022-05-31"]),
        (pd.date_range("2021-03-31", periods=12, freq="QE"), ["2024-03-31", "2024-06-30"]),
        (pd.date_range("2021-01-15", periods=12, freq="7D"), ["2021-04-09", "2021-04-16"]),
        (pd.bdate_range("2021-01-04", periods=10), ["2021-01-18", "2021-01-19"]),
        (pd.date_range("2021-01-01 22:30", periods=5, freq="15min"), ["2021-01-01 23:45:00", "2021-01-02 00:00:00"]),
        (None, [14, 15]),
    ],
)
def test_forecasts_have_the_times_after_the_table(times: Any, expected: list[Any], store: Path) -> None:
    frame = (
        pd.DataFrame({"sold": range(12)}) if times is None else pd.DataFrame({"t": times, "sold": range(len(times))})
    )
    frame.to_csv("sales.csv", index=False)
    assert list(read("tiny-forecaster", "sales.csv", "--horizon", "2", "--store", str(store))["time"]) == expected


def test_known_covariates_come_from_the_table_of_future_values(
    predicted: Run,
) -> None:
    save_sales(south=20)
    command = ("known", "sales.csv")
    future = pd.DataFrame({"day": [*DAYS[20:], *DAYS[:3] + pd.Timedelta(days=30)], "price": 3.0})
    pd.concat([future.assign(shop=shop) for shop in ("north", "south")]).to_csv("next.csv", index=False)
    with pytest.raises(SystemExit, match="known has known covariates price; add --future"):
        predicted(*command)
    with pytest.raises(SystemExit, match=r"--future needs price of 'north' for each of the 4 steps from 2024-01-31$"):
        predicted(*command, "--future", "next.csv", "--horizon", "4")
    expensive = predicted(*command, "--future", "next.csv")
    assert list(expensive.groupby("series").size()) == [3, 13]  # all steps of the table
    Path("next.csv").write_text(Path("next.csv").read_text().replace("3.0", "2.0"))
    cheap = predicted(*command, "--future", "next.csv")
    assert (cheap["median"] < expensive["median"]).all()


def test_each_line_of_a_text_is_continued(predicted: Run) -> None:
    Path("prompts.txt").write_text("abc\n\nde\n")
    frame = predicted("tiny-rnn", "prompts.txt", "--characters", "5")
    assert list(frame["prompt"]) == ["abc", "de"]
    assert set(frame["text"].str.replace("<unk>", "?").str.len()) == {5}


def test_a_generator_writes_a_folder_or_a_sheet(places: dict[str, list[str]]) -> None:
    for place, options in places.items():
        main(["tiny-cgan", "--count", "70", "--label", "y", "--out", place, *options])
        main(["tiny-gan", "--count", "5", "--out", f"{place}.png", *options])
    assert len(list(Path("service").glob("*.png"))) == 70
    assert Path("service/images.csv").read_text().splitlines()[::70] == ["path,label", "00070.png,y"]
    for file in ("00070.png", "../service.png"):
        assert Path("service", file).read_bytes() == Path("process", file.replace("service", "process")).read_bytes()
    assert Image.open(io.BytesIO(Path("service.png").read_bytes())).size == (3 * 30 + 2, 2 * 30 + 2)
    with pytest.raises(SystemExit, match="--out service exists already"):
        main(["tiny-cgan", "--out", "service", *options])


@pytest.mark.parametrize("place", ["process", "service"])
def test_the_same_command_continues_after_an_interruption(places: dict[str, list[str]], place: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore this signal
    save_images(70)
    command = ["tiny-cnn", "photos", *places[place]]
    expected = read(*command)
    last = Path("photos/cats/069.png")
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # reading the last image waits for ``interrupt``

    def interrupt() -> None:
        with last.open("wb"):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--out", "out.csv"])
    thread.join()
    assert stopped.value.code == 130
    assert_same(pd.read_csv("out.csv"), expected)
    with Path("out.csv.part").open("a") as file:
        file.write('["cats/07')  # of a process that was killed
    last.unlink()
    last.write_bytes(content)
    Path("photos/cats/000.png").write_text("damaged")  # is not read again
    journal = Path("out.csv.part").read_text()
    assert_same(read(*command), expected)
    Path("out.csv.part").write_text(journal)
    read(*command, "--top-k", "1", failed="000.png")  # another command reads it


def test_a_service_gets_no_requests_before_the_time_that_it_names(store: Path, serve: Serve) -> None:
    save_images(6)
    key = key_file.add(Path("keys"), "alice")
    with serve(keys_file=Path("keys"), rate_limit="3/second") as client:
        command = ["tiny-cnn", "photos", "--url", f"http://{address(client)}"]
        assert_same(read(*command, "--key", key), read("tiny-cnn", "photos", "--store", str(store)))
        client.headers["authorization"] = f"Bearer {key}"
        limited = metric_samples(client)
        with pytest.raises(SystemExit, match=r"401 .*key"):
            main([*command, "--out", "out.csv", "--key", "wrong"])
    assert limited["quartet_rate_limited_total", ("key", "alice")] >= 1
    with pytest.raises(SystemExit, match="refused"):
        main([*command, "--out", "out.csv"])


def test_wrong_arguments_are_rejected(store: Path) -> None:
    for command, message in (
        (["tiny-cnn", "--out", "x"], "tiny-cnn needs INPUT"),
        (["tiny-gan", str(store), "--out", "x"], "tiny-gan generates images: omit INPUT"),
        (["tiny-cnn", "missing", "--out", "x"], "missing does not exist"),
        (["tiny-cnn", str(store), "--out", "x"], "holds nothing that tiny-cnn can read"),
        (["other", str(store), "--out", "x"], "other: there is no model 'other'"),
        (["tiny-cnn@7", str(store), "--out", "x"], "tiny-cnn@7: there is no tiny-cnn@7"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*command, "--store", str(store)])
