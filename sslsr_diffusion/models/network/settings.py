"""What a recipe says about a super-resolution network."""

from typing import Any, Literal

from pydantic import Field

from sslsr_diffusion.models.family import FamilySettings

FILE = "network.safetensors"  # of a result


class NetworkSettings(FamilySettings):
    """A network that maps low-resolution pixels to high-resolution ones: RRDBNet, SwinIR and all else that spandrel reads."""

    kind: Literal["network"] = "network"
    base: str | None = Field(
        None,
        description="File of weights (.safetensors or .pth), folder of a finished run's result, or owner/name#file of the hub; null: "
        "drawn at random from `architecture`.",
    )
    architecture: str | None = Field(
        None, description="Name of the network, for example RRDBNet or SwinIR; with a base, what its file must hold. null: as the base is."
    )
    arguments: dict[str, Any] = Field(
        {}, description="Arguments of that network by their published names; what is not given has the network's default, or is the base's."
    )
