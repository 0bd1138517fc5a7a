"""What the README and the docs say: figures are those of the records, and the code in them runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest

import thresher
from helpers import build, config_of, make, tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def records() -> ModuleType:
    spec = importlib.util.spec_from_file_location("records", ROOT / "benchmarks" / "records.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_records(records: ModuleType) -> None:
    assert len(records.DOCUMENTS) > 4
    for name in records.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "<!-- figures:" in text
        assert records.fill(text) == text, f"run `python benchmarks/records.py --write` to bring {name} up to date"


def test_every_picture_and_page_that_is_named_is_there() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_results_file_is_shown(records: ModuleType) -> None:
    shown = "".join((ROOT / name).read_text(encoding="utf-8") for name in records.DOCUMENTS)
    for file in records.RESULTS.glob("*.json"):
        assert f"<!-- figures:{file.stem} -->" in shown, f"{file.name} stands in no document"


def test_every_record_is_whole(records: ModuleType) -> None:
    fields = {"id", "what", "value", "unit", "target", "baseline", "spread", "command", "data", "split"}
    fields |= {"examples", "seeds", "machine", "versions", "date", "note"}
    entries = records.all_entries()
    assert entries
    for entry in entries.values():
        assert set(entry) - {"cell", "shown"} == fields
        assert set(entry.get("shown", ())) <= set(entry["spread"] or ())
        assert len(entry.get("cell", "abc")) == 3
        script = ROOT / entry["command"].split()[1]
        assert script.is_file(), f"{entry['id']} names a script that is not there"
        assert records.holds(entry) in (True, False, None)


def test_a_missed_target_says_so(records: ModuleType) -> None:
    entry = {
        "id": "x",
        "what": "x",
        "seeds": [0],
        "value": 0.7,
        "unit": "x",
        "target": ">= 0.8",
        "spread": None,
        "baseline": "",
    }
    assert "**missed**" in records.markdown([entry])
    assert "**missed**" not in records.markdown([{**entry, "target": "<= 0.8"}])


def test_the_five_lines_of_the_readme_run(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    make("bert").save_pretrained(tmp_path / "my-model")
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-model-fast" / "thresher.json").is_file()


def test_the_pairs_of_the_readme_run(tmp_path: Path) -> None:
    code = re.search(
        r"```python\n(from thresher import pairs.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert code
    build(config_of("bert", max_position_embeddings=512), "base").save_pretrained(tmp_path / "my-encoder")
    tokenizer().save_pretrained(tmp_path / "my-encoder")
    data = "texts = ['w5 w6', 'w7 w8']\nrows = [{'query': 'w5', 'positive': 'w5 w9'}, {'query': 'w7', 'positive': 'w7 w9'}]\n"
    data += "import datasets\nrows = datasets.Dataset.from_list(rows)\n"
    done = subprocess.run([sys.executable, "-c", data + code[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_rationales_of_the_readme_run() -> None:
    code = re.search(
        r"```python\n(from thresher.measure.rationales.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert code
    documents = [{"tokens": ["w5", "w6", "w7", "w8"], "label": 1, "rationales": [[1, 3]]}] * 2
    known = {
        "thresher": thresher,
        "documents": datasets.Dataset.from_list(documents),
        "tokenizer": tokenizer(),
        "model": thresher.attach(make("bert"), "attention-mass"),
    }
    exec(code[1], known)


def test_every_target_the_readme_names_is_in_the_makefile() -> None:
    named = set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_make_knows_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "--dry-run", "test", "demo", "lint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_records_with_a_cell_become_a_table_of_methods(records: ModuleType) -> None:
    def entry(id: str, value: float, **more: object) -> dict[str, object]:
        spread = {"flops_speedup": 1.5, "standard_error": 0.25}
        return {"id": id, "what": id, "value": value, "unit": "points", "target": None, "spread": spread,
                "baseline": "the start", "seeds": [0], **more}  # fmt: skip

    said = records.markdown(
        [
            entry("alone", 3.0),
            entry("a", 1.0, cell=["F1 lost", "LTP", "1.5x"]),
            entry("b", -0.126, cell=["F1 lost", "ASE", "2.0x"]),
        ]
    )
    assert said.count("| alone |") == 1
    assert "| F1 lost | 1.5x | 2.0x |\n|---|---|---|\n| LTP | 1.00 ± 0.25 (1.50x) | - |\n| ASE | - | -0.13" in said
    assert said.endswith("Against the start.")
