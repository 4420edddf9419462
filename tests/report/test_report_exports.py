import csv
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastood.errors import DataError
from fastood.report import (
    console_table,
    openood_npz,
    print_results,
    save_figure,
    setar_csv,
    to_csv,
    to_latex,
    to_markdown,
)
from fastood.report.metricview import MetricView


def results_of(*rows, sets=("a", "b")):
    """Results with FPR values given per score: (name, [ID positive...], [OOD positive...])."""
    metrics = []
    for name, by_id, by_ood in rows:
        for i, set_name in enumerate(sets):
            values = {"AUROC": 0.9 - i / 10, "FPR95-ID": by_id[i], "FPR95-OOD": by_ood[i]}
            metrics.append({"set": set_name, "score": name, "n_id": 10, "n_ood": 20, **values})
    return {"schema": 1, "metrics": metrics}


def printed(results, width=140, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_results(results, console=console, **options)
    return console.file.getvalue()


def test_console_shows_both_conventions_in_percent(sample):
    text = printed(sample.results, intervals=False)
    assert "ID positive" in text and "OOD positive" in text and "average" in text
    for row in sample.results["metrics"]:
        for key in ("AUROC", "FPR95-ID", "FPR95-OOD"):
            assert f"{100 * row[key]:.2f}" in text
    assert "ID accuracy" in text and "conventions" in text
    row = sample.results["metrics"][0]["intervals"]["AUROC"]
    assert f"{100 * row[0]:.1f}–{100 * row[1]:.1f}" in printed(
        sample.results, width=200, intervals=True
    )


def test_console_marks_the_best_and_leaves_brackets_alone():
    results = results_of(("[red]x[/red]", [0.2, 0.2], [0.3, 0.3]), ("y", [0.5, 0.5], [0.6, 0.6]))
    text = printed(results)
    assert "[red]x[/red]" in text
    column = console_table(results).columns[3]
    styles = [str(cell.style) for cell in column.cells]
    assert styles == ["bold green", ""] * 3


def test_reversal_is_found_and_names_the_winners():
    results = results_of(
        ("mcm", [0.40, 0.46], [0.30, 0.44]), ("gl", [0.30, 0.40], [0.36, 0.46]), sets=("a", "b")
    )
    found = MetricView(results).reversal()
    assert (found.by_id, found.by_ood, found.best_differs) == ("gl", "mcm", True)
    assert found.id_values == pytest.approx((0.35, 0.43))
    assert found.ood_values == pytest.approx((0.41, 0.37))
    assert "name different winners: gl is ahead of mcm with ID positive" in " ".join(
        printed(results).split()
    )


def test_reversal_below_the_winner_and_none():
    lower = results_of(
        ("best", [0.1], [0.1]), ("p", [0.3], [0.5]), ("q", [0.4], [0.4]), sets=("a",)
    )
    found = MetricView(lower).reversal()
    assert (found.by_id, found.by_ood, found.best_differs) == ("p", "q", False)
    agree = results_of(("p", [0.1], [0.1]), ("q", [0.4], [0.4]), sets=("a",))
    assert MetricView(agree).reversal() is None
    tie = results_of(("p", [0.1], [0.1]), ("q", [0.1], [0.4]), sets=("a",))
    assert MetricView(tie).reversal() is None


def test_a_missing_average_is_the_plain_mean():
    view = MetricView(results_of(("p", [0.1, 0.3], [0.2, 0.4])))
    cell = view.cell("average", "p", "FPR95-ID")
    assert cell.value == pytest.approx(0.2) and cell.interval == ""
    assert view.columns == ["a", "b", "average"]


def test_other_tpr_levels_are_named():
    results = results_of(("p", [0.1], [0.2]), sets=("a",))
    for row in results["metrics"]:
        row["FPR90-ID"], row["FPR90-OOD"] = row.pop("FPR95-ID"), row.pop("FPR95-OOD")
    view = MetricView(results)
    assert view.fpr_keys() == ("FPR90-ID", "FPR90-OOD")
    assert [m.title for m in view.metrics] == ["AUROC", "FPR90, ID positive", "FPR90, OOD positive"]
    assert "90 % of the ID images are kept" in view.metrics[1].detail


def test_markdown(sample):
    text = to_markdown(sample.results)
    lines = text.splitlines()
    assert len(lines) == 2 + 3 * 4
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1
    best = max(r["AUROC"] for r in sample.results["metrics"] if r["set"] == "average")
    assert f"**{100 * best:.2f}**" in text
    assert "&lt;i>" in text and "delta\\_energy" in text
    odd = results_of(("a|b", [0.1], [0.2]), sets=("x\ny",))
    assert to_markdown(odd).splitlines()[2].startswith("| x y | a\\|b | ")
    assert "(" in to_markdown(sample.results, intervals=True).splitlines()[2]


def test_latex(sample):
    text = to_latex(sample.results, digits=1)
    assert text.startswith(r"\begin{tabular}{llrrrrr}") and text.count(r"\midrule") == 3
    assert r"delta\_energy" in text and r"textures \& <i>shapes</i>" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {6}
    worst = results_of((r"\input{x}$%#^~", [0.1], [0.2]), sets=("a",))
    assert r"\textbackslash{}input\{x\}\$\%\#\textasciicircum{}\textasciitilde{}" in to_latex(worst)


def test_csv_keeps_fractions_exactly(sample):
    rows = list(csv.DictReader(io.StringIO(to_csv(sample.results))))
    expected = {(r["set"], r["score"]): r for r in sample.results["metrics"]}
    assert len(rows) == len(expected)
    for row in rows:
        source = expected[row["set"], row["score"]]
        assert float(row["FPR95-OOD"]) == source["FPR95-OOD"]
        assert float(row["AUROC_low"]) == source["intervals"]["AUROC"][0]
        assert int(row["n_ood"]) == source["n_ood"]


def test_figure(sample, tmp_path):
    file = save_figure(sample.results, sample.table, tmp_path / "deep" / "figure.png", dpi=60)
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width > 200
        colors = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colors, axis=0)) > 30
    with pytest.raises(ValueError, match="score: expected one of"):
        save_figure(sample.results, sample.table, tmp_path / "x.png", score="nope")
    assert not (tmp_path / "x.png").exists()


