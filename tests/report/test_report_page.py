"""The page and the table that are made of spectra: against numpy's own numbers, a parser, and a browser if there is one."""

from __future__ import annotations

import base64
import copy
import csv
import html
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from surgery.errors import FormatError, OutputError
from surgery.report import gallery
from surgery.report.listing import MAX_ROWS, write_csv
from surgery.report.page import write_page
from surgery.report.summary import steps
from surgery.report.verdicts import CLAIMS, TOGETHER, Verdict, counted, together

TOP, R = 24, 8
Matrix = np.ndarray
Spectra = dict[str, Any]
VOID = {"meta", "link", "br", "img", "input", "hr"}


# ---- spectra, by numpy


def _values(matrix: Matrix) -> tuple[dict[str, Any], Matrix, Matrix, Matrix]:
    """What docs/study.md has of one matrix."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    k = min(TOP, len(s))
    energy = (s**2).sum()
    shares = s**2 / energy
    gaps = np.abs(np.diff(s, append=0.0))
    described = {
        "norm": math.sqrt(energy),
        "singular_values": s[:k].tolist(),
        "residual": [1e-7] * k,
        "gap": (gaps[:k] / s[0]).tolist(),
        "identified": [True] * k,
        "converged": True,
        "method": "lapack",
        "stable_rank": energy / s[0] ** 2,
        "effective_rank": math.exp(-(shares * np.log(shares + 1e-300)).sum()),
        "effective_rank_error": 0.0,
        "energy": {str(2**i): shares[: 2**i].sum() for i in range(9) if 2**i <= k},
        "condition": s[0] / s[k - 1] if s[k - 1] > 0 else None,
        "tail_exponent": 0.5,
    }
    return described, U[:, :k], s, Vh[:k].T


def _target(tensor: str, old: Matrix, new: Matrix | None, index: int | None = None) -> dict[str, Any]:
    described, U, s, V = _values(old)
    number = re.search(r"\.(\d+)\.", tensor)
    group = re.sub(r"^model\.layers\.\d+\.", "", tensor).removesuffix(".weight")
    target = {
        "tensor": tensor,
        "slice": None,
        "matrix": index,
        "key": tensor if index is None else f"{tensor}#{index}",
        "group": group,
        "layer": int(number[1]) if number else None,
        "dtype": "BF16",
        "shape": list(old.shape),
        **described,
    }
    if new is None:
        return target
    changed, U2, s2, V2 = _values(new)
    k = len(described["singular_values"])
    r = min(R, k)
    D = new - old
    total = (D**2).sum()
    inside = U[:, :r].T @ D @ V[:, :r]
    cosines = [np.abs(a.T @ b).clip(max=1) for a, b in ((U, U2), (V, V2))]
    common = (cosines[0] ** 2 + cosines[1] ** 2) / 2
    rows, became = np.arange(k), common.argmax(axis=1)
    place = [int(j) + 1 if common[i, j] > 0.5 else None for i, j in enumerate(became)]
    pairs = [(place[i], place[j]) for i in range(r) for j in range(i + 1, k)]

    def angles(a: Matrix, b: Matrix) -> list[float]:
        return np.linalg.svd(a.T @ b, compute_uv=False).clip(max=1).tolist() if a.shape[1] else []

    return target | {
        "tuned": changed,
        "amplification": (s2[:k] / s[:k]).tolist(),
        "rest_amplification": float(np.linalg.norm(s2[k:]) / np.linalg.norm(s[k:])) if k < len(s) else None,
        "place": place,
        "left_cosine": cosines[0][rows, became].tolist(),
        "right_cosine": cosines[1][rows, became].tolist(),
        "in_place": ((U * (new @ V)).sum(0) / s[:k]).tolist(),
        "order_changes": sum(a > b for a, b in pairs if a is not None and b is not None),
        "gone": [],
        "new": [],
        "new_certain": [],
        "left_top": angles(U[:, :r], U2[:, :r]),
        "right_top": angles(V[:, :r], V2[:, :r]),
        "left_next": angles(U[:, r : 2 * r], U2[:, r : 2 * r]),
        "right_next": angles(V[:, r : 2 * r], V2[:, r : 2 * r]),
        "claims": _claims(s[:k], s2[:k], old, D),
        "update": {
            "norm": math.sqrt(total),
            "relative": math.sqrt(total) / described["norm"],
            "in_left": float(((U[:, :r].T @ D) ** 2).sum() / total),
            "in_right": float(((D @ V[:, :r]) ** 2).sum() / total),
            "in_both": float((inside**2).sum() / total),
            "rescaling": float((inside.diagonal() ** 2).sum() / total),
            "stable_rank": 2.0,
            "effective_rank": 3.0,
            "effective_rank_error": 0.1,
            "singular_values": np.linalg.svd(D, compute_uv=False)[:64].tolist(),
        }
        if total > 0
        else None,
    }


def _claims(s: Matrix, s2: Matrix, old: Matrix, D: Matrix) -> dict[str, Any]:
    if not D.any():
        return {"rounding": None, "scaling": None, "turning": None}
    factor, scaling = (s @ s2) / (s @ s), None
    if not np.allclose(s, s2, atol=1e-9 * s[0]):
        explained = 1 - ((D - (factor - 1) * old) ** 2).sum() / (D**2).sum()
        scaling = {"factor": factor, "of_values": 1 - ((s2 - factor * s) ** 2).sum() / ((s2 - s) ** 2).sum()}
        scaling["of_update"] = max(0.0, explained)
    # How directions turned is held against truths where it is measured.
    turning = {"left": 0.1, "right": 0.1, "alike": 0.9, "independent": 0.05, "random": 0.8}
    return {"rounding": 1e-6, "scaling": scaling, "turning": turning}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _verdicts(targets: list[dict[str, Any]], name: str, arxiv: str, claim: Callable[..., Verdict]) -> dict[str, Any]:
    found = counted(claim, targets, R)
    return {"claim": name, "arxiv": arxiv, "verdict": together(found), **{one: found[one] for one in get_args(Verdict)}}


def _spectra(targets: list[dict[str, Any]], base: str = "some/base", tuned: str = "out/tuned") -> Spectra:
    compared = "tuned" in targets[0]
    known = [flag for target in targets for flag in target["identified"]]
    findings: dict[str, Any] = {
        "targets": len(targets),
        "median_stable_rank": _median(target["stable_rank"] for target in targets),
        "median_effective_rank_share": _median(target["effective_rank"] / min(target["shape"]) for target in targets),
        "median_energy": {},
        "unconverged": sum(not target["converged"] for target in targets),
        "unidentified_share": 1 - sum(known) / len(known),
    }
    if compared:
        ratios = [value for target in targets for value in target["amplification"][:R] if value is not None]
        in_place = [value for target in targets for value in target["in_place"][:R] if value is not None]
        updates = [target["update"] for target in targets if target["update"] is not None]
        scalings = [target["claims"]["scaling"] for target in targets if target["claims"]["scaling"] is not None]
        turnings = [target["claims"]["turning"] for target in targets if target["claims"]["turning"] is not None]
        m, n = targets[0]["shape"]
        findings |= {
            "top_change": _median(
                statistics.fmean(abs(value - 1) for value in target["amplification"][:R] if value is not None)
                for target in targets
                if target["amplification"][0] is not None
            ),
            "rest_change": _median(
                abs(target["rest_amplification"] - 1) for target in targets if target["rest_amplification"] is not None
            ),
            "top_amplified_share": sum(value > 1 for value in ratios) / len(ratios) if ratios else None,
            "median_left_cosine": _median(value for target in targets for value in target["left_cosine"][:R]),
            "median_right_cosine": _median(value for target in targets for value in target["right_cosine"][:R]),
            "median_next_left_cosine": _median(value for target in targets for value in target["left_cosine"][R:]),
            "median_next_right_cosine": _median(value for target in targets for value in target["right_cosine"][R:]),
            "median_matched_amplification": 1.01,
            "median_scaling": _median(scaling["factor"] for scaling in scalings),
            "median_scaling_at_random": 1.0023,
            "median_scaling_of_values": _median(scaling["of_values"] for scaling in scalings),
            "median_scaling_of_update": _median(scaling["of_update"] for scaling in scalings),
            "median_turned_alike": _median(turning["alike"] for turning in turnings),
            "median_turned_alike_at_random": _median(turning["random"] for turning in turnings),
            "median_in_place": _median(in_place),
            "in_place_grew_share": sum(value > 1 for value in in_place) / len(in_place) if in_place else None,
            "order_changes": sum(target["order_changes"] for target in targets),
            "moved_share": statistics.fmean(
                [place != i for target in targets for i, place in enumerate(target["place"][:R], 1) if place is not None] or [0]
            ),
            "gone": 0,
            "new": 0,
            "new_certain": 0,
            "median_update_in_left": _median(update["in_left"] for update in updates),
            "chance_in_left": R / m,
            "median_update_in_right": _median(update["in_right"] for update in updates),
            "chance_in_right": R / n,
            "median_update_in_either": _median(u["in_left"] + u["in_right"] - u["in_both"] for u in updates),
            "chance_in_either": 1 - (1 - min(R, m) / m) * (1 - min(R, n) / n),
            "median_update_in_both": _median(update["in_both"] for update in updates),
            "chance_in_both": R * R / (m * n),
            "median_rescaling": _median(update["rescaling"] for update in updates),
            "chance_rescaling": R / (m * n),
            "claims": [_verdicts(targets, *claim) for claim in CLAIMS],
            "most_amplified": [{"key": targets[0]["key"], "index": 1, "amplification": 1.25}],
        }
    return {
        "schema_version": 3,
        "tool": "surgery 0.2.0",
        "torch": "2.13.0",
        "device": "cpu (2 threads)",
        "base": {"name": base, "repo_id": None, "commit": "0123abc"},
        "tuned": {"name": tuned, "repo_id": None, "commit": None} if compared else None,
        "options": {"top": TOP, "subspace": R, "seed": 0, "tolerance": 1e-5, "recipe": None, "include": [], "exclude": []},
        "targets": targets,
        "findings": findings,
    }


NAMES = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in range(2) for name in ("q_proj", "o_proj")] + [
    "lm_head.weight"
]


def _matrix(seed: int, shape: tuple[int, int] = (32, 48)) -> Matrix:
    """With singular values that are well apart."""
    rng = np.random.default_rng(seed)
    U, _, Vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return (U * 1.15 ** -np.arange(len(Vh))) @ Vh


def _scaled(matrix: Matrix, factors: Iterable[float]) -> Matrix:
    """With its leading singular values multiplied."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    factors = list(factors)
    s[: len(factors)] *= factors
    return (U * s) @ Vh


