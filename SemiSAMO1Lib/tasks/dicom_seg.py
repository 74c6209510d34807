"""DICOM SEG: a segmentation beside the series that it belongs to. Only where every slice is the series' own.

What pydicom and highdicom say of a header quotes its tags. None of it is passed on: who the patient is belongs into the
DICOM file alone.
"""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, files
from ..project.export import Exported
from ..project.label_table import Label, LabelTable
from ..volume import Geometry, Volume

#: Largest distance between a slice of the segmentation and its source, mm; largest difference of directions.
TOLERANCE_MM, TOLERANCE_DIRECTION = 0.01, 1e-4

#: What a label without codes is called: some tissue.
_TISSUE = ("85756007", "SCT", "Tissue")

#: Tags that a DICOM file must have, but may leave empty; some scanners leave them out.
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)

#: What DICOM knows as a patient's sex.
_SEXES = ("M", "F", "O", "", None)

_OTHERWISE = "Export it as NRRD, which keeps any grid."


class NotItsGrid(ValueError):
    """A segmentation does not lie on the slices of its source series."""


class UnusableHeaders(ValueError):
    """The headers of a series cannot be carried over into a DICOM SEG."""


class SeriesOnDisk:
    """The original DICOM files, found by their instance UIDs; headers are read once.

    Args:
        folder: holds them, at any depth.

    Raises:
        ValueError: no folder, or highdicom is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        try:
            import highdicom
            import pydicom
        except ImportError as error:
            raise ValueError(
                f"DICOM SEG needs the extra 'export' ({error}): pip install 'semisamo1[export]'; in Slicer the "
                "environment that Set-up makes has it, Slicer's own Python has not"
            ) from error
        del highdicom
        if folder is None or not folder.is_dir():
            raise ValueError(f"DICOM SEG needs the folder of the original series (--dicom); {folder} is none")
        self._paths: dict[str, Path] = {}
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            try:
                with warnings.catch_warnings(action="ignore"):
                    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"])
            except (pydicom.errors.InvalidDicomError, OSError):
                continue
            if "SOPInstanceUID" in header:
                self._paths[str(header.SOPInstanceUID)] = path

    def write(self, path: Path, one: Exported, labels: Volume, table: LabelTable) -> list[str]:
        """Write a case's labels (values on the scan's grid) as one DICOM SEG.

        Returns:
            tags of the series that are not as DICOM has them, and were left empty.

        Raises:
            NotItsGrid: the labels do not lie on the series' slices.
            UnusableHeaders: the headers cannot be read, or carried over.
        """
        import pydicom

        uids = one.case.source.get("instance_uids") or []
        if one.case.source.get("kind") != "dicom" or not uids:
            raise NotItsGrid(f"the scan of {one.case.id} did not come from DICOM. {_OTHERWISE}")
        if missing := [uid for uid in uids if uid not in self._paths]:
            raise NotItsGrid(f"{len(missing)} of {len(uids)} slices of its series are not in the folder. {_OTHERWISE}")
        present = [label for label in table if (labels.array == label.value).any()]
        if not present:
            raise NotItsGrid(f"no label was found in {one.case.id}; an empty DICOM SEG is not written")
        with warnings.catch_warnings(action="ignore"), files.atomic_path(path) as temporary:
            try:
                sources = [pydicom.dcmread(self._paths[uid]) for uid in uids]
                emptied = sorted({key for source in sources for key in _emptied(source)})
                _require_own_grid(labels.geometry, sources)
                _segmentation(one, labels, present, sources).save_as(temporary)
            except (NotItsGrid, MemoryError):
                raise
            except OSError as error:  # its folders may be called after patients
                raise OSError(error.errno, f"{error.strerror or 'the files of its series cannot be read'}") from None
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
                raise UnusableHeaders(
                    f"the headers of its series are not as DICOM has them ({where}). {_OTHERWISE}"
                ) from None
        return emptied


def _emptied(source: Any) -> list[str]:
    """Tags that may be empty and are not as DICOM has them; they are emptied here, and those that lack are added."""
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    wrong = []
    for key in _MAY_BE_EMPTY:
        element = source.get_item(key) if key in source else None
        if element is not None:
            try:
                value = source[key].value
                validate_value(source[key].VR, str(value or ""), RAISE)
                if key == "PatientSex" and value not in _SEXES:
                    raise ValueError
            except (ValueError, TypeError, OverflowError):
                wrong.append(key)
                del source[key]
        if key not in source:
            setattr(source, key, "")
    return wrong


def _require_own_grid(grid: Geometry, sources: list[Any]) -> None:
    """Compare slice by slice: place, directions, size of pixels, rows and columns. Raises NotItsGrid."""
    if grid.shape[0] != len(sources):
        raise NotItsGrid(f"the segmentation has {grid.shape[0]} slices, its series {len(sources)}. {_OTHERWISE}")
    direction = np.reshape(grid.direction, (3, 3))
    wanted = np.r_[direction[:, 0], direction[:, 1]]
    needed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")
    for number, source in enumerate(sources):
        if lacking := [tag for tag in needed if tag not in source]:
            raise NotItsGrid(f"slice {number + 1} of its series has no {', '.join(lacking)}. {_OTHERWISE}")
        place = (grid.index_to_space @ np.array([0, 0, number, 1.0]))[:3]
        apart = float(np.linalg.norm(place - np.array(source.ImagePositionPatient, float)))
        turned = float(np.abs(wanted - np.array(source.ImageOrientationPatient, float)).max())
        sizes = np.abs(np.array(source.PixelSpacing, float) - np.array(grid.spacing[1:])).max()
        if (int(source.Rows), int(source.Columns)) != grid.shape[1:]:
            what = f"{grid.shape[1:]} pixels, the source {(int(source.Rows), int(source.Columns))}"
        elif apart > TOLERANCE_MM:
            what = f"its place, {apart:.3g} mm from the source's"
        elif turned > TOLERANCE_DIRECTION or sizes > 1e-3:
            what = "other directions or pixel sizes than the source"
        else:
            continue
        raise NotItsGrid(f"slice {number + 1} is not one of its series: {what}. {_OTHERWISE}")


def _segmentation(one: Exported, labels: Volume, present: list[Label], sources: list[Any]) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    by_person = one.origin in ("template", "imported")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="SemiSAMO1", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    kinds = highdicom.seg.SegmentAlgorithmTypeValues
    kind = kinds.MANUAL if by_person else kinds.SEMIAUTOMATIC if one.origin == "corrected" else kinds.AUTOMATIC
    numbers = {label.value: number for number, label in enumerate(present, start=1)}
    descriptions = [
        _described(
            label,
            highdicom.seg.SegmentDescription(
                segment_number=numbers[label.value],
                segment_label=label.name[:64],
                segmented_property_category=_code(label, "category") or _concept(_TISSUE),
                segmented_property_type=_code(label, "type") or _concept(_TISSUE),
                algorithm_type=kind,
                algorithm_identification=None if by_person else algorithm,
                anatomic_regions=[region] if (region := _code(label, "region")) else None,
            ),
        )
        for label in present
    ]
    lookup = np.zeros(int(labels.array.max()) + 1, np.uint8)
    for value, number in numbers.items():
        lookup[value] = number
    made = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=lookup[labels.array],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=900,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="SemiSAMO1",
        manufacturer_model_name="SemiSAMO1",
        software_versions=__version__,
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=f"{one.what} by {one.by}"[:64],
    )
    made.SpecificCharacterSet = "ISO_IR 192"  # names of labels and people in any script
    return made


def _described(label: Label, description: Any) -> Any:
    """The description with what a person said besides: left or right of the structure, and of its region."""
    if modifier := _code(label, "modifier"):
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    if (modifier := _code(label, "region_modifier")) and "AnatomicRegionSequence" in description:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [modifier]
    return description


def _code(label: Label, key: str) -> Any:
    """A code of a label's terminology; None where nobody chose it."""
    row = (label.terminology or {}).get(key)
    return _concept((row["value"], row["scheme"], row["meaning"])) if row else None


def _concept(code: tuple[str, str, str]) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(*code)
