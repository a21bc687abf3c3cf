"""The page: self-contained, escaped, complete; and its figures for a paper."""

import json
import re
from html.parser import HTMLParser

import pytest
from run_maker import make_run

from wlsup.cli import main
from wlsup.evaluation.report.build import build_report, report_charts
from wlsup.evaluation.report.render import render
from wlsup.evaluation.report.runs import find_runs, read_runs

EVIL = '<script>alert("x")</script>'


def page_of(root, **options):
    runs, refused = read_runs(find_runs([root])[0])
    report = build_report(runs, refused=refused, **options)
    return render(report, version="0", created="today"), report


class Reader(HTMLParser):
    """Notes every element, and every address it points to."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.ids, self.labels = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            attributes[key] for key in ("src", "href", "xlink:href", "action", "srcset") if key in attributes
        ]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.labels += [name for key in ("aria-labelledby",) if key in attributes for name in attributes[key].split()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for approach in ("film", "mae_lm", "lit"):
        for seed in range(3):
            make_run(folder, approach, seed, events=seed == 0)
    return folder


@pytest.fixture(scope="module")
def page(root):
    return page_of(root)[0]


def test_every_section_has_its_content(page):
    for key, said in {
        "findings": "gained", "changes": "points", "front": "Beaten by none", "run": "seeds", "wise-ft": "chosen α",
        "learning": "R@1", "beyond": "probe", "tasks": "held-out pictures", "classes": "right before, wrong after",
        "spectra": "power law", "reconstructions": "data:image/webp", "captions": "a red star", "cost": "core seconds",
        "trained": "adapter.", "reproduce": "wlsup fit -c", "missing": "wise",
    }.items():  # fmt: skip
        section = re.search(rf'<section id="{key}".*?</section>', page, re.DOTALL).group()
        assert said in section.replace("<wbr>", ""), key


def test_it_points_nowhere_but_into_itself_and_runs_nothing(page):
    read = Reader(page)
    assert "script" not in read.tags
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!#|data:)", page)


def test_ids_are_unique_and_every_reference_is_met(page):
    read = Reader(page)
    assert len(set(read.ids)) == len(read.ids)
    inner = {address[1:] for address in read.addresses if address.startswith("#")}
    inner |= set(read.labels) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert inner <= set(read.ids)


def test_a_figure_wears_the_pages_colours_and_has_a_name_a_description_and_its_values(root):
    _, report = page_of(root)
    charts = report_charts(report)
    assert len({chart.key for chart in charts}) == len(charts) >= 10
    for chart in charts:
        svg = chart.svg()
        assert "var(--ink)" in svg
        assert not re.search(r"#[0-9a-fA-F]{6}\b", svg), chart.key
        assert 'role="img"' in svg
        assert f'<title id="{chart.key}-title">' in svg
        assert len(chart.description) > 40
        assert chart.rows
        assert all(len(row) == len(chart.headers) for row in chart.rows)


def test_what_comes_out_of_a_run_is_escaped(tmp_path):
    knn = {f"set{EVIL}": {"domain": d, "pretrained": 0.4, "finetuned": 0.5, "delta": 0.1, "ci95": [0, 0.2], "test": 9}
           for d in ("in",)}  # fmt: skip
    knn |= {"away": {"domain": "out", "pretrained": 0.4, "finetuned": 0.5, "delta": 0.1, "ci95": [0, 0.2], "test": 9}}
    samples = [{"key": EVIL, "generated": EVIL, "references": [EVIL]}]
    captioning = {"generation": EVIL, "pictures": 1, "references": 1, "absent": {},
                  "scores": {"loss": {"value": 1.0, "ci95": [0, 2]}}, "samples": samples}  # fmt: skip
    task = {"title": EVIL, "note": EVIL, "rows": [{"what": EVIL, "value": 1, "unit": EVIL}]}
    names = dict.fromkeys(("approach", "preset", "protocol", "note"), EVIL)
    folder = make_run(tmp_path, "film", 0, knn=knn, captioning=captioning, task=task, **names)
    (folder / "config.yaml").write_text(f"a: '{EVIL}'\n")
    page, _ = page_of(tmp_path, title=EVIL)
    assert "<script" not in page
    assert "script" not in Reader(page).tags
    assert "&lt;script&gt;" in page


def test_runs_with_results_alone_make_a_page_that_says_what_is_missing(tmp_path):
    for seed in range(2):
        make_run(tmp_path, "film", seed, whole=False, captioning={}, task=None, retrieval={})
    page, _ = page_of(tmp_path)
    for piece in ("wise_ft.json", "spectra.json", "evaluation.json", "TensorBoard events"):
        assert piece in page.replace("<wbr>", "")
    assert "2 of 2" in page


def test_no_change_stands_without_its_interval(page):
    table = re.search(r'<section id="changes".*?</table>', page, re.DOTALL).group()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)
    bare = [cell for cell in cells if re.search(r'class="value">[^<]', cell) and 'class="detail">' not in cell]
    assert cells
    assert not bare
    assert "knn-dino:v1" in table


@pytest.mark.slow
def test_the_command_writes_page_figures_and_json(root, tmp_path, capsys):
    output, figures = tmp_path / "deep" / "r.html", tmp_path / "figures"
    (root / "film" / "seed9").mkdir(exist_ok=True)
    (root / "film" / "seed9" / "config.yaml").write_text("{}")
    assert main(["report", str(root / "film"), "-o", str(output), "--figures", str(figures), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(output)
    assert told["unfinished"] == [str(root / "film" / "seed9")]
    (group,) = told["groups"]
    assert (group["approach"], group["seeds"]) == ("film", [0, 1, 2])
    assert group["out_of_domain_delta"]["over"] == "seeds"
    assert len(group["out_of_domain_delta"]["ci95"]) == 2
    assert set(told["pareto_front"]) <= {"film", "pretrained"}
    assert "<h1>" in output.read_text()
    assert {f.suffix for f in figures.iterdir()} == {".png", ".svg"}
    assert len(list(figures.iterdir())) == len(told["figures"]) > 10
    assert all("var(--" not in f.read_text() for f in figures.glob("*.svg"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report"], "RUN"),
        (["report", "nowhere"], "No folder nowhere"),
        (["report", "tests", "-o", "tests"], "is a folder"),
        (["report", "tests", "--figures", "setup.cfg"], "is a file"),
        (["report", "experiments/overlays"], "No finished run"),
    ],
)
def test_a_mistake_is_one_message(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("runs", "subject"),
    [
        ([("film", 1), ("lora", 1)], "2 approaches"),
        ([("film", 1), ("film", 2)], "2 settings of film"),
        ([("film", 1), ("film", 2), ("lora", 1)], "2 approaches, in 3 settings,"),
        ([("film", 1)], "film"),
    ],
)
def test_the_title_counts_approaches_not_rows(runs, subject, tmp_path):
    for approach, steps in runs:
        make_run(tmp_path / f"{steps}", approach, 0, steps=steps)
    assert page_of(tmp_path)[1].title == f"What {subject} did to an encoder"
