"""Build the text corpus of the demo model from unpacked documentation packages.

The HTML pages of permissively licensed software documentation are turned into plain text (headings, paragraphs,
list items, fenced code), cleaned, de-duplicated and split by page into three parts plus a small validation set:

* training text (``train.jsonl.gz``) and validation text (``validation.jsonl.gz``) go to the work folder,
* ``calibration.jsonl`` and ``evaluation.jsonl`` go to the output folder and are shipped with the demo model.

The result depends only on the input files: pages are ranked by a hash of their identifier, nothing is random.

Example::

    for deb in *.deb; do dpkg -x "$deb" "unpacked/${deb%%_*}"; done
    python tools/build_demo_corpus.py unpacked/* --work-dir build/demo --out-dir assets/demo
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

Attributes = dict[str, str]
Predicate = Callable[[str, Attributes], bool]

VOID_TAGS = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"]
)
BLOCK_TAGS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "thead",
        "tr",
        "ul",
    ]
)
ALWAYS_SKIPPED = frozenset(
    ["script", "style", "head", "nav", "svg", "button", "form", "noscript", "template", "select", "textarea", "iframe"]
)
SKIPPED_CLASSES = frozenset(
    [
        "navheader",
        "navfooter",
        "toc",
        "nosearch",
        "sphinxsidebar",
        "related",
        "indexterm",
        "headerlink",
        "viewcode-link",
        "toctree-wrapper",
        "contents",
        "mark",
        "srclink",
        "src",
        "rightside",
        "out-of-band",
        "sourceNav",
        "nav-chapters",
        "nav-wrapper",
        "mobile-nav-chapters",
        "fancy_toc",
        "sphinxsidebarwrapper",
        "browse-horizontal",
        "legacy",
        "test-arrow",
        "copy-path",
        "item-info",
        "stability",
        "deprecated-inline",
        "sidebar-logo",
        "notable-traits",
    ]
)
SKIPPED_IDS = frozenset(("toc", "sidebar", "gtoc", "copy-path", "altdocs"))


@dataclass(frozen=True)
class Source:
    """Where one source keeps its pages inside its package and which part of a page is content."""

    name: str
    folder: str
    root: Predicate
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    title: Predicate | None = None


def _tag(name: str) -> Predicate:
    return lambda tag, attributes: tag == name


def _role_main(tag: str, attributes: Attributes) -> bool:
    return attributes.get("role") == "main"


def _identified(name: str) -> Predicate:
    return lambda tag, attributes: attributes.get("id") == name


def _classed(name: str) -> Predicate:
    return lambda tag, attributes: name in attributes.get("class", "").split()


SPHINX_EXCLUDE = ("_modules/", "_static/", "_sources/", "_images/", "genindex", "py-modindex", "search.html")

SOURCES = (
    Source("postgresql", "usr/share/doc/postgresql-doc-15/html", _tag("body"), ("bookindex", "biblio", "legalnotice")),
    Source(
        "sqlite",
        "usr/share/doc/sqlite3",
        _tag("body"),
        ("sitemap", "keyword_index", "doc_", "search", "toc_", "c3ref/", "capi3ref", "docs.html", "requirements"),
    ),
    Source("sqlite", "usr/share/doc/sqlite3/c3ref", _tag("body"), ("funclist", "constlist", "objlist", "intro")),
    Source("python", "usr/share/doc/python3.11/html", _role_main, (*SPHINX_EXCLUDE, "whatsnew/changelog", "contents")),
    Source("rust", "usr/share/doc/rust-doc/html/reference", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/nomicon", _tag("main"), ("print.html", "toc.html")),
    Source(
        "rust",
        "usr/share/doc/rust-doc/html/book",
        _tag("main"),
        ("print.html", "toc.html", "first-edition/", "second-edition/", "2018-edition/"),
    ),
    Source("rust", "usr/share/doc/rust-doc/html/rust-by-example", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/edition-guide", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/embedded-book", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/rustc", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/rustdoc", _tag("main"), ("print.html", "toc.html")),
    Source("rust", "usr/share/doc/rust-doc/html/unstable-book", _tag("main"), ("print.html", "library-features/")),
    Source(
        "rust",
        "usr/share/doc/rust-doc/html/std",
        _classed("docblock"),
        ("all.html", "/arch/", "simd/"),
        title=_classed("fqn"),
    ),
    Source("nodejs", "usr/share/doc/nodejs/api", _identified("apicontent"), ("all.html", "index.html")),
    Source("django", "usr/share/doc/python-django-doc/html", _classed("yui-g"), SPHINX_EXCLUDE),
    Source("sqlalchemy", "usr/share/doc/python-sqlalchemy-doc/html", _role_main, SPHINX_EXCLUDE),
    Source("llvm", "usr/share/doc/llvm-14-doc/html", _role_main, (*SPHINX_EXCLUDE, "AMDGPU/", "HowToSubmitABug")),
    Source("cmake", "usr/share/doc/cmake-data/html", _role_main, SPHINX_EXCLUDE),
)


class PageText(HTMLParser):
    """Collects the text of a page's content elements as lines of light Markdown."""

    def __init__(self, root: Predicate, title: Predicate | None = None) -> None:
        super().__init__(convert_charrefs=True)
        self.root = root
        self.title = title
        self.lines: list[str] = []
        self._buffer: list[str] = []
        self._prefix = ""
        self._in_pre = False
        self._heading = 0
        # Regions are followed by counting only elements of the region's own name: HTML leaves <p>, <li> and <td> open
        # so often that a full element stack would go astray.
        self._inside: tuple[str, int] | None = None
        self._skipped: tuple[str, int] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Follow regions, and start a new block where the element asks for one."""
        attributes = {name: value or "" for name, value in attrs}
        if self._skipped is not None:
            if tag == self._skipped[0]:
                self._skipped = (tag, self._skipped[1] + 1)
        elif self._inside is None:
            self._enter(tag, attributes)
        elif tag in VOID_TAGS:
            if tag == "br":
                self._buffer.append("\n" if self._in_pre else " ")
            elif tag == "hr":
                self._flush()
        elif self._must_skip(tag, attributes):
            self._skipped = (tag, 1)
        else:
            if tag == self._inside[0]:
                self._inside = (tag, self._inside[1] + 1)
            self._open(tag)

    def _enter(self, tag: str, attributes: Attributes) -> None:
        """Begin a content region if the element is one."""
        is_title = self.title is not None and self.title(tag, attributes)
        if is_title or self.root(tag, attributes):
            self._inside = (tag, 1)
            self._flush()
            self._heading = 1 if is_title else self._heading

    def _open(self, tag: str) -> None:
        """Start the block that an element of the content stands for."""
        pending = bool("".join(self._buffer).strip())
        if tag in ("td", "th"):
            if pending:
                self._buffer.append(" | ")
        elif tag in BLOCK_TAGS and not self._in_pre:
            # A paragraph that opens a list item continues the item's line.
            if tag != "p" or not self._prefix or pending:
                self._flush()
            if tag == "pre":
                self._in_pre = True
            elif tag == "li":
                self._prefix = "- "
            elif tag[0] == "h" and tag[1:].isdigit():
                self._heading = int(tag[1:])

    def handle_endtag(self, tag: str) -> None:
        """Close regions and finish the open block."""
        if self._skipped is not None:
            if tag == self._skipped[0]:
                depth = self._skipped[1] - 1
                self._skipped = (tag, depth) if depth else None
            return
        if self._inside is None:
            return
        if tag == "pre" and self._in_pre:
            self._flush_pre()
        elif tag in BLOCK_TAGS and not self._in_pre:
            self._flush()
        if tag == self._inside[0]:
            depth = self._inside[1] - 1
            self._inside = (tag, depth) if depth else None
            if self._inside is None:
                self._flush()

    def handle_data(self, data: str) -> None:
        """Keep text that stands inside the content."""
        if self._inside is not None and self._skipped is None:
            self._buffer.append(data)

    def text(self) -> str:
        """Return what was collected, one blank line between blocks."""
        if self._in_pre:
            self._flush_pre()
        self._flush()
        return "\n".join(self.lines)

    def _must_skip(self, tag: str, attributes: Attributes) -> bool:
        if tag in ALWAYS_SKIPPED or attributes.get("id") in SKIPPED_IDS:
            return True
        if attributes.get("role") in ("navigation", "search"):
            return True
        return bool(SKIPPED_CLASSES.intersection(attributes.get("class", "").split()))

    def _flush(self) -> None:
        text = " ".join("".join(self._buffer).split())
        self._buffer.clear()
        if not text:
            return
        if self._heading:
            self.lines.extend(("", "#" * min(self._heading, 4) + " " + text, ""))
        elif self._prefix:
            if self.lines and self.lines[-1] == "" and len(self.lines) > 1 and self.lines[-2].startswith("- "):
                self.lines.pop()
            self.lines.extend((self._prefix + text, ""))
        else:
            self.lines.extend((text, ""))
        self._prefix = ""
        self._heading = 0

    def _flush_pre(self) -> None:
        code = "".join(self._buffer).expandtabs(4).strip("\n")
        self._buffer.clear()
        self._in_pre = False
        self._prefix = ""
        if code.strip():
            rows = [row.rstrip() for row in code.split("\n")]
            indent = min((len(row) - len(row.lstrip()) for row in rows if row), default=0)
            self.lines.extend(("```", *(row[indent:] for row in rows), "```", ""))


@dataclass
class Page:
    """One page of documentation as plain text."""

    page_id: str
    source: str
    text: str
    rank: str = field(init=False)

    def __post_init__(self) -> None:
        """Fix the page's place in the hash order."""
        self.rank = hashlib.sha256(self.page_id.encode()).hexdigest()

    def row(self) -> dict[str, str]:
        """Return the page as it is written to the files."""
        return {"id": self.page_id, "source": self.source, "text": self.text}


