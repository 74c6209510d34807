"""The plan: what is computed from the grids, and that nothing else is looked at."""

import json

import numpy as np
import pytest
import torch
from engine_helpers import tiny_config, turned

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.config import TrainingConfig, make_config
from SemiSAMO1Lib.engine.data.intensities import IntensityPlan, scale_intensities
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.planning import (
    Plan,
    batch_size,
    intensity_plan,
    make_plan,
    network_shape,
    plan_to_json,
    precision_for,
    smaller,
    taken_over,
    target_spacing,
)
from SemiSAMO1Lib.engine.rounds import plan_of
from SemiSAMO1Lib.engine.specialists import make_specialist
from SemiSAMO1Lib.volume import Geometry, Volume

SHAPES = [
    ((96, 96, 96), (1.0, 1.0, 1.0)),
    ((24, 256, 256), (5.0, 0.7, 0.7)),
    ((20, 200, 200), (10.0, 1.0, 1.0)),
    ((8, 8, 8), (1.0, 1.0, 1.0)),
    ((12, 14, 13), (3.0, 3.0, 3.0)),
    ((1, 128, 128), (5.0, 1.0, 1.0)),
    ((300, 40, 40), (1.0, 1.0, 1.0)),
    ((5, 9, 300), (2.0, 2.0, 1.0)),
]


def plan_for(shape, spacing, **changes):
    geometry = Geometry(shape, tuple(map(float, spacing)))
    label = np.zeros(shape, np.uint8)
    label[0, 0, 0] = 1
    image = Volume(np.zeros(shape, np.float32), geometry)
    config = TrainingConfig(**changes)
    return make_plan([geometry], image, label, 2, config, 1.0, "cpu", 16 << 30)


def test_thick_slices_are_not_pooled_first():
    _, strides, _ = network_shape((24, 160, 160), (5.0, 1.0, 1.0), 200_000)
    assert strides[1] == (1, 2, 2), f"slices of 5 mm beside pixels of 1 mm: the first pooling is {strides[1]}"


def test_thick_slices_are_pooled_once_the_others_are_as_coarse():
    _, strides, _ = network_shape((24, 160, 160), (5.0, 1.0, 1.0), 200_000)
    assert any(s[0] == 2 for s in strides), f"slices are never pooled: {strides}"


def test_thick_slices_get_flat_kernels_first():
    _, _, kernels = network_shape((24, 160, 160), (5.0, 1.0, 1.0), 200_000)
    assert kernels[0] == (1, 3, 3), f"first kernel {kernels[0]}"


def test_isotropic_scans_are_pooled_alike():
    _, strides, _ = network_shape((96, 96, 96), (1.0, 1.0, 1.0), 1_000_000)
    assert all(len(set(s)) == 1 for s in strides), f"isotropic scans, strides {strides}"


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
@pytest.mark.parametrize("budget", [4_096, 90_000])
def test_patch_is_divisible_by_the_total_stride(shape, spacing, budget):
    patch, strides, _ = network_shape(shape, spacing, budget)
    total = np.prod(strides, axis=0)
    assert not (np.array(patch) % total).any(), f"patch {patch}, total stride {total}"


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
@pytest.mark.parametrize("budget", [4_096, 90_000])
def test_patch_keeps_the_budget(shape, spacing, budget):
    patch, _, _ = network_shape(shape, spacing, budget)
    assert np.prod(patch) <= 1.3 * budget, f"patch {patch} for {budget} voxels"


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_every_plan_can_be_built_as_a_network(shape, spacing):
    plan = plan_for(shape, spacing, filters=4, patch_voxels=4_096)
    make_specialist("dynunet", plan)


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_levels_agree(shape, spacing):
    plan = plan_for(shape, spacing)
    assert len(plan.strides) == len(plan.kernels) == len(plan.filters), f"{plan.strides} {plan.kernels} {plan.filters}"


