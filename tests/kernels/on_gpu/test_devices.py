"""What CUDA refuses of tensors on two devices: here so that the stand-in is held against it."""

import pytest
import torch
from kernel_worlds import DEVICE

pytestmark = pytest.mark.gpu

REFUSED = {
    "sum": lambda there, here: there + here,
    "comparison": lambda there, here: torch.equal(there, here),
    "concatenation": lambda there, here: torch.cat([there, here]),
    "index on the device": lambda there, here: here[there],
    "values from the CPU": lambda there, here: there.__setitem__(there, here),
    "array": lambda there, here: there.numpy(),
    "choice": lambda there, here: torch.where(there > 0, here, here),
}
ALLOWED = {
    "copy": lambda there, here: there.copy_(here),
    "copy to a slice": lambda there, here: there.__setitem__(slice(0, 2), here[:2]),
    "index on the CPU": lambda there, here: there[here],
    "a scalar": lambda there, here: there + torch.tensor(1),
    "there and back": lambda there, here: (
        torch.equal(there.cpu(), here) and here.to(DEVICE) + there
    ),
}


def two() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(3, device=DEVICE), torch.arange(3)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](*two())


@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(what: str) -> None:
    ALLOWED[what](*two())


def test_where_tensors_are() -> None:
    there, here = two()
    assert there.device == DEVICE and there.is_cuda and not here.is_cuda
    assert (there + 1).is_cuda and there[1:].view(1, 2).is_cuda and not there.to("cpu").is_cuda
    assert here.to(DEVICE, non_blocking=True).is_cuda and there.to(torch.uint8).is_cuda
    assert here.to(DEVICE).data_ptr() != here.data_ptr()
    assert torch.zeros_like(there).is_cuda and all(one.is_cuda for one in there.unbind())
