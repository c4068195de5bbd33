"""Week 0. Draws all pictures again: python -m shared.course.pictures"""

from shared.course.pictures.catalogue import PICTURES, picture_path
from shared.runtime import ROOT, write_atomically


def main() -> None:
    """Writes docs/images/*.svg."""
    for draw in PICTURES:
        path = picture_path(draw)
        write_atomically(path, draw().svg())
        print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