def test_training_voxels_are_kept():
    spacing, _ = target_spacing([Geometry((200, 300, 300), (1.0, 0.5, 0.5))], 1_000_000)
    voxels = np.prod(np.array([200, 150, 150]) / spacing)
    assert voxels <= 1_001_000, f"{voxels:.0f} voxels on spacing {spacing}"


def test_finer_axes_are_coarsened_first():
    spacing, _ = target_spacing([Geometry((30, 300, 300), (5.0, 0.5, 0.5))], 1_000_000)
    assert spacing[0] == 5.0, f"slices of 5 mm became {spacing[0]} mm though pixels of 0.5 mm could give way"


def test_spacing_is_the_median():
    grids = [Geometry((10, 10, 10), (s, 1.0, 1.0)) for s in (1.0, 2.0, 9.0)]
    assert target_spacing(grids, 10**6)[0] == (2.0, 1.0, 1.0)


def test_less_memory_gives_a_smaller_patch():
    geometry = Geometry((128, 128, 128))
    image, label = Volume(np.zeros(geometry.shape, np.float32), geometry), np.ones(geometry.shape, np.uint8)
    sizes = [
        np.prod(make_plan([geometry], image, label, 2, TrainingConfig(), 1.0, "cpu", memory).patch)
        for memory in (64 << 20, 16 << 30)
    ]
    assert sizes[0] < sizes[1], f"patches of {sizes} voxels for 64 MiB and 16 GiB"


def test_filters_stop_at_320():
    assert max(plan_for((128, 128, 128), (1, 1, 1), filters=64, patch_voxels=10**6).filters) == 320


def test_orientation_does_not_matter():
    """A sagittal scan gives the plan of the axial one: axes are turned to the patient's first."""
    axial = Geometry((24, 128, 128), (5.0, 1.0, 1.0))
    sagittal = Geometry((128, 128, 24), (1.0, 1.0, 5.0), direction=(0, 0, 1, 1, 0, 0, 0, 1, 0))
    straight = Geometry((128, 24, 128), (1.0, 5.0, 1.0))
    image, label = Volume(np.zeros(axial.shape, np.float32), axial), np.ones(axial.shape, np.uint8)
    plans = [make_plan([g], image, label, 2, TrainingConfig(), 1.0, "cpu", 1 << 34) for g in (sagittal, straight)]
    assert sorted(plans[0].spacing) == sorted(plans[1].spacing) == [1.0, 1.0, 5.0]


def test_sagittal_slices_are_thick_along_the_third_axis():
    sagittal = Geometry((128, 128, 24), (1.0, 1.0, 5.0))
    turned_by = Geometry((24, 128, 128), (5.0, 1.0, 1.0), direction=(0, 0, 1, 1, 0, 0, 0, 1, 0))
    image, label = Volume(np.zeros(sagittal.shape, np.float32), sagittal), np.ones(sagittal.shape, np.uint8)
    plans = [make_plan([g], image, label, 2, TrainingConfig(), 1.0, "cpu", 1 << 34) for g in (sagittal, turned_by)]
    assert plans[0].patch == plans[1].patch, "slices stacked along x are the same scan however it is stored"


def test_same_arguments_give_the_same_plan():
    assert plan_for((50, 60, 70), (2, 1, 1)) == plan_for((50, 60, 70), (2, 1, 1))


