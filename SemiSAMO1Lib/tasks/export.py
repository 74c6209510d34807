"""The export job: every segmentation as NRRD, NIfTI or DICOM SEG, with a table of volumes and origins."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.observer import stop_if_asked
from ..job.folder import JobFolder
from ..project import Project, Review
from ..project.export import (
    FORMATS,
    chosen,
    clear_earlier,
    require_output,
    rows_of,
    said_outside,
    write_labels,
    write_tables,
)
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
    table = project.state.labels
    rows: list[dict[str, Any]] = []
    clear_earlier(folder, kind, [f"{one.case.id}{FORMATS[kind]}" for one in found])
    for position, one in enumerate(found):
        if reporter.should_stop():
            write_tables(folder, kind, rows, left_out)
        stop_if_asked(reporter)
        name = f"{one.case.id}{FORMATS[kind]}"
        try:
            labels = one.read()
            if kind == "dicom-seg":
                if emptied := series.write(folder / name, one, labels, table):
                    tags = ", ".join(emptied)
                    text = f"{one.case.id}: left empty, as they are not written as DICOM has them: {tags}"
                    reporter.event("warning", text=text)
            else:
                review = Review.ACCEPTED if one.what == "label" else one.case.review
                write_labels(folder / name, labels, table, kind, review)
        except Exception as error:  # one scan that cannot be written does not keep the others back
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            print(traceback.format_exc(), flush=True)
            left_out.append((one.case.id, said_outside(str(error) or type(error).__name__, project, one.case)))
            reporter.event("skipped", name=one.case.id, reason=str(error))
        else:
            rows += list(rows_of(one, labels, table, name))
        done = position + 1
        reporter.event("progress", stage="exporting", done=done, of=len(found), fraction=done / len(found))
    write_tables(folder, kind, rows, left_out)
    if not rows:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in left_out[:3])
        more = f"; and {len(left_out) - 3} more, see left_out.csv" if len(left_out) > 3 else ""
        raise ValueError(f"nothing could be exported. {reasons}{more}")
