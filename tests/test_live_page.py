"""The page at `/`, in a headless Chromium beside a running server: what somebody sees, types, hears and must never get."""

from __future__ import annotations

import base64
import itertools
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import with_vocabulary
from serving import Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

QUESTION = "What is the capital of France?"
MARKUP = "<img src=x onerror=\"window.broken=1\"><script>window.broken=1</script><b>bold</b>"
SCHEMES = ("light", "dark")
STATES = ("cold", "warm", "hit", "miss", "ahead", "pinned")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    with serving(small, "--budget", "25%", "--parallel", "2", "-c", "512", "--alias", "talking") as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(server, **context)`: the page, looked at until the server answers. Nothing may fail in it, or ask elsewhere."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(server: Server, *, is_ready: bool = True, **given: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **given}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
        page.on("request", lambda request: None if request.url.startswith((server.url, "data:")) else wrong.append(request.url))
        page.goto(server.url)
        if is_ready:
            page.wait_for_selector("#state[data-is=ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def settle(page: Any, **settings: Any) -> None:
    """Give settings of answers, by their ids."""
    if page.locator("#settings").get_attribute("open") is None:
        page.click("#settings summary")
    for name, value in settings.items():
        page.fill("#" + name.replace("_", "-"), str(value))


def ask(page: Any, text: str) -> None:
    page.fill("#ask", text)
    page.press("#ask", "Enter")


def answered(page: Any, n: int = 1) -> str:
    """Wait for the n-th answer to end; return its text."""
    page.wait_for_function("n => document.querySelectorAll('.meta').length === n", arg=n)
    return str(page.locator(".assistant .body").nth(n - 1).text_content()).strip()


def begin_long_answer(page: Any) -> None:
    """Ask something that is answered for seconds, and wait until the answer has begun."""
    settle(page, temperature=0)
    ask(page, "Tell me a story.")
    page.wait_for_function("() => document.querySelector('.assistant .body')?.textContent.length > 20")


def until(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def snapshot(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/pager", timeout=60).json()
    return found


# ---- the chat -------------------------------------------------------------------------------------------------------

def test_conversation_is_answered_as_the_api_answers_it(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page, temperature=0, max_tokens=30, system="You are a geographer.")
    history: list[Any] = [{"role": "system", "content": "You are a geographer."}]
    for n, question in enumerate((QUESTION, "And of Italy?"), 1):
        page.click("#ask")
        page.keyboard.type(question)
        page.keyboard.press("Enter")
        shown = answered(page, n)
        history.append({"role": "user", "content": question})
        said = server.client().chat.completions.create(model="any", messages=history, temperature=0, max_tokens=30)
        history.append({"role": "assistant", "content": said.choices[0].message.content})
        assert shown == (said.choices[0].message.content or "").strip() and shown
        assert said.usage is not None and f"{said.usage.completion_tokens} tokens" in page.locator(".meta").nth(n - 1).inner_text()
    assert page.locator(".user .text").all_inner_texts() == [QUESTION, "And of Italy?"]
    page.click("#new")
    assert page.locator(".message").count() == 0 and page.locator("#welcome").is_visible()
    ask(page, QUESTION)
    alone = server.client().chat.completions.create(
        model="any", messages=[history[0], {"role": "user", "content": QUESTION}], temperature=0, max_tokens=30)
    assert answered(page) == (alone.choices[0].message.content or "").strip(), "nothing of the old chat is asked again"


def test_shift_enter_begins_a_line(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page, max_tokens=2)
    page.click("#ask")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator(".message").count() == 0
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".user .text").text_content() == "one\ntwo"


@pytest.mark.parametrize("how", ["Stop", "Escape"])
def test_answer_is_ended_and_the_server_free(visit: Any, server: Server, how: str) -> None:
    page = visit(server)
    given_up = server.metric("gguf_pager_answers_given_up_total")
    begin_long_answer(page)
    assert server.health()["running"] == 1
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    if how == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    assert "stopped" in (answered(page) and page.locator(".meta").inner_text())
    assert until(lambda: server.health()["running"] == 0, 5)
    assert server.metric("gguf_pager_answers_given_up_total") == given_up + 1
    assert page.locator("#send").is_visible() and page.evaluate("document.activeElement.id") == "ask"


def test_what_was_stopped_before_its_first_token_can_be_asked_again(visit: Any, server: Server) -> None:
    page = visit(server)
    question = " ".join(str(n) for n in range(190))
    ask(page, question)
    page.keyboard.press("Escape")
    page.wait_for_selector("#send", state="visible")
    assert page.input_value("#ask") == question and page.locator(".message").count() == 0
    assert until(lambda: server.health()["running"] == 0)


def test_too_long_a_question_is_refused_in_the_servers_words(visit: Any, server: Server) -> None:
    page = visit(server)
    ask(page, "word " * 2000)
    said = page.get_by_role("alert").inner_text()
    assert "the context of a conversation is 512: shorten it" in said
    assert page.input_value("#ask").startswith("word word") and page.locator(".message").count() == 0
    settle(page, max_tokens=2)
    ask(page, QUESTION)
    assert answered(page) and page.get_by_role("alert").count() == 0


def test_setting_that_makes_no_sense_is_not_sent(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page, max_tokens=0)
    page.click("#settings summary")
    ask(page, QUESTION)
    assert page.locator("#settings").get_attribute("open") is not None
    assert page.evaluate("document.activeElement.id") == "max-tokens" and page.locator(".message").count() == 0


def test_api_key_is_asked_for_and_kept_for_the_tab(visit: Any, small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "256", "--api-key", "sesame") as server:
        page = visit(server, is_ready=False)
        page.wait_for_function("() => document.getElementById('state').textContent.includes('wants an API key')")
        assert page.locator("#key").is_visible(), "the settings are open"
        settle(page, key="wrong", max_tokens=3)
        ask(page, QUESTION)
        assert "refuses this API key" in page.get_by_role("alert").inner_text()
        settle(page, key="sesame")
        page.wait_for_selector("#state[data-is=ready]")
        page.press("#ask", "Enter")
        assert answered(page)
        page.reload()
        page.wait_for_selector("#state[data-is=ready]")


def test_server_that_dies_and_comes_back_is_told_of(visit: Any, small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "512", "--alias", "first") as server:
        page = visit(server)
        begin_long_answer(page)
        server.process.kill()
        assert "broken off" in page.get_by_role("alert").inner_text()
        page.wait_for_function("() => document.getElementById('state').textContent.includes('does not answer')")
        kept = answered(page)
        assert len(kept) > 20, "what there was of the answer"
        assert page.locator("#when").inner_text() == "When the server last answered"
        ask(page, "Hello?")
        page.wait_for_function("() => document.querySelector('.failure')?.textContent.includes('Is it still running?')")
        assert page.input_value("#ask") == "Hello?"
    with serving(small, "--budget", "25%", "-c", "512", "--alias", "second", "--port", server.url.rpartition(":")[2]):
        page.wait_for_selector("#state[data-is=ready]")
        assert page.locator("h1").inner_text() == "second" and page.locator("#speed").inner_text()
        settle(page, max_tokens=5)
        page.press("#ask", "Enter")
        assert answered(page, 2)


# ---- what is paged --------------------------------------------------------------------------------------------------

def colours(page: Any) -> set[str]:
    """Return the states whose colours the map shows."""
    found = page.evaluate("""() => {
        const canvas = document.getElementById("map"), all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set();
        for (let i = 0; i < all.length; i += 4) if (all[i + 3] === 255) seen.add("#" + [0, 1, 2].map(k => all[i + k].toString(16).padStart(2, "0")).join(""));
        return [...seen];
    }""")
    return {state for state, colour in palette(page).items() if colour in found}


def palette(page: Any) -> dict[str, str]:
    found = page.evaluate("names => names.map(name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim())",
                          list(STATES))
    return dict(zip(STATES, found, strict=True))


def test_map_shows_what_tokens_do_while_they_come(visit: Any, server: Server) -> None:
    page = visit(server)
    seen: set[str] = set()
    begin_long_answer(page)
    assert until(lambda: bool(seen.update(colours(page)) or {"cold", "warm", "hit", "miss"} <= seen)), seen
    assert page.locator("#when").inner_text() == "Now"
    page.keyboard.press("Escape")
    answered(page)


def test_text_beside_the_map_counts_what_the_server_counts(visit: Any, server: Server) -> None:
    page = visit(server)
    page.click("#layers summary")
    settle(page, temperature=0, max_tokens=20)
    ask(page, QUESTION)
    answered(page)
    layers = snapshot(server)["paging"]["layers"]
    residents = [list(base64.b64decode(layer["resident"])) for layer in layers]
    n = sum(state > 0 for row in residents for state in row)
    assert n > 0
    page.wait_for_function("text => document.getElementById('map-text').textContent.startsWith(text)",
                           arg=f"{n:,} of {sum(map(len, residents)):,} experts are in memory.")
    rows = [row.split("\t") for row in page.locator("#rows tr").all_inner_texts()]
    assert [row[:2] for row in rows] == [
        [str(layer["block"]), f"{sum(state > 0 for state in row)} of {len(row)}"] for layer, row in zip(layers, residents, strict=True)]
    said = re.search(r"hit ([\d,]+) and missed ([\d,]+); ([\d,]+) were read ahead", page.locator("#map-text").inner_text())
    assert said is not None
    counted = [sum(int(row[column]) for row in rows) for column in (2, 3, 4)]
    assert counted == [int(text.replace(",", "")) for text in said.groups()] and counted[0] > 0
    legend = dict(re.match(r"(.*?)\s*([\d,]+)$", text).groups() for text in page.locator("#legend li").all_inner_texts())  # type: ignore[union-attr]
    assert sum(int(text.replace(",", "")) for text in legend.values()) == sum(map(len, residents)), "each expert is in one state"


def test_figures_are_those_of_the_answer(visit: Any, server: Server) -> None:
    page = visit(server)
    assert page.locator("#speed").inner_text() == "–" and page.locator("#when").inner_text() == "Nothing asked yet"
    before = snapshot(server)["paging"]
    settle(page, temperature=0, max_tokens=60)
    ask(page, "Tell me a story.")
    answered(page)
    page.wait_for_function("() => document.getElementById('when').textContent === 'Of the last answer'")
    after = snapshot(server)["paging"]
    hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
    assert page.locator("#hits").inner_text() == f"{math.floor(100 * hits / (hits + misses) + 0.5)} %"
    assert re.fullmatch(r"[\d,]+\.\d", page.locator("#speed").inner_text())
    assert re.fullmatch(r"[\d,]+ MB/s", page.locator("#disk").inner_text())
    assert re.fullmatch(r"(~ )?[\d,]+(\.\d+)?|–", page.locator("#joules").inner_text())
    assert page.locator("#budget").inner_text() == "25%" and page.locator("#waiting").inner_text() == "0"
    assert page.locator("#running").inner_text() == "0 of 2 answered now"


def test_joules_are_marked_as_what_they_are(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page, temperature=0, max_tokens=60)
    ask(page, "Tell me a story.")
    answered(page)
    page.wait_for_function("() => document.getElementById('when').textContent === 'Of the last answer'")
    energy, shown = snapshot(server)["energy"], page.locator("#joules").inner_text()
    if energy["status"] == "modelled":
        assert shown.startswith("~ ") and float(shown[2:].replace(",", "")) > 0
        assert "estimate" in page.locator("#joules-range").inner_text() and energy["reason"].startswith("not measured: ")
        assert energy["low_j"] < energy["joules"] < energy["high_j"]
    elif energy["status"] == "none":
        assert shown == "–"
    else:
        assert float(shown.replace(",", "")) > 0
    page.click("#energy summary")
    assert (energy["reason"] or energy["scope"]) in page.locator("#energy-why").inner_text()


def test_model_that_is_not_paged_shows_why(visit: Any, dense_model: Path) -> None:
    with serving(dense_model, "-c", "256") as server:
        page = visit(server)
        said = snapshot(server)["not_paged_reason"]
        assert said and page.locator("#not-paged").inner_text() == f"Nothing is paged: {said}."
        assert not page.locator("#map").is_visible() and not page.locator("#hits").is_visible()
        assert page.locator("#speed").is_visible() and page.locator("#joules").is_visible()


def test_states_can_be_told_apart_without_colours(visit: Any, server: Server) -> None:
    """Six legend fields, of six shapes or lightnesses, also to who sees no red, no green or no blue (Machado 2009, severity 1)."""
    blindness = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
        "none": np.eye(3).tolist(),
    }
    for scheme in SCHEMES:
        page = visit(server, color_scheme=scheme)
        found = {state: linear(colour) for state, colour in palette(page).items()}
        for kind, matrix in blindness.items():
            seen = {state: lab(np.clip(np.array(matrix) @ rgb, 0, 1)) for state, rgb in found.items()}
            for one, other in itertools.combinations(STATES, 2):
                assert np.linalg.norm(seen[one] - seen[other]) > 12, (scheme, kind, one, other)
        pictures = page.evaluate("[...document.querySelectorAll('#legend canvas')].map(canvas => canvas.toDataURL())")
        assert len(set(pictures)) == 6


def linear(colour: str) -> Any:
    """Return the linear red, green and blue of #rrggbb, 0 to 1."""
    values = np.array([int(colour[i: i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    """Return CIELAB of linear sRGB under D65."""
    white = np.array([0.95047, 1.0, 1.08883])
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ rgb / white
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# ---- for everybody --------------------------------------------------------------------------------------------------

CODE = "Look:\n\n```python\nprint('" + "x" * 300 + "')\n```\n\nThat " + "w" * 200 + " is it."


def fill_page(page: Any) -> None:
    """Bring a page into its fullest state: a conversation with code, and all disclosures open."""
    settle(page, temperature=0, max_tokens=5)
    ask(page, "word" * 60)
    answered(page)
    page.evaluate("text => render(document.querySelector('.assistant .body'), text)", CODE)
    page.click("#layers summary")
    page.click("#energy summary")
    page.wait_for_selector("#rows tr", state="attached")


def test_phone_scrolls_down_only_and_has_room_for_fingers(visit: Any, server: Server) -> None:
    page = visit(server, viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, has_touch=True)
    for fill in (lambda: None, lambda: fill_page(page)):
        fill()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("document.getElementById('messages').scrollWidth <= document.getElementById('messages').clientWidth")
        small = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, summary")].filter(element => element.checkVisibility())
            .filter(element => element.getBoundingClientRect().height < 44 || element.getBoundingClientRect().right > 360).map(element => element.outerHTML)""")
        assert small == []
    assert page.locator("pre").evaluate("pre => pre.scrollWidth > pre.clientWidth"), "code scrolls within itself"
    assert page.locator("#map").bounding_box()["width"] > 200


def test_text_has_contrast_in_light_and_dark(visit: Any, server: Server) -> None:
    papers = set()
    for scheme in SCHEMES:
        page = visit(server, color_scheme=scheme)
        fill_page(page)
        page.evaluate("fail('An error.')")
        pairs = page.evaluate("""() => {
            const solid = colour => !/^rgba\\(.*, 0\\)$/.test(colour), found = [];
            for (const element of document.querySelectorAll("body *")) {
                if (!element.checkVisibility() || element.disabled || ![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
                let behind = element;
                while (behind && !solid(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
                found.push([element.outerHTML.slice(0, 80), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]);
            }
            const ask = document.getElementById("ask");
            found.push(["placeholder", getComputedStyle(ask, "::placeholder").color, getComputedStyle(ask).backgroundColor]);
            return found;
        }""")
        assert len(pairs) > 40
        for what, ink, paper in pairs:
            assert contrast(ink, paper) >= 4.5, (scheme, what, ink, paper)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def contrast(ink: str, paper: str) -> float:
    """Return WCAG 2's contrast of two CSS colours, 1 to 21."""
    def luminance(colour: str) -> float:
        red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
        return float(linear(f"#{red:02x}{green:02x}{blue:02x}") @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(ink), luminance(paper)))
    return (light + 0.05) / (dark + 0.05)


def test_tab_reaches_every_control_in_the_order_of_the_page(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page)
    page.evaluate("document.activeElement.blur()")
    page.click("h1")  # where Tab begins: the top
    names, outlines = [], []
    for _ in range(14):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => { const element = document.activeElement, style = getComputedStyle(element);
            return [element.id || element.parentElement.id || element.className, style.outlineStyle + " " + style.outlineWidth]; }""")
        names.append(name)
        outlines.append(outline)
    assert names[:11] == ["new", "messages", "ask", "send", "settings", "system", "temperature", "max-tokens", "key", "layers", "energy"]
    assert set(outlines[:11]) == {"solid 3px"}
    page.keyboard.press("Shift+Tab")
    page.reload()
    page.wait_for_selector("#state[data-is=ready]")
    page.evaluate("document.activeElement.blur()")
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["y"] >= 0, "it can be seen while it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "ask"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(visit: Any, server: Server, scheme: str, width: int) -> None:
    page = visit(server, color_scheme=scheme, viewport={"width": width, "height": 800})
    for fill in (lambda: None, lambda: fill_page(page)):
        fill()
        report = axe_api.Axe().run(page)
        assert report.response["violations"] == [], report.generate_report()
        assert len(report.response["passes"]) > 15
    page.evaluate("document.getElementById('ask').removeAttribute('id')")
    assert axe_api.Axe().run(page).response["violations"], "a field without its label is found"


def test_roles_and_names_are_those_of_a_chat(visit: Any, server: Server) -> None:
    page = visit(server)
    settle(page, temperature=0, max_tokens=8)
    ask(page, QUESTION)
    said = answered(page)
    for role, name in (("main", "Chat"), ("log", "Conversation"), ("textbox", "Message"), ("button", "Send"), ("button", "New chat"),
                       ("complementary", "What is paged"), ("heading", "talking"), ("article", "You"), ("article", "Answer"),
                       ("spinbutton", "Temperature, 0 takes the likeliest token"), ("img", "Experts: a row per layer, a column per expert"),
                       ("region", "Experts: a row per layer, a column per expert")):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    assert page.locator("#announce").text_content().strip() == said, "an answer is read out once, when it is whole"
    assert page.locator("#messages").get_attribute("aria-live") == "off"
    assert f'img "{"Experts: a row per layer, a column per expert"}"' in page.locator("aside").aria_snapshot()


# ---- nothing but itself ---------------------------------------------------------------------------------------------

def test_markup_of_others_is_shown_as_text(visit: Any, small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "512", "--alias", MARKUP) as server:
        page = visit(server)
        assert page.locator("h1").text_content() == MARKUP
        settle(page, max_tokens=2)
        ask(page, MARKUP)
        answered(page)
        assert page.locator(".user .text").text_content() == MARKUP
        page.evaluate("text => render(document.querySelector('.assistant .body'), text)",
                      f"{MARKUP}\n```{MARKUP}\n{MARKUP}\n```\n{MARKUP}")
        page.evaluate("text => fail(text)", MARKUP)
        assert page.locator(".assistant .text").all_text_contents() == [MARKUP, MARKUP]
        assert page.locator(".assistant code").text_content() == MARKUP
        assert page.locator("main img, main script, main b, h1 *").count() == 0
        assert page.evaluate("window.broken") is None


def test_what_a_model_thinks_is_folded_away(visit: Any, small: Path, tmp_path: Path) -> None:
    thinking = with_vocabulary(small, tmp_path / "thinking.gguf", "{{ messages[-1].content }}<think>\n{# </think> #}")
    with serving(thinking, "--budget", "25%", "-c", "512") as server:
        page = visit(server)
        settle(page, max_tokens=12)
        ask(page, "Once upon a time")
        assert answered(page) == ""
        assert not page.locator(".thinking .text").is_visible()
        page.click(".thinking summary")
        assert page.locator(".thinking .text").inner_text().strip()
        assert "ended for want of tokens" in page.locator(".meta").inner_text()


def test_fences_become_blocks_and_nothing_else_does(visit: Any, server: Server) -> None:
    page = visit(server)
    def shown(text: str) -> list[Any]:
        return list(page.evaluate("text => pieces(text)", text))

    assert shown("a\n```py\nx\n\n  y\n```\nb") == [[False, "", "a"], [True, "py", "x\n\n  y"], [False, "", "b"]]
    assert shown("```\nx") == [[True, "", "x"]], "while it is still written"
    assert shown("````\n```\n````") == [[True, "", "```"]]
    assert shown("~~~ c\n```\n~~~") == [[True, "c", "```"]]
    assert shown("```\na\n```\n```\nb\n```") == [[True, "", "a"], [True, "", "b"]]
    assert shown("one ``` two") == [[False, "", "one ``` two"]]
    assert shown("**a** # b\n- c") == [[False, "", "**a** # b\n- c"]]


