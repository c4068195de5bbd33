"""shared/retrieval/folder.py: what stands in a folder is read; what is passed over is said."""

import os
from functools import partial

import pytest

from shared.retrieval.documents import load_documents, read_document


@pytest.fixture
def folder(tmp_path):
    """A folder with documents in it and beside it, and links of all kinds between them."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("hunter2")
    inside = tmp_path / "documents"
    (inside / "deep/er").mkdir(parents=True)
    (inside / "..data").mkdir()
    (inside / "..data/mounted.txt").write_text("as Kubernetes does it")
    (inside / "a.txt").write_text("a")
    (inside / "deep/er/b.txt").write_text("b")
    (inside / "mounted.txt").symlink_to("..data/mounted.txt")
    (inside / "notes.txt").symlink_to(tmp_path / "secret/key.txt")
    (inside / "relative.txt").symlink_to("../secret/key.txt")
    (inside / "elsewhere").symlink_to(tmp_path / "secret")
    (inside / "deep/again").symlink_to("er")
    (inside / "deep/top").symlink_to("..")
    (inside / "gone.txt").symlink_to("missing.txt")
    (inside / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(inside / "pipe.txt")
    return inside


def load(folder, **options):
    said = []
    documents, problems = load_documents(folder, said.append, **options)
    assert said == [f"left out: {source}: {reason}" for source, reason in sorted(problems.items())]
    return {document.source: document.sections[0].text for document in documents}, problems


def test_nothing_outside_of_the_folder_is_read_and_all_that_is_left_out_is_said(folder):
    found, problems = load(folder)
    assert found == {"a.txt": "a", "deep/er/b.txt": "b", "mounted.txt": "as Kubernetes does it"}
    assert problems == {
        "deep/again": "a link to the folder er; it is not followed",
        "deep/top": "a link to the folder ..; it is not followed",
        "elsewhere": f"a link out of the folder, to {folder.parent / 'secret'}; it is not followed",
        "gone.txt": "a link to missing.txt: No such file or directory",
        "loop.txt": "a link to loop.txt: Too many levels of symbolic links",
        "notes.txt": f"a link out of the folder, to {folder.parent / 'secret/key.txt'}; it is not followed",
        "pipe.txt": "it is no file but a pipe, a socket or a device",
        "relative.txt": "a link out of the folder, to ../secret/key.txt; it is not followed",
    }


def test_links_are_followed_when_that_is_asked_for_and_each_folder_is_read_once(folder):
    found, problems = load(folder, follow_links=True)
    secrets = dict.fromkeys(["elsewhere/key.txt", "notes.txt", "relative.txt"], "hunter2")
    assert found == {
        "a.txt": "a",
        "deep/er/b.txt": "b",
        "mounted.txt": "as Kubernetes does it",
        **secrets,
    }
    twice = "a link leads to it, and it is read under another name"
    assert problems.keys() == {"deep/again", "deep/top", "gone.txt", "loop.txt", "pipe.txt"}
    assert problems["deep/again"] == problems["deep/top"] == twice


def test_the_folder_or_file_that_is_named_may_be_a_link(folder):
    (folder.parent / "link").symlink_to(folder)
    assert load(folder.parent / "link") == load(folder)
    assert load(folder / "notes.txt") == ({"notes.txt": "hunter2"}, {})


def test_a_pipe_is_not_waited_for(folder):
    for read in (partial(read_document, root=folder), load_documents):
        with pytest.raises(ValueError, match="it is no file but a folder, a pipe"):
            read(folder / "pipe.txt")


def test_a_name_that_is_not_utf_8_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
            file.write("b")
        os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    except OSError:  # macOS has no such names
        return
    found, problems = load(tmp_path)
    assert found == {"a.txt": "a"}
    assert problems == dict.fromkeys(["caf\\xe9.txt", "\\xff"], "its name is not UTF-8: rename it")
    named = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    assert load(named) == ({"caf\\xe9.txt": "b"}, {})
    with pytest.raises(ValueError, match=r"xff does not exist|xff has no files in it"):
        load_documents(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))


def test_a_folder_that_cannot_be_opened_is_said(folder, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found, problems = load(folder)
    assert found.keys() == {"a.txt", "mounted.txt"}
    assert problems["deep"] == "the folder cannot be opened: Permission denied"
