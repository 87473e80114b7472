"""Opening trained networks: which weights, and what is refused."""

import json
import shutil

import pytest
import torch

from moectl.diffusion.inference import open_network, rebuild
from moectl.diffusion.settings import DiffusionSettings
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve


def request(run, folder, **values):
    given = {key.replace("__", "."): value for key, value in values.items()}
    settings, origin = resolve(DiffusionSettings, given, [], [folder / "settings.toml"])
    return Request(
        room="diffusion", command="sample", settings=settings, origin=origin, name="sample",
        cpu=True, out=None, resume="", folder=folder, run=str(run),
    )  # fmt: skip


def payload(path):
    return torch.load(path, weights_only=True)


def rewrite(path, **changes):
    """Write the weights again with other contents; None leaves one out."""
    found = artefact.load(path)
    kept = {key: value for key, value in (found.payload | changes).items() if value is not None}
    artefact.save(path, kept, found.facts)


@pytest.mark.parametrize(("ema", "name"), [(True, "ema_state_dict"), (False, "model_state_dict")])
def test_weights_are_the_averaged_ones_or_those_of_the_last_update(finished_run, ema, name):
    opened = open_network(request(finished_run, finished_run, sample__ema=ema))
    stored = payload(finished_run / "checkpoint_epoch_2.pth")
    found = opened.model.state_dict()
    assert found.keys() == stored[name].keys()
    assert all(torch.equal(found[key], stored[name][key]) for key in found)
    other = stored["model_state_dict" if ema else "ema_state_dict"]
    assert any(not torch.equal(found[key], other[key]) for key in found)
    assert opened.weights["ema"] is ema
    assert opened.tag == ("checkpoint_epoch_2" if ema else "checkpoint_epoch_2_raw")


def test_opened_network_is_as_it_was_trained(finished_run):
    opened = open_network(request(finished_run, finished_run))
    sidecar = json.loads((finished_run / "checkpoint_epoch_2.pth.json").read_text())
    assert not opened.model.training
    assert opened.folder == finished_run
    assert opened.class_names == list("0123456789")
    assert opened.image_size == 8
    assert opened.guidable
    assert opened.weights == {
        "file": "checkpoint_epoch_2.pth", "sha256": sidecar["sha256"], "epoch": 2, "ema": True,
    }  # fmt: skip
    assert (opened.diffusion.steps, opened.diffusion.prediction) == (1000, "epsilon")
    assert opened.data.facts == {key: sidecar[key] for key in opened.data.facts}
    assert opened.data is opened.data


def test_reference_names_the_epoch(finished_run):
    opened = open_network(request(f"{finished_run}@1", finished_run))
    assert opened.weights["epoch"] == 1
    opened = open_network(request(finished_run / "checkpoint_epoch_1.pth", finished_run))
    assert opened.weights["file"] == "checkpoint_epoch_1.pth"


def test_process_is_that_of_the_training_and_not_of_the_settings(finished_run):
    other = {"process__steps": 50, "process__prediction": "v_prediction"}
    opened = open_network(request(finished_run, finished_run, **other))
    assert (opened.diffusion.steps, opened.diffusion.prediction) == (1000, "epsilon")


def test_training_without_an_average_gives_its_only_weights(own_run):
    path = own_run / "checkpoint_epoch_2.pth"
    raw = payload(path)["model_state_dict"]
    rewrite(path, ema_state_dict=None)
    opened = open_network(request(own_run, own_run))
    assert opened.weights["ema"] is False
    assert all(torch.equal(value, raw[key]) for key, value in opened.model.state_dict().items())


def test_network_without_the_class_none_says_so(own_run):
    path = own_run / "checkpoint_epoch_2.pth"
    found = artefact.load(path)
    facts = found.facts | {"arguments": found.facts["arguments"] | {"null_class": False}}
    fewer = {
        name: {
            key: value[:-1] if key == "class_embed.weight" else value
            for key, value in found.payload[name].items()
        }
        for name in ("model_state_dict", "ema_state_dict")
    }
    artefact.save(path, found.payload | fewer, facts)
    assert not open_network(request(own_run, own_run)).guidable


def test_other_images_than_those_of_the_training_are_refused(finished_run):
    opened = open_network(request(finished_run, finished_run, data__val_fraction=0.2))
    with pytest.raises(UserError, match=r"trained on other images.*'test': 180.*'test': 359"):
        _ = opened.data


def test_foreign_file_is_refused(own_run):
    path = own_run / "foreign.pth"
    torch.save({"model_state_dict": {}}, path)
    with pytest.raises(UserError, match=r"foreign\.pth: has no foreign\.pth\.json of diffusion"):
        open_network(request(path, own_run))
    (own_run / "other.pth").write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"other\.pth: not a weights file|other\.pth: holds more"):
        open_network(request(own_run / "other.pth", own_run))


def test_weights_of_another_room_are_refused(own_run):
    facts = {"model": "Classifier", "arguments": {"classes": 10}}
    artefact.save(own_run / "theirs.pth", {"state_dict": {}}, facts)
    with pytest.raises(UserError, match=r"of diffusion beside it"):
        rebuild(artefact.load(own_run / "theirs.pth"), ema=True)


def test_changed_weights_are_refused(own_run):
    path = own_run / "checkpoint_epoch_2.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="does not match the checksum"):
        open_network(request(own_run, own_run))


def test_weights_outside_a_run_are_refused(own_run, tmp_path, diffusion):
    for name in ("checkpoint_epoch_2.pth", "checkpoint_epoch_2.pth.json"):
        shutil.copy(own_run / name, tmp_path / name)
    path = tmp_path / "checkpoint_epoch_2.pth"
    with pytest.raises(UserError, match="not a run folder"):
        open_network(request(path, own_run))
    code, out, err = diffusion("sample", "--checkpoint", str(path), "--num", "1")
    assert (code, out) == (2, "")
    assert "lies outside a run folder" in err


def resign(path, **changes):
    """Write the sidecar with other facts; None leaves one out."""
    found = artefact.load(path)
    facts = {key: one for key, one in (found.facts | changes).items() if one is not None}
    artefact.save(path, found.payload, facts)


@pytest.mark.parametrize("name", ["process", "digest"])
def test_sidecar_that_lacks_something_is_told_of(own_run, name):
    path = own_run / "checkpoint_epoch_2.pth"
    resign(path, **{name: None})
    with pytest.raises(UserError, match=f"no checkpoint_epoch_2.pth.json of diffusion with {name}"):
        open_network(request(own_run, own_run))


@pytest.mark.parametrize("changed", [{"num_experts": 5}, {"nonsense": 1}, {"k_active": 9}])
def test_weights_that_do_not_fit_their_sidecar_are_told_of_in_a_line(own_run, changed):
    path = own_run / "checkpoint_epoch_2.pth"
    arguments = json.loads((own_run / "checkpoint_epoch_2.pth.json").read_text())["arguments"]
    resign(path, arguments=arguments | changed)
    with pytest.raises(UserError, match="does not fit what") as caught:
        open_network(request(own_run, own_run))
    assert "\n" not in caught.value.message
