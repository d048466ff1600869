"""What people see of a run: the tables say what the JSON says, pictures and page hold it all and need nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bench_support import LIMITS, case, double, rows_of, wrong_value
from torch._subclasses.fake_tensor import FakeTensorMode

from fastformer.benchmarks import html_report, pictures, readme_table, report, suite, table
from fastformer.benchmarks.case import IMPLEMENTATIONS
from fastformer.benchmarks.harness import (
    BACKWARD,
    FORWARD,
    OURS,
    TRAINING,
    Limits,
    Row,
    Timing,
    short_name,
)
from fastformer.benchmarks.scaling import Point

HOSTILE = "<script>alert('x')</script> & \"quoted\""
END_TO_END = {
    "model": "GPT, 6 layers",
    "batch": "4 x 256 tokens",
    "dtype": "fp32",
    "backend": "cpu",
    "steps": 2,
    "losses": {"torch": [8.0, 7.0], "fastformer": [8.0, 7.0001]},
    "held_out_loss": {"torch": 7.5, "fastformer": 7.5},
    "peak_bytes": {"torch": 3 * 2**20, "fastformer": 2 * 2**20},
    "logits_difference": 1e-6,
    "largest_logit": 2.0,
    "loss_difference": 1e-4,
    "tokens_per_second": {"torch": 100.0, "fastformer": 150.0},
    "speedup": 1.5,
    "problem": "",
}


def timing(milliseconds: float, spread: float = 0.01) -> Timing:
    low, high = milliseconds * (1 - spread), milliseconds * (1 + spread)
    return Timing(milliseconds / 1e3, low / 1e3, high / 1e3, low / 1e3, high / 1e3, 9)


def row(**changes: object) -> Row:
    """Ours takes 2 ms, eager 6 ms, the fastest of SDPA's kernels 3 ms, torch.compile 1 ms."""
    settings = {
        "operation": "attention",
        "shape": "2x3x128x64",
        "dtype": "fp32",
        "mode": FORWARD,
        "backend": "cpu",
        "sizes": {"batch": 2, "heads": 3, "length": 128},
        "ours": timing(2.0),
        "error_share": 0.25,
        "peers": {
            "eager": timing(6.0),
            "sdpa": timing(4.0),
            "sdpa: flash": timing(3.0),
            "sdpa: cudnn": "needs a GPU",
            "compile": timing(1.0),
            "compile: max-autotune": timing(1.5),
            "liger": HOSTILE,
            "quack": "needs a GPU",
        },
        "limit": "product",
        "limit_seconds": 1e-3,
        "bytes": 10**6,
        "flops": 10**8,
        "overhead": {"ours": 12e-6},
        "memory": {"ours": 3 * 2**20},
    }
    return Row(**(settings | changes))


def model(**changes: object) -> Row:
    """A training step over 1000 tokens: 0.1 s for ours, 0.2 s for eager, 0.05 s for ours compiled."""
    settings = {
        "operation": "train_step",
        "shape": "gpt2 2x500",
        "mode": TRAINING,
        "ours": timing(100.0),
        "peers": {"eager": timing(200.0), "compile": "torch.compile failed", "ours: compile": timing(50.0)},
        "flops": 10**9,
        "tokens": 1000,
        "memory": {"ours": 40 * 2**20, "eager": 80 * 2**20},
    }
    return row(**(settings | changes))


def results_of(rows: list[Row], end_to_end: dict | None = None, **changes: object) -> dict:
    environment = {"processor": "a processor, fast", "threads": "2 of torch", "versions": "torch 2"}
    collected = report.collect(environment, LIMITS, rows, end_to_end)
    return json.loads(json.dumps(collected | changes))


def columns_of(results: dict, *metrics: str) -> list[list[str]]:
    """The words of the table's lines with numbers."""
    lines = report.format_table(results, metrics).splitlines()
    return [line.split() for line in lines if line.startswith(" ") and re.search(r"fwd|bwd", line)]


