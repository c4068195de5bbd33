"""A browser's page with an explorer in it."""

from types import SimpleNamespace

import pytest

AROUND = """<!doctype html>
<html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"></head>
<body style="margin:8px">{}</body></html>
"""


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens an explorer in a page of its own and returns page and frame. In the end: nothing was fetched,
    and the browser had nothing to complain of.
    """
    contexts, said = [], []

    def open_page(explorer, width=1100, **how):
        path = tmp_path / "page.html"
        path.write_text(AROUND.format(explorer._repr_html_()), encoding="utf-8")
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **how))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # milliseconds; only a page that is wrong takes so long
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        if how.get("java_script_enabled", True):
            page.frame_locator("iframe").locator("#explorer [role=status]").first.wait_for()
            frame = page.frames[1]
            if "tokenizer.js" in explorer.scripts:
                frame.locator("#explorer[data-ready]").wait_for()
            return SimpleNamespace(page=page, frame=frame)
        return SimpleNamespace(page=page, frame=None)

    yield open_page
    for context in contexts:
        context.close()
    assert [words for words in said if words not in ("about:srcdoc", "about:blank")] == []
