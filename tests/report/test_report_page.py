import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from tenfold.errors import UserError
from tenfold.report import write_report

pytestmark = pytest.mark.unit

SECTIONS = [
    "Before and after",
    "Latency",
    "Accuracy and loss",
    "Density",
    "Layers",
    "Exported files",
    "Machine and versions",
    "Recipe",
    "How to reproduce",
]
VOID = {"meta", "link", "br", "hr", "img", "input", "col"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order, every id once."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.heard: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
            self.heard.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.heard[tag][-1] += data

    def all(self, tag: str) -> list[str]:
        """Return the text of every such element, spaces evened out."""
        return [" ".join(text.split()) for text in self.heard.get(tag, [])]


def written(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_a_complete_run_has_every_section_in_order(save, contents) -> None:
    page = Page(written(save(contents)))
    assert page.all("h1") == ["lbc-run"]
    assert page.all("h2") == SECTIONS
    assert page.all("title")[0] == "lbc-run – tenfold report"
    assert len(page.ids) == len(set(page.ids))
    assert not any("class" in found and found["class"] == "missing" for _, found in page.tags)


def test_the_headline_says_before_and_after_and_the_verdict(save, contents) -> None:
    page = Page(written(save(contents)))
    text = " ".join(page.all("header"))
    assert "No gain yet: lbc is not faster than dense." in text
    assert "before: 97.0 % → after: 96.5 % −0.48 points" in text
    assert "before: 1.11 MB → after: 635 kB −42.8 % · packed" in text
    assert "before: 40.8 M → after: 20.7 M −49.3 % · a count, not a time" in text
    assert "before: 272 k → after: 139 k −49.1 %" in text
    assert "0.912 ms → after: 0.903 ms no gain · 1.01× in onnxruntime at batch 1" in text
    assert "faster in 0 of 3 settings" in text


def test_the_tables_hold_the_numbers(save, contents) -> None:
    page = Page(written(save(contents)))
    rows = page.all("tr")
    assert "Accuracy 97.0 % 96.5 % −0.48 points" in rows
    assert "Bytes, packed – 635 kB −42.8 %" in rows
    assert "pytorch 1 dense 3.21 2.89 – 3.53 312 reference" in rows
    assert "lbc 3.24 2.92 – 3.57 308 0.99× 0.97 – 1.01 no gain" in rows
    assert any(row.startswith("conv1 100.0 %") and "first convolution" in row for row in rows)
    assert any(row.startswith("layer1.0.conv1 50.0 % 2.36 M 1.18 M 2:4") for row in rows)
    assert "model.onnx onnx 1.10 MB openvino 3 1.2 × 10⁻⁷" in rows
    everything = " ".join(page.all("main"))
    assert "torch.utils.flop_counter FLOPs / 2" in everything
    assert "Not measured: torch.compile (no C++ compiler found)." in everything
    assert "Zeros alone give no speed." in everything
    assert "memory 24.0 GiB" in everything
    assert "onnxruntime version 9.9.9" in everything


def test_a_gain_and_a_loss_are_said_as_plainly(save, contents) -> None:
    contents["bench.json"]["latency"][1] |= {"ratio": 1.4, "verdict": "faster"}
    contents["bench.json"]["latency"][3] |= {"ratio": 0.7, "verdict": "slower"}
    page = Page(written(save(contents)))
    assert "faster · 1.40× in pytorch at batch 1; faster in 1 of 3" in page.all("header")[0]
    styles = [found.get("class") or "" for tag, found in page.tags if tag == "td"]
    assert [name.split()[-1] for name in styles if "verdict" in name] == [
        "faster",
        "slower",
        "even",
    ]


def test_what_is_missing_is_said_with_the_command_that_makes_it(run: Path) -> None:
    page = Page(written(run))
    assert page.all("h2") == [name for name in SECTIONS if name != "Density"]
    told = [text for text in page.all("p") if text.endswith((str(run), "onnx", "recipe.yaml"))]
    assert len(told) == len(SECTIONS) - 1
    assert sum(f"tenfold bench {run}" in text for text in told) == 3
    assert sum(f"tenfold export {run} --to onnx" in text for text in told) == 1
    assert sum("tenfold train" in text for text in told) == 4
    assert page.all("svg") == []


@pytest.mark.parametrize(
    ("left_out", "section"),
    [
        ("bench.json", "Before and after"),
        ("metrics.csv", "Accuracy and loss"),
        ("layers.json", "Layers"),
        ("export/export.json", "Exported files"),
        ("recipe.yaml", "Recipe"),
    ],
)
def test_one_missing_file_leaves_the_rest(save, contents, left_out: str, section: str) -> None:
    del contents[left_out]
    page = Page(written(save(contents)))
    by_heading = dict(zip(page.all("h2"), page.all("section"), strict=True))
    assert "tenfold" in by_heading[section]
    assert sum(found.get("class") == "missing" for _, found in page.tags) == (
        3 if left_out == "bench.json" else 1
    )


def test_without_a_bench_the_headline_takes_curves_and_layers(save, contents, run: Path) -> None:
    del contents["bench.json"]
    (run.parent / "dense").mkdir()
    (run.parent / "dense" / "metrics.csv").write_text("epoch,test_accuracy\n0,0.98\n")
    contents["run.json"]["baseline"] = "runs/dense"
    text = Page(written(save(contents))).all("header")[0]
    assert "before: 98.0 % → after: 96.5 %" in text
    assert "before: 4.72 M → after: 3.54 M −25.0 %" in text
    assert "not been measured yet" in text


def test_the_baseline_is_drawn_beneath(save, contents, run: Path) -> None:
    def curves(text: str, role: str) -> int:
        return sum(
            found.get("class", "").startswith(f"curve {role}")
            for svg in re.findall(r"<svg class=\"chart\".*?</svg>", text)
            for found in ElementTree.fromstring(svg).iter("path")
        )

    alone = written(save(contents))
    assert "this run stands alone" in alone
    assert (curves(alone, "after"), curves(alone, "before")) == (5, 0)
    (run.parent / "dense").mkdir()
    (run.parent / "dense" / "metrics.csv").write_text(
        "epoch,test_accuracy,test_loss\n0,0.9,0.5\n1,0.98,0.4\n"
    )
    contents["run.json"]["baseline"] = "runs/dense"
    compared = written(save(contents))
    assert (curves(compared, "after"), curves(compared, "before")) == (5, 2)
    assert "before 98.0 %" in compared.replace("\u00a0", " ")
    contents["run.json"]["baseline"] = "runs/gone"
    assert "no metrics.csv in runs/gone" in written(save(contents))


def test_one_epoch_and_one_model(save, contents) -> None:
    contents["metrics.csv"] = "epoch,train_loss,test_accuracy,density\n0,0.5,0.9,0.5\n"
    bench = contents["bench.json"]
    bench["models"] = ["dense"]
    bench["latency"] = [row for row in bench["latency"] if row["model"] == "dense"]
    page = Page(written(save(contents)))
    assert page.all("h2") == SECTIONS
    # Nothing to compare with: no arrow but that of dense against effective work.
    assert page.all("header")[0].count("→") == 1


def test_more_than_two_models(save, contents) -> None:
    bench = contents["bench.json"]
    bench["models"] = ["dense", "lbc", "c", "d", "e", "f"]
    row = bench["latency"][1]
    bench["latency"] += [row | {"model": name, "ratio": 2.0} for name in "cdef"]
    page = Page(written(save(contents)))
    text = " ".join(page.all("main"))
    assert "The figures compare dense with f." in text
    # A model without size or accuracy shows dashes, one row has every model.
    assert "Accuracy 97.0 % 96.5 % −0.48 points – – – – – – – –" in page.all("tr")
    assert "0.99×" in " ".join(page.all("svg"))


def test_missing_numbers_show_a_dash(save, contents) -> None:
    row = contents["bench.json"]["latency"][1]
    row |= {"median_ms": float("nan"), "p10_ms": None, "ratio": None, "verdict": None}
    contents["layers.json"]["layers"][0] |= {"kept": None, "macs": None, "shape": None}
    page = Page(written(save(contents)))
    assert "lbc – – 308 – 0.97 – 1.01 –" in page.all("tr")
    assert "nan" not in " ".join(page.all("main")).lower()


def strings(data: object, hostile: str) -> object:
    """Return the same data with every string replaced, but for those that must match others."""
    if isinstance(data, dict):
        kept = {"model", "models", "accuracy", "size"}
        return {
            key: value if key in kept else strings(value, hostile) for key, value in data.items()
        } | {hostile: hostile}
    if isinstance(data, list):
        return [strings(value, hostile) for value in data]
    return hostile if isinstance(data, str) else data


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7 * 7 }}",
        "\x00\x1b\ud800",
    ],
)
def test_no_value_is_live(save, contents, hostile: str) -> None:
    contents = {
        name: data if isinstance(data, str) else strings(data, hostile)
        for name, data in contents.items()
    }
    for row in contents["bench.json"]["latency"]:
        row["model"] = hostile if row["model"] == "lbc" else row["model"]
    contents["bench.json"]["models"] = ["dense", hostile]
    if hostile.isprintable():
        contents["recipe.yaml"] = hostile
    text = written(save(contents))
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    if hostile.isprintable():
        assert page.all("h1") == [hostile]
        assert hostile in page.all("pre")[0]