def test_json_is_what_was_found(tmp_path: Path) -> None:
    rows = [row(), row(ours=None, problem="wrong output", peers={})]
    results = report.collect({"processor": "p"}, LIMITS, rows, END_TO_END, scaling=[{"size": 1}], interrupted=True)
    report.write_json(results, tmp_path / "benchmark.json")
    assert json.loads((tmp_path / "benchmark.json").read_text()) == results
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    assert list(results) == ["format", "environment", "limits", "rows", "scaling", "end_to_end", "interrupted"]
    assert results["format"] == 2 and results["interrupted"] is True and results["scaling"] == [{"size": 1}]
    assert results["limits"]["copy"] == {"1024": 1e11, "1048576": 1e10} and results["limits"]["drift"] == 0
    assert results["limits"]["product"] == {"fp32": 1e11, "bf16": 2e11}
    good, bad = results["rows"]
    assert good.items() >= asdict(rows[0]).items()
    assert good["speedups"]["eager"] == pytest.approx(3) and good["speedups"]["sdpa: flash"] == pytest.approx(1.5)
    assert good["limit_share"] == pytest.approx(0.5) and good["spread"] == pytest.approx(0.01)
    assert bad["speedups"] == {} and bad["limit_share"] is None and bad["spread"] is None


def test_runs_fail_with_their_rows_or_their_training() -> None:
    assert not report.failed(results_of([row()], END_TO_END))
    assert report.failed(results_of([row(), row(ours=None, problem="wrong output")]))
    assert report.failed(results_of([row()], END_TO_END | {"problem": "losses differ"}))


def test_fastest_peer_of_each_group_counts() -> None:
    (found,) = results_of([row()])["rows"]
    assert report.best_speedups(found) == {
        key: pytest.approx(x) for key, x in (("eager", 3), ("fused", 1.5), ("compile", 0.5))
    }
    assert report.gaps(found, "others") == f"liger: {HOSTILE}; quack: needs a GPU"
    assert report.gaps(found, "eager") == "" and report.group_of("ours: compile") is None
    assert report.gaps({"peers": {"compile": "too slow"}}, "compile") == "too slow"
    peers = [name for name in IMPLEMENTATIONS if name != OURS]
    assert {report.group_of(name) for name in peers} == set(report.GROUPS)  # none without a group, none empty


def test_table_says_what_the_json_says() -> None:
    results = results_of([row(), row(mode=TRAINING, ours=timing(7.1234, 0.2), flops=0)])
    lines = columns_of(results, *report.METRICS)
    shape = ["2x3x128x64", "fwd"]
    assert lines[0] == [
        *shape,
        "2.000",
        "1%",
        "3.00",
        "1.50",
        "0.50",
        "[1]",
        "50%",
        "prod",
        "0.25",
        "0.0500",
        "0.500",
        "12.0",
        "3.00",
    ]
    assert lines[1][2:5] == ["7.123", "20%", "0.84"] and "-" in lines[1]
    assert columns_of(results, "error", "latency")[0] == [*shape, "0.25", "2.000"]
    text = report.format_table(results, ["speedup"])
    assert "attention fp32, cpu kernel" in text and f"[1] liger: {HOSTILE}; quack: needs a GPU" in text
    assert "error" not in text
    with pytest.raises(ValueError, match=r"metrics: 'speed', must be among latency, .*memory"):
        report.format_table(results, ["latency", "speed"])


def test_table_of_problems_and_long_reasons_stays_narrow() -> None:
    rows = [row(ours=None, problem=f"RuntimeError: {'x' * 300}"), row(peers={"compile": "because of " * 100})]
    lines = report.format_table(results_of(rows)).splitlines()
    assert max(map(len, lines)) <= report.WIDTH and sum("because of" in line for line in lines) <= 5
    assert lines[3].startswith(" 2x3x128x64 fwd   RuntimeError: xxx") and lines[3].endswith("x...")
    assert lines[4].split()[4:8] == ["-", "-", "[1]", "-"]


