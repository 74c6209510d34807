"""The trained model as one portable file: a MONAI bundle with network, plan, label table, card and code to run it."""

from __future__ import annotations

import tempfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__, files
from ..engine.config import TrainingConfig
from ..engine.data.store import Store
from ..engine.devices import make_fabric
from ..engine.inference.ensemble import predicting
from ..engine.planning import Plan
from ..engine.surroundings import Surroundings
from ..job.folder import JobFolder
from ..project import LabelTable, Project, ProjectError
from ..project.results import current_training
from .inputs import ClassMap
from .reporter import Reporter
from .train import config_of

#: Modules of this library that travel along: what `tasks/portable.py` imports.
CODE = (
    "files.py",
    "image_io.py",
    "volume.py",
    "engine/data/boxes.py",
    "engine/data/grids.py",
    "engine/data/intensities.py",
    "engine/inference/portable.py",
    "engine/inference/sliding.py",
    "engine/inference/uncertainty.py",
    "project/label_reader.py",
    "project/label_table.py",
    "project/label_writer.py",
    "tasks/portable.py",
)

_LIBRARY = Path(__file__).resolve().parents[1]

_RUN = '''"""Segment a scan with the network of this bundle: python segment.py SCAN OUTPUT"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

from SemiSAMO1Lib.image_io import SUFFIXES, suffix_of
from SemiSAMO1Lib.tasks.portable import segment_file

SEGMENTS = ".seg.nrrd"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scan", type=Path, help="a scan of the kind that the network was trained on")
    parser.add_argument("output", type=Path, help=f"label map ({', '.join(SUFFIXES)}) or segments ({SEGMENTS})")
    parser.add_argument("--uncertainty", type=Path, help="map of uncertainty to write, 0-100 %%")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0")
    given = parser.parse_args()
    for path, formats in ((given.output, (*SUFFIXES, SEGMENTS)), (given.uncertainty, SUFFIXES)):
        if path is not None and suffix_of(path) not in formats:
            parser.error(f"{path.name}: unknown format; possible are {', '.join(formats)}")
    if not given.scan.is_file():
        parser.error(f"{given.scan} is not a file")
    try:
        segment_file(ROOT, given.scan, given.output, given.uncertainty, given.device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {given.scan.name}: {error}")
    print(given.output)
'''


class Ensemble(nn.Module):
    """The specialists of a run as one network: (B, 1, z, y, x) -> logs of their mean probabilities, (B, C, z, y, x)."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, windows: Tensor) -> Tensor:
        # no tensor is made here: tracing would keep the device that it was made on
        said = [torch.softmax(network(windows).float(), 1) for network in self.networks]
        return torch.stack(said).mean(0).clamp(min=1e-12).log()


def bundle(job: JobFolder, reporter: Reporter) -> None:
    """The bundle job: parameter `output`, the .zip file."""
    reporter.handshake(library=__version__)
    write_bundle(Project(job.project), Path(job.spec()["parameters"]["output"]))


def write_bundle(project: Project, path: Path) -> dict[str, Any]:
    """Write the current training's networks as one .zip file; returns what its card says.

    Raises:
        ProjectError: no finished training with a network, or a path that is no .zip.
    """
    if path.suffix.lower() != ".zip":
        raise ProjectError(f"{path.name}: a bundle is one .zip file; give a name with that ending")
    job = current_training(project)
    config, store = config_of(job), Store(job.work)
    if config.rounds == 0:
        raise ProjectError("this training has no network (0 rounds)")
    plan = Plan.model_validate(store.json("plan.json"))
    table = LabelTable.from_json(job.spec()["labels"])
    networks = _networks(config, plan, store)
    network, card = _traced(networks, plan), _metadata(job, config, plan, table, len(networks))
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as bundle:
        root = path.stem
        for name, text in _texts(card, config, plan, table, Surroundings.of(store).looked_at or None).items():
            _put(bundle, f"{root}/{name}", text)
        for name in CODE:
            bundle.write(_LIBRARY / name, f"{root}/scripts/SemiSAMO1Lib/{name}")
        for package in ("", "engine/", "engine/data/", "engine/inference/", "project/", "tasks/"):
            _put(bundle, f"{root}/scripts/SemiSAMO1Lib/{package}__init__.py", "")
        with tempfile.TemporaryDirectory() as folder:
            torch.jit.save(network, str(Path(folder) / "model.ts"))
            bundle.write(Path(folder) / "model.ts", f"{root}/models/model.ts")
    return card


def _put(bundle: zipfile.ZipFile, name: str, text: str) -> None:
    """A text that everybody may read when it is unpacked."""
    entry = zipfile.ZipInfo(name, time.localtime()[:6])
    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
    bundle.writestr(entry, text)


def _networks(config: TrainingConfig, plan: Plan, store: Store) -> list[nn.Module]:
    """The specialists that the last round used."""
    learners = predicting(plan, config, make_fabric("cpu", "32-true"), store)
    return [learner.inference_model().eval() for learner in learners]


def _traced(networks: list[nn.Module], plan: Plan) -> torch.jit.ScriptModule:
    """Specialists as one network, traced on a window of the plan's size."""
    ensemble = Ensemble(networks).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # windows have one size: what is traced as a constant is one
        warnings.filterwarnings("ignore", message="Converting a tensor to a Python boolean")
        traced = torch.jit.trace(ensemble, torch.zeros(1, 1, *plan.patch), check_trace=False)
    assert isinstance(traced, torch.jit.ScriptModule), "a module was traced"
    return traced


