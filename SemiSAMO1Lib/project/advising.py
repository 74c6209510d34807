"""From the project to an advise job, and from the newest finished one back: which scan to label first."""

from __future__ import annotations

from .. import files
from ..job.folder import JobFolder, JobKind
from ..job.watch import all_jobs
from .advisor import Ranked
from .case_rows import case_row
from .cases import Role
from .store import Project, ProjectError

#: With fewer scans there is nothing to choose from.
FEWEST = 3


def request_advice(project: Project) -> JobFolder:
    """Make the job folder of an advice; excluded scans take no part. Raises ProjectError when there are too few."""
    cases = [case for case in project.refresh().cases if case.role is not Role.EXCLUDED]
    if len(cases) < FEWEST:
        raise ProjectError(f"the project has {len(cases)} scans; {FEWEST} are needed to recommend one of them")
    job = JobFolder.create(project.jobs, JobKind.ADVISE, {}, [])
    files.write_json(job.inputs / "cases.json", {"cases": [case_row(project, case) for case in cases]})
    return job


def read_advice(project: Project) -> list[Ranked]:
    """The newest ranking, the recommended scan first; empty before there is one. Cases that are gone are left out."""
    for job in reversed(all_jobs(project.jobs)):
        path = job.results / "advice.json"
        if job.id.endswith(f"-{JobKind.ADVISE}") and path.is_file():
            known = {case.id for case in project.state.cases}
            rows = [Ranked(**row) for row in files.read_json(path)["ranking"]]
            return [one for one in rows if one.case in known]
    return []
