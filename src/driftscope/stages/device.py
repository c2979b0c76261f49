"""The device of a stage: chosen, noted in the provenance, and named in the header where it is not the CPU."""

from __future__ import annotations

from driftscope.evidence.provenance import note_device


def take_device(request: str) -> str:
    """Resolve a request (`driftscope.kernels.device.REQUESTS`) and note the device beside the evidence.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        InputError: ``cuda`` was asked for and cannot be had.
    """
    from driftscope.kernels.device import choose_device, kernels_on

    device = choose_device(request)
    note_device(device, kernels_on(device).device_name)
    return device


def device_parameter(device: str) -> dict[str, str]:
    """What the parameters of evidence say of its device: nothing for the CPU, whose bytes it must have."""
    return {} if device == "cpu" else {"device": device}
