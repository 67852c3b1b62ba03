"""Memory that is used on more than one stream of a device.

[Note: stream]  On a GPU an operation is put at the end of a stream and the host goes on. One stream runs in order;
two do not wait for each other unless one is told to. Backward hooks run on the streams of the forward pass, `step` on
its caller's, collectives on one of their own. Two things can go wrong when memory wanders between them, both without an
error: a stream reads what another has not written yet, or the allocator, which knows only the stream that asked for the
memory, gives it away while another still uses it.

The user's part is what torch.optim asks for, too: the stream of `step` waits for that of backward, and the next forward
for that of `step`. The rest is `take_over`. See docs/design/step.md, "Streams".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

DEVICES_WITH_STREAMS = ("cuda", "xpu")


def current(device: torch.device) -> torch.Stream | None:
    """Return the stream that operations on ``device`` are put into now; None where there are no streams."""
    return torch.accelerator.current_stream(device.index) if device.type in DEVICES_WITH_STREAMS else None


def take_over(tensors: Collection[Tensor], *, after: Iterable[torch.Stream | None] = ()) -> None:
    """Let the current stream use ``tensors`` from now on, and whoever holds them last let go of them at any time.

    On the stream that the memory was allocated on it does nothing. The host never waits.

    Args:
        tensors: On one device.
        after: Streams that have written ``tensors`` and that nothing has made the current one wait for yet.
    """
    here = current(next(iter(tensors)).device) if tensors else None
    if here is None:
        return
    for other in after:
        if other is not None and other != here:
            here.wait_stream(other)
    for tensor in tensors:
        tensor.record_stream(here)
