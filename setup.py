"""Adds to what pyproject.toml describes the file that lets PEFT find this package; see ``sparsepeft_autoload``."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# One line, as Python demands of such files. The module may be gone where the package was installed editable.
PTH = (
    'import os; os.environ.get("SPARSEPEFT_AUTOLOAD") == "0" or '
    r'exec("try:\n import sparsepeft_autoload as s\nexcept ImportError:\n pass\nelse:\n s.install()")' + "\n"
)


class BuildWithPth(build_py):
    """Puts ``sparsepeft.pth`` beside the packages, in wheels and in editable installs."""

    def run(self) -> None:
        """Build as usual, and add the file."""
        super().run()
        # What is built for an editable install is thrown away, but what lies in the folder to install from is kept.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        Path(folder, "sparsepeft.pth").write_text(PTH, encoding="utf-8")


setup(cmdclass={"build_py": BuildWithPth})
