"""The metrics exporter: the events and states on the bus, as Prometheus metrics."""
