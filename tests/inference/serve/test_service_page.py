"""The page in a real browser: typing, answers, maps, an error, the keyboard, a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tests.inference.conftest import TASKS, save_task
from tests.inference.serve.conftest import answering
from tests.models import METHODS
from tests.tiny import save_tiny_backbone

from sparsepeft import MultiTaskEngine
from sparsepeft_serve import ServeSettings

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

BROWSER = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="the page's tests need Chromium (on Debian: apt-get install chromium)"),
]
TEXT = "the striker scored twice"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page()
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{address}/")
    page.wait_for_function("document.querySelectorAll('#task option').length > 0")
    yield page
    assert all(url.startswith(address) for url in asked)  # nothing from elsewhere
    assert not problems
    page.close()


def test_typing_answers_and_maps(page: Any) -> None:
    assert f"{len(TASKS)} tasks" in page.inner_text("#about")
    page.fill("#text", TEXT)
    page.click("button[type=submit]")
    page.wait_for_selector("#memories:not([hidden])")
    rows = page.locator("#rows tr")
    assert rows.count() == len(TASKS)
    assert "LABEL_" in rows.nth(0).inner_text()
    assert "a value" in page.inner_text("#rows")  # a regression's
    assert page.locator(".map th[scope=col]").count() == 1 + 2 + len(TEXT.split())
    assert page.locator(".map td[title*='weight']").count() > 4
    page.select_option("#other", "five")
    page.wait_for_function("document.querySelectorAll('.map').length === 2")
    page.select_option("#layer", label="1")
    assert "layer 1" in page.inner_text(".map caption >> nth=0")
    page.select_option("#task", "pfeiffer")
    page.wait_for_selector("#memories", state="hidden")  # it has no memory
    assert "curl http" in page.inner_text("#code")
    page.click("#as-python")
    assert "requests.post" in page.inner_text("#code")
    assert page.get_attribute("#as-python", "aria-pressed") == "true"


def test_an_error_is_shown_and_goes(page: Any, address: str) -> None:
    page.route("**/v1/predict_all", lambda route: route.fulfill(status=429, json={"error": "too many texts wait"}))
    page.fill("#text", TEXT)
    page.click("button[type=submit]")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.inner_text("#problem") == "too many texts wait"
    page.unroute("**/v1/predict_all")
    page.click("text=Example 3")
    page.wait_for_selector("#problem", state="hidden")
    page.wait_for_function(f"document.querySelectorAll('#rows tr').length === {len(TASKS)}")
    assert page.input_value("#pair") == "Somebody makes music."


def test_by_keyboard_and_by_name(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.type(TEXT)
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Answer"
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelectorAll('#rows tr').length === {len(TASKS)}")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, select, textarea, input')].filter("
        "(e) => !e.textContent.trim() && !e.labels?.length && !e.ariaLabel).length"
    )
    assert nameless == 0


def test_a_token_is_asked_for(browser: Any, engine: MultiTaskEngine) -> None:
    page = browser.new_page()
    with answering(engine, ServeSettings(tokens=("a" * 32,))) as address:
        page.goto(f"{address}/")
        page.wait_for_selector("#problem:not([hidden])")
        assert "no valid token" in page.inner_text("#problem")
        page.fill("#token", "a" * 32)  # its field has been opened
        page.click("text=Example 1")
        page.wait_for_function(f"document.querySelectorAll('#rows tr').length === {len(TASKS)}")
        assert "Authorization: Bearer TOKEN" in page.inner_text("#code")
        assert f"{len(TASKS)} tasks" in page.inner_text("#about")
        assert page.is_hidden("#problem")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Any, address: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/")
    page.click("text=Example 1")
    page.wait_for_selector("#memories:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    contrast = page.evaluate(
        "(() => { const light = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b);"
        " const style = getComputedStyle(document.body);"
        " return Math.abs(light(style.color) - light(style.backgroundColor)); })()"
    )
    assert contrast > 450
    context.close()


def test_what_is_found_in_a_text_is_marked(
    browser: Any, backbone: Path, folders: dict[str, Path], token_folders: dict[str, Path]
) -> None:
    text = "\U0001f600 the striker scored"
    engine = MultiTaskEngine(backbone, {"two": folders["two"], "names": token_folders["names"]})
    expected = engine.predict([("names", text)])[0].entities
    assert expected
    with answering(engine) as address:
        page = browser.new_page(color_scheme="dark")
        page.goto(f"{address}/")
        page.wait_for_function("document.querySelectorAll('#task option').length === 2")
        page.fill("#text", text)
        page.click("button[type=submit]")
        page.wait_for_selector("mark")
        marks = page.locator("mark")
        assert marks.all_inner_texts() == [f"{one.word} {one.label} {100 * one.score:.1f}\xa0%" for one in expected]
        page.click("#second summary")
        page.fill("#pair", "another")
        page.click("button[type=submit]")
        page.wait_for_selector("mark", state="detached")  # the task takes no pairs
        page.close()


def test_layers_that_share_a_memory_are_shown_one_by_one(browser: Any, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(
        tmp_path / "albert", build=lambda **c: hf.AlbertModel(hf.AlbertConfig(**c, embedding_size=16))
    )
    folder = save_task(backbone, tmp_path / "task", METHODS["spartan"](num_labels=2))
    with answering(MultiTaskEngine(backbone, {"task": folder})) as address:
        page = browser.new_page()
        page.goto(f"{address}/")
        page.wait_for_function("document.querySelectorAll('#task option').length > 0")
        page.fill("#text", TEXT)
        page.click("button[type=submit]")
        page.wait_for_selector("#memories:not([hidden])")
        last = page.inner_text(".map")
        assert "layer 2" in last
        page.select_option("#layer", label="1")
        first = page.inner_text(".map")
        assert "layer 1" in first
        assert first.replace("layer 1", "layer 2") != last
        page.close()
