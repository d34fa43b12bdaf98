"""The image of the hosts, which all of these tests have."""

from __future__ import annotations

import os

import pytest

from caesura_nested_host.image import Image, NoImage, build, missing


@pytest.fixture(scope="session")
def image() -> Image:
    if why := missing():
        pytest.skip(why)
    try:
        return build(uv=os.environ.get("UV", "uv"))
    except NoImage as error:
        pytest.fail(str(error))
