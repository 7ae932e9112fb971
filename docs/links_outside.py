"""Links from a page to a file of the source tree: the site shows the file's path.

On a code host such a link opens the file. The site holds pages alone, so the link would
be dead there; a link to a file that does not exist still fails the build.
"""

import logging
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)+[^)#\s]+)\)")
log = logging.getLogger("mkdocs.plugins.links_outside")


def on_page_markdown(markdown, page, **_):
    """Return the page with the text of each link that leaves docs/ in its place."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def shown(link):
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).is_file():
            log.warning("%s links to %s, which is no file", page.file.src_uri, path)
        return link["text"]

    return LINK.sub(shown, markdown)
