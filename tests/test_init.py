"""What a folder hands out by name, and when."""

import subprocess
import sys

import pytest

import utils.pipeline
from utils.pipeline.stage import open_stage
from utils.project import ROOT


def test_a_surface_hands_out_its_names_and_no_others():
    assert utils.pipeline.__all__ == ["open_stage"] and utils.pipeline.open_stage is open_stage
    with pytest.raises(AttributeError, match="nothing"):
        _ = utils.pipeline.nothing


def test_a_folder_is_imported_without_what_its_modules_need():
    code = "import sys, utils.models, utils.evaluation, utils.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
