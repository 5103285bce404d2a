"""The families of networks by the recipe's `model.kind`: a new one is a folder and a line here."""

from __future__ import annotations

from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.stablesr.family import StableSR

FAMILIES: dict[str, Family] = {family.kind: family for family in (StableSR(),)}