def _compared(change: Callable[[Matrix], Matrix]) -> Spectra:
    return _spectra([_target(name, _matrix(i), change(_matrix(i))) for i, name in enumerate(NAMES)])


def _amplified(matrix: Matrix) -> Matrix:
    return _scaled(matrix, [1.05] * R)


def _random(matrix: Matrix) -> Matrix:
    return matrix + 1e-2 * np.random.default_rng(7).standard_normal(matrix.shape)


def _alone() -> Spectra:
    return _spectra([_target(name, _matrix(i), None) for i, name in enumerate(NAMES)])


HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\n\x00\ud800 $x^2$"


def _hostile() -> Spectra:
    targets = [_target(f"=cmd|{HOSTILE}.{i}.{'long' * 50}.weight", _matrix(i), _random(_matrix(i))) for i in range(2)]
    return _spectra(targets, base=HOSTILE, tuned=HOSTILE)


CASES: dict[str, Callable[[], Spectra]] = {
    "amplified": lambda: _compared(_amplified),
    "random": lambda: _compared(_random),
    "alone": _alone,
    "hostile": _hostile,
}


# ---- the page, by a parser of its own


class Page(HTMLParser):
    """Elements in order, each with attributes, text and parent; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {[element['tag'] for element in self._open]}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        element = {"tag": tag, "text": "", "parents": list(self._open), **{"@" + name: value for name, value in attributes}}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] in tags]

    def inside(self, parent: dict[str, Any], *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.all(*tags) if any(one is parent for one in element["parents"])]

    def by_id(self, name: str) -> dict[str, Any]:
        (found,) = (element for element in self.elements if element.get("@id") == name)
        return found

    def answers(self, which: str = "findings") -> dict[str, tuple[str, ...]]:
        """Question -> answer and details of the findings."""
        (findings,) = (element for element in self.all("ul") if element.get("@class") == which)
        found = {}
        for item in self.inside(findings, "li"):
            (question,) = self.inside(item, "h3")
            found[question["text"]] = tuple(part["text"].replace("\u00a0", " ") for part in self.inside(item, "p"))
        return found

    def claims(self) -> dict[str, tuple[str, ...]]:
        """Claim -> verdict, for how many matrices, details, source."""
        found = {}
        for claim, (answer, *rest) in self.answers("findings claims").items():
            verdict = next(one for one in sorted(TOGETHER, key=len, reverse=True) if answer.startswith(one.capitalize()))
            found[claim] = (verdict.capitalize(), answer[len(verdict) + 2 : -1], *rest)
        return found

    def description(self, picture: str, panel: int = 0) -> str:
        text: str = self.by_id(f"{picture}-{panel}-desc")["text"]
        return text.replace("\u00a0", " ")


def _page(spectra: Spectra, folder: Path) -> Page:
    write_page(spectra, folder / "index.html")
    return Page((folder / "index.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    return {name: _page(make(), tmp_path_factory.mktemp(name)) for name, make in CASES.items()}


@pytest.fixture(params=list(CASES))
def page(request: pytest.FixtureRequest, pages: dict[str, Page]) -> Page:
    return pages[request.param]


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    (policy,) = (meta for meta in page.all("meta") if meta.get("@http-equiv") == "Content-Security-Policy")
    assert policy["@content"] == ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:")
    assert page.elements.index(policy) < page.elements.index(page.all("style")[0])
    assert not page.all("link", "iframe", "object", "embed", "base", "img")
    for element in page.elements:
        for name in ("@src", "@href", "@xlink:href", "@action", "@srcset"):
            value = element.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (element["tag"], value)
    # Names of the hostile case have no address in them, so there is none anywhere.
    # A picture's own bytes may spell anything.
    source = re.sub(r'(?m)^\s*//.*$|data:image/png;base64,[^"]*', "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", source)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}


def test_scripts_are_its_own(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0]["text"]
    assert not [name for element in page.elements for name in element if name.startswith("@on")]


def test_references_have_their_targets(page: Page) -> None:
    ids = [element["@id"] for element in page.elements if "@id" in element]
    assert len(ids) == len(set(ids))
    wanted = {element["@href"][1:] for element in page.elements if (element.get("@href") or "").startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    for name in ("@aria-labelledby", "@data-status"):
        wanted |= {one for element in page.elements for one in (element.get(name) or "").split()}
    assert wanted <= set(ids)


def test_outline(page: Page) -> None:
    (root,) = page.all("html")
    assert root["@lang"] == "en"
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"]
    levels = [int(heading["tag"][1]) for heading in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.all(landmark)) == 1
    skip = page.all("a")[0]
    assert skip["@class"] == "skip"
    assert page.by_id(skip["@href"][1:])["tag"] == "main"
    assert all(page.by_id(section["@aria-labelledby"])["text"] for section in page.all("section"))


def test_tables_are_told_to_a_screen_reader(page: Page) -> None:
    for table in page.all("table"):
        assert page.inside(table, "caption")[0]["text"]
        (head,), (body,) = page.inside(table, "thead"), page.inside(table, "tbody")
        assert all(cell["@scope"] == "col" and cell["text"] for cell in page.inside(head, "th"))
        rows = page.inside(body, "tr")
        assert all(page.inside(row, "th")[0]["@scope"] == "row" for row in rows)
        assert {len(page.inside(row, "th", "td")) for row in rows} == {len(page.inside(head, "th"))}
        box = table["parents"][-1]
        assert box["@tabindex"] == "0"
        assert "scroll" in box["@class"].split()
        if "sorts" in (table.get("@class") or ""):
            for heading in page.inside(head, "th"):
                assert heading["@aria-sort"] == "none"
                assert page.inside(heading, "button")[0]["@type"] == "button"


def test_pictures_say_what_they_show(page: Page) -> None:
    figures = page.all("figure")
    assert len(figures) == (2 if "before and after" not in page.source else 5)
    for figure in figures:
        assert page.inside(figure, "figcaption")[0]["text"]
        drawings = page.inside(figure, "svg")
        assert drawings
        for drawing in drawings:
            assert drawing["@role"] == "img"
            title, description = (page.by_id(name) for name in drawing["@aria-labelledby"].split())
            assert (title["tag"], description["tag"]) == ("title", "desc")
            assert len(re.findall(r"\d[\d.,]*", description["text"])) >= 3, description["text"]


def test_pictures_take_the_colours_of_the_page(page: Page) -> None:
    drawings = "".join(re.findall(r"(?s)<svg.*?</svg>", page.source))
    assert "currentColor" in drawings
    assert set(re.findall(r"var\((--[a-z]+)", drawings)) <= {"--layer", "--faint"}
    assert "#0102" not in drawings
    assert not re.search(r"(fill|stroke): ?(#000000|#ffffff|black|white)", drawings)
    assert all(f"{name}:" in page.source for name in set(re.findall(r"var\((--[a-z0-9-]+)", page.source)))


def test_the_same_numbers_give_the_same_page(tmp_path: Path, pages: dict[str, Page]) -> None:
    assert _page(CASES["random"](), tmp_path).source == pages["random"].source


# ---- what it says


AMPLIFIED = "Fine-tuning amplifies the top singular values"
INTACT = "It leaves the other singular values as they were"
TURNED = "The dominant directions turn, the others less"
SCALED = "All singular values of a matrix are scaled by one factor"
ALIKE = "Left and right directions turn by the same orthogonal matrix"
INTRUDERS = "Intruder dimensions come in: leading directions that are none of the base's"
OFF = "The update keeps off the principal directions, as in training with verifiable rewards"
BECAME = "What became of the leading directions?"
RESCALED = "How much of the update would pure rescaling explain?"
HALF = "What rank holds half of the energy?"
TRUSTED = "Can the numbers be trusted?"


def test_an_amplified_top_is_found(pages: dict[str, Page]) -> None:
    answers, claims = pages["amplified"].answers(), pages["amplified"].claims()
    verdict, counts, details, source = claims[AMPLIFIED]
    assert (verdict, counts) == ("Holds", f"yes in {len(NAMES)} of {len(NAMES)} matrices")
    assert f"Here: Of the first {R} singular values 100 % grew, by +5 %" in details
    assert source == "Weight Spectra Induced Efficient Model Adaptation, arXiv 2505.23099"
    assert claims[INTACT][0] == "Holds"
    assert claims[TURNED][0] == claims[INTRUDERS][0] == claims[OFF][0] == "Does not hold"
    assert "Of the update's energy 100 % (by chance " in claims[OFF][2]
    assert answers[BECAME][0] == "None changed their order"
    assert "they changed by +5 % (median), and 100 % grew" in answers[BECAME][1]
    assert answers[RESCALED][0].startswith("Most of it: ")


def test_a_random_update_is_told_as_what_it_is(pages: dict[str, Page]) -> None:
    spectra = CASES["random"]()
    answers, claims = pages["random"].answers(), pages["random"].claims()
    top, rest = spectra["findings"]["top_change"], spectra["findings"]["rest_change"]
    assert rest > top
    assert claims[INTACT][0] == "Does not hold"
    assert f"The mean size of the change of the first {R} singular values is {100 * top:.3g} %, " in claims[INTACT][2]
    assert f"that of the norm of all that comes after the values kept {100 * rest:.3g} % " in claims[INTACT][2]
    assert claims[OFF][0] == "Does not hold"
    found = spectra["findings"]
    for part, chance in (("left", R / 32), ("right", R / 48), ("both", R * R / (32 * 48))):
        assert f"{100 * found[f'median_update_in_{part}']:.3g} % ({100 * chance:.3g} %) in " in claims[OFF][2]
    either = 100 * (1 - (1 - R / 32) * (1 - R / 48))
    assert f"{100 * found['median_update_in_either']:.3g} % (by chance {either:.3g} %) lies in" in claims[OFF][2]
    assert answers[RESCALED][0].startswith("Little: ")


def test_every_claim_names_its_paper_and_is_explained(pages: dict[str, Page]) -> None:
    claims = pages["random"].claims()
    assert list(claims) == [AMPLIFIED, INTACT, TURNED, SCALED, ALIKE, INTRUDERS, OFF]
    for verdict, _, details, source in claims.values():
        assert verdict in ("Holds", "Holds in part", "Does not hold", "Cannot be told")
        assert details.startswith("Here: ")
        assert re.fullmatch(r"[A-Z].+, arXiv \d{4}\.\d{5}", source)
    first = pages["random"].inside(pages["random"].all("main")[0], "section")[0]
    assert first["@id"] == "claims"
    assert "claims" not in {section.get("@id") for section in pages["alone"].all("section")}


def test_a_model_alone_is_told_of_by_its_spectrum(pages: dict[str, Page]) -> None:
    answers = pages["alone"].answers()
    assert list(answers) == ["How fast do the singular values fall?", HALF, TRUSTED]
    stable = statistics.median(np.linalg.norm(_matrix(i)) ** 2 / np.linalg.norm(_matrix(i), 2) ** 2 for i in range(len(NAMES)))
    assert f"is {stable:.3g} (median of {len(NAMES)} matrices)" in answers["How fast do the singular values fall?"][1]
    assert "amplif" not in pages["alone"].source.split("<script>")[0].split("</style>")[1].lower()


def test_the_rank_of_half_the_energy(pages: dict[str, Page]) -> None:
    def rank(matrix: Matrix) -> int:
        energy = np.linalg.svd(matrix, compute_uv=False) ** 2
        return next(i + 1 for i in range(len(energy)) if energy[: i + 1].sum() >= energy.sum() / 2)

    expected = statistics.median_low([rank(_matrix(i)) for i in range(len(NAMES))])
    assert pages["alone"].answers()[HALF][0] == f"Rank {expected}"


def test_a_half_beyond_what_was_computed_is_not_made_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flat = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    answer, details = _page(_spectra([_target(NAMES[0], flat, None)]), tmp_path).answers()[HALF]
    assert answer == f"More than rank {TOP}"
    assert "more were not computed" in details


def test_a_top_that_shrank(tmp_path: Path) -> None:
    page = _page(_compared(lambda matrix: _scaled(matrix, [0.95] * R)), tmp_path)
    assert page.claims()[AMPLIFIED][0] == "Does not hold"
    assert "0 % grew, by −5 %" in page.claims()[AMPLIFIED][2]


def test_changes_within_rounding_say_nothing(tmp_path: Path) -> None:
    spectra = _compared(_amplified)
    for target in spectra["targets"]:
        target["claims"] = {"rounding": 0.9, "scaling": None, "turning": None}
    spectra["findings"]["claims"] = [_verdicts(spectra["targets"], *claim) for claim in CLAIMS]
    spectra["findings"] |= dict.fromkeys([name for name in spectra["findings"] if name.startswith("median_scaling")])
    spectra["findings"] |= dict.fromkeys(["median_turned_alike", "median_turned_alike_at_random"])
    page = _page(spectra, tmp_path)
    for verdict, counts, *_ in page.claims().values():
        assert (verdict, counts) == ("Cannot be told", f"of any of {len(NAMES)} matrices")
    assert f"In {len(NAMES)} matrices it is so small that the rounding" in page.answers()["How large is the update?"][1]


def test_models_that_are_the_same(tmp_path: Path) -> None:
    page = _page(_compared(lambda matrix: matrix.copy()), tmp_path)
    assert list(page.answers()) == ["What changed?", HALF, TRUSTED]
    assert page.answers()["What changed?"][0] == "Nothing"
    assert "unknown" not in page.description("amplification")


def test_directions_that_turn(tmp_path: Path) -> None:
    replaced = _spectra([_target(name, _matrix(i), _matrix(i + 100)) for i, name in enumerate(NAMES)])
    verdict, _, details, _ = _page(replaced, tmp_path).claims()[TURNED]
    assert verdict in ("Holds", "Holds in part")
    cosine = replaced["findings"]["median_left_cosine"]
    assert f"left {math.floor(1e4 * cosine) / 1e4:.4f} ({math.degrees(math.acos(cosine)):.3g}°)" in details


def _mixed(matrix: Matrix, which: range, angle: float) -> Matrix:
    """With the directions of a range turned towards their neighbours, in pairs."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    new_U, new_Vh = U.copy(), Vh.copy()
    a, b = math.cos(angle), math.sin(angle)
    for i, j in zip(which[::2], which[1::2], strict=True):
        new_U[:, i], new_U[:, j] = a * U[:, i] + b * U[:, j], a * U[:, j] - b * U[:, i]
        new_Vh[i], new_Vh[j] = a * Vh[i] + b * Vh[j], a * Vh[j] - b * Vh[i]
    return (new_U * s) @ new_Vh


