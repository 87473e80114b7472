"""What check-data finds in tables that are wrong in many ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults import odd_images

Call = Callable[..., tuple[int, str, str]]
COLUMNS = ("Nodule/Mass", "Cardiomegaly", "Edema", "Everywhere", "Twin", "Pneumonia", "No finding")


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(isolated: Path) -> Path:
    """Twenty training and six test images, 80 x 40 pixels, seen by two readers each."""
    for part, count in (("train", 20), ("test", 6)):
        (isolated / part).mkdir()
        lines = [",".join(("image_id", "rad_id", *COLUMNS))]
        for number in range(count):
            name, odd = f"{part}{number}", number % 2
            pixels = np.full((40, 80), 10 * number, np.uint8)
            Image.fromarray(pixels).save(isolated / part / f"{name}.png")
            first = (odd, number % 4 == 0, "", 1, odd, odd, 1 - odd)
            second = (odd, 1 - (number % 4 == 0), 0, 1, odd, odd, 1 - odd)
            lines += [
                ",".join(
                    [name, reader, *(str(value if value == "" else int(value)) for value in values)]
                )
                for reader, values in (("R1", first), ("R2", second))
            ]
        write(isolated / f"labels_{part}.csv", *lines)
    return isolated


@pytest.fixture
def boxes(folder: Path) -> Path:
    for part in ("train", "test"):
        write(
            folder / f"boxes_{part}.csv",
            "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
            f"{part}1,R1,Nodule/Mass,20,10,40,20",
            f"{part}3,R1,Nodule/Mass,60,10,90,20",  # stands out on the right
            f"{part}0,R1,Nodule/Mass,20,10,40,20",  # without the label
            f"{part}1,R1,Tumour,20,10,40,20",
            f"{part}1,R1,Pneumonia,20,10,40,20",
            f"{part}2,R1,No finding,,,,",
            "elsewhere,R1,Nodule/Mass,20,10,40,20",
        )
    return folder


TRAINING = ("--backbone-type", "tiny", "--no-pretrained", "--cpu", "--quiet")
BOXES = ("--train-bbox-csv", "boxes_train.csv", "--test-bbox-csv", "boxes_test.csv")


def checked(csr: Call, *words: str, code: int = 0) -> dict[str, Any]:
    found, out, err = csr("check-data", "--json", *words)
    assert found == code, err
    document: dict[str, Any] = json.loads(out)
    return document


def column(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in document["columns"] if one["name"] == name]
    return found


def test_images_and_positives_are_counted_as_a_training_divides_them(
    csr: Call, folder: Path
) -> None:
    from moectl.csr.data import load
    from moectl.csr.settings import CsrSettings

    document = checked(csr, "--val-fraction", "0.3", "--set", "train.seed=5")
    section = CsrSettings().data.model_copy(update={"val_fraction": 0.3})
    data = load(section, 5, (8, 8))
    assert document["images"] == {"train": 14, "val": 6, "test": 6}
    for place, name in enumerate(data.concepts):
        found = column(document, name)
        assert found["role"] == "concept"
        assert found["positives"] == {
            part: int(getattr(data, part).concepts[:, place].sum())
            for part in ("train", "val", "test")
        }
    positives = column(document, "Nodule/Mass")["positives"]["train"]
    weight = (14 - positives) / positives
    assert column(document, "Nodule/Mass")["pos_weight"] == pytest.approx(weight, abs=1e-4)
    assert column(document, "Pneumonia")["role"] == "target"
    assert document["problems"] == []


def test_oddities_of_columns_are_named(csr: Call, folder: Path) -> None:
    document = checked(csr)
    assert column(document, "Edema")["constant"] == "all 0"
    assert column(document, "Edema")["pos_weight"] == 18
    assert column(document, "Everywhere")["constant"] == "all 1"
    assert column(document, "Twin")["constant"] is None
    notes = document["notes"]
    assert notes["leaks"] == ["Nodule/Mass", "Twin"]
    assert notes["empty_cells"] == {"train": {"Edema": 20}, "test": {"Edema": 6}}
    assert column(document, "Nodule/Mass")["kappa"] == 1
    assert column(document, "Cardiomegaly")["kappa"] == pytest.approx(-1)
    assert column(document, "Edema")["kappa"] is None


def test_columns_that_are_left_out_or_not_used_are_listed(csr: Call, folder: Path) -> None:
    chosen = "Nodule/Mass,Cardiomegaly,Edema"
    document = checked(csr, "--concept-columns", chosen, "--min-positives", "1")
    assert document["notes"]["unused_columns"] == ["Everywhere", "Twin"]
    assert document["notes"]["dropped"] == {"Edema": 0}
    assert not column(document, "Edema")["kept"]
    assert column(document, "Cardiomegaly")["kept"]


def test_boxes_are_compared_with_labels(csr: Call, boxes: Path) -> None:
    document = checked(csr, *BOXES)
    found = document["boxes"]["train"]
    assert (found["rows"], found["nothing"], found["of_targets"]) == (7, 1, 1)
    assert (found["other_images"], found["out_of_range"]) == (1, 1)
    assert found["unknown_names"] == {"Tumour": 1}
    assert found["box_without_label"] == {"Nodule/Mass": 1}
    assert found["label_without_box"]["Nodule/Mass"] == 8
    assert document["boxes"]["test"]["label_without_box"]["Nodule/Mass"] == 1


def test_people_get_tables(csr: Call, boxes: Path) -> None:
    code, out, err = csr("check-data", *BOXES, "--quiet")
    assert code == 0, err
    for words in ("Images", "Positives", "all 0", "equals a target", "out of range", "Tumour 1"):
        assert words in out
    assert "empty cells taken for 0 (train)" in out
    assert "Edema 20" in out


def test_all_problems_are_listed_at_once(csr: Call, boxes: Path) -> None:
    (boxes / "train/train4.png").unlink()
    (boxes / "train/train7.png").unlink()
    (boxes / "test/test1.png").write_text("no image")
    text = (boxes / "boxes_test.csv").read_text()
    (boxes / "boxes_test.csv").write_text(text.replace("20,10,40,20", "20,10,forty,20", 1))
    words = (*BOXES, "--images", "--balance-no-finding", "0.1", "--target-columns", "Pneumonia")
    code, out, err = csr("check-data", *words, "--quiet", "--json")
    assert code == 2
    document = json.loads(out)
    assert document["missing_images"] == {"train": ["train4", "train7"], "test": []}
    assert len(document["unreadable_images"]["test"]) == 1
    problems = document["problems"]
    for part in (
        "lacks 2 of 20 images: train4, train7",
        "test: 1 of 6 images cannot be read: test/test1.png",
        "'forty', expected a number",
        "there is no target 'No finding'",
    ):
        assert any(part in line for line in problems), (part, problems)
    assert len(problems) == 4
    assert "error: 4 problems to solve before training\n" in err
    assert all(line in err for line in problems)


@pytest.mark.parametrize("name", ["cut.png", "empty.png", "text.png", "huge.png", "large.png"])
def test_unreadable_images_are_not_looked_for_unless_asked(
    csr: Call, folder: Path, name: str
) -> None:
    odd_images.write(folder, name).replace("test/test1.png")
    assert checked(csr)["problems"] == []
    document = checked(csr, "--images", code=2)
    said = odd_images.BROKEN[name]
    assert document["unreadable_images"]["test"] == [f"test/test1.png: {said}"]


def test_odd_images_are_readable(csr: Call, folder: Path) -> None:
    for number, name in enumerate(odd_images.UNUSUAL):
        odd_images.write(folder, name).replace(f"test/test{number}.png")
    assert checked(csr, "--images")["problems"] == []


def test_missing_tables_are_both_named(csr: Call, isolated: Path) -> None:
    document = checked(csr, code=2)
    assert len(document["problems"]) == 2
    assert (document["images"], document["columns"]) == ({}, [])
    code, out, err = csr("check-data")
    assert (code, out) == (2, "")
    assert "labels_train.csv" in err
    assert "labels_test.csv" in err


def test_a_table_that_cannot_be_divided_is_a_problem(csr: Call, folder: Path) -> None:
    lines = (folder / "labels_train.csv").read_text().splitlines()
    write(folder / "labels_train.csv", *lines[:3])
    document = checked(csr, code=2)
    assert document["images"] == {"train": 1}
    assert "1 images for validation leaves none to train" in document["problems"][0]


def _semicolons(text: str) -> str:
    return text.replace(",", ";")


def _without_header(text: str) -> str:
    return text.partition("\n")[2]


def _value(value: str) -> Callable[[str], str]:
    """Put a value into the column Cardiomegaly of line 4."""

    def change(text: str) -> str:
        lines = text.splitlines()
        cells = lines[3].split(",")
        lines[3] = ",".join([*cells[:3], value, *cells[4:]])
        return "\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: "", "holds no row below its header"),
        (_without_header, "two columns have the same name: "),
        (_semicolons, "its columns are separated by semicolons, expected commas"),
        (lambda text: text.replace("image_id", "picture", 1), "has no column 'image_id'"),
        (lambda text: text.replace("rad_id", "whom", 1), "line 3: image train0 again without a"),
        (
            lambda text: text + text.splitlines()[1] + "\n",
            "line 42: image train0 again by",
        ),
        (_value("2"), "line 4, column 'Cardiomegaly': '2', expected 0 or 1"),
        (_value("yes"), "line 4, column 'Cardiomegaly': 'yes', expected 0 or 1"),
        (_value("0,5"), "line 4: 10 values, but the header names 9 columns"),
    ],
)
def test_a_table_that_is_wrong_stops_check_and_training_alike(
    csr: Call, folder: Path, change: Callable[[str], str], said: str
) -> None:
    path = folder / "labels_train.csv"
    path.write_text(change(path.read_text()))
    (problem, *_) = checked(csr, code=2)["problems"]
    assert problem.startswith("labels_train.csv")
    assert said in problem
    code, out, err = csr("train", *TRAINING)
    assert (code, out) == (2, "")
    assert err.startswith("error: labels_train.csv")
    assert said in err.splitlines()[0]
    assert all(line.startswith("hint: ") for line in err.splitlines()[1:])


def test_a_table_without_a_header_is_asked_for_one(csr: Call, folder: Path) -> None:
    path = folder / "labels_train.csv"
    path.write_text(_without_header(path.read_text()))
    code, _, err = csr("train", *TRAINING)
    assert (code, err.splitlines()[1]) == (2, "hint: its first line must name the columns")


def test_what_spreadsheets_write_is_read_and_empty_labels_are_counted(
    csr: Call, folder: Path
) -> None:
    path = folder / "labels_train.csv"
    text = _value("NaN")(path.read_text())
    path.write_text(text, encoding="utf-8-sig", newline="\r\n")
    document = checked(csr)
    assert document["problems"] == []
    assert document["notes"]["empty_cells"]["train"] == {"Cardiomegaly": 1, "Edema": 20}


def test_an_image_cannot_be_trained_and_tested_on(csr: Call, folder: Path) -> None:
    path = folder / "labels_test.csv"
    lines = path.read_text().splitlines()
    write(path, *lines, lines[1].replace("test0", "train3"), lines[1].replace("test0", "train7"))
    for name in ("train3", "train7"):
        (folder / f"test/{name}.png").symlink_to(folder / f"train/{name}.png")
    said = "labels_test.csv: 2 of 8 images are training images, too: train3, train7"
    (problem,) = checked(csr, code=2)["problems"]
    assert problem.startswith(said)
    code, out, err = csr("train", *TRAINING)
    assert (code, out) == (2, "")
    assert err.endswith(f"error: {said}\nhint: take them out of it, or out of labels_train.csv\n")


def test_other_images_may_have_the_same_ids(csr: Call, folder: Path) -> None:
    path = folder / "labels_test.csv"
    path.write_text(path.read_text().replace("test", "train"))
    for number in range(6):
        (folder / f"test/test{number}.png").rename(folder / f"test/train{number}.png")
    assert checked(csr)["problems"] == []


def test_glyphs_need_no_files(csr: Call, isolated: Path) -> None:
    document = checked(csr, "--dataset", "synthetic", "--set", "data.synthetic_images=30")
    assert document["images"] == {"train": 27, "val": 3, "test": 10}
    assert list(isolated.iterdir()) == []


def test_isic_tables_need_no_columns_named(csr: Call, isolated: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        (isolated / part).mkdir()
        lines = ["image,age,milia_like_cyst,pigment_network,negative_network,streaks,diagnosis"]
        for number in range(count):
            name = f"ISIC_{number:07d}"
            Image.new("RGB", (20, 20), (number, 0, 0)).save(isolated / part / f"{name}.jpg")
            lines.append(f"{name},{30 + number},{number % 2},1,0,0,{'abc'[number % 3]}")
        write(isolated / f"labels_{part}.csv", *lines)
    words = ("--dataset", "isic", "--task-mode", "multiclass", "--set", "task.loss=ce")
    document = checked(csr, *words, "--images")
    names = [(one["name"], one["role"]) for one in document["columns"]]
    concepts = ("milia_like_cyst", "pigment_network", "negative_network", "streaks")
    assert names == [
        *((name, "concept") for name in concepts),
        *((name, "target") for name in "abc"),
    ]
    assert document["notes"]["unused_columns"] == ["age"]
    assert document["notes"]["class_column"] == "diagnosis"
    assert column(document, "c")["positives"]["test"] == 1


def test_tables_of_ones_own_may_call_their_columns_anything(csr: Call, folder: Path) -> None:
    for part in ("train", "test"):
        text = (folder / f"labels_{part}.csv").read_text()
        (folder / f"labels_{part}.csv").write_text(text.replace("image_id", "file", 1))
    assert "no column 'image_id'" in checked(csr, code=2)["problems"][0]
    assert checked(csr, "--image-column", "file")["images"]["test"] == 6
