"""The advise job: which scan to label first. numpy and SimpleITK are all it needs."""

from __future__ import annotations

from .. import __version__, files
from ..engine.observer import stop_if_asked
from ..image_io import UnreadableImage
from ..job.folder import JobFolder
from ..project.advisor import Frame, Ranked, rank, sketch
from ..project.case_rows import checked_volume, find_image
from ..volume import Geometry
from .reporter import Reporter


def advise(job: JobFolder, reporter: Reporter) -> None:
    """Rank the project's scans as templates; `results/advice.json` has the ranking, scans that cannot be read named."""
    reporter.handshake(library=__version__)
    rows = files.read_json(job.inputs / "cases.json")["cases"]
    frame = Frame.of([Geometry.from_json(row) for row in rows])
    sketches, unreadable = {}, []
    for position, row in enumerate(rows):
        stop_if_asked(reporter)
        try:
            sketches[row["id"]] = sketch(checked_volume(find_image(row)), frame)
        except UnreadableImage as error:
            unreadable.append(Ranked(row["id"], 0.0, "it cannot be read", str(error)))
            reporter.event("skipped", name=row["id"], reason=str(error))
        done = position + 1
        reporter.event("progress", stage="looking at scans", done=done, of=len(rows), fraction=done / len(rows))
    if not sketches:
        raise ValueError(f"none of the scans can be read: {unreadable[0].warning}")
    ranking = [*rank(sketches), *unreadable]
    files.write_json(job.results / "advice.json", {"ranking": [one.to_json() for one in ranking]})
