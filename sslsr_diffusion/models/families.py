"""The families of networks by the recipe's `model.kind`: a new one is a folder and a line here."""

from sslsr_diffusion.models.family import Family
from sslsr_diffusion.tables import named

FAMILIES: dict[str, Family] = {
    kind: named(f"sslsr_diffusion.models.{where}")()
    for kind, where in {
        "stablesr": "stablesr.family:StableSR",
        "network": "network.family:Network",
        "one_step": "one_step.family:OneStep",
        "x4": "x4.family:X4",
    }.items()
}
