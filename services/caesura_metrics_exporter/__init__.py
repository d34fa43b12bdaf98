"""The metrics exporter: everything that happens on the bus, as Prometheus metrics."""
