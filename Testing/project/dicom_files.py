"""DICOM series with known truth: one file a slice, a patient's name in every tag that may hold one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from SemiSAMO1Lib.volume import Volume

PATIENT = "Mustermann^Erika"


def write_series(
    folder: Path, volume: Volume, places: NDArray[np.float64] | None = None, series: str = "", prefix: str = "IM"
) -> tuple[str, list[str]]:
    """Write a volume as CT slices, last slice first, so that file names say nothing of the order.

    Args:
        folder: where the files go.
        volume: whole numbers.
        places: (slices, 3) positions of the slices in mm; None: the volume's own.
        series: series UID; empty: a new one.
        prefix: beginning of the file names.

    Returns:
        The series UID, and the instance UIDs in the order of the volume's slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    geometry, series = volume.geometry, series or generate_uid()
    study, frame = generate_uid(), generate_uid()
    matrix = geometry.index_to_space
    if places is None:
        places = np.array([(matrix @ np.array([0, 0, k, 1.0]))[:3] for k in range(geometry.shape[0])])
    direction = np.reshape(geometry.direction, (3, 3))
    uids = []
    for number, (place, pixels) in enumerate(zip(places, volume.array, strict=True)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        uids.append(meta.MediaStorageSOPInstanceUID)
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, uids[-1]
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.Modality, data.PatientName, data.PatientID = "CT", PATIENT, "Mustermann-K11Q"
        data.PatientBirthDate, data.InstitutionName, data.SeriesDescription = "19640812", "Klinik", "Mustermann"
        data.ImagePositionPatient = [f"{x:.9g}"[:16] for x in place]
        data.ImageOrientationPatient = [f"{x:.9f}"[:16] for x in (*direction[:, 0], *direction[:, 1])]
        data.PixelSpacing = [geometry.spacing[1], geometry.spacing[2]]
        data.SliceThickness, data.InstanceNumber = geometry.spacing[0], number + 1
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept = "1", "-1000"
        data.PixelData = (pixels + 1000).astype("<i2").tobytes()
        data.save_as(folder / f"{prefix}{len(places) - number:04d}", enforce_file_format=True)
    return series, [str(uid) for uid in uids]