def test_directions_that_turn_among_themselves(tmp_path: Path) -> None:
    page = _page(_compared(lambda matrix: _mixed(matrix, range(R), 0.6)), tmp_path)
    assert page.claims()[TURNED][0] == "Holds"
    assert "The subspaces that they span keep over 99.9 % of themselves" in page.claims()[TURNED][2]
    assert page.answers()[BECAME][0] == "None changed their order"


def test_a_few_directions_that_turn_are_not_hidden_by_the_median(tmp_path: Path) -> None:
    verdict, _, details, _ = _page(_compared(lambda matrix: _mixed(matrix, range(2), 0.6)), tmp_path).claims()[TURNED]
    assert verdict == "Does not hold"
    assert f"Of the first {R}, {100 * 2 / R:.0f} % are below 0.9" in details


def test_directions_that_change_places_have_not_turned(tmp_path: Path) -> None:
    def reordered(matrix: Matrix) -> Matrix:
        U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
        order = [*range(R)[::-1], *range(R, len(s))]
        return (U[:, order] * s) @ Vh[order]

    page = _page(_compared(reordered), tmp_path)
    assert page.claims()[TURNED][0] == "Does not hold"
    answers = page.answers()
    changes = len(NAMES) * R * (R - 1) // 2
    assert answers[BECAME][0] == f"Their order changed {changes} times"
    assert "100 % have another place there" in answers[BECAME][1]


