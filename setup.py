"""Everything is read from settings.ini; edit that file, not this one."""
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
extras = {name: shlex.split(cfg[f"{name}_requirements"]) for name in ("dev", "ray", "data", "course", "widgets")}
package_data = dict((pkg.strip(), files.split()) for pkg, files in
                    (line.split(":", 1) for line in cfg["package_data"].splitlines() if line.strip()))


class BuildWithCourse(build_py):
    """The problem sets are notebooks and live in nbs/, where nbdev skips them; an installed package has them beside tsv_nb/course."""

    def run(self):
        super().run()
        if self.editable_mode: return # a checkout finds them in nbs/
        source, target = here / "nbs" / "course" / "_source", Path(self.build_lib) / cfg["lib_path"] / "course" / "_source"
        shutil.rmtree(target, ignore_errors=True) # of an earlier build
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data=package_data,
    python_requires=">=" + cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithCourse},
    zip_safe=False,
)