@pytest.mark.parametrize("device", suite.BACKENDS)
def test_every_case_fits_the_table(device: str) -> None:
    the_suite = {"cpu": "full", "cuda": "gpu"}[device]
    names = (*suite.OPERATIONS, *suite.MORE_OPERATIONS)
    with FakeTensorMode():  # a device that may not be there
        cases = list(
            suite.cases_of(
                names, the_suite, torch.device(device), suite.BACKENDS[device], [torch.float32, torch.bfloat16]
            )
        )
    rows = [
        row(
            operation=the_case.operation,
            shape=the_case.shape,
            dtype=short_name(the_case.dtype),
            mode=TRAINING,
            ours=timing(1234.567, 0.25),
            limit="product",
            limit_seconds=1.25,
            overhead={"ours": 123e-6},
            memory={"ours": 1234 * 2**20},
        )
        for the_case in cases
    ]
    assert len(rows) > 20
    text = report.format_table(results_of(rows))
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for found in rows:  # each in one line: the table needs no second block
        assert len(re.findall(rf"^ {re.escape(found.shape)} +fwd_bwd .*123 1234$", text, re.MULTILINE)) >= 1
    assert text.count("shape") == 1


def test_columns_that_do_not_fit_go_beneath() -> None:
    sections = {"one": [table.Line(("a", "b"), ["1", "22", "333"]), table.Line(("aa", "b"), "went wrong")]}
    titles = [("over two", "x"), ("", "yyyyy"), ("", "z")]
    assert table.lay_out(("N", "M"), titles, sections, 14) == [
        "      over two",
        " N  M x yyyyy",
        "one",
        " a  b 1    22",
        " aa b  went...",
        "",
        "",
        " N  M   z",
        "one",
        " a  b 333",
        " aa b  went...",
    ]
    assert table.lay_out(("N", "M"), titles, sections, 40)[1] == " N  M x yyyyy   z"


def test_numbers_are_short_and_have_no_exponents() -> None:
    values = [0.00001234, 0.01234, 0.9996, 1.234, 12.34, 123.4, 12345.0, 0.0, None]
    assert [table.number(x) for x in values] == [
        "0.0000",
        "0.0123",
        "1.000",
        "1.23",
        "12.3",
        "123",
        "12345",
        "0.00",
        "-",
    ]
    assert [table.compact(x) for x in (950.0, 9999.0, 12345.0, 4.56e6, 7.8e9, None)] == [
        "950",
        "9999",
        "12.3k",
        "4.56M",
        "7.80G",
        "-",
    ]


def test_noise_is_named() -> None:
    quiet = results_of([row(), row(ours=timing(1.0, 0.5))][:1])
    assert report.noise(quiet) == [] and report.format_noise(quiet) == ""
    noisy = results_of([row(ours=timing(1.0, 0.2))])
    noisy["limits"]["drift"] = -0.3
    noisy["environment"]["load"] = "2.5 processes at the start"
    reasons = report.noise(noisy)
    assert (
        ["20%" in reasons[0], "30%" in reasons[1], "2.5 processes" in reasons[2]] == [True] * 3 == [True] * len(reasons)
    )
    assert "This run was noisy: half of the rows" in report.format_table(noisy)
    noisy["environment"]["load"] = "1.9 processes at the start"
    assert len(report.noise(noisy)) == 2


def test_models_have_tokens_utilisation_and_memory() -> None:
    results = results_of([row(), model(), model(dtype="bf16", ours=None, problem="wrong loss")])
    lines = report.format_models(results).splitlines()
    assert lines[2] == "train_step fp32" and len(lines) == 4
    # 1000 tokens in 0.2, -, 0.1, 0.05 s; 1e9 FLOP of 1e11 FLOP/s.
    assert " ".join(lines[3].split()) == "gpt2 2x500 5000 - 10.0k 20.0k 5% - 10% 20% 80.0 - 40.0 -"
    assert report.format_models(results_of([row()])) == ""


def test_end_to_end_and_environment_are_told() -> None:
    text = report.format_end_to_end(END_TO_END)
    assert "1.50x" in text and "2 MiB" in text and "7.0001" in text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    text = report.format_environment(results_of([row()]))
    assert "processor: a processor, fast" in text and "copy 100 at 0.000976562 MiB, 10 at 1 MiB" in text
    assert "fp32 100, bf16 200 (GFLOP/s)" in text and max(map(len, text.splitlines())) <= report.WIDTH
    nothing = report.collect({"processor": "p"}, Limits({}, {}, {}), [], None, interrupted=True)
    assert "drift" in report.format_environment(nothing)  # interrupted before anything was measured