NUMBERED_HEADING = re.compile(r"^(#+) (?:(?:Chapter|Appendix) )?(?:[0-9A-Z]+\.)+(?:[0-9]+\.?)* +", re.MULTILINE)
PUNCTUATION = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2026": "...", "\u00a0": " "}
)


def clean(text: str) -> str:
    """Normalise white space and typography and drop the numbers of headings."""
    text = unicodedata.normalize("NFC", text).translate(PUNCTUATION)
    # Link marks, zero-width characters and private-use glyphs carry nothing in plain text.
    text = re.sub("[\u00b6\u200b\u200c\u200d\ufeff\u00ad\ue000-\uf8ff]", "", text)
    text = NUMBERED_HEADING.sub(r"\1 ", text)
    text = "\n".join(line.rstrip() for line in text.split("\n") if not line.startswith("This page last modified on"))
    text = re.sub(r"^#+ ", "# ", text.strip(), count=1)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_pages(source: Source, folder: Path) -> Iterator[Page]:
    """Yield the pages of one source in path order."""
    prefix = folder.name + "/" if source.name == "rust" else "c3ref/" if folder.name == "c3ref" else ""
    for path in sorted(folder.rglob("*.html")):
        relative = path.relative_to(folder).as_posix()
        marked = "/" + relative
        if any(marked.startswith("/" + part) or (part in marked and "/" in part) for part in source.exclude):
            continue
        parser = PageText(source.root, source.title)
        html = path.read_text(encoding="utf-8", errors="replace")
        parser.feed(html)
        parser.close()
        text = parser.text().lstrip()
        title = re.search(r"<title>([^<]+)</title>", html)
        # SQLite shows the page title outside the content, so its first heading is only that of the first section.
        if title and (source.name == "sqlite" or not text.startswith("#")):
            heading = " ".join(unescape(title.group(1)).split())
            if text.partition("\n")[0].lstrip("# ") != heading:
                text = f"# {heading}\n\n{text}"
        yield Page(f"{source.name}/{prefix}{relative.removesuffix('.html')}", source.name, clean(text))


