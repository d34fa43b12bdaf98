"""Makes the dashboards in ``grafana/dashboards`` from code, with Grafana's own foundation SDK."""
