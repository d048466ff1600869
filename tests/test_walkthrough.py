"""docs/walkthrough.md: its code runs in order, prints what stands behind it, and draws its pictures.

``python tests/test_walkthrough.py`` draws the pictures of docs/ anew.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import needs_library

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURES = re.findall(r"^!\[.+\]\((.+)\)$", TEXT, re.MULTILINE)
#: What may differ a little: numbers with a point, and percentages.
MEASURED = re.compile(r"-?\d+\.\d+|\d+(?=%)")


def run() -> Iterator[tuple[int, str, str]]:
    """Run the code in the working folder: the line of each block, what it should print, and what it printed."""
    names: dict[str, object] = {}
    blocks = [(found[1], found[2], TEXT[: found.start(2)].count("\n")) for found in BLOCK.finditer(TEXT)]
    for (language, code, line), (following, text, _) in zip(blocks, [*blocks[1:], ("", "", 0)]):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, "docs/walkthrough.md", "exec"), names)
            yield line, text if following == "text" else "", printed.getvalue()


def agree(expected: str, printed: str) -> bool:
    """Whether the two differ in nothing but measured numbers, by one in the last place, or by 2%."""
    if MEASURED.split(expected) != MEASURED.split(printed):
        return False
    for one, other in zip(MEASURED.findall(expected), MEASURED.findall(printed)):
        places = len(one.partition(".")[2])
        if abs(float(one) - float(other)) > (1.01 * 10**-places if places else 2):
            return False
    return True


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.usefixtures("one_thread")
def test_the_blocks_print_what_stands_there_and_draw_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, expected, printed in run():
        assert agree(expected, printed), f"line {line}: printed\n{printed}expected\n{expected}"
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg")}
    assert drawn == set(PICTURES) and len(PICTURES) >= 2
    for name in PICTURES:
        fresh, committed = ((folder / name).read_text() for folder in (tmp_path, DOCS))
        assert labels(fresh) == labels(committed), f"{name} is out of date: python {Path(__file__).name} draws it"


def labels(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_and_its_text_is_text(name: str) -> None:
    svg = (DOCS / name).read_text()
    assert len(svg) < 60_000 and len(labels(svg)) > 5
    assert "<image" not in svg and "<dc:date" not in svg


def test_every_section_has_its_formula_its_kernel_and_code_with_shapes() -> None:
    sections = re.split(r"^## (\d+)\. ", TEXT, flags=re.MULTILINE)
    numbers, bodies = sections[1::2], sections[2::2]
    assert [int(number) for number in numbers] == list(range(1, 16))
    for body in bodies:
        languages = [found[1] for found in BLOCK.finditer(body)]
        assert {"python", "text"} <= set(languages) and re.search(r"\[\d+, \d+", body), body.splitlines()[0]
        assert re.search(r"\*\*Kernels?:\*\*", body), body.splitlines()[0]
        assert "$$" in body or "$O(" in body, body.splitlines()[0]


def test_every_operator_that_is_named_exists() -> None:
    named = set(re.findall(r"`(\w+_(?:forward|backward))`", TEXT))
    assert len(named) >= 7 and all(hasattr(torch.ops.fastformer, name) for name in named)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("loss 0.77, 97%", "loss 0.78, 95%", True),
        ("loss 0.77", "loss 0.79", False),
        ("97%", "94%", False),
        ("[2, 3]", "[2, 4]", False),
        ("10^-25", "10^25", False),
        ("cat", "dog", False),
    ],
)
def test_agree(expected: str, printed: str, same: bool) -> None:
    assert agree(expected, printed) == same


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(DOCS)
    for line, expected, printed in run():
        if not agree(expected, printed):
            print(f"line {line} printed\n{printed}expected\n{expected}")
