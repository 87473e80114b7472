"""Boxes of findings."""

import numpy as np
import pytest
from PIL import Image

from moectl.csr.boxes import Resize, read_boxes, read_resize_table
from moectl.csr.tables import Labels
from moectl.engine.errors import UserError

HEADER = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
RESIZES = {"x": Resize((200, 100), (50, 50)), "y": Resize((10, 10), (50, 50))}


@pytest.fixture
def labels():
    """Image x shows a nodule and a cyst, y nothing, z a cyst."""
    values = np.array([[1, 1], [0, 0], [0, 1]], np.float32)
    return Labels(
        ["x", "y", "z"],
        ["Nodule/Mass", "Lung cyst"],
        ["COPD", "No finding"],
        values,
        np.zeros((3, 2), np.float32),
        ["x", "y", "z"],
        {},
    )


@pytest.fixture
def write(tmp_path):
    def file(*lines, header=HEADER):
        path = tmp_path / "boxes.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    return file


@pytest.mark.parametrize(
    ("units", "line"),
    [
        ("original", "x,R1,Nodule/Mass,10,20,50,150"),
        ("resized", "x,R1,nodule/mass,5,5,25,37.5"),
        ("normalized", "x,R1,Nodule/Mass,0.1,0.1,0.5,0.75"),
    ],
)
def test_three_units_say_the_same(write, labels, units, line):
    boxes = read_boxes(write(line), labels, units, RESIZES)
    assert boxes.of_image["x"] == [pytest.approx((0, 0.1, 0.1, 0.5, 0.75))]
    assert boxes.of_image["y"] == boxes.of_image["z"] == []


def test_size_may_come_from_the_file(write, labels, tmp_path):
    Image.fromarray(np.zeros((200, 100), np.uint8)).save(tmp_path / "x.png")
    path = write("x,R1,Lung cyst,10,20,50,150")
    boxes = read_boxes(path, labels, "original", folder=tmp_path)
    assert boxes.of_image["x"] == [pytest.approx((1, 0.1, 0.1, 0.5, 0.75))]


def test_size_that_nobody_knows_is_an_error(write, labels):
    with pytest.raises(UserError, match="the size of image z is not known"):
        read_boxes(write("z,R1,Lung cyst,10,20,50,150"), labels, "original", RESIZES)


def test_what_is_left_out_is_counted(write, labels):
    path = write(
        "x,R1,Nodule/Mass,10,20,50,150",
        "x,R2,Lung_Cyst,-20,20,50,250",  # cut off
        "x,R3,Lung cyst,150,20,180,30",  # beside the image
        "x,R3,Lung cyst,50,20,50,30",  # no width
        "x,R3,COPD,1,2,3,4",
        "y,R1,No finding,,,,",
        "y,R2,No finding,NaN,nan,,",
        "y,R1,Wart,1,1,2,2",
        "w,R1,Lung cyst,1,1,2,2",
    )
    boxes = read_boxes(path, labels, "original", RESIZES)
    assert boxes.of_image["x"] == [
        pytest.approx((0, 0.1, 0.1, 0.5, 0.75)),
        pytest.approx((1, 0, 0.1, 0.5, 1)),
    ]
    counts = boxes.counts
    assert counts.rows == 9
    assert (counts.nothing, counts.of_targets, counts.other_images) == (2, 1, 1)
    assert (counts.out_of_range, counts.empty) == (2, 2)
    assert counts.unknown_names == {"Wart": 1}


def test_disagreement_with_the_labels_is_counted_by_image(write, labels):
    lines = ("x,R1,Nodule/Mass,10,20,50,150", "y,R1,Lung cyst,1,1,5,5", "y,R2,Lung cyst,1,1,5,6")
    counts = read_boxes(write(*lines), labels, "original", RESIZES).counts
    assert counts.box_without_label == {"Lung cyst": 1}
    assert counts.label_without_box == {"Lung cyst": 2}


def test_box_on_the_border_is_in_range(write, labels):
    path = write("x,R1,Lung cyst,0,0,100,200")
    boxes = read_boxes(path, labels, "original", RESIZES)
    assert boxes.of_image["x"] == [(1, 0, 0, 1, 1)]
    assert boxes.counts.out_of_range == 0


def test_pixels_taken_for_shares_are_refused(write, labels):
    with pytest.raises(
        UserError, match=r"boxes\.csv: 1 of 1 boxes lie out of their image"
    ) as error:
        read_boxes(write("x,R1,Lung cyst,10,20,50,150"), labels, "normalized")
    assert "data.box_units is normalized" in error.value.hint


def test_shares_taken_for_pixels_are_refused(write, labels):
    with pytest.raises(UserError, match=r"no coordinate is above 0\.75, but data\.box_units is"):
        read_boxes(write("x,R1,Lung cyst,.1,.2,.5,.75"), labels, "original", RESIZES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,R1,Lung cyst,10,,50,150", "line 2, column 'y_min': '', expected a number"),
        ("x,R1,Lung cyst,10,left,50,150", "line 2, column 'y_min': 'left', expected a number"),
        ("x,R1,Lung cyst,10,inf,50,150", "line 2, column 'y_min': 'inf', expected a number"),
    ],
)
def test_coordinates_that_are_none_are_refused_with_their_place(write, labels, line, message):
    with pytest.raises(UserError, match=rf"boxes\.csv, {message}"):
        read_boxes(write(line), labels, "original", RESIZES)


def test_missing_column_is_named(write, labels):
    path = write("x,Lung cyst,1,1,2", header="image_id,class_name,x_min,y_min,x_max")
    with pytest.raises(UserError, match=r"boxes\.csv: has no column 'y_max'"):
        read_boxes(path, labels)


def test_resize_table_holds_heights_before_widths(write):
    header = (
        "image_id,original_height,original_width,target_height,target_width,"
        "resize_factor_h,resize_factor_w"
    )
    path = write("x,200,100,50,50,0.25,0.5", "y,10.0,10,50,50,5,5", header=header)
    assert read_resize_table(path) == RESIZES
    message = "line 2, column 'target_height': 0, expected pixels"
    with pytest.raises(UserError, match=message):
        read_resize_table(write("x,200,100,0,50,0,0.5", header=header))