def test_directions_that_are_gone_or_new_are_told(tmp_path: Path) -> None:
    spectra = _compared(_amplified)
    spectra["findings"] |= {"gone": 1, "new": 12}
    answer, details = _page(spectra, tmp_path).answers()[BECAME]
    assert answer == "None changed their order, 1 is gone, 12 are new"
    assert "whose values are below all that were computed: 1." in details
    assert f"12 of the first {R} left ones of the tuned matrices are none of the base's" in details


def test_solvers_that_did_not_converge(tmp_path: Path) -> None:
    spectra = _alone()
    spectra["targets"][1]["converged"] = False
    spectra["targets"][1]["residual"][3] = 0.0123
    spectra["findings"] |= {"unconverged": 1, "unidentified_share": 0.25}
    page = _page(spectra, tmp_path)
    answer, details = page.answers()[TRUSTED]
    assert answer == "Not all: 1 decomposition did not converge"
    assert "0.012 of the first value" in details
    assert "25 % of the directions are not determined" in details
    assert "1 decomposition did not converge" in page.by_id("reading")["text"]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"yes": 3, "no": 1}, "holds"),
        ({"yes": 74, "no": 26}, "holds in part"),
        ({"yes": 1, "no": 3}, "does not hold"),
        ({"partly": 4}, "holds in part"),
        ({"yes": 2, "unknown": 2}, "holds"),
        ({"yes": 2, "unknown": 3}, "cannot be told"),
        ({"unknown": 3}, "cannot be told"),
        ({}, "cannot be told"),
    ],
)
def test_matrices_decide_together(verdicts: dict[Verdict, int], expected: str) -> None:
    assert together(verdicts) == expected