def test_plan_survives_json():
    plan = plan_for((24, 256, 256), (5, 0.7, 0.7))
    assert Plan.model_validate(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_unknown_entry_of_a_plan_is_refused():
    with pytest.raises(ValueError, match="colour"):
        Plan.model_validate({**plan_to_json(plan_for((32, 32, 32), (1, 1, 1))), "colour": 1})


def test_precision_on_request():
    assert plan_for((32, 32, 32), (1, 1, 1), precision="32-true").precision == "32-true"


# ---------------------------------------------------------------------- no other label, no voxel of another case


def refusing():
    raise AssertionError("a scan was read for the plan")


def test_plan_reads_no_voxel_of_the_cases(tmp_path):
    geometry = Geometry((20, 20, 20))
    template = LabelledCase(
        "t", Volume(np.zeros(geometry.shape, np.float32), geometry), Volume(np.ones(geometry.shape, np.uint8), geometry)
    )
    cases = [EngineCase("a", Geometry((20, 20, 20), direction=turned()), refusing)]
    plan_of(cases, [template], 2, tiny_config(), Store(tmp_path), make_fabric("cpu", "32-true"))


def test_plan_uses_the_first_label_only(tmp_path):
    """Any further label may change: the plan stays."""
    geometry = Geometry((20, 20, 20))
    grey = np.random.default_rng(0).normal(0, 300, geometry.shape).astype(np.float32)
    first = LabelledCase("t", Volume(grey, geometry), Volume((grey > 0).astype(np.uint8), geometry))
    plans = []
    for number, other in enumerate((np.zeros(geometry.shape, np.uint8), np.ones(geometry.shape, np.uint8))):
        second = LabelledCase("u", Volume(grey, geometry), Volume(other, geometry))
        fabric = make_fabric("cpu", "32-true")
        plans.append(plan_of([], [first, second], 2, tiny_config(), Store(tmp_path / str(number)), fabric))
    assert plans[0] == plans[1], "a label that is not the template's changed the plan"


def test_written_plan_is_obeyed(tmp_path):
    """A plan on disk counts, also when the configuration would give another one."""
    geometry = Geometry((20, 20, 20))
    template = LabelledCase(
        "t", Volume(np.zeros(geometry.shape, np.float32), geometry), Volume(np.ones(geometry.shape, np.uint8), geometry)
    )
    fabric = make_fabric("cpu", "32-true")
    first = plan_of([], [template], 2, tiny_config(), Store(tmp_path), fabric)
    again = plan_of([], [template], 2, tiny_config(filters=32, batch=4), Store(tmp_path), fabric)
    assert first == again, "the plan was computed anew"


# ---------------------------------------------------------------------- intensities


def volume(array):
    return Volume(array, Geometry(array.shape))


def test_ct_is_known_by_air():
    array = np.full((10, 10, 10), -1000, np.int16)
    array[3:7] = 60
    array[4, 4] = 400
    assert intensity_plan(volume(array), (array > 0).astype(np.uint8)).scheme == "fixed"


@pytest.mark.parametrize(("low", "high"), [(0, 4000), (-3, 3), (-150, 900), (-1000, 0)])
def test_other_scans_are_not_ct(low, high):
    array = np.linspace(low, high, 1000).reshape(10, 10, 10)
    assert intensity_plan(volume(array), np.ones(array.shape, np.uint8)).scheme == "per_case"


def test_ct_window_comes_from_the_labelled_voxels():
    array = np.linspace(-1000, 1000, 8000).reshape(20, 20, 20)
    plan = intensity_plan(volume(array), ((array > 0) & (array < 100)).astype(np.uint8))
    assert 0 <= plan.low < 5 and 95 < plan.high <= 100, f"window [{plan.low:.1f}, {plan.high:.1f}], expected 0 to 100"


def test_ct_keeps_the_same_scale_in_every_scan():
    plan = IntensityPlan(scheme="fixed", low=-100, high=300, mean=50, deviation=100)
    found = scale_intensities(volume(np.array([[[-1000.0, -100, 50, 300, 3000]]])), plan)
    assert np.allclose(found, [[[-1.5, -1.5, 0, 2.5, 2.5]]])


def test_other_scans_have_mean_zero_and_deviation_one():
    array = np.random.default_rng(0).gamma(3, 40, (16, 16, 16)).astype(np.float32)
    found = scale_intensities(volume(array), IntensityPlan(scheme="per_case", low=0.5, high=99.5))
    assert (abs(float(found.mean())), float(found.std())) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-3))


