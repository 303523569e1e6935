"""What models write, as safe HTML: Markdown first, then a list of the few things that may stay."""

from functools import cache
from html import escape
from typing import Annotated, Any

import nh3
from markdown_it import MarkdownIt
from pydantic import Field

from attending.config import Config

TAGS = {"a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr"}
TAGS |= {"li", "ol", "p", "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
CHARACTERS = 400_000


class RenderRequest(Config):
    """POST /page/render."""

    texts: Annotated[
        tuple[Annotated[str, Field(max_length=CHARACTERS)], ...], Field(max_length=256)
    ]
    """Markdown."""


def render(texts: tuple[str, ...]) -> list[str]:
    """HTML of some Markdown; a picture becomes a link, since loading it would tell its server."""
    return [
        nh3.clean(
            _markdown().render(text),
            tags=TAGS,
            attributes={"a": {"href", "title"}, "ol": {"start"}},
            url_schemes={"http", "https", "mailto"},
            url_relative="deny",
            link_rel="noopener noreferrer nofollow",
            set_tag_attribute_values={"a": {"target": "_blank"}},
        )
        for text in texts
    ]


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", _picture)
    return markdown


def _picture(_: Any, tokens: Any, index: int, *rest: Any) -> str:
    token = tokens[index]
    return f'<a href="{escape(token.attrs["src"])}">{escape(token.content or "picture")}</a>'
