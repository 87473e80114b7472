"""DICOM files."""

import sys

import numpy as np
import pytest

from moectl.csr.dicom import dicom_size, is_dicom, read_dicom, stretched, windowed
from moectl.csr.images import read_image
from moectl.engine.errors import UserError

PIXELS = np.arange(1000, 1600).reshape(20, 30).astype(np.uint16)


@pytest.fixture
def save(tmp_path):
    """Write a small radiograph with further elements."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    from pydicom.dataset import Dataset, FileMetaDataset

    def file(name="x.dcm", pixels=PIXELS, **elements):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = (
            pydicom.uid.DigitalXRayImageStorageForPresentation
        )
        dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.PixelData = pixels.tobytes()
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    return file


def test_window_follows_the_standard():
    values = np.array([-100, 0, 50, 100, 400])
    assert windowed(values, 50.5, 101).tolist() == [0, 0, 0.5, 1, 1]
    assert windowed(values, 50, 100, "LINEAR_EXACT").tolist() == [0, 0, 0.5, 1, 1]
    sigmoid = windowed(values, 50, 100, "SIGMOID")
    assert sigmoid[2] == 0.5
    assert sigmoid[3] == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.parametrize(("width", "function"), [(0, "LINEAR"), (-1, "SIGMOID"), (9, "CUBIC")])
def test_window_outside_of_the_standard_is_refused(width, function):
    with pytest.raises(ValueError, match="window of width"):
        windowed(np.zeros(3), 1, width, function)


def test_percentiles_stretch_without_a_window():
    values = np.arange(1001.0)
    values[-1] = 1e9
    found = stretched(values)
    assert found[0] == 0
    assert found[500] == pytest.approx(0.5, abs=0.01)
    mostly_empty = np.zeros(1000)
    mostly_empty[0] = 5
    assert stretched(mostly_empty)[:2].tolist() == [1, 0]
    with pytest.raises(ValueError, match="all pixels are 3"):
        stretched(np.full(9, 3))


def test_missing_pydicom_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"x\.dcm: DICOM files need pydicom") as error:
        read_image(tmp_path / "x.dcm")
    assert "moectl[medical]" in error.value.hint


def test_dicom_is_known_by_its_head(tmp_path):
    (tmp_path / "1.2.3").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "other").write_bytes(bytes(200))
    assert is_dicom(tmp_path / "1.2.3")
    assert is_dicom(tmp_path / "nowhere.DCM")
    assert not is_dicom(tmp_path / "other")
    assert not is_dicom(tmp_path / "nowhere")


def test_without_a_window_the_ramp_is_stretched(save):
    path = save()
    image = read_image(path)
    assert image.shape == (3, 20, 30)
    assert image.dtype == np.float32
    assert dicom_size(path) == (20, 30)
    assert (image.min(), image.max()) == (0, 1)
    assert 0.45 < image.mean() < 0.55
    assert (np.diff(image[0].ravel()) >= 0).all()


def test_modality_comes_before_the_window(save):
    # Values 0..599 after the intercept; the window shows 100..299.
    path = save(RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=[200, 7], WindowWidth=[200, 8])
    flat = read_dicom(path).ravel()
    assert (flat[:101] == 0).all()
    assert (flat[300:] == 1).all()
    assert flat[200] == pytest.approx(0.5, abs=0.01)


def test_monochrome1_is_inverted(save):
    elements = {"WindowCenter": 1300, "WindowWidth": 600}
    usual = read_dicom(save(**elements))
    inverted = read_dicom(save(PhotometricInterpretation="MONOCHROME1", **elements))
    np.testing.assert_allclose(inverted, 1 - usual, atol=1e-6)
    assert usual[0, 0] < 0.01 < 0.99 < inverted[0, 0]


def test_voi_lut_comes_before_the_window(save):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    table = Dataset()
    table.LUTDescriptor = [600, 1000, 16]
    table.LUTData = (65535 - np.arange(600) * 100).astype(np.uint16).tobytes()
    path = save(VOILUTSequence=Sequence([table]), WindowCenter=1300, WindowWidth=600)
    flat = read_dicom(path).ravel()
    assert flat[0] == 1
    assert flat[599] == pytest.approx((65535 - 59900) / 65535)


def test_colour_is_kept(save):
    pixels = np.full((4, 5, 3), (255, 51, 0), np.uint8)
    path = save(
        pixels=pixels,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    np.testing.assert_allclose(read_image(path, "rgb")[:, 0, 0], [1, 0.2, 0], atol=1e-6)


def test_damage_is_an_error_never_black(save, tmp_path):
    path = save()
    content = path.read_bytes()
    for part in (0.99, 0.5, 0.2, 0.1, 0.0):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match=r"x\.dcm: not a readable DICOM image"):
            read_image(path)
    (tmp_path / "text.dcm").write_text("no image")
    with pytest.raises(UserError, match=r"text\.dcm: not a readable DICOM image"):
        dicom_size(tmp_path / "text.dcm")


def test_a_small_file_that_promises_a_huge_picture_is_refused_before_decoding(save, monkeypatch):
    import pydicom.pixels

    path = save(Rows=30_000, Columns=30_000)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)  # calling it would be a TypeError
    with pytest.raises(UserError, match="more than 90 million pixels"):
        read_dicom(path)


def test_a_broken_table_is_an_error_and_one_without_values_does_not_count(save):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    plain = read_dicom(save())
    table = Dataset()
    for tables in ([], [table]):
        np.testing.assert_array_equal(read_dicom(save(VOILUTSequence=Sequence(tables))), plain)
    table.LUTDescriptor, table.LUTData = [600, 1000], PIXELS.tobytes()
    with pytest.raises(UserError, match="not a readable DICOM image"):
        read_dicom(save(VOILUTSequence=Sequence([table])))


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"WindowCenter": "nan", "WindowWidth": "600"}, "no finite numbers"),
        ({"RescaleSlope": "nan", "RescaleIntercept": "0"}, "no finite numbers"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, expected grey or RGB"),
    ],
)
def test_pixels_without_a_brightness_are_refused(save, elements, message):
    with pytest.raises(UserError, match=message):
        read_dicom(save(**elements))


def test_film_and_empty_picture_are_refused(save):
    with pytest.raises(UserError, match="2 frames, expected one"):
        read_dicom(save(pixels=PIXELS.repeat(2, 0), Rows=20, NumberOfFrames=2))
    with pytest.raises(UserError, match="all pixels are 5"):
        read_dicom(save(pixels=np.full((4, 4), 5, np.uint16)))