# ---- what it draws


def _image(page: Page, picture: str, index: int = 0) -> Matrix:
    """The pixels (rows, columns, 4) of a heat map."""
    from matplotlib.image import imread

    (drawing,) = (svg for svg in page.all("svg") if svg["@aria-labelledby"].startswith(f"{picture}-0-"))
    data = page.inside(drawing, "image")[index]["@href"].removeprefix("data:image/png;base64,")
    return imread(io.BytesIO(base64.b64decode("".join(data.split()))))


def test_amplification_is_drawn_cell_by_cell(tmp_path: Path) -> None:
    # Layer 0 grows by 8 % at the first direction and shrinks by 4 % at the third; layer 1 stays.
    factors = [[1.08, 1.0, 0.96], [1.0, 1.0, 1.0001]]
    targets = [_target(f"model.layers.{i}.mlp.up_proj.weight", _matrix(i), _scaled(_matrix(i), factors[i])) for i in range(2)]
    page = _page(_spectra(targets), tmp_path)
    pixels = _image(page, "amplification")
    assert pixels.shape == (2, len(steps(TOP)), 4)
    red, blue = pixels[0, 0], pixels[0, 2]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert red[3] > blue[3] > 0.1
    np.testing.assert_allclose(pixels[1, :, 3], 0, atol=0.01)
    assert "Amplification by order goes from 0.96 to 1.08" in page.description("amplification")
    assert "farthest from 1 in layer 0 at direction 1: 1.08" in page.description("amplification")


