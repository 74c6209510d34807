"""Make the sample project of the module: twelve phantoms, one labelled, the others predicted by a real training.

    make sample        (python Testing/make_sample.py SemiSAMO1/Resources/Sample/phantoms.zip)

The scans lie in the project, so that the copy that a person opens is complete. Working files are left out.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.phantoms import LABELS, write_cohort
from SemiSAMO1Lib.project import Label, Project
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.tasks.run import FINISHED, work

SCANS, SEED = 12, 5

#: Largest size of the sample, bytes.
LARGEST = 5 << 20

COLORS = {1: (230, 159, 0), 2: (86, 180, 233), 3: (213, 94, 0)}


def main(target: Path) -> None:
    """Make `target`, a zip file of the project folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_cohort(folder / "cohort", SCANS, SEED)
        project = Project.create(folder / "phantoms", "phantoms")
        scans = [str(folder / "cohort" / "images" / f"{name}.nrrd") for name in names]
        _work(JobFolder.create(project.jobs, JobKind.IMPORT, {"files": scans}, []))
        project.refresh()
        project.add_label(names[0], folder / "cohort" / "labels" / f"{names[0]}.nrrd")
        project.update_labels(Label(value, name, COLORS[value]) for value, name in LABELS.items())
        job = request_training(project, {"preset": "quick", "device": "cpu", "seed": 0})
        _work(job)
        _forget_places(project, job)
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(project.folder.rglob("*")):
                relative = path.relative_to(project.folder)
                if path.is_file() and "work" not in relative.parts and "cache" not in relative.parts:
                    archive.write(path, relative.as_posix())
    size = target.stat().st_size
    print(f"{target}: {size / 2**20:.1f} MiB, {SCANS} scans")
    if size > LARGEST:
        sys.exit(f"the sample is larger than {LARGEST >> 20} MiB")


def _work(job: JobFolder) -> None:
    if work(job.path) != FINISHED:
        sys.exit(f"{job.id} failed: {job.read_status()}")


def _forget_places(project: Project, job: JobFolder) -> None:
    """Take the places of this computer out of the project's files: scans are found beside the project."""
    value = files.read_json(project.file)
    for row in value["cases"]:
        row["image"]["absolute"] = row["image"]["relative"]
    files.write_json(project.file, value)
    listing = files.read_json(job.inputs / "cases.json")
    for row in [*listing["labelled"], *listing["cases"]]:
        row["places"] = [f"../../images/{row['id']}.nrrd"]
    files.write_json(job.inputs / "cases.json", listing)
    for one in (project.jobs / "0001-import", job.path):
        status = files.read_json(one / "status.json")
        files.write_json(one / "status.json", {**status, "host": "sample", "user": "sample", "pid": None})
        spec = files.read_json(one / "job.json")
        spec["parameters"].pop("files", None)
        files.write_json(one / "job.json", spec)
        (one / "log.txt").unlink(missing_ok=True)
        lines = [line for line in files.read_lines(one / "events.jsonl")[0] if line["kind"] != "handshake"]
        (one / "events.jsonl").unlink()
        for line in lines:
            files.append_line(one / "events.jsonl", line)
    for record in (project.folder / "labels").rglob("*.json"):
        files.write_json(record, {**files.read_json(record), "reviewer": "sample"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
