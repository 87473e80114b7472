"""Label tables."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moectl.csr.columns import CONCEPT_SETS, Columns
from moectl.csr.tables import Labels, balanced, frequent, read_labels, split
from moectl.engine.errors import UserError

FINDINGS = [
    *CONCEPT_SETS["vinbigdata14"],
    *("Clavicle fracture", "Edema", "Emphysema", "Enlarged PA"),
    *("Lung cavity", "Lung cyst", "Mediastinal shift", "Rib fracture"),
]
DIAGNOSES = ["COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"]
RARE = {
    "Edema": 13,
    "Clavicle fracture": 27,
    "Lung cyst": 33,
    "COPD": 36,
    "Lung cavity": 51,
    "Emphysema": 81,
    "Rib fracture": 90,
}


@pytest.fixture
def write(tmp_path):
    """Write lines as a table and return its path."""

    def file(*lines, name="labels.csv"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return file


def vindr_line(image, reader, *positive):
    names = FINDINGS + DIAGNOSES
    assert set(positive) <= set(names)
    return ",".join([image, reader, *(str(int(name in positive)) for name in names)])


@pytest.fixture
def vindr(write):
    """Two images, three readers each."""
    return write(
        ",".join(["image_id", "rad_id", *FINDINGS, *DIAGNOSES]),
        vindr_line("x", "R1", "ILD", "Pneumonia"),
        vindr_line("y", "R1", "No finding"),
        vindr_line("x", "R2", "ILD", "Other lesion"),
        vindr_line("x", "R3", "No finding"),
        vindr_line("y", "R3", "No finding"),
        vindr_line("y", "R2", "Edema", "Other diseases"),
    )


def positives(labels, image):
    row = labels.image_ids.index(image)
    values = [*labels.concept_values[row], *labels.target_values[row]]
    return {n: float(v) for n, v in zip(labels.concepts + labels.targets, values, strict=True) if v}


def labels_of(concepts, targets, patients=None):
    """Labels with these values, of images numbered as text."""
    concepts, targets = np.asarray(concepts, np.float32), np.asarray(targets)
    ids = [str(number) for number in range(len(concepts))]
    width = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    return Labels(
        ids,
        [f"concept {number}" for number in range(concepts.shape[1])],
        [f"target {number}" for number in range(width)],
        concepts,
        targets,
        patients or ids,
        {},
    )


def plain(count, patients=None):
    draws = np.random.default_rng(0)
    values = (draws.random((count, 5)) < 0.3).astype(np.float32)
    return labels_of(values[:, :3], values[:, 3:], patients)


def test_vindr_table_has_22_concepts_and_6_targets(vindr):
    labels = read_labels(vindr)
    assert (labels.concepts, labels.targets) == (FINDINGS, DIAGNOSES)
    assert labels.concept_values.shape == (2, 22)
    assert labels.target_values.shape == (2, 6)
    assert labels.concept_values.dtype == labels.target_values.dtype == np.float32
    assert labels.image_ids == labels.patients == ["x", "y"]
    assert labels.notes["readers"] == ["R1", "R2", "R3"]


def test_any_is_the_default(vindr):
    labels = read_labels(vindr)
    assert set(positives(labels, "x")) == {"ILD", "Other lesion", "Pneumonia", "No finding"}
    assert set(positives(labels, "y")) == {"Edema", "Other diseases", "No finding"}


def test_other_aggregations(vindr):
    majority = read_labels(vindr, aggregate="majority")
    assert positives(majority, "x") == {"ILD": 1}
    assert positives(majority, "y") == {"No finding": 1}
    mean = read_labels(vindr, aggregate="mean")
    assert positives(mean, "x")["ILD"] == pytest.approx(2 / 3)
    assert positives(read_labels(vindr, aggregate="reader:R2"), "y") == {
        "Edema": 1,
        "Other diseases": 1,
    }


def test_agreement_of_readers_is_reported(vindr):
    kappa = read_labels(vindr, aggregate="majority").notes["kappa"]
    # ILD: votes 1:2 and 3:0; agreement (1/3 + 1)/2 = 2/3, chance (1/3)^2 + (2/3)^2 = 5/9.
    assert kappa["ILD"] == pytest.approx(0.25)
    assert kappa["Lung cyst"] is None
    assert len(kappa) == 28


def test_consensus_table_follows_the_training_table(vindr, write):
    header = ["Other disease", *DIAGNOSES[:4], "no finding", *(n.upper() for n in FINDINGS[::-1])]
    train = read_labels(vindr)
    test = write(",".join(["image_id", *header]), "z,1" + ",0" * 27, name="test.csv")
    labels = read_labels(test, like=train)
    assert (labels.concepts, labels.targets) == (train.concepts, train.targets)
    assert positives(labels, "z") == {"Other diseases": 1}
    assert labels.notes["kappa"] == {}
    assert read_labels(test, aggregate="reader:R2", like=train).image_ids == ["z"]


def test_missing_column_of_a_later_table_is_named(vindr, write):
    header = ["image_id", *FINDINGS, *DIAGNOSES]
    header.remove("Lung cyst")
    path = write(",".join(header), "z" + ",0" * 27, name="test.csv")
    with pytest.raises(UserError, match=r"test\.csv: has no column 'Lung cyst'"):
        read_labels(path, like=read_labels(vindr))


def test_empty_cells_are_zero_and_counted(write):
    path = write("image_id,a,b,No finding", "x,,1.0,0", "y,nan,1,NaN", "z,1,0.0,1")
    labels = read_labels(path)
    assert labels.concept_values.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert labels.target_values.tolist() == [[0], [0], [1]]
    assert labels.notes["empty_cells"] == {"a": 2, "No finding": 1}


@pytest.mark.parametrize("cell", ["2", "-1", "0.5", "yes", "inf"])
def test_other_values_are_refused_with_their_place(write, cell):
    path = write("image_id,a,b,No finding", "x,0,1,0", f"y,0,{cell},0")
    message = rf"labels\.csv, line 3, column 'b': '{cell}', expected 0 or 1"
    with pytest.raises(UserError, match=message):
        read_labels(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,a,b,COPD", "x,0,0,0"], "no column 'image_id'"),
        (["image_id,a,b,COPD", ",0,0,0"], "line 2: image_id is empty"),
        (["image_id,a,b,COPD", "x,0,0,0", "x,1,0,0"], "line 3: image x again without a rad_id"),
        (["image_id,rad_id,b,COPD", "x,R,0,0", "x,R,0,0"], "image x again by reader 'R', as in 2"),
        (
            ["image_id,rad_id,patient_id,b,COPD", "x,R,p,0,0", "x,S,q,0,0"],
            "line 3: image x is of patient 'q' here and of 'p' above",
        ),
    ],
)
def test_contradictions_are_refused(write, lines, message):
    with pytest.raises(UserError, match=message):
        read_labels(write(*lines))


@pytest.mark.parametrize("aggregate", ["all", "reader", "reader:", "any:R1"])
def test_unknown_aggregation_is_refused(vindr, aggregate):
    with pytest.raises(UserError, match=rf"data\.aggregate is '{aggregate}'"):
        read_labels(vindr, aggregate=aggregate)


def test_unknown_reader_is_refused_with_those_that_are(vindr):
    with pytest.raises(UserError, match="no line by reader 'R9'") as error:
        read_labels(vindr, aggregate="reader:R9")
    assert "R1, R2, R3" in error.value.hint


def test_class_column_has_a_vocabulary_from_training(write):
    columns = Columns(
        concepts=("net", "streaks"), targets=("diagnosis",), image="image", task_mode="multiclass"
    )
    header = "image,net,streaks,diagnosis,age"
    train = read_labels(write(header, "x,1,0,nevus,63", "y,0,1,melanoma,7"), columns)
    assert train.targets == ["melanoma", "nevus"]
    assert train.target_values.tolist() == [1, 0]
    assert train.target_values.dtype == np.int64
    assert train.notes["unused_columns"] == ["age"]
    test = read_labels(write(header, "z,0,1,nevus,9", name="test.csv"), columns, like=train)
    assert test.targets == train.targets
    assert test.target_values.tolist() == [1]
    message = r"test\.csv, line 2, column 'diagnosis': 'wart', expected a class: melanoma, nevus"
    with pytest.raises(UserError, match=message):
        read_labels(write(header, "z,0,1,wart,9", name="test.csv"), columns, like=train)


def test_readers_vote_on_the_class(write):
    columns = Columns(concepts=("a", "b"), targets=("kind",), task_mode="multiclass")
    lines = ("x,1,0,0,dog", "x,2,0,1,cat", "x,3,0,0,dog", "y,1,1,0,cat", "y,2,0,0,dog")
    labels = read_labels(write("image_id,rad_id,a,b,kind", *lines), columns)
    assert labels.target_values.tolist() == [1, 0]
    assert labels.notes["tied_images"] == 1
    # Pairs that agree: 1 of 3 and 0 of 1; by chance (2/5)^2 + (3/5)^2 would.
    assert labels.notes["kappa"]["kind"] == pytest.approx((1 / 6 - 0.52) / 0.48)


def test_one_column_per_class_needs_exactly_one_mark(write):
    columns = Columns(targets=("cat", "dog"), task_mode="multiclass")
    labels = read_labels(write("image_id,a,b,cat,dog", "x,1,0,0,1", "y,1,1,1,0"), columns)
    assert labels.targets == ["cat", "dog"]
    assert labels.target_values.tolist() == [1, 0]
    with pytest.raises(UserError, match="line 2: 2 of the 2 target columns are 1"):
        read_labels(write("image_id,a,b,cat,dog", "x,1,0,1,1"), columns)


def test_patients_come_from_their_column_or_a_pattern(write):
    lines = ("007_1,0,1,1", "007_2,0,0,0", "009_1,1,0,0")
    path = write("image_id,a,b,COPD", *lines)
    assert read_labels(path, Columns(patient_pattern=r"\d+")).patients == ["007", "007", "009"]
    with pytest.raises(UserError, match=r"'\[a-z\]' does not match the image id '007_1'"):
        read_labels(path, Columns(patient_pattern="[a-z]"))
    with pytest.raises(UserError, match=r"data\.patient_pattern is '\('"):
        read_labels(path, Columns(patient_pattern="("))
    path = write("image_id,patient_id,a,b,COPD", "x,p,0,1,1", "y,p,0,0,0", "z,,1,0,0")
    assert read_labels(path).patients == ["p", "p", "z"]


def test_concept_that_equals_a_target_is_noted(write, caplog):
    path = write("image_id,same,other,COPD", "x,1,0,1", "y,0,0,0", "z,0,1,0")
    assert read_labels(path).notes["leaks"] == ["same"]
    assert "same" in caplog.text


def test_rare_columns_of_vindr_are_left_out():
    names = FINDINGS + DIAGNOSES
    values = np.zeros((400, 28), np.float32)
    for place, name in enumerate(names):
        values[: RARE.get(name, 100), place] = 1
    labels = labels_of(values[:, :22], values[:, 22:])
    object.__setattr__(labels, "concepts", FINDINGS)
    object.__setattr__(labels, "targets", DIAGNOSES)
    kept = frequent(labels, np.arange(400), 100)
    assert (len(kept.concepts), len(kept.targets)) == (16, 5)
    assert kept.notes["dropped"] == RARE
    assert set(names) - set(kept.concepts + kept.targets) == set(RARE)
    assert kept.concept_values.shape == (400, 16)
    assert (kept.concept_values.sum(0) == 100).all()


def test_only_the_rows_given_count_as_positives():
    labels = labels_of([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]], [[1], [1], [1], [1]])
    assert frequent(labels, np.array([0, 1]), 2).concepts == ["concept 0", "concept 1"]
    assert frequent(labels, np.arange(4), 2).concepts == labels.concepts
    assert frequent(labels, np.arange(4), 0).notes["dropped"] == {}


def test_too_few_columns_left_is_an_error():
    with pytest.raises(UserError, match=r"min_positives is 9, which leaves 0 concepts"):
        frequent(plain(20), np.array([1, 2]), 9)


def test_classes_are_not_left_out():
    labels = labels_of([[1, 1], [1, 1], [1, 1]], np.array([0, 0, 1]))
    kept = frequent(labels, np.arange(3), 2)
    assert kept.targets == labels.targets
    assert kept.target_values.tolist() == [0, 0, 1]


def test_published_balance_of_no_finding():
    normal = np.arange(15_000) >= 4394
    labels = labels_of(np.zeros((15_000, 2)), normal[:, None].astype(np.float32))
    object.__setattr__(labels, "targets", ["No finding"])
    rows = np.arange(15_000)
    kept = balanced(labels, rows, 0.4, seed=42)
    assert normal[kept].sum() == 2929
    assert (~normal[kept]).sum() == 4394
    assert (np.diff(kept) > 0).all()
    assert kept.tolist() == balanced(labels, rows, 0.4, seed=42).tolist()
    assert kept.tolist() != balanced(labels, rows, 0.4, seed=43).tolist()
    few = balanced(labels, rows[4300:4500], 0.4, seed=42)
    assert len(few) == 94 + 62
    assert set(few) <= set(rows[4300:4500])


def test_balance_needs_the_target():
    with pytest.raises(UserError, match="there is no target 'No finding'"):
        balanced(plain(5), np.arange(5), 0.4, 1)


@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("count", [10, 59, 600, 697])
def test_nine_tenths_of_the_images_train(count, stratify):
    train, val = split(plain(count), 0.1, 42, stratify)
    assert len(train) == count * 9 // 10
    assert sorted([*train, *val]) == list(range(count))


def test_seed_decides_on_the_split():
    labels = plain(100)
    first, again, other = (split(labels, 0.1, seed)[1].tolist() for seed in (42, 42, 43))
    assert first == again != other


def test_every_image_may_validate():
    labels = plain(20)
    drawn = Counter(row for seed in range(200) for row in split(labels, 0.1, seed)[1].tolist())
    assert set(drawn) == set(range(20))
    assert max(drawn.values()) < 40  # 20 expected


@pytest.mark.parametrize("stratify", [False, True])
def test_patients_are_never_divided(stratify):
    draws = np.random.default_rng(1)
    patients = [str(one) for one in draws.integers(0, 60, 400)]
    for seed in range(5):
        train, val = split(plain(400, patients), 0.1, seed, stratify)
        assert not {patients[row] for row in train} & {patients[row] for row in val}
        assert 25 <= len(val) <= 40


def test_one_patient_cannot_be_divided():
    with pytest.raises(UserError, match="of 9 images of 1 patients"):
        split(plain(9, ["p"] * 9), 0.1, 42)
    with pytest.raises(UserError, match="1 images for validation leaves none to train"):
        split(labels_of([[1, 0]], [[1]]), 0.1, 1)


def test_stratified_split_spreads_rare_concepts():
    values = np.zeros((1000, 2), np.float32)
    values[:100, 0] = 1  # of these, a tenth has to validate
    labels = labels_of(values, np.zeros((1000, 1), np.float32))
    spread = [int((split(labels, 0.1, seed, True)[1] < 100).sum()) for seed in range(10)]
    chance = [int((split(labels, 0.1, seed)[1] < 100).sum()) for seed in range(10)]
    assert set(spread) == {10}
    assert len(set(chance)) > 2


@pytest.fixture(scope="session")
def real(root):
    """Find a real data set, or skip."""
    place = Path(os.environ.get("MOECTL_TEST_DATA") or root.parent / "shared" / "data")

    def folder(name):
        found = place / name
        if not found.is_dir():
            pytest.skip(f"{found} is missing; MOECTL_TEST_DATA names the folder of data sets")
        return found

    return folder


def test_real_blood_cells(real):
    folder = real("wbc")
    train = read_labels(folder / "labels_train.csv")
    val = read_labels(folder / "labels_val.csv", like=train)
    assert (len(train), len(val), len(train.concepts), len(train.targets)) == (1800, 300, 22, 5)
    assert train.target_values.sum(0).tolist() == [360] * 5
    assert not set(train.image_ids) & set(val.image_ids)
    assert json.loads(json.dumps(train.notes, allow_nan=False)) == train.notes
    classes = Columns(task_mode="multiclass")
    train = read_labels(folder / "labels_train.csv", classes)
    assert np.bincount(train.target_values).tolist() == [360] * 5
    columns = Columns(
        concepts=("cell_size_big", "granularity"), targets=("Basophil",), task_mode="multilabel"
    )
    assert read_labels(folder / "labels_val.csv", columns).target_values.sum() == 60


def test_real_radiographs(real):
    folder = real("chest")
    columns = Columns(patient_pattern=r"\d{8}")
    train = read_labels(folder / "labels_train.csv", columns)
    test = read_labels(folder / "labels_test.csv", columns, like=train)
    assert (len(train), len(test), len(train.concepts)) == (697, 303, 14)
    assert train.targets == ["No finding", "Abnormal"]
    assert train.target_values.sum(0).tolist() == [697 - 355, 355]
    counts = dict(
        zip(train.concepts, train.concept_values.sum(0) + test.concept_values.sum(0), strict=True)
    )
    assert (counts["Effusion"], counts["Hernia"], counts["Pneumonia"]) == (170, 9, 9)
    assert len(set(train.patients)) == 177
    rows, val = split(train, 0.1, 42)
    assert not {train.patients[row] for row in rows} & {train.patients[row] for row in val}
    assert 60 <= len(val) <= 70