POINTS = [
    Point("softmax", "fp32", "width", size, threads, 1e-3 * size, 2e-3 * size)
    for threads in (1, 2)
    for size in (64, 128)
]


@pytest.fixture(scope="module")
def drawn() -> tuple[dict, dict[str, str]]:
    """Results that have everything, and their pictures."""
    lengths = [
        row(shape=f"2x3x{n}x64", sizes={"batch": 2, "heads": 3, "length": n}, ours=timing(n / 64))
        for n in (128, 256, 512)
    ]
    rows = [
        *lengths,
        row(operation=HOSTILE, shape=HOSTILE, dtype="bf16", mode=BACKWARD),
        model(),
        row(ours=None, problem=HOSTILE),
    ]
    results = results_of(rows, END_TO_END, scaling=[asdict(point) for point in POINTS])
    return results, pictures.draw(results)


def test_pictures_are_those_with_data(drawn: tuple[dict, dict[str, str]], tmp_path: Path) -> None:
    results, found = drawn
    operations = [f"speedups-{name}" for name in ("attention", HOSTILE, "train_step")]
    assert list(found) == ["speedups", *operations, "roofline", "scaling", "sizes", "errors", "losses"]
    assert list(pictures.plans(results_of([]))) == []
    assert list(pictures.plans(results_of([row(ours=None, problem="wrong")]))) == ["errors"]
    paths = pictures.write_all(results, tmp_path / "new", {"speedups": found["speedups"]})
    assert paths == [tmp_path / "new" / "speedups.svg"] and paths[0].read_text() == found["speedups"]


def test_pictures_show_the_numbers_and_never_change(drawn: tuple[dict, dict[str, str]]) -> None:
    results, found = drawn
    assert pictures.draw(results, ["errors"]) == {"errors": found["errors"]}
    texts = {
        name: [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]
        for name, svg in found.items()
    }
    for name, svg in found.items():
        root = ElementTree.fromstring(svg)
        width, height = (float(root.get(side).removesuffix("pt")) for side in ("width", "height"))
        assert 500 < width < 800 and 100 < height < 800, name
        assert "Matplotlib" not in svg and not re.search(r"<dc:date>|\d{4}-\d\d-\d\d", svg)
    assert {"3.00", "1.50", "0.50", "2x3x128x64 fwd"} <= set(texts["speedups-attention"])
    assert {"attention", HOSTILE, "over torch.compile", "fp32", "bf16"} <= set(texts["speedups"])
    assert {"product, 0.100 TFLOP/s", "copy, main memory", "copy, caches"} <= set(texts["roofline"])
    assert {"fastformer, 1 thread", "torch, 2 threads", "width"} <= set(texts["scaling"])
    assert {"length", "256", "torch, fused"} <= set(texts["sizes"])
    assert "torch, 100 tokens/s" in texts["losses"]


def test_rows_that_differ_in_one_size_are_a_series() -> None:
    def sized(**sizes: int) -> Row:
        return row(sizes=sizes, shape="x".join(map(str, sizes.values())))

    found = [sized(rows=n, columns=64) for n in (8, 4, 16)] + [sized(rows=n, columns=32) for n in (4, 8)]
    found += [row(sizes={"rows": 32, "columns": 64}, shape="32x64 causal"), sized(rows=64, columns=64)]
    found[-1].ours = None
    series = pictures.sizes_series(results_of(found)["rows"])
    assert list(series) == [("attention", "rows", FORWARD, "fp32")]
    assert [x["sizes"]["rows"] for x in series["attention", "rows", FORWARD, "fp32"]] == [4, 8, 16]


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: list[str] = []  # of scripts and styles
        self.cells: list[int] = []  # of each line of each table
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1

    def handle_data(self, data: str) -> None:
        (self.raw if self.cdata_elem else self.texts).append(data)


