"""Checks what `make demo` leaves: decodable, complete, of the source's size, edited, on a page."""

from pathlib import Path

import yaml
from PIL import Image

from tokenflow.video import read_clip

run = Path("runs/blue_ball")
summary = yaml.safe_load((run / "run.yaml").read_text())
source = read_clip(summary["data"]["video"])
edited, compare = read_clip(run / "edited.mp4"), read_clip(run / "compare.mp4")
sheet = Image.open(run / "contact_sheet.png")
sheet.load()

height, width = source.display_size
assert edited.frames.shape == source.frames.shape, (edited.frames.shape, source.frames.shape)
assert edited.times == source.times, (edited.times, source.times)
assert len(compare) == len(source), (len(compare), len(source))
assert compare.display_size[0] == height, compare.display_size
assert compare.display_size[1] >= 2 * width, compare.display_size
assert sheet.height >= 2 * height, sheet.size
page = (run / "report.html").read_text()
assert page.count('src="data:video/mp4;base64,') == 2
assert len(page) < 20e6, f"the demo's page has {len(page) / 1e6:.1f} MB"
difference = (edited.frames - source.frames).abs().mean().item()
assert difference > 0.05, f"the edit hardly differs from the source: {difference:.3f}"
seconds = sum(summary["run"]["seconds"].values())
assert seconds < 180, f"the demo's editing took {seconds:.0f} s, expected under 180"
print(f"demo: {len(edited)} frames of {width}x{height}, {seconds:.0f} s, differs {difference:.2f}")
