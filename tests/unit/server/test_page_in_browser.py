"""The page in a real browser: against scripted answers, and against a small engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.api_server import ENGINE, MAX_MODEL_LEN
from support.browser import chromium, until
from support.byte_llama import save_tiny_llama
from support.local_server import engine_app, listening
from support.page import Page
from support.scripted_server import KEY, Scripted, stats

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
PREFIX = "/smol"  # the page must work below any path


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Scripted, str]]:
    scripted = Scripted()
    with listening(scripted.app, PREFIX) as url:
        yield scripted, url


@pytest.fixture
def scripted(server: tuple[Scripted, str]) -> Scripted:
    server[0].reset()
    return server[0]


@pytest.fixture
def page(browser: Chrome, scripted: Scripted, server: tuple[Scripted, str]) -> Page:
    page = Page(browser, server[1])
    page.problems()
    return page


def test_a_message_is_answered_twice_from_one_prompt_and_seed(
    page: Page, scripted: Scripted
) -> None:
    scripted.deltas = [{"content": "The "}, {"content": "end."}]
    page.choose("pyramidkv", "25%")
    page.send("Where?")
    page.wait_done(2)
    ours, other = scripted.asked
    assert (ours["retention"], ours["budget"], other["retention"]) == ("pyramidkv", "25%", "full")
    assert "budget" not in other
    for field in ("messages", "seed", "temperature", "max_tokens", "model"):
        assert ours[field] == other[field]
    assert ours["messages"] == [{"role": "user", "content": "Where?"}]
    assert page.text(".ours .text") == page.text(".other .text") == "The end."
    assert "kept 26.0 KiB of 104 KiB (25%)" in page.text(".ours .facts")
    assert "kept 104 KiB of 104 KiB (100%)" in page.text(".other .facts")
    assert "Layer 1: 8 of 104 tokens" in page.text(".ours .pyramid")  # a mean over heads
    assert "Both answers are the same" in page.text("#status")
    assert page.problems() == []


def test_a_conversation_goes_on_with_our_answer(page: Page, scripted: Scripted) -> None:
    page.driver.find_element(By.ID, "compare").click()
    page.fill("#system", "Be kind.")
    page.choose("snapkv", "64")
    for count in (1, 2):
        page.send(f"Question {count}")
        page.wait_done(count)
    assert [m["content"] for m in scripted.asked[1]["messages"]] == [
        *("Be kind.", "Question 1", "hello", "Question 2")
    ]
    assert scripted.asked[1]["budget"] == 64
    page.driver.find_element(By.ID, "clear").click()
    page.send("New")
    page.wait_done(1)
    assert len(scripted.asked[2]["messages"]) == 2


def test_what_a_model_writes_is_never_markup(page: Page, scripted: Scripted) -> None:
    call = {"index": 0, "function": {"name": HOSTILE, "arguments": HOSTILE}}
    scripted.deltas = [
        {"reasoning_content": HOSTILE},
        {"content": HOSTILE},
        {"tool_calls": [call]},
    ]
    page.send(HOSTILE)
    page.wait_done(2)
    assert page.text(".ours .text") == page.text(".asked") == HOSTILE
    assert HOSTILE in page.text(".ours .thoughts")
    assert page.text(".ours .calls") == f"calls {HOSTILE}({HOSTILE})"
    assert page.all("main img, main script") == []
    assert page.driver.title == "Saqqara"
    page.driver.execute_script(  # and if the page itself had a bug, the policy would stop it
        "try { document.querySelector('.text').innerHTML = arguments[0] } catch (e) {}", HOSTILE
    )
    assert page.driver.title == "Saqqara"
    assert page.all("main img") == []


def test_thoughts_are_folded_and_calls_are_put_together(page: Page, scripted: Scripted) -> None:
    parts = [{"name": "look", "arguments": '{"at'}, {"arguments": '": 1}'}]
    scripted.deltas = [{"reasoning_content": "Hm. "}, {"reasoning_content": "So."}]
    scripted.deltas += [{"tool_calls": [{"index": 0, "function": part}]} for part in parts]
    page.send("Look")
    page.wait_done(2)
    assert page.text(".ours .thoughts div") == "Hm. So."
    assert page.one(".ours .thoughts[open]") is None
    assert page.text(".ours .calls") == 'calls look({"at": 1})'


@pytest.mark.parametrize(
    ("status", "param", "advice"),
    [
        (400, "retention", "Change “retention”"),
        (429, None, "Too many requests wait"),
        (403, None, "--allowed-hosts"),
        (503, None, "cannot take requests now"),
    ],
)
def test_errors_say_what_to_do_and_can_be_tried_again(
    page: Page, scripted: Scripted, status: int, param: str | None, advice: str
) -> None:
    scripted.refusal = (status, "it is <b>wrong</b>", param)
    page.send("Hello")
    page.wait_done(2)
    told = page.text(".ours .error")
    assert "it is <b>wrong</b>" in told
    assert advice in told
    scripted.refusal = None
    page.driver.find_element(By.CSS_SELECTOR, ".ours .error button").click()
    until(page.driver, lambda: page.text(".ours .text") == "hello", "the second try is answered")
    assert len(page.all(".turn")) == 1


def test_the_pyramid_moves_with_the_engine(page: Page, scripted: Scripted) -> None:
    def widths() -> list[float]:
        bars = "document.querySelectorAll('#pyramid .kept')"
        script = f"return Array.from({bars}, (bar) => Number(bar.getAttribute('width')))"
        return list(page.driver.execute_script(script))

    until(page.driver, lambda: widths() == [160, 80, 40], "the bars are those of the layers")
    assert "between 2 and 8" in page.text("#pyramid-note")
    assert "2.0 KiB of 8.0 KiB (25%)" in page.text("#kv")
    scripted.stats = stats([16.0, 8.0, 1.0], 16.0, running=3, waiting=7)
    until(page.driver, lambda: widths() == [320, 160, 20], "the bars have moved")
    page.wait_text("#running", "3")
    page.wait_text("#waiting", "7")
    label = page.driver.find_element(By.ID, "pyramid").get_attribute("aria-label")
    assert "of 16 tokens a layer" in str(label)


def test_a_budget_is_set_in_percent_and_only_where_the_method_takes_one(page: Page) -> None:
    page.choose("pyramidkv")
    page.fill("#share", "40")
    budget = page.driver.find_element(By.ID, "budget")
    assert budget.get_attribute("value") == "40%"
    page.choose("full")
    assert not budget.is_enabled()
    assert not page.driver.find_element(By.ID, "compare").is_enabled()
    page.choose("pyramidinfer")
    assert not budget.is_enabled()
    assert "each layer passes on" in page.text("#keeps")


def test_it_is_used_by_keyboard(page: Page) -> None:
    """The first stop of Tab leads to the message, and every field has a name."""
    page.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Skip to the message"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
    page.driver.find_element(By.CSS_SELECTOR, ".more summary").click()
    fields = [f for f in page.all("input, select, textarea, button") if f.is_displayed()]
    assert len(fields) > 10
    for field in fields:
        assert field.accessible_name, field.get_attribute("outerHTML")


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page) -> None:
    page.send("word " * 50 + "\n\n" + "x" * 400)
    page.wait_done(2)
    try:
        page.driver.set_window_size(500, 800)  # the narrowest that Chromium makes a window
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        assert page.driver.execute_script(script) <= 0
    finally:
        page.driver.set_window_size(1280, 860)


def test_a_key_is_asked_for_and_kept_in_the_tab_only(browser: Chrome) -> None:
    with listening(Scripted(needs_key=True).app) as url:
        page = Page(browser, url)
        page.wait_text("#status", "wants an API key")
        assert page.driver.switch_to.active_element.get_attribute("id") == "key"
        page.fill("#key", "sk-wrong")
        page.wait_text("#status", "missing or wrong")
        page.fill("#key", KEY)
        page.wait_text("#model", "scripted")
        page.load()
        page.wait_text("#model", "scripted")
        assert browser.execute_script("return [localStorage.length, document.cookie]") == [0, ""]


def test_with_a_real_engine_text_streams_and_the_answers_stand_side_by_side(
    browser: Chrome, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path, max_position=MAX_MODEL_LEN)
    with listening(engine_app(tmp_path, engine_kwargs=ENGINE), PREFIX) as url:
        page = Page(browser, url)
        page.problems()
        page.choose("pyramidkv", "25%")
        page.fill("#max-tokens", "6000")
        page.send("word " * 100)
        for _ in range(3):
            page.wait_longer(".ours .text")
        page.driver.find_element(By.ID, "stop").click()
        page.wait_done(2)
        assert page.text(".ours h3 span") == page.text(".other h3 span") == "stopped"

        page.fill("#max-tokens", "8")
        page.send("word " * 100)
        page.wait_done(4)
        last = ".turn:last-child"
        for answer in (f"{last} .ours", f"{last} .other"):
            assert page.text(f"{answer} .text")
            assert page.text(f"{answer} h3 span") == "cut at its length"
            assert "8 out" in page.text(f"{answer} .facts")
            kept = page.text(f"{answer} .facts b")
            assert "(100%)" in kept if answer.endswith("other") else "(100%)" not in kept
        page.wait_text("#pyramid-note", "Your last answer, pyramidkv, 25%")
        assert len(page.all("#pyramid .kept")) == 4
        page.choose("tova", "0%")  # what the engine refuses
        page.send("Hello")
        page.wait_done(6)
        assert "budget" in page.text(".turn:last-child .ours .error")
