"""What makes a decode step cheap: one mask for all layers, and no copy from the host."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import moerunner  # noqa: E402
from moerunner.models.decoding import attention  # noqa: E402
from moerunner.models.decoding.uploads import Uploads  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


def test_layers_share_what_is_made_of_a_mask_while_it_lives():
    mask = torch.rand(2, 1, 3, 24) < 0.7
    made = attention._to_add(mask, torch.float32)
    assert made.dtype == torch.float32
    assert torch.equal(made == 0, mask)
    assert bool((made[~mask] == float("-inf")).all())
    assert attention._to_add(mask, torch.float32) is made
    assert attention._to_add(mask, torch.bfloat16).dtype == torch.bfloat16
    assert attention._to_add(mask.clone(), torch.float32) is not made
    before = len(attention._added)
    del mask
    assert len(attention._added) < before, "it outlives the mask"


def test_a_step_makes_one_mask_for_all_layers(monkeypatch):
    """Each layer is handed the same tensor, by every Transformers that is tested."""
    asked, made = [], attention._to_add
    monkeypatch.setattr(attention, "_to_add", lambda mask, dtype: asked.append(made(mask, dtype)) or asked[-1])
    model, ids = tiny_model("mixtral"), torch.randint(3, 250, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    moerunner.generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=2)
    assert len(asked) == 2 * model.config.num_hidden_layers, "a prompt and a token"
    assert len({id(x) for x in asked}) == 2


DEVICE = torch.device("meta")  # any that is not the host


@pytest.mark.parametrize(
    "upload",
    [
        lambda n: torch.tensor(0.5 * n, device=DEVICE),
        lambda n: torch.tensor([1, n], dtype=torch.float32, device="meta"),
        lambda n: torch.as_tensor(n, device=DEVICE),
        lambda n: (torch.arange(4) * n).to(dtype=torch.float32, device=DEVICE),
        lambda n: torch.full((2,), n).expand(3, 2).to(DEVICE, torch.float16),
    ],
)
def test_what_is_the_same_again_is_not_copied_again(upload, monkeypatch):
    uploads = Uploads()
    with uploads:
        first = upload(1)
    kept = [tensor for *_, tensor in uploads._kept]
    assert len(kept) == 1
    assert kept[0] is not first, "the step may write to what it was given"
    clones, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: clones.append(self) or clone(self))
    with uploads.reused():
        again = upload(1)
        assert len(clones) == 1
        assert clones[0] is kept[0]
        assert (again.dtype, again.shape, again.device) == (first.dtype, first.shape, first.device)
        upload(2)  # goes the long way
    assert len(clones) == 1


def test_what_stays_on_the_host_and_what_is_on_the_device_already_are_no_uploads():
    uploads, there = Uploads(), torch.ones(3, device=DEVICE)
    with uploads:
        torch.tensor(1.0)
        torch.ones(3).to(torch.float16)
        there.to(torch.float16)
        there.to(DEVICE)
    assert not uploads._kept
