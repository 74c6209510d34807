"""MONAI networks in the shape that the plan asks for. No batch norm: a batch holds patches of two distributions."""

from __future__ import annotations

from monai.networks.nets import DynUNet, VNet
from torch import nn

from ..planning import Plan, require_patch


def dynunet(plan: Plan) -> nn.Module:
    """The U-Net of nnU-Net with the plan's depth, strides and kernels: (B, 1, z, y, x) -> (B, C, z, y, x) logits."""
    network: nn.Module = DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=plan.classes,
        kernel_size=plan.kernels,
        strides=plan.strides,
        upsample_kernel_size=plan.strides[1:],
        filters=plan.filters,
        norm_name=("INSTANCE", {"affine": True}),
        dropout=0.1,
    )
    return network


def vnet(plan: Plan) -> nn.Module:
    """MONAI's V-Net with instance norm in place of its hard-coded batch norm; patch sides must be multiples of 16."""
    require_patch("vnet", plan)
    network: nn.Module = VNet(spatial_dims=3, in_channels=1, out_channels=plan.classes, dropout_prob_down=0.1)
    return with_instance_norm(network)


def with_instance_norm(network: nn.Module) -> nn.Module:
    """Replace every batch norm by an instance norm with learned scale and shift, in place."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(network, name, nn.InstanceNorm3d(child.num_features, affine=True))
        else:
            with_instance_norm(child)
    return network