def test_what_streams_in_is_shown_as_what_comes_whole(visit: Any, server: Server) -> None:
    page = visit(server)
    text = "Look:\n\n```python\nx = 1\n\n  y\n```\n\nAnd:\n~~~\nz\n~~~\n"
    streamed, whole = page.evaluate("""text => {
        const one = document.createElement("div"), other = document.createElement("div");
        for (let n = 1; n <= text.length; n += 1) render(one, text.slice(0, n));
        render(other, text);
        return [one.innerHTML, other.innerHTML];
    }""", text)
    assert streamed == whole and whole.count("<pre") == 2 and ">python<" in whole


def test_page_may_run_and_ask_nothing_else(browser: Any, server: Server) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", answer.text), "it is one file"
    page = browser.new_page()
    try:
        page.goto(server.url)
        page.wait_for_selector("#state[data-is=ready]")
        tried = page.evaluate("""async () => {
            const blocked = [], script = document.createElement("script"), picture = new Image();
            document.addEventListener("securitypolicyviolation", event => blocked.push(event.effectiveDirective));
            script.textContent = "window.broken = 1";
            document.body.append(script);
            picture.src = "http://127.0.0.1:9/x.png";
            document.body.append(picture);
            try { await fetch("http://127.0.0.1:9/"); } catch { }
            await new Promise(done => setTimeout(done, 300));
            return [window.broken === undefined, blocked.sort()];
        }""")
        assert tried == [True, ["connect-src", "img-src", "script-src-elem"]]
    finally:
        page.close()
