"""Which column is what."""

import json
from pathlib import Path

import pytest

from moectl.csr.columns import CONCEPT_SETS, Columns, normalised, read_table, roles
from moectl.engine.errors import UserError

FINDINGS = [
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
]
DIAGNOSES = ["COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"]


def table_of(names, folder, row=None):
    path = folder / "labels.csv"
    path.write_text(",".join(names) + "\n" + ",".join(row or ["0"] * len(names)) + "\n")
    return read_table(path)


def found(table, columns=None):
    """The names of the concepts and of the targets."""
    result = roles(table, columns or Columns())
    return [[table.header[place] for place in places] for places in result[:2]]


@pytest.fixture
def vindr(tmp_path):
    return table_of(["image_id", "rad_id", *FINDINGS, *DIAGNOSES], tmp_path)


def test_other_lesion_is_a_concept_and_other_diseases_a_target(vindr):
    assert found(vindr) == [FINDINGS, DIAGNOSES]
    assert (len(FINDINGS), len(DIAGNOSES)) == (22, 6)


def test_the_rule_does_not_see_case_and_skips_what_is_no_label(tmp_path):
    names = ["Image_ID", "RAD_ID", "Patient ID", "split", "", "EDEMA", "no FINDING", "lung tumor"]
    assert found(table_of(names, tmp_path)) == [["EDEMA"], ["no FINDING", "lung tumor"]]


def test_named_set_gives_14_concepts_in_its_order(vindr):
    concepts, targets = found(vindr, Columns(concept_set="vinbigdata14"))
    assert concepts == list(CONCEPT_SETS["vinbigdata14"])
    assert len(concepts) == 14
    assert targets == DIAGNOSES


def test_missing_column_of_the_named_set_is_named(tmp_path):
    names = ["image_id", *(name for name in FINDINGS if name != "ILD"), *DIAGNOSES]
    with pytest.raises(UserError, match=r"labels\.csv: has no column 'ILD'"):
        roles(table_of(names, tmp_path), Columns(concept_set="vinbigdata14"))


def test_lists_win_over_set_file_and_rule(vindr, tmp_path):
    listed = {"concepts": ["Edema", "ILD"], "targets": ["COPD"]}
    (tmp_path / "columns.json").write_text(json.dumps(listed))
    assert found(vindr) == [["Edema", "ILD"], ["COPD"]]
    assert len(found(vindr, Columns(concept_set="vinbigdata14"))[0]) == 14
    columns = Columns(concepts=("lung_cyst",), concept_set="vinbigdata14", targets=("no finding",))
    assert found(vindr, columns) == [["Lung cyst"], ["No finding"]]


def test_file_may_lie_elsewhere(vindr, tmp_path):
    file = tmp_path / "roles.json"
    file.write_text(json.dumps({"concepts": ["Pneumonia"], "targets": ["No finding"]}))
    assert found(vindr, Columns(file=file)) == [["Pneumonia"], ["No finding"]]


def test_explicit_concept_is_no_target_any_more(vindr):
    assert found(vindr, Columns(concepts=("Edema", "Pneumonia"))) == [
        ["Edema", "Pneumonia"],
        [name for name in DIAGNOSES if name != "Pneumonia"],
    ]


def test_explicit_target_is_no_concept_any_more(vindr):
    assert found(vindr, Columns(targets=("Edema",)))[0] == [n for n in FINDINGS if n != "Edema"]


def test_table_without_targets_says_how_to_name_them(tmp_path):
    with pytest.raises(UserError, match="no column is taken for one of the targets") as error:
        roles(table_of(["image_id", "Edema", "ILD"], tmp_path), Columns())
    assert "data.target_columns" in error.value.hint


@pytest.mark.parametrize(
    "document", ["[]", '{"concepts": ["a"]}', '{"concepts": 1, "targets": []}']
)
def test_file_of_another_form_is_refused(vindr, tmp_path, document):
    (tmp_path / "columns.json").write_text(document)
    with pytest.raises(
        UserError, match=r"columns\.json: '(concepts|targets)' is .*expected a list"
    ):
        roles(vindr, Columns())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Other diseases", "other disease"),
        ("Other disease(s)", "Other_Disease"),
        ("Pleural thickening", " PLEURAL_THICKENING"),
    ],
)
def test_names_that_are_the_same(one, other):
    assert normalised(one) == normalised(other)


def test_lesion_is_not_disease():
    assert normalised("Other lesion") != normalised("Other disease")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no row"),
        (b"image_id,a\n", "holds no row"),
        (b"image_id,a\nx,1\ny,1,1\n", "line 3: 3 values, but the header names 2 columns"),
        (b"image_id,Lung cyst,lung_cyst\nx,1,1\n", "same name: Lung cyst and lung_cyst"),
        (b"image_id;a\nx;1\n", "columns are separated by semicolons, expected commas"),
        (b"\xef\xbb\xbfimage_id\ta\nx\t1\n", "columns are separated by tabs, expected commas"),
        (b"image_id,a\n\xff,1\n", r"cannot be read \(not a CSV file in UTF-8\)"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"labels\.csv.*{message}"):
        read_table(path)


def test_missing_table_is_named():
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read \(No such file"):
        read_table(Path("nowhere.csv"))


def test_byte_order_mark_spaces_and_empty_lines_do_not_count(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbfimage_id, a\r\n\r\nx , 1\r\n")
    table = read_table(path)
    assert (table.header, table.rows, table.lines) == (["image_id", "a"], [["x", "1"]], [3])
