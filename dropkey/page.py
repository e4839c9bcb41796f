"""One HTML page that needs nothing else: no script, no file, no network. Read at a desk and on a phone."""

import base64
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("page.html.j2")


def page(title: str, body: str) -> str:
    """The page around `body`, which is HTML. Tables and SVG of the body that are wider than a screen scroll in it."""
    body = re.sub(r"<table\b.*?</table>", lambda found: f'<div class="wide">{found.group()}</div>', body, flags=re.S)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(title=title, body=Markup(body))


def data_uri(content: bytes, kind: str) -> str:
    """An image inside the page; `kind` as in image/png."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
