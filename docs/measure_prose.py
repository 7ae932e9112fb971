"""Print the words of each page, the length of its sentences, and the words to avoid.

`python docs/measure_prose.py [page ...]` reads the pages of the site, or those named.
Code and tables are left out of the sentences.
The figures inform: a page may have a reason for a long sentence.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FENCE = re.compile(r"^([ \t]*)(```|~~~).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
HTML = re.compile(r"<[^>]+>")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
MARKUP = re.compile(r"[*#>]+")
SENTENCE = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z`\"(])|\n\s*\n")
AVOID = re.compile(
    r"\b(anew|afresh|beside|but for|whoever|nobody|as yet|of which|is warned of|told|"
    r"keeps its bits|forgets?|remembers?|meets?|sees|(?<!scikit-)learns?|learned)\b",
    re.IGNORECASE,
)
"""What the guide for writers rules out; a network may learn, and `see` names a page."""

LONGEST = 10


def read_sentences(text: str) -> list[str]:
    """Return the sentences of a page, without code, tables and markup."""
    text = HTML.sub(" ", LINK.sub(r"\1", FENCE.sub("\n\n", text)))
    lines = [line.strip() for line in text.splitlines()]
    prose = [re.sub(r"^([-*]|\d+\.)\s", "\n\n", line) for line in lines]
    prose = ["\n" if line.startswith(("|", "#", ":::")) else line for line in prose]
    parts = SENTENCE.split(MARKUP.sub("", "\n".join(prose)))
    sentences = (" ".join(part.split()) for part in parts)
    return [sentence for sentence in sentences if len(sentence.split()) > 1]


def site_pages() -> list[Path]:
    """Return the pages of the site, and the README."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@dataclass(frozen=True)
class Page:
    """A page, its sentences and what it holds of the words to avoid."""

    name: str
    words: int
    """Numbers and marks of code included."""

    sentences: list[str]
    avoided: list[str]

    def line(self) -> str:
        """Return the figures as a line of the table."""
        lengths = [length(sentence) for sentence in self.sentences] or [0]
        figures = f"{self.words:6} {len(lengths):9} {mean(lengths):5.1f}"
        return f"{figures} {max(lengths):7}  {self.name}"


def length(sentence: str) -> int:
    """Return the number of words."""
    return len(sentence.split())


def read_page(path: Path) -> Page:
    """Return what is measured of a page."""
    text = path.read_text(encoding="utf-8")
    avoided = [
        f"{number}: {word}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in AVOID.findall(line)
    ]
    words = len(re.findall(r"\w\S*", text))
    return Page(str(path.relative_to(ROOT)), words, read_sentences(text), avoided)


def main(names: list[str]) -> None:
    """Print a line for each page, then the longest sentences and the words to avoid."""
    paths = [Path(name).resolve() for name in names] or site_pages()
    pages = [read_page(path) for path in paths]
    print(f"{'words':>6} {'sentences':>9} {'mean':>5} {'longest':>7}  page")
    print(*(page.line() for page in pages), sep="\n")
    print(f"{sum(page.words for page in pages):6} in all")
    print(f"\nThe {LONGEST} longest sentences")
    sentences = [(length(x), page.name, x) for page in pages for x in page.sentences]
    for words, name, sentence in sorted(sentences, reverse=True)[:LONGEST]:
        print(f"{words:4}  {name}: {sentence}")
    print("\nWords to avoid")
    avoided = [f"{page.name}:{word}" for page in pages for word in page.avoided]
    print("\n".join(avoided) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
