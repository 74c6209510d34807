"""Make the pictures of the documentation: the panel and the slice views, on the sample project.

    python Testing/make_screenshots.py docs/screenshots

The views are drawn by Slicer's own code, the panel by Qt with stand-ins for Slicer's widgets (the editor is a box).
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from slicer_harness import module
from slicer_harness.views import SliceView

ROOT = Path(__file__).resolve().parents[1]

#: Width of the panel and side of a view, pixels.
PANEL, VIEW = 460, 420


def main(target: Path) -> None:
    module.boot()
    widget = module.open_widget(module.load(ROOT / "SemiSAMO1" / "SemiSAMO1.py"))
    panel, ui = widget.panel, widget.ui
    panel.settings.put(
        "probe", {"ok": True, "executable": sys.executable, "torch": "2.13.0", "device": "cpu", "step_s": 0.045}
    )
    panel.session.python = panel.setup.python
    panel.setup.show()
    ui.setupSection.collapsed = True
    ui.tryItButton.click()
    for _ in range(5):
        panel.tick()
    panel.banner.hide()
    views = {name: SliceView(name, (VIEW, VIEW)) for name in ("Red", "Yellow", "Green")}
    sections = ("project", "template", "train", "results", "export", "editor")

    def only(*opened: str) -> None:
        for name in sections:
            getattr(ui, f"{name}Section").collapsed = name not in opened
        panel.banner.hide()

    def keep(name: str) -> None:
        module.screenshot(widget, target / f"{name}.png", PANEL)
        _beside(target / f"{name}.png", views)

    only("project")
    module.screenshot(widget, target / "project.png", PANEL)
    ui.openTemplateButton.click()
    only("template", "editor")
    keep("template")
    only("train")
    module.screenshot(widget, target / "train.png", PANEL)
    ui.nextButton.click()
    ui.opacitySlider.value = 0.7
    panel.results.jump()
    only("results")
    keep("results")
    for view in views.values():
        view.close()
    widget.exit()
    widget.cleanup()


def _beside(path: Path, views: dict[str, SliceView]) -> None:
    """The panel on the left, the three views on the right, as in Slicer's conventional layout."""
    panel = Image.open(path).convert("RGB")
    pictures = [Image.fromarray(view.image()) for view in views.values()]
    width, height = panel.width + 2 * VIEW + 8, max(panel.height, 2 * VIEW + 4)
    sheet = Image.new("RGB", (width, height), (60, 60, 60))
    sheet.paste(panel, (0, 0))
    places = [(panel.width + 4, 0), (panel.width + VIEW + 8, 0), (panel.width + 4, VIEW + 4)]
    for picture, place in zip(pictures, places, strict=True):
        sheet.paste(picture, place)
    sheet.save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
