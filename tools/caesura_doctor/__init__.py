"""The command ``caesura doctor``: what is wrong or missing on a host, each with its remedy, and what pauses cost there. Changes nothing of the host."""
