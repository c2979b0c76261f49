"""What a model must be before a copy of it is written."""

from __future__ import annotations

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import is_of_images
from driftscope.artifacts.rope_factors import without_stored_factors
from driftscope.errors import InputError

# Old checkpoints hold the rotary frequencies, which every reader computes.
_COMPUTED = ".rotary_emb.inv_freq"


def source_of_copy(artifact: Artifact) -> Artifact:
    """The artifact with exactly the tensors that a copy will hold.

    Raises:
        InputError: a tensor is missing, or one would be lost because it has no canonical name. Those that a
            model of text and images has for the images are left out: the copy is of its text model.
    """
    check_complete(artifact)
    lost = [name for name in artifact.unmapped if not name.endswith(_COMPUTED) and not is_of_images(name)]
    if lost:
        raise InputError(
            f"{artifact.path}: {lost[0]} would be missing from a copy ({len(lost)} such in all); "
            f"{artifact.config.architecture} has no tensor of that name"
        )
    return without_stored_factors(artifact)
