"""Maps ``csrc`` into the wheel as ``fastood/_csrc``; everything else lives in pyproject.toml.

Kernels are compiled just in time, so a wheel has to carry its C++ and CUDA sources. A checkout
reads ``csrc`` where it lies.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastood", "fastood.*"]), "fastood._csrc"],
    include_package_data=False,  # photographs are data; setuptools would warn of packages
    package_dir={"fastood._csrc": "csrc"},
    package_data={
        "fastood": ["py.typed"],
        "fastood.models": ["tiny/*"],
        "fastood.demo": ["photos/**/*", "*.json", "*.md", "*.txt"],
        "fastood.report": ["*.html", "*.css"],
        "fastood._csrc": ["*", "**/*"],
    },
)