def test_directions_that_are_not_identified_are_hatched(tmp_path: Path, pages: dict[str, Page]) -> None:
    spectra = _compared(_random)
    group = [target for target in spectra["targets"] if target["group"] == "self_attn.q_proj"]
    for target in group:
        target["left_cosine"][2] = None
    group[0]["right_cosine"][5:7] = [None, None]
    page = _page(spectra, tmp_path)
    left, right = _image(page, "rotation", 0), _image(page, "rotation", 1)
    assert np.argwhere(left[:, :8, 3] == 0)[:, 1].tolist().count(2) == 2
    turned = 1 - np.array(group[0]["right_cosine"][:5], dtype=float)
    assert np.argsort(right[0, :5, 3], kind="stable")[-1] == np.argmax(turned)
    assert right[0, 5:7, 3].tolist() == [0, 0]
    assert "left blank" in page.description("rotation")
    assert "left blank" not in pages["random"].description("rotation")

    def hatched(of: Page) -> int:
        (drawing,) = (svg for svg in of.all("svg") if svg["@aria-labelledby"].startswith("rotation-0-"))
        return len(of.inside(drawing, "pattern"))

    assert hatched(page) > 0
    assert hatched(pages["random"]) == 0
    assert "not identified" in page.source


def test_experts_are_drawn_by_their_median(tmp_path: Path) -> None:
    targets = [
        _target("model.layers.3.mlp.experts.up_proj", _matrix(i), _scaled(_matrix(i), [factor]), index=i)
        for i, factor in enumerate([1.02, 1.06, 1.3])
    ]
    page = _page(_spectra(targets), tmp_path)
    assert "1 layer, medians of 3 matrices" in page.by_id("amplification-0-title")["text"]
    assert "to 1.06;" in page.description("amplification")
    assert "up to 3 here" in page.by_id("pictures")["text"]
    rows = page.inside(page.by_id("matrices"), "th")
    assert {target["key"] for target in targets} <= {row["text"] for row in rows}


