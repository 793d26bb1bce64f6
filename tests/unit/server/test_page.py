"""The page's files and headers, without a browser."""

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.api_server import ENGINE
from support.byte_llama import save_tiny_llama
from support.local_server import engine_app

from saqqara.cluster.server.page import routes
from saqqara.cluster.server.page.routes import add_page, page_settings

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "cluster" / "server" / "page"
PARTS = {"/": "text/html", "/ui/page.css": "text/css", "/ui/page.js": "text/javascript"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    add_page(app, "snapkv@25%", needs_key=True)
    return TestClient(app, base_url="http://127.0.0.1")


@pytest.mark.parametrize("path", [*PARTS, "/ui/settings.json"])
def test_every_part_has_the_headers_that_bound_it(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(PARTS.get(path, "application/json"))
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.head(path).status_code == 200
    assert client.post(path).status_code == 405


def test_nothing_is_loaded_from_elsewhere_and_no_script_is_in_the_page() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith(("ui/", "data:", "#", "docs", "metrics")), link
    assert re.findall(r"<script(?![^>]*src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", page) == []
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script
    addresses = re.findall(r"https?://[^\"' ]*", script + (FOLDER / "page.css").read_text("utf-8"))
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, not a place


def test_the_settings_tell_the_methods_and_no_more() -> None:
    settings = page_settings("snapkv@25%", needs_key=False)
    assert set(settings) == {"default", "suggested", "methods", "needs_key"}
    methods = {method["name"]: method for method in settings["methods"]}
    assert settings["suggested"] in methods
    assert methods["pyramidkv"]["takes_budget"]
    assert not methods["full"]["takes_budget"]
    assert not methods["pyramidinfer"]["takes_budget"]


def test_the_files_are_shipped_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]["*"]
    assert {f"*{Path(name).suffix}" for name, _ in routes._FILES.values()} <= set(shipped)


@pytest.mark.parametrize("ui", [True, False])
def test_a_server_has_the_page_unless_told(tmp_path: Path, ui: bool) -> None:
    save_tiny_llama(tmp_path)
    app = engine_app(tmp_path, keys=["sk-1"], engine_kwargs=ENGINE, ui=ui)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for path in (*PARTS, "/ui/settings.json"):
            assert client.get(path).status_code == (200 if ui else 404)
        assert client.get("/v1/models").status_code == 401
        if ui:
            settings = client.get("/ui/settings.json").json()
            assert (settings["needs_key"], settings["default"]) == (True, "full")
