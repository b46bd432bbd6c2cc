"""What the site does to pages beyond mkdocs: links in docstrings, and in files from outside ``docs/``."""

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Turn Sphinx's roles (``:func:`sparsepeft.ops.route```), which docstrings use, into links."""
    return _ROLE.sub(_link, html)


def _link(role: re.Match[str]) -> str:
    shown = role[2].rsplit(".", 1)[-1] if role[1] else role[2]
    return f'<autoref identifier="{role[2]}" optional><code>{shown}</code></autoref>'
