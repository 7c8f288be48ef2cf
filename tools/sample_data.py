"""Draw a small data set in the competition's exact layout: pictures, captions and embeddings, made by code.

    python tools/sample_data.py data                     # 2,000 pictures, 10,000 captions, some ten seconds
    python tools/sample_data.py build/big --full-size    # the competition's size and dtypes, no pictures

Scenes of coloured shapes are drawn with pillow and described in five differently worded captions each. Fixed random
encoders stand in for RoBERTa and DINOv2: hashed words and bigrams through a random two-layer map to 1024-d; pooled
colour and edge filters through a random layer to 1536-d, un-normalised around a strong common direction.
`solution.npz` holds the test images' embeddings: what a competitor never sees, only a grader may read it. As in the
competition, the test has captions and no pictures.
"""

from __future__ import annotations

from pathlib import Path

from lib.project import InputError, make_parser, run_tool
from lib.sample.layout import FEWEST, FULL_IMAGES, MOST, N_IMAGES, make_full_size, make_sample
from lib.sample.scenes import CAPTIONS_PER_IMAGE


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "0 drawn, 1 it could not be written, 2 wrong input")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to make; it appears complete or not at all")
    parser.add_argument("--images", type=int, help=f"training images (default {N_IMAGES}; full size {FULL_IMAGES})")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    parser.add_argument("--full-size", action="store_true", help="synthetic arrays of the competition's size instead")
    given = parser.parse_args(argv)
    make, default = (make_full_size, FULL_IMAGES) if given.full_size else (make_sample, N_IMAGES)
    images = default if given.images is None else given.images
    if not FEWEST <= images <= MOST:
        raise InputError(f"--images {images}: give {FEWEST} to {MOST}")
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: give 0 or more")
    make(given.dest, images, given.seed)
    size = sum(path.stat().st_size for path in given.dest.rglob("*") if path.is_file())
    print(f"{given.dest}: {images} images, {images * CAPTIONS_PER_IMAGE} captions, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    run_tool(main)
