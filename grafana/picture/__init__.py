"""Draws panels of a dashboard with Grafana's own components, for those who cannot run Grafana's server."""