def test_padding_does_not_count():
    array = np.random.default_rng(0).normal(100, 10, (16, 16, 16)).astype(np.float32)
    plan = IntensityPlan(scheme="per_case", low=0.5, high=99.5)
    alone = scale_intensities(volume(array), plan)
    padded = scale_intensities(volume(np.pad(array, ((8, 0), (0, 0), (0, 0)), constant_values=-1024)), plan)
    assert np.allclose(alone, padded[8:], atol=1e-5), "constant padding changed the scale of the scan"


def test_scale_of_grey_values_does_not_matter():
    array = np.random.default_rng(0).normal(100, 10, (12, 12, 12)).astype(np.float32)
    plan = IntensityPlan(scheme="per_case", low=0.5, high=99.5)
    found = scale_intensities(volume(7 * array + 300), plan)
    assert np.allclose(found, scale_intensities(volume(array), plan), atol=1e-3)


# ---------------------------------------------------------------------- configuration


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="learning_rat"):
        make_config(learning_rat=0.1)


def test_value_out_of_range_is_named():
    with pytest.raises(ValueError, match="iterations"):
        make_config(iterations=0)


@pytest.mark.parametrize("preset", ["quick", "standard", "thorough"])
def test_presets_are_valid(preset):
    assert make_config(preset).preset == preset


def test_changes_win_over_the_preset():
    assert make_config("quick", iterations=7, rounds=None).iterations == 7


def test_none_means_as_the_preset_has_it():
    assert make_config("quick", rounds=None).rounds == 2


# ---------------------------------------------------------------------- less memory


def ever_smaller(plan, config):
    """A plan, and what is left of it each time that memory does not suffice."""
    found = []
    while plan is not None:
        found.append(plan)
        plan = smaller(plan, config, "cpu")
    return found


@pytest.mark.parametrize(("shape", "spacing"), [((40, 128, 128), (2.0, 1.0, 1.0)), ((28, 28, 28), (1.0, 1.0, 1.0))])
@pytest.mark.parametrize("specialist", ["dynunet", "unet_3d", "vnet"])
def test_smaller_plans_can_be_trained_until_none_is_left(shape, spacing, specialist):
    changes = {"batch": 3, "labelled_batch": 5, "specialist": specialist, "filters": 4}
    plans = ever_smaller(plan_for(shape, spacing, **changes), TrainingConfig(**changes))
    sizes = [(plan.batch + plan.labelled) * int(np.prod(plan.patch)) for plan in plans]
    assert sizes == sorted(set(sizes), reverse=True), f"voxels of a step must fall with every try: {sizes}"
    image = torch.randn(1, 1, *plans[-1].patch)
    assert make_specialist(specialist, plans[-1])(image).shape[2:] == plans[-1].patch


def test_a_smaller_patch_has_the_precision_that_its_depth_allows():
    config = TrainingConfig(precision="bf16-mixed", patch_voxels=300_000)
    plans = ever_smaller(plan_for((64, 64, 64), (1.0, 1.0, 1.0), **config.model_dump()), config)
    wanted = [precision_for("bf16-mixed", "cpu", plan.patch, plan.strides) for plan in plans]
    assert [plan.precision for plan in plans] == wanted and "32-true" in wanted, "no plan of these is two slices deep"


def test_a_smaller_patch_that_is_turned_stays_as_wide_as_deep():
    config = TrainingConfig(augmentation={"quarter_turns": True}, patch=(32, 64, 64))
    plans = ever_smaller(plan_for((40, 80, 80), (1.0, 1.0, 1.0), **config.model_dump()), config)
    assert len(plans) > 2 and all(plan.patch[1] == plan.patch[2] for plan in plans), [plan.patch for plan in plans]


@pytest.mark.parametrize("specialist", ["unet_3d", "vnet"])
def test_the_smallest_budget_leaves_a_patch_that_a_network_with_its_own_strides_can_have(specialist):
    plan = plan_for((40, 40, 40), (1.0, 1.0, 1.0), patch_voxels=4_096, specialist=specialist)
    assert make_specialist(specialist, plan) is not None and max(plan.patch) == 32


# ---------------------------------------------------------------------- going on from an earlier plan


