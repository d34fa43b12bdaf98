"""The command ``caesura doctor``: what is wrong or missing on a host, each with its remedy. Changes nothing and pauses nothing."""
