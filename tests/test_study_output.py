"""A study's folder receives all of its files or none."""

import pytest

from parallax_core.distributed.output import output_folder


def fail_half_way(target):
    def write():
        with output_folder(target) as staging:
            (staging / "x").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()


def test_a_new_folder_appears_complete(tmp_path):
    target = tmp_path / "a" / "b"
    with output_folder(target) as staging:
        (staging / "x").write_text("new")
        assert not target.exists()
    assert (target / "x").read_text() == "new"
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "x"]


def test_an_error_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a" / "b"
    fail_half_way(target)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "mine").write_text("mine")
    with output_folder(tmp_path) as staging:
        (staging / "x").write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "new", "mine": "mine"}


def test_an_error_leaves_an_existing_folder_as_it_was(tmp_path):
    (tmp_path / "x").write_text("old")
    fail_half_way(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "old"}


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"), output_folder(file / below):
        pytest.fail("the block must not run")