def test_a_large_model_stays_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_PANELS", 3)
    one = _target("model.layers.0.mlp.up_proj.weight", _matrix(0), _random(_matrix(0)))
    targets = []
    for i in range(MAX_ROWS + 50):
        target = copy.deepcopy(one)
        layer, group = i % 10, f"mlp.part{i // 10}"
        target |= {"key": f"model.layers.{layer}.{group}", "group": group, "layer": layer}
        target["update"]["relative"] = 0.001 * (i + 1)
        targets.append(target)
    page = _page(_spectra(targets), tmp_path)
    (table,) = (table for table in page.all("table") if table.get("@class") == "sorts")
    listed = [row["text"] for row in page.inside(table, "th") if row["@scope"] == "row"]
    assert listed == [target["key"] for target in targets[50:]]
    assert f"The {MAX_ROWS} of {MAX_ROWS + 50} matrices with the largest update" in page.by_id("matrices")["text"]
    assert len(page.inside(page.all("figure")[0], "svg")) == 3
    assert f"Of {len(targets) // 10} groups, the 3 that changed the most are drawn" in page.by_id("pictures")["text"]
    write_csv(_spectra(targets), tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + len(targets)


def test_a_matrix_without_anything_in_it(tmp_path: Path) -> None:
    """Zeros have no ratios, no energy and no directions."""
    zeros = _target(NAMES[0], _matrix(0), _random(_matrix(0)))
    k = len(zeros["singular_values"])
    nothing = {"norm": 0.0, "singular_values": [0.0] * k, "stable_rank": 0.0, "effective_rank": 0.0, "energy": {}}
    zeros |= nothing | {"condition": None, "tail_exponent": None, "identified": [False] * k, "rest_amplification": None}
    zeros |= {
        "amplification": [None] * k,
        "in_place": [None] * k,
        "place": [None] * k,
        "left_cosine": [None] * k,
        "right_cosine": [None] * k,
    }
    zeros["update"]["relative"] = None
    zeros["claims"] |= {"scaling": None, "turning": None}
    page = _page(_spectra([zeros]), tmp_path)
    assert "No matrix has singular values above zero in both models." in page.claims()[AMPLIFIED][2]
    assert f"None of the first {R} directions is determined" in page.claims()[TURNED][2]
    assert {page.claims()[claim][0] for claim in (AMPLIFIED, INTACT, TURNED, SCALED, ALIKE)} == {"Cannot be told"}
    assert page.description("amplification").startswith("No amplification by order is known.")


@pytest.mark.parametrize("shape", [(1, 5), (2, 2)])
def test_a_tiny_matrix(shape: tuple[int, int], tmp_path: Path) -> None:
    page = _page(_spectra([_target("bias_like", _matrix(0, shape), 1.1 * _matrix(0, shape))]), tmp_path)
    assert page.claims()[AMPLIFIED][0] == "Holds"
    assert page.claims()[INTACT][0] == page.claims()[SCALED][0] == "Cannot be told"
    assert "there is no rest to compare them with" in page.claims()[INTACT][2]


# ---- names of strangers


def test_hostile_names_are_text(pages: dict[str, Page]) -> None:
    page = pages["hostile"]
    spelled = HOSTILE.replace("\u202e", "\\u202e").replace("\n", "\\n").replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    assert page.all("h1")[0]["text"] == f"Singular spectra of {spelled} against {spelled}"
    keys = [row["text"] for row in page.inside(page.by_id("matrices"), "th") if row["@scope"] == "row"]
    assert keys == [f"=cmd|{spelled}.{i}.{'long' * 50}.weight" for i in range(2)]
    assert html.escape(spelled) in page.source
    assert spelled not in page.source


def test_hostile_names_in_the_csv(tmp_path: Path) -> None:
    write_csv(_hostile(), tmp_path / "spectra.csv")
    with open(tmp_path / "spectra.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["key"].startswith("'=cmd|</title>")
    assert first["key"].endswith("$x^2$.0." + "long" * 50 + ".weight")
    assert first["key"] != second["key"]


@pytest.mark.parametrize("sign", list("=+-@\uff1d\uff0b\uff0d\uff20"))
def test_no_name_is_a_formula_in_the_csv(sign: str, tmp_path: Path) -> None:
    spectra = _spectra([_target(f"{sign}1+1.weight", _matrix(0), 1.1 * _matrix(0))])
    write_csv(spectra, tmp_path / "spectra.csv")
    with open(tmp_path / "spectra.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["tensor"] == f"'{sign}1+1.weight"


# ---- the CSV


@pytest.mark.parametrize("case", ["random", "alone"])
def test_csv_holds_what_the_json_holds(case: str, tmp_path: Path) -> None:
    spectra = json.loads(json.dumps(CASES[case]()))
    if case == "random":
        spectra["targets"][1] |= {"update": None, "rest_amplification": None}
        spectra["targets"][2]["amplification"] = spectra["targets"][2]["amplification"][:3]
    write_csv(spectra, tmp_path / "new" / "spectra.csv")
    with open(tmp_path / "new" / "spectra.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(NAMES)
    for row, target in zip(rows, spectra["targets"], strict=True):
        expected = {name: target[name] for name in ("tensor", "slice", "matrix", "key", "group", "layer", "dtype")}
        expected |= dict(zip(("rows", "columns"), target["shape"], strict=True))
        scalars = ("norm", "converged", "method", "stable_rank", "effective_rank", "effective_rank_error", "condition")
        expected |= {name: target[name] for name in (*scalars, "tail_exponent")}
        if case == "random":
            expected |= {f"tuned_{name}": target["tuned"][name] for name in (*scalars, "tail_exponent")}
            expected["rest_amplification"] = target["rest_amplification"]
            full = spectra["targets"][0]["update"]
            expected |= {
                f"update_{name}": target["update"] and target["update"][name] for name in full if name != "singular_values"
            }
            expected["order_changes"] = target["order_changes"]
            expected |= {name: len(target[name]) for name in ("gone", "new", "new_certain")}
            expected["rounding"] = target["claims"]["rounding"]
            for part in ("scaling", "turning"):
                expected |= {f"{part}_{name}": value for name, value in target["claims"][part].items()}
            for name in ("amplification", "in_place", "place"):
                first = [*target[name], *[None] * 8][:8]
                expected |= {f"{name}_{i + 1}": value for i, value in enumerate(first)}
        assert set(row) == set(expected)
        for name, value in expected.items():
            if value is None:
                assert row[name] == ""
            elif isinstance(value, bool):
                assert row[name] == str(value).lower()
            elif isinstance(value, float):
                assert float(row[name]) == value
            else:
                assert row[name] == str(value)


# ---- what can go wrong


def test_without_matplotlib_there_is_a_table_and_a_hint(tmp_path: Path) -> None:
    (tmp_path / "spectra.json").write_text(json.dumps(CASES["random"]()))
    code = """
import json, sys
from pathlib import Path
sys.modules["matplotlib"] = None
from surgery.errors import MissingExtra
from surgery.report.listing import write_csv
from surgery.report.page import write_page
spectra = json.loads(Path("spectra.json").read_text())
write_csv(spectra, Path("spectra.csv"))
try:
    write_page(spectra, Path("index.html"))
except MissingExtra as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'matplotlib>=3.10.8'" in done.stdout
    assert (tmp_path / "spectra.csv").exists()
    assert not (tmp_path / "index.html").exists()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="another version"):
        write_page(_alone() | {"schema_version": 2}, tmp_path / "index.html")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(_alone(), tmp_path / "file" / "index.html")


# ---- in a browser


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

#: Catches what goes wrong from before the page's own script runs.
PROBE = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message), true);
document.addEventListener("securitypolicyviolation", (event) => problems.push(event.blockedURI));
</script>"""

#: A window as narrow as a phone, and someone who sorts by two columns.
HARNESS = """<!DOCTYPE html><iframe width="360" height="700" style="border: 0" srcdoc="{}"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument;
  const table = page.querySelector("table.sorts");
  const headings = [...table.tHead.rows[0].cells];
  const sorted = (name) => {{
    const at = headings.findIndex((heading) => heading.textContent === name);
    headings[at].querySelector("button").click();
    return {{
      sort: headings.map((heading) => heading.getAttribute("aria-sort")),
      at,
      values: [...table.tBodies[0].rows].map((row) => row.cells[at].dataset.value ?? row.cells[at].textContent),
      told: page.getElementById("sorted").textContent,
    }};
  }};
  const box = (element) => element.getBoundingClientRect();
  const result = {{
    problems: frame.contentWindow.problems,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    width: page.documentElement.scrollWidth,
    room: page.documentElement.clientWidth,
    pictures: [...page.querySelectorAll("svg")].map(box).map((it) => [it.left, it.right, it.height]),
    images: [...page.querySelectorAll("image")].map(box).map((it) => it.width),
    reachable: headings.every((heading) => heading.querySelector("button").tabIndex === 0),
    down: sorted("norm"), up: sorted("norm"), named: sorted("matrix"), layers: sorted("layer"),
  }};
  document.querySelector("pre").textContent = JSON.stringify(result);
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
def test_in_a_browser(tmp_path: Path) -> None:
    spectra = _compared(_random)
    write_page(spectra, tmp_path / "index.html")
    source = (tmp_path / "index.html").read_text("utf-8")
    probed = source.replace("<title>", PROBE + "<title>", 1)
    (tmp_path / "harness.html").write_text(HARNESS.format(html.escape(probed)), "utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr"]
    done = subprocess.run(
        [
            BROWSER or "",
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "harness.html").as_uri(),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"CONSOLE" not in done.stderr
    found = re.search(r"<pre>(.*?)</pre>", done.stdout.decode().rpartition("</iframe>")[2], re.DOTALL)
    assert found, done.stderr.decode()[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["problems"] == []
    assert result["requests"] == []
    assert result["width"] == result["room"] <= 360
    assert len(result["pictures"]) == 5 * 3
    assert all(0 <= left < right <= 360 and right - left > 300 and height > 60 for left, right, height in result["pictures"])
    assert len(result["images"]) == 4 * 3
    assert min(result["images"]) > 200
    assert result["reachable"]
    norms = sorted(target["norm"] for target in spectra["targets"])
    assert [float(value) for value in result["down"]["values"]] == norms[::-1]
    assert [float(value) for value in result["up"]["values"]] == norms
    at = result["down"]["at"]
    assert result["down"]["sort"][at] == "descending"
    assert result["up"]["sort"][at] == "ascending"
    assert set(result["up"]["sort"][:at] + result["up"]["sort"][at + 1 :]) == {"none"}
    assert result["up"]["told"] == "Sorted by norm, ascending."
    assert result["named"]["values"] == sorted(NAMES)
    # The head has no layer, and what has no value comes last.
    assert result["layers"]["values"] == ["1", "1", "0", "0", ""]
