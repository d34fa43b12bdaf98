"""Draws panels of a dashboard with Grafana's own components, for environments without Grafana's server."""
