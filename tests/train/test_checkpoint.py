import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import MANIFEST, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from tunesmith.train.loop import Progress, TrainState


def state(step, **progress):
    generator = torch.Generator().manual_seed(step)
    tensors = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    return TrainState(
        Progress(step=step, **progress), tensors, {"a.step": torch.tensor(float(step))}, {"cpu": torch.get_rng_state()}
    )


def test_what_was_saved_comes_back_to_the_bit(tmp_path):
    saved = state(3, best_step=2, best_loss=0.1 + 0.2, skipped=1)
    save_checkpoint(tmp_path, saved)
    loaded = load_newest(tmp_path)
    assert loaded.progress == saved.progress
    for part in ("parameters", "optimizer", "random"):
        before, after = getattr(saved, part), getattr(loaded, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_safetensors_and_json_are_written(tmp_path):
    path = save_checkpoint(tmp_path, state(1))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest", "other format", "progress"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save_checkpoint(tmp_path, state(1))
    newest = save_checkpoint(tmp_path, state(2))
    file, manifest = newest / "parameters.safetensors", newest / MANIFEST
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "progress":
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    assert load_checkpoint(newest) is None
    said = []
    assert load_newest(tmp_path, say=said.append).progress.step == 1
    assert [sentence.startswith(f"{newest} is damaged") for sentence in said] == [True]
    shutil.rmtree(tmp_path / "step-1")
    assert load_newest(tmp_path) is None


def test_a_write_that_was_cut_off_leaves_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, state(1))
    (tmp_path / ".step-2.partial").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1"]
    save_checkpoint(tmp_path, state(2))
    assert not list(tmp_path.glob(".step-*"))


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, dataclasses.replace(state(step, best_step=2)), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-5", "step-4", "step-2"]


def test_a_damaged_one_ahead_never_pushes_a_whole_one_out(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, state(step), keep=9)
    (tmp_path / "step-9" / MANIFEST).unlink()
    save_checkpoint(tmp_path, state(3), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-3", "step-2"]


@pytest.mark.parametrize("saved", [1, 2], ids=["again", "next"])
def test_a_full_disk_leaves_the_checkpoint_that_is_there(tmp_path, monkeypatch, saved):
    save_checkpoint(tmp_path, state(1))

    def no_space(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    if saved == 2:
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(tmp_path, state(2))
        assert caught.value.errno == 28
        assert not list(tmp_path.glob(".step-*"))  # the room is given back
    else:
        save_checkpoint(tmp_path, state(1))
    assert load_newest(tmp_path).progress.step == 1


def test_no_checkpoints_at_all(tmp_path):
    assert load_newest(tmp_path / "nowhere") is None
