"""The page for people, in a real browser where there is one."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlprefix import AttributeSpace, ControlPrefix, Prefix
from controlprefix.store import PrefixStore

from helpers import frozen
from models import byte_tokenizer
from servers import MODEL, TOKENIZER, Served, expected, fill

pytestmark = pytest.mark.slow


def test_the_playground_needs_nothing_from_elsewhere(served: Served) -> None:
    page = httpx.get(f"{served.base}/playground")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("compare", "users"):
        script = httpx.get(f"{served.base}/playground/{name}.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert ".innerHTML" not in script.text  # what a model or a user writes is text, not markup
        assert "http" not in script.text
    assert httpx.get(f"{served.base}/playground/other.js").status_code in (400, 404)
    assert httpx.get(f"{served.base}/v1/users").json() == {"users": ["ana"], "has_more": False}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium on this machine")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for item in (
        *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "window-size=1100,900"),
        *("disable-background-networking", f"user-data-dir={tmp_path}"),
    ):
        options.add_argument(f"--{item}")
    service = selenium.ChromeService(str(shutil.which("chromedriver")))
    built = selenium.Chrome(options=options, service=service)
    yield built
    built.quit()


def wait(browser: Any, condition: str) -> Any:
    for _ in range(400):
        if result := browser.execute_script(f"return {condition}"):
            return result
        time.sleep(0.05)
    raise AssertionError(condition + ": " + str(browser.get_log("browser")))


NOTES = "[...document.querySelectorAll('.side .note')].map(note => note.textContent)"


def test_the_playground_compares_keeps_feedback_and_enrols(served: Served, browser: Any) -> None:
    browser.get(f"{served.base}/playground")
    wait(browser, "document.querySelectorAll('.side .user option').length == 4")  # — and ana, twice
    browser.execute_script(
        "document.querySelectorAll('.user')[1].value = 'ana';"
        "document.querySelector('.dials select').value = 'warm';"
        "document.getElementById('generate').click()"
    )
    wait(browser, "document.getElementById('stop').disabled")
    texts = browser.execute_script(
        "return [...document.querySelectorAll('.text')].map(one => one.textContent)"
    )
    how: dict[str, Any] = {"prompt": "Tell Sam I will be late for lunch.", "max_new_tokens": 64}
    assert texts[0] == expected(served.url, **how, attributes={"tone": "warm"})
    assert texts[1] == expected(served.url, **how, user="ana")
    browser.execute_script("document.querySelectorAll('.prefer')[1].click()")
    wait(browser, f"{NOTES}[1] == 'kept for ana: 1 preferences to learn from'")
    with PrefixStore(served.url, tenant="mine") as store:
        (feedback,) = store.feedback("ana")
    assert json.loads(feedback)["chosen"] == texts[1]
    # A dial that is moved marks the text as old; the address has the settings.
    browser.execute_script(
        "const dial = document.querySelector('.much'); dial.value = 2;"
        "dial.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert wait(browser, "document.querySelector('.text').classList.contains('old')")
    assert "warm" in browser.current_url
    browser.execute_script("document.querySelector('.code').click()")
    assert "extra_body" in wait(browser, "document.querySelector('.snippet').textContent")
    browser.refresh()
    wait(browser, "document.querySelectorAll('.user')[1].value == 'ana'")
    assert browser.execute_script("return document.querySelector('.much').value") == "2"
    browser.execute_script(
        "document.getElementById('name').value = '<b>zoe/ü</b>';"
        "document.getElementById('texts').value = 'hi there';"
        "document.getElementById('enroll').click()"
    )
    progress = "document.getElementById('progress').textContent"
    wait(browser, f"{progress}.includes('enrolled from 1 texts')")
    assert browser.execute_script("return document.querySelector('.user').value") == "<b>zoe/ü</b>"
    httpx.delete(f"{served.base}/v1/users/%3Cb%3Ezoe%2F%C3%BC%3C%2Fb%3E")


def test_the_playground_trains_rolls_back_and_forgets(served: Served, browser: Any) -> None:
    with PrefixStore(served.url, tenant="mine") as store:
        rows = [
            json.dumps({"user": "lea", "prompt": f"Hi {i}", "chosen": "hey", "rejected": "Sir"})
            for i in range(3)
        ]
        store.keep_feedback("lea", rows)
    browser.get(f"{served.base}/playground")
    wait(browser, "document.querySelectorAll('#chosen option').length >= 2")
    progress = "document.getElementById('progress').textContent"
    browser.execute_script(
        "document.getElementById('users').open = true;"
        "document.getElementById('name').value = 'lea';"
        "document.getElementById('texts').value = 'hi there\\nhow are you';"
        "document.getElementById('train').checked = true;"
        "document.getElementById('enroll').click()"
    )
    wait(browser, f"{progress} == 'lea is trained, version 1'")
    browser.execute_script("document.getElementById('learn').click()")
    wait(browser, f"{progress} == 'lea is trained, version 2'")
    browser.execute_script("document.querySelectorAll('#versions button')[1].click()")
    wait(browser, f"{progress} == 'lea: version 1 is in use'")
    versions = httpx.get(f"{served.base}/v1/users/lea").json()["versions"]
    assert [version["current"] for version in versions] == [True, False]
    browser.execute_script("window.confirm = () => true; document.getElementById('forget').click()")
    wait(browser, f"{progress} == 'lea is forgotten'")
    assert httpx.get(f"{served.base}/v1/users/lea").status_code == 404
    browser.execute_script(  # errors are told beside what failed
        "document.getElementById('chosen').value = ''; document.getElementById('learn').click()"
    )
    wait(browser, f"{progress} == 'choose a user first'")


def test_the_playground_by_keyboard_on_a_phone_and_with_a_failing_side(
    served: Served, browser: Any
) -> None:
    browser.set_window_size(320, 700)
    browser.get(f"{served.base}/playground")
    wait(browser, "document.querySelectorAll('.side .user option').length == 4")
    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")
    buttons = "[...document.querySelectorAll('button')]"
    small = f"{buttons}.filter(b => b.offsetHeight && b.offsetHeight < 44)"
    assert browser.execute_script(f"return {small}.length") == 0
    # One side names a user that was forgotten meanwhile: the other still writes.
    browser.execute_script(
        "document.querySelectorAll('.user')[1].append(new Option('gone', 'gone', true, true));"
        "document.getElementById('prompt').focus()"
    )
    browser.execute_script(
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true}))"
    )
    wait(browser, "document.getElementById('stop').disabled")
    notes = browser.execute_script(f"return {NOTES}")
    assert notes[0] == ""
    assert "no user 'gone'" in notes[1]
    assert browser.execute_script("return document.querySelector('.text').textContent")
    browser.execute_script("document.querySelector('.prefer').click()")
    assert wait(browser, f"{NOTES}[0]") == "write two different texts first"


def test_the_playground_has_one_dial_between_opposites(tmp_path: Path, browser: Any) -> None:
    store = f"sqlite:///{tmp_path}/prefixes.db"
    fill(store, "mine", 2.0)
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant="mine"))
    cold = Prefix.random(cp.geometry, num_slots=3, seed=7)
    dialed = replace(cold, dial=((0.0, 0.0), (1.0, 0.4)))
    cp.put("attribute", "tone=cold", dialed, details={"calibrated": {}})
    for seed, stars in enumerate(("1", "5")):
        prefix = Prefix.random(cp.geometry, num_slots=3, seed=seed)
        cp.put("attribute", f"stars={stars}", prefix)
    space = AttributeSpace.parse(
        "attributes: {tone: {labels: {warm: {opposite: cold}, cold: {opposite: warm}}}, "
        "stars: {labels: {'1': {}, '5': {}}}}"
    )
    served = Served(store, open_tenant="mine", attributes=space)
    try:
        browser.get(f"{served.base}/playground")
        wait(browser, "document.querySelectorAll('.side .user option').length == 4")
        choose = (
            "{const row = document.querySelector('.dials .dial[data-attribute=%s]');"
            "const pick = row.querySelector('select'), range = row.querySelector('input');"
            "pick.value = [...pick.options].find(o => o.text == '%s').value;"
            "pick.dispatchEvent(new Event('input', {bubbles: true}));"
            "range.value = %s;"
            "range.dispatchEvent(new Event('input', {bubbles: true}));}"
        )
        browser.execute_script(choose % ("tone", "tone: cold … warm", 0.5))
        assert (
            wait(browser, "document.querySelector('.dial[data-attribute=tone] output').textContent")
            == "0.5 warm"
        )
        assert browser.execute_script("return JSON.stringify(asked(sides()[0]).attributes)") == (
            '{"tone":0.5}'
        )
        browser.execute_script("document.getElementById('generate').click()")
        wait(browser, "document.getElementById('stop').disabled")
        text = browser.execute_script("return document.querySelector('.text').textContent")
        how: dict[str, Any] = {"prompt": "Tell Sam I will be late for lunch.", "max_new_tokens": 64}
        assert text == expected(store, **how, attributes={"tone": {"warm": 0.5}})
        body = "return JSON.parse(JSON.stringify(asked(sides()[0])))"
        browser.execute_script(choose % ("stars", "stars: 1 … 5", 3.4))
        sent = browser.execute_script(body)
        assert sent["attributes"] == {"stars": 3.4, "tone": 0.5}
        assert "calibrated" not in sent
        answer = httpx.post(f"{served.base}/v1/chat/completions", json=sent)
        assert answer.is_success, answer.text
        browser.execute_script(
            choose % ("tone", "tone: cold", 0.5)
            + choose % ("stars", "stars: —", 1)
            + "document.querySelector('.calibrated input').click()"
        )
        assert (
            browser.execute_script("return document.querySelector('.calibrated').hidden") is False
        )
        sent = browser.execute_script(body)
        assert (sent["attributes"], sent["calibrated"]) == ({"tone": {"cold": 0.5}}, True)
        code = browser.execute_script(
            "const side = sides()[0]; side.querySelector('.snippet').hidden = false;"
            "showCode(side); return side.querySelector('.snippet').textContent"
        )
        assert '"calibrated":True}' in code
        answer = httpx.post(f"{served.base}/v1/chat/completions", json=sent)
        assert answer.is_success, answer.text
    finally:
        served.close()


def test_the_playground_writes_without_a_chat_template(tmp_path: Path, browser: Any) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    fill(url, "mine", 2.0)
    served = Served(url, model=frozen(MODEL, byte_tokenizer()), open_tenant="mine")
    try:
        (entry, *_) = httpx.get(f"{served.base}/v1/models").json()["data"]
        assert entry["has_chat_template"] is False
        browser.get(f"{served.base}/playground")
        wait(browser, "document.querySelectorAll('.side .user option').length == 4")
        browser.execute_script("document.getElementById('generate').click()")
        wait(browser, "document.getElementById('stop').disabled")
        assert browser.execute_script("return document.querySelector('.text').textContent")
        code = browser.execute_script(
            "const side = sides()[0]; side.querySelector('.snippet').hidden = false;"
            "showCode(side); return side.querySelector('.snippet').textContent"
        )
        assert "client.completions.create" in code
        assert "/v1/completions" in code
    finally:
        served.close()


def test_the_playground_mixes_labels_and_fades_them(tmp_path: Path, browser: Any) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    fill(url, "mine", 2.0)
    with PrefixStore(url, tenant="mine") as store:
        cp = ControlPrefix(frozen(MODEL, TOKENIZER), store)
        cp.put("attribute", "tone=cold", Prefix.random(cp.geometry, num_slots=3, scale=2.0, seed=7))
    served = Served(url, open_tenant="mine")
    try:
        browser.get(f"{served.base}/playground")
        wait(browser, "document.querySelectorAll('.side .user option').length == 4")
        browser.execute_script(
            "const set = (element, value) => { element.value = value;"
            "element.dispatchEvent(new Event('input', {bubbles: true})); };"
            "const row = document.querySelector('.dials .dial');"
            "set(row.querySelector('select'), 'warm');"
            "row.querySelector('.more button').click();"
            "const second = row.nextElementSibling;"
            "set(second.querySelector('select'), 'cold');"
            "set(second.querySelector('input'), 0.5);"
            "set(second.querySelector('.fade'), 'fading out');"
        )
        how: dict[str, Any] = {
            "attributes": {"tone": {"warm": 1, "cold": 0.5}},
            "schedules": {"tone": [[0, 1], [32, 0]]},
        }

        def requested() -> dict[str, Any]:
            body = browser.execute_script("return JSON.stringify(asked(sides()[0]))")
            return {name: json.loads(body)[name] for name in how}

        assert requested() == how
        browser.execute_script("document.getElementById('generate').click()")
        wait(browser, "document.getElementById('stop').disabled")
        text = browser.execute_script("return document.querySelector('.text').textContent")
        prompt = "Tell Sam I will be late for lunch."
        assert text == expected(url, prompt=prompt, max_new_tokens=64, **how)
        browser.refresh()  # the address has it all
        wait(browser, "document.querySelectorAll('.dials .dial').length == 3")
        assert requested() == how
    finally:
        served.close()
