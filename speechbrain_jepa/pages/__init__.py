"""Web pages that are one file: they open without a server, and ask nothing of the network.

Names of files are untrusted text. In HTML they are escaped, scripts get them as JSON and put them
into the page as text, and the page's content security policy runs no script without its nonce and
loads nothing from elsewhere.
"""

import base64
import html
import json
import os
import secrets
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from speechbrain_jepa.files import whole_file

# plotly compiles its shaders' draw calls (regl), hence unsafe-eval. 'self' is a page that is served
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; media-src 'self' file: data: blob:; base-uri 'none'; form-action 'none'"
)
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
{body}
"""


def asset(name: str) -> str:
    """A file that lies beside this module."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def escaped(text: str) -> str:
    """As text in HTML, also where a file name is not UTF-8."""
    return html.escape(printable(text))


def printable(text: str) -> str:
    """Without what is no Unicode, as names of files on the disk may have it.

    Example
    -------
    >>> printable(os.fsdecode(b"caf\\xe9.wav"))
    'caf\\\\xe9.wav'
    """
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def json_in_html(value) -> str:
    """JSON that ends no script element, whatever text is in it.

    Example
    -------
    >>> json_in_html("</script>")
    '"\\\\u003c/script>"'
    """
    return json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def picture(path: str | os.PathLike, text: str) -> str:
    """A PNG as an image element.

    Arguments
    ---------
    path : str or Path
    text : str
        For those who cannot see it.
    """
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{escaped(text)}" src="data:image/png;base64,{encoded}">'


def write_page(
    path: str | os.PathLike,
    title: str,
    body: str,
    style: str = "",
    data: dict | None = None,
    blobs: Iterable[tuple[str, bytes]] = (),
    scripts: Iterable[str] = (),
) -> Path:
    """Write a page, whole or not at all.

    Arguments
    ---------
    path : str or Path
        Its folder is made.
    title : str
        Escaped here.
    body : str
        HTML; names in it are `escaped`.
    style : str
        CSS after the common page.css.
    data : dict or None
        JSON for the scripts, in the element with the id "data".
    blobs : iterable of (str, bytes)
        Bytes for the scripts, in base64, by the id of their element.
    scripts : iterable of str
        Run in their order.

    Returns
    -------
    Path

    Raises
    ------
    OSError
        If the disk is full: the message names it.

    Example
    -------
    >>> path = write_page(getfixture("tmp_path") / "page.html", "a < b", "<p>text</p>")
    >>> "<title>a &lt; b</title>" in path.read_text()
    True
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nonce = secrets.token_urlsafe(16)
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as out:
        out.write(
            HEAD.format(
                policy=POLICY.format(nonce=nonce),
                title=escaped(title),
                style=asset("page.css") + style,
                body=body,
            )
        )
        if data is not None:
            out.write(f'<script type="application/json" id="data">{json_in_html(data)}</script>\n')
        for name, content in blobs:
            encoded = base64.b64encode(content).decode()
            out.write(f'<script type="text/plain" id="{name}">{encoded}</script>\n')
        for script in scripts:
            out.write(f'<script nonce="{nonce}">\n{script}\n</script>\n')
        out.write("</body>\n</html>\n")
    return path
