"""The command group ``caesura host``: prepares a host for updates that replace its kernel, and loads the next kernel."""
