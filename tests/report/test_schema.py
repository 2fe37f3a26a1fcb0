"""The reports: what is written is read again, the JSON Schema and the page are in step, and what cannot be read is explained."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from regtool.errors import InputError
from regtool.report.files import read_report, write_report
from regtool.report.schema import FORMAT, REPORTS, CohortIdentity, FailureReport, RegistrationReport
from tests.conftest import registration_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_reference", ROOT / "examples" / "report_reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_page_and_schema_are_those_of_the_code(reference: ModuleType) -> None:
    page, schema = (path.read_text(encoding="utf-8") for path in (reference.PAGE, reference.SCHEMA))
    assert reference.written(page) == page, "run python examples/report_reference.py --write"
    assert reference.json_schema() == schema, "run python examples/report_reference.py --write"


def test_every_key_says_what_it_is(reference: ModuleType) -> None:
    records = {record for report in REPORTS for record in (report, *reference.records(report))}
    while more := {inner for r in records for info in r.model_fields.values() for inner in reference.records(info.annotation)} - records:
        records |= more
    assert len(records) > 30
    for record in records:
        for key, info in record.model_fields.items():
            assert info.description, f"{record.__name__}.{key}"


def test_schema_forbids_what_the_models_forbid() -> None:
    found = json.loads((ROOT / "regtool" / "report" / "report.schema.json").read_text(encoding="utf-8"))
    assert {one["$ref"].rpartition("/")[2] for one in found["anyOf"]} == {report.__name__ for report in REPORTS}
    for report in REPORTS:
        one = found["$defs"][report.__name__]
        assert one["additionalProperties"] is False
        assert "format" in one["required"] and one["properties"]["format"]["const"] == FORMAT
    assert found["$defs"]["Jacobian"]["properties"]["sd_log"]["type"] == ["number", "null"]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    scores = {"dice": {"mean": 0.5, "labels": {"1": 0.5}}, "label_interpolation": "nearest"}
    nothing = {"min": 1.0, "max": 1.0, "mean": 1.0, "folding_percent": 0.0, "sd_log": math.nan}
    report = registration_report(before=scores, after=scores, jacobian=nothing, losses=[1.0, math.inf])
    write_report(report, tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(written)[:3] == ["format", "status", "method"]
    assert written["jacobian"]["sd_log"] is None and written["losses"] == [1.0, None]
    assert written["model"] == {"name": None, "sha256": None}  # must be there
    assert "time_points" not in written and "finetuning" not in written  # may be missing
    again = read_report(tmp_path / "report.json", RegistrationReport)
    assert math.isnan(again.jacobian.sd_log)
    assert again.before == report.before and again.fixed == report.fixed
    write_report(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()


def test_a_report_reads_like_its_json() -> None:
    report = registration_report(losses=[1.0])
    assert report["similarity"]["before"] == report.similarity.before
    assert "losses" in report and "finetuning" not in report and "nothing" not in report
    assert dict(report)["losses"] == (1.0,) and "finetuning" not in report.keys()  # noqa: SIM118  # it is no mapping
    for missing in ("finetuning", "nothing"):
        with pytest.raises(KeyError, match=missing):
            report[missing]


def test_a_report_is_immutable_and_takes_no_unknown_key() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        registration_report().status = "qc_failed"
    with pytest.raises(ValidationError, match="colour"):
        registration_report(colour="red")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"format": 99}, RegistrationReport, ("expected format 1, got 99", "newer", "update this regtool")),
        ({"format": None}, RegistrationReport, ("expected format 1, got none", "older", "--overwrite")),
        ({"colour": "red"}, RegistrationReport, ("colour", "red")),
        ({"similarity": {"name": "lncc", "before": "low", "after": 1.0}}, RegistrationReport, ("similarity.before", "'low'")),
        ({"device": None}, RegistrationReport, ("device",)),
        ({}, CohortIdentity, ("no CohortIdentity",)),
        ({}, FailureReport, ("no FailureReport",)),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path: Path, change: dict, kind: type, words: tuple[str, ...]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(registration_report().model_dump() | change))
    with pytest.raises(InputError) as caught:
        read_report(path, kind)
    for word in (str(path), *words):
        assert word in f"{caught.value.what} {caught.value.tip}"


@pytest.mark.parametrize(("text", "word"), [('{"format": 1', "damaged"), ("[1]", "expected a JSON object, got list"), (None, "No such file")])
def test_what_is_no_report(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=word):
        read_report(path, RegistrationReport)
