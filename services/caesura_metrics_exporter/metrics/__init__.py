"""The Prometheus metrics of the exporter: what is counted, the state at scrape time, and its text."""