def test_nothing_is_loaded_from_elsewhere(save, contents) -> None:
    text = written(save(contents))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "xlink:href"} & set(found) for _, found in page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    policies = [found for _, found in page.tags if found.get("http-equiv")]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_every_drawing_is_valid_xml_and_named(save, contents) -> None:
    text = written(save(contents))
    drawings = [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    ]
    charts = [found for found in drawings if found.get("class") == "chart"]
    # Two batch sizes, accuracy, loss, density, learning rate.
    assert len(charts) == 6
    assert all(found.findtext("title") and found.findtext("desc") for found in charts)
    others = [found for found in drawings if found.get("class") != "chart"]
    assert others
    assert all(found.get("aria-hidden") == "true" for found in others)


def test_tables_are_accessible(save, contents) -> None:
    page = Page(written(save(contents)))
    tables = [found for tag, found in page.tags if tag == "table"]
    assert len(tables) == len(page.all("caption")) == 4
    assert all(found.get("scope") for tag, found in page.tags if tag == "th")
    regions = [found for _, found in page.tags if found.get("role") == "region"]
    assert len(regions) == 4
    assert all(found.get("aria-labelledby") in page.ids for found in regions)


def test_running_again_replaces_the_page(save, contents, run: Path) -> None:
    first = write_report(save(contents))
    assert first == run / "report.html"
    before = sorted(path.name for path in run.iterdir())
    contents["run.json"]["name"] = "second"
    assert Page(written(save(contents))).all("h1") == ["second"]
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_output_may_be_a_file_or_a_folder(run: Path, tmp_path: Path) -> None:
    asked = tmp_path / "new" / "page.html"
    assert write_report(run, asked) == asked
    assert asked.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert write_report(run, tmp_path) == tmp_path / "report.html"
    assert not (run / "report.html").exists()


def test_a_place_that_cannot_be_written_and_a_run_that_is_broken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="report can't be written to"):
        write_report(run, tmp_path / "file" / "report.html")
    page = write_report(run).read_text(encoding="utf-8")
    (run / "bench.json").write_text("{")
    with pytest.raises(UserError, match=r"bench\.json"):
        write_report(run)
    # The page of before is still whole.
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_importing_loads_no_template_engine() -> None:
    code = "import sys, tenfold.report; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_contrast_in_light_dark_and_print() -> None:
    style = (resources.files("tenfold.report") / "style.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 3
    read = ["ink", "quiet", "before", "after", "other-1", "other-2", "other-3", "faster", "slower"]
    for theme in themes:
        for background in ("paper", "code"):
            for name in read:
                pair = sorted((luminance(theme[name]), luminance(theme[background])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, background)
