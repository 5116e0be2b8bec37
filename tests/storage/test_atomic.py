import pytest

from tokenflow.storage.atomic import atomic


def test_the_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "config.yaml"
    with atomic(path) as temporary:
        temporary.write_text("seed: 1")
        assert temporary.parent == path.parent
        assert temporary.suffix == ".yaml"
        assert not path.exists()
    assert path.read_text() == "seed: 1"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
