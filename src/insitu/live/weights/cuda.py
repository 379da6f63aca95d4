"""The arena in GPU memory: one plain allocation, handed to another process as an IPC handle in JSON.

What torch exports is a handle of the CUDA allocation and of two small shared objects that keep it alive; all of it is bytes and
numbers. Device numbers differ between processes, so the GPU is named by its UUID.

Written from torch's interface and not yet run on a GPU.
"""

import base64
from typing import Any

import torch

_BYTES = ("handle", "ref_counter", "event")
_NUMBERS = ("size", "offset", "ref_counter_offset")


def export(memory: torch.Tensor) -> dict[str, Any]:
    """The handle of ``memory`` (uint8, on a GPU), for one importer: each needs an export of its own."""
    _, handle, size, offset, counter, counter_offset, event, synchronize = memory.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    parts = {"handle": handle, "ref_counter": counter, "event": event}
    return {
        "uuid": str(torch.cuda.get_device_properties(memory.device).uuid),
        **{name: base64.b64encode(part).decode() for name, part in parts.items()},
        "size": size,
        "offset": offset,
        "ref_counter_offset": counter_offset,
        "synchronize": bool(synchronize),
    }


def parse(message: Any) -> dict[str, Any]:
    """The fields of a handle, decoded. Raises ValueError on anything but what :func:`export` writes."""
    expected = {"uuid", "synchronize", *_BYTES, *_NUMBERS}
    if not isinstance(message, dict) or message.keys() != expected:
        raise ValueError(f"a CUDA handle must have exactly the fields {sorted(expected)}")
    if not isinstance(message["uuid"], str) or type(message["synchronize"]) is not bool:
        raise ValueError("a CUDA handle's uuid must be a string and its synchronize a boolean")
    for name in _NUMBERS:
        if type(message[name]) is not int or message[name] < 0:
            raise ValueError(f"a CUDA handle's {name} must be a number, 0 or more, not {message[name]!r}")
    decoded = dict(message)
    for name in _BYTES:
        if not isinstance(message[name], str) or len(message[name]) > 1024:
            raise ValueError(f"a CUDA handle's {name} must be a short base64 string")
        decoded[name] = base64.b64decode(message[name], validate=True)
    return decoded


def open_memory(message: Any) -> torch.Tensor:
    """The memory of a handle as uint8. Open it once and keep it: raises ValueError if its GPU is not visible here."""
    fields = parse(message)
    found = [
        index
        for index in range(torch.cuda.device_count())
        if str(torch.cuda.get_device_properties(index).uuid) == fields["uuid"]
    ]
    if not found:
        raise ValueError(
            f"the weights lie on GPU {fields['uuid']}, which this process does not see; set CUDA_VISIBLE_DEVICES"
        )
    storage = torch.UntypedStorage._new_shared_cuda(
        found[0],
        fields["handle"],
        fields["size"],
        fields["offset"],
        fields["ref_counter"],
        fields["ref_counter_offset"],
        fields["event"],
        fields["synchronize"],
    )
    memory = torch.empty(0, dtype=torch.uint8, device=f"cuda:{found[0]}")
    return memory.set_(storage)
