"""The export job: every segmentation as NRRD, NIfTI or DICOM SEG, with a table of volumes and origins."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..engine.observer import stop_if_asked
from ..job.folder import JobFolder
from ..project import LabelError, Project
from ..project.export import FORMATS, chosen, require_output, rows_of, write_labels, write_tables
from .reporter import Reporter


def export(job: JobFolder, reporter: Reporter) -> None:
    """Export a project: parameters `output`, `format`, and `dicom`, the folder of the original series.

    A case that cannot be written is left out and said; the others are.
    """
    reporter.handshake(library=__version__)
    parameters = job.spec()["parameters"]
    folder, kind = Path(parameters["output"]), parameters["format"]
    project = Project(job.project)
    require_output(project, folder, kind)
    if kind == "dicom-seg":
        from .dicom_seg import SeriesOnDisk

        series = SeriesOnDisk(Path(parameters["dicom"]) if parameters.get("dicom") else None)
    found, left_out = chosen(project)
    table, rows = project.state.labels, []
    for position, one in enumerate(found):
        stop_if_asked(reporter)
        name = f"{one.case.id}{FORMATS[kind]}"
        try:
            labels = one.read()
            if kind == "dicom-seg":
                series.write(folder / name, one, labels, table)
            else:
                write_labels(folder / name, labels, table, kind)
        except (LabelError, ValueError) as error:
            left_out.append((one.case.id, str(error)))
            reporter.event("skipped", name=one.case.id, reason=str(error))
        else:
            rows += list(rows_of(one, labels, table, name))
        done = position + 1
        reporter.event("progress", stage="exporting", done=done, of=len(found), fraction=done / len(found))
    write_tables(folder, rows, left_out)
    if not rows:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in left_out[:3])
        raise ValueError(f"nothing could be exported. {reasons}")