def _metadata(
    job: JobFolder, config: TrainingConfig, plan: Plan, table: LabelTable, specialists: int
) -> dict[str, Any]:
    """metadata.json of a MONAI bundle. Nothing of the scans stands in it but their number."""
    who = f"The specialist of round {config.rounds}" if specialists == 1 else f"Mean of {specialists} specialists"
    listing = files.read_json(job.inputs / "cases.json")
    channels = {str(number): name for number, name in enumerate(["background", *(label.name for label in table)])}
    window = [int(side) for side in plan.patch]
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "written by SemiSAMO1"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"scipy": "1.11", "SimpleITK": "2.3", "pydantic": "2"},
        "name": "SemiSAMO1 specialist",
        "task": "Segmentation of 3D scans, learned from few labels",
        "description": f"{who} ({config.specialist}, {config.learner}).",
        "authors": "",
        "copyright": "",
        "intended_use": "Research. Every segmentation needs to be looked at by a person who can judge it.",
        "trained_on": {"labelled": len(listing["labelled"]), "unlabelled": len(listing["cases"])},
        "created": time.strftime("%Y-%m-%d"),
        "semisamo1_version": __version__,
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "as trained",
                    "num_channels": 1,
                    "spatial_shape": window,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "segmentation",
                    "num_channels": plan.classes,
                    "spatial_shape": window,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": channels,
                }
            },
        },
    }


def _texts(
    card: dict[str, Any], config: TrainingConfig, plan: Plan, table: LabelTable, extent: Sequence[float] | None
) -> dict[str, str]:
    values = list(ClassMap.of(table).values)
    described = plan.model_dump(mode="json", include={"spacing", "patch", "classes", "intensity"})
    inference = {
        "imports": ["$import sys"],
        "initialize": ["$sys.path.insert(0, @bundle_root + '/scripts')"],
        "bundle_root": ".",
        "scan": "scan.nrrd",
        "output": "segmentation.nrrd",
        "device": "cpu",
        "run": [
            {
                "_target_": "SemiSAMO1Lib.tasks.portable.segment_file",
                "root": "@bundle_root",
                "scan": "@scan",
                "output": "@output",
                "device": "@device",
            }
        ],
    }
    passes = {"test_time_passes": config.test_time_passes, "seed": config.seed, "label_values": values}
    where = {"surroundings_mm": extent}
    return {
        "configs/metadata.json": files.as_json(card),
        "configs/inference.json": files.as_json(inference),
        "plan.json": files.as_json({**described, **passes, **where}),
        "labels.json": files.as_json(table.to_json()),
        "segment.py": _RUN,
        "docs/README.md": _card(card, table, plan, extent),
        "LICENSE": (_LIBRARY.parent / "LICENSE").read_text(encoding="utf-8")
        if (_LIBRARY.parent / "LICENSE").is_file()
        else "",
    }


def _card(card: dict[str, Any], table: LabelTable, plan: Plan, extent: Sequence[float] | None) -> str:
    where = ""
    if extent is not None:
        z, y, x = (round(mm) for mm in extent)
        spacing = " × ".join(f"{mm:.2g}" for mm in reversed(plan.spacing))
        where = f"""
It learned from what lies around the labels alone ({x} × {y} × {z} mm). In a scan that shows more it is asked twice:
where it sees most of what it knows, and what it sees there. The first takes time and memory in a large scan (some 35
bytes a voxel of {spacing} mm), and is unsure where the scan shows what it has never seen. Elsewhere all is background.
Cut out around the structures, a scan is segmented as the network learned to.
"""
    labels = "\n".join(f"- {label.value}: {label.name}" for label in table)
    trained = card["trained_on"]
    return f"""# {card["name"]}

{card["description"]} Trained on {trained["labelled"]} labelled and {trained["unlabelled"]} unlabelled scans with
SemiSAMO1 {card["semisamo1_version"]}, {card["created"]}.

Labels:
{labels}

Segment a scan: `python segment.py SCAN OUTPUT`. It needs Python 3.11, torch, MONAI, SimpleITK, scipy and pydantic;
`python -m monai.bundle run --config_file configs/inference.json` needs fire too.

This is the network alone. Inside its project a prediction is joined with what registration carries over from the
labelled scans and from cases that look like it, which are not in this file; there it may be better or worse. No scan
and no patient's data are in this file.
{where}
{card["intended_use"]}
"""
