import json
import tomllib

import pytest
import torch

from moectl.csr.edit_list import Edit, apply_edit, box_weights, parse_edit, parse_edits
from moectl.csr.edits import edited_scores, importance, reject, set_value, statistics

NAMES = ["Edema", "Lung Opacity", "Nodule/Mass"]
DOCUMENT = """
[[edits]]
image = "a1"
reject = ["edema"]
mode = "drop"
set = { "lung_opacity" = 0.3 }

[[edits]]
confirm = ["Nodule/Mass"]
positive = [[10, 20, 60, 70]]
negative = [[0, 0, 20, 10], [0, 0, 1, 1]]
alpha = 0
only = "Lung Opacity"
"""


def maps() -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return 2 * torch.rand(2, 3, 2, 4, 4, generator=draws) - 1


def known():
    draws = torch.Generator().manual_seed(1)
    present = torch.tensor([[1, 0, 1], [0, 1, 0]]).repeat(6, 1)
    return statistics(torch.rand(12, 3, 2, generator=draws), present)


def test_a_document_becomes_edits():
    first, second = parse_edits(tomllib.loads(DOCUMENT), NAMES)
    assert first == Edit(image="a1", reject=(0,), mode="drop", values={1: 0.3})
    assert second == Edit(
        confirm=(2,),
        positive=((10.0, 20.0, 60.0, 70.0),),
        negative=((0.0, 0.0, 20.0, 10.0), (0.0, 0.0, 1.0, 1.0)),
        alpha=0.0,
        only=1,
    )


def test_json_says_the_same_as_toml():
    table = tomllib.loads(DOCUMENT)
    assert parse_edits(json.loads(json.dumps(table)), NAMES) == parse_edits(table, NAMES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"reject": ["Edma"]}, r"edit.reject\[0\]: 'Edma', expected one of Edema, Lung Opacity"),
        ({"reject": ["Edma"]}, r"; did you mean Edema\?$"),
        ({"only": "lung", "positive": [[0, 0, 1, 1]]}, r"; did you mean Lung Opacity\?$"),
        ({"reject": ["xyz"]}, "Nodule/Mass$"),
        ({"reject": "Edema"}, "edit.reject: 'Edema', expected a list"),
        ({"reject": [0]}, r"edit.reject\[0\]: 0, expected one of"),
        ({"mode": "none"}, "edit.mode: 'none', expected one of zero"),
        ({"mode": ["zero"]}, "edit.mode: "),
        ({"set": {"Edema": 2}}, "edit.set.Edema: 2, expected a number, from -1 to 1"),
        ({"set": {"Edema": True}}, "edit.set.Edema: True"),
        ({"set": {"Edema": float("nan")}}, "edit.set.Edema: nan"),
        ({"set": {"Edema": 0.1, "edema": 0.2}}, "edit.set: .* every concept once"),
        ({"set": ["Edema"]}, "edit.set: .* a table"),
        ({"alpha": 1}, "edit.alpha: 1.0, expected below 1"),
        ({"alpha": "0.2"}, "edit.alpha: '0.2', expected a number"),
        ({"positive": [[0, 0, 1]]}, r"edit.positive\[0\]: \[0, 0, 1\], expected left"),
        ({"positive": [0, 0, 1, 1]}, r"edit.positive\[0\]: 0, expected left"),
        ({"negative": [[0.5, 0, 0.5, 1]]}, r"edit.negative\[0\]: .* smaller than its opposite"),
        ({"negative": [[-1, 0, 1, 1]]}, r"edit.negative\[0\]: -1, expected a number, 0 or more"),
        ({"negative": [[0, 0, float("inf"), 1]]}, r"edit.negative\[0\]: inf, .* 0 or more"),
        ({"negative": [[0, 0, 10**400, 1]]}, r"edit.negative\[0\]: 10+, .* 0 or more"),
        ({"only": "Edema"}, "edit.only: needs"),
        ({"only": 3, "positive": [[0, 0, 1, 1]]}, "edit.only: 3, expected one of"),
        ({"image": 3}, "edit.image: 3, expected text"),
        ({"rejects": []}, "edit.rejects: no such field; there are image, reject"),
        ({"reject": ["Edema"], "confirm": ["edema"]}, "'Edema' is named twice"),
        ({"reject": ["Edema", "edema"]}, "'Edema' is named twice"),
        ([], "expected a table"),
    ],
)
def test_mistakes_are_named_with_their_field(table, message):
    with pytest.raises(ValueError, match=message):
        parse_edit(table, NAMES)


@pytest.mark.parametrize(
    "document", [{}, {"edits": []}, {"edits": {}}, {"edits": [{}], "x": 1}, [{}]]
)
def test_other_documents_are_refused(document):
    with pytest.raises(ValueError, match="a list 'edits'"):
        parse_edits(document, NAMES)


def test_messages_say_which_edit():
    with pytest.raises(ValueError, match=r"edits\[1\].alpha"):
        parse_edits({"edits": [{}, {"alpha": 2}]}, NAMES)


def test_pixels_are_shares_of_the_original_image():
    edit = Edit(positive=((20.0, 10.0, 100.0, 50.0),), negative=((0.0, 0.0, 40.0, 20.0),))
    shares = importance([(0.1, 0.1, 0.5, 0.5)], [(0.0, 0.0, 0.2, 0.2)], 0.2, (8, 8))
    assert torch.equal(box_weights(edit, (8, 8), (100, 200)), shares)
    with pytest.raises(ValueError, match="need the size"):
        box_weights(edit, (8, 8))
    with pytest.raises(ValueError, match="leaves the image of 90 x 100 pixels"):
        box_weights(edit, (8, 8), (100, 90))
    whole = Edit(positive=((0.0, 0.0, 1.0, 1.0),))
    assert torch.equal(box_weights(whole, (2, 2)), torch.ones(2, 2))


def test_an_empty_edit_changes_nothing():
    assert torch.equal(apply_edit(Edit(), maps()), maps().amax((3, 4)))


def test_an_edit_does_all_that_it_says():
    edit = parse_edit(
        {
            "reject": ["Edema"],
            "confirm": ["Nodule/Mass"],
            "set": {"Lung Opacity": 0.3},
            "positive": [[0, 0, 0.4, 0.4]],
        },
        NAMES,
    )
    found = apply_edit(edit, maps(), known())
    placed = edited_scores(maps(), importance([(0, 0, 0.4, 0.4)], [], 0.2, (4, 4)))
    assert torch.equal(found[:, 0], known().absent_median[0].expand(2, -1))
    assert torch.equal(found[:, 1], torch.full((2, 2), 0.3))
    assert torch.equal(found[:, 2], placed[:, 2].maximum(known().present_median[2]))


def test_boxes_may_count_for_one_concept_only():
    edit = Edit(negative=((0.0, 0.0, 1.0, 1.0),), only=1)
    found = apply_edit(edit, maps())
    assert (found[:, 1] == 0).all()
    assert torch.equal(found[:, [0, 2]], maps().amax((3, 4))[:, [0, 2]])


def test_rejection_without_statistics_is_by_zero():
    found = apply_edit(Edit(reject=(0, 2)), maps())
    assert torch.equal(found, reject(reject(maps().amax((3, 4)), 0), 2))
    assert torch.equal(
        apply_edit(Edit(reject=(0,), mode="drop"), maps(), neutral=torch.full((3, 2), 0.4)),
        set_value(maps().amax((3, 4)), 0, 0.4),
    )
    with pytest.raises(ValueError, match="needs statistics"):
        apply_edit(Edit(confirm=(0,)), maps())
