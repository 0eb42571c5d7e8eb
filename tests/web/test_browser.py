"""The web page in a real browser: all panels, with mouse and keyboard, in the light and the dark theme."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from support import processes
from support.imported.onnx_models import linear_model, square_classifier
from support.networks import SMALL, publish_network, publish_tiny, rewrite_card
from support.responses import metric_samples
from support.service import IMAGES, ROOT, Serve, run_models_command
from support.tables import PRODUCTS, shop_table
from support.waiting import wait_until

from app import key_file
from app.importing.add import Description, add
from app.store import Store

WEB = ROOT / "app" / "web"
HORSE = IMAGES / "cifar10" / "0013-horse.png"
WAIT = 30_000  # milliseconds; a panel needs a fraction of a second on an idle machine
HTTP_ERROR = "Failed to load resource: the server responded with a status of"  # console message for each 4xx


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open the page of a service. Fail on console errors and on requests to other hosts."""
    messages: list[str] = []
    urls: set[str] = set()
    contexts: list[Any] = []

    def create_page(client: httpx.Client, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: message.type in ("error", "warning") and messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: urls.add(request.url))
        page.messages = messages
        page.goto(str(client.base_url))
        return page

    yield create_page
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in urls if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}
    assert messages == []


def expected_errors(page: Any) -> int:
    """Count and clear the console messages of expected error responses."""
    count = sum(message.startswith(HTTP_ERROR) for message in page.messages)
    page.messages[:] = [message for message in page.messages if not message.startswith(HTTP_ERROR)]
    return count


def status_of(page: Any, panel: str) -> str:
    """Wait for the answer in a panel. Return the panel's status line: model, version and duration."""
    from playwright.sync_api import expect

    expect(page.locator(f"#{panel} .status strong")).to_be_visible(timeout=WAIT)
    expect(page.locator(f"#{panel} .answer")).to_have_attribute("aria-busy", "false", timeout=WAIT)
    return str(page.locator(f"#{panel} .status").inner_text())


def open_options(page: Any, *panels: str) -> None:
    """Open the options of these panels."""
    for panel in panels:
        page.locator(f"#{panel} summary", has_text="Options").click()


def code_of(page: Any, panel: str, language: str = "curl") -> str:
    """Return the request of a panel as a curl command or as Python code, also while the code is hidden."""
    return str(page.locator(f"#{panel} .code code").nth(["curl", "Python"].index(language)).text_content())