def test_setar_csv(tmp_path):
    file = tmp_path / "scores_OOD_Sun_test.csv"
    file.write_text("mcm_score,gl_mcm_score\n-0.00105,-0.0021\n-0.00107,-0.0023\n")
    scores = setar_csv(file)
    assert list(scores) == ["mcm", "gl_mcm"]
    assert scores["mcm"].higher == "ood" and scores["mcm"].name == "Sun"
    assert scores["gl_mcm"].toward("id").tolist() == [0.0021, 0.0023]


@pytest.mark.parametrize("text", ["", "mcm_score\n", "mcm_score\nx\n", "a,b\n1\n", "a,b\n1,2\n3\n"])
def test_setar_csv_of_something_else(tmp_path, text):
    file = tmp_path / "scores.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=r"scores\.csv: expected a header"):
        setar_csv(file)
    with pytest.raises(DataError, match="cannot be read"):
        setar_csv(tmp_path / "none.csv")


def test_openood_npz(tmp_path):
    np.savez(tmp_path / "dtd.npz", pred=[1, 0, 2], conf=[0.2, 0.9, 0.3], label=[-1, 4, -1])
    sides = openood_npz(tmp_path / "dtd.npz")
    assert sides["id"].values.tolist() == [0.9] and sides["ood"].values.tolist() == [0.2, 0.3]
    assert sides["id"].higher == sides["ood"].higher == "id" and sides["ood"].name == "dtd"
    np.savez(tmp_path / "only.npz", conf=[0.2], label=[-1])
    assert list(openood_npz(tmp_path / "only.npz")) == ["ood"]


def test_openood_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", conf=[0.2, 0.3], label=[-1])
    np.savez(tmp_path / "b.npz", conf=[0.2])
    np.savez(tmp_path / "c.npz", conf=np.array([{}], dtype=object), label=[1])
    np.save(tmp_path / "d.npy", np.zeros(3))
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 no")
    for name in ("a.npz", "b.npz", "c.npz", "d.npy", "e.npz", "none.npz"):
        with pytest.raises(DataError, match=name):
            openood_npz(tmp_path / name)


def test_import_is_lazy():
    code = (
        "import sys, fastood.report, fastood.report.table, fastood.report.html, "
        "fastood.report.figure, fastood.report.console; "
        "print([m for m in ('matplotlib', 'jinja2', 'pyarrow', 'rich', 'PIL', 'torch') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
