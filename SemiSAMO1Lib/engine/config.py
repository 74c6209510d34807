"""Every parameter of a training, with its meaning and its limits (pydantic)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..choices import PRESETS, full_name

Preset = Literal["quick", "standard", "thorough"]


def split_device(name: str) -> tuple[str, str]:
    """'auto', 'cpu' or 'cuda', and the number of a GPU, '' for any. Raises ValueError for other names."""
    if not (found := re.fullmatch(r"(auto|cpu|cuda)(?:(?<=cuda):(\d+))?", name)):
        raise ValueError(f"unknown device {name!r}; possible: auto, cpu, cuda, cuda:0, ...")
    return found[1], found[2] or ""


def _known_device(name: str) -> str:
    split_device(name)
    return name


#: Values for configurations that were saved before these parameters existed.
BEFORE: dict[str, Any] = {
    "labels_first": False,
    "neighbour_share": 0.0,
    "neighbour_gain": 0.0,
    "match_volumes": False,
    "certainty_around": 0.0,
    "edge_weight": 0.0,
    "surroundings": False,
    "detours": False,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RegistrationConfig(_Strict):
    """Propagation by registration."""

    largest_grid: int = Field(2_000_000, ge=1_000, le=2_000_000, description="voxels of the working grid at most")
    use_affine: bool = Field(True, description="try every start with an affine step too")
    affine_margin: float = Field(0.02, ge=0, le=1, description="share by which an affine start must be better")
    tie: float = Field(0.03, ge=0, le=1, description="starts within this share of the best are fused")
    atlases: int = Field(3, ge=1, description="labelled scans that vote: those that look most like the case")


class AugmentationConfig(_Strict):
    """Random changes of training patches."""

    rotation_degrees: float = Field(15, ge=0, le=180, description="largest turn about each axis")
    scale: float = Field(0.15, ge=0, lt=1, description="scales are drawn from 1 - scale to 1 + scale")
    elastic_mm: float = Field(3.0, ge=0, description="largest displacement of the elastic part at its nodes")
    mirror: bool = Field(False, description="flip slices at random; left and right change places")
    quarter_turns: bool = Field(False, description="turns by 90° in the axial plane at random (published setting)")
    intensity: bool = Field(True, description="noise, blur, brightness, contrast, gamma, bias field")


class GeneralistConfig(_Strict):
    """Frozen models: what they see, and how labels are carried by it."""

    checkpoint: str | None = Field(None, description="SAM-Med3D's file; None: it is looked for; random: random weights")
    architecture: Literal["full", "small"] = Field("full", description="small exists for tests only")
    random_seed: int = Field(0, ge=0, description="of random weights")
    preprocessing: Literal["official", "released"] = Field("official", description="1.5 mm RAS+, or SemiSAM-O1's")
    coverage: Literal["full", "centre"] = Field("full", description="centre: one 128³ window, as in the paper")
    prototypes: int = Field(1, ge=1, le=20, description="per class, by k-means; 1 is the paper")
    upsampling: Literal["trilinear", "nearest"] = Field("trilinear", description="nearest is the released one")
    label_cells: Literal["share", "nearest"] = Field("share", description="nearest is the released one")
    temperature: float = Field(0.1, gt=0, description="of the softmax over cosines")

    @model_validator(mode="after")
    def _nearest_needs_the_centre(self) -> GeneralistConfig:
        if self.label_cells == "nearest" and self.coverage != "centre":
            raise ValueError("label_cells 'nearest' reproduces the released code and needs coverage 'centre'")
        return self


class AssistanceConfig(_Strict):
    """How promptable generalists teach the student: SemiSAM and SemiSAM+."""

    generalists: tuple[str, ...] = Field(("sam-med3d",), min_length=1, description="who is asked")
    prompts: Literal["points", "mask", "both"] = Field("points", description="what the student's prediction gives")
    points: int = Field(5, ge=1, le=50, description="inside, and as many outside")
    answers: int = Field(2, ge=1, le=8, description="sets of points a class, semisam_plus only")
    weight: float = Field(0.1, ge=0, description="of the masks' term at its height")


class TrainingConfig(_Strict):
    """A whole training: one press of Train."""

    preset: Preset = Field("standard", description="where all other values come from that are not given")
    rounds: int = Field(3, ge=0, le=20, description="training rounds; 0 = no network is trained")
    iterations: int = Field(400, ge=1, description="optimizer steps per round")
    batch: int | None = Field(None, ge=1, description="pseudo-labelled patches a step; None: from the plan")
    labelled_batch: int | None = Field(None, ge=1, description="labelled patches a step; None: one a process")
    generalist: str = Field("registration", description="carries labels: registration, sam-med3d, mind or fused")
    learner: Annotated[str, AfterValidator(full_name)] = Field(
        "mean_teacher", description="how the specialist learns; published names (mt, uamt, ...) do as well"
    )
    specialist: str = Field("dynunet", description="the network: dynunet, or unet_3d, vnet as published")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd is the published one, for long runs")
    learning_rate: float = Field(0.005, gt=0, description="0.005 suits adamw, 0.01 sgd")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(1e-4, ge=0, description="of either optimizer")
    warm_start: bool = Field(True, description="begin a round with the weights of the round before; False as published")
    labels_first: bool = Field(
        True,
        description="the first of several rounds learns from labelled scans alone: another opinion than registration's "
        "for the first pseudo-labels of a network; False as published",
    )
    match_volumes: bool = Field(
        True, description="shift the logits after a round so that it draws as much of each class as it learned from"
    )
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the running average of the weights, which predicts")
    consistency: float = Field(0.1, ge=0, description="largest weight of a learner's term on unlabelled patches")
    pseudo_ramp: float = Field(0.3, gt=0, le=1, description="share of a round in which w(t) reaches 1")
    pseudo_weight: float = Field(1.0, ge=0, description="factor of L_pseudo; 0: as in SemiSAM and SemiSAM+")
    uncertainty_passes: int = Field(8, ge=2, le=64, description="T of uncertainty_mean_teacher")
    soft_pseudo_labels: bool = Field(False, description="train on probabilities weighted by confidence, not on argmax")
    training_voxels: int = Field(1_000_000, ge=10_000, description="voxels of the median case on the training grid")
    patch_voxels: int = Field(200_000, ge=4_096, description="voxels of a patch at most")
    patch: tuple[int, int, int] | None = Field(None, description="(z, y, x) voxels; None: from the plan")
    normalise: bool = Field(True, description="scale grey values as planned; False: they are scaled already")
    filters: int = Field(16, ge=4, le=64, description="channels of the finest level")
    ensemble_rounds: bool = Field(
        False, description="a round predicts with the mean of all specialists so far: for rounds from scratch"
    )
    surroundings: bool = Field(
        True,
        description="where the template's label fills a small part of its scan, use of each scan what lies around it",
    )
    detours: bool = Field(True, description="carry again what registration carried badly, through other cases")
    propagation_share: float = Field(0.5, ge=0, description="weight of the propagation beside a round's prediction")
    test_time_passes: int = Field(2, ge=1, le=16, description="predictions of a scan that are averaged; 1: as it is")
    neighbours: int = Field(8, ge=1, description="cases that vote on another: K, 5 as published")
    neighbour_share: float = Field(
        1.5, ge=0, description="weight of the registered neighbours' vote in round 0, and its unit later; 0: no votes"
    )
    neighbour_gain: float = Field(
        67.0,
        ge=0,
        description="how steeply the votes' weight beside a network rises, from 1/3 to 8/3 of neighbour_share, the "
        "further the network's check is behind theirs; 0: it is neighbour_share in every round",
    )
    certainty_around: float = Field(
        1.5,
        ge=0,
        description="standard deviation, in finest voxels, of the surroundings by which a network is sure, too",
    )
    edge_weight: float = Field(
        1.0,
        ge=0,
        description="what grey values count that look like outside of a class, beside an answer's log odds; 0 beside a "
        "network that they lead away from the labelled scans' labels",
    )
    uncertain_quantile: float = Field(
        0.9, gt=0, le=1, description="the most uncertain, from this quantile on, is refined"
    )
    refinement: Literal["region", "volume", "none"] = Field(
        "region", description="what is refined: uncertain regions, or uncertain volumes as published"
    )
    check_pseudo_labels: bool = Field(True, description="a case takes a new pseudo-label only if it is not worse")
    confidence_weights: bool = Field(
        True, description="pseudo-labels count by the propagation's confidence; else all 1"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of everything that is drawn")
    device: Annotated[str, AfterValidator(_known_device)] = Field("auto", description="auto, cpu, cuda or cuda:0")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        "auto", description="of the network; auto: bfloat16 where the device multiplies it in hardware"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; None: all that may be used")
    checkpoint_seconds: float = Field(20.0, ge=0, description="between two checkpoints of a round")
    registration: RegistrationConfig = Field(RegistrationConfig(), description="propagation by registration")
    generalists: GeneralistConfig = Field(GeneralistConfig(), description="frozen models")
    assistance: AssistanceConfig = Field(AssistanceConfig(), description="generalists that teach: SemiSAM, SemiSAM+")
    augmentation: AugmentationConfig = Field(AugmentationConfig(), description="random changes of patches")


def make_config(preset: str = "standard", **changes: Any) -> TrainingConfig:
    """The configuration of a preset with changes on top; None means "as the preset has it".

    Raises:
        pydantic.ValidationError: an unknown parameter or a value out of its range, named.
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are: {', '.join(PRESETS)}")
    values: dict[str, Any] = {"preset": preset, **PRESETS[preset]}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        elif value is not None:
            values[key] = value
    return TrainingConfig.model_validate(values)
