"""Week 11. The files of a folder, and what in it is passed over, with the reason."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class FolderFiles(NamedTuple):
    """What `find_files` came upon, by path below the folder, with forward slashes."""

    files: dict[str, Path]
    left_out: dict[str, str]
    """Why."""


def find_files(folder: Path, follow_links: bool = False) -> FolderFiles:
    """The files in a folder, at any depth. Those whose name begins with a dot, and folders, are ignored.

    Links to files in the folder are files of it. What leads out of the folder, and links to folders, are left
    out; with `follow_links` they are followed, and each folder is read once. Left out are also broken links,
    pipes and the like, names that are not UTF-8, and folders that cannot be opened.
    """
    walk = _Walk(folder, follow_links)
    walk.read_all()
    return FolderFiles(walk.files, walk.left_out)


def printable_path(path: str | Path) -> str:
    """A path that can be printed: bytes of its name that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Walk:
    def __init__(self, folder: Path, follow_links: bool):
        self.files: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        self._top = Path(os.path.realpath(folder))
        self._follow_links = follow_links
        self._folders = [(self._top, "")]
        self._links: list[tuple[Path, str]] = []  # to folders: read last, so that a folder has its own name
        self._read: set[tuple[int, int]] = set()

    def read_all(self) -> None:
        while self._folders or self._links:
            path, source = self._folders.pop() if self._folders else self._links.pop(0)
            try:
                self._read_folder(path, source)
            except OSError as error:
                self.left_out[source or "."] = f"the folder cannot be opened: {error.strerror}"

    def _read_folder(self, path: Path, source: str) -> None:
        status = path.stat()
        if (status.st_dev, status.st_ino) in self._read:
            self.left_out[source] = "a link leads to it, and it is read under another name"
            return
        self._read.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=_name):
                if not entry.name.startswith("."):
                    self._sort_in(path / entry.name, f"{source}/{entry.name}" if source else entry.name)

    def _sort_in(self, path: Path, source: str) -> None:
        """Keeps what stands in a folder as a file, as a folder, or as left out."""
        link = path.is_symlink()
        try:
            source.encode("utf-8")
            mode = path.stat().st_mode
        except UnicodeEncodeError:
            self.left_out[printable_path(source)] = "its name is not UTF-8: rename it"
            return
        except OSError as error:
            reason = error.strerror or str(error)
            self.left_out[source] = f"a link to {_target(path)}: {reason}" if link else reason
            return
        if link and not self._follow_links and not self._inside(path):
            self.left_out[source] = f"a link out of the folder, to {_target(path)}; it is not followed"
        elif stat.S_ISDIR(mode) and not link:
            self._folders.append((path, source))
        elif stat.S_ISDIR(mode) and self._follow_links:
            self._links.append((path, source))
        elif stat.S_ISDIR(mode):
            self.left_out[source] = f"a link to the folder {_target(path)}; it is not followed"
        elif stat.S_ISREG(mode):
            self.files[source] = path
        else:
            self.left_out[source] = "it is no file but a pipe, a socket or a device"

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._top)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _target(link: Path) -> str:
    return printable_path(os.readlink(link))