def test_page_holds_it_all_and_loads_nothing(drawn: tuple[dict, dict[str, str]], tmp_path: Path) -> None:
    results, found = drawn
    noisy = results | {"limits": results["limits"] | {"drift": 0.5}}
    html_report.write(noisy, tmp_path / "new" / "page.html", found)
    text = (tmp_path / "new" / "page.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and len(page.raw) == 2  # ours alone
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    policy = dict(page.tags)["meta"] and [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert "src" not in name and not name.startswith("on") and "//" not in (value or "")
            assert "href" not in name or value.startswith("#")
    assert "url(http" not in text and "@import" not in text

    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert used and {a or b for a, b in used} <= set(ids)
    assert [tag for tag, _ in page.tags].count("svg") == [tag for tag, _ in page.tags].count("figure") == len(found)

    words = " ".join(page.texts)
    assert words.count(HOSTILE) > 5 and "<script>alert" not in text
    assert "This run was noisy: the rate of copies drifted by 50%" in words and "a processor, fast" in words
    assert "needs a GPU" in words and "1.50x as many tokens/s" in words and "train_step" in words
    # Every line of a table has as many cells as its head: the table of all rows has 17 columns.
    assert page.cells.count(17) == 1 + len(results["rows"])


def test_page_of_an_empty_run(tmp_path: Path) -> None:
    html_report.write(results_of([], interrupted=True), tmp_path / "page.html")
    words = " ".join(Page((tmp_path / "page.html").read_text()).texts)
    assert "interrupted" in words and "0 rows" in words and "Pictures" not in words


def repository(root: Path, **files: dict) -> Path:
    """A repository with results and a README that has the markers. The _ of a file's name stand for -."""
    (root / readme_table.RESULTS).mkdir(parents=True)
    for name, results in files.items():
        report.write_json(results, root / readme_table.RESULTS / f"{name.lstrip('_').replace('_', '-')}.json")
    blocks = ["\n".join(readme_table.markers(name)).replace("\n", "\nold\n") for name in ("benchmark", "hugging face")]
    (root / "README.md").write_text("before\n" + "\nbetween\n".join(blocks) + "\nafter")
    return root


def hugging_face(*tasks: tuple[str, str, dict[str, float]]) -> dict:
    """Results of one model: shape, mode, speed-ups."""
    rows = [
        row(operation="hugging_face", shape=shape, mode=mode, peers={name: timing(2 * x) for name, x in faster.items()})
        for shape, mode, faster in tasks
    ]
    return results_of(rows)


def test_readme_shows_the_newest_results_of_each_kind(tmp_path: Path) -> None:
    more = [row(shape=f"{i}x1", dtype="bf16", mode=TRAINING) for i in (2, 3, 4)]
    old, new = (
        results_of([row(shape="1x1")]),
        results_of([row(), *more, model()], END_TO_END),
    )
    models = hugging_face(
        ("gpt 2x16", FORWARD, {"eager": 2.0}),
        ("gpt 2x16", TRAINING, {"eager": 3.0, "sdpa": 1.5}),
        ("gpt 2x16+4", FORWARD, {"sdpa": 0.5}),
    )
    curves = results_of([row(shape="9x9")], scaling=[asdict(point) for point in POINTS])
    names = {
        "_2026_01_02_box": new,
        "_2026_01_01_later": old,
        "_2025_12_31_box_hugging_face": models,
        "_2026_03_01_a_suite_cpu": curves,
    }
    root = repository(tmp_path, **names)
    assert readme_table.main([str(root)]) == 0
    text = (root / "README.md").read_text()
    assert (
        text.startswith("before\n<!--") and text.endswith("-->\nafter") and "\nbetween\n" in text and "old" not in text
    )
    assert "| operation | size | fp32 fwd | bf16 fwd_bwd |" in text and "1x1" not in text and "9x9" not in text
    assert "| `attention` | 2x3x128x64 | 3.00 / 1.50 / 0.50 |  |" in text
    assert "| `attention` | 3x1 |  | 3.00 / 1.50 / 0.50 |" in text and "| 4x1 |" not in text  # the first three sizes
    assert (
        "| train_step | gpt2 2x500 | fp32 | 5000 / - / 10.0k / 20.0k | 5% / - / 10% / 20% | 80.0 / - / 40.0 / - |"
        in text
    )
    assert "**1.50x**" in text and "all of it: [5 rows](benchmarks/results/2026-01-02-box.json). a processor" in text
    assert "| gpt | 2.00 / - | 3.00 / 1.50 | - / 0.50 |" in text
    for picture in re.findall(r"!\[.+\]\((.+)\)", text):
        assert ElementTree.parse(root / picture).getroot().tag.endswith("svg")
    assert len(re.findall(r"!\[", text)) == len(list((root / readme_table.RESULTS / "pictures").iterdir())) == 3

    index = (root / readme_table.RESULTS / "README.md").read_text()
    lines = [line for line in index.splitlines() if line.startswith("| [")]
    assert [line.split("]")[0][3:] for line in lines] == [
        name.lstrip("_").replace("_", "-")
        for name in ("2026_03_01_a_suite_cpu", "2026_01_02_box", "2026_01_01_later", "2025_12_31_box_hugging_face")
    ]
    assert (
        "--suite cpu" in lines[0]
        and lines[1].endswith("| 5 | benchmark |")
        and lines[3].endswith("| 3 | hugging face |")
    )
    assert readme_table.main([str(root)]) == 0 and (root / "README.md").read_text() == text


def test_what_is_outdated_is_found(tmp_path: Path) -> None:
    root = repository(tmp_path, _2026_01_02_box=results_of([row()]))
    index, pictured = root / readme_table.RESULTS / "README.md", root / readme_table.RESULTS / "pictures"
    shown = [pictured / f"benchmark-{name}.svg" for name in ("speedups", "roofline")]
    assert readme_table.outdated(root) == [root / "README.md", index, *shown]
    for path in readme_table.draw(root):
        assert path in shown
    for path, text in readme_table.generate(root).items():
        path.write_text(text)
    assert readme_table.outdated(root) == []
    shown[1].unlink()
    assert readme_table.outdated(root) == [shown[1]]
    readme_table.draw(root)
    report.write_json(results_of([row(shape="7x7")]), root / readme_table.RESULTS / "2026-01-02-box.json")
    assert readme_table.outdated(root) == [root / "README.md", *shown]  # the index still holds
    (index.parent / "2026-01-02-box.json").rename(index.parent / "2026-01-03-box.json")
    assert readme_table.outdated(root) == [root / "README.md", index, *shown]


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("_2026_01_02_box", {"format": 3}, "has format 3, must be 2"),
        ("_2026_01_02_box", {"format": None}, "has format None, must be 2"),
        ("_box", {}, "must be named YYYY-MM-DD-MACHINE"),
        ("_2026_01_02_box", {"interrupted": True}, "failed run is not for the README"),
        ("_2026_01_02_box", {"end_to_end": END_TO_END | {"problem": "differs"}}, "failed run is not for the README"),
        ("_2026_01_02_gpu_triton", {}, "must have <!-- gpu table: begin -->"),
    ],
)
def test_unusable_results_leave_the_readme_alone(
    name: str, change: dict, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = repository(tmp_path, **{name: results_of([row()], **change)})
    before = (root / "README.md").read_text()
    assert readme_table.main([str(root)]) == 2
    assert problem in capsys.readouterr().err
    assert (root / "README.md").read_text() == before and len(list((root / readme_table.RESULTS).iterdir())) == 1


def test_rows_of_the_harness_fit() -> None:
    """From a real case: what the harness gives is what the reports take."""
    results = results_of([*rows_of(case(peers={"eager": double, "sdpa": double})), *rows_of(case(wrong_value))])
    lines = columns_of(results, "latency", "speedup", "error")
    assert lines[0][:3] == ["3x5", FORWARD, table.number(results["rows"][0]["ours"]["median"] * 1e3, 4)]
    assert lines[-1][2:4] == ["wrong", "output:"]
    html_report.page(results, {})
