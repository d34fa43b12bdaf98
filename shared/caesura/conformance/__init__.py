"""What authors of drivers and of buses hold theirs to: the suites that Caesura's own are held to.

``drivers.DriverConformance`` and ``buses.BusConformance`` are pytest classes: subclass one in a test module and give it the fixture
that it asks for. They need ``pip install 'caesura[conformance]'``. Nothing of the product imports this package.
"""

import pytest

# Failed assertions show their values, as in a test module of one's own.
pytest.register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("drivers", "bus_delivery", "bus_faults", "bus_sessions"))
)
