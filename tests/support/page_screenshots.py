"""Takes the pictures of the page for the docs, with the demo model: `make screenshots`."""

from pathlib import Path

from saqqara.workers.gguf.demo import fetch_demo_model

from .browser import chromium, until
from .local_server import engine_app, listening
from .page import Page

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
ENGINE = {"max_num_seqs": 4, "kv_memory_gib": 1.0}
PICTURES = (("page.png", "recommended-adaptive", False), ("page-dark.png", "pyramidkv", True))


def main() -> None:
    """Take them."""
    app = engine_app(fetch_demo_model(), engine_kwargs=ENGINE)
    with listening(app) as url:
        for name, retention, dark in PICTURES:
            with chromium((1360, 900), dark=dark) as driver:
                page = Page(driver, url)
                page.choose(retention, "25%")
                driver.execute_script("document.querySelector('[data-example=find]').click()")
                page.wait_done(2)
                page.wait_text("#pyramid-note", "Your last answer")
                until(driver, page.settled, "the bars have moved")
                driver.save_screenshot(str(FOLDER / name))
                print(FOLDER / name)


if __name__ == "__main__":
    main()