def open_table(page: Any, path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    page.set_input_files("#series-file", path)


def test_each_panel_shows_an_answer_its_model_and_its_duration_at_first(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    for panel, model in (("image", "cifar10-whitened"), ("text", "shakespeare-rnn"), ("series", "series-lstm"),
                         ("generation", "mnist-cgan")):  # fmt: skip
        assert re.match(rf"{model}, version \d · [\d.]+ m?s", status_of(page, panel))
        offered = page.locator(f"#{panel} select[name=model] option").all_inner_texts()
        assert offered[0] == model
        assert page.locator(f"#{panel} .headline span").inner_text()  # how good the model is
    assert page.locator("#image select[name=model] option").count() == 4
    assert page.locator("#image-bars li").first.inner_text().startswith("horse")
    headline = "94 % of the test images are right. Knows only: airplane, automobile, bird,"
    assert headline in page.locator("#image .headline").inner_text()
    years = page.locator("#series-chart text[text-anchor=middle]").all_text_contents()
    assert (years[0], years[-1]) == ("1949", "1961")


def send_file(page: Any, selector: str, kind: str, file: Path, text: str = "") -> None:
    """Drop or paste a file on an element. A pasted file can have a text beside it."""
    page.evaluate(
        """([selector, kind, content, text]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "image.png", { type: "image/png" }));
            if (text) data.setData("text/plain", text);
            const event = kind === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
            document.querySelector(selector).dispatchEvent(event);
        }""",
        [selector, kind, base64.b64encode(file.read_bytes()).decode(), text],
    )


def test_images_can_be_chosen_dropped_or_pasted(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    status_of(page, "image")
    frog, ship = (next((IMAGES / "cifar10").glob(f"*-{name}.png")) for name in ("frog", "ship"))
    send_file(page, "#image .upload", "drop", ship)
    page.locator("#image-bars li:first-child", has_text="ship").wait_for()
    send_file(page, "#image .upload", "paste", HORSE)
    page.locator("#image-bars li:first-child", has_text="horse").wait_for()
    send_file(page, "#series-chart", "paste", HORSE)
    page.locator("#image-bars li:first-child", has_text="horse").wait_for()
    send_file(page, "#text-prompt", "paste", frog, text="1, 2, 3")  # as spreadsheets copy cells
    assert page.locator("#image-picture").get_attribute("alt") == "Image image.png"
    page.get_by_label("Choose images").set_input_files([frog, ship])
    page.locator("#image .status", has_text="2 images").wait_for()
    assert page.locator("#image-bars li:first-child").inner_text().startswith("frog")
    strip = page.get_by_role("list", name="Classified images").get_by_role("button")
    assert [text.split()[0] for text in strip.all_inner_texts()] == ["frog", "ship"]
    strip.nth(1).click()
    page.locator("#image-bars li:first-child", has_text="ship").wait_for()
    assert code_of(page, "image").endswith(f"-F 'file=@{frog.name}' -F 'file=@{ship.name}'")
    page.get_by_role("button", name="Show the image large").click()
    page.get_by_role("dialog").get_by_role("img", name=f"Image {ship.name}").wait_for()


@pytest.mark.slow
def test_curl_and_python_give_the_answer_of_each_panel(shipped: httpx.Client, open_page: Open, tmp_path: Path) -> None:
    page = open_page(shipped)
    open_options(page, "text")
    page.get_by_label("Prompt").fill('It\'s "here":\n')
    page.get_by_label("Characters").fill("60")
    page.locator("#text-seed").fill("")
    page.get_by_role("button", name="Generate text").click()
    page.locator("#text-prefix", has_text="here").wait_for()
    for panel, path in (("image", "images/classify"), ("text", "text/continue"), ("series", "series/forecast"),
                        ("generation", "images/sample")):  # fmt: skip
        status_of(page, panel)
        command, code = code_of(page, panel), code_of(page, panel, "Python")
        assert f"/v1/{path}" in command
        output = subprocess.run(["bash"], input=command, capture_output=True, text=True, check=True).stdout
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        results = ast.literal_eval(printed)
        if panel == "text":  # curl shows the stream
            events = [json.loads(part[6:]) for part in output.split("\n\n") if part.startswith("data: {")]
            assert "".join(event["text"] for event in events) == results[0]["text"]
            assert page.locator("#text-generated").text_content() == results[0]["text"]
        else:
            assert json.loads(output)["results"] == results
    page.locator("#text summary", has_text="curl and Python").click()
    page.get_by_role("button", name="Copy the Python code").and_(page.locator("#text button")).click()
    assert page.evaluate("navigator.clipboard.readText()") == code_of(page, "text", "Python")


@pytest.mark.slow
def test_every_answer_can_be_downloaded(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    content = {}
    for panel in ("image", "text", "series", "generation"):
        status_of(page, panel)
        with page.expect_download() as download:
            page.locator(f"#{panel}").get_by_role("button", name="Download").click()
        content[download.value.suggested_filename] = download.value.path().read_bytes()
    assert content["labels.csv"].startswith(b"file,label,probability\nhorse.png,horse,0.99")
    assert content["text.txt"].decode() == page.locator(".generated").text_content()
    lines = content["forecast.csv"].decode().splitlines()
    assert lines[0] == "time,mean,median,lower_80,upper_80,lower_95,upper_95"
    assert [line.split(",")[0] for line in lines[1::23]] == ["1961-01", "1962-12"]
    sheet = shipped.post("/v1/images/sample", json={"count": 40, "seed": 1}, headers={"accept": "image/png"})
    assert content["images.png"] == sheet.content


@pytest.mark.slow
def test_a_heat_map_can_be_shown(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    status_of(page, "image")
    open_options(page, "image")
    heat = page.locator("#image-heat")
    assert not heat.is_visible()
    page.get_by_label("Show heat map").check()
    heat.wait_for()
    assert heat.get_attribute("src").startswith("blob:")  # Firefox rejects data URLs of more than 32 MB
    pixels = heat.evaluate("""async (image) => {
        await image.decode();
        const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }""")
    horse = (WEB / "samples" / "horse.png").read_bytes()
    answer = shipped.post("/v1/images/classify?explain=true", content=horse).json()
    explanation = Image.open(io.BytesIO(base64.b64decode(answer["results"][0]["explanation"])))
    assert bytes(pixels) == explanation.convert("RGBA").tobytes()
    page.get_by_label("Show heat map").uncheck()
    heat.wait_for(state="hidden")
    page.locator("#image select[name=model]").select_option("mnist-judge")
    page.get_by_role("button", name="Example: seven").click()
    page.locator("#image-bars li:first-child", has_text="7").wait_for()
    assert status_of(page, "image").startswith("mnist-judge")


@pytest.mark.slow
def test_sliders_show_their_values_after_the_page_was_left(serve: Serve, open_page: Open) -> None:
    """The browser must not restore sliders, because it sends no event from which the page could learn their values."""
    shown = """(sliders) => sliders.map(({ id, value }) => {
        const text = document.querySelector(`output[for="${id}"]`).textContent.replace(",", "");
        return text !== "off" && parseFloat(text) !== Number(value) ? `${id} is ${value}, not ${text}` : null;
    }).filter(Boolean)"""
    with serve() as client:
        page = open_page(client)
        for panel in ("image", "text", "series", "generation"):
            status_of(page, panel)
        page.locator("input[type=range]").evaluate_all("(sliders) => sliders.forEach((slider) => slider.stepUp(3))")
        page.locator("#text-prompt").fill("JULIET:")
        page.get_by_role("link", name="API").click()
        page.wait_for_url("**/docs")
        page.go_back()
        status_of(page, "generation")
        assert page.locator("input[type=range]").evaluate_all(shown) == []
        assert page.locator("#text-prompt").input_value() == "JULIET:"


def test_stop_disconnects_and_ends_generation(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    status_of(page, "text")

    def ended(status: str) -> float:
        labels = ("method", "POST"), ("route", "/v1/text/continue"), ("status", status)
        return metric_samples(shipped).get(("quartet_requests_total", *labels), 0)

    open_options(page, "text")
    page.locator("#text-length").fill("4000")
    page.evaluate("""() => {
        const written = document.getElementById("text-generated");
        const stop = document.getElementById("text-stop");
        new MutationObserver(() => written.textContent && (stop.focus(), stop.click()))
            .observe(written, { childList: true });
    }""")
    for _ in range(5):  # on a busy machine, the service may send the whole text before the page reads the first part
        disconnected, completed = ended("499"), ended("200")
        page.locator("#text .status").evaluate("status => status.replaceChildren()")  # the status of the last round
        page.get_by_role("button", name="Generate text").click()
        page.locator("#text .status", has_text="stopped after").wait_for()
        assert 0 < len(page.locator("#text-generated").text_content()) < 4000
        assert page.locator("#text-stop").is_disabled()
        assert page.evaluate("document.activeElement.textContent") == "Generate text"
        wait_until(lambda before=disconnected + completed: ended("499") + ended("200") > before)
        if ended("499") > disconnected:  # the service has noticed the disconnect
            return
    pytest.fail("the service has not noticed any disconnect")


def test_the_chart_shows_a_pasted_or_opened_series(shipped: httpx.Client, open_page: Open, tmp_path: Path) -> None:
    page = open_page(shipped)
    status_of(page, "series")
    chart = page.locator("#series-chart svg")
    assert chart.locator("path.fan").count() == 2
    open_options(page, "series")
    page.get_by_label("99 %").check()
    page.locator("#series-chart path.fan").nth(2).wait_for(state="attached")
    page.get_by_label("Horizon").fill("7")
    page.locator("#series .status", has_text="7 steps after 144 values").wait_for()
    page.locator("#series-numbers summary").click()
    assert page.locator("#series-numbers tbody tr").count() == 7
    page.get_by_role("textbox", name="Values").fill("\n".join(str(i % 9) for i in range(60)) + "\n,, 3;4 null\t5")
    page.locator("#series .status", has_text="7 steps after 66 values").wait_for()
    assert "3,4,null,5]" in code_of(page, "series")
    history = chart.locator("path.history")
    assert re.search(r"M[\d.]+,[\d.]+h0$", history.get_attribute("d"))  # the 5 after the missing value is a dot
    assert history.evaluate("(path) => getComputedStyle(path).strokeLinecap") == "round"
    days = [f"2026-01-{i:02}" for i in range(1, 32)] + [f"2026-02-{i:02}" for i in range(1, 25)]
    table = 'day;"units; sold";price\n' + "".join(f"{day};{i};{i}.5\n" for i, day in enumerate(days))
    open_table(page, tmp_path / "sales.csv", table)
    page.locator("#series .status", has_text="7 steps after 55 values").wait_for()
    about = "units; sold in sales.csv: 55 values, one per day, 2026-01-01 to 2026-02-24"
    assert page.locator("#series-about").inner_text() == about
    assert page.locator("#series-numbers tbody th").first.inner_text() == "2026-02-25"
    series = page.get_by_label("Series", exact=True)
    assert series.locator("option").all_inner_texts() == ["units; sold", "price"]
    series.select_option("price")
    page.locator("#series-about", has_text="price in").wait_for()
    large = ", ".join(str(10**15 + 40 * (i % 5)) for i in range(50))  # differ only after the twelfth digit
    page.get_by_role("textbox", name="Values").fill(large)
    page.locator("#series .status", has_text="7 steps after 50 values").wait_for()
    assert not re.search("NaN|Infinity", history.get_attribute("d"))
    page.get_by_label("Horizon").fill("1")
    page.get_by_role("textbox", name="Values").fill("1 2 3")
    page.locator("#series .status", has_text="1 step after 3 values").wait_for()
    assert chart.locator("text[text-anchor=middle]").all_text_contents() == ["0", "1", "2", "3"]


def test_the_table_of_a_shop_is_forecast(shipped: httpx.Client, open_page: Open, tmp_path: Path) -> None:
    """The series are those of the service and of the training; see tests/api/test_forecast_table.py."""
    page = open_page(shipped)
    status_of(page, "series")
    open_table(page, tmp_path / "dates.csv", "d,x\n3/4/2024,1\n4/4/2024,2\n5/4/2024,4\n")
    error = page.locator("[data-param=reading] .error")
    error.filter(has_text="File dates.csv: column 'd': the time stamp '3/4/2024' is ambiguous").wait_for()
    assert "choose format=%d/%m/%Y or format=%m/%d/%Y." in error.inner_text()
    assert page.locator("#series-chart svg").count() == 0
    assert page.locator("#series-numbers").is_hidden()
    options = page.get_by_label("Options for this table")
    options.fill("format=%d/%m/%Y")
    page.locator("#series-about", has_text="x in dates.csv: 3 values, one per day, 2024-04-03 to 2024-04-05").wait_for()
    open_table(page, tmp_path / "shop.csv", shop_table())
    page.locator("#series-about", has_text="Äpfel in shop.csv").wait_for()
    open_options(page, "series")
    page.get_by_label("Horizon").fill("28")
    page.locator(
        "#series-about", has_text="Äpfel in shop.csv: 112 values, one per day, 2023-01-02 to 2023-04-23, 7 missing"
    ).wait_for()
    series = page.get_by_label("Series", exact=True)
    assert series.locator("option").all_inner_texts() == list(PRODUCTS)
    series.select_option("Käse")
    page.locator("#series-about", has_text="Käse in shop.csv").wait_for()
    page.locator("#series .status", has_text="28 steps after 112 values, season of 7").wait_for()
    assert page.locator("#series-chart text[text-anchor=middle]").first.text_content() == "2023-01"
    page.locator("#series-remarks summary").click()
    remarks = page.locator("#series-remarks li").all_inner_texts()
    assert "the decimal separator is ','" in remarks
    assert "column 'Aktion' holds only zeros and ones, so it is left out; column=Aktion reads it" in remarks
    query = {"horizon": 28, "history": True}
    files = {"file": ("shop.csv", shop_table())}
    answer = shipped.post("/v1/series/forecast", files=files, params=query).json()["results"][2]
    page.locator("#series-numbers summary").click()
    rows = page.locator("#series-numbers tbody tr")
    assert rows.count() == 28
    assert rows.last.inner_text().split("\t")[0] == answer["times"][-1] == "2023-05-21"
    median = float(rows.first.locator("td").nth(1).inner_text().replace(",", ""))
    assert median == pytest.approx(answer["median"][0], rel=1e-3)
    points = len(re.findall("[ML]", page.locator("#series-chart path.history").get_attribute("d")))
    assert points == sum(value is not None for value in answer["history"]["values"])
    with page.expect_download() as download:
        page.locator("#series").get_by_role("button", name="Download").click()
    lines = Path(download.value.path()).read_text("utf-8").splitlines()
    assert lines[0] == "series,time,mean,median,lower_80,upper_80,lower_95,upper_95"
    assert Counter(line.partition(",")[0] for line in lines[1:]) == dict.fromkeys(PRODUCTS, 28)
    assert expected_errors(page) == 1


@pytest.mark.slow
def test_the_curl_command_of_a_long_series_gives_the_same_forecast(serve: Serve, open_page: Open) -> None:
    with serve() as client:
        page = open_page(client)
        status_of(page, "series")
        values = "\n".join(str(1000 + i % 7) for i in range(40_000))
        enter = "(field, text) => { field.value = text; field.dispatchEvent(new Event('input', { bubbles: true })); }"
        page.locator("#series-values").evaluate(enter, values)
        page.locator("#series .status", has_text="after 40,000 values").wait_for()
        command = code_of(page, "series")
        output = subprocess.run(["bash"], input=command, capture_output=True, text=True, check=True).stdout
        assert len(json.loads(output)["results"][0]["median"]) == 24


@pytest.mark.slow
def test_large_values_have_complete_labels(serve: Serve, open_page: Open, tmp_path: Path) -> None:
    with serve() as client:
        page = open_page(client)
        status_of(page, "series")
        open_table(page, tmp_path / "sales.csv", "\n".join(["sold", *(str(12_345_678 + i % 7) for i in range(60))]))
        page.locator("#series .status", has_text="after 60 values").wait_for()
        chart = page.locator("#series-chart")
        left = chart.bounding_box()["x"]
        labels = chart.locator("text[text-anchor=end]")
        assert min(label.bounding_box()["x"] for label in labels.all()) >= left
        texts = labels.all_text_contents()
        assert len(set(texts)) == len(texts) > 2
        page.locator("#series-numbers summary").click()
        assert page.locator("#series-numbers td").first.inner_text().startswith("12,345,6")  # not 12,346,000
        open_table(page, tmp_path / "constant.csv", "sold\n" + "2199023255552\n" * 50)
        page.locator("#series .status", has_text="after 50 values").wait_for()
        texts = labels.all_text_contents()
        assert len(set(texts)) == len(texts) > 2


def publish_sales(folder: Path) -> None:
    """Publish two versions of a forecaster. The second version needs known covariates and holidays."""
    columns = [
        {"name": name, "mean": 2.5, "scale": 1.0, "coefficient": -0.2} for name in ("price", "promo", "holidays")
    ]
    calendar = {"country": "DE", "step": "day", "first_year": 2025, "last_year": 2027, "dates": ["2026-01-01"]}
    known = {"columns": columns, "calendar": calendar}
    for fields in ({}, {"series": {"season": 7, "known": known}}):
        publish_network(folder, "sales", **fields)


@pytest.mark.slow
def test_known_covariates_of_a_forecaster_have_fields(
    serve: Serve, tiny_store: Path, open_page: Open, tmp_path: Path
) -> None:
    publish_sales(tiny_store)
    table = tmp_path / "sales.csv"
    rows = [f"2026-01-{i:02},{i % 7 if i < 25 else ''},{2 + i % 3},{i % 2}\n" for i in range(1, 31)]
    table.write_text("day,sold,price,promo\n" + "".join(rows))

    def sent() -> dict[str, Any]:
        command = code_of(page, "series")
        content: dict[str, Any] = json.loads(shlex.split(command)[-1])
        return content

    with serve() as client:
        page = open_page(client)
        status_of(page, "series")
        assert not page.locator("#series-known").is_visible()
        page.locator("#series select[name=model]").select_option("sales")
        page.locator("#series .error", has_text="Start is missing; sales needs the time of the first value").wait_for()
        open_table(page, table, table.read_text())
        page.locator("#series-about", has_text="sold in sales.csv: 24 values, one per day").wait_for()
        page.locator("#series .status", has_text="6 steps after 24 values").wait_for()
        assert not page.locator("#series-known").is_visible()
        assert shlex.split(code_of(page, "series"))[-2:] == ["-F", "file=@sales.csv"]
        open_options(page, "series")
        page.get_by_label("Horizon").fill("6")
        page.get_by_role("textbox", name="Values").fill(", ".join(str(i % 7) for i in range(1, 25)))
        page.get_by_label("Time of the first value").fill("2026-01-01")
        page.locator("#series .status", has_text="6 steps after 24 values").wait_for()
        page.locator("#series code", has_text='"start":"2026-01-01"').first.wait_for(state="attached")
        page.get_by_label("price").fill("2.5, 3")
        page.locator("#series code", has_text='"price":[2.5,3,3,').wait_for(state="attached")
        label = page.locator("label", has_text="price").inner_text()
        assert label == "price 2 values; the last value 3 is repeated up to 30 values"
        page.get_by_label("price").fill("")
        page.locator("#series code", has_text='"price":[2.5,2.5,').wait_for(state="attached")
        page.get_by_label("price").fill("cheap")
        page.locator("#series-known .error", has_text="Covariates.price.0 is 'cheap'").wait_for()
        page.get_by_label("price").fill("2")
        page.get_by_label("promo").fill("x")
        page.locator("#series-known .error", has_text="Covariates.promo.0 is 'x'").wait_for()
        assert page.locator("#series-known [aria-invalid]").get_attribute("data-column") == "promo"
        page.get_by_label("promo").fill("1")
        page.get_by_label("Time of the first value").fill("soon")
        page.locator("#series .error", has_text="Start is 'soon'; it should be a time in ISO 8601").wait_for()
        page.locator("#series select[name=model]").select_option("sales@1")
        page.locator("#series .status", has_text="sales, version 1").wait_for()
        assert not page.locator("#series-known").is_visible()
        assert "covariates" not in sent()
        assert expected_errors(page) >= 3


@pytest.mark.slow
def test_images_and_interpolations_follow_their_seeds(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    status_of(page, "generation")

    page.locator("#generation select[name=model]").select_option("mnist-gan")
    page.locator("#generation .status", has_text="mnist-gan").wait_for()

    def expected_sources(**body: Any) -> list[str]:
        results = shipped.post("/v1/images/sample", json={**body, "model": "mnist-gan"}).json()["results"]
        return [f"data:image/png;base64,{result['image']}" for result in results]

    sources = "(images) => images.map((image) => image.getAttribute('src'))"
    assert page.locator("#generation-sheet img").evaluate_all(sources) == expected_sources(count=40, seed=1)
    open_options(page, "generation")
    page.get_by_label("Interpolation", exact=True).check()
    page.locator("#generation-to").fill("5")
    page.locator("#generation-count").fill("9")
    page.locator("#generation .status", has_text="9 steps from seed 1 to seed 5").wait_for()
    path = page.locator("#generation-sheet img").evaluate_all(sources)
    assert path == expected_sources(count=9, seed=1, end_seed=5)
    assert (path[0], path[-1]) == (expected_sources(count=1, seed=1)[0], expected_sources(count=1, seed=5)[0])
    assert page.locator("#generation-frame").get_attribute("src") == path[0]
    page.locator("#generation-step").fill("8")
    assert page.locator("#generation-frame").get_attribute("src") == path[8]
    label, value, slider = (
        page.locator(f"#generation-interpolation {tag}").bounding_box() for tag in ("label", "output", "input")
    )
    assert label["y"] < value["y"] + value["height"] <= slider["y"]  # the value is beside the label
    page.get_by_role("radio", name="Images").check()
    page.locator("#generation-count").fill("1")
    page.locator("#generation .status", has_text="1 image from seed 1").wait_for()


@pytest.mark.slow
def test_labels_and_versions_can_be_chosen(serve: Serve, tiny_store: Path, open_page: Open) -> None:
    for name in ("tiny-cgan", "tiny-rnn"):
        publish_tiny(tiny_store, name)
    with serve() as client:
        page = open_page(client)
        assert not page.locator("#generation-label").is_visible()
        status_of(page, "generation")
        page.locator("#generation select[name=model]").select_option("tiny-cgan")
        page.locator("#generation-label").select_option("y")
        page.locator("#generation-sheet img[alt^='Label y']").nth(39).wait_for()
        page.locator("#text select[name=model]").select_option("tiny-rnn@1")
        page.get_by_role("button", name="Generate text").click()
        page.locator("#text .status", has_text="tiny-rnn, version 1").wait_for()
        card = page.get_by_role("article", name="tiny-rnn")
        card.locator("summary").click()
        assert card.get_by_role("button", name="version 2, active").get_attribute("aria-pressed") == "true"
        card.get_by_role("button", name="version 1").click()
        card.get_by_role("button", name="version 1", pressed=True).wait_for()


def test_errors_appear_beside_their_control(shipped: httpx.Client, open_page: Open, tmp_path: Path) -> None:
    page = open_page(shipped)
    for panel in ("image", "text", "series", "generation"):
        status_of(page, panel)

    def error_text(selector: str) -> str:
        control = page.locator(f"{selector}[aria-invalid=true]")
        control.wait_for(state="attached")
        return str(page.locator(f"#{control.get_attribute('aria-describedby')}").inner_text())

    open_options(page, "text", "series", "generation")
    page.locator("#text-seed").fill("-1")
    open_options(page, "text")  # closed now; the error opens them again
    page.get_by_role("button", name="Generate text").click()
    assert error_text("#text-seed") == "Seed is -1; it should be greater than or equal to 0."
    page.locator("#series-values").fill("1, 2, x")
    assert error_text("#series-values").startswith("Values.2 is 'x'; it should be a valid number")
    page.locator("#series-values").fill("1, 2")
    page.locator("#series-values[aria-invalid=true]").wait_for(state="attached")
    page.locator("#series .error", has_text="Values has 2 values; series-lstm needs at least 3.").wait_for()
    page.locator("#generation-seed").fill("1.5")
    assert error_text("#generation-seed").startswith("Seed is 1.5; it should be a valid integer")
    text = tmp_path / "letter.png"
    text.write_text("Dear Sir")
    page.set_input_files("#image-file", text)
    assert error_text("#image-file").startswith("File: its 8 bytes are not an image; allowed formats: PNG, JPEG")
    page.get_by_role("button", name="Example: ship").click()
    page.locator("#image-bars li:first-child", has_text="ship").wait_for()
    assert page.locator("#image .error").count() == 0
    assert expected_errors(page) == 5


@pytest.mark.slow
def test_a_dead_service_gives_an_error_in_each_panel(tiny_store: Path, open_page: Open) -> None:
    slow_service = processes.serving(tiny_store, before=processes.SLOW_STEPS)
    with slow_service as service, httpx.Client(base_url=service.url) as client:
        page = open_page(client)
        for panel in ("text", "series", "generation"):
            status_of(page, panel)
        open_options(page, "text", "generation")
        page.locator("#text-length").fill("4000")
        page.get_by_role("button", name="Generate text").click()
        longer_than_first = re.compile(".{600}", re.DOTALL)
        page.locator("#text-generated", has_text=longer_than_first).wait_for()
        for process in (*service.workers, service.process.pid):
            os.kill(process, signal.SIGSTOP)
        for process in (*service.workers, service.process.pid):
            os.kill(process, signal.SIGKILL)
        page.locator(
            "#text .error", has_text="The connection ended before the answer was complete. Try again."
        ).wait_for()
        page.locator("#generation-seed").fill("7")
        page.locator("#generation .error", has_text="does not answer. Try again later.").wait_for()
        service.process.wait(30)
    assert {note.split("net::")[0] for note in page.messages} == {"Failed to load resource: "}
    page.messages.clear()


# A hidden element loses the focus when the next frame is drawn.
AFTER_TWO_FRAMES = """() => {
    const send = window.fetch, frame = () => new Promise(requestAnimationFrame);
    window.fetch = async (...request) => (await frame(), await frame(), send(...request));
}"""


def test_the_page_asks_for_a_key_and_again_after_its_removal(serve: Serve, tmp_path: Path, open_page: Open) -> None:
    file = tmp_path / "keys"
    key = key_file.add(file, "alice")
    with serve(keys_file=file, key_check_seconds=0.01) as client:
        page = open_page(client)
        key_field, error = page.get_by_label("API key"), page.locator("#start-error")
        page.evaluate(AFTER_TWO_FRAMES)
        key_field.fill("wrong")
        key_field.press("Enter")
        error.get_by_text("Unknown API key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key-value"
        page.keyboard.insert_text(f"“{key}”")  # replaces the selected text
        page.keyboard.press("Enter")
        error.get_by_text("An API key consists of printable ASCII characters").wait_for()
        key_field.fill(key)
        page.get_by_role("button", name="Use").click()
        for panel in ("image", "text", "series", "generation"):  # no request is sent between this and the removal
            status_of(page, panel)
        assert not key_field.is_visible()
        open_options(page, "series", "generation")
        file.write_text("# nobody\n")
        wait_until(lambda: client.get("/v1/models", headers={"x-api-key": key}).status_code == 401)
        page.locator("#generation-seed").fill("7")
        page.locator("#generation .error", has_text="Unknown API key.").wait_for()
        assert key_field.is_visible()
        page.locator("#series-values").fill("1, 2, 3, 4, " * 10)
        page.locator("#series .error", has_text="Unknown API key.").wait_for()
        key_field.fill(key_file.add(file, "bob"))
        page.get_by_role("button", name="Use").click()
        page.locator("#series .status", has_text="after 40 values").wait_for()
        assert page.locator("#generation-seed").input_value() == "7"
        assert '-H "Authorization: Bearer $KEY"' in code_of(page, "series")
        assert 'headers={"Authorization": "Bearer " + os.environ["KEY"]}' in code_of(page, "series", "Python")
    assert expected_errors(page) == 4


@pytest.mark.slow
def test_pictures_are_loaded_with_the_key_when_a_card_is_opened(
    serve: Serve, tiny_store: Path, tmp_path: Path, open_page: Open
) -> None:
    (tiny_store / "tiny-gan" / "1" / "curves.png").write_bytes((WEB / "samples" / "horse.png").read_bytes())
    key = key_file.add(tmp_path / "keys", "alice")
    with serve(keys_file=tmp_path / "keys") as client:
        page = open_page(client)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use").click()
        for panel in ("image", "text", "series", "generation"):
            status_of(page, panel)
        assert not any(url.endswith("curves.png") for url in requests)
        card = page.get_by_role("article", name="tiny-gan")
        card.locator("summary").click()
        card.get_by_role("button", name="Show the curves").click()
        page.get_by_role("dialog").get_by_role("img", name="curves of tiny-gan, version 1").wait_for()
    assert expected_errors(page) == 1


@pytest.mark.slow
def test_the_card_shows_the_active_version_and_the_canary(serve: Serve, tiny_store: Path, open_page: Open) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, "tiny-gan")
    Store(tiny_store).activate("tiny-gan", 1)
    Store(tiny_store).activate("tiny-gan", 3, share=25)
    with serve() as client:
        page = open_page(client)
        card = page.get_by_role("article", name="tiny-gan")
        card.locator("summary").click()
        buttons = card.get_by_role("button", name="version")
        buttons.nth(2).wait_for()
        assert buttons.all_inner_texts() == ["version 1, active", "version 2", "version 3, canary, 25 %"]
        status_of(page, "generation")  # the curl command names the version that answered
        assert re.search(r'"model":"tiny-gan@[13]"', code_of(page, "generation"))
        options = page.locator("#generation select[name=model] option").all_inner_texts()
        assert options[:4] == ["tiny-gan", *(f"tiny-gan, version {number}" for number in (3, 2, 1))]


@pytest.mark.slow
def test_imported_and_licensed_networks_are_described(
    serve: Serve, tiny_store: Path, tmp_path: Path, open_page: Open
) -> None:
    (tmp_path / "imported.onnx").write_bytes(square_classifier("batch,3,2,2", 2, 2).SerializeToString())
    (tmp_path / "linear.onnx").write_bytes(linear_model()[0].SerializeToString())
    source = "https://example.org/linear"
    for origin in (
        Description("imported", "A classifier", task="classify", labels=["cat", "dog"]),
        Description("linear", "A matrix", licence="MIT", source=source),
    ):
        add(tiny_store, tmp_path / f"{origin.name}.onnx", origin, 2**20, 0)
    rewrite_card(tiny_store / "tiny-cnn" / "1", licence="Apache-2.0", source="pretrained", minutes=7.0, seed=12)
    with serve() as client:
        page = open_page(client)
        for name, parts in (
            ("linear", ("tensors", "A matrix", "MIT", source, "x float32 [-1, 4]", "ms for one row")),
            ("tiny-cnn", ("7 minutes", "12", "Apache-2.0", "pretrained")),
        ):
            card = page.get_by_role("article", name=name)
            card.locator("summary").click()
            text = card.inner_text()
            assert [part for part in parts if part not in text] == []
        page.locator("#image select[name=model]").select_option("imported")
        page.set_input_files("#image-file", HORSE)
        assert status_of(page, "image").startswith("imported")
        assert page.get_by_label("Show heat map").is_disabled()


@pytest.mark.slow
def test_the_cards_show_metrics_and_pictures(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    cards = page.get_by_role("article")
    models = {model["id"]: model["card"] for model in shipped.get("/v1/models").json()["data"]}
    cards.nth(len(models) - 1).wait_for()
    assert sorted(card.get_attribute("aria-label") for card in cards.all()) == sorted(models)
    card = page.get_by_role("article", name="cifar10-whitened")
    assert "94 % of the test images are right." in card.inner_text()
    card.locator("summary").click()
    assert f"{models['cifar10-whitened']['metrics']['accuracy']['value']:.4f}" in card.inner_text()
    assert card.locator("tbody tr").count() == len(models["cifar10-whitened"]["metrics"])
    milliseconds = models["cifar10-whitened"]["speed"]["milliseconds"]
    assert f"{milliseconds} ms for one image" in card.inner_text()
    card.get_by_role("button", name="Show the curves").click()
    picture = page.locator("dialog img")
    picture.wait_for()
    page.keyboard.press("Escape")
    picture.wait_for(state="hidden")


def test_the_page_works_with_the_keyboard_only(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped)
    for panel in ("image", "text", "series", "generation"):
        status_of(page, panel)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    focused = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.controls details:not([open]) summary')"):
            page.keyboard.press("Enter")
        focused.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert focused >= {
        "theme",
        "image-file",
        "text-prompt",
        "text-seed",
        "series-values",
        "series-horizon",
        "generation-seed",
    }
    status = page.locator("#generation .status")
    assert status.get_attribute("aria-live") == "off"  # the first answers are not announced
    page.locator("#generation-seed").focus()
    page.keyboard.press("Enter")
    assert status.get_attribute("aria-live") == "polite"
    page.locator("#text-length").focus()
    page.keyboard.press("Home")
    page.locator("#text-prompt").focus()
    page.keyboard.press("Control+End")
    page.keyboard.type(" O")
    page.keyboard.press("Control+Enter")
    page.locator("#text-prefix", has_text="ROMEO: O").wait_for()
    status_of(page, "text")
    assert len(page.locator("#text-generated").text_content()) == 20
    page.locator("#series-horizon").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#series .status", has_text="25 steps").wait_for()


@pytest.mark.slow
def test_a_chosen_theme_is_kept(shipped: httpx.Client, open_page: Open) -> None:
    page = open_page(shipped, color_scheme="dark")
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch to the light theme").click()
    assert page.evaluate(scheme) == "light"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    assert page.evaluate(scheme) == "light"
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert page.evaluate(scheme) == "dark"
    page.emulate_media(media="print")
    assert page.evaluate(scheme) == "light"


@pytest.mark.slow
def test_long_names_fit_a_phone(serve: Serve, tiny_store: Path, open_page: Open) -> None:
    name, width = "n" * 64, 320
    labels = [f"{digit}" * 100 for digit in range(10)]
    publish_network(tiny_store, f"c{name[1:]}", "lenet", SMALL["lenet"][0], labels=labels)
    columns = [{"name": "p" * 100, "mean": 2.5, "scale": 1.0, "coefficient": -0.2}]
    publish_network(tiny_store, name, series={"season": 7, "known": {"columns": columns}})
    with serve() as client:
        page = open_page(client, width=width)
        for panel, model in (("image", f"c{name[1:]}"), ("series", name)):
            status_of(page, panel)
            page.locator(f"#{panel} select[name=model]").select_option(model)
            page.locator(f"#{panel} .status", has_text=model).wait_for()
        for selector in (
            ".chooser select",
            "#image-bars span",
            "#series-known :is(label, textarea)",
            ".status strong",
            ".card h3",
        ):
            elements = page.locator(selector).all()
            assert elements
            for element in elements:
                box = element.bounding_box()
                assert box["x"] + box["width"] <= width, selector
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        padding = page.evaluate("parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop)")
        assert page.locator(".top").bounding_box()["height"] <= padding  # it does not cover the targets of its links


def test_versions_are_compared_and_changed_with_the_admin_key(
    serve: Serve, tiny_store: Path, tmp_path: Path, open_page: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """After each change, the page prints what the command line prints for the same change of another store."""
    for _ in range(2):
        publish_tiny(tiny_store, "tiny-gan")
    other = shutil.copytree(tiny_store, tmp_path / "other")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with serve(admin_key="k" * 32) as client:
        page = open_page(client, width=390)
        status_of(page, "generation")
        manage = page.locator("#manage")
        manage.locator("summary").click()
        late: list[Any] = []  # the answer for the first model comes after that for the chosen model
        page.route("**/v1/admin/models/tiny-cnn", lambda route: late.append(route), times=1)
        for key in ("wrong", "k" * 32):
            page.get_by_label("Admin key").fill(key)
            manage.get_by_role("button", name="Show versions").click()
            if key == "wrong":
                manage.locator(".error", has_text="This request needs the admin key").wait_for()
                assert not page.get_by_label("Share of a new canary or shadow in per cent").is_visible()
        page.get_by_label("Model", exact=True).last.select_option("tiny-gan")
        manage.locator("thead", has_text="version 3, active").wait_for()
        with page.expect_response("**/v1/admin/models/tiny-cnn"):
            late.pop().continue_()
        page.evaluate("new Promise(requestAnimationFrame)")
        assert manage.locator("thead", has_text="version 3, active").is_visible()
        assert manage.locator("tbody tr", has_text="created").locator("td").count() == 3
        page.get_by_label("Share of a new canary or shadow in per cent").fill("20")
        for button, command in (
            ("Canary: version 2", ["activate", "tiny-gan", "2", "--share", "20"]),
            ("End the canary", ["rollback", "tiny-gan"]),
            ("Shadow: version 2", ["shadow", "tiny-gan", "2", "--share", "20"]),
            ("End the shadow: version 2", ["shadow", "tiny-gan", "off"]),
            ("Activate: version 1", ["activate", "tiny-gan", "1"]),
            ("Retire: version 2", ["retire", "tiny-gan", "2"]),
            ("Roll back to version 3", ["rollback", "tiny-gan"]),
            ("Serve again: version 2", ["retire", "tiny-gan", "2", "--undo"]),
        ):
            manage.get_by_role("button", name=button).click()
            text = run_models_command(capsys, other, *command)[1].strip()
            manage.locator('[role="status"]', has_text=re.compile(f"^{re.escape(text)}\\.$")).wait_for()
        manage.get_by_role("button", name="Activate: version 1").click()
        page.locator('#cards [aria-label="tiny-gan"] button', has_text="version 1, active").wait_for(state="attached")
        manage.get_by_role("button", name="Retire: version 1").click()
        manage.locator(".error", has_text="active").wait_for()
        violations = axe.run(page).response["violations"]
        assert [each["id"] for each in violations if each["impact"] in ("serious", "critical")] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert expected_errors(page) == 2


@pytest.mark.parametrize(
    ("theme", "width"),
    [("dark", 390), *(pytest.param("light", width, marks=pytest.mark.slow) for width in (1280, 834))],
)
def test_axe_finds_no_serious_problem_and_the_page_fits_the_window(
    shipped: httpx.Client, open_page: Open, theme: str, width: int
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(shipped, width=width, color_scheme=theme)
    for panel in ("image", "text", "series", "generation"):
        status_of(page, panel)
    if width == 390:
        assert page.evaluate("document.documentElement.scrollHeight") <= 4000
    page.locator("summary").evaluate_all("(summaries) => summaries.forEach((each) => each.click())")
    for panel in ("image", "text", "series", "generation"):
        result, slider = (
            page.locator(f"#{panel} {part}").first.bounding_box() for part in (".answer", "input[type=range]:visible")
        )
        assert result["y"] < slider["y"]
    page.get_by_label("Interpolation", exact=True).check()
    page.locator("#generation .status", has_text="steps from seed").wait_for()
    page.locator("#text-seed").fill("-1")
    page.get_by_role("button", name="Generate text").click()
    page.locator("#text .error").wait_for()
    violations = axe.run(page).response["violations"]
    assert [(violation["id"], [node["target"] for node in violation["nodes"]]) for violation in violations
            if violation["impact"] in ("serious", "critical")] == []  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#image-bars").bounding_box()["width"] > 190  # enough for the names of labels
    assert expected_errors(page) == 1
