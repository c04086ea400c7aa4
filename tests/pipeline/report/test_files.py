import os

import pytest

from jaxqat.pipeline.report.files import write_atomically


def test_interrupted_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(file):
        file.write(b"half of the ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
