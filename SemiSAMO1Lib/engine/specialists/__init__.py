"""The networks that are trained, by name. A new one is a function of the plan and a line here."""

from collections.abc import Callable

from torch import nn

from ..planning import Plan
from .dropout import with_sample_dropout
from .heads import LogitsOnly, TwoHeads
from .networks import dynunet, vnet
from .unet_3d import unet_3d, unet_3d_sdf

SPECIALISTS: dict[str, Callable[[Plan], nn.Module]] = {
    "dynunet": dynunet,
    "vnet": vnet,
    "unet_3d": unet_3d,
    "unet_3d_sdf": unet_3d_sdf,
}


#: Networks that give a signed distance map beside their logits.
WITH_DISTANCE = {"unet_3d_sdf"}


def require_specialist(name: str) -> None:
    """Raise ValueError for an unknown name, naming those there are."""
    if name not in SPECIALISTS:
        raise ValueError(f"unknown specialist {name!r}; there are: {', '.join(sorted(SPECIALISTS))}")


def make_specialist(name: str, plan: Plan, with_distance: bool = False) -> nn.Module:
    """The network with this name.

    Args:
        name: in SPECIALISTS.
        plan: its shape.
        with_distance: the learner needs a signed distance map in (-1, 1) too: the network then gives (distances,
            logits), each (B, C, z, y, x); channel 0 of the distances is not used.

    Raises:
        ValueError: an unknown name, naming those there are.
    """
    require_specialist(name)
    return with_sample_dropout(_made(name, plan, with_distance))


def _made(name: str, plan: Plan, with_distance: bool) -> nn.Module:
    if name in WITH_DISTANCE:
        network = SPECIALISTS[name](plan)
        return network if with_distance else LogitsOnly(network, network.get_submodule("final2"))
    if with_distance and name == "unet_3d":
        return unet_3d_sdf(plan)
    if with_distance:
        return TwoHeads(SPECIALISTS[name](plan.model_copy(update={"classes": 2 * plan.classes})))
    return SPECIALISTS[name](plan)