def test_a_plan_that_is_taken_over_has_the_precision_of_this_device():
    earlier = plan_for((32, 32, 32), (1.0, 1.0, 1.0), specialist="unet_3d").model_copy(
        update={"precision": "bf16-mixed"}
    )
    assert taken_over(earlier, TrainingConfig(), "cpu", 16 << 30).precision == "32-true", "a level is two slices deep"


def test_a_plan_that_is_taken_over_has_the_batch_of_this_device_and_of_these_processes():
    config = TrainingConfig()
    on_a_gpu = plan_for((60, 80, 80), (1.0, 1.0, 1.0)).model_copy(update={"batch": 4})
    found = taken_over(on_a_gpu, config, "cpu", 16 << 30, processes=2)
    assert (found.batch, found.labelled) == (2, 2), "one large patch a process is what a CPU's plan has"
    assert found.patch == on_a_gpu.patch and found.strides == on_a_gpu.strides, "it is the same network"


def test_a_plan_that_was_made_smaller_for_its_memory_stays_so():
    small = plan_for((16, 16, 16), (1.0, 1.0, 1.0))
    assert small.batch > 1, "small patches make a larger batch, or this test says nothing"
    shrunk = small.model_copy(update={"batch": 1})
    assert taken_over(shrunk, TrainingConfig(), "cpu", 16 << 30).batch == 1


def test_a_gpu_with_more_memory_gets_a_larger_batch():
    config = make_config("quick")
    small, large = (batch_size(100_000, config, "cuda", gib << 30) for gib in (1, 24))
    assert small < large <= 4, f"1 GiB gave {small} patches, 24 GiB {large}"


@pytest.mark.parametrize(
    ("patch", "strides", "expected"),
    [
        ((32, 32, 32), ((1, 1, 1), *[(2, 2, 2)] * 4), "32-true"),
        ((2, 48, 48), ((1, 1, 1), (1, 2, 2)), "32-true"),
        ((48, 32, 32), ((1, 1, 1), *[(2, 2, 2)] * 4), "bf16-mixed"),
        ((1, 48, 48), ((1, 1, 1), (1, 2, 2)), "bf16-mixed"),
    ],
)
def test_no_half_precision_on_a_cpu_for_levels_two_slices_deep(patch, strides, expected):
    assert precision_for("bf16-mixed", "cpu", patch, strides) == expected, "torch's CPU kernels fail at depth 2"


@pytest.mark.parametrize(("in_hardware", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_may_have_levels_two_slices_deep(monkeypatch, in_hardware, expected):
    """Half precision where the GPU has it in hardware; it is not emulated."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or in_hardware)
    assert precision_for("auto", "cuda", (32, 32, 32), ((1, 1, 1), *[(2, 2, 2)] * 4)) == expected


def test_a_given_patch_is_obeyed():
    assert plan_for((20, 30, 40), (1, 1, 1), patch=(16, 24, 32)).patch == (16, 24, 32)


def test_a_patch_that_the_network_cannot_have_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unet_3d cannot have the patch \(30, 32, 32\).*nearest is \(32, 32, 32\)"):
        plan_for((40, 40, 40), (1, 1, 1), patch=(30, 32, 32), specialist="unet_3d")


def test_grey_values_that_are_left_as_they_are_do_not_overflow(tmp_path):
    """float16 ends at 65,504, and knows whole numbers up to 2,048."""
    plan, array = plan_for((4, 5, 6), (1, 1, 1), normalise=False), np.full((4, 5, 6), 70_001, np.int32)
    cohort = Cohort([], [], plan, Store(tmp_path))
    scan = volume(array)
    assert np.array_equal(cohort.scaled(scan, cohort.grid(scan.geometry)), array)


def test_grey_values_are_left_as_they_are_on_request():
    plan = plan_for((20, 30, 40), (1, 1, 1), normalise=False)
    array = np.random.default_rng(0).normal(5, 3, (4, 5, 6)).astype(np.float32)
    assert np.array_equal(scale_intensities(volume(array), plan.intensity), array), "normalise=False changes nothing"
