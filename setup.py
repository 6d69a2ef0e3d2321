"""Lets `pip install -e .` install the checkout, and refuses to build a wheel of it.

A wheel would put packages of such general names as images, metrics and train into an environment.
"""

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel


class RefusedWheel(bdist_wheel):
    """What pip builds for `pip install .`; an editable install has another command."""

    def run(self) -> None:
        raise SystemExit("pfgmpp is used from its checkout: install it by 'pip install -e .', or "
                         "run the scripts there without installing anything")


if __name__ == "__main__":
    setuptools.setup(cmdclass={"bdist_wheel": RefusedWheel})
