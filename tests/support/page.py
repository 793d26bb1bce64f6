"""The page of a server as a visitor uses it."""

from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from .browser import until


class Page:
    """The page at a URL, newly loaded, with nothing remembered of an earlier one."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(f"{url}/")
        driver.execute_script("sessionStorage.clear()")
        self.load()

    def load(self) -> None:
        """Load it again."""
        self.driver.get(f"{self.url}/")
        until(self.driver, lambda: self.one("#retention option"), "the page has its settings")

    def one(self, selector: str) -> WebElement | None:
        """The first element of a CSS selector, or None."""
        return next(iter(self.all(selector)), None)

    def all(self, selector: str) -> list[WebElement]:
        """The elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of the first element, folded parts included."""
        script = "const e = document.querySelector(arguments[0]); return e ? e.textContent : ''"
        return str(self.driver.execute_script(script, selector))

    def wait_text(self, selector: str, part: str) -> str:
        """Wait until the text of an element has a part; returns it."""
        what = f"{selector} says {part!r}"
        until(self.driver, lambda: part in self.text(selector), what)
        return self.text(selector)

    def wait_longer(self, selector: str) -> None:
        """Wait until the text of an element is longer than now."""
        length = len(self.text(selector))
        until(self.driver, lambda: len(self.text(selector)) > length, f"{selector} grows")

    def choose(self, retention: str, budget: str | None = None) -> None:
        """Choose a retention method and its budget."""
        Select(self.driver.find_element(By.ID, "retention")).select_by_value(retention)
        if budget is not None:
            self.fill("#budget", budget)

    def fill(self, selector: str, text: str) -> None:
        """Put a text into a field, as typing does."""
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true}))",
            field,
            text,
        )

    def send(self, text: str) -> None:
        """Write a message and press Enter."""
        self.fill("#prompt", text)
        self.driver.find_element(By.ID, "prompt").send_keys(Keys.ENTER)

    def wait_done(self, num_answers: int) -> None:
        """Wait until so many answers are there and none is on its way."""

        def done() -> bool:
            come = not self.all(".answer .waits") and self.all("#stop[hidden]")
            return len(self.all(".answer")) == num_answers and bool(come)

        until(self.driver, done, f"{num_answers} answers are done")

    def settled(self) -> bool:
        """Whether no transition is on its way."""
        return bool(self.driver.execute_script("return document.getAnimations().length === 0"))

    def problems(self) -> list[Any]:
        """What the browser's console has to complain of since the last time."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry for entry in entries if entry["level"] == "SEVERE"]
