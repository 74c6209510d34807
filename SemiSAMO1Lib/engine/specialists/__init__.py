"""The networks that are trained, by name. A new one is a function of the plan and a line here."""

from collections.abc import Callable

from torch import nn

from ..planning import Plan
from .networks import dynunet, vnet
from .unet_3d import unet_3d, unet_3d_sdf

SPECIALISTS: dict[str, Callable[[Plan], nn.Module]] = {
    "dynunet": dynunet,
    "vnet": vnet,
    "unet_3d": unet_3d,
    "unet_3d_sdf": unet_3d_sdf,
}


def make_specialist(name: str, plan: Plan) -> nn.Module:
    """The network with this name. Raises ValueError naming those there are."""
    if name not in SPECIALISTS:
        raise ValueError(f"unknown specialist {name!r}; there are: {', '.join(sorted(SPECIALISTS))}")
    return SPECIALISTS[name](plan)
