"""Print the words of each page, the length of its sentences, and the words to avoid.

`python docs/measure_prose.py [page ...]` reads the pages of the site, or those named.
Code and tables are left out of the sentences; words are counted as `wc` counts them.
The figures inform: a page may have a reason for a long sentence.
"""

import re
import sys
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FENCE = re.compile(r"^([ \t]*)(```|~~~).*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
HTML = re.compile(r"<[^>]+>")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
MARKUP = re.compile(r"[*_#>]+")
SENTENCE = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z`\"(])|\n\s*\n")
AVOID = re.compile(
    r"\b(anew|afresh|beside|but for|whoever|nobody|as yet|of which|is warned of|told|"
    r"keeps its bits|forgets?|remembers?|meets?|sees?|learns?|learned)\b",
    re.IGNORECASE,
)
"""What the guide for writers rules out; `learns` is right for a network."""

LONGEST = 10


def read_sentences(text: str) -> list[str]:
    """Return the sentences of a page, without code, tables and markup."""
    text = HTML.sub(" ", LINK.sub(r"\1", FENCE.sub("\n\n", text)))
    lines = [line.strip() for line in text.splitlines()]
    prose = [re.sub(r"^([-*]|\d+\.)\s", "\n\n", line) for line in lines]
    prose = ["\n" if line.startswith(("|", "#", ":::")) else line for line in prose]
    found = SENTENCE.split(MARKUP.sub("", "\n".join(prose)))
    sentences = (" ".join(sentence.split()) for sentence in found)
    return [sentence for sentence in sentences if len(sentence.split()) > 1]


def site_pages() -> list[Path]:
    """Return the pages of the site, and the README."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def main(names: list[str]) -> None:
    """Print a line for each page, then the longest sentences and the words to avoid."""
    pages = [Path(name).resolve() for name in names] or site_pages()
    longest: list[tuple[int, str, str]] = []
    avoided: list[str] = []
    total = 0
    print(f"{'words':>6} {'sentences':>9} {'mean':>5} {'longest':>7}  page")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        name = str(page.relative_to(ROOT))
        sentences = read_sentences(text)
        lengths = [len(sentence.split()) for sentence in sentences] or [0]
        words = len(text.split())
        total += words
        print(
            f"{words:6} {len(sentences):9} {mean(lengths):5.1f} {max(lengths):7}  {name}"
        )
        longest += zip(lengths, [name] * len(lengths), sentences, strict=False)
        for number, line in enumerate(text.splitlines(), 1):
            avoided += [f"{name}:{number}: {word}" for word in AVOID.findall(line)]
    print(f"{total:6} in all")
    print(f"\nThe {LONGEST} longest sentences")
    for length, name, sentence in sorted(longest, reverse=True)[:LONGEST]:
        print(f"{length:4}  {name}: {sentence}")
    print("\nWords to avoid")
    print("\n".join(avoided) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
