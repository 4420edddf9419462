"""State files: whole or not at all, nothing foreign, nothing unsafe."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastood.differences import differences
from fastood.errors import DataError
from fastood.tuning.checkpoint import (
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
    read_checkpoint,
    write_checkpoint,
)


def test_tensors_and_numbers_come_back_to_the_bit(tmp_path):
    file = tmp_path / "deep" / "x.safetensors"
    shared = torch.randn(3)
    tensors = {"a": shared, "b": shared, "c": torch.tensor(5), "d": torch.randn(2, 2).double().T}
    state = {"loss": 0.1 + 0.2, "epoch": 3, "none": None, "names": ["ü"]}
    write_checkpoint(file, tensors, state)
    write_checkpoint(file, tensors, state)
    found = read_checkpoint(file)
    assert found.state == state
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]


def test_a_failed_write_keeps_the_file_before_it(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    write_checkpoint(file, {"a": torch.ones(2)}, {"epoch": 1})

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DataError, match="No space left"):
        write_checkpoint(file, {"a": torch.zeros(2)}, {"epoch": 2})
    assert read_checkpoint(file).state == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_foreign_damaged_and_newer_files_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match="no such checkpoint"):
        read_checkpoint(file)
    save_file({"a": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"expected the state of a training run, got .*'pt'"):
        read_checkpoint(file)
    save_file({"a": torch.ones(1)}, file, {"format": "fastood-training", "version": "9"})
    with pytest.raises(DataError, match="newer fastood"):
        read_checkpoint(file)
    write_checkpoint(file, {"a": torch.ones(99)}, {})
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="damaged"):
            read_checkpoint(file)
    torch.save({"a": 1}, file)
    with pytest.raises(DataError, match="damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimiser_goes_on_as_if_never_stopped(kind):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        net.bias.requires_grad_(False)
        parameters = [net.weight]
        if kind == "sgd":
            return net, torch.optim.SGD(parameters, 0.1, 0.9)
        return net, torch.optim.AdamW(parameters, 0.1)

    def step(net, optimizer, seed):
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(seed)
        net(torch.randn(4, 3, generator=g)).square().sum().backward()
        optimizer.step()

    whole, optimizer = make()
    for seed in range(3):
        step(whole, optimizer, seed)
    module, moments = module_state(whole), optimizer_state(optimizer, ["weight"])
    module = {k: v.clone() for k, v in module.items()}
    moments = {k: v.clone() for k, v in moments.items()}
    assert set(module) == {"weight"}  # what does not train is not saved
    step(whole, optimizer, 3)
    other, fresh = make()
    load_module_state(other, module)
    load_optimizer_state(fresh, ["weight"], moments)
    step(other, fresh, 3)
    assert torch.equal(other.weight, whole.weight)


def test_a_state_of_another_shape_is_refused():
    net = torch.nn.Linear(3, 2)
    with pytest.raises(DataError, match="weight"):
        load_module_state(net, {"weight": torch.ones(2, 4), "bias": torch.ones(2)})
    with pytest.raises(DataError, match="other"):
        load_module_state(net, {**module_state(net), "other": torch.ones(1)})


def test_differences_are_named_with_both_sides():
    saved = {"a": 1, "names": ["x", "y"], "recipe": {"lr": 0.1, "batch": 2}, "gone": 3}
    now = {"a": 1, "names": ["x", "z"], "recipe": {"lr": 0.2, "batch": 2}, "new": 4}
    assert differences(saved, now) == [
        "names[1]: saved 'y', now 'z'",
        "recipe.lr: saved 0.1, now 0.2",
        "gone: saved 3, now None",
        "new: saved None, now 4",
    ]
    assert differences({"n": [1]}, {"n": [1, 2]}) == ["n: saved 1 entries, now 2"]
    prompts = [[f"a photo of a {i}" for i in range(1000)]]
    (line,) = differences({"p": prompts}, {"p": [[*prompts[0][:-1], "b"]]})
    assert line == "p[0][999]: saved 'a photo of a 999', now 'b'"
    (line,) = differences({"p": prompts}, {"p": None})
    assert line.endswith("..., now None") and len(line) < 250
    assert differences(saved, dict(saved)) == []