def split_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each line with whether it belongs to a fenced code block."""
    fenced = False
    for line in text.split("\n"):
        if line == "```":
            yield line, True
            fenced = not fenced
        else:
            yield line, fenced


def long_lines(text: str, length: int = 60) -> list[str]:
    """Return the lines long enough to recognise copied text by."""
    return [line for line in text.split("\n") if len(line) >= length]


def drop_repeated_lines(pages: list[Page], limit: int) -> None:
    """Remove prose lines that stand on more than ``limit`` pages: what is repeated that often is page furniture."""
    counts: Counter[str] = Counter()
    for page in pages:
        counts.update({line for line, fenced in split_fences(page.text) if not fenced and len(line) >= 20})
    for page in pages:
        kept = [line for line, fenced in split_fences(page.text) if fenced or counts[line] <= limit]
        page.text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def drop_poor_pages(pages: Iterable[Page], minimum: int) -> list[Page]:
    """Drop short pages, link lists, pages that are mostly not English prose, and exact duplicates."""
    kept, seen = [], set()
    for page in pages:
        lines = [line for line in page.text.split("\n") if line]
        listed = sum(len(line) for line in lines if line.startswith("- ") and len(line) < 60)
        letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in page.text)
        body = page.text.partition("\n")[2].strip()
        if len(page.text) < minimum or listed > 0.6 * len(page.text) or letters < 0.6 * len(page.text) or body in seen:
            continue
        seen.add(body)
        kept.append(page)
    return kept


def drop_near_duplicates(pages: list[Page], limit: float = 0.7) -> list[Page]:
    """Drop pages most of whose long lines stood on earlier pages already."""
    seen: set[str] = set()
    kept = []
    for page in pages:
        lines = long_lines(page.text)
        total = sum(map(len, lines))
        if total and sum(len(line) for line in lines if line in seen) > limit * total:
            continue
        seen.update(lines)
        kept.append(page)
    return kept


# Held-out pages are published as files of their own; pages about installing things from somewhere, or full of absolute
# paths, make poor test text and would only add dead addresses to the repository.
NOT_HELD_OUT = re.compile(r"pypi|npmjs|crates\Wio|debian\Worg|rubygems|anaconda|docker|/(tmp/|work/|home/|root)", re.I)


# The Embedded Rust Book states on its first page that its prose is CC BY-SA 4.0, unlike the rest of the Rust
# documentation. It is taken out after the split, so that every other page stays in the part where it was without it.
NOT_PERMISSIVE = ("rust/embedded-book/",)


def split(pages: list[Page], sizes: dict[str, int], max_page: int) -> dict[str, list[Page]]:
    """Choose pages for the held-out parts, source by source in hash order, and leave the rest for training."""
    owners: Counter[str] = Counter()
    for page in pages:
        owners.update(set(long_lines(page.text)))
    eligible: dict[str, list[Page]] = {}
    volume: Counter[str] = Counter()
    for page in pages:
        volume[page.source] += len(page.text)
        lines = long_lines(page.text)
        shared = sum(len(line) for line in lines if owners[line] > 1)
        # Sharing is judged against every other page, so that no split can leak into another one.
        own = 800 <= len(page.text) <= max_page and shared <= 0.1 * sum(map(len, lines))
        if own and not NOT_HELD_OUT.search(page.text):
            eligible.setdefault(page.source, []).append(page)
    # The square root keeps the large sources from crowding out the small ones.
    weight = {name: volume[name] ** 0.5 for name in eligible}
    total_weight = sum(weight.values())
    parts: dict[str, list[Page]] = {name: [] for name in sizes}
    taken = set()
    for name, candidates in sorted(eligible.items()):
        queue = sorted(candidates, key=lambda page: page.rank)
        for part, size in sizes.items():
            quota = size * weight[name] / total_weight
            while queue and quota > 0:
                page = queue.pop(0)
                quota -= len(page.text.encode())
                parts[part].append(page)
                taken.add(page.page_id)
    for chosen in parts.values():
        chosen.sort(key=lambda page: page.rank)
    parts["train"] = [page for page in pages if page.page_id not in taken]
    return parts


def write_jsonl(path: Path, pages: Iterable[Page]) -> None:
    """Write pages as JSON lines; a ``.gz`` name is compressed without a time stamp so that the bytes are repeatable."""
    content = "".join(json.dumps(page.row(), ensure_ascii=False) + "\n" for page in pages).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", nargs="+", type=Path, help="folders of unpacked documentation packages")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the training and validation text")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for calibration.jsonl and evaluation.jsonl")
    parser.add_argument("--held-out-bytes", type=int, default=1_000_000, help="size of each of the two shipped parts")
    parser.add_argument("--validation-bytes", type=int, default=400_000, help="size of the validation text")
    parser.add_argument("--min-page", type=int, default=300, help="shortest page kept, in characters")
    parser.add_argument("--max-held-out-page", type=int, default=24_000, help="longest page held out, in characters")
    arguments = parser.parse_args()

    pages: list[Page] = []
    for source in SOURCES:
        folders = [package / source.folder for package in arguments.packages if (package / source.folder).is_dir()]
        found = [page for folder in folders for page in read_pages(source, folder)]
        pages.extend(found)
        print(f"{source.name:<12} {source.folder:<50} {len(found):>6} pages", flush=True)
    drop_repeated_lines(pages, limit=6)
    pages = drop_near_duplicates(drop_poor_pages(pages, arguments.min_page))
    sizes = {
        "evaluation": arguments.held_out_bytes,
        "calibration": arguments.held_out_bytes,
        "validation": arguments.validation_bytes,
    }
    parts = split(pages, sizes, arguments.max_held_out_page)
    for name, candidates in parts.items():
        chosen = [page for page in candidates if not page.page_id.startswith(NOT_PERMISSIVE)]
        shipped = name in ("evaluation", "calibration")
        path = arguments.out_dir / f"{name}.jsonl" if shipped else arguments.work_dir / f"{name}.jsonl.gz"
        write_jsonl(path, chosen)
        by_source: Counter[str] = Counter()
        for page in chosen:
            by_source[page.source] += len(page.text.encode())
        print(f"{name}: {len(chosen)} pages, {sum(by_source.values()):,} bytes; {dict(sorted(by_source.items()))}")


if __name__ == "__main__":
    main()
